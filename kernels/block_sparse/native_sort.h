// Sort tokens into blocks of like direction: halve them again and again along their widest axis.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

namespace {

using at::Tensor;

// The tokens of one head and their coordinates, `axes` numbers each.
struct Halving {
  const float* at;
  int64_t axes, first, block;
  int32_t* token;  // of each place from `first` on
  std::vector<std::pair<float, int32_t>> value;

  // Sort places `[begin, end)` into blocks; a half is a whole number of blocks.
  void split(int64_t begin, int64_t end) {
    int32_t* const from = token + begin - first;
    const int64_t before = begin / block, blocks = (end + block - 1) / block - before;
    if (blocks <= 1) {
      std::sort(from, from + (end - begin));
      return;
    }
    const int64_t axis = widest(from, end - begin), middle = (before + blocks / 2) * block;
    value.clear();
    for (int64_t n = 0; n < end - begin; ++n) {
      value.emplace_back(at[from[n] * axes + axis], from[n]);
    }
    std::nth_element(value.begin(), value.begin() + (middle - begin), value.end());
    for (int64_t n = 0; n < end - begin; ++n) from[n] = value[n].second;
    split(begin, middle);
    split(middle, end);
  }

  int64_t widest(const int32_t* from, int64_t count) const {
    int64_t best = 0;
    double most = -1.;
    for (int64_t axis = 0; axis < axes; ++axis) {
      double sum = 0., squares = 0.;
      for (int64_t n = 0; n < count; ++n) {
        const double x = at[from[n] * axes + axis];
        sum += x;
        squares += x * x;
      }
      const double spread = squares - sum * sum / static_cast<double>(count);
      if (spread > most) {
        most = spread;
        best = axis;
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
  Tensor order = at::empty({at.size(0), at.size(1), first + free}, at.options().dtype(at::kInt));
  const float* from = at.const_data_ptr<float>();
  int32_t* to = order.mutable_data_ptr<int32_t>();
  at::parallel_for(0, pairs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      int32_t* row = to + pair * (first + free);
      std::iota(row, row + first, 0);
      std::iota(row + first, row + first + free, 0);
      Halving{from + pair * free * axes, axes, first, block, row + first, {}}.split(first,
                                                                                    first + free);
      for (int64_t n = first; n < first + free; ++n) row[n] += static_cast<int32_t>(first);
    }
  });
  return order;
}

}  // namespace
