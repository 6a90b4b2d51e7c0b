// Runs a CUDA kernel on the CPU, for correctness alone: every thread is a fiber, and blocks run one after another.
// Threads are resumed in an order that the seed draws, shared memory begins as NaN, and bulk copies land late and in
// any order, so that a missing barrier shows. Compiled with KERNEL_FILE and KERNEL, one library for each kernel.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

template <class T> T max(T a, T b) { return a > b ? a : b; }
template <class T> T min(T a, T b) { return a < b ? a : b; }
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __shared__ static
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {
struct Barrier { unsigned arrived = 0, generation = 0; };
struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(128 << 10);
  dim3 thread;
  unsigned lane, warp;
  bool done;
};
inline Fiber* current;
inline dim3 block, block_size, grid_size;
inline char* shared;
inline ucontext_t scheduler;
inline Barrier barriers[16];
inline std::vector<Barrier> warp_barriers;
struct Words {
  uint32_t of_lane[32][8];
};
inline std::vector<Words> warp_words;
void begin_copies();
void call_kernel();

struct Random {  // a linear congruential generator of 64 bits
  uint64_t state;
  unsigned below(size_t n) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (state >> 33) % n;
  }
};

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulator: %s in block %u %u %u\n", what, block.x, block.y, block.z);
  abort();
}
inline void yield() { swapcontext(&current->context, &scheduler); }
inline void arrive(Barrier& barrier, unsigned count) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0, barrier.generation++;
  } else {
    while (barrier.generation == generation) yield();
  }
}
inline void warp_sync() { arrive(warp_barriers[current->warp], min(32u, block_size.x - current->warp * 32)); }
inline uint32_t& warp_word(unsigned lane, unsigned i) { return warp_words[current->warp].of_lane[lane][i]; }
inline void enter() {
  call_kernel();
  current->done = true;
  yield();
}

template <class T> T exchange(T value, unsigned lane) {
  static_assert(sizeof(T) == 4);
  memcpy(&warp_word(current->lane, 0), &value, 4);
  warp_sync();
  memcpy(&value, &warp_word(lane, 0), 4);
  warp_sync();
  return value;
}

inline void run_block(std::vector<Fiber>& fibers, Random& random, bool shuffled) {
  for (Barrier& barrier : barriers) barrier = {};
  warp_barriers.assign(warp_words.size(), {});
  begin_copies();
  std::vector<Fiber*> alive;
  for (unsigned i = 0; i < fibers.size(); i++) {
    Fiber& fiber = fibers[i];
    fiber.thread = {i, 0, 0}, fiber.lane = i & 31, fiber.warp = i >> 5, fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, enter, 0);
    alive.push_back(&fiber);
  }
  for (long idle = 0; !alive.empty(); idle++) {
    for (size_t i = alive.size(); shuffled && i > 1; i--) std::swap(alive[i - 1], alive[random.below(i)]);
    for (Fiber* fiber : alive) current = fiber, swapcontext(&scheduler, &fiber->context);
    if (erase_if(alive, [](Fiber* fiber) { return fiber->done; })) idle = 0;
    if (idle > 200000) fail("threads wait for each other for ever");
  }
}

inline void launch(size_t bytes, unsigned seed) {
  std::vector<char> memory(bytes + 2048);
  shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 1023) / 1024 * 1024);
  std::vector<Fiber> fibers(block_size.x);
  warp_words.resize((block_size.x + 31) / 32);
  Random random = {seed};
  for (block.z = 0; block.z < grid_size.z; block.z++)
    for (block.y = 0; block.y < grid_size.y; block.y++)
      for (block.x = 0; block.x < grid_size.x; block.x++) {
        memset(shared, 0xff, bytes);
        run_block(fibers, random, seed != 0);
      }
}

inline void** arguments;
template <class... A, size_t... I> void call(void (*kernel)(A...), std::index_sequence<I...>) {
  kernel(*static_cast<A*>(arguments[I])...);
}
template <class... A> void call(void (*kernel)(A...)) { call(kernel, std::index_sequence_for<A...>()); }
}  // namespace emulator

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::block)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)
inline void __syncthreads() { emulator::arrive(emulator::barriers[0], blockDim.x); }
inline void __syncwarp() { emulator::warp_sync(); }
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::exchange(value, emulator::current->lane ^ mask);
}
template <class T> T __shfl_sync(unsigned, T value, int lane) { return emulator::exchange(value, lane & 31); }

#include KERNEL_FILE

void emulator::call_kernel() { call(KERNEL); }
extern "C" void run(const unsigned* size, void** arguments, size_t shared_bytes, unsigned seed) {
  emulator::grid_size = {size[0], size[1], size[2]};
  emulator::block_size = {size[3], 1, 1};
  emulator::arguments = arguments;
  emulator::launch(shared_bytes, seed);
}
