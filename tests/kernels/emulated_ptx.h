// kernels/ptx.cuh in C++, for the emulator.
#pragma once
#define INLINE inline
#define DYNAMIC_SHARED(name) unsigned char* name = reinterpret_cast<unsigned char*>(emulator::shared)
typedef uintptr_t shared_t;

// --- numbers

template <class To, class From> To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline u16 to_half(double value) { return bits_as<u16>(static_cast<_Float16>(value)); }
inline float half_to_float(u16 h) { return static_cast<float>(bits_as<_Float16>(h)); }
inline u32 pack_half(float low, float high) { return to_half(low) | static_cast<u32>(to_half(high)) << 16; }
inline u16 to_bfloat(float value) {  // to the nearest, ties to even
  const u32 bits = bits_as<u32>(value);
  return std::isnan(value) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 pack_bfloat(float low, float high) { return to_bfloat(low) | static_cast<u32>(to_bfloat(high)) << 16; }
template <class F> u32 each_half(F f, u32 a, u32 b = 0, u32 c = 0) {  // f is exact in double, so one rounding
  auto one = [&](int shift) {
    return to_half(f(static_cast<double>(half_to_float(a >> shift)), static_cast<double>(half_to_float(b >> shift)),
                     static_cast<double>(half_to_float(c >> shift))));
  };
  return one(0) | static_cast<u32>(one(16)) << 16;
}
inline u32 multiply_halves(u32 a, u32 b) {
  return each_half([](double a, double b, double) { return a * b; }, a, b);
}
inline u32 subtract_halves(u32 a, u32 b) {
  return each_half([](double a, double b, double) { return a - b; }, a, b);
}
inline u32 fma_halves(u32 a, u32 b, u32 c) {
  return each_half([](double a, double b, double c) { return a * b + c; }, a, b, c);
}
inline u32 permute(u32 a, u32 b, u32 selector) {
  const u64 bytes = a | static_cast<u64>(b) << 32;
  u32 result = 0;
  for (int i = 0; i < 4; i++) result |= static_cast<u32>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
inline u32 __float_as_uint(float value) { return bits_as<u32>(value); }
inline float __uint_as_float(u32 bits) { return bits_as<float>(bits); }
inline float exp2_fast(float x) { return exp2f(x); }

// --- memory

inline uint4 load_once(const uint4* p) { return *p; }
inline uint2 load_once(const uint2* p) { return *p; }
inline u32 load_once(const u32* p) { return *p; }
template <int BYTES> void copy_async(void* to, const void* from) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % BYTES) emulator::fail("a copy is not aligned");
  memcpy(to, from, BYTES);
}
inline void copy_commit() {}
template <int PENDING> void copy_wait() {}
inline float4 load_fresh(const float4* p) { return *p; }
inline float load_fresh(const float* p) { return *p; }
inline void fence_device() {}
inline int count_up(int* p) { return (*p)++; }
inline u32 count_up(u32* p, u32 n) { return (*p += n) - n; }
inline void let_next_begin() {}
inline void wait_for_previous() {}

// --- tensor cores

namespace emulator {
using Widen = float (*)(u16);
// Row g or g + 8 of the operand A that lane 4 g + t holds in part.
inline float a_of(int row, int k, Widen widen = half_to_float) {
  const u32 pair = warp_word((row & 7) * 4 + (k & 7) / 2, (row >> 3) + (k >> 3) * 2);
  return widen(pair >> 16 * (k & 1));
}
inline float b_of(int k, int column, Widen widen) {
  return widen(warp_word(column * 4 + (k & 7) / 2, 4 + (k >> 3)) >> 16 * (k & 1));
}
inline void multiply(float* d, const u32* a, u32 b0, u32 b1, Widen widen) {
  const unsigned lane = emulator::current->lane;
  for (int i = 0; i < 4; i++) emulator::warp_word(lane, i) = a[i];
  emulator::warp_word(lane, 4) = b0, emulator::warp_word(lane, 5) = b1;
  emulator::warp_sync();
  for (int i = 0; i < 4; i++)
    for (int k = 0; k < 16; k++)
      d[i] += a_of(lane / 4 + i / 2 * 8, k, widen) * b_of(k, lane % 4 * 2 + (i & 1), widen);
  emulator::warp_sync();
}
}
inline void multiply_16x8x16(float* d, const u32* a, u32 b0, u32 b1) { emulator::multiply(d, a, b0, b1, half_to_float); }
inline void multiply_16x8x16_bfloat(float* d, const u32* a, u32 b0, u32 b1) {
  emulator::multiply(d, a, b0, b1, [](u16 h) { return bits_as<float>(static_cast<u32>(h) << 16); });
}

inline u32 transpose_8x8(u32 pair) {
  const unsigned lane = emulator::current->lane, row = lane / 4, column = lane % 4 * 2;
  emulator::warp_word(lane, 0) = pair;
  emulator::warp_sync();
  auto at = [&](unsigned r, unsigned c) { return emulator::warp_word(r * 4 + c / 2, 0) >> 16 * (c & 1) & 0xffff; };
  const u32 transposed = at(column, row) | at(column + 1, row) << 16;
  emulator::warp_sync();
  return transposed;
}

// --- Hopper

namespace emulator {
struct CountingBarrier {
  long pending, count, bytes;
  u32 phase;
};
struct Copy {
  shared_t to;
  const void* from;
  int bytes;
  shared_t barrier;
};
inline std::vector<std::pair<shared_t, CountingBarrier>> counting;
inline std::vector<Copy> copies;
inline Random order = {5};

inline CountingBarrier& barrier_at(shared_t address) {
  for (auto& [at, barrier] : counting)
    if (at == address) return barrier;
  fail("a barrier was not initialised");
}

inline void begin_copies() {
  if (!copies.empty()) fail("copies were left in flight before this one");
  counting.clear();
}
inline void settle(CountingBarrier& barrier) {
  if (barrier.pending < 0) fail("too many arrivals at a barrier");
  if (barrier.pending == 0 && barrier.bytes == 0) barrier.phase ^= 1, barrier.pending = barrier.count;
}
inline void land_one() {
  if (copies.empty() || order.below(4)) return;
  const size_t which = order.below(copies.size());
  const Copy copy = copies[which];
  copies.erase(copies.begin() + which);
  memcpy(reinterpret_cast<void*>(copy.to), copy.from, copy.bytes);
  barrier_at(copy.barrier).bytes -= copy.bytes;
  settle(barrier_at(copy.barrier));
}
}  // namespace emulator
inline shared_t shared_address(const void* p) { return reinterpret_cast<shared_t>(p); }
inline void barrier_init(shared_t barrier, int count) {
  emulator::counting.push_back({barrier, {count, count, 0, 0}});
}
inline void fence_barriers() {}
inline void barrier_expect(shared_t barrier, int bytes) {
  emulator::CountingBarrier& counting = emulator::barrier_at(barrier);
  counting.bytes += bytes, counting.pending--;
  emulator::settle(counting);
}
inline void barrier_arrive(shared_t barrier) { barrier_expect(barrier, 0); }
inline void barrier_wait(shared_t barrier, u32 phase) {
  while (emulator::barrier_at(barrier).phase == phase) emulator::land_one(), emulator::yield();
}
inline void copy_bulk(shared_t to, const void* from, int bytes, shared_t barrier) {
  if ((to | reinterpret_cast<uintptr_t>(from) | bytes) % 16) emulator::fail("a bulk copy is not of whole 16 bytes");
  memset(reinterpret_cast<void*>(to), 0xff, bytes);
  emulator::copies.push_back({to, from, bytes, barrier});
}
inline void sync_threads(int barrier, int count) { emulator::arrive(emulator::barriers[barrier], count); }
inline uint4 load_shared_four(shared_t p) { return *reinterpret_cast<uint4*>(p); }
inline u32 load_shared(shared_t p) { return *reinterpret_cast<u32*>(p); }
inline void warpgroup_pin(u32*) {}
inline void warpgroup_fence() {}
inline void warpgroup_commit() {}
template <int PENDING> void warpgroup_wait() {}
inline u64 describe(shared_t p) { return p; }
inline u64 describe_after(u64 description, int bytes) { return description + bytes; }
template <int N> void warpgroup_multiply(float* d, const u32* a, u64 b, int adds) {
  const int lane = emulator::current->lane;
  for (int i = 0; i < 4; i++) emulator::warp_word(lane, i) = a[i];
  emulator::warp_sync();
  for (int i = 0; i < N / 2; i++) {
    const int column = i / 4 * 8 + lane % 4 * 2 + (i & 1);
    float sum = adds ? d[i] : 0;
    for (int k = 0; k < 16; k++) {
      uintptr_t at = b + column * 128 + k * 2;
      at ^= (at >> 7 & 7) << 4;
      sum += emulator::a_of(lane / 4 + i / 2 % 2 * 8, k) * half_to_float(*reinterpret_cast<u16*>(at));
    }
    d[i] = sum;
  }
  emulator::warp_sync();
}
