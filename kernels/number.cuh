// Activations are fp16, or bf16 where BFLOAT is 1: read as fp32 and rounded once when written.
#pragma once
#include "ptx.cuh"

INLINE float widen(u16 h) { return BFLOAT ? __uint_as_float((u32)h << 16) : half_to_float(h); }
INLINE float widen_low(u32 pair) { return widen((u16)pair); }
INLINE float widen_high(u32 pair) { return widen((u16)(pair >> 16)); }
INLINE u32 narrow(float low, float high) { return BFLOAT ? pack_bfloat(low, high) : pack_half(low, high); }
