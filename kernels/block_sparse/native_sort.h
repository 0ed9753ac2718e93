// Sort tokens into blocks of like direction: halve them again and again along their widest axis.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "native_vec.h"

namespace {

using at::Tensor;

// The coordinates of the tokens of one head, `width` numbers each: axes, then zeros.
struct Halving {
  const float* at;
  int64_t width, first, block;
  int32_t* token;  // of each place from `first` on
  std::vector<uint64_t> value;

  // Sort places `[begin, end)` into blocks; a half is a whole number of blocks.
  void split(int64_t begin, int64_t end) {
    int32_t* const from = token + begin - first;
    const int64_t before = begin / block, blocks = (end + block - 1) / block - before;
    if (blocks <= 1) {
      std::sort(from, from + (end - begin));
      return;
    }
    const int64_t axis = widest(from, end - begin), middle = (before + blocks / 2) * block;
    value.resize(end - begin);
    for (int64_t n = 0; n < end - begin; ++n) {
      value[n] = static_cast<uint64_t>(ascending(at[from[n] * width + axis])) << 32 |
          static_cast<uint32_t>(from[n]);
    }
    std::nth_element(value.begin(), value.begin() + (middle - begin), value.end());
    for (int64_t n = 0; n < end - begin; ++n) from[n] = static_cast<int32_t>(value[n]);
    split(begin, middle);
    split(middle, end);
  }

  // A number that is the larger the larger `x` is; one comparison then sorts by value and token.
  static uint32_t ascending(float x) {
    uint32_t bits;
    x += 0.f;  // -0 and 0 are equal
    std::memcpy(&bits, &x, sizeof(bits));
    return bits >> 31 ? ~bits : bits | 1u << 31;
  }

  int64_t widest(const int32_t* from, int64_t count) const {
    int64_t best = 0;
    float most = -1.f;
    for (int64_t axis = 0; axis < width; axis += kLanes) {
      Vec sum(0.f), squares(0.f);
      for (int64_t n = 0; n < count; ++n) {
        const Vec x = Vec::loadu(at + from[n] * width + axis);
        sum = sum + x;
        squares = at::vec::fmadd(x, x, squares);
      }
      float spread[kLanes];
      (squares - sum * sum * Vec(1.f / static_cast<float>(count))).store(spread);
      for (int64_t n = 0; n < kLanes; ++n) {
        if (spread[n] > most) {
          most = spread[n];
          best = axis + n;
        }
      }
    }
    return best;
  }
};

// Which token stands at each place, `[B, H, first + N]` int32, from coordinates `[B, H, N, axes]`
// that are numbers; the `first` tokens stay in front as they lie. See lipass.kernels.nearest.
Tensor sort_by_halves(const Tensor& coordinates, int64_t first, int64_t block) {
  const Tensor at = coordinates.contiguous();
  const int64_t pairs = at.size(0) * at.size(1), free = at.size(2), axes = at.size(3);
  const int64_t width = (axes + kLanes - 1) / kLanes * kLanes;
  Tensor order = at::empty({at.size(0), at.size(1), first + free}, at.options().dtype(at::kInt));
  const float* from = at.const_data_ptr<float>();
  int32_t* to = order.mutable_data_ptr<int32_t>();
  at::parallel_for(0, pairs, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> padded(free * width);
    for (int64_t pair = begin; pair < end; ++pair) {
      for (int64_t n = 0; n < free; ++n) {
        std::copy_n(from + (pair * free + n) * axes, axes, padded.data() + n * width);
      }
      int32_t* row = to + pair * (first + free);
      std::iota(row, row + first, 0);
      std::iota(row + first, row + first + free, 0);
      Halving{padded.data(), width, first, block, row + first, {}}.split(first, first + free);
      for (int64_t n = first; n < first + free; ++n) row[n] += static_cast<int32_t>(first);
    }
  });
  return order;
}

}  // namespace
