// What the kernels of the sampler share: rows of logits in chunks of CHUNK, weights as whole numbers, whose sums have
// no order. A row is 64 bytes, as kernels/sample.py writes them.
#include "number.cuh"

constexpr int CHUNK = 8192, STRIP = 8, BANNED = 8;
constexpr u32 ALL = ~0u;
#define MINUS_INFINITY __uint_as_float(0xff800000u)

struct Row {
  double number;
  float temperature, top_p, min_p;
  int top_k, seat, unused, banned[BANNED];
};

// --- the order of logits: NaN before all, and no difference between the zeros

INLINE u32 rank_of(float value) {
  const u32 bits = __float_as_uint(value + 0.f);
  return value != value ? ALL : bits >> 31 ? ~bits : bits | 0x80000000u;
}
INLINE float value_of(u32 rank) { return __uint_as_float(rank >> 31 ? rank & 0x7fffffffu : ~rank); }

INLINE float sharpness(const Row& row) { return 1.4426950408889634f / max(row.temperature, 1e-30f); }

// exp((value - top) / temperature) in units of 2^-40
INLINE u64 mass(float value, float top, float sharp) {
  return value > MINUS_INFINITY ? (u64)(exp2_fast((value - top) * sharp) * 1099511627776.f) : 0;
}

// --- logits [first, first + STRIP) of a row that begins at `start`; -inf from `count` on and where banned

INLINE void load_strip(float* value, const void* logits, size_t start, int first, int count, const Row& row) {
  if (ALIGNED && first < count) {
    if (FLOAT32) {
      const float4* from = (const float4*)((const float*)logits + start + first);
      const float4 a = from[0], b = from[1];
      value[0] = a.x, value[1] = a.y, value[2] = a.z, value[3] = a.w;
      value[4] = b.x, value[5] = b.y, value[6] = b.z, value[7] = b.w;
    } else {
      const uint4 v = *(const uint4*)((const u16*)logits + start + first);
      value[0] = widen_low(v.x), value[1] = widen_high(v.x), value[2] = widen_low(v.y), value[3] = widen_high(v.y);
      value[4] = widen_low(v.z), value[5] = widen_high(v.z), value[6] = widen_low(v.w), value[7] = widen_high(v.w);
    }
  }
#pragma unroll
  for (int i = 0; i < STRIP; i++) {
    if (first + i >= count) {
      value[i] = MINUS_INFINITY;
    } else if (!ALIGNED) {
      const size_t at = start + first + i;
      value[i] = FLOAT32 ? ((const float*)logits)[at] : widen(((const u16*)logits)[at]);
    }
  }
#pragma unroll
  for (int b = 0; b < BANNED; b++) {
    const u32 place = row.banned[b] - first;
    if (place >= STRIP) continue;
#pragma unroll
    for (int i = 0; i < STRIP; i++)
      if (i == place) value[i] = MINUS_INFINITY;
  }
}

// --- a warp

INLINE u64 shuffle(u64 value, int lane) {
  return (u64)__shfl_sync(ALL, (u32)(value >> 32), lane) << 32 | __shfl_sync(ALL, (u32)value, lane);
}
INLINE u64 highest_of_warp(u64 value) {
#pragma unroll
  for (int mask = 16; mask; mask >>= 1) value = max(value, shuffle(value, threadIdx.x % 32 ^ mask));
  return value;
}
INLINE u64 sum_up_to_lane(u64 value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) {
    const u64 other = shuffle(value, (lane - step) & 31);
    if (lane >= step) value += other;
  }
  return value;
}
