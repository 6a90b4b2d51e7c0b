// Numbers of a cache: made finite, and rotated as kernels/pool.py does, in fp16.
#pragma once
#include "number.cuh"

INLINE float finite(float x, float bound) { return x != x ? 0.f : fminf(fmaxf(x, -bound), bound); }
// A warp's 64 numbers of fp16, two in each lane, rotated: those in even places, and those in odd ones.
INLINE u32 rotate(u32 pair, int lane) {
#pragma unroll
  for (int stride = 1; stride < 32; stride *= 2) {
    const u32 other = __shfl_xor_sync(~0u, pair, stride);
    pair = lane & stride ? subtract_halves(other, pair) : fma_halves(pair, 0x3c003c00, other);
  }
  return pair;
}
