// The image (see image.cuh) of x [T, K], whose columns are taken in `order` where there is one.
#include "image.cuh"

extern "C" __global__ void __launch_bounds__(128)
q4_arrange(const u16* x, const long long* __restrict__ order, u32* image, int T, int padded,
           int K) {
  const int eight = blockIdx.x * 8 + threadIdx.x % 8, token = blockIdx.y * 16 + threadIdx.x / 8;
  let_next_begin();
  wait_for_previous();
  if (token >= T) return;
  const u16* row = x + (size_t)token * K;
  uint4 pairs;
  if (order) {
    auto pair = [&](int i) { return row[order[eight * 8 + i]] | (u32)row[order[eight * 8 + i + 1]] << 16; };
    pairs = make_uint4(pair(0), pair(2), pair(4), pair(6));
  } else {
    pairs = *(const uint4*)(row + eight * 8);
  }
  put_in_image(image, padded, token, eight, pairs);
}
