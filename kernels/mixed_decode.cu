// y = W x + bias for up to 16 tokens a block row, W of mixed widths (see mixed.cuh), weights as operand A of the tensor
// cores. A block has TILES times 16 rows of W; each of its WARPS takes an equal share of their bytes, and the sums are
// added in the order of the warps, so a token's bits depend on nothing but W and the token. COLUMNS: 8 tokens each.
// FLIGHT: words of a tile, scales included, that a lane waits for at most. x has its columns in the order of W.
#include "mixed.cuh"

constexpr int ROWS = TILES * 16, TOKENS = COLUMNS * 8;

struct Tokens {
  uint4 x[COLUMNS][2];

  INLINE void read(const u16* from, int count, int columns, int step, int lane) {
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
      const int token = c * 8 + lane / 4;
      const uint4* row = (const uint4*)(from + (size_t)token * columns + step * 64 + lane % 4 * 16);
      x[c][0] = token < count ? row[0] : make_uint4(0, 0, 0, 0);
      x[c][1] = token < count ? row[1] : make_uint4(0, 0, 0, 0);
    }
  }
};

INLINE u32 word_of(const uint4& four, int i) { return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w; }

template <int BITS> struct Weights {
  u32 words[TILES][BITS], scales[TILES], zeros[TILES];
};

struct Share {  // of a warp
  const u32 *words, *scales, *zeros;  // of the block's first tile
  const u16* x;
  int stride, groups, count, columns, lane, low, high;  // words and groups of a tile; the words of a lane that it takes
  float sums[TILES][COLUMNS][4];

  // The first step of a width that begins at or after so many words.
  template <int BITS> INLINE int step_at(int words, const Place& place, int end) const {
    return min(max(place.step + (words - place.words + BITS - 1) / BITS, place.step), end);
  }

  template <int BITS> INLINE void read(Weights<BITS>& to, int step, const Place& place, int shift) const {
    const int offset = step - place.step;
    const size_t from = ((size_t)place.words + offset * BITS) * 32;
    const int level = (place.group + (offset * 64 + lane % 4 * 16 >> shift)) * 8 + lane / 4;
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      read_words<BITS>(to.words[t], words + (size_t)t * stride * 32 + from, lane);
      to.scales[t] = scales[t * groups * 8 + level];
      if (ZEROS) to.zeros[t] = zeros[t * groups * 8 + level];
    }
  }

  template <int BITS> INLINE void multiply(const Weights<BITS>& weights, const Tokens& tokens) {
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      const Levels levels = read_levels(weights.scales[t], weights.zeros[t]);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        u32 a[4];
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = dequantise_pair<BITS>(weights.words[t], levels, j * 4 + i);
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
          const uint4& x = tokens.x[c][j >> 1];
          multiply_16x8x16(sums[t][c], a, word_of(x, j % 2 * 2), word_of(x, j % 2 * 2 + 1));
        }
      }
    }
  }

  template <int BITS> INLINE void take(const Place& place, int layout) {
    constexpr int WORDS = BITS + 1 + ZEROS, DEPTH = FLIGHT < WORDS ? 1 : FLIGHT / WORDS;
    const int shift = layout & 31, begin = step_at<BITS>(low, place, layout >> 5);
    const int end = step_at<BITS>(high, place, layout >> 5);
    if (begin == end) return;
    Weights<BITS> ring[DEPTH];
#pragma unroll
    for (int p = 0; p < DEPTH; p++)
      if (begin + p < end) read(ring[p], begin + p, place, shift);
    wait_for_previous();
    Tokens next;
    next.read(x, count, columns, begin, lane);
    for (int first = begin; first < end; first += DEPTH) {
#pragma unroll
      for (int p = 0; p < DEPTH; p++) {
        const int step = first + p;
        if (step >= end) break;
        const Tokens tokens = next;
        if (step + 1 < end) next.read(x, count, columns, step + 1, lane);
        multiply(ring[p], tokens);
        if (step + DEPTH < end) read(ring[p], step + DEPTH, place, shift);
      }
    }
  }
};

INLINE void store(u16* y, const float* sums, const u16* bias, int first, int count, int N) {
  for (int i = threadIdx.x; i < ROWS * TOKENS; i += WARPS * 32) {
    const int row = blockIdx.x * ROWS + i % ROWS, token = i / ROWS;
    if (row >= N || token >= count) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += sums[(w * TOKENS + token) * ROWS + i % ROWS];
    y[(size_t)(first + token) * N + row] = (u16)pack_half(sum + (bias ? half_to_float(bias[row]) : 0.f), 0);
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
mixed_decode(const u32* __restrict__ words, const u32* __restrict__ scales, const u32* __restrict__ zeros,
             const u16* __restrict__ bias, const u16* x, u16* y, int M, int N, int stride,
             int groups, int w8, int w6, int w5, int w4, int w3, int w2) {
  DYNAMIC_SHARED(memory);
  float* sums = (float*)memory;  // [WARPS][TOKENS][ROWS]
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, tile = blockIdx.x * TILES;
  const int first = blockIdx.y * TOKENS, count = min(TOKENS, M - first), columns = (w2 >> 5) * 64;
  const size_t level = (size_t)tile * groups * 8;
  Share share = {words + (size_t)tile * stride * 32, scales + level, ZEROS ? zeros + level : 0,
                 x + (size_t)first * columns, stride, groups, count, columns, lane,
                 stride * warp / WARPS, stride * (warp + 1) / WARPS, {}};
  let_next_begin();
  Place place = {0, 0, 0};
  share.take<8>(place, w8), place.pass<8>(w8);
  share.take<6>(place, w6), place.pass<6>(w6);
  share.take<5>(place, w5), place.pass<5>(w5);
  share.take<4>(place, w4), place.pass<4>(w4);
  share.take<3>(place, w3), place.pass<3>(w3);
  share.take<2>(place, w2);
  wait_for_previous();
#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        sums[(warp * TOKENS + c * 8 + lane % 4 * 2 + (e & 1)) * ROWS + t * 16 + (e >> 1) * 8 + lane / 4] =
            share.sums[t][c][e];
  __syncthreads();
  store(y, sums, bias, first, count, N);
}
