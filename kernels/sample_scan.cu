// Of CHUNK logits of a row: the highest (rank above, the complement of its id below, so the lowest of equals) and the
// sum of the masses towards it, which greedy rows do not need. One block for each chunk of each row.
#include "sample.cuh"

constexpr int THREADS = 256, EACH = CHUNK / THREADS / STRIP, WARPS = THREADS / 32;

extern "C" __global__ void __launch_bounds__(THREADS)
sample_scan(const void* logits, const Row* rows, u64* highest,
            u64* sums, int V, int vocab_size) {
  __shared__ u64 of_warp[2][WARPS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = blockIdx.y * gridDim.x + blockIdx.x;
  let_next_begin();
  wait_for_previous();
  const Row row = rows[blockIdx.y];
  float value[EACH][STRIP], top = MINUS_INFINITY;
  int id = blockIdx.x * CHUNK + threadIdx.x * STRIP;
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const int first = blockIdx.x * CHUNK + (e * THREADS + threadIdx.x) * STRIP;
    load_strip(value[e], logits, blockIdx.y * (size_t)V, first, vocab_size, row);
  }
#pragma unroll
  for (int e = 0; e < EACH; e++)
#pragma unroll
    for (int i = 0; i < STRIP; i++)
      if (value[e][i] > top || value[e][i] != value[e][i])
        top = value[e][i], id = blockIdx.x * CHUNK + (e * THREADS + threadIdx.x) * STRIP + i;
  u64 best = highest_of_warp((u64)rank_of(top) << 32 | ~(u32)id);
  if (lane == 0) of_warp[0][warp] = best;
  __syncthreads();
  best = of_warp[0][0];
#pragma unroll
  for (int w = 1; w < WARPS; w++) best = max(best, of_warp[0][w]);
  if (threadIdx.x == 0) highest[part] = best;
  if (row.temperature <= 0) return;
  const float sharp = sharpness(row);
  top = value_of(best >> 32);
  u64 sum = 0;
#pragma unroll
  for (int e = 0; e < EACH; e++)
#pragma unroll
    for (int i = 0; i < STRIP; i++) sum += mass(value[e][i], top, sharp);
  sum = sum_up_to_lane(sum);
  if (lane == 31) of_warp[1][warp] = sum;
  __syncthreads();
  if (threadIdx.x) return;
  sum = 0;
#pragma unroll
  for (int w = 0; w < WARPS; w++) sum += of_warp[1][w];
  sums[part] = sum;
}
