// One warp for each head of a token: q and k turned (2 TURNED of DIM numbers, halves paired), q to its place, k and v
// into their page of a pool [pages, KV_HEADS, page, DIM], made finite: of fp16 or bf16 (BITS 16), or as codes of 8 or 4
// bits with scales (kernels/pool.py). Rows of q, k, v are `stride` apart.
#include "rotate.cuh"

// Numbers i and i + 1 of a head, i even, turned and rounded; `turn` false for v.
INLINE u32 turned_pair(const u16* head, const float* cosine, const float* sine, int i, bool turn) {
  if (!turn || i >= 2 * TURNED) return *(const u32*)(head + i);
  const bool high = i >= TURNED;
  const int at = high ? i - TURNED : i;
  float out[2];
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const float a = widen(head[at + e]), b = widen(head[at + TURNED + e]), c = cosine[at + e], s = sine[at + e];
    out[e] = high ? b * c + a * s : a * c - b * s;
  }
  return narrow(out[0], out[1]);
}

// A code of a number among those whose magnitudes reach `largest`, rounded to fp16 at each step.
template <int BITS> INLINE u32 code_of(float x, float largest) {
  constexpr float HALF = 1 << (BITS - 1);
  const float share = largest > 0 ? half_to_float((u16)pack_half(x / largest, 0)) : -1.f;
  return (u32)fminf(fmaxf(rintf(half_to_float((u16)pack_half(share * HALF + HALF, 0))), 0.f), 2 * HALF - 1);
}

INLINE u32 finite_halves(u32 pair, float bound) {
  return pack_half(finite(widen_low(pair), bound), finite(widen_high(pair), bound));
}

// Numbers i and i + 1 of a row of a pool; all lanes of the warp have some.
template <int BITS> INLINE void keep(unsigned char* pool, u16* scales, size_t row, int i, u32 pair, int lane) {
  if constexpr (BITS == 16) {
    const float low = finite(widen_low(pair), 65504.f), high = finite(widen_high(pair), 65504.f);
    ((u32*)pool)[(row * DIM + i) / 2] = POOL_BFLOAT ? pack_bfloat(low, high) : pack_half(low, high);
  } else {
    const u32 rotated = rotate(finite_halves(pair, 2047.f), lane);
    const float low = half_to_float((u16)rotated), high = half_to_float((u16)(rotated >> 16));
    float largest = fmaxf(fabsf(low), fabsf(high));
#pragma unroll
    for (int lanes = 1; lanes < 16; lanes *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
    const u32 codes = code_of<BITS>(low, largest) | code_of<BITS>(high, largest) << BITS;
    const size_t at = (row * DIM + i) / 2;
    if constexpr (BITS == 8) ((u16*)pool)[at] = (u16)codes;
    if constexpr (BITS == 4) pool[at] = (unsigned char)codes;
    if (i % 32 == 0) scales[(row * DIM + i) / 32] = (u16)pack_half(largest / (1 << (BITS - 1)), 0);
  }
}

extern "C" __global__ void __launch_bounds__(32)
rope_append(const u16* q, const u16* k, const u16* v,
            const float* cosine, const float* sine, const long long* pages,
            const long long* offsets, u16* out, unsigned char* k_pool,
            unsigned char* v_pool, u16* k_scales, u16* v_scales, int page,
            int q_stride, int k_stride, int v_stride) {
  const size_t token = blockIdx.x;
  const int head = blockIdx.y, kv = head - HEADS, values = kv >= KV_HEADS, kv_head = values ? kv - KV_HEADS : kv;
  const int lane = threadIdx.x;
  let_next_begin();
  wait_for_previous();
  const float *c = cosine + token * TURNED, *s = sine + token * TURNED;
  const u16* from = kv < 0 ? q + token * q_stride + head * DIM
                           : (values ? v + token * v_stride : k + token * k_stride) + kv_head * DIM;
  const size_t row = kv < 0 ? 0 : ((size_t)pages[token] * KV_HEADS + kv_head) * page + offsets[token];
  for (int i = lane * 2; i < DIM; i += 64) {
    const u32 pair = turned_pair(from, c, s, i, !values);
    if (kv < 0)
      *(u32*)(out + (token * HEADS + head) * DIM + i) = pair;
    else if (values)
      keep<V_BITS>(v_pool, v_scales, row, i, pair, lane);
    else
      keep<K_BITS>(k_pool, k_scales, row, i, pair, lane);
  }
}
