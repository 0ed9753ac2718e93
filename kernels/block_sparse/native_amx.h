// Attention of some queries in bf16 or fp16, multiplied in AMX tiles.
//
// A tile is 16 rows of 64 bytes, and one instruction multiplies two:
//
//   C[16, 16] += A[16, 32] * B[32, 16]     C is fp32; B holds pairs of rows, interleaved
//
// K is A as it lies. Q^T is packed as B once a task; weights are written as B by the softmax. V^T is
// A and has to be turned, 32 keys at a time. All that is packed here is stored tile after tile.

#pragma once

#include <cmath>

#include "native_blocks.h"
#include "native_vec.h"

#if defined(CPU_CAPABILITY_AVX512) && defined(__AMX_BF16__)
#define LIPASS_AMX

#include <ATen/cpu/Utils.h>
#include <ATen/native/CPUBlas.h>
#include <immintrin.h>

namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileDepth = 32;
constexpr int64_t kTile = kTileRows * kTileDepth;  // 16-bit numbers of A or B
constexpr int64_t kSums = kTileRows * kTileRows;   // fp32 numbers of C

// Where tiles of A or B lie, in numbers of E: a row, the same tile 16 rows (columns) on, the next
// tile along the sum.
template <typename E>
struct Tiles {
  const E* data;
  int64_t row, across, along;
};

// Four tiles of C next to each other in pairs, `[2, 2]`: 32 rows of A times 32 columns of B.
struct Sums {
  float* data;
  int64_t down, across;

  float* at(int64_t row, int64_t column) const { return data + row * down + column * across; }
};

template <typename E>
inline void multiply(const Tiles<E>& a, const Tiles<E>& b, const Sums& c, int64_t steps, bool add) {
  constexpr int64_t kSumRow = kTileRows * sizeof(float);
  if (add) {
    _tile_loadd(0, c.at(0, 0), kSumRow);
    _tile_loadd(1, c.at(0, 1), kSumRow);
    _tile_loadd(2, c.at(1, 0), kSumRow);
    _tile_loadd(3, c.at(1, 1), kSumRow);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const E *upper = a.data, *left = b.data;
  const int64_t a_row = a.row * sizeof(E), b_row = b.row * sizeof(E);
  for (int64_t step = 0; step < steps; ++step, upper += a.along, left += b.along) {
    _tile_loadd(4, upper, a_row);
    _tile_loadd(6, left, b_row);
    _tile_loadd(7, left + b.across, b_row);
    _tile_loadd(5, upper + a.across, a_row);
    if constexpr (std::is_same_v<E, at::BFloat16>) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    } else {
#if defined(__AMX_FP16__)
      _tile_dpfp16ps(0, 4, 6);
      _tile_dpfp16ps(1, 4, 7);
      _tile_dpfp16ps(2, 5, 6);
      _tile_dpfp16ps(3, 5, 7);
#endif
    }
  }
  _tile_stored(0, c.at(0, 0), kSumRow);
  _tile_stored(1, c.at(0, 1), kSumRow);
  _tile_stored(2, c.at(1, 0), kSumRow);
  _tile_stored(3, c.at(1, 1), kSumRow);
}

// The compiler does not know that the instructions on tiles read memory.
inline void finish_stores() { asm volatile("" ::: "memory"); }

// Shapes of tiles 0 to 7: 0 to 3 are C, 4 and 5 A, 6 and 7 B.
struct alignas(64) Palette {
  uint8_t number = 1, first_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  explicit Palette(int64_t depth) {
    for (int tile = 0; tile < 8; ++tile) {
      row_bytes[tile] = 64;
      rows[tile] = kTileRows;
    }
    row_bytes[4] = row_bytes[5] = static_cast<uint16_t>(2 * depth);
    rows[6] = rows[7] = static_cast<uint8_t>(depth / 2);
  }
};

// Turn 8 numbers of 32 rows: `to[n, row] = from[row, n]`, 16 bits each, 32 a row of `to`.
template <typename E>
inline void turn(const E* from, int64_t stride, E* to) {
  static_assert(sizeof(E) == 2);
  const auto load = [&](int row) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + row * stride));
  };
  // A quarter of a register is one row; then quarters are turned each by itself.
  __m512i x[8], y[8];
#pragma GCC unroll 8
  for (int n = 0; n < 8; ++n) {
    x[n] = _mm512_castsi128_si512(load(n));
    x[n] = _mm512_mask_broadcast_i32x4(x[n], 0x00f0, load(8 + n));
    x[n] = _mm512_mask_broadcast_i32x4(x[n], 0x0f00, load(16 + n));
    x[n] = _mm512_mask_broadcast_i32x4(x[n], 0xf000, load(24 + n));
  }
#pragma GCC unroll 4
  for (int n = 0; n < 8; n += 2) {
    y[n] = _mm512_unpacklo_epi16(x[n], x[n + 1]);
    y[n + 1] = _mm512_unpackhi_epi16(x[n], x[n + 1]);
  }
#pragma GCC unroll 2
  for (int n = 0; n < 8; n += 4) {
    x[n] = _mm512_unpacklo_epi32(y[n], y[n + 2]);
    x[n + 1] = _mm512_unpackhi_epi32(y[n], y[n + 2]);
    x[n + 2] = _mm512_unpacklo_epi32(y[n + 1], y[n + 3]);
    x[n + 3] = _mm512_unpackhi_epi32(y[n + 1], y[n + 3]);
  }
#pragma GCC unroll 4
  for (int n = 0; n < 4; ++n) {
    _mm512_store_si512(to + 2 * n * kTileDepth, _mm512_unpacklo_epi64(x[n], x[n + 4]));
    _mm512_store_si512(to + (2 * n + 1) * kTileDepth, _mm512_unpackhi_epi64(x[n], x[n + 4]));
  }
}

// 2 ** x to the precision of 16 bits: relative error 8e-5, where bf16 rounds by 4e-3, 0 at -inf.
inline __m512 weight_of(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);  // x - floor(x)
  __m512 sum = _mm512_set1_ps(0.078024522f);
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.226067171f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.695833527f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.999925221f));
  return _mm512_scalef_ps(sum, x);
}

// Round two rows of weights to 16 bits and interleave them.
template <typename E>
inline __m512i pair_of(__m512 low, __m512 high) {
  if constexpr (std::is_same_v<E, at::BFloat16>) {
    // Half up, as bits: four simple instructions, where a conversion and its shuffle take longer.
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i even = _mm512_add_epi32(_mm512_castps_si512(low), half);
    const __m512i odd = _mm512_add_epi32(_mm512_castps_si512(high), half);
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(even, 16), odd);
  } else {
    const __m512i order = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
        19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, at::vec::convert_float_half(low, high));
  }
}

// Some queries of one head and what they have seen so far. Its memory outlives the call: fresh
// pages cost more than what is computed in them.
template <typename T>
class TileTask {
 public:
  // Keys between two updates of the softmax, and queries.
  static constexpr int64_t kKeys = 128, kQueries = 128;
  // Rows of a block are padded to a multiple of this.
  static constexpr int64_t kPadding = kTileDepth;

  // Whether heads of `dim` are computed in tiles on this machine.
  static bool takes(int64_t dim) {
#if !defined(__AMX_FP16__)
    if (std::is_same_v<T, at::Half>) return false;
#endif
    static const bool ready = at::cpu::init_amx();
    return ready && dim % 2 == 0;
  }

  explicit TileTask(const Call& call)
      : dim_(call.q.size(3)), depth_(depth_of(dim_)), steps_(dim_ / depth_), call_(call) {
    static thread_local std::vector<float> memory;
    output_rows_ = (dim_ + 31) / 32 * 32;
    const auto pieces =
        cut(memory, {kQueries * output_rows_, kQueries * dim_, 2 * kTileRows * kKeys,
                     kQueries * dim_ / 2, kTileRows * kKeys, output_rows_ * kKeys / 2});
    output_ = pieces[0];
    turned_ = pieces[1];
    score_ = pieces[2];
    query_ = reinterpret_cast<T*>(pieces[3]);
    weight_ = reinterpret_cast<T*>(pieces[4]);
    value_ = reinterpret_cast<T*>(pieces[5]);
  }

  ~TileTask() {
    // ATen may believe that this thread still has the tiles it shaped for its own products.
    at::native::cpublas::brgemm_release();
    _tile_release();
  }

  // Take `queries` rows of a head.
  void begin(Rows<T> head, const int64_t* token, int64_t queries) {
    queries_ = queries;
    pairs_ = (queries + 2 * kTileRows - 1) / (2 * kTileRows);
    T* rows = reinterpret_cast<T*>(turned_);
    for (int64_t at = 0; at < queries; ++at) {
      std::copy_n(head.data + token[at] * head.stride, dim_, rows + at * dim_);
    }
    const int64_t columns = pairs_ * 2 * kTileRows, words = dim_ / 2;
    std::fill(rows + queries * dim_, rows + columns * dim_, T(0.f));
    // Two 16-bit numbers move as one of 32 bits.
    for (int64_t at = 0; at < columns; at += kTileRows) {
      at::vec::transpose_mxn<float>(turned_ + at * words, words,
                                    reinterpret_cast<float*>(query_) + at * words, kTileRows,
                                    kTileRows, words);
    }
    std::fill_n(maximum_, columns, -kInf);
    std::fill_n(sum_, columns, 0.f);
    first_ = true;
  }

  void attend(const Chunk<T>& chunk, Ahead<T>& ahead) {
    take_units(chunk);
    const int64_t prefetches = kKeys / (pairs_ * (kKeys / kTileDepth));
    for (int64_t pair = 0; pair < pairs_; ++pair) {
      scores(pair, ahead, prefetches);
      const float unit = adjust_scores(chunk);
      update_softmax(pair, unit);
      values(pair);
    }
    first_ = false;
  }

  // Write the rows, and their log-sum-exp unless `lse` is null.
  void finish(T* out, int64_t stride, float* lse, const int64_t* token) {
    for (int64_t at = 0; at < 2 * kTileRows * pairs_; at += kTileRows) {
      const __m512 share = _mm512_div_ps(_mm512_set1_ps(1.f), _mm512_loadu_ps(sum_ + at));
      float* from = output_ + at * output_rows_;
      for (float* to = from; to < from + dim_ * kTileRows; to += kTileRows) {
        _mm512_store_ps(to, _mm512_mul_ps(_mm512_load_ps(to), share));
      }
      at::vec::transpose_mxn<float>(from, kTileRows, turned_ + at * dim_, dim_, dim_, kTileRows);
    }
    for (int64_t row = 0; row < queries_; ++row) {
      at::vec::convert<float, T>(turned_ + row * dim_, out + token[row] * stride, dim_);
      if (lse) lse[token[row]] = (maximum_[row] + std::log2(sum_[row])) / kLog2E;
    }
  }

 private:
  // Depth of the tiles of K and Q: the largest that divides the head dim.
  static int64_t depth_of(int64_t dim) {
    int64_t depth = kTileDepth;
    while (dim % depth != 0) depth -= 2;
    return depth;
  }

  // Find the keys in steps of 32, and turn their values.
  void take_units(const Chunk<T>& chunk) {
    units_ = 0;
    for (const Block<T>& piece : chunk.pieces) {
      for (int64_t key = 0; key < piece.keys; key += kTileDepth, ++units_) {
        key_[units_] = {piece.k.data + key * piece.k.stride, piece.k.stride};
        const T* from = piece.v.data + key * piece.v.stride;
        T* to = value_ + units_ * kTile;
        int64_t d = 0;
        for (; d + 8 <= dim_; d += 8) turn(from + d, piece.v.stride, to + place_of(d));
        if (d == dim_) continue;
        T rest[kTileDepth * 8] = {};
        for (int64_t row = 0; row < kTileDepth; ++row) {
          std::copy_n(from + row * piece.v.stride + d, dim_ - d, rest + row * 8);
        }
        turn(rest, 8, to + place_of(d));
      }
    }
  }

  // Where row `d` of V^T starts in its first tile.
  static int64_t place_of(int64_t d) {
    return d / kTileRows * kKeys * kTileRows + d % kTileRows * kTileDepth;
  }

  // Scores of 32 queries, `[2, keys, 16]`.
  void scores(int64_t pair, Ahead<T>& ahead, int64_t prefetches) {
    shape_tiles(depth_);
    finish_stores();
    const int64_t tile = kTileRows * depth_;
    const Tiles<T> b{query_ + pair * 2 * kTileRows * dim_, 2 * kTileRows, kTileRows * dim_, tile};
    for (int64_t unit = 0; unit < units_; ++unit) {
      const Rows<T>& rows = key_[unit];
      const Tiles<T> a{rows.data, rows.stride, kTileRows * rows.stride, depth_};
      multiply(a, b, Sums{score_ + unit * 2 * kSums, kSums, kKeys * kTileRows}, steps_, false);
      ahead.step(prefetches);
    }
  }

  // Add what depends on the key; returns the unit that the scores are in.
  float adjust_scores(const Chunk<T>& chunk) {
    const float unit = call_.scale * kLog2E;
    const bool in_place = call_.bias || unit <= 0.f;
    float* row = score_;
    for (const Block<T>& piece : chunk.pieces) {
      for (float* group : {row, row + kKeys * kTileRows}) {
        for (int64_t key = 0; in_place && key < piece.seen; ++key) {
          const __m512 shift = _mm512_set1_ps(piece.bias ? piece.bias[key] * kLog2E : 0.f);
          float* to = group + key * kTileRows;
          _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_load_ps(to), _mm512_set1_ps(unit), shift));
        }
        std::fill(group + piece.seen * kTileRows, group + piece.keys * kTileRows, -kInf);
      }
      row += piece.keys * kTileRows;
    }
    return in_place ? 1.f : unit;
  }

  // Turn the scores of 32 queries into weights, `[2, keys / 2, 16, 2]`.
  // Scores are in units of `unit`, which is positive.
  void update_softmax(int64_t pair, float unit) {
    const int64_t keys = units_ * kTileDepth, second = kKeys * kTileRows;
    const __m512 units = _mm512_set1_ps(unit);
    __m512 most[2][4], total[2][2];
    for (int n = 0; n < 2; ++n) {
      for (__m512& lanes : most[n]) lanes = _mm512_set1_ps(-kInf);
      for (__m512& lanes : total[n]) lanes = _mm512_setzero_ps();
    }
    for (int64_t key = 0; key < keys; key += 4) {
#pragma GCC unroll 8
      for (int n = 0; n < 8; ++n) {
        const float* from = score_ + n % 2 * second + (key + n / 2) * kTileRows;
        most[n % 2][n / 2] = _mm512_max_ps(most[n % 2][n / 2], _mm512_load_ps(from));
      }
    }
    __m512 base[2];
    for (int n = 0; n < 2; ++n) {
      const int64_t at = (2 * pair + n) * kTileRows;
      const __m512 found = _mm512_mul_ps(
          units, _mm512_max_ps(_mm512_max_ps(most[n][0], most[n][1]),
                               _mm512_max_ps(most[n][2], most[n][3])));
      const __m512 before = _mm512_load_ps(maximum_ + at);
      const __mmask16 grown =
          _mm512_cmp_ps_mask(found, _mm512_add_ps(before, _mm512_set1_ps(kSlack)), _CMP_GT_OQ);
      base[n] = _mm512_mask_mov_ps(before, grown, found);
      if (grown) {
        _mm512_store_ps(maximum_ + at, base[n]);
        rescale(at, weight_of(_mm512_sub_ps(before, base[n])), grown);
      }
    }
    for (int64_t key = 0; key < keys; key += 2) {
#pragma GCC unroll 2
      for (int n = 0; n < 2; ++n) {
        const float* from = score_ + n * second + key * kTileRows;
        const __m512 low = weight_of(_mm512_fmsub_ps(_mm512_load_ps(from), units, base[n]));
        const __m512 high =
            weight_of(_mm512_fmsub_ps(_mm512_load_ps(from + kTileRows), units, base[n]));
        total[n][0] = _mm512_add_ps(total[n][0], low);
        total[n][1] = _mm512_add_ps(total[n][1], high);
        _mm512_store_si512(weight_ + n * second + key * kTileRows, pair_of<T>(low, high));
      }
    }
    for (int n = 0; n < 2; ++n) {
      float* to = sum_ + (2 * pair + n) * kTileRows;
      const __m512 added = _mm512_add_ps(total[n][0], total[n][1]);
      _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), added));
    }
  }

  // Multiply what 16 queries have summed by a factor where their maximum has grown.
  void rescale(int64_t at, __m512 factor, __mmask16 grown) {
    if (first_) return;
    factor = _mm512_mask_mov_ps(_mm512_set1_ps(1.f), grown, factor);
    _mm512_store_ps(sum_ + at, _mm512_mul_ps(_mm512_load_ps(sum_ + at), factor));
    float* from = output_ + at * output_rows_;
    for (float* to = from; to < from + dim_ * kTileRows; to += kTileRows) {
      _mm512_store_ps(to, _mm512_mul_ps(_mm512_load_ps(to), factor));
    }
  }

  // Add the weighted values of 32 queries, `[2, D, 16]`.
  void values(int64_t pair) {
    shape_tiles(kTileDepth);
    finish_stores();
    const int64_t second = kKeys * kTileRows;
    const Tiles<T> b{weight_, 2 * kTileRows, second, kTile};
    for (int64_t d = 0; d < output_rows_; d += 2 * kTileRows) {
      const Tiles<T> a{value_ + d * kKeys, kTileDepth, second, kTile};
      float* to = output_ + 2 * pair * kTileRows * output_rows_ + d * kTileRows;
      multiply(a, b, Sums{to, kSums, kTileRows * output_rows_}, units_, !first_);
    }
  }

  // Shaping clears the tiles and is slow beside a product; heads of 64 and 128 need it once.
  void shape_tiles(int64_t depth) {
    if (depth == shaped_) return;
    const Palette palette(depth);
    _tile_loadconfig(&palette);
    shaped_ = depth;
  }

  // A maximum stays as it is until it has grown by this (in units of log 2): then weights are at
  // most 256, and what was summed before is seldom rescaled.
  static constexpr float kSlack = 8.f;

  const int64_t dim_, depth_, steps_;
  const Call& call_;
  int64_t queries_ = 0, pairs_ = 0, units_ = 0, output_rows_ = 0, shaped_ = 0;
  bool first_ = true;
  float *output_, *turned_, *score_;
  T *query_, *weight_, *value_;
  Rows<T> key_[kKeys / kTileDepth];
  // Running maximum (in units of log 2) and running sum.
  alignas(64) float maximum_[kQueries], sum_[kQueries];
};

}  // namespace

#endif
