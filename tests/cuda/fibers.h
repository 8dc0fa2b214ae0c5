// A block of threads on one CPU thread: each is a fiber that runs to the next instruction at which its warp meets, and a warp
// runs from barrier to barrier. emulator.h makes the instructions.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

extern "C" void ptv2_emulator_switch(void** from, void** to);
#ifdef PTV2_EMULATOR_MAIN
// Saves the callee-saved registers on the running stack and goes on where `to` left off (System V, x86-64).
asm(".text\n.globl ptv2_emulator_switch\nptv2_emulator_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq (%rsi), %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
#endif

namespace ptv2::cuda {
namespace emulator {

constexpr int MAX_SHARED = 163 * 1024,  // of sm_80, the smaller one
              STACK = 64 * 1024;

struct Copy {
  void* to;
  const void* from;
};
struct Registers {
  uint64_t word[8];
};
// A product of a warpgroup that has been started: this lane's rows of the left factor, and where its sums go.
struct Product {
  float* sums;
  int columns;
  bool transposed, add;
  float left[2][16];
  uint64_t right;
  float (*to_float)(uint16_t);
};
struct Lane {
  void* context = nullptr;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[STACK]};
  const char* stopped_at = nullptr;  // the instruction it waits in; null: it has returned
  int meetings = 0;
  Registers given[2];
  std::vector<std::vector<Copy>> groups;
  std::vector<Product> products;
  std::vector<int> unpublished;  // pieces of shared memory that this lane's copies wrote
  bool may_multiply = false;
};

struct Block {
  dim3 grid, index;
  int threads = 0, running = 0;
  bool eager = false;  // copies land at once
  void* scheduler = nullptr;
  std::vector<Lane> lanes;
  std::function<void()> body;
  alignas(128) unsigned char shared[MAX_SHARED];
  short unpublished[MAX_SHARED / 16];  // 0, or 1 + the lane whose copy no fence has published
  char failure[200] = "";  // the first mistake of the launch
};
inline Block block;
inline const char BARRIER[] = "sync", RETURNED[] = "return";

inline Lane& here() { return block.lanes[block.running]; }

inline void note_failure(const char* what, const char* one = "", const char* other = "") {
  if (block.failure[0] == 0)
    std::snprintf(block.failure, sizeof block.failure, "emulator: %s %s %s (block %u, %u, %u)", what, one, other, block.index.x,
                  block.index.y, block.index.z);
}
// Ends the launch from within a lane, which is never run again.
[[noreturn]] inline void fail(const char* what) {
  note_failure(what);
  ptv2_emulator_switch(&here().context, &block.scheduler);
  std::abort();
}

inline void stop_at(const char* instruction) {
  here().stopped_at = instruction;
  ptv2_emulator_switch(&here().context, &block.scheduler);
}

inline void run_lane() {
  block.body();
  stop_at(RETURNED);
}

// All lanes of the warp give `mine` and get what lane `l` gave by given(l).
struct Meeting {
  int first, parity;
  const Registers& given(int lane) const { return block.lanes[first + lane].given[parity]; }
};
inline Meeting meet(const char* instruction, const Registers& mine) {
  const int parity = here().meetings++ % 2;
  here().given[parity] = mine;
  stop_at(instruction);
  return {block.running / 32 * 32, parity};
}

inline void start_lane(Lane& lane) {
  auto* top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(lane.stack.get()) + STACK) & ~uintptr_t{15});
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&run_lane);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  lane.context = top;
  lane.groups.assign(1, {});
  lane.products.clear(), lane.unpublished.clear();
  lane.stopped_at = "start";
}

// One warp from barrier to barrier. Null: something failed.
inline const char* run_warp(int warp) {
  for (;;) {
    for (int l = 0; l < 32; ++l) {
      block.running = warp * 32 + l;
      ptv2_emulator_switch(&block.scheduler, &here().context);
      if (block.failure[0]) return nullptr;
    }
    const char* at = block.lanes[warp * 32].stopped_at;
    for (int l = 1; l < 32; ++l)
      if (const char* other = block.lanes[warp * 32 + l].stopped_at; other != at) {
        note_failure("the lanes of a warp are at different instructions:", at, other);
        return nullptr;
      }
    if (at == BARRIER || at == RETURNED) return at;
  }
}

inline bool run_block(int threads) {
  if (static_cast<int>(block.lanes.size()) < threads) block.lanes.resize(threads);
  std::memset(block.shared, 0xFF, sizeof block.shared);
  std::memset(block.unpublished, 0, sizeof block.unpublished);
  block.eager = std::getenv("PTV2_EMULATE_EAGER") != nullptr;
  for (int i = 0; i < threads; ++i) start_lane(block.lanes[i]);
  const char* order_seed = std::getenv("PTV2_EMULATE_ORDER");
  std::mt19937 order(order_seed ? std::atoi(order_seed) : 0);
  std::vector<int> warps(threads / 32);
  for (size_t i = 0; i < warps.size(); ++i) warps[i] = static_cast<int>(i);
  for (const char* first = BARRIER; first == BARRIER;) {
    std::shuffle(warps.begin(), warps.end(), order);
    first = nullptr;
    for (int warp : warps) {
      const char* at = run_warp(warp);
      if (at != nullptr && first != nullptr && at != first) note_failure("a barrier that not all warps reach:", first, at);
      if (block.failure[0]) return false;
      first = at;
    }
  }
  return true;
}

}  // namespace emulator
}  // namespace ptv2::cuda
