// Block-sparse attention on the CPU; kernels/block_sparse/native.py builds and calls it.
//
// Scores are kept transposed, keys down and queries across:
//
//   S^T[keys, queries] = K * Q^T      K is read row by row in place; only Q is turned
//   online softmax over the keys      vertical: one lane is one query, no sum across lanes
//   O^T[D, queries] += V^T * P^T      V is read in place, and turned where tiles are multiplied
//
// so neither keys nor values are gathered where a block is one run of rows. A task is some queries
// of one query block of one head: in AMX tiles (native_amx.h) or in fp32 (native_fp32.h).

#include <torch/library.h>

#include "native_amx.h"
#include "native_blocks.h"
#include "native_fp32.h"
#include "native_plan.h"
#include "native_share.h"
#include "native_sizes.h"
#include "native_sort.h"

namespace {

// Attend part `part` of query block `n` of head `pair`.
template <typename Task, typename T>
void run_task(const Call& call, const std::vector<Block<T>>& table, Task& task, Chunk<T>& chunk,
              Ahead<T>& ahead, int64_t pair, int64_t n, int64_t part) {
  int64_t token[Task::kQueries], queries = 0, slot = 0;
  const int32_t* order = call.q_order ? call.q_order + pair * call.q_grid.tokens() : nullptr;
  call.q_grid.runs(n, [&](int64_t first, int64_t length) {
    for (int64_t at = first; at < first + length; ++at, ++slot) {
      if (slot / Task::kQueries == part) token[queries++] = order ? order[at] : at;
    }
  });
  if (queries == 0) return;
  const int64_t b = pair / call.q.size(1), h = pair % call.q.size(1);
  const int64_t out_stride = call.out.stride(2);
  T* out = call.out.mutable_data_ptr<T>() + b * call.out.stride(0) + h * call.out.stride(1);
  float* lse = call.lse.defined() ? call.lse.mutable_data_ptr<float>() + pair * call.q.size(2)
                                  : nullptr;
  bool begun = false;
  const auto attend = [&] {
    if (!begun) {
      const T* head = call.q.const_data_ptr<T>() + b * call.q.stride(0) + h * call.q.stride(1);
      task.begin({head, call.q.stride(2)}, token, queries);
      begun = true;
    }
    task.attend(chunk, ahead);
    chunk.clear();
  };
  const int64_t row = pair * call.q_grid.count() + n;
  const int32_t* index = call.indices.const_data_ptr<int32_t>() + row * call.indices.size(3);
  const int32_t count = call.counts.const_data_ptr<int32_t>()[row];
  for (int32_t entry = 0; entry < count; ++entry) {
    Block<T> block = table[pair * call.blocks + index[entry]];
    while (block.seen > 0) {
      chunk.add(block.split(Task::kKeys - chunk.keys), call.q.size(3), Task::kKeys);
      if (chunk.keys < Task::kKeys) continue;
      ahead.clear();
      int64_t keys = 0;
      for (int32_t next = entry + 1; next < count && keys < Task::kKeys; ++next) {
        const Block<T>& coming = table[pair * call.blocks + index[next]];
        if (coming.keys) ahead.pieces.push_back(coming);
        keys += coming.keys;
      }
      attend();
    }
  }
  ahead.clear();
  if (chunk.keys > 0) attend();
  if (begun) return task.finish(out, out_stride, lse, token);
  for (int64_t at = 0; at < queries; ++at) {
    std::fill_n(out + token[at] * out_stride, call.q.size(3), T(0.f));
    if (lse) lse[token[at]] = -kInf;
  }
}

template <typename Task, typename T>
void run(const Call& call) {
  const Table<T> table = place_blocks<T>(call, Task::kPadding);
  const int64_t q_blocks = call.q_grid.count();
  const int64_t parts = (call.q_grid.slots() + Task::kQueries - 1) / Task::kQueries;
  const int64_t tasks = call.q.size(0) * call.q.size(1) * q_blocks * parts;
  share_out(tasks, [&](const auto& each) {
    Task task(call);
    Chunk<T> chunk;
    Ahead<T> ahead;
    ahead.dim = call.q.size(3);
    each([&](int64_t at) {
      run_task<Task, T>(call, table.blocks, task, chunk, ahead, at / parts / q_blocks,
                        at / parts % q_blocks, at % parts);
    });
  });
}

template <typename T>
void run_half(const Call& call) {
#if defined(LIPASS_AMX)
  if (TileTask<T>::takes(call.q.size(3))) return run<TileTask<T>, T>(call);
#endif
  run<FloatTask<T>, T>(call);
}

// Refuse what would be read past its end.
void check_fits(const Call& call, const std::optional<Tensor>& key_keep,
                const std::optional<Tensor>& key_bias, const std::optional<Tensor>& q_order,
                const std::optional<Tensor>& key_order) {
  const int64_t batch = call.q.size(0), heads = call.q.size(1), dim = call.q.size(3);
  const int64_t q_blocks = call.q_grid.count();
  check_sizes("q", call.q, {-1, -1, call.q_grid.tokens(), -1});
  for (size_t s = 0; s < call.grids.size(); ++s) {
    const bool some = key_order && s == call.ordered;
    const int64_t tokens = some ? -1 : call.grids[s].tokens();
    check_sizes("k", call.k[s], {batch, heads, tokens, dim});
    check_sizes("v", call.v[s], {batch, heads, some ? call.k[s].size(2) : tokens, dim});
    if (some) check_sizes("key_order", *key_order, {batch, heads, call.grids[s].tokens()});
  }
  check_sizes("indices", call.indices, {batch, heads, q_blocks, -1});
  check_sizes("counts", call.counts, {batch, heads, q_blocks});
  if (q_order) check_sizes("q_order", *q_order, {batch, heads, call.q_grid.tokens()});
  if (key_keep) check_sizes("key_keep", *key_keep, {batch, call.tokens});
  if (!key_bias) return;
  TORCH_CHECK(key_bias->dim() == 3, "key_bias must be [B or 1, H or 1, Lk], got ",
              key_bias->sizes(), "; write one of all heads as [B, 1, Lk]");
  const int64_t outer = key_bias->size(0) == 1 ? 1 : batch;
  const int64_t inner = key_bias->size(1) == 1 ? 1 : heads;
  check_sizes("key_bias", *key_bias, {outer, inner, call.tokens});
}

// See lipass.kernels.block_sparse.api. `grids` holds grid and tile of the queries, then of each
// segment; k and v are whole or by segment, and by segment where keys of segment `ordered` come in
// the order of `key_order`, which may leave some out.
std::tuple<Tensor, Tensor> attend(const Tensor& q, at::TensorList k, at::TensorList v,
                                  const Tensor& indices, const Tensor& counts,
                                  at::IntArrayRef grids, double scale,
                                  const std::optional<Tensor>& key_keep,
                                  const std::optional<Tensor>& key_bias, bool return_lse,
                                  const std::optional<Tensor>& q_order,
                                  const std::optional<Tensor>& key_order, int64_t ordered) {
  TORCH_CHECK(q.dim() == 4, "q must be [B, H, Lq, D], got ", q.sizes(), "; reshape it");
  TORCH_CHECK(grids.size() > 6 && grids.size() % 6 == 0, "grids must hold 6 numbers for queries ",
              "and each segment, got ", grids.size(), "; pass grid and tile of each");
  TORCH_CHECK(!k.empty() && !v.empty(), "k and v must have a tensor, got none; pass keys");
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
    call.tokens += key_order && s == static_cast<size_t>(ordered) ? k_part.size(2) : grid.tokens();
  }
  if (key_order) call.ordered = ordered;
  check_fits(call, key_keep, key_bias, q_order, key_order);
  Tensor keep, bias, of_queries, of_keys;
  if (q_order) {
    of_queries = q_order->contiguous();
    call.q_order = of_queries.const_data_ptr<int32_t>();
  }
  if (key_order) {
    of_keys = key_order->contiguous();
    call.key_order = of_keys.const_data_ptr<int32_t>();
  }
  if (key_keep) {
    keep = key_keep->contiguous();
    call.keep = keep.const_data_ptr<bool>();
  }
  if (key_bias) {
    bias = key_bias->to(at::kFloat).contiguous();
    call.bias = bias.const_data_ptr<float>();
    call.bias_batch = bias.size(0) == 1 ? 0 : bias.stride(0);
    call.bias_head = bias.size(1) == 1 ? 0 : bias.stride(1);
  }
  call.scale = static_cast<float>(scale);
  switch (q.scalar_type()) {
    case at::kFloat: run<FloatTask<float>, float>(call); break;
    case at::kBFloat16: run_half<at::BFloat16>(call); break;
    case at::kHalf: run_half<at::Half>(call); break;
    default: TORCH_CHECK(false, "q must be fp32, bf16 or fp16, got ", q.scalar_type());
  }
  return {call.out, call.lse};
}

TORCH_LIBRARY_FRAGMENT(lipass_native, m) {
  m.def("plan(Tensor q, Tensor k, int[] grids, Tensor? guarded, int wanted, int before, "
        "int after, Tensor? k_means) -> Tensor");
  m.def("sort_by_halves(Tensor coordinates, int first, int block) -> Tensor");
  m.def("pool_blocks(Tensor x, int[] grid) -> Tensor");
  m.def("attend(Tensor q, Tensor[] k, Tensor[] v, Tensor indices, Tensor counts, int[] grids, "
        "float scale, Tensor? key_keep, Tensor? key_bias, bool return_lse, Tensor? q_order, "
        "Tensor? key_order, int ordered) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(lipass_native, CPU, m) {
  m.impl("attend", attend);
  m.impl("plan", plan);
  m.impl("sort_by_halves", sort_by_halves);
  m.impl("pool_blocks", pool_blocks);
}

}  // namespace
