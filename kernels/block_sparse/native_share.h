// Share tasks out among threads while they run: a thread whose core also does other work takes fewer.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace {

// Call `worker(each)` in every thread; it calls `each(body)`, which calls `body(task)` for the tasks
// that the thread gets, so that a worker can set itself up first. Neighbours share what they read,
// so threads take several at a time, an eighth of their share.
template <typename Worker>
void share_out(int64_t tasks, const Worker& worker) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks);
  if (threads == 0) return;
  const int64_t batch = std::max<int64_t>(1, tasks / (8 * threads));
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    worker([&](const auto& body) {
      for (int64_t begin; (begin = next.fetch_add(batch)) < tasks;) {
        for (int64_t at = begin; at < std::min(begin + batch, tasks); ++at) body(at);
      }
    });
  });
}

}  // namespace
