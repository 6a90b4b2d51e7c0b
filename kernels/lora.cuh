// What the slots of a LoRA bank are to kernels. `table` has a row of `stride` numbers for each slot: its rank R, a
// multiple of 16, and the addresses of its modules' A [R, K], each with B [N, R] right behind it, or 0. Rows of a batch
// are cut into tiles of 8 times COLUMNS rows of one slot; -1 is no row, and no slot.
#pragma once
#include "number.cuh"

struct LoraTiles {
  const u64* table;
  const int *slots, *rows;  // [tiles], [tiles, 8 C]
  int stride;

  INLINE int rank(int tile) const { return slots[tile] < 0 ? 0 : (int)table[(size_t)slots[tile] * stride]; }
  INLINE const u16* a(int tile, int module) const {
    return slots[tile] < 0 ? 0 : (const u16*)table[(size_t)slots[tile] * stride + module];
  }
};

INLINE void multiply_16(float* d, const u32* a, u32 b0, u32 b1) {
  if (BFLOAT) multiply_16x8x16_bfloat(d, a, b0, b1);
  else multiply_16x8x16(d, a, b0, b1);
}

// h [slices, T, parts * width] of fp32 = scales * (A x) over slices of K, for the units [tiles, parts, slices,
// width / 16]. A slice is what W warps read in D steps of 128: all of it is asked for before the wait. memory: 512 D W 8
// bytes of A, each thread's own, then the warps' sums.
struct LoraShrink {
  LoraTiles tiles;
  const float* scales;  // [T, width]
  const u16* x;         // [T, K]
  float* h;
  int module, parts, width, T, K;  // module: the first part's place in the table
};

template <int W, int D, int C>
INLINE void lora_shrink_unit(const LoraShrink& of, int unit, uint4* memory) {
  constexpr int SLICE = W * D * 128, ROWS = C * 8;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, ranks = of.width / 16, slices = (of.K + SLICE - 1) / SLICE;
  const int r = unit % ranks * 16, slice = unit / ranks % slices, part = unit / (ranks * slices) % of.parts;
  const int tile = unit / (ranks * slices * of.parts), *rows = of.tiles.rows + tile * ROWS;
  const u16* a = r < of.tiles.rank(tile) ? of.tiles.a(tile, of.module + part) : 0;
  if (!a) {
    wait_for_previous();  // so that no kernel behind this one begins before the one in front has ended
    return;
  }
  const int first = slice * SLICE + warp * D * 128 + lane % 4 * 8;
  const u16* own = a + (size_t)(r + lane / 4) * of.K;
  uint4* weights = memory + threadIdx.x;
#pragma unroll
  for (int i = 0; i < D * 8; i++) {
    const int k = first + i / 2 * 32;
    if (k < of.K) copy_async<16>(weights + i * W * 32, own + (size_t)(i % 2 * 8) * of.K + k);
    else weights[i * W * 32] = make_uint4(0, 0, 0, 0);
  }
  copy_commit();
  int row[C];
#pragma unroll
  for (int c = 0; c < C; c++) row[c] = rows[c * 8 + lane / 4];
  wait_for_previous();
  copy_wait<0>();
  float part_sums[C][4] = {};
#pragma unroll
  for (int i = 0; i < D * 4; i++) {
    const uint4 low = weights[i * 2 * W * 32], high = weights[(i * 2 + 1) * W * 32];
    const u32 one[4] = {low.x, high.x, low.y, high.y}, two[4] = {low.z, high.z, low.w, high.w};
    const int k = first + i * 32;
#pragma unroll
    for (int c = 0; c < C; c++) {
      const bool there = k < of.K && row[c] >= 0;
      const uint4 x = there ? *(const uint4*)(of.x + (size_t)row[c] * of.K + k) : make_uint4(0, 0, 0, 0);
      multiply_16(part_sums[c], one, x.x, x.y);
      multiply_16(part_sums[c], two, x.z, x.w);
    }
  }
  float* sums = (float*)(memory + D * 8 * W * 32);  // [W, ROWS, 16]
#pragma unroll
  for (int c = 0; c < C; c++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      sums[(warp * ROWS + c * 8 + lane % 4 * 2 + (e & 1)) * 16 + (e >> 1) * 8 + lane / 4] = part_sums[c][e];
  __syncthreads();
  for (int i = threadIdx.x; i < ROWS * 16; i += W * 32) {
    const int token = rows[i / 16], column = r + i % 16;
    if (token < 0) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < W; w++) sum += sums[w * ROWS * 16 + i];
    of.h[((size_t)slice * of.T + token) * of.parts * of.width + part * of.width + column] =
        sum * of.scales[(size_t)token * of.width + column];
  }
}
