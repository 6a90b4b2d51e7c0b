// out = gate * sigmoid(gate) * up; rows of WIDTH numbers, those of gate and up `stride` numbers apart.
// With IMAGE it is written in q4_mid's order too.
#include "image.cuh"
#include "number.cuh"

INLINE float silu(float x) { return x / (1.f + exp2_fast(-1.4426950408889634f * x)); }
INLINE u32 both(u32 gate, u32 up) {
  return narrow(silu(widen_low(gate)) * widen_low(up), silu(widen_high(gate)) * widen_high(up));
}

extern "C" __global__ void __launch_bounds__(THREADS)
silu_mul(const u16* gate, const u16* up, u16* out,
         u32* image, int stride, int padded) {
  const int column = (blockIdx.y * THREADS + threadIdx.x) * 8;
  let_next_begin();
  wait_for_previous();
  if (column >= WIDTH) return;
  const size_t row = blockIdx.x;
  const uint4 g = *(const uint4*)(gate + row * stride + column), u = *(const uint4*)(up + row * stride + column);
  const uint4 gated = make_uint4(both(g.x, u.x), both(g.y, u.y), both(g.z, u.z), both(g.w, u.w));
  *(uint4*)(out + row * WIDTH + column) = gated;
  if (IMAGE) put_in_image(image, padded, row, column / 8, gated);
}
