// Threads: ATen's pool, so that torch.set_num_threads and nested regions behave as in any PyTorch op.
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

#include "kernels.h"

namespace ptv2 {

void run_ranges(int64_t count, int64_t grain, const void* closure, TaskFn fn) {
  at::parallel_for(0, count, grain, [&](int64_t first, int64_t last) { fn(closure, first, last); });
}

void run_tasks(int64_t count, const void* closure, TaskFn fn) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) fn(closure, i, i + 1);
  });
}

namespace {
struct Scratch {
  float* data = nullptr;
  int64_t size = 0;
  ~Scratch() { std::free(data); }
};
thread_local Scratch scratch;
}  // namespace

float* thread_scratch(int64_t floats) {
  if (floats > scratch.size) {
    std::free(scratch.data);
    scratch.data = nullptr;
    scratch.size = 0;
    const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
    scratch.data = static_cast<float*>(std::aligned_alloc(64, bytes));
    if (scratch.data == nullptr) throw std::bad_alloc();
    scratch.size = floats;
  }
  return scratch.data;
}

}  // namespace ptv2
