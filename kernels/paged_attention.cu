// Causal attention of tiles of queries over a paged cache (kernels/attention.py), head size DIM, 64 or 128. A block has
// QUERIES queries of a tile with the GROUP heads that share a head of the cache, as columns of products, and SPLIT keys;
// its warps take blocks of 16 keys in turn. Warps, then splits, are merged in their order, by the block that ends last,
// so that a row's bits depend on its own sequence alone. Queries of a rotated cache are rotated, and so is the result.
#include "paged_cache.cuh"

constexpr int ROWS = QUERIES * GROUP, HALVES = ROWS > 8 ? 2 : 1, ROW = DIM + 2;
constexpr int STEPS = DIM / 16;
constexpr float NOTHING = -1e30f;  // a maximum over no keys; finite, so that differences are
using Key = Numbers<K_BITS, 4>;
using Value = Numbers<V_BITS, 8>;

INLINE u32 pack(float low, float high) { return POOL_BFLOAT ? pack_bfloat(low, high) : pack_half(low, high); }
INLINE void multiply(float* d, const u32* a, u32 b0, u32 b1) {
  if (POOL_BFLOAT)
    multiply_16x8x16_bfloat(d, a, b0, b1);
  else
    multiply_16x8x16(d, a, b0, b1);
}

struct Pools {
  const unsigned char *k, *v, *k_scales, *v_scales;
};
struct Rows {  // columns 2 t and 2 t + 1 of a half, for lane 4 g + t
  float top[HALVES][2], total[HALVES][2], out[HALVES][STEPS][4];
  u32 queries[HALVES][STEPS][2];
  int last[HALVES][2];  // position of the query
};
struct Block {  // of 16 keys: rows g and g + 8 of K, rows 2 t, 2 t + 1 and 8 more of V
  Key keys[2];
  Value values[4];
};

// Queries of the block, of the type of products, to shared memory.
INLINE void stage_queries(u16* staged, const u16* q, const long long* tokens, int first, int lane) {
  for (int i = threadIdx.x; i < ROWS * DIM; i += WARPS * 32) {
    const int row = i / DIM, d = in_order(i % DIM);
    float x = widen(q[((size_t)tokens[row / GROUP] * HEADS + first + row % GROUP) * DIM + d]);
    if (CODES) x = rotate(x, lane) * (1.f / 32);
    staged[row * DIM + d] = (u16)pack(x, 0);
  }
}

INLINE void begin_rows(Rows& rows, const u16* staged, const long long* positions, int lane) {
#pragma unroll
  for (int h = 0; h < HALVES; h++) {
    const int row = h * 8 + lane / 4;
#pragma unroll
    for (int j = 0; j < STEPS; j++)
#pragma unroll
      for (int p = 0; p < 2; p++) {
        const u16* from = staged + row * DIM;
        const int x = j * 2 + p, one = Key::number(x, lane % 4, 0), two = Key::number(x, lane % 4, 1);
        rows.queries[h][j][p] = row < ROWS ? from[one] | (u32)from[two] << 16 : 0;
      }
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int column = h * 8 + lane % 4 * 2 + e;
      rows.last[h][e] = column < ROWS ? (int)positions[column / GROUP] : 0;
      rows.top[h][e] = NOTHING, rows.total[h][e] = 0;
    }
#pragma unroll
    for (int u = 0; u < STEPS; u++)
#pragma unroll
      for (int e = 0; e < 4; e++) rows.out[h][u][e] = 0;
  }
}

INLINE void load_keys(Block& block, const Pools& pools, size_t row, int lane) {
#pragma unroll
  for (int n = 0; n < 2; n++) block.keys[n].load(pools.k, pools.k_scales, row + n * 8 + lane / 4, lane % 4);
}
INLINE void load_values(Block& block, const Pools& pools, size_t row, int lane) {
#pragma unroll
  for (int e = 0; e < 4; e++)
    block.values[e].load(pools.v, pools.v_scales, row + lane % 4 * 2 + (e & 1) + (e >> 1) * 8, lane / 4);
}

// scores: keys g and g + 8, columns 2 t and 2 t + 1.
INLINE void score(float (&scores)[HALVES][4], const Rows& rows, const Block& block, int lane) {
#pragma unroll
  for (int j = 0; j < STEPS; j++) {
    u32 keys[4];
#pragma unroll
    for (int i = 0; i < 4; i++) keys[i] = block.keys[i & 1].pair(j * 2 + (i >> 1), lane % 4);
#pragma unroll
    for (int h = 0; h < HALVES; h++) multiply(scores[h], keys, rows.queries[h][j][0], rows.queries[h][j][1]);
  }
}

// Scores times `inner`, or outer tanh(inner score), are in powers of two; weights is the operand that they give.
INLINE void weigh(u32 (&weights)[2], float* scores, Rows& rows, int h, int key, int window, float inner, float outer, int lane) {
#pragma unroll
  for (int e = 0; e < 2; e++) {
    float top = rows.top[h][e];
#pragma unroll
    for (int n = 0; n < 2; n++) {
      float& each = scores[n * 2 + e];
      const int before = rows.last[h][e] - (key + n * 8 + lane / 4);
      each = outer ? tanhf(each * inner) * outer : each * inner;
      if (before < 0 || before >= window) each = NOTHING;
      top = fmaxf(top, each);
    }
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, lanes));
    const float kept = exp2_fast(rows.top[h][e] - top);
    scores[e] = exp2_fast(scores[e] - top), scores[2 + e] = exp2_fast(scores[2 + e] - top);
    rows.top[h][e] = top, rows.total[h][e] = rows.total[h][e] * kept + scores[e] + scores[2 + e];
#pragma unroll
    for (int u = 0; u < STEPS; u++) rows.out[h][u][e] *= kept, rows.out[h][u][2 + e] *= kept;
  }
  weights[0] = transpose_8x8(pack(scores[0], scores[1])), weights[1] = transpose_8x8(pack(scores[2], scores[3]));
}

INLINE void add_values(Rows& rows, const Block& block, const u32 (&weights)[HALVES][2], int lane) {
#pragma unroll
  for (int u = 0; u < STEPS; u++) {
    u32 pairs[4], values[4];
#pragma unroll
    for (int e = 0; e < 4; e++) pairs[e] = block.values[e].pair(u, lane / 4);
#pragma unroll
    for (int i = 0; i < 4; i++)
      values[i] = permute(pairs[i & 2], pairs[(i & 2) + 1], i & 1 ? 0x7632 : 0x5410);
#pragma unroll
    for (int h = 0; h < HALVES; h++) multiply(rows.out[h][u], values, weights[h][0], weights[h][1]);
  }
}

// A row's number d from the sums of `parts` parts, `stride` floats apart: each DIM numbers, their top and their total.
struct Merged {
  float sum, top, total;
};
INLINE Merged merge(const volatile float* row, int d, int parts, size_t stride) {
  Merged merged = {0, NOTHING, 0};
#pragma unroll 4
  for (int i = 0; i < parts; i++) {
    const float sum = row[i * stride + d], its_top = row[i * stride + DIM], total = row[i * stride + DIM + 1];
    const float top = fmaxf(merged.top, its_top), kept = exp2_fast(merged.top - top), taken = exp2_fast(its_top - top);
    merged = {merged.sum * kept + sum * taken, top, merged.total * kept + total * taken};
  }
  return merged;
}

INLINE void write(u16* out, const long long* tokens, int head, int row, int d, const Merged& merged, int lane) {
  const size_t at = (size_t)tokens[row / GROUP] * HEADS + head * GROUP + row % GROUP;
  float x = merged.sum / merged.total;
  if (CODES) x = rotate(x, lane) * (1.f / 32);
  out[at * DIM + d] = (u16)narrow(x, 0);
}

INLINE void store_rows(float* sums, const Rows& rows, int lane) {
#pragma unroll
  for (int h = 0; h < HALVES; h++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int column = h * 8 + lane % 4 * 2 + e;
      float *row = sums + column * ROW, total = rows.total[h][e];
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) total += __shfl_xor_sync(~0u, total, lanes);
      if (column >= ROWS) continue;
      if (lane / 4 == 0) row[DIM] = rows.top[h][e], row[DIM + 1] = total;
#pragma unroll
      for (int u = 0; u < STEPS; u++) {
        row[Value::number(u, lane / 4, 0)] = rows.out[h][u][e];
        row[Value::number(u, lane / 4, 1)] = rows.out[h][u][2 + e];
      }
    }
}

constexpr int RESIDENT = (HALVES == 2 ? 8 : DIM == 128 && !CODES ? 12 : 16) / WARPS;  // blocks of an SM, for registers

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT)
paged_attention(const u16* q, const unsigned char* k_pool, const unsigned char* v_pool,
                const unsigned char* k_scales, const unsigned char* v_scales, const long long* tokens,
                const long long* positions, const long long* table, u16* out,
                float* partial, int* arrived, int pages, int page, int window, float inner, float outer) {
  DYNAMIC_SHARED(memory);
  float* sums = (float*)memory;                         // [WARPS][ROWS][ROW]: numbers, top, total
  u16* staged = (u16*)(sums + WARPS * ROWS * ROW);    // [ROWS][DIM]
  __shared__ int place;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, split = blockIdx.x, head = blockIdx.y, block = blockIdx.z;
  const int tile = block / BLOCKS, begin = tile * STRIDE + block % BLOCKS * QUERIES;  // STRIDE queries, BLOCKS blocks
  let_next_begin();
  int deepest = 0, earliest = 1 << 30;
  for (int i = 0; i < QUERIES; i++)
    deepest = max(deepest, (int)positions[begin + i]), earliest = min(earliest, (int)positions[begin + i]);
  const int end = min(deepest + 1, (split + 1) * SPLIT), unseen = max(0, earliest - window + 1);
  const int first = unseen / SPLIT, splits = deepest / SPLIT + 1 - first;  // keys before it may have no page
  if (split < first || split > deepest / SPLIT) return;
  const Pools pools = {k_pool, v_pool, k_scales, v_scales};
  auto row_of = [&](int key) {
    return ((size_t)table[(size_t)tile * pages + key / page] * KV_HEADS + head) * page + key % page;
  };
  int key = max(split * SPLIT, unseen / (WARPS * 16) * (WARPS * 16)) + warp * 16;
  if (key + 16 <= unseen) key += WARPS * 16;
  Block keys;
  const bool early = DECODING && key + 16 <= deepest;  // the kernel before this one writes the newest key
  if (early) load_keys(keys, pools, row_of(key), lane), load_values(keys, pools, row_of(key), lane);
  wait_for_previous();
  stage_queries(staged, q, tokens + begin, head * GROUP, lane);
  if (!early && key < end) load_keys(keys, pools, row_of(key), lane), load_values(keys, pools, row_of(key), lane);
  __syncthreads();
  Rows rows;
  begin_rows(rows, staged, positions + begin, lane);
  for (; key < end; key += WARPS * 16) {
    const int next = key + WARPS * 16;
    float scores[HALVES][4] = {};
    u32 weights[HALVES][2];
    score(scores, rows, keys, lane);
    if (next < end) load_keys(keys, pools, row_of(next), lane);
#pragma unroll
    for (int h = 0; h < HALVES; h++) weigh(weights[h], scores[h], rows, h, key, window, inner, outer, lane);
    add_values(rows, keys, weights, lane);
    if (next < end) load_values(keys, pools, row_of(next), lane);
  }
  store_rows(sums + warp * ROWS * ROW, rows, lane);
  __syncthreads();
  const size_t pair = (size_t)block * KV_HEADS + head;
  float* own = partial + (pair * gridDim.x + split) * ROWS * ROW;
  for (int i = threadIdx.x; i < ROWS * DIM; i += WARPS * 32) {
    const int row = i / DIM, d = in_order(i % DIM);
    const Merged merged = merge(sums + row * ROW, d, WARPS, ROWS * ROW);
    if (splits == 1) {
      write(out, tokens + begin, head, row, d, merged, lane);
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
  own = partial + (pair * gridDim.x + first) * ROWS * ROW;
  for (int i = threadIdx.x; i < ROWS * DIM; i += WARPS * 32) {
    const int row = i / DIM, d = in_order(i % DIM);
    write(out, tokens + begin, head, row, d, merge(own + row * ROW, d, splits, ROWS * ROW), lane);
  }
}
