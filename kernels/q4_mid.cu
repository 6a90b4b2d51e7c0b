// y = W x + bias for batches of TOKENS tokens, W of 4 bits (see q4.cuh): wgmma with W, made fp16 in registers, as
// operand A, and x, as image.cuh lays it out, in shared memory. A block has WARPGROUPS times 64 rows of W and one of
// SPLITS parts of K; with several parts it writes fp32 [SPLITS, M, rows] for sum_partials, so no bits hang on timing.
// One warp copies ahead into a ring of STAGES steps of 128 columns, the warpgroups compute.
#include "q4.cuh"

constexpr int ROWS = WARPGROUPS * 64, BLOCK_BYTES = 4096, TOKEN_BYTES = TOKENS * 256;
constexpr int STAGE = TOKEN_BYTES + WARPGROUPS * BLOCK_BYTES, CONSUMERS = WARPGROUPS * 128, TILES = WARPGROUPS * 4;

struct Part {  // of the work: blocks of 64 rows, steps of 128 columns, groups
  int block, begin, steps, all_steps, group, groups, all_groups;
};

struct Shared {
  shared_t ring, full, empty, levels_full, scales, zeros;
  INLINE explicit Shared(const void* memory, const Part& part) {
    ring = shared_address(memory), full = ring + STAGES * STAGE, empty = full + 8 * STAGES;
    levels_full = empty + 8 * STAGES, scales = full + 256, zeros = scales + TILES * part.groups * 32;
  }
};

INLINE void produce(const Shared& shared, const Part& part, const char* weights, const char* scales, const char* zeros,
                    const char* x, int padded) {
  auto copy_weights = [&](int step, int stage) {
    barrier_expect(shared.full + 8 * stage, STAGE);
#pragma unroll
    for (int g = 0; g < WARPGROUPS; g++)
      copy_bulk(shared.ring + stage * STAGE + TOKEN_BYTES + g * BLOCK_BYTES,
                weights + ((size_t)(part.block + g) * part.all_steps + part.begin + step) * BLOCK_BYTES, BLOCK_BYTES,
                shared.full + 8 * stage);
  };
  auto copy_tokens = [&](int step, int stage) {
#pragma unroll
    for (int half = 0; half < 2; half++)
      copy_bulk(shared.ring + stage * STAGE + half * TOKENS * 128,
                x + ((size_t)(part.begin + step) * 2 + half) * padded * 128, TOKENS * 128, shared.full + 8 * stage);
  };
  const int ahead = min(part.steps, STAGES), bytes = part.groups * 32;
  for (int i = 0; i < ahead; i++) copy_weights(i, i);
  barrier_expect(shared.levels_full, TILES * bytes * (1 + ZEROS));
  for (int t = 0; t < TILES; t++) {
    const size_t from = ((size_t)(part.block * 4 + t) * part.all_groups + part.group) * 32;
    copy_bulk(shared.scales + t * bytes, scales + from, bytes, shared.levels_full);
    if (ZEROS) copy_bulk(shared.zeros + t * bytes, zeros + from, bytes, shared.levels_full);
  }
  wait_for_previous();
  for (int i = 0; i < ahead; i++) copy_tokens(i, i);
  int stage = 0;
  u32 phase = 0;
  for (int i = STAGES; i < part.steps; i++) {
    barrier_wait(shared.empty + 8 * stage, phase);
    copy_weights(i, stage), copy_tokens(i, stage);
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
}

INLINE Levels levels_of(const Shared& shared, const Part& part, int tile, int step, int half, int lane) {
  const int column = (part.begin + step) * 128 + half * 64 + (GROUP < 64 ? lane % 4 * 16 : 0);
  const int at = ((tile * part.groups + column / GROUP - part.group) * 8 + lane / 4) * 4;
  return read_levels(load_shared(shared.scales + at), ZEROS ? load_shared(shared.zeros + at) : 0);
}

INLINE void consume(const Shared& shared, const Part& part, float* sums) {
  const int tile = threadIdx.x >> 5, lane = threadIdx.x & 31;
  int stage = 0;
  u32 phase = 0, a[2][4][4];
  Levels levels;
  barrier_wait(shared.levels_full, 0);
  for (int i = 0; i < part.steps; i++) {
    barrier_wait(shared.full + 8 * stage, phase);
    const shared_t tokens = shared.ring + stage * STAGE, words = tokens + TOKEN_BYTES + tile * 1024 + lane * 16;
    const u64 described = describe(tokens);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (half == 0 || GROUP < 128) levels = levels_of(shared, part, tile, i, half, lane);
      const uint4 four = load_shared_four(words + half * 512);
#pragma unroll
      for (int j = 0; j < 4; j++) dequantise(word_of(four, j), levels, a[half][j]), warpgroup_pin(a[half][j]);
      warpgroup_fence();
#pragma unroll
      for (int j = 0; j < 4; j++)
        warpgroup_multiply<TOKENS>(sums, a[half][j], describe_after(described, half * TOKENS * 128 + j * 32),
                                   half + j + i > 0);
      warpgroup_commit();
      warpgroup_wait<1>();  // the products of the half before this one are done
      if (half == 0 && i > 0 && lane == 0) barrier_arrive(shared.empty + 8 * (stage ? stage - 1 : STAGES - 1));
    }
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
  warpgroup_wait<0>();
}

// The block's sums to y, through shared memory so that neighbours are written together.
INLINE void store(float* buffer, const float* sums, const float* factors, const u16* bias, u16* y, int first, int count,
                  int N) {
  constexpr int WIDTH = ROWS + 4;
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, token = threadIdx.x % 4 * 2;
  sync_threads(1, CONSUMERS);
#pragma unroll
  for (int i = 0; i < TOKENS / 2; i++)
    buffer[(i / 4 * 8 + token + (i & 1)) * WIDTH + row + i / 2 % 2 * 8] = sums[i] * factors[row + i / 2 % 2 * 8];
  sync_threads(1, CONSUMERS);
  for (int i = threadIdx.x; i < count * (ROWS / 4); i += CONSUMERS) {
    const int to = i / (ROWS / 4), at = i % (ROWS / 4) * 4;
    const float* from = buffer + to * WIDTH + at;
    if (first + at >= N) continue;
    float b[4] = {};
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (bias) b[e] = half_to_float(bias[first + at + e]);
    *(uint2*)(y + (size_t)to * N + first + at) =
        make_uint2(pack_half(from[0] + b[0], from[1] + b[1]), pack_half(from[2] + b[2], from[3] + b[3]));
  }
}

INLINE void store_part(float* partial, const float* sums, const float* factors, int count, int width) {
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, token = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < TOKENS / 2; i++) {
    const int to = i / 4 * 8 + token + (i & 1), at = row + i / 2 % 2 * 8;
    if (to < count) partial[(size_t)to * width + at] = sums[i] * factors[at];
  }
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 32, BLOCKS)
q4_mid(const char* __restrict__ weights, const char* __restrict__ scales, const char* __restrict__ zeros,
       const float* __restrict__ factors, const u16* __restrict__ bias, const char* x, u16* y,
       float* partial, int M, int padded, int N, int width, int K) {
  DYNAMIC_SHARED(memory);
  const int split = blockIdx.y % SPLITS, first = blockIdx.y / SPLITS * ROWS, token = blockIdx.x * TOKENS;
  const int all = K / 128, begin = all * split / SPLITS, end = all * (split + 1) / SPLITS, group = begin * 128 / GROUP;
  const Part part = {first / 64, begin, end - begin, all, group, (end * 128 - 1) / GROUP + 1 - group, K / GROUP};
  const Shared shared(memory, part);
  let_next_begin();
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) barrier_init(shared.full + 8 * s, 1), barrier_init(shared.empty + 8 * s, TILES);
    barrier_init(shared.levels_full, 1);
    fence_barriers();
  }
  __syncthreads();
  if (threadIdx.x >= CONSUMERS) {
    if (threadIdx.x == CONSUMERS) produce(shared, part, weights, scales, zeros, x + (size_t)token * 128, padded);
    return;
  }
  float sums[TOKENS / 2];
  consume(shared, part, sums);
  const int count = min(TOKENS, M - token);
  if (SPLITS == 1)
    store((float*)memory, sums, factors + first, bias, y + (size_t)token * N, first, count, N);
  else
    store_part(partial + ((size_t)split * M + token) * width + first, sums, factors + first, count, width);
}
