// Causal attention of tiles of queries over a paged cache of fp16 (kernels/attention.py), head size DIM, 64 or 128.
// A block has QUERIES queries of a tile with the GROUP heads that share a head of the cache, as rows of a product of
// 16, and SPLIT keys; its four warps take blocks of 16 keys in turn. Warps, then splits, are merged in their order, by
// the block that ends last, so that a row's bits depend on its own sequence alone.
#include "ptx.cuh"

constexpr int ROWS = QUERIES * GROUP, HALVES = ROWS > 8 ? 2 : 1, STORED = HALVES * 8, WARPS = 4;
constexpr int STEPS = DIM / 16, COLUMNS = DIM / 8, PARTS = DIM / 64;
constexpr float NOTHING = -1e30f;  // a maximum over no keys; finite, so that differences are

struct Rows {  // rows g and g + 8 of the block, a quarter of them in each of four lanes
  float top[HALVES], total[HALVES], out[COLUMNS][4];
  u32 queries[STEPS][4];
  int last[HALVES];  // position of the query
};

INLINE void read_queries(Rows& rows, const u16* q, const long long* tokens, const long long* positions, int first, int lane) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = lane / 4 + 8 * h, query = row / GROUP;
    const bool real = h < HALVES && row < ROWS;
    if (h < HALVES) rows.last[h] = real ? (int)positions[query] : 0, rows.top[h] = NOTHING, rows.total[h] = 0;
    const u16* from = q + ((size_t)(real ? tokens[query] : 0) * HEADS + first + row % GROUP) * DIM;
#pragma unroll
    for (int j = 0; j < STEPS; j++)
#pragma unroll
      for (int p = 0; p < 2; p++)
        rows.queries[j][p * 2 + h] = real ? *(const u32*)(from + j / 2 * 32 + lane % 4 * 8 + j % 2 * 4 + p * 2) : 0;
  }
#pragma unroll
  for (int t = 0; t < COLUMNS; t++)
#pragma unroll
    for (int e = 0; e < 4; e++) rows.out[t][e] = 0;
}

// Sixteen keys from `key` on, whose K and V begin at k and v. Scores times `inner`, or outer tanh(inner score), are in
// powers of two.
INLINE void attend_block(Rows& rows, const u16* k, const u16* v, int key, int window, float inner, float outer, int lane) {
  u32 keys[2][DIM / 8], values[4][PARTS * 4];
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int c = 0; c < DIM / 32; c++)
      *(uint4*)&keys[n][c * 4] = load_once((const uint4*)(k + (n * 8 + lane / 4) * DIM + c * 32 + lane % 4 * 8));
#pragma unroll
  for (int e = 0; e < 4; e++)
#pragma unroll
    for (int p = 0; p < PARTS; p++)
      *(uint4*)&values[e][p * 4] =
          load_once((const uint4*)(v + (lane % 4 * 2 + (e & 1) + (e >> 1) * 8) * DIM + p * 64 + lane / 4 * 8));
  float scores[2][4] = {};
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int j = 0; j < STEPS; j++) multiply_16x8x16(scores[n], rows.queries[j], keys[n][j * 2], keys[n][j * 2 + 1]);
  u32 weights[4] = {};
#pragma unroll
  for (int h = 0; h < HALVES; h++) {
    float top = rows.top[h];
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float& score = scores[n][h * 2 + e];
        const int before = rows.last[h] - (key + n * 8 + lane % 4 * 2 + e);
        score = outer ? tanhf(score * inner) * outer : score * inner;
        if (before < 0 || before >= window) score = NOTHING;
        top = fmaxf(top, score);
      }
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    const float kept = exp2_fast(rows.top[h] - top);
    rows.top[h] = top, rows.total[h] *= kept;
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const float a = exp2_fast(scores[n][h * 2] - top), b = exp2_fast(scores[n][h * 2 + 1] - top);
      rows.total[h] += a + b, weights[n * 2 + h] = pack_half(a, b);
    }
#pragma unroll
    for (int t = 0; t < COLUMNS; t++) rows.out[t][h * 2] *= kept, rows.out[t][h * 2 + 1] *= kept;
  }
#pragma unroll
  for (int t = 0; t < COLUMNS; t++) {
    const u32 half = t & 1 ? 0x7632 : 0x5410;
    multiply_16x8x16(rows.out[t], weights, permute(values[0][t >> 1], values[1][t >> 1], half),
                     permute(values[2][t >> 1], values[3][t >> 1], half));
  }
}

// A row's number d from the sums of `parts` parts, `stride` floats apart: each DIM numbers, their top and their total.
struct Merged {
  float sum, top, total;
};
INLINE Merged merge(const volatile float* row, int d, int parts, size_t stride) {
  Merged merged = {0, NOTHING, 0};
  for (int i = 0; i < parts; i++) merged.top = fmaxf(merged.top, row[i * stride + DIM]);
  for (int i = 0; i < parts; i++) {
    const float kept = exp2_fast(row[i * stride + DIM] - merged.top);
    merged.total += kept * row[i * stride + DIM + 1], merged.sum += kept * row[i * stride + d];
  }
  return merged;
}

INLINE void write(u16* out, const long long* tokens, int head, int row, int d, const Merged& merged) {
  const size_t at = (size_t)tokens[row / GROUP] * HEADS + head * GROUP + row % GROUP;
  out[at * DIM + d] = (u16)pack_half(merged.sum / merged.total, 0);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, DIM == 128 ? 2 : 3)
paged_attention(const u16* __restrict__ q, const u16* __restrict__ k_pool, const u16* __restrict__ v_pool,
          const long long* __restrict__ tokens, const long long* __restrict__ positions,
          const long long* __restrict__ table, u16* __restrict__ out, float* partial, int* arrived, int pages, int page,
                int window, float inner, float outer) {
  constexpr int ROW = DIM + 2;
  DYNAMIC_SHARED(memory);
  float* sums = (float*)memory;  // [WARPS][STORED][ROW]: numbers, top, total
  __shared__ int place;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, split = blockIdx.x, head = blockIdx.y, block = blockIdx.z;
  let_next_begin();
  wait_for_previous();
  const int tile = block / BLOCKS, begin = tile * STRIDE + block % BLOCKS * QUERIES;  // STRIDE queries, BLOCKS blocks
  int deepest = 0, earliest = 1 << 30;
  for (int i = 0; i < QUERIES; i++)
    deepest = max(deepest, (int)positions[begin + i]), earliest = min(earliest, (int)positions[begin + i]);
  const int splits = deepest / SPLIT + 1, end = min(deepest + 1, (split + 1) * SPLIT);
  const int seen = max(0, earliest - window + 1) / 16 * 16;  // keys before it are hidden and may have no page
  if (split >= splits) return;
  Rows rows;
  read_queries(rows, q, tokens + begin, positions + begin, head * GROUP, lane);
  for (int key = split * SPLIT + warp * 16; key < end; key += WARPS * 16) {
    if (key < seen) continue;
    const size_t at = (((size_t)table[(size_t)tile * pages + key / page] * KV_HEADS + head) * page + key % page) * DIM;
    attend_block(rows, k_pool + at, v_pool + at, key, window, inner, outer, lane);
  }
#pragma unroll
  for (int h = 0; h < HALVES; h++) {
    float* row = sums + (warp * STORED + h * 8 + lane / 4) * ROW;
    float total = rows.total[h] + __shfl_xor_sync(~0u, rows.total[h], 1);
    total += __shfl_xor_sync(~0u, total, 2);
    if (lane % 4 == 0) row[DIM] = rows.top[h], row[DIM + 1] = total;
#pragma unroll
    for (int t = 0; t < COLUMNS; t++)
#pragma unroll
      for (int e = 0; e < 2; e++) row[t / 8 * 64 + (lane % 4 * 2 + e) * 8 + t % 8] = rows.out[t][h * 2 + e];
  }
  __syncthreads();
  const size_t pair = (size_t)block * KV_HEADS + head;
  float* own = partial + (pair * gridDim.x + split) * ROWS * ROW;
  for (int i = threadIdx.x; i < ROWS * DIM; i += WARPS * 32) {
    const int row = i / DIM, d = i % DIM;
    const Merged merged = merge(sums + row * ROW, d, WARPS, STORED * ROW);
    if (splits == 1) {
      write(out, tokens + begin, head, row, d, merged);
    } else {
      own[row * ROW + d] = merged.sum;
      if (d == 0) own[row * ROW + DIM] = merged.top, own[row * ROW + DIM + 1] = merged.total;
    }
  }
  if (splits == 1) return;
  fence_device();
  __syncthreads();
  if (threadIdx.x == 0) place = count_up(arrived + pair);
  __syncthreads();
  if (place != splits - 1) return;
  if (threadIdx.x == 0) arrived[pair] = 0;  // for the next launch
  fence_device();
  own = partial + pair * gridDim.x * ROWS * ROW;
  for (int i = threadIdx.x; i < ROWS * DIM; i += WARPS * 32)
    write(out, tokens + begin, head, i / DIM, i % DIM, merge(own + i / DIM * ROW, i % DIM, splits, ROWS * ROW));
}
