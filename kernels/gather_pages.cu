// Pages of the pools [.., HEADS, page, DIM] of K and V in order: [HEADS, all tokens, DIM], in the type of activations.
// Pools are of fp16 or bf16 (BITS 16), or of codes of 8 or 4 bits with scales, which are rotated back (kernels/pool.py).
#include "rotate.cuh"

// Numbers i and i + 1 of a row; all lanes of the warp have some.
template <int BITS> INLINE u32 pair_of(const unsigned char* pool, const u16* scales, size_t row, int i, int lane) {
  const size_t at = (row * DIM + i) / 2;
  if constexpr (BITS == 16) {
    const u32 pair = ((const u32*)pool)[at];
    if (POOL_BFLOAT == BFLOAT) return pair;
    return POOL_BFLOAT ? narrow(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000))
                       : narrow(half_to_float((u16)pair), half_to_float((u16)(pair >> 16)));
  } else {
    const u32 scale = scales[(row * DIM + i) / 32];
    u32 codes;
    if constexpr (BITS == 8) codes = permute(((const u16*)pool)[at], 0x6464, 0x4140);
    if constexpr (BITS == 4) codes = (pool[at] & 15) | (u32)(pool[at] >> 4) << 16 | 0x64006400;
    codes = subtract_halves(codes, BITS == 8 ? 0x64806480 : 0x64086408);
    const u32 rotated = multiply_halves(rotate(multiply_halves(codes, scale | scale << 16), lane), 0x28002800);
    return narrow(finite(half_to_float((u16)rotated), 65504.f), finite(half_to_float((u16)(rotated >> 16)), 65504.f));
  }
}

template <int BITS>
INLINE void gather(u16* out, const unsigned char* pool, const u16* scales, size_t from, size_t to, int rows) {
  const int lane = threadIdx.x & 31;
#pragma unroll 4
  for (int row = threadIdx.x / 32; row < rows; row += WARPS)
    for (int i = lane * 2; i < DIM; i += 64)
      *(u32*)(out + (to + row) * DIM + i) = pair_of<BITS>(pool, scales, from + row, i, lane);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
gather_pages(const unsigned char* k_pool, const unsigned char* v_pool, const u16* k_scales, const u16* v_scales,
             const long long* pages, u16* k, u16* v, int page) {
  const int part = blockIdx.x % SHARES, index = blockIdx.x / SHARES, head = blockIdx.y, rows = page / SHARES;
  let_next_begin();
  wait_for_previous();
  const size_t from = ((size_t)pages[index] * HEADS + head) * page + part * rows;
  const size_t to = (size_t)head * (gridDim.x / SHARES) * page + index * page + part * rows;
  if (blockIdx.z)
    gather<V_BITS>(v, v_pool, v_scales, from, to, rows);
  else
    gather<K_BITS>(k, k_pool, k_scales, from, to, rows);
}
