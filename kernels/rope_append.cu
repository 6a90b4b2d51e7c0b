// One warp for each head of a token: q and k turned (2 TURNED of DIM numbers, halves paired), q to its place, k and v
// into their page of a pool [pages, KV_HEADS, page, DIM] of fp16, made finite. Rows of q, k, v are `stride` apart.
#include "number.cuh"

INLINE float finite(float x) { return x != x ? 0.f : fminf(fmaxf(x, -65504.f), 65504.f); }

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

extern "C" __global__ void __launch_bounds__(32)
rope_append(const u16* __restrict__ q, const u16* __restrict__ k, const u16* __restrict__ v,
            const float* __restrict__ cosine, const float* __restrict__ sine, const long long* __restrict__ pages,
            const long long* __restrict__ offsets, u16* __restrict__ out, u16* __restrict__ k_pool,
            u16* __restrict__ v_pool, int page, int q_stride, int k_stride, int v_stride) {
  const size_t token = blockIdx.x;
  const int head = blockIdx.y, kv = head - HEADS, values = kv >= KV_HEADS, kv_head = values ? kv - KV_HEADS : kv;
  let_next_begin();
  wait_for_previous();
  const float *c = cosine + token * TURNED, *s = sine + token * TURNED;
  const u16* from = kv < 0 ? q + token * q_stride + head * DIM
                           : (values ? v + token * v_stride : k + token * k_stride) + kv_head * DIM;
  for (int i = threadIdx.x * 2; i < DIM; i += 64) {
    const u32 pair = turned_pair(from, c, s, i, !values);
    if (kv < 0) {
      *(u32*)(out + (token * HEADS + head) * DIM + i) = pair;
    } else {
      const size_t at = (((size_t)pages[token] * KV_HEADS + kv_head) * page + offsets[token]) * DIM + i;
      *(u32*)((values ? v_pool : k_pool) + at) = pack_half(finite(widen_low(pair)), finite(widen_high(pair)));
    }
  }
}
