// Counts how often each warp of the emulated GPU executes each basic block, by call chain. The compiler calls
// __sanitizer_cov_trace_pc at the start of every block (-fsanitize-coverage=trace-pc).
//
// Lanes run one after another. Between two meetings of a warp its lanes share their instructions, so a block is
// executed as often as the lane that is there most often: the largest count of a lane, summed over the intervals.
#pragma once
#include "device.h"
// The emulator must be included first.
#include <algorithm>
#include <array>
#include <cstdio>
#include <map>
#include <unordered_map>

#define UNTRACED __attribute__((no_sanitize_coverage))

namespace trace {

constexpr int kDepth = 16;  // innermost frames that are told apart
using Chain = std::array<uintptr_t, kDepth>;

struct ChainHash {
  UNTRACED size_t operator()(const Chain& chain) const {
    size_t hash = 0;
    for (const uintptr_t frame : chain) hash = hash * 0x9e3779b97f4a7c15 + frame;
    return hash;
  }
};

struct Count {
  uint64_t interval = 0, total = 0;
  std::array<uint32_t, 32> lanes = {};
};

inline std::vector<std::unordered_map<Chain, Count, ChainHash>> warps;  // per warp of the cluster
inline bool is_on = false;
constexpr uintptr_t kCodeBytes = 16 << 20;
inline bool is_counted[kCodeBytes];  // by the address of a block; the emulator's own blocks are not counted

// Reads the addresses of the blocks to count, in hexadecimal, from the standard input.
UNTRACED inline void begin() {
  unsigned long long address;
  while (scanf("%llx", &address) == 1) {
    if (address < kCodeBytes) is_counted[address] = true;
  }
}

UNTRACED inline void count(uintptr_t block, const uintptr_t* frame) {
  is_on = false;  // what is called below is traced itself
  emulator::Machine& machine = emulator::machine;
  const emulator::Fiber& self = *machine.running;
  Chain chain = {block};
  const uintptr_t begin = reinterpret_cast<uintptr_t>(self.stack.get()), end = begin + emulator::kStack - 64;
  for (int depth = 1; depth < kDepth; ++depth) {
    const uintptr_t place = reinterpret_cast<uintptr_t>(frame);
    if (place < begin || place >= end) break;
    chain[depth] = frame[1];
    frame = reinterpret_cast<const uintptr_t*>(frame[0]);
  }
  const unsigned warp = self.block * (machine.num_threads / 32) + self.thread / 32;
  if (warps.size() <= warp) warps.resize(warp + 1);
  Count& counted = warps[warp][chain];
  const uint64_t interval =
      1 + machine.warps[warp].meetings + machine.blocks[self.block].meetings + machine.cluster.meetings;
  if (counted.interval != interval) {
    counted.total += *std::max_element(counted.lanes.begin(), counted.lanes.end());
    counted.lanes.fill(0);
    counted.interval = interval;
  }
  ++counted.lanes[self.thread % 32];
  is_on = true;
}

// Prints the barriers of a thread and, a line each, executions by the warps of a row and the addresses of a call chain.
UNTRACED inline void print() {
  std::map<Chain, uint64_t> totals;
  for (const auto& warp : warps) {
    for (const auto& [chain, counted] : warp) {
      totals[chain] += counted.total + *std::max_element(counted.lanes.begin(), counted.lanes.end());
    }
  }
  printf("barriers %d %llu\n", emulator::machine.fibers[0].barriers,
         static_cast<unsigned long long>(emulator::machine.cluster.meetings));
  for (const auto& [chain, total] : totals) {
    printf("%llu", static_cast<unsigned long long>(total));
    for (const uintptr_t frame : chain) printf(" %llx", static_cast<unsigned long long>(frame));
    printf("\n");
  }
}

// Runs the kernel on one row and prints the plan and the counts; returns the exit status.
template <class Kernel>
UNTRACED int run_row(int num_threads, int num_blocks, int64_t bytes, bool staged, Kernel kernel) {
  emulator::Machine& machine = emulator::machine;
  machine.num_threads = unsigned(num_threads);
  machine.num_blocks = unsigned(num_blocks);
  machine.skipped_barrier = -1;
  machine.memory_size = bytes;
  machine.kernel = [&] {
    is_on = true;
    kernel();
  };
  machine.fault = staged ? nullptr : "the row is not kept in shared memory";
  if (!staged || !emulator::run_cluster()) {
    fprintf(stderr, "%s\n", machine.fault);
    return 1;
  }
  is_on = false;
  printf("plan %d %lld\n", num_blocks, static_cast<long long>(bytes));
  print();
  return 0;
}

}  // namespace trace

extern "C" UNTRACED void __sanitizer_cov_trace_pc() {
  if (!trace::is_on) return;
  const auto* frame = static_cast<const uintptr_t*>(__builtin_frame_address(0));
  if (frame[1] >= trace::kCodeBytes || !trace::is_counted[frame[1]]) return;
  // The caller's frame is the block's; its callers follow.
  trace::count(frame[1], reinterpret_cast<const uintptr_t*>(frame[0]));
}
