// W [rows, columns] in fp16, columns in their stored order, of weights of mixed widths (see mixed.cuh). A warp makes 16
// rows of 64 columns, a thread two rows of 16.
#include "mixed.cuh"

struct Source {
  const u32 *words, *scales, *zeros;  // of a tile
  u16* out;                           // a thread's first row
  int columns, lane, step;

  template <int BITS> INLINE void take(const Place& place, int layout) const {
    const int offset = step - place.step;
    if (offset < 0 || step >= layout >> 5) return;
    const int at = (place.group + (offset * 64 + lane % 4 * 16 >> (layout & 31))) * 8 + lane / 4;
    const Levels levels = read_levels(scales[at], ZEROS ? zeros[at] : 0);
    u32 numbers[BITS], pairs[2][8];
    read_words<BITS>(numbers, words + ((size_t)place.words + offset * BITS) * 32, lane);
#pragma unroll
    for (int i = 0; i < 16; i++) pairs[i & 1][i >> 1] = dequantise_pair<BITS>(numbers, levels, i);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      uint4* to = (uint4*)(out + (size_t)8 * h * columns + step * 64 + lane % 4 * 16);
      to[0] = make_uint4(pairs[h][0], pairs[h][1], pairs[h][2], pairs[h][3]);
      to[1] = make_uint4(pairs[h][4], pairs[h][5], pairs[h][6], pairs[h][7]);
    }
  }
};

extern "C" __global__ void __launch_bounds__(256)
mixed_dequantise(const u32* __restrict__ words, const u32* __restrict__ scales, const u32* __restrict__ zeros,
                 u16* out, int stride, int groups, int w8, int w6, int w5, int w4, int w3, int w2) {
  const int lane = threadIdx.x % 32, tile = blockIdx.y, steps = w2 >> 5, step = blockIdx.x * 8 + threadIdx.x / 32;
  const size_t level = (size_t)tile * groups * 8;
  let_next_begin();
  wait_for_previous();
  if (step >= steps) return;
  const Source source = {words + (size_t)tile * stride * 32, scales + level, ZEROS ? zeros + level : 0,
                         out + (size_t)(tile * 16 + lane / 4) * steps * 64, steps * 64, lane, step};
  Place place = {0, 0, 0};
  source.take<8>(place, w8), place.pass<8>(w8);
  source.take<6>(place, w6), place.pass<6>(w6);
  source.take<5>(place, w5), place.pass<5>(w5);
  source.take<4>(place, w4), place.pass<4>(w4);
  source.take<3>(place, w3), place.pass<3>(w3);
  source.take<2>(place, w2);
}
