// x [M, K] as q4_mid reads it: [tiles][K / 64][TOKENS][64], the columns of 64 in the order of the weights' operand A,
// 16 bytes of them at a place that hangs on the token (the swizzle of 128 bytes), and zeros below the last token.
#include "ptx.cuh"

extern "C" __global__ void __launch_bounds__(128)
q4_arrange(const u16* __restrict__ x, const long long* __restrict__ order, uint4* __restrict__ out, int M, int K) {
  const int i = blockIdx.y * 128 + threadIdx.x, within = i / 8, chunk = i % 8, token = blockIdx.z * TOKENS + within;
  const int column = blockIdx.x * 64 + chunk * 2;
  let_next_begin();
  wait_for_previous();
  if (within >= TOKENS) return;
  u32 pairs[4] = {};
  const u16* row = x + (size_t)token * K;
  if (token < M)
#pragma unroll
    for (int p = 0; p < 4; p++)
      pairs[p] = order ? row[order[column + p * 16]] | (u32)row[order[column + p * 16 + 1]] << 16
                       : *(const u32*)(row + column + p * 16);
  out[(((size_t)blockIdx.z * (K / 64) + blockIdx.x) * TOKENS + within) * 8 + (chunk ^ (within & 7))] =
      make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}
