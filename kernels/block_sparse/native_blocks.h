// What a call attends to: where the seen keys of each visited block of each head lie.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "native_grid.h"

namespace {

using at::Tensor;

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kInf = std::numeric_limits<float>::infinity();
// A finite bias stays finite in units of log 2, also where a score is added: masks of floats say
// `finfo(dtype).min` for keys that count only where there are no others.
constexpr float kFarthest = 2e38f;

inline float finite_in_bits(float bias) {
  return std::isinf(bias) ? bias : std::clamp(bias, -kFarthest, kFarthest);
}

// Rows of one head: row `n` starts at `data + n * stride`, counted in elements.
template <typename E>
struct Rows {
  const E* data;
  int64_t stride;
};

// The keys of one block of one head that are seen at all.
template <typename E>
struct Block {
  Rows<E> k, v;
  const float* bias;  // null: no bias
  int64_t keys;  // rows
  int64_t seen;  // rows that are keys; those behind them are zero
  const int32_t* order = nullptr;  // which rows; null: one behind the other

  // Take up to `limit` rows off the front.
  Block split(int64_t limit) {
    Block front = *this;
    front.keys = std::min(keys, limit);
    front.seen = std::min(seen, front.keys);
    keys -= front.keys;
    seen -= front.seen;
    if (order) {
      order += front.keys;
    } else {
      k.data += front.keys * k.stride;
      v.data += front.keys * v.stride;
    }
    if (bias) bias += front.keys;
    return front;
  }
};

// The keys of the next chunk, asked for row by row while this one is computed: blocks lie apart,
// so the hardware cannot foresee them (8 heads x 64, fp32, density 0.2: 42 ms without, 32 with).
template <typename T>
struct Ahead {
  std::vector<Block<T>> pieces;
  int64_t dim = 0;
  size_t piece = 0;
  int64_t row = 0;

  void clear() {
    pieces.clear();
    piece = 0;
    row = 0;
  }

  void step(int64_t rows) {
    for (int64_t n = 0; n < rows && piece < pieces.size(); ++n) {
      const Block<T>& from = pieces[piece];
      const int64_t at = from.order ? from.order[row] : row;
      for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) {
        __builtin_prefetch(from.k.data + at * from.k.stride + d, 0, 2);
        __builtin_prefetch(from.v.data + at * from.v.stride + d, 0, 2);
      }
      if (++row == (from.order ? from.seen : from.keys)) {
        row = 0;
        ++piece;
      }
    }
  }
};

// Arguments that do not depend on how they are computed.
struct Call {
  Tensor q, indices, counts, out, lse;
  std::vector<Tensor> k, v;  // one per segment
  Grid q_grid;
  std::vector<Grid> grids;
  std::vector<int64_t> first_block, first_token;
  int64_t blocks = 0, tokens = 0;
  const bool* keep = nullptr;  // [B, Lk]
  const float* bias = nullptr;  // [B or 1, H or 1, Lk]
  int64_t bias_batch = 0, bias_head = 0;  // strides
  float scale = 1.f;
  // Which query and which key of segment `ordered` stand at each place, `[B, H, places]`; null: as
  // they lie.
  const int32_t *q_order = nullptr, *key_order = nullptr;
  size_t ordered = 0;

  // What is added to the scores of each key in one head.
  const float* bias_of(int64_t b, int64_t h) const {
    return bias ? bias + b * bias_batch + h * bias_head : nullptr;
  }

  bool hides(int64_t b, const float* shift, int64_t token) const {
    return (keep && !keep[b * tokens + token]) || (shift && shift[token] == -kInf);
  }
};

// Where the seen keys of each visited block of each head lie.
template <typename T>
struct Table {
  std::vector<Block<T>> blocks;  // [B * H, blocks]
  Tensor packed, biases;
};

// Fill the table; copy blocks that are no single run of rows or are masked. `padding` is the
// number of rows that a block is padded to.
template <typename T>
Table<T> place_blocks(const Call& call, int64_t padding) {
  const int64_t heads = call.q.size(1), pairs = call.q.size(0) * heads, dim = call.q.size(3);
  const int64_t width = call.indices.size(3), q_blocks = call.q_grid.count();
  const int64_t slots = (call.grids[0].slots() + padding - 1) / padding * padding;
  const bool masks = call.keep || call.bias;
  std::vector<char> in_place(call.blocks, 0);
  for (size_t s = 0; s < call.grids.size() && !masks; ++s) {
    const bool sorted = call.key_order && s == call.ordered;
    for (int64_t n = 0; n < call.grids[s].count(); ++n) {
      int64_t runs = 0, tokens = 0;
      call.grids[s].runs(n, [&](int64_t, int64_t length) {
        ++runs;
        tokens += length;
      });
      in_place[call.first_block[s] + n] = sorted || (runs == 1 && tokens % padding == 0);
    }
  }
  // Place of each block in the packed memory: -1 is not visited, -2 is read where it lies.
  std::vector<int64_t> place(pairs * call.blocks, -1);
  int64_t packed = 0;
  const int32_t* index = call.indices.const_data_ptr<int32_t>();
  const int32_t* count = call.counts.const_data_ptr<int32_t>();
  for (int64_t row = 0; row < pairs * q_blocks; ++row) {
    for (int32_t entry = 0; entry < count[row]; ++entry) {
      const int32_t id = index[row * width + entry];
      int64_t& to = place[row / q_blocks * call.blocks + id];
      if (to == -1) to = in_place[id] ? -2 : packed++;
    }
  }
  const int64_t packed_size = slots * 2 * dim;
  Table<T> table{std::vector<Block<T>>(pairs * call.blocks)};
  // Up to 64 MiB outlive the call, as fresh pages cost more than the copies that go there.
  static thread_local Tensor held;
  const int64_t size = packed * packed_size;
  if (held.defined() && held.scalar_type() == call.q.scalar_type() && held.numel() >= size) {
    table.packed = held;
  } else {
    table.packed = at::empty({size}, call.q.options());
    if (size * sizeof(T) <= (64 << 20)) held = table.packed;
  }
  T* memory = table.packed.template mutable_data_ptr<T>();
  float* biases = nullptr;
  if (call.bias) {
    table.biases = at::empty({packed * slots}, call.q.options().dtype(at::kFloat));
    biases = table.biases.template mutable_data_ptr<float>();
  }
  // Without copies this is too little for a second thread.
  const int64_t grain = packed ? 1 + (1 << 15) / packed_size : pairs * call.blocks;
  at::parallel_for(0, pairs * call.blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      if (place[at] == -1) continue;
      const int64_t pair = at / call.blocks, id = at % call.blocks;
      const int64_t b = pair / heads, h = pair % heads;
      size_t s = call.grids.size() - 1;
      while (call.first_block[s] > id) --s;
      const Tensor &k = call.k[s], &v = call.v[s];
      const T* k_head = k.const_data_ptr<T>() + b * k.stride(0) + h * k.stride(1);
      const T* v_head = v.const_data_ptr<T>() + b * v.stride(0) + h * v.stride(1);
      const int64_t k_row = k.stride(2), v_row = v.stride(2);
      Block<T>& block = table.blocks[at];
      const int32_t* order = call.key_order && s == call.ordered
          ? call.key_order + pair * call.grids[s].tokens()
          : nullptr;
      if (place[at] == -2) {
        call.grids[s].runs(id - call.first_block[s], [&](int64_t token, int64_t keys) {
          if (order) {
            const int64_t rows = (keys + padding - 1) / padding * padding;
            block = {{k_head, k_row}, {v_head, v_row}, nullptr, rows, keys, order + token};
            return;
          }
          block = {{k_head + token * k_row, k_row}, {v_head + token * v_row, v_row}, nullptr, keys,
                   keys};
        });
        continue;
      }
      T* k_to = memory + place[at] * packed_size;
      T* v_to = k_to + slots * dim;
      float* bias_to = biases ? biases + place[at] * slots : nullptr;
      const float* shift = call.bias_of(b, h);
      int64_t keys = 0;
      call.grids[s].runs(id - call.first_block[s], [&](int64_t first, int64_t length) {
        for (int64_t at_key = first; at_key < first + length; ++at_key) {
          const int64_t token = order ? order[at_key] : at_key;
          const int64_t global = call.first_token[s] + token;
          if (masks && call.hides(b, shift, global)) continue;
          std::copy_n(k_head + token * k_row, dim, k_to + keys * dim);
          std::copy_n(v_head + token * v_row, dim, v_to + keys * dim);
          if (bias_to) bias_to[keys] = finite_in_bits(shift[global]);
          ++keys;
        }
      });
      const int64_t rows = (keys + padding - 1) / padding * padding;
      std::fill(k_to + keys * dim, k_to + rows * dim, T(0.f));
      std::fill(v_to + keys * dim, v_to + rows * dim, T(0.f));
      block = {{k_to, dim}, {v_to, dim}, bias_to, rows, keys};
    }
  });
  return table;
}

// The keys that meet one update of the softmax.
template <typename T>
struct Chunk {
  std::vector<Block<T>> pieces;
  int64_t keys = 0;

  void clear() {
    pieces.clear();
    keys = 0;
  }

  // Add a piece; one that is sorted is copied next to what was copied before.
  void add(Block<T> piece, int64_t dim, int64_t most) {
    if (piece.order) piece = side_by_side(piece, dim, most);
    keys += piece.keys;
    if (!pieces.empty() && continues(pieces.back(), piece)) {
      pieces.back().keys += piece.keys;
      pieces.back().seen += piece.seen;
    } else {
      pieces.push_back(piece);
    }
  }

 private:
  std::vector<T> rows_;  // keys, then values

  Block<T> side_by_side(const Block<T>& piece, int64_t dim, int64_t most) {
    rows_.resize(2 * most * dim);
    T* k = rows_.data() + keys * dim;
    T* v = k + most * dim;
    for (int64_t n = 0; n < piece.seen; ++n) {
      std::copy_n(piece.k.data + piece.order[n] * piece.k.stride, dim, k + n * dim);
      std::copy_n(piece.v.data + piece.order[n] * piece.v.stride, dim, v + n * dim);
    }
    std::fill(k + piece.seen * dim, k + piece.keys * dim, T(0.f));
    std::fill(v + piece.seen * dim, v + piece.keys * dim, T(0.f));
    return {{k, dim}, {v, dim}, nullptr, piece.keys, piece.seen};
  }

  static bool continues(const Block<T>& a, const Block<T>& b) {
    return !a.bias && a.seen == a.keys && a.k.stride == b.k.stride && a.v.stride == b.v.stride &&
        a.k.data + a.keys * a.k.stride == b.k.data && a.v.data + a.keys * a.v.stride == b.v.data;
  }
};

}  // namespace
