// Choose blocks: means of queries and keys over each block, and the best by their products.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "native_grid.h"
#include "native_sizes.h"
#include "native_vec.h"

namespace {

using at::Tensor;

constexpr float kLargest = std::numeric_limits<float>::max();

// Two vectors of fp32; `count` of their numbers are there.
template <typename T>
inline std::tuple<Vec, Vec> load_two(const T* from, int64_t count) {
  using Stored = at::vec::Vectorized<T>;
  if constexpr (std::is_same_v<T, float>) {
    if (count == 2 * kLanes) return {Vec::loadu(from), Vec::loadu(from + kLanes)};
    if (count <= kLanes) return {Vec::loadu(from, count), Vec(0.f)};
    return {Vec::loadu(from), Vec::loadu(from + kLanes, count - kLanes)};
  } else {
    return at::vec::convert_to_float<T>(count == 2 * kLanes ? Stored::loadu(from)
                                                            : Stored::loadu(from, count));
  }
}

// Add `count` numbers of each row to `sum`, which stays in 2 `P` registers. The rows to come are
// asked for: a core reads 29 GB/s so, and 16 by itself.
template <int P, typename T>
inline void add_rows(const T* from, int64_t count, int64_t stride, int64_t rows, float* sum) {
  constexpr int64_t kBytes = 2 * P * kLanes * sizeof(T), kAheadBytes = 4096;
  const int64_t ahead = kAheadBytes / kBytes * stride, last = count - (P - 1) * 2 * kLanes;
  Vec total[2 * P];
#pragma GCC unroll 8
  for (int n = 0; n < 2 * P; ++n) total[n] = Vec::loadu(sum + n * kLanes);
  for (int64_t row = 0; row < rows; ++row, from += stride) {
    const char* coming = reinterpret_cast<const char*>(from + ahead);
#pragma GCC unroll 8
    for (int64_t byte = 0; byte < kBytes; byte += 64) __builtin_prefetch(coming + byte);
#pragma GCC unroll 4
    for (int n = 0; n < P; ++n) {
      const auto [low, high] = load_two(from + n * 2 * kLanes, n == P - 1 ? last : 2 * kLanes);
      total[2 * n] = total[2 * n] + low;
      total[2 * n + 1] = total[2 * n + 1] + high;
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < 2 * P; ++n) total[n].store(sum + n * kLanes);
}

// Average the tokens of each block, `[B * H, blocks, D]`.
template <typename T>
void pool(const Tensor& x, const Grid& grid, float* means) {
  const int64_t heads = x.size(1), stride = x.stride(2), dim = x.size(3), blocks = grid.count();
  constexpr int64_t kTwo = 2 * kLanes;
  at::parallel_for(0, x.size(0) * heads * blocks, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> sum((dim + kTwo - 1) / kTwo * kTwo);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t pair = at / blocks;
      const T* head = x.const_data_ptr<T>() + pair / heads * x.stride(0) +
          pair % heads * x.stride(1);
      std::fill(sum.begin(), sum.end(), 0.f);
      int64_t tokens = 0;
      grid.runs(at % blocks, [&](int64_t first, int64_t rows) {
        for (int64_t d = 0; d < dim; d += 4 * kTwo) {
          const T* from = head + first * stride + d;
          float* to = sum.data() + d;
          const int64_t count = std::min(dim - d, 4 * kTwo);
          switch ((count + kTwo - 1) / kTwo) {
            case 1: add_rows<1>(from, count, stride, rows, to); break;
            case 2: add_rows<2>(from, count, stride, rows, to); break;
            case 3: add_rows<3>(from, count, stride, rows, to); break;
            default: add_rows<4>(from, count, stride, rows, to); break;
          }
        }
        tokens += rows;
      });
      for (int64_t d = 0; d < dim; ++d) means[at * dim + d] = sum[d] / static_cast<float>(tokens);
    }
  });
}

// Means over the blocks of a grid, `[B, H, N, D]` fp32.
inline Tensor means(const Tensor& x, const Grid& grid) {
  const Tensor rows = x.stride(3) == 1 ? x : x.contiguous();
  Tensor out = at::empty({x.size(0), x.size(1), grid.count(), x.size(3)},
                         x.options().dtype(at::kFloat));
  float* to = out.mutable_data_ptr<float>();
  switch (x.scalar_type()) {
    case at::kFloat: pool<float>(rows, grid, to); break;
    case at::kBFloat16: pool<at::BFloat16>(rows, grid, to); break;
    case at::kHalf: pool<at::Half>(rows, grid, to); break;
    default: TORCH_CHECK(false, "x must be fp32, bf16 or fp16, got ", x.scalar_type());
  }
  return out;
}

// Means for lipass.kernels.pool; `grid` holds grid and tile.
Tensor pool_blocks(const Tensor& x, at::IntArrayRef grid) {
  TORCH_CHECK(grid.size() == 6, "grid must hold 6 numbers, got ", grid.size(),
              "; pass grid and tile");
  const Grid tokens(grid.data());
  check_sizes("x", x, {-1, -1, tokens.tokens(), -1});
  return means(x, tokens);
}

// Pool and select where no frame is dropped; see lipass.kernels.select.api. `grids` holds grid
// and tile of the queries and of the candidates; `guarded` [Nq or 1, Nc] are visited in any case.
// Every row visits the `before` blocks in front of the candidates, `wanted` candidates, and the
// `after` blocks behind them. `k_means` [B, H, Nc, D] are the means of `k` where they are known.
Tensor plan(const Tensor& q, const Tensor& k, at::IntArrayRef grids,
            const std::optional<Tensor>& guarded, int64_t wanted, int64_t before, int64_t after,
            const std::optional<Tensor>& k_means) {
  TORCH_CHECK(grids.size() == 12, "grids must hold 12 numbers, got ", grids.size(),
              "; pass grid and tile of queries and candidates");
  const Grid q_grid(grids.data()), k_grid(grids.data() + 6);
  check_sizes("q", q, {-1, -1, q_grid.tokens(), -1});
  check_sizes("k", k, {q.size(0), q.size(1), k_grid.tokens(), q.size(3)});
  const int64_t rows = q_grid.count(), columns = k_grid.count(), dim = q.size(3);
  if (k_means) check_sizes("k_means", *k_means, {q.size(0), q.size(1), columns, dim});
  if (guarded) check_sizes("guarded", *guarded, {guarded->size(0) == 1 ? 1 : rows, columns});
  const int64_t pairs = q.size(0) * q.size(1), width = before + wanted + after;
  TORCH_CHECK(0 <= wanted && wanted <= columns, "wanted must be 0 to ", columns,
              " candidates, got ", wanted, "; choose no more blocks than there are");
  const Tensor q_mean = means(q, q_grid);
  const Tensor k_mean = k_means ? k_means->contiguous() : means(k, k_grid);
  const Tensor guard = guarded ? guarded->contiguous() : Tensor();
  const bool* guards = guarded ? guard.const_data_ptr<bool>() : nullptr;
  const int64_t guard_stride = guarded && guard.size(0) > 1 ? columns : 0;
  Tensor out = at::empty({q.size(0), q.size(1), rows, width}, q.options().dtype(at::kInt));
  int32_t* to = out.mutable_data_ptr<int32_t>();
  const int64_t grain = 1 + (1 << 14) / std::max<int64_t>(columns * dim, 1);
  at::parallel_for(0, pairs * rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<std::pair<float, int32_t>> rank(columns);
    for (int64_t at = begin; at < end; ++at) {
      const float* query = q_mean.const_data_ptr<float>() + at * dim;
      for (int64_t n = 0; n < columns; ++n) {
        const float* key = k_mean.const_data_ptr<float>() + (at / rows * columns + n) * dim;
        Vec sum(0.f);
        int64_t d = 0;
        for (; d + kLanes <= dim; d += kLanes) {
          sum = at::vec::fmadd(Vec::loadu(query + d), Vec::loadu(key + d), sum);
        }
        float lanes[kLanes], score = 0.f;
        sum.store(lanes);
        for (const float lane : lanes) score += lane;
        for (; d < dim; ++d) score += query[d] * key[d];
        // NaN ranks last; nth_element may not be given what compares as neither more nor less.
        score = score == score ? std::clamp(score, -kLargest, kLargest) : -kLargest;
        const bool guarded_here = guards && guards[at % rows * guard_stride + n];
        // Ascending by negated score, then by id: the order of a stable sort.
        rank[n] = {guarded_here ? -std::numeric_limits<float>::infinity() : -score,
                   static_cast<int32_t>(n)};
      }
      if (wanted < columns) std::nth_element(rank.begin(), rank.begin() + wanted, rank.end());
      int32_t* row = to + at * width;
      for (int64_t n = 0; n < before; ++n) row[n] = static_cast<int32_t>(n);
      for (int64_t n = 0; n < wanted; ++n) {
        row[before + n] = rank[n].second + static_cast<int32_t>(before);
      }
      std::sort(row + before, row + before + wanted);
      for (int64_t n = 0; n < after; ++n) {
        row[before + wanted + n] = static_cast<int32_t>(before + columns + n);
      }
    }
  });
  return out;
}

}  // namespace
