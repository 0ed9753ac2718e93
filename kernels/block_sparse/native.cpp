// Block-sparse attention on the CPU; kernels/block_sparse/native.py builds and calls it.
//
// Scores are kept transposed, keys down and queries across:
//
//   S^T[keys, queries] = K * Q^T      K is read row by row in place; only Q is turned
//   online softmax over the keys      vertical: one lane is one query, no sum across lanes
//   O^T[D, queries] += V^T * P^T      V is read row by row in place
//
// so neither keys nor values are gathered or packed where a block is one run of rows. A task is
// some queries of one query block of one head. bf16 and fp16 go through brgemm where the CPU has
// units for them (AMX); then V^T and P^T are packed chunk by chunk. Elsewhere rows are converted
// and computed in fp32.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace {

using at::Tensor;
using Vec = at::vec::Vectorized<float>;

constexpr int64_t kLanes = Vec::size();
// Accumulators of one product fill the registers: 6 x 4 of 32, or 6 x 2 of 16.
constexpr int kRows = 6;
constexpr int kVectors = kLanes == 16 ? 4 : 2;
constexpr int64_t kColumns = 2 * kLanes;
// Keys between two updates of the softmax, and queries of a task: in fp32 their scores (32 KiB)
// stay in the first-level cache; brgemm wants fewer, larger products.
constexpr int64_t kKeys = 128;
template <typename E>
constexpr int64_t kQueries = std::is_same_v<E, float> ? 64 : 128;
// Rows of a block are padded to this where brgemm reads them: the depth of an AMX tile, so that
// few shapes occur and each is generated once.
template <typename E>
constexpr int64_t kPadding = std::is_same_v<E, float> ? 1 : 32;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kInf = std::numeric_limits<float>::infinity();

// How the tokens of one segment fall into tiles, and where its keys and values lie.
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

  // Take up to `limit` rows off the front.
  Block split(int64_t limit) {
    Block front = *this;
    front.keys = std::min(keys, limit);
    front.seen = std::min(seen, front.keys);
    keys -= front.keys;
    seen -= front.seen;
    k.data += front.keys * k.stride;
    v.data += front.keys * v.stride;
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
      for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) {
        __builtin_prefetch(from.k.data + row * from.k.stride + d, 0, 2);
        __builtin_prefetch(from.v.data + row * from.v.stride + d, 0, 2);
      }
      if (++row == from.keys) {
        row = 0;
        ++piece;
      }
    }
  }
};

// C[r, :] (+)= sum_n A(r, n) * B[n, :], one register tile. A is K (rows apart by `a_stride`, the
// sum runs along a row) or V (the sum runs down the rows).
template <int R, int V, bool kSumAlongRow>
inline void tile_product(const float* a, int64_t a_stride, const float* b, int64_t ldb, float* c,
                         int64_t ldc, int64_t terms, bool add) {
  Vec sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < V; ++n) {
      sum[r][n] = add ? Vec::loadu(c + r * ldc + n * kLanes) : Vec(0.f);
    }
  }
  for (int64_t term = 0; term < terms; ++term) {
    Vec right[V];
#pragma GCC unroll 8
    for (int n = 0; n < V; ++n) right[n] = Vec::loadu(b + term * ldb + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec left(kSumAlongRow ? a[r * a_stride + term] : a[term * a_stride + r]);
#pragma GCC unroll 8
      for (int n = 0; n < V; ++n) sum[r][n] = at::vec::fmadd(left, right[n], sum[r][n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < V; ++n) sum[r][n].store(c + r * ldc + n * kLanes);
  }
}

template <int V, bool kSumAlongRow, typename T>
void panel_product(const float* a, int64_t a_stride, const float* b, int64_t ldb, float* c,
                   int64_t rows, int64_t terms, bool add, Ahead<T>& ahead) {
  const int64_t step = kSumAlongRow ? a_stride : 1;
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    ahead.step(4);
    tile_product<kRows, V, kSumAlongRow>(a + row * step, a_stride, b, ldb, c + row * ldb, ldb,
                                         terms, add);
  }
  const float* rest = a + row * step;
  float* to = c + row * ldb;
  switch (rows - row) {
    case 5: tile_product<5, V, kSumAlongRow>(rest, a_stride, b, ldb, to, ldb, terms, add); break;
    case 4: tile_product<4, V, kSumAlongRow>(rest, a_stride, b, ldb, to, ldb, terms, add); break;
    case 3: tile_product<3, V, kSumAlongRow>(rest, a_stride, b, ldb, to, ldb, terms, add); break;
    case 2: tile_product<2, V, kSumAlongRow>(rest, a_stride, b, ldb, to, ldb, terms, add); break;
    case 1: tile_product<1, V, kSumAlongRow>(rest, a_stride, b, ldb, to, ldb, terms, add); break;
    default: break;
  }
}

// C[rows, columns] (+)= A * B; B and C have `columns` numbers a row, a multiple of `kColumns`.
template <bool kSumAlongRow, typename T>
void product(Rows<float> a, const float* b, float* c, int64_t columns, int64_t rows, int64_t terms,
             bool add, Ahead<T>& ahead) {
  int64_t at = 0;
  if constexpr (kVectors == 4) {
    for (; at + 4 * kLanes <= columns; at += 4 * kLanes) {
      panel_product<4, kSumAlongRow>(a.data, a.stride, b + at, columns, c + at, rows, terms, add,
                                     ahead);
    }
  }
  for (; at < columns; at += 2 * kLanes) {
    panel_product<2, kSumAlongRow>(a.data, a.stride, b + at, columns, c + at, rows, terms, add,
                                   ahead);
  }
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

// Round two rows to 16 bits and interleave them: the layout of B that brgemm reads.
template <typename E>
inline void store_pair(const Vec& low, const Vec& high, E* to) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i order = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
      3, 18, 2, 17, 1, 16, 0);
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<E, at::BFloat16>) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
    return;
  }
#endif
  __m512i both;
  if constexpr (std::is_same_v<E, at::BFloat16>) {
    both = at::vec::convert_float_bfloat16(low, high);
  } else {
    both = at::vec::convert_float_half(low, high);
  }
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
#else
  for (int64_t n = 0; n < kLanes; ++n) {
    to[2 * n] = static_cast<E>(low[n]);
    to[2 * n + 1] = static_cast<E>(high[n]);
  }
#endif
}

// Running maximum (in units of log 2), running sum, and the factor for what was summed before.
template <typename E>
struct Softmax {
  float maximum[kQueries<E>], sum[kQueries<E>], factor[kQueries<E>];

  void reset() {
    std::fill_n(maximum, kQueries<E>, -kInf);
    std::fill_n(sum, kQueries<E>, 0.f);
  }

  // Turn scores `[keys, columns]` into `weight`: in place in fp32, in pairs of rows otherwise.
  // Scores are in units of `unit`, which is positive. Returns whether some factor is not 1.
  bool update(float* score, E* weight, int64_t keys, int64_t columns, float unit) {
    bool changed = false;
    int64_t at = 0;
    // Several lanes at once: one alone would wait for its own maximum and sum at every key.
    for (; at + 4 * kLanes <= columns; at += 4 * kLanes) {
      changed |= update_lanes<4>(score, weight, at, keys, columns, unit);
    }
    for (; at < columns; at += 2 * kLanes) {
      changed |= update_lanes<2>(score, weight, at, keys, columns, unit);
    }
    return changed;
  }

 private:
  template <int V>
  bool update_lanes(float* score, E* weight, int64_t at, int64_t keys, int64_t columns,
                    float unit) {
    Vec most[V], total[V];
#pragma GCC unroll 4
    for (int n = 0; n < V; ++n) {
      most[n] = Vec(-kInf);
      total[n] = Vec(0.f);
    }
    for (int64_t key = 0; key < keys; ++key) {
#pragma GCC unroll 4
      for (int n = 0; n < V; ++n) {
        most[n] = larger(most[n], Vec::loadu(score + key * columns + at + n * kLanes));
      }
    }
    bool changed = false;
#pragma GCC unroll 4
    for (int n = 0; n < V; ++n) {
      const Vec before = Vec::loadu(maximum + at + n * kLanes);
      most[n] = larger(before, most[n] * Vec(unit));
      exp2_up_to_one(before - most[n]).store(factor + at + n * kLanes);
      most[n].store(maximum + at + n * kLanes);
      changed |= (before != most[n]).zero_mask() != (1 << kLanes) - 1;
    }
    const auto weigh = [&](int64_t key, int n) {
      const Vec x = Vec::loadu(score + key * columns + at + n * kLanes);
      const Vec found = exp2_up_to_one(at::vec::fmsub(x, Vec(unit), most[n]));
      total[n] = total[n] + found;
      return found;
    };
    if constexpr (std::is_same_v<E, float>) {
      for (int64_t key = 0; key < keys; ++key) {
#pragma GCC unroll 4
        for (int n = 0; n < V; ++n) weigh(key, n).store(weight + key * columns + at + n * kLanes);
      }
    } else {
      for (int64_t key = 0; key < keys; key += 2) {
#pragma GCC unroll 4
        for (int n = 0; n < V; ++n) {
          const Vec low = weigh(key, n), high = weigh(key + 1, n);
          store_pair(low, high, weight + key * columns + 2 * (at + n * kLanes));
        }
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < V; ++n) {
      float* to = sum + at + n * kLanes;
      at::vec::fmadd(Vec::loadu(to), Vec::loadu(factor + at + n * kLanes), total[n]).store(to);
    }
    return changed;
  }
};

// Memory of one thread. It outlives the call: fresh pages cost more than what is computed in them.
template <typename E>
struct Scratch {
  float *output, *score, *row;
  E *query, *rows, *weight;

  explicit Scratch(int64_t dim) {
    static thread_local std::vector<float> floats;
    static thread_local std::vector<E> packed;
    grow(floats, kQueries<E> * (2 * dim + kKeys));
    grow(packed, kQueries<E> * (dim + kKeys) + kKeys * dim);
    output = floats.data();
    row = output + kQueries<E> * dim;
    score = row + kQueries<E> * dim;
    query = packed.data();
    rows = query + kQueries<E> * dim;
    weight = rows + kKeys * dim;
  }

 private:
  template <typename N>
  static void grow(std::vector<N>& memory, int64_t count) {
    if (static_cast<int64_t>(memory.size()) < count) memory.resize(count);
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
  const float* bias = nullptr;  // [B or 1, Lk]
  int64_t bias_stride = 0;
  float scale = 1.f;

  bool hides(int64_t b, int64_t token) const {
    return (keep && !keep[b * tokens + token]) ||
        (bias && bias[b * bias_stride + token] == -kInf);
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
    for (int64_t n = 0; n < call.grids[s].count(); ++n) {
      int64_t runs = 0, tokens = 0;
      call.grids[s].runs(n, [&](int64_t, int64_t length) {
        ++runs;
        tokens += length;
      });
      in_place[call.first_block[s] + n] = runs == 1 && tokens % padding == 0;
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
      if (place[at] == -2) {
        call.grids[s].runs(id - call.first_block[s], [&](int64_t token, int64_t keys) {
          block = {{k_head + token * k_row, k_row}, {v_head + token * v_row, v_row}, nullptr, keys,
                   keys};
        });
        continue;
      }
      T* k_to = memory + place[at] * packed_size;
      T* v_to = k_to + slots * dim;
      float* bias_to = biases ? biases + place[at] * slots : nullptr;
      int64_t keys = 0;
      call.grids[s].runs(id - call.first_block[s], [&](int64_t first, int64_t length) {
        for (int64_t token = first; token < first + length; ++token) {
          const int64_t global = call.first_token[s] + token;
          if (masks && call.hides(b, global)) continue;
          std::copy_n(k_head + token * k_row, dim, k_to + keys * dim);
          std::copy_n(v_head + token * v_row, dim, v_to + keys * dim);
          if (bias_to) bias_to[keys] = call.bias[b * call.bias_stride + global];
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

  void add(const Block<T>& piece) {
    keys += piece.keys;
    if (!pieces.empty() && continues(pieces.back(), piece)) {
      pieces.back().keys += piece.keys;
      pieces.back().seen += piece.seen;
    } else {
      pieces.push_back(piece);
    }
  }

 private:
  static bool continues(const Block<T>& a, const Block<T>& b) {
    return !a.bias && a.seen == a.keys && a.k.stride == b.k.stride && a.v.stride == b.v.stride &&
        a.k.data + a.keys * a.k.stride == b.k.data && a.v.data + a.keys * a.v.stride == b.v.data;
  }
};

// One task under way: some queries and what they have seen so far.
template <typename T, typename E>
struct Task {
  const Call& call;
  Scratch<E>& scratch;
  Chunk<T>& chunk;
  Ahead<T>& ahead;
  int64_t columns;  // queries, rounded up to `kColumns`
  bool first = true;
  Softmax<E> softmax;

  void attend() {
    if (chunk.keys == 0) return;
    scores();
    E* weight = scratch.weight;
    if constexpr (std::is_same_v<E, float>) weight = scratch.score;
    const bool changed =
        softmax.update(scratch.score, weight, chunk.keys, columns, adjust_scores());
    if (changed && !first) rescale();
    values();
    first = false;
    chunk.clear();
  }

 private:
  void scores() {
    const int64_t dim = call.q.size(3);
    float* to = scratch.score;
    for (const Block<T>& piece : chunk.pieces) {
      if constexpr (std::is_same_v<E, float>) {
        product<true>(as_floats(piece.k, piece.keys), scratch.query, to, columns, piece.keys, dim,
                      false, ahead);
      } else {
        at::native::cpublas::brgemm(piece.keys, columns, dim, piece.k.stride, columns, columns,
                                    false, piece.k.data, scratch.query, to);
      }
      to += piece.keys * columns;
    }
  }

  // Add what depends on the key; returns the unit that the scores are in.
  float adjust_scores() {
    const float unit = call.scale * kLog2E;
    const bool in_place = call.bias || unit <= 0.f;
    float* row = scratch.score;
    for (const Block<T>& piece : chunk.pieces) {
      for (int64_t key = 0; in_place && key < piece.seen; ++key) {
        const Vec shift(piece.bias ? piece.bias[key] * kLog2E : 0.f);
        for (float* to = row + key * columns; to < row + (key + 1) * columns; to += kLanes) {
          at::vec::fmadd(Vec::loadu(to), Vec(unit), shift).store(to);
        }
      }
      std::fill(row + piece.seen * columns, row + piece.keys * columns, -kInf);
      row += piece.keys * columns;
    }
    return in_place ? 1.f : unit;
  }

  // Rows as fp32: where they lie, or converted.
  Rows<float> as_floats(const Rows<T>& rows, int64_t count) {
    if constexpr (std::is_same_v<T, float>) {
      return rows;
    } else {
      const int64_t dim = call.q.size(3);
      float* to = scratch.rows;
      for (int64_t row = 0; row < count; ++row) {
        at::vec::convert<T, float>(rows.data + row * rows.stride, to + row * dim, dim);
      }
      return {to, dim};
    }
  }

  void rescale() {
    for (int64_t d = 0; d < call.q.size(3); ++d) {
      float* to = scratch.output + d * columns;
      for (int64_t at = 0; at < columns; at += kLanes) {
        (Vec::loadu(to + at) * Vec::loadu(softmax.factor + at)).store(to + at);
      }
    }
  }

  void values() {
    const int64_t dim = call.q.size(3);
    if constexpr (std::is_same_v<E, float>) {
      const float* weight = scratch.score;
      bool add = !first;
      for (const Block<T>& piece : chunk.pieces) {
        product<false>(as_floats(piece.v, piece.keys), weight, scratch.output, columns, dim,
                       piece.keys, add, ahead);
        weight += piece.keys * columns;
        add = true;
      }
    } else {
#if defined(CPU_CAPABILITY_AVX512)
      int64_t at = 0;
      for (const Block<T>& piece : chunk.pieces) {
        for (int64_t key = 0; key < piece.keys; key += 32, at += 32) {
          for (int64_t d = 0; d < dim; d += 32) {
            const int width = static_cast<int>(std::min<int64_t>(dim - d, 32));
            at::vec::transpose_mxn<E>(piece.v.data + key * piece.v.stride + d, piece.v.stride,
                                      scratch.rows + d * kKeys + at, kKeys, 32, width);
            ahead.step(32 * 32 / dim);
          }
        }
      }
      at::native::cpublas::brgemm(dim, columns, chunk.keys, kKeys, columns, columns, !first,
                                  scratch.rows, scratch.weight, scratch.output);
#endif
    }
  }
};

// Lay the queries of a task across, `[D, columns]`; in 16 bits pairs of dimensions stay together.
template <typename T, typename E>
void load_queries(const Call& call, const T* head, const int64_t* token, int64_t queries,
                  int64_t columns, Scratch<E>& scratch) {
  const int64_t dim = call.q.size(3);
  E* rows = reinterpret_cast<E*>(scratch.row);
  for (int64_t at = 0; at < queries; ++at) {
    at::vec::convert<T, E>(head + token[at] * call.q.stride(2), rows + at * dim, dim);
  }
  std::fill(rows + queries * dim, rows + columns * dim, E(0.f));
  // A pair of 16-bit numbers moves as one of 32 bits.
  const int64_t words = dim * sizeof(E) / sizeof(float);
  at::vec::transpose_mxn<float>(scratch.row, words, reinterpret_cast<float*>(scratch.query),
                                columns, columns, words);
}

template <typename T, typename E>
void store_output(const Call& call, const Task<T, E>& task, int64_t pair, const int64_t* token,
                  int64_t queries) {
  const int64_t dim = call.q.size(3), columns = task.columns, heads = call.q.size(1);
  const int64_t stride = call.out.stride(2);
  T* out = call.out.mutable_data_ptr<T>() + pair / heads * call.out.stride(0) +
      pair % heads * call.out.stride(1);
  float* lse = call.lse.defined() ? call.lse.mutable_data_ptr<float>() + pair * call.q.size(2)
                                  : nullptr;
  if (task.first) {
    for (int64_t row = 0; row < queries; ++row) {
      std::fill_n(out + token[row] * stride, dim, T(0.f));
      if (lse) lse[token[row]] = -kInf;
    }
    return;
  }
  const Softmax<E>& softmax = task.softmax;
  float *output = task.scratch.output, *rows = task.scratch.row;
  for (int64_t at = 0; at < columns; at += kLanes) {
    const Vec share = Vec(1.f) / Vec::loadu(softmax.sum + at);
    for (float* to = output + at; to < output + dim * columns; to += columns) {
      (Vec::loadu(to) * share).store(to);
    }
  }
  at::vec::transpose_mxn<float>(output, columns, rows, dim, dim, columns);
  for (int64_t row = 0; row < queries; ++row) {
    at::vec::convert<float, T>(rows + row * dim, out + token[row] * stride, dim);
    if (lse) lse[token[row]] = (softmax.maximum[row] + std::log2(softmax.sum[row])) / kLog2E;
  }
}

// A task: part `part` of query block `n` of head `pair`.
template <typename T, typename E>
void run_task(const Call& call, const std::vector<Block<T>>& table, Scratch<E>& scratch,
              Chunk<T>& chunk, Ahead<T>& ahead, int64_t pair, int64_t n, int64_t part) {
  int64_t token[kQueries<E>], queries = 0, slot = 0;
  call.q_grid.runs(n, [&](int64_t first, int64_t length) {
    for (int64_t at = first; at < first + length; ++at, ++slot) {
      if (slot / kQueries<E> == part) token[queries++] = at;
    }
  });
  if (queries == 0) return;
  const int64_t columns = (queries + kColumns - 1) / kColumns * kColumns;
  const int64_t heads = call.q.size(1);
  const T* head = call.q.const_data_ptr<T>() + pair / heads * call.q.stride(0) +
      pair % heads * call.q.stride(1);
  load_queries<T, E>(call, head, token, queries, columns, scratch);

  chunk.clear();
  Task<T, E> task{call, scratch, chunk, ahead, columns};
  task.softmax.reset();
  const int64_t row = pair * call.q_grid.count() + n;
  const int32_t* index = call.indices.const_data_ptr<int32_t>() + row * call.indices.size(3);
  const int32_t count = call.counts.const_data_ptr<int32_t>()[row];
  for (int32_t entry = 0; entry < count; ++entry) {
    Block<T> block = table[pair * call.blocks + index[entry]];
    while (block.seen > 0) {
      chunk.add(block.split(kKeys - chunk.keys));
      if (chunk.keys < kKeys) continue;
      ahead.clear();
      int64_t keys = 0;
      for (int32_t next = entry + 1; next < count && keys < kKeys; ++next) {
        const Block<T>& coming = table[pair * call.blocks + index[next]];
        if (coming.keys) ahead.pieces.push_back(coming);
        keys += coming.keys;
      }
      task.attend();
    }
  }
  ahead.clear();
  task.attend();
  store_output<T, E>(call, task, pair, token, queries);
}

// Attend to keys stored as T, computing products of E.
template <typename T, typename E>
void run(const Call& call) {
  const Table<T> table = place_blocks<T>(call, kPadding<E>);
  const int64_t q_blocks = call.q_grid.count();
  const int64_t parts = (call.q_grid.slots() + kQueries<E> - 1) / kQueries<E>;
  const int64_t tasks = call.q.size(0) * call.q.size(1) * q_blocks * parts;
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    Scratch<E> scratch(call.q.size(3));
    Chunk<T> chunk;
    Ahead<T> ahead;
    ahead.dim = call.q.size(3);
    for (int64_t at = begin; at < end; ++at) {
      run_task<T, E>(call, table.blocks, scratch, chunk, ahead, at / parts / q_blocks,
                     at / parts % q_blocks, at % parts);
    }
    if constexpr (!std::is_same_v<E, float>) at::native::cpublas::brgemm_release();
  });
}

template <typename T>
void run_half(const Call& call) {
#if defined(CPU_CAPABILITY_AVX512)
  if (at::native::cpublas::could_pack(call.q.scalar_type()) && call.q.size(3) % 2 == 0) {
    return run<T, T>(call);
  }
#endif
  run<T, float>(call);
}

// See lipass.kernels.block_sparse.api. `grids` holds grid and tile of the queries, then of each
// segment; k and v are whole or by segment.
std::tuple<Tensor, Tensor> attend(const Tensor& q, at::TensorList k, at::TensorList v,
                                  const Tensor& indices, const Tensor& counts,
                                  at::IntArrayRef grids, double scale,
                                  const std::optional<Tensor>& key_keep,
                                  const std::optional<Tensor>& key_bias, bool return_lse) {
  Call call{.q = q.stride(3) == 1 ? q : q.contiguous(),
            .indices = indices.contiguous(),
            .counts = counts.contiguous(),
            .out = at::empty({q.size(0), q.size(2), q.size(1), q.size(3)}, q.options())
                       .transpose(1, 2),
            .q_grid = Grid(grids.data())};
  if (return_lse) call.lse = at::empty(q.sizes().slice(0, 3), q.options().dtype(at::kFloat));
  const size_t segments = grids.size() / 6 - 1;
  for (size_t s = 0; s < segments; ++s) {
    const Grid grid(grids.data() + 6 * (s + 1));
    const bool whole = k.size() != segments, whole_v = v.size() != segments;
    const Tensor k_part = whole ? k[0].narrow(2, call.tokens, grid.tokens()) : k[s];
    const Tensor v_part = whole_v ? v[0].narrow(2, call.tokens, grid.tokens()) : v[s];
    call.k.push_back(k_part.stride(3) == 1 ? k_part : k_part.contiguous());
    call.v.push_back(v_part.stride(3) == 1 ? v_part : v_part.contiguous());
    call.grids.push_back(grid);
    call.first_block.push_back(call.blocks);
    call.first_token.push_back(call.tokens);
    call.blocks += grid.count();
    call.tokens += grid.tokens();
  }
  Tensor keep, bias;
  if (key_keep) {
    keep = key_keep->contiguous();
    call.keep = keep.const_data_ptr<bool>();
  }
  if (key_bias) {
    bias = key_bias->to(at::kFloat).contiguous();
    call.bias = bias.const_data_ptr<float>();
    call.bias_stride = bias.size(0) == 1 ? 0 : call.tokens;
  }
  call.scale = static_cast<float>(scale);
  switch (q.scalar_type()) {
    case at::kFloat: run<float, float>(call); break;
    case at::kBFloat16: run_half<at::BFloat16>(call); break;
    case at::kHalf: run_half<at::Half>(call); break;
    default: TORCH_CHECK(false, "q must be fp32, bf16 or fp16, got ", q.scalar_type());
  }
  return {call.out, call.lse};
}

// Average the tokens of each block, `[B * H, blocks, D]`.
template <typename T>
void pool(const Tensor& x, const Grid& grid, float* means) {
  const int64_t heads = x.size(1), dim = x.size(3), blocks = grid.count();
  at::parallel_for(0, x.size(0) * heads * blocks, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> row(dim);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t pair = at / blocks;
      const T* head = x.const_data_ptr<T>() + pair / heads * x.stride(0) +
          pair % heads * x.stride(1);
      float* mean = means + at * dim;
      std::fill_n(mean, dim, 0.f);
      int64_t tokens = 0;
      grid.runs(at % blocks, [&](int64_t first, int64_t length) {
        for (int64_t token = first; token < first + length; ++token) {
          const T* from = head + token * x.stride(2);
          const float* add = nullptr;
          if constexpr (std::is_same_v<T, float>) {
            add = from;
          } else {
            at::vec::convert<T, float>(from, row.data(), dim);
            add = row.data();
          }
          int64_t d = 0;
          for (; d + kLanes <= dim; d += kLanes) {
            (Vec::loadu(mean + d) + Vec::loadu(add + d)).store(mean + d);
          }
          for (; d < dim; ++d) mean[d] += add[d];
        }
        tokens += length;
      });
      for (int64_t d = 0; d < dim; ++d) mean[d] /= static_cast<float>(tokens);
    }
  });
}

// Pool and select where no frame is dropped; see lipass.kernels.select.api. `grids` holds grid
// and tile of the queries and of the candidates; `guarded` [Nq or 1, Nc] are visited in any case.
// Every row visits the `before` blocks in front of the candidates, `wanted` candidates, and the
// `after` blocks behind them.
Tensor plan(const Tensor& q, const Tensor& k, at::IntArrayRef grids,
            const std::optional<Tensor>& guarded, int64_t wanted, int64_t before, int64_t after) {
  const Grid q_grid(grids.data()), k_grid(grids.data() + 6);
  const int64_t rows = q_grid.count(), columns = k_grid.count(), dim = q.size(3);
  const int64_t pairs = q.size(0) * q.size(1), width = before + wanted + after;
  TORCH_CHECK(q.size(2) == q_grid.tokens() && k.size(2) == k_grid.tokens(), "q and k must have ",
              q_grid.tokens(), " and ", k_grid.tokens(), " tokens, got ", q.size(2), " and ",
              k.size(2), "; pass the tokens of the grids");
  const Tensor q_rows = q.stride(3) == 1 ? q : q.contiguous();
  const Tensor k_rows = k.stride(3) == 1 ? k : k.contiguous();
  std::vector<float> q_mean(pairs * rows * dim), k_mean(pairs * columns * dim);
  for (const bool keys : {false, true}) {
    const Tensor& from = keys ? k_rows : q_rows;
    const Grid& grid = keys ? k_grid : q_grid;
    float* to = keys ? k_mean.data() : q_mean.data();
    switch (q.scalar_type()) {
      case at::kFloat: pool<float>(from, grid, to); break;
      case at::kBFloat16: pool<at::BFloat16>(from, grid, to); break;
      case at::kHalf: pool<at::Half>(from, grid, to); break;
      default: TORCH_CHECK(false, "q must be fp32, bf16 or fp16, got ", q.scalar_type());
    }
  }
  const Tensor guard = guarded ? guarded->contiguous() : Tensor();
  const bool* guards = guarded ? guard.const_data_ptr<bool>() : nullptr;
  const int64_t guard_stride = guarded && guard.size(0) > 1 ? columns : 0;
  Tensor out = at::empty({q.size(0), q.size(1), rows, width}, q.options().dtype(at::kInt));
  int32_t* to = out.mutable_data_ptr<int32_t>();
  const int64_t grain = 1 + (1 << 14) / std::max<int64_t>(columns * dim, 1);
  at::parallel_for(0, pairs * rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<std::pair<float, int32_t>> rank(columns);
    for (int64_t at = begin; at < end; ++at) {
      const float* query = q_mean.data() + at * dim;
      for (int64_t n = 0; n < columns; ++n) {
        const float* key = k_mean.data() + (at / rows * columns + n) * dim;
        Vec sum(0.f);
        int64_t d = 0;
        for (; d + kLanes <= dim; d += kLanes) {
          sum = at::vec::fmadd(Vec::loadu(query + d), Vec::loadu(key + d), sum);
        }
        float lanes[kLanes], score = 0.f;
        sum.store(lanes);
        for (const float lane : lanes) score += lane;
        for (; d < dim; ++d) score += query[d] * key[d];
        const bool guarded_here = guards && guards[at % rows * guard_stride + n];
        // Ascending by negated score, then by id: the order of a stable sort.
        rank[n] = {guarded_here ? -kInf : -score, static_cast<int32_t>(n)};
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

TORCH_LIBRARY_FRAGMENT(lipass_native, m) {
  m.def("plan(Tensor q, Tensor k, int[] grids, Tensor? guarded, int wanted, int before, "
        "int after) -> Tensor");
  m.def("attend(Tensor q, Tensor[] k, Tensor[] v, Tensor indices, Tensor counts, int[] grids, "
        "float scale, Tensor? key_keep, Tensor? key_bias, bool return_lse) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(lipass_native, CPU, m) {
  m.impl("attend", attend);
  m.impl("plan", plan);
}

}  // namespace
