// How the tokens of one segment fall into tiles; lipass.kernels.plan.BlockGrid for the kernels.

#pragma once

#include <algorithm>
#include <cstdint>

namespace {

// Sizes along `t, y, x`: tokens of the segment, tokens of a tile, tiles.
struct Grid {
  int64_t size[3], tile[3], blocks[3];

  explicit Grid(const int64_t* numbers) {
    bool empty = false;
    for (int axis = 0; axis < 3; ++axis) {
      size[axis] = numbers[axis];
      tile[axis] = numbers[3 + axis];
      blocks[axis] = (size[axis] + tile[axis] - 1) / tile[axis];
      empty |= size[axis] == 0;
    }
    if (empty) blocks[0] = 0;
  }
  int64_t count() const { return blocks[0] * blocks[1] * blocks[2]; }
  int64_t tokens() const { return size[0] * size[1] * size[2]; }
  int64_t slots() const { return tile[0] * tile[1] * tile[2]; }

  // Call `run(first token, tokens)` for each run of tokens of a block, in slot order.
  template <typename Run>
  void runs(int64_t block, const Run& run) const {
    const int64_t at[3] = {block / (blocks[1] * blocks[2]) * tile[0],
                           block / blocks[2] % blocks[1] * tile[1], block % blocks[2] * tile[2]};
    const int64_t end_t = std::min(at[0] + tile[0], size[0]);
    const int64_t end_y = std::min(at[1] + tile[1], size[1]);
    const int64_t length = std::min(at[2] + tile[2], size[2]) - at[2];
    int64_t first = 0, pending = 0;
    for (int64_t t = at[0]; t < end_t; ++t) {
      for (int64_t y = at[1]; y < end_y; ++y) {
        const int64_t token = (t * size[1] + y) * size[2] + at[2];
        if (pending && token == first + pending) {
          pending += length;
          continue;
        }
        if (pending) run(first, pending);
        first = token;
        pending = length;
      }
    }
    if (pending) run(first, pending);
  }
};

}  // namespace
