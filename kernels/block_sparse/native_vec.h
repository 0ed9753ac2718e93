// Vectors of fp32, and what the softmax computes with them.

#pragma once

#include <ATen/cpu/vec/vec.h>

#include <array>
#include <cstdint>
#include <vector>

namespace {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kLanes = Vec::size();

// Cut `memory`, grown if need be, into pieces of so many fp32 numbers that start with cache lines.
template <size_t N>
std::array<float*, N> cut(std::vector<float>& memory, const int64_t (&sizes)[N]) {
  constexpr int64_t kLine = 16;
  int64_t total = kLine;
  for (const int64_t size : sizes) total += (size + kLine - 1) / kLine * kLine;
  if (static_cast<int64_t>(memory.size()) < total) memory.resize(total);
  std::array<float*, N> found;
  float* at = memory.data();
  at += (-(reinterpret_cast<uintptr_t>(at) / sizeof(float)) % kLine);
  for (size_t n = 0; n < N; ++n) {
    found[n] = at;
    at += (sizes[n] + kLine - 1) / kLine * kLine;
  }
  return found;
}

// 2 ** x for x <= 0; relative error 1e-7 (minimax fit of degree 5 that gives exactly 1 at 0).
inline Vec exp2_up_to_one(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 clamped = _mm512_max_ps(_mm512_set1_ps(-200.f), x);
  const __m512 whole = _mm512_roundscale_ps(clamped, _MM_FROUND_TO_NEAREST_INT);
  const __m512 r = _mm512_sub_ps(clamped, whole);
  __m512 sum = _mm512_set1_ps(1.326472690e-03f);
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(9.671512661e-03f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(5.550733744e-02f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(2.402224208e-01f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(6.931469776e-01f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(sum, whole);
#else
  return (x * Vec(0.6931471805599453f)).exp_u20();
#endif
}

// The larger of two; where one is nan either may come out, the weights are nan all the same.
inline Vec larger(const Vec& a, const Vec& b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_max_ps(a, b);
#else
  return at::vec::maximum(a, b);
#endif
}

}  // namespace
