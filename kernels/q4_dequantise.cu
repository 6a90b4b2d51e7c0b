// W [rows, K] in fp16, columns in their stored order, of weights of 4 bits (see q4.cuh). A thread makes two rows of 16
// columns; a block's 64 rows of 128 go through shared memory, so that neighbours are written together.
#include "q4.cuh"

INLINE u32 scale_pair(u32 pair, float factor) {
  return pack_half(half_to_float((u16)pair) * factor, half_to_float((u16)(pair >> 16)) * factor);
}

extern "C" __global__ void __launch_bounds__(256)
q4_dequantise(const uint4* __restrict__ weights, const u32* __restrict__ scales, const u32* __restrict__ zeros,
              const float* __restrict__ factors, u16* out, int K) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tile = blockIdx.y * 4 + warp / 2, half = warp % 2;
  __shared__ uint4 tile_rows[64][17];  // 16 bytes more, so that rows begin in different banks
  let_next_begin();
  const uint4 words = load_once(weights + ((size_t)blockIdx.y * (K / 128) + blockIdx.x) * 256 + threadIdx.x);
  const int column = blockIdx.x * 128 + half * 64 + lane % 4 * 16, row = tile * 16 + lane / 4;
  const size_t at = ((size_t)tile * (K / GROUP) + column / GROUP) * 8 + lane / 4;
  const Levels levels = read_levels(scales[at], ZEROS ? zeros[at] : 0);
  u32 pairs[2][8];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    u32 a[4];
    dequantise(word_of(words, j), levels, a);
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int p = 0; p < 2; p++) pairs[h][j * 2 + p] = scale_pair(a[p * 2 + h], factors[row + 8 * h]);
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    uint4* to = tile_rows[warp / 2 * 16 + lane / 4 + 8 * h] + half * 8 + lane % 4 * 2;
    to[0] = make_uint4(pairs[h][0], pairs[h][1], pairs[h][2], pairs[h][3]);
    to[1] = make_uint4(pairs[h][4], pairs[h][5], pairs[h][6], pairs[h][7]);
  }
  __syncthreads();
  wait_for_previous();
#pragma unroll
  for (int i = threadIdx.x; i < 64 * 16; i += 256)
    *(uint4*)(out + ((size_t)blockIdx.y * 64 + i / 16) * K + blockIdx.x * 128 + i % 16 * 8) = tile_rows[i / 16][i % 16];
}
