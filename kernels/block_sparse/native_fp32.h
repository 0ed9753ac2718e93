// Attention of some queries in fp32, on any CPU; rows of 16 bits are converted chunk by chunk.

#pragma once

#include <cmath>

#include "native_blocks.h"
#include "native_vec.h"

namespace {

// Accumulators of one product fill the registers: 6 x 4 of 32, or 6 x 2 of 16.
constexpr int kRows = 6;
constexpr int kVectors = kLanes == 16 ? 4 : 2;
constexpr int64_t kColumns = 2 * kLanes;

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

// Some queries of one head and what they have seen so far. Its memory outlives the call: fresh
// pages cost more than what is computed in them.
template <typename T>
class FloatTask {
 public:
  // Keys between two updates of the softmax, and queries: their scores (32 KiB) stay in the
  // first-level cache.
  static constexpr int64_t kKeys = 128, kQueries = 64;
  // Rows of a block are padded to a multiple of this.
  static constexpr int64_t kPadding = 1;

  explicit FloatTask(const Call& call) : dim_(call.q.size(3)), call_(call) {
    static thread_local std::vector<float> memory;
    const int64_t rows = std::is_same_v<T, float> ? 0 : kKeys * dim_, size = kQueries * dim_;
    const auto pieces = cut(memory, {size, size, size, kQueries * kKeys, rows});
    query_ = pieces[0];
    output_ = pieces[1];
    turned_ = pieces[2];
    score_ = pieces[3];
    rows_ = pieces[4];
  }

  // Take `queries` rows of a head, laid across: `[D, columns]`.
  void begin(Rows<T> head, const int64_t* token, int64_t queries) {
    queries_ = queries;
    columns_ = (queries + kColumns - 1) / kColumns * kColumns;
    for (int64_t at = 0; at < queries; ++at) {
      at::vec::convert<T, float>(head.data + token[at] * head.stride, turned_ + at * dim_, dim_);
    }
    std::fill(turned_ + queries * dim_, turned_ + columns_ * dim_, 0.f);
    at::vec::transpose_mxn<float>(turned_, dim_, query_, columns_, columns_, dim_);
    std::fill_n(maximum_, columns_, -kInf);
    std::fill_n(sum_, columns_, 0.f);
    first_ = true;
  }

  void attend(const Chunk<T>& chunk, Ahead<T>& ahead) {
    scores(chunk, ahead);
    if (update_softmax(chunk.keys, adjust_scores(chunk)) && !first_) rescale();
    values(chunk, ahead);
    first_ = false;
  }

  // Write the rows, and their log-sum-exp unless `lse` is null.
  void finish(T* out, int64_t stride, float* lse, const int64_t* token) {
    for (int64_t at = 0; at < columns_; at += kLanes) {
      const Vec share = Vec(1.f) / Vec::loadu(sum_ + at);
      for (float* to = output_ + at; to < output_ + dim_ * columns_; to += columns_) {
        (Vec::loadu(to) * share).store(to);
      }
    }
    at::vec::transpose_mxn<float>(output_, columns_, turned_, dim_, dim_, columns_);
    for (int64_t row = 0; row < queries_; ++row) {
      at::vec::convert<float, T>(turned_ + row * dim_, out + token[row] * stride, dim_);
      if (lse) lse[token[row]] = (maximum_[row] + std::log2(sum_[row])) / kLog2E;
    }
  }

 private:
  void scores(const Chunk<T>& chunk, Ahead<T>& ahead) {
    float* to = score_;
    for (const Block<T>& piece : chunk.pieces) {
      product<true>(as_floats(piece.k, piece.keys), query_, to, columns_, piece.keys, dim_, false,
                    ahead);
      to += piece.keys * columns_;
    }
  }

  // Add what depends on the key; returns the unit that the scores are in.
  float adjust_scores(const Chunk<T>& chunk) {
    const float unit = call_.scale * kLog2E;
    if (!call_.bias && unit > 0.f) return unit;
    float* row = score_;
    for (const Block<T>& piece : chunk.pieces) {
      for (int64_t key = 0; key < piece.keys; ++key, row += columns_) {
        const Vec shift(piece.bias ? piece.bias[key] * kLog2E : 0.f);
        for (float* to = row; to < row + columns_; to += kLanes) {
          at::vec::fmadd(Vec::loadu(to), Vec(unit), shift).store(to);
        }
      }
    }
    return 1.f;
  }

  // Turn scores `[keys, columns]` into weights, in place. Scores are in units of `unit`, which is
  // positive. Returns whether some factor is not 1.
  bool update_softmax(int64_t keys, float unit) {
    bool changed = false;
    int64_t at = 0;
    // Several lanes at once: one alone would wait for its own maximum and sum at every key.
    for (; at + 4 * kLanes <= columns_; at += 4 * kLanes) changed |= update_lanes<4>(at, keys, unit);
    for (; at < columns_; at += 2 * kLanes) changed |= update_lanes<2>(at, keys, unit);
    return changed;
  }

  template <int V>
  bool update_lanes(int64_t at, int64_t keys, float unit) {
    Vec most[V], total[V];
#pragma GCC unroll 4
    for (int n = 0; n < V; ++n) {
      most[n] = Vec(-kInf);
      total[n] = Vec(0.f);
    }
    for (int64_t key = 0; key < keys; ++key) {
#pragma GCC unroll 4
      for (int n = 0; n < V; ++n) {
        most[n] = larger(most[n], Vec::loadu(score_ + key * columns_ + at + n * kLanes));
      }
    }
    bool changed = false;
#pragma GCC unroll 4
    for (int n = 0; n < V; ++n) {
      const Vec before = Vec::loadu(maximum_ + at + n * kLanes);
      most[n] = larger(before, most[n] * Vec(unit));
      exp2_up_to_one(before - most[n]).store(factor_ + at + n * kLanes);
      most[n].store(maximum_ + at + n * kLanes);
      changed |= (before != most[n]).zero_mask() != (1 << kLanes) - 1;
    }
    for (int64_t key = 0; key < keys; ++key) {
#pragma GCC unroll 4
      for (int n = 0; n < V; ++n) {
        float* to = score_ + key * columns_ + at + n * kLanes;
        const Vec found = exp2_up_to_one(at::vec::fmsub(Vec::loadu(to), Vec(unit), most[n]));
        total[n] = total[n] + found;
        found.store(to);
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < V; ++n) {
      float* to = sum_ + at + n * kLanes;
      at::vec::fmadd(Vec::loadu(to), Vec::loadu(factor_ + at + n * kLanes), total[n]).store(to);
    }
    return changed;
  }

  void rescale() {
    for (float* row = output_; row < output_ + dim_ * columns_; row += columns_) {
      for (int64_t at = 0; at < columns_; at += kLanes) {
        (Vec::loadu(row + at) * Vec::loadu(factor_ + at)).store(row + at);
      }
    }
  }

  void values(const Chunk<T>& chunk, Ahead<T>& ahead) {
    const float* weight = score_;
    bool add = !first_;
    for (const Block<T>& piece : chunk.pieces) {
      product<false>(as_floats(piece.v, piece.keys), weight, output_, columns_, dim_, piece.keys,
                     add, ahead);
      weight += piece.keys * columns_;
      add = true;
    }
  }

  // Rows as fp32: where they lie, or converted.
  Rows<float> as_floats(const Rows<T>& rows, int64_t count) {
    if constexpr (std::is_same_v<T, float>) {
      return rows;
    } else {
      for (int64_t row = 0; row < count; ++row) {
        at::vec::convert<T, float>(rows.data + row * rows.stride, rows_ + row * dim_, dim_);
      }
      return {rows_, dim_};
    }
  }

  const int64_t dim_;
  const Call& call_;
  int64_t queries_ = 0;
  int64_t columns_ = 0;  // queries, rounded up to `kColumns`
  bool first_ = true;
  float *query_, *output_, *turned_, *score_, *rows_;
  // Running maximum (in units of log 2), running sum, and the factor for what was summed before.
  float maximum_[kQueries], sum_[kQueries], factor_[kQueries];
};

}  // namespace
