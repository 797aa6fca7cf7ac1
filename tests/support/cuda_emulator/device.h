// Emulates a GPU on a CPU: enough of CUDA C++ to run csrc/cuda/*.cuh with g++, in place of device.cuh.
//
// Every thread of a cluster is a fiber. At barriers and warp-wide functions threads wait for each other; in between
// each thread runs without interruption, in random order. In half of the runs the next thread is any that can run. In
// the others it is one of the warp that is first in an order that seldom changes, so that some warps and blocks fall
// far behind. Shared memory holds random bytes before its block starts and after it ends. A missing barrier therefore
// causes a wrong result for some seed.
#pragma once
#define SLIMKERNELS_DEVICE

#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
using std::log;

namespace emulator {

// A group of threads that wait for each other: a warp, a block or a cluster. Each thread leaves a value and sees those
// of all. The values of two consecutive meetings are stored separately, because the first thread to leave one may
// arrive at the next before the others have read theirs.
struct Group {
  unsigned size = 0, arrived = 0;
  uint64_t meetings = 0;
  std::vector<uint64_t> values[2];
  std::vector<unsigned> waiting;
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  std::unique_ptr<char[]> stack;
  bool started, done;
  unsigned thread, block;  // index within the block, and of the block within the cluster
  int barriers;            // number of barriers that the thread has reached
};

struct Machine {
  unsigned num_threads, num_blocks;  // threads per block, blocks per cluster
  Index grid_block;                  // index of the cluster's first block in the grid
  int skipped_barrier;               // index of the barrier at which no thread waits, or -1
  int64_t memory_size;
  std::mt19937 random;
  std::vector<std::vector<uint4>> memory;  // per block
  std::vector<Group> warps, blocks;
  Group cluster;
  std::vector<Fiber> fibers;
  std::vector<unsigned> runnable;
  bool by_rank;
  std::vector<unsigned> ranks;  // order of the warps
  Fiber* running;
  jmp_buf scheduler;
  std::function<void()> kernel;
  const char* fault;
};
inline Machine machine;

constexpr int64_t kStack = 128 << 10;
constexpr int kGuard = 4;  // vectors behind a block's shared memory that must not change

inline void switch_to_scheduler() {
  if (_setjmp(machine.running->resume) == 0) _longjmp(machine.scheduler, 1);
}

inline const std::vector<uint64_t>& meet(Group& group, unsigned member, uint64_t value) {
  std::vector<uint64_t>& values = group.values[group.meetings % 2];
  values[member] = value;
  if (++group.arrived == group.size) {
    group.arrived = 0;
    ++group.meetings;
    machine.runnable.insert(machine.runnable.end(), group.waiting.begin(), group.waiting.end());
    group.waiting.clear();
    // The last thread to arrive need not be the first to leave.
    machine.runnable.push_back(unsigned(machine.running - machine.fibers.data()));
  } else {
    group.waiting.push_back(unsigned(machine.running - machine.fibers.data()));
  }
  switch_to_scheduler();
  return values;
}

inline bool skips_barrier() { return machine.running->barriers++ == machine.skipped_barrier; }

// Returns the values of all lanes of the warp; all 32 lanes must make the same call.
inline const uint64_t* of_warp(unsigned mask, uint32_t kind, uint32_t value) {
  const Fiber& self = *machine.running;
  Group& warp = machine.warps[self.block * (machine.num_threads / 32) + self.thread / 32];
  const auto& values = meet(warp, self.thread % 32, uint64_t(kind) << 32 | value);
  for (const uint64_t each : values) {
    if (mask != ~0u || each >> 32 != kind) machine.fault = "the lanes of a warp are at different places";
  }
  return values.data();
}

inline void fiber_main() {
  machine.kernel();
  machine.running->done = true;
  _longjmp(machine.scheduler, 1);
}

// Fills the shared memory of a block with random bytes, except for the guard at its end.
inline void scramble(std::vector<uint4>& memory) {
  for (size_t i = 0; i + kGuard < memory.size(); ++i) {
    memory[i] = {uint32_t(machine.random()), uint32_t(machine.random()), uint32_t(machine.random()), 7};
  }
}

// Returns the position in `runnable` of the thread to run next.
inline size_t choose() {
  Machine& m = machine;
  if (!m.by_rank) return m.random() % m.runnable.size();
  if (m.random() % 16384 == 0) std::shuffle(m.ranks.begin(), m.ranks.end(), m.random);
  const auto rank = [&](unsigned thread) { return m.ranks[thread / 32]; };
  const auto first =
      std::min_element(m.runnable.begin(), m.runnable.end(), [&](unsigned a, unsigned b) { return rank(a) < rank(b); });
  return size_t(first - m.runnable.begin());
}

inline void prepare(Group& group, unsigned size) {
  group = Group();
  group.size = size;
  for (auto& values : group.values) values.resize(size);
}

// Runs one cluster to its end; returns false, with the fault set, if something went wrong.
inline bool run_cluster() {
  Machine& m = machine;
  const unsigned total = m.num_threads * m.num_blocks;
  m.warps.resize(total / 32);
  m.blocks.resize(m.num_blocks);
  for (Group& warp : m.warps) prepare(warp, 32);
  for (Group& block : m.blocks) prepare(block, m.num_threads);
  prepare(m.cluster, total);
  m.memory.resize(m.num_blocks);
  for (auto& memory : m.memory) {
    memory.resize((m.memory_size + 15) / 16 + kGuard);
    scramble(memory);
    for (int i = 0; i < kGuard; ++i) memory[memory.size() - 1 - i] = {1, 2, 3, 4};
  }
  if (m.fibers.size() < total) m.fibers.resize(total);
  m.ranks.resize(total / 32);
  std::iota(m.ranks.begin(), m.ranks.end(), 0u);
  std::shuffle(m.ranks.begin(), m.ranks.end(), m.random);
  m.runnable.clear();
  for (unsigned i = 0; i < total; ++i) {
    Fiber& fiber = m.fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    fiber.started = fiber.done = false;
    fiber.thread = i % m.num_threads;
    fiber.block = i / m.num_threads;
    fiber.barriers = 0;
    m.runnable.push_back(i);
  }
  unsigned done = 0;
  std::vector<unsigned> running(m.num_blocks, m.num_threads);
  while (!m.runnable.empty()) {
    std::swap(m.runnable[choose()], m.runnable.back());
    Fiber& fiber = m.fibers[m.runnable.back()];
    m.runnable.pop_back();
    m.running = &fiber;
    if (_setjmp(m.scheduler) == 0) {
      if (fiber.started) _longjmp(fiber.resume, 1);
      fiber.started = true;
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack.get();
      fiber.start.uc_stack.ss_size = kStack;
      makecontext(&fiber.start, fiber_main, 0);
      setcontext(&fiber.start);
    }
    if (!fiber.done) continue;
    ++done;
    if (--running[fiber.block] == 0) scramble(m.memory[fiber.block]);
  }
  for (const auto& memory : m.memory) {
    for (int i = 0; i < kGuard; ++i) {
      const uint4 guard = memory[memory.size() - 1 - i];
      if (guard.x != 1 || guard.y != 2 || guard.z != 3 || guard.w != 4) m.fault = "shared memory is overrun";
    }
  }
  if (done != total) m.fault = "threads wait for each other forever";
  return m.fault == nullptr;
}

inline Index thread_index() { return {machine.running->thread}; }
inline Index block_index() { return {machine.grid_block.x + machine.running->block}; }

}  // namespace emulator

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())

inline void __syncthreads() {
  emulator::Fiber& self = *emulator::machine.running;
  if (!emulator::skips_barrier()) emulator::meet(emulator::machine.blocks[self.block], self.thread, 0);
}

inline uint32_t __ballot_sync(unsigned mask, bool value) {
  const uint64_t* values = emulator::of_warp(mask, 1, value);
  uint32_t result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= uint32_t(values[lane] & 1) << lane;
  return result;
}

inline uint32_t __match_any_sync(unsigned mask, uint32_t value) {
  const uint64_t* values = emulator::of_warp(mask, 2, value);
  uint32_t result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= uint32_t(uint32_t(values[lane]) == value) << lane;
  return result;
}

inline uint32_t __reduce_add_sync(unsigned mask, uint32_t value) {
  const uint64_t* values = emulator::of_warp(mask, 3, value);
  uint32_t result = 0;
  for (int lane = 0; lane < 32; ++lane) result += uint32_t(values[lane]);
  return result;
}

inline uint32_t __reduce_max_sync(unsigned mask, uint32_t value) {
  const uint64_t* values = emulator::of_warp(mask, 4, value);
  uint32_t result = 0;
  for (int lane = 0; lane < 32; ++lane) result = std::max(result, uint32_t(values[lane]));
  return result;
}

template <class T>
T shuffle(unsigned mask, uint32_t kind, T value, unsigned source) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = uint32_t(emulator::of_warp(mask, kind, bits)[source]);
  memcpy(&value, &bits, 4);
  return value;
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance) {
  const unsigned lane = threadIdx.x % 32;
  return shuffle(mask, 5, value, lane < distance ? lane : lane - distance);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned distance) {
  return shuffle(mask, 6, value, threadIdx.x % 32 ^ distance);
}

template <class T>
T __shfl_sync(unsigned mask, T value, unsigned lane) {
  return shuffle(mask, 8, value, lane);
}

template <class T>
T atomicAdd(T* place, T value) {
  const T before = *place;
  *place += value;
  return before;
}

inline uint32_t atomicMax(uint32_t* place, uint32_t value) {
  const uint32_t before = *place;
  *place = std::max(before, value);
  return before;
}

inline int __dp4a(int a, int b, int sum) {
  for (int byte = 0; byte < 32; byte += 8) sum += int8_t(a >> byte) * int8_t(b >> byte);
  return sum;
}

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(int(x)); }
inline int __clz(uint32_t x) { return x == 0 ? 32 : __builtin_clz(x); }
inline unsigned long long __float2ull_rn(float x) { return x >= 0 && x < 0x1p63f ? std::llrint(x) : 0; }

inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

namespace slimkernels {

inline uint32_t cluster_size() { return emulator::machine.num_blocks; }
inline uint32_t cluster_index() { return emulator::machine.grid_block.x / emulator::machine.num_blocks; }
inline uint32_t cluster_rank() { return emulator::machine.running->block; }
inline char* shared_memory() { return reinterpret_cast<char*>(emulator::machine.memory[cluster_rank()].data()); }

template <class T>
T* in_block(T* shared, uint32_t rank) {
  char* const target = reinterpret_cast<char*>(emulator::machine.memory[rank].data());
  return reinterpret_cast<T*>(target + (reinterpret_cast<char*>(shared) - shared_memory()));
}

inline void sync_cluster() {
  const emulator::Fiber& self = *emulator::machine.running;
  const unsigned member = self.block * emulator::machine.num_threads + self.thread;
  if (!emulator::skips_barrier()) emulator::meet(emulator::machine.cluster, member, 0);
}

template <class T>
T* kept_pointer(T* pointer) {
  return pointer;
}

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

inline float log2_approx(float x) { return std::log2(x); }

template <class X>
typename X::Bits canonical_of(typename X::Bits x) {
  using Bits = typename X::Bits;
  const Bits magnitude = x & Bits(~0u) >> 1;
  return magnitude > X::kInfinity ? Bits(~0u) >> 1 : magnitude == 0 ? 0 : x;
}

struct Float32 {
  using Bits = uint32_t;
  static constexpr uint32_t kInfinity = 0x7f800000;
  static float widen(Bits x) { return __uint_as_float(x); }
  static Bits canonical(Bits x) { return canonical_of<Float32>(x); }
  static uint32_t max_word(uint32_t a, uint32_t b) {
    const float x = widen(a), y = widen(b);
    return std::isnan(x) || std::isnan(y) ? 0x7fffffff : x < y ? b : a;
  }
  static uint32_t not_below(uint32_t a, uint32_t b) { return widen(a) < widen(b) ? 0u : ~0u; }
};

template <class X>
uint32_t max_of_halves(uint32_t a, uint32_t b) {
  uint32_t word = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const float x = X::widen(uint16_t(a >> shift)), y = X::widen(uint16_t(b >> shift));
    const uint32_t larger = std::isnan(x) || std::isnan(y) ? 0x7fff : (x < y ? b : a) >> shift & 0xffff;
    word |= larger << shift;
  }
  return word;
}

template <class X>
uint32_t not_below_in_halves(uint32_t a, uint32_t b) {
  uint32_t word = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    if (!(X::widen(uint16_t(a >> shift)) < X::widen(uint16_t(b >> shift)))) word |= 0xffffu << shift;
  }
  return word;
}

struct BFloat16 {
  using Bits = uint16_t;
  static constexpr uint32_t kInfinity = 0x7f80;
  static float widen(Bits x) { return __uint_as_float(uint32_t(x) << 16); }
  static Bits canonical(Bits x) { return canonical_of<BFloat16>(x); }
  static uint32_t max_word(uint32_t a, uint32_t b) { return max_of_halves<BFloat16>(a, b); }
  static uint32_t not_below(uint32_t a, uint32_t b) { return not_below_in_halves<BFloat16>(a, b); }
};

struct Float16 {
  using Bits = uint16_t;
  static constexpr uint32_t kInfinity = 0x7c00;
  static float widen(Bits x) {
    const int exponent = x >> 10 & 31, fraction = x & 1023;
    const float magnitude = exponent == 31  ? (fraction == 0 ? INFINITY : NAN)
                            : exponent == 0 ? std::ldexp(float(fraction), -24)
                                            : std::ldexp(float(fraction + 1024), exponent - 25);
    return x >> 15 ? -magnitude : magnitude;
  }
  static Bits canonical(Bits x) { return canonical_of<Float16>(x); }
  static uint32_t max_word(uint32_t a, uint32_t b) { return max_of_halves<Float16>(a, b); }
  static uint32_t not_below(uint32_t a, uint32_t b) { return not_below_in_halves<Float16>(a, b); }
};

}  // namespace slimkernels
