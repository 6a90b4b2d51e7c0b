// y [M, N] = the sum, in their order, of PARTS partial results [PARTS, M, WIDTH] of fp32, and bias.
#include "ptx.cuh"

extern "C" __global__ void __launch_bounds__(256)
sum_partials(const float* partial, const u16* __restrict__ bias, u16* y, int M, int N) {
  const int column = (blockIdx.y * 256 + threadIdx.x) * 4;
  const size_t token = blockIdx.x;
  let_next_begin();
  wait_for_previous();
  if (column >= N) return;
  float4 sum = load_fresh((const float4*)(partial + token * WIDTH + column));
#pragma unroll
  for (int p = 1; p < PARTS; p++) {
    const float4 next = load_fresh((const float4*)(partial + (p * (size_t)M + token) * WIDTH + column));
    sum.x += next.x, sum.y += next.y, sum.z += next.z, sum.w += next.w;
  }
  if (bias) {
    sum.x += half_to_float(bias[column]), sum.y += half_to_float(bias[column + 1]);
    sum.z += half_to_float(bias[column + 2]), sum.w += half_to_float(bias[column + 3]);
  }
  *(uint2*)(y + token * N + column) = make_uint2(pack_half(sum.x, sum.y), pack_half(sum.z, sum.w));
}
