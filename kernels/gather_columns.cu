// out[t, c] = x[t, order[c]], numbers of 16 bits, and 0 where order[c] is negative. A thread makes eight columns.
#include "ptx.cuh"

extern "C" __global__ void __launch_bounds__(128)
gather_columns(const u16* x, const uint4* __restrict__ order, uint4* out, int K, int columns) {
  const int at = blockIdx.x * 128 + threadIdx.x;
  let_next_begin();
  if (at * 8 >= columns) return;
  const uint4 a = order[at * 2], b = order[at * 2 + 1];
  const u16* row = x + (size_t)blockIdx.y * K;
  const auto pair = [&](u32 i, u32 j) { return ((int)i < 0 ? 0u : row[i]) | ((int)j < 0 ? 0u : (u32)row[j] << 16); };
  wait_for_previous();
  out[(size_t)blockIdx.y * (columns / 8) + at] = make_uint4(pair(a.x, a.y), pair(a.z, a.w), pair(b.x, b.y), pair(b.z, b.w));
}
