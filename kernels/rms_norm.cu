// One block for each row of WIDTH numbers: sum = x + residual where there is one, y = sum / sqrt(mean(sum^2) + eps) * w.
// Rounded as kernels/rms_norm.py does it: the sum, the quotient, the product. With PARTS x is the sum of so many parts
// [PARTS, rows, stride] of fp32, in their order, and bias; with IMAGE y is written in q4_mid's order too.
#include "image.cuh"
#include "number.cuh"

constexpr int FOURS = WIDTH / 8, EACH = (FOURS + THREADS - 1) / THREADS, WARPS = THREADS / 32;

INLINE float sum_of_block(float value) {  // in an order that hangs on THREADS alone
  __shared__ float warps[WARPS];
#pragma unroll
  for (int mask = 16; mask; mask >>= 1) value += __shfl_xor_sync(~0u, value, mask);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
#pragma unroll
  for (int w = 0; w < WARPS; w++) value += warps[w];
  return value;
}

INLINE u32 add(u32 a, u32 b) { return narrow(widen_low(a) + widen_low(b), widen_high(a) + widen_high(b)); }
INLINE float square(u32 pair) { return widen_low(pair) * widen_low(pair) + widen_high(pair) * widen_high(pair); }
INLINE u32 scale(u32 pair, float factor, u32 weight) {
  const u32 quotient = narrow(widen_low(pair) * factor, widen_high(pair) * factor);
  return narrow(widen_low(quotient) * widen_low(weight), widen_high(quotient) * widen_high(weight));
}

INLINE void add_numbers(float* sum, const float* from) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const float4 next = load_fresh((const float4*)(from + i));
    sum[i] += next.x, sum[i + 1] += next.y, sum[i + 2] += next.z, sum[i + 3] += next.w;
  }
}

// Eight numbers of x.
INLINE uint4 read(const void* x, const u16* bias, size_t row, int i, int stride) {
  if (PARTS == 0) return ((const uint4*)x)[row * FOURS + i];
  float sum[8] = {};
#pragma unroll
  for (int p = 0; p < PARTS; p++) add_numbers(sum, (const float*)x + (p * (size_t)gridDim.x + row) * stride + i * 8);
#pragma unroll
  for (int e = 0; e < 8; e++)
    if (bias) sum[e] += widen(bias[i * 8 + e]);
  return make_uint4(narrow(sum[0], sum[1]), narrow(sum[2], sum[3]), narrow(sum[4], sum[5]), narrow(sum[6], sum[7]));
}

extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm(const void* x, const u16* __restrict__ bias, const uint4* residual,
         const uint4* __restrict__ weight, uint4* sum, uint4* y, u32* image,
         int stride, int padded, float eps) {
  const size_t row = (size_t)blockIdx.x * FOURS;
  let_next_begin();
  wait_for_previous();
  uint4 own[EACH];
  float squares = 0;
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const int i = e * THREADS + threadIdx.x;
    if (i >= FOURS) break;
    own[e] = read(x, bias, blockIdx.x, i, stride);
    if (residual) {
      const uint4 r = residual[row + i];
      own[e] = make_uint4(add(own[e].x, r.x), add(own[e].y, r.y), add(own[e].z, r.z), add(own[e].w, r.w));
      sum[row + i] = own[e];
    }
    squares += square(own[e].x) + square(own[e].y) + square(own[e].z) + square(own[e].w);
  }
  const float factor = 1.f / sqrtf(sum_of_block(squares) / WIDTH + eps);
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const int i = e * THREADS + threadIdx.x;
    if (i >= FOURS) break;
    const uint4 w = weight[i];
    const uint4 normal = make_uint4(scale(own[e].x, factor, w.x), scale(own[e].y, factor, w.y),
                                    scale(own[e].z, factor, w.z), scale(own[e].w, factor, w.w));
    y[row + i] = normal;
    if (IMAGE) put_in_image(image, padded, blockIdx.x, i, normal);
  }
}
