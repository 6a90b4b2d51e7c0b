// y = W x + bias for up to 16 tokens a block row, W of 4 bits (see q4.cuh), weights as operand A of the tensor cores.
// A block has TILES times 16 rows of W; its WARPS take the steps of 128 columns in turn, and their sums are added in
// the order of the warps, so a token's bits depend on nothing but W and the token. COLUMNS: 8 tokens each.
#include "q4.cuh"

constexpr int SCALES = GROUP < 128 ? 2 : 1;  // scales of a row that a lane needs for 128 columns
constexpr int ROWS = TILES * 16, TOKENS = COLUMNS * 8;

struct Weights {
  uint4 words[TILES][2];
  u32 scales[TILES][SCALES], zeros[TILES][SCALES];
};

struct Source {
  const uint4* weights;
  const u32 *scales, *zeros;
  int lane, tile, steps, groups;

  INLINE void read(Weights& to, int step) const {
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      const uint4* from = weights + (((size_t)((tile + t) >> 2) * steps + step) * 4 + ((tile + t) & 3)) * 64 + lane;
      to.words[t][0] = load_once(from), to.words[t][1] = load_once(from + 32);
#pragma unroll
      for (int s = 0; s < SCALES; s++) {
        const int group = (step * 128 + s * 64 + (GROUP < 64 ? lane % 4 * 16 : 0)) / GROUP;
        const size_t at = ((size_t)(tile + t) * groups + group) * 8 + lane / 4;
        to.scales[t][s] = scales[at];
        if (ZEROS) to.zeros[t][s] = zeros[at];
      }
    }
  }
};

struct Tokens {
  uint4 x[COLUMNS][4];

  INLINE void read(const u16* from, int first, int count, int K, int step, int lane) {
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
      const int token = c * 8 + lane / 4;
      const u16* row = from + (size_t)(first + token) * K + step * 128 + lane % 4 * 16;
#pragma unroll
      for (int i = 0; i < 4; i++)
        x[c][i] = token < count ? *(const uint4*)(row + (i >> 1) * 64 + (i & 1) * 8) : make_uint4(0, 0, 0, 0);
    }
  }
};

INLINE void multiply(float (*sums)[COLUMNS][4], const Weights& weights, const Tokens& tokens) {
#pragma unroll
  for (int t = 0; t < TILES; t++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int s = half * (SCALES - 1);
      const Levels levels = read_levels(weights.scales[t][s], weights.zeros[t][s]);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        u32 a[4];
        dequantise(word_of(weights.words[t][half], j), levels, a);
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
          const uint4& x = tokens.x[c][half * 2 + (j >> 1)];
          multiply_16x8x16(sums[t][c], a, word_of(x, j % 2 * 2), word_of(x, j % 2 * 2 + 1));
        }
      }
    }
  }
}

INLINE void store(u16* y, const float* sums, const float* factors, const u16* bias, int first, int count, int N) {
  for (int i = threadIdx.x; i < ROWS * TOKENS; i += WARPS * 32) {
    const int row = blockIdx.x * ROWS + i % ROWS, token = i / ROWS;
    if (row >= N || token >= count) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += sums[(w * TOKENS + token) * ROWS + i % ROWS];
    sum = sum * factors[row] + (bias ? half_to_float(bias[row]) : 0.f);
    y[(size_t)(first + token) * N + row] = (u16)pack_half(sum, 0);
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
q4_decode(const uint4* __restrict__ weights, const u32* __restrict__ scales, const u32* __restrict__ zeros,
          const float* __restrict__ factors, const u16* __restrict__ bias, const u16* x,
          u16* y, int M, int N, int K) {
  DYNAMIC_SHARED(memory);
  float* sums = (float*)memory;  // [WARPS][TOKENS][ROWS]
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, steps = K / 128;
  const int first = blockIdx.y * TOKENS, count = min(TOKENS, M - first), mine = (steps - warp + WARPS - 1) / WARPS;
  const Source source = {weights, scales, zeros, lane, (int)blockIdx.x * TILES, steps, K / GROUP};
  let_next_begin();
  Weights ring[DEPTH];
#pragma unroll
  for (int p = 0; p < DEPTH; p++)
    if (p < mine) source.read(ring[p], p * WARPS + warp);
  wait_for_previous();
  Tokens next;
  if (mine) next.read(x, first, count, K, warp, lane);
  float part[TILES][COLUMNS][4] = {};
  for (int begin = 0; begin < mine; begin += DEPTH) {
#pragma unroll
    for (int p = 0; p < DEPTH; p++) {
      const int i = begin + p;
      if (i >= mine) break;
      const Tokens tokens = next;
      if (i + 1 < mine) next.read(x, first, count, K, (i + 1) * WARPS + warp, lane);
      multiply(part, ring[p], tokens);
      if (i + DEPTH < mine) source.read(ring[p], (i + DEPTH) * WARPS + warp);
    }
  }
#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        sums[(warp * TOKENS + c * 8 + lane % 4 * 2 + (e & 1)) * ROWS + t * 16 + (e >> 1) * 8 + lane / 4] = part[t][c][e];
  __syncthreads();
  store(y, sums, factors, bias, first, count, N);
}
