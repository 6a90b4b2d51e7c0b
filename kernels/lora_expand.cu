// y [T, N] += B h for the rows of every slot: up to three linears side by side, of WIDTHS columns, h as lora.cuh's
// shrink leaves it. B is operand A of the tensor cores; its rows are dealt to the lanes so that each has 8 neighbouring
// columns of y. A warp has 64 columns, a block a tile of rows.
#include "lora.cuh"

constexpr int TOKENS = COLUMNS * 8, SPAN = WARPS * 64;

struct Weights {  // of 64 columns of y and 16 ranks
  uint2 b[4][2];

  INLINE void read(const u16* from, int rank, int left) {
#pragma unroll
    for (int i = 0; i < 8; i++) b[i / 2][i % 2] = left > 0 ? load_once((const uint2*)(from + i * rank)) : make_uint2(0, 0);
  }
};

// h [TOKENS, rank] of this tile, the slices added in their order, as pairs of 16 bits
INLINE void gather(u32* to, int pitch, const float* h, const int* rows, int rank, int T, int width, int parts, int part) {
  for (int i = threadIdx.x; i < TOKENS * rank / 4; i += WARPS * 32) {
    const int token = i / (rank / 4), k = i % (rank / 4) * 4, row = rows[token];
    float4 sum = make_float4(0, 0, 0, 0);
    if (row >= 0) {
      const float* from = h + (size_t)row * parts * width + part * width + k;
#pragma unroll
      for (int s = 0; s < SLICES; s++) {
        const float4 next = load_fresh((const float4*)(from + (size_t)s * T * parts * width));
        sum.x += next.x, sum.y += next.y, sum.z += next.z, sum.w += next.w;
      }
    }
    *(uint2*)(to + token * pitch + k / 2) = make_uint2(narrow(sum.x, sum.y), narrow(sum.z, sum.w));
  }
}

INLINE u32 add(u32 pair, float low, float high) { return narrow(widen_low(pair) + low, widen_high(pair) + high); }

extern "C" __global__ void __launch_bounds__(WARPS * 32)
lora_expand(const u64* table, const int* slots, const int* rows,
            const float* h, u16* y, int stride, int module, int parts, int width, int T, int K,
            int N, int second, int third) {
  DYNAMIC_SHARED(memory);
  u32* shared = (u32*)memory;  // [TOKENS, width / 2 + 8]
  let_next_begin();
  const LoraTiles tiles = {table, slots, rows, stride};
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, tile = blockIdx.y, rank = tiles.rank(tile);
  const int one = (second + SPAN - 1) / SPAN, two = one + (third - second + SPAN - 1) / SPAN;
  const int block = blockIdx.x, part = (block >= one) + (block >= two);
  const int begin = part == 0 ? 0 : part == 1 ? second : third, end = part == 0 ? second : part == 1 ? third : N;
  const int mine = (block - (part == 0 ? 0 : part == 1 ? one : two)) * SPAN + warp * 64 + lane / 4 * 8;
  const u16* a = tiles.a(tile, module + part);
  if (!a) {
    wait_for_previous();
    return;
  }
  const u16* b = a + (size_t)rank * K + (size_t)mine * rank + lane % 4 * 4;
  const int left = end - begin - mine;
  Weights weights;
  weights.read(b, rank, left);
  const int* own = rows + tile * TOKENS;
  uint4* at[COLUMNS][2];  // 8 columns of y
#pragma unroll
  for (int i = 0; i < COLUMNS * 2; i++) {
    const int row = own[i / 2 * 8 + lane % 4 * 2 + i % 2];
    at[i / 2][i % 2] = row < 0 || left <= 0 ? 0 : (uint4*)(y + (size_t)row * N + begin + mine);
  }
  wait_for_previous();
  uint4 old[COLUMNS][2] = {};
#pragma unroll
  for (int i = 0; i < COLUMNS * 2; i++)
    if (at[i / 2][i % 2]) old[i / 2][i % 2] = *at[i / 2][i % 2];
  const int pitch = width / 2 + 8;
  gather(shared, pitch, h, own, rank, T, width, parts, part);
  __syncthreads();
  float sums[COLUMNS][4][4] = {};
  for (int k = 0;;) {
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
      const uint2 token = *(const uint2*)(shared + (c * 8 + lane / 4) * pitch + k / 2 + lane % 4 * 2);
#pragma unroll
      for (int t = 0; t < 4; t++) {
        const uint2 *low = &weights.b[t][0], *high = &weights.b[t][1];
        const u32 four[4] = {low->x, high->x, low->y, high->y};
        multiply_16(sums[c][t], four, token.x, token.y);
      }
    }
    if ((k += 16) >= rank) break;
    weights.read(b + k, rank, left);
  }
#pragma unroll
  for (int i = 0; i < COLUMNS * 2; i++) {
    const int c = i / 2, e = i % 2;
    if (!at[c][e]) continue;
    const float(*d)[4] = sums[c];
    *at[c][e] = make_uint4(add(old[c][e].x, d[0][e], d[0][2 + e]), add(old[c][e].y, d[1][e], d[1][2 + e]),
                           add(old[c][e].z, d[2][e], d[2][2 + e]), add(old[c][e].w, d[3][e], d[3][2 + e]));
  }
}
