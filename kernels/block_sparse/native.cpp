// Block-sparse attention on the CPU; kernels/block_sparse/native.py builds and calls it.
//
// Scores are kept transposed, keys down and queries across:
//
//   S^T[keys, queries] = K * Q^T      K is read row by row where it lies; only the small Q is turned
//   online softmax over the keys      vertical: one lane is one query, no sum across lanes
//   O^T[D, queries] += V^T * P^T      V is read row by row where it lies
//
// so neither keys nor values are gathered or packed where a block is one run of rows. A task is up
// to 64 queries of one query block of one head.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
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
constexpr int64_t kQueries = 64;
// Keys between two updates of the softmax: their scores (32 KiB) stay in the first-level cache.
constexpr int64_t kKeys = 128;
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
struct Rows {
  const float* data;
  int64_t stride;
};

// The keys of one block of one head that are seen at all.
struct Block {
  Rows k, v;
  const float* bias;  // null: no bias
  int64_t keys;
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

template <int V, bool kSumAlongRow>
void panel_product(const float* a, int64_t a_stride, const float* b, int64_t ldb, float* c,
                   int64_t rows, int64_t terms, bool add) {
  const int64_t step = kSumAlongRow ? a_stride : 1;
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
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

// C[rows, columns] (+)= A * B; B and C have `columns` numbers a row, a multiple of the lanes.
template <bool kSumAlongRow>
void product(Rows a, const float* b, float* c, int64_t columns, int64_t rows, int64_t terms,
             bool add) {
  for (int64_t at = 0; at < columns; at += kVectors * kLanes) {
    const int64_t vectors = std::min<int64_t>(kVectors, (columns - at) / kLanes);
    const float* right = b + at;
    float* to = c + at;
    switch (vectors) {
      case 4:
        panel_product<4, kSumAlongRow>(a.data, a.stride, right, columns, to, rows, terms, add);
        break;
      case 3:
        panel_product<3, kSumAlongRow>(a.data, a.stride, right, columns, to, rows, terms, add);
        break;
      case 2:
        panel_product<2, kSumAlongRow>(a.data, a.stride, right, columns, to, rows, terms, add);
        break;
      default:
        panel_product<1, kSumAlongRow>(a.data, a.stride, right, columns, to, rows, terms, add);
    }
  }
}

// 2 ** x for x <= 0; relative error 1e-7 (minimax fit of degree 5 that gives exactly 1 at 0).
inline Vec exp2_up_to_one(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 clamped = _mm512_max_ps(x, _mm512_set1_ps(-200.f));
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

// Running maximum (in units of log 2), running sum, and the factor for what was summed before.
struct Softmax {
  float maximum[kQueries], sum[kQueries], factor[kQueries];

  void reset() {
    std::fill_n(maximum, kQueries, -kInf);
    std::fill_n(sum, kQueries, 0.f);
  }

  // Turn scores `[keys, columns]` into weights; returns whether some factor is not 1.
  bool update(float* score, const float* bias, int64_t keys, int64_t columns, float scale) {
    const Vec unit(scale * 1.4426950408889634f);
    bool changed = false;
    for (int64_t at = 0; at < columns; at += kLanes) {
      float* first = score + at;
      const Vec before = Vec::loadu(maximum + at);
      Vec most = before;
      for (int64_t key = 0; key < keys; ++key) {
        Vec x = Vec::loadu(first + key * columns) * unit;
        if (bias) x = x + Vec(bias[key] * 1.4426950408889634f);
        x.store(first + key * columns);
        most = at::vec::maximum(most, x);
      }
      Vec total(0.f);
      for (int64_t key = 0; key < keys; ++key) {
        const Vec weight = exp2_up_to_one(Vec::loadu(first + key * columns) - most);
        weight.store(first + key * columns);
        total = total + weight;
      }
      const Vec rescale = exp2_up_to_one(before - most);
      (Vec::loadu(sum + at) * rescale + total).store(sum + at);
      rescale.store(factor + at);
      most.store(maximum + at);
      changed |= (before != most).zero_mask() != (1 << kLanes) - 1;
    }
    return changed;
  }
};

struct Scratch {
  std::vector<float> memory;
  float *query, *output, *score, *row;

  Scratch(int64_t dim) : memory(kQueries * (3 * dim + kKeys)) {
    query = memory.data();
    output = query + kQueries * dim;
    row = output + kQueries * dim;
    score = row + kQueries * dim;
  }
};

template <typename T>
inline void to_float(const T* from, float* to, int64_t count) {
  at::vec::convert<T, float>(from, to, count);
}

struct Call {
  Tensor q, indices, counts, out, lse;
  std::vector<Tensor> k, v;  // one per segment, fp32 or the dtype of q
  Grid q_grid;
  std::vector<Grid> grids;
  std::vector<int64_t> first_block, first_token;
  int64_t blocks = 0, tokens = 0;
  const bool* keep = nullptr;  // [B, Lk]
  const float* bias = nullptr;  // [B or 1, Lk]
  int64_t bias_stride = 0;
  float scale = 1.f;
  std::vector<Block> table;  // [B * H, blocks]; filled for visited blocks
  std::vector<char> visited;
};

// Memory that outlives a call: touching fresh pages costs more than the copies that go there.
float* packing_memory(int64_t count) {
  static thread_local std::vector<float> held;
  if (static_cast<int64_t>(held.size()) < count) held.resize(count);
  return held.data();
}

bool hidden(const Call& call, int64_t b, int64_t token) {
  return (call.keep && !call.keep[b * call.tokens + token]) ||
      (call.bias && call.bias[b * call.bias_stride + token] == -kInf);
}

// Say where the seen keys of each visited block lie; copy those that are no single run of rows.
template <typename T>
void prepare_blocks(Call& call) {
  const int64_t heads = call.q.size(1), pairs = call.q.size(0) * heads, dim = call.q.size(3);
  const int64_t width = call.indices.size(3), q_blocks = call.q_grid.count();
  const int64_t slots = call.grids[0].slots();
  call.table.assign(pairs * call.blocks, Block{});
  call.visited.assign(pairs * call.blocks, 0);
  const int32_t* index = call.indices.const_data_ptr<int32_t>();
  const int32_t* count = call.counts.const_data_ptr<int32_t>();
  // Offsets into the packed memory, in blocks; known before the memory is.
  std::vector<int64_t> place(pairs * call.blocks, -1);
  int64_t packed = 0;
  const bool masks = call.keep || call.bias;
  std::vector<char> single(call.blocks, 0);
  for (size_t s = 0; s < call.grids.size(); ++s) {
    for (int64_t n = 0; n < call.grids[s].count(); ++n) {
      int64_t runs = 0;
      call.grids[s].runs(n, [&](int64_t, int64_t) { ++runs; });
      single[call.first_block[s] + n] = runs == 1;
    }
  }
  for (int64_t pair = 0; pair < pairs; ++pair) {
    for (int64_t n = 0; n < q_blocks; ++n) {
      const int32_t* row = index + (pair * q_blocks + n) * width;
      for (int32_t entry = 0; entry < count[pair * q_blocks + n]; ++entry) {
        const int64_t at = pair * call.blocks + row[entry];
        if (call.visited[at]) continue;
        call.visited[at] = 1;
        if (!std::is_same_v<T, float> || masks || !single[row[entry]]) place[at] = packed++;
      }
    }
  }
  const int64_t block_floats = slots * (2 * dim + 1);
  float* memory = packing_memory(packed * block_floats);
  const int64_t grain = packed ? 1 + (1 << 15) / block_floats : call.blocks * pairs;
  at::parallel_for(0, pairs * call.blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      if (!call.visited[at]) continue;
      const int64_t pair = at / call.blocks, b = pair / heads, h = pair % heads;
      const int64_t id = at % call.blocks;
      size_t s = call.grids.size() - 1;
      while (call.first_block[s] > id) --s;
      const Tensor &k = call.k[s], &v = call.v[s];
      const T* k_head = k.const_data_ptr<T>() + b * k.stride(0) + h * k.stride(1);
      const T* v_head = v.const_data_ptr<T>() + b * v.stride(0) + h * v.stride(1);
      Block& block = call.table[at];
      if (place[at] < 0) {
        if constexpr (std::is_same_v<T, float>) {
          call.grids[s].runs(id - call.first_block[s], [&](int64_t token, int64_t keys) {
            block = {{k_head + token * k.stride(2), k.stride(2)},
                     {v_head + token * v.stride(2), v.stride(2)},
                     nullptr,
                     keys};
          });
        }
        continue;
      }
      float* k_to = memory + place[at] * block_floats;
      float* v_to = k_to + slots * dim;
      float* bias_to = v_to + slots * dim;
      block = {{k_to, dim}, {v_to, dim}, call.bias ? bias_to : nullptr, 0};
      call.grids[s].runs(id - call.first_block[s], [&](int64_t first, int64_t length) {
        for (int64_t token = first; token < first + length; ++token) {
          const int64_t global = call.first_token[s] + token;
          if (masks && hidden(call, b, global)) continue;
          to_float(k_head + token * k.stride(2), k_to + block.keys * dim, dim);
          to_float(v_head + token * v.stride(2), v_to + block.keys * dim, dim);
          if (call.bias) bias_to[block.keys] = call.bias[b * call.bias_stride + global];
          ++block.keys;
        }
      });
    }
  });
}

// Keys that meet one update of the softmax: pieces that lie as one run each.
struct Chunk {
  std::vector<Block> pieces;
  int64_t keys = 0;

  void clear() {
    pieces.clear();
    keys = 0;
  }

  void add(Block piece) {
    if (!pieces.empty()) {
      Block& last = pieces.back();
      const bool joins = last.k.data + last.keys * last.k.stride == piece.k.data &&
          last.v.data + last.keys * last.v.stride == piece.v.data &&
          last.k.stride == piece.k.stride && last.v.stride == piece.v.stride && !piece.bias;
      keys += piece.keys;
      if (joins) {
        last.keys += piece.keys;
        return;
      }
      pieces.push_back(piece);
      return;
    }
    keys = piece.keys;
    pieces.push_back(piece);
  }
};

struct Task {
  const Call& call;
  Scratch& scratch;
  Softmax& softmax;
  Chunk& chunk;
  int64_t columns;  // queries, rounded up to lanes
  bool first = true;

  void attend() {
    if (chunk.keys == 0) return;
    const int64_t dim = call.q.size(3);
    float bias[kKeys];
    bool biased = false;
    int64_t at = 0;
    for (const Block& piece : chunk.pieces) {
      product<true>(piece.k, scratch.query, scratch.score + at * columns, columns, piece.keys,
                    dim, false);
      biased |= piece.bias != nullptr;
      if (piece.bias) std::copy_n(piece.bias, piece.keys, bias + at);
      at += piece.keys;
    }
    const bool changed =
        softmax.update(scratch.score, biased ? bias : nullptr, chunk.keys, columns, call.scale);
    if (changed && !first) {
      for (int64_t d = 0; d < dim; ++d) {
        for (int64_t n = 0; n < columns; n += kLanes) {
          float* to = scratch.output + d * columns + n;
          (Vec::loadu(to) * Vec::loadu(softmax.factor + n)).store(to);
        }
      }
    }
    at = 0;
    for (const Block& piece : chunk.pieces) {
      product<false>(piece.v, scratch.score + at * columns, scratch.output, columns, dim,
                     piece.keys, !first);
      first = false;
      at += piece.keys;
    }
    chunk.clear();
  }
};

template <typename T>
void run_task(const Call& call, Scratch& scratch, Chunk& chunk, int64_t task, int64_t parts) {
  const int64_t dim = call.q.size(3), heads = call.q.size(1), q_blocks = call.q_grid.count();
  const int64_t part = task % parts, n = task / parts % q_blocks, pair = task / parts / q_blocks;
  const int64_t b = pair / heads, h = pair % heads;
  int64_t token[kQueries], queries = 0, slot = 0;
  call.q_grid.runs(n, [&](int64_t first, int64_t length) {
    for (int64_t at = first; at < first + length; ++at, ++slot) {
      if (slot / kQueries == part) token[queries++] = at;
    }
  });
  if (queries == 0) return;
  const int64_t columns = (queries + kLanes - 1) / kLanes * kLanes;

  const T* q = call.q.const_data_ptr<T>() + b * call.q.stride(0) + h * call.q.stride(1);
  for (int64_t at = 0; at < queries; ++at) {
    to_float(q + token[at] * call.q.stride(2), scratch.row + at * dim, dim);
  }
  std::fill(scratch.row + queries * dim, scratch.row + columns * dim, 0.f);
  at::vec::transpose_mxn<float>(scratch.row, dim, scratch.query, columns, columns, dim);

  Softmax softmax;
  softmax.reset();
  chunk.clear();
  Task state{call, scratch, softmax, chunk, columns};
  const int64_t width = call.indices.size(3), at = pair * q_blocks + n;
  const int32_t* index = call.indices.const_data_ptr<int32_t>() + at * width;
  const int32_t count = call.counts.const_data_ptr<int32_t>()[at];
  for (int32_t entry = 0; entry < count; ++entry) {
    Block block = call.table[pair * call.blocks + index[entry]];
    while (block.keys > 0) {
      Block piece = block;
      piece.keys = std::min(block.keys, kKeys - chunk.keys);
      chunk.add(piece);
      block.k.data += piece.keys * block.k.stride;
      block.v.data += piece.keys * block.v.stride;
      if (block.bias) block.bias += piece.keys;
      block.keys -= piece.keys;
      if (chunk.keys == kKeys) state.attend();
    }
  }
  state.attend();

  T* out = call.out.mutable_data_ptr<T>() + pair * call.q_grid.tokens() * dim;
  float* lse = call.lse.defined()
      ? call.lse.mutable_data_ptr<float>() + pair * call.q_grid.tokens()
      : nullptr;
  if (state.first) {
    for (int64_t row = 0; row < queries; ++row) {
      std::fill_n(out + token[row] * dim, dim, T(0.f));
      if (lse) lse[token[row]] = -kInf;
    }
    return;
  }
  for (int64_t column = 0; column < columns; column += kLanes) {
    const Vec inverse = Vec(1.f) / Vec::loadu(softmax.sum + column);
    for (int64_t d = 0; d < dim; ++d) {
      float* to = scratch.output + d * columns + column;
      (Vec::loadu(to) * inverse).store(to);
    }
  }
  at::vec::transpose_mxn<float>(scratch.output, columns, scratch.row, dim, dim, columns);
  for (int64_t row = 0; row < queries; ++row) {
    at::vec::convert<float, T>(scratch.row + row * dim, out + token[row] * dim, dim);
    if (lse) {
      lse[token[row]] = (softmax.maximum[row] + std::log2(softmax.sum[row])) * 0.6931471805599453f;
    }
  }
}

template <typename T>
void run(Call& call) {
  prepare_blocks<T>(call);
  const int64_t parts = (call.q_grid.slots() + kQueries - 1) / kQueries;
  const int64_t tasks = call.q.size(0) * call.q.size(1) * call.q_grid.count() * parts;
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(call.q.size(3));
    Chunk chunk;
    for (int64_t task = begin; task < end; ++task) run_task<T>(call, scratch, chunk, task, parts);
  });
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
            .out = at::empty(q.sizes(), q.options()),
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
    case at::kFloat: run<float>(call); break;
    case at::kBFloat16: run<at::BFloat16>(call); break;
    case at::kHalf: run<at::Half>(call); break;
    default: TORCH_CHECK(false, "q must be fp32, bf16 or fp16, got ", q.scalar_type());
  }
  return {call.out, call.lse};
}

TORCH_LIBRARY_FRAGMENT(lipass_native, m) {
  m.def("attend(Tensor q, Tensor[] k, Tensor[] v, Tensor indices, Tensor counts, int[] grids, "
        "float scale, Tensor? key_keep, Tensor? key_bias, bool return_lse) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(lipass_native, CPU, m) { m.impl("attend", attend); }

}  // namespace
