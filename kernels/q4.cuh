// Weights of 4 bits as kernels/q4.py lays them out, 16 rows by 16 columns a word of each lane, made fp16 in registers.
#pragma once
#include "ptx.cuh"

struct Levels {  // scale and zero point of rows r and r + 8, each in both halves of a word
  u32 scale[2], zero[2];
};

// A number n in the low 4 bits of a half is the subnormal n * 2^-24, in the next 4 bits n * 2^-20, so the scales carry
// 2^24 and 2^20. The product is rounded once, also with a zero point: -8 scale is exact, and so is n - zero.
INLINE Levels read_levels(u32 scales, u32 zeros) {
  Levels levels;
#if ZEROS
  const u32 zero = zeros;
#else
  const u32 zero = multiply_halves(scales, 0x80808008u);  // -2^-21 and -2^-17
#endif
  levels.scale[0] = permute(scales, 0, 0x1010), levels.scale[1] = permute(scales, 0, 0x3232);
  levels.zero[0] = permute(zero, 0, 0x1010), levels.zero[1] = permute(zero, 0, 0x3232);
  return levels;
}

INLINE u32 dequantise_pair(u32 numbers, const Levels& levels, int row) {
#if ZEROS
  return multiply_halves(subtract_halves(numbers, levels.zero[row]), levels.scale[row]);
#else
  return fma_halves(numbers, levels.scale[row], levels.zero[row]);
#endif
}

// A lane's word to its operand A of the tensor cores.
INLINE void dequantise(u32 word, const Levels& levels, u32* a) {
  a[0] = dequantise_pair(word & 0x000f000fu, levels, 0);
  a[1] = dequantise_pair(word & 0x00f000f0u, levels, 1);
  a[2] = dequantise_pair(word >> 8 & 0x000f000fu, levels, 0);
  a[3] = dequantise_pair(word >> 8 & 0x00f000f0u, levels, 1);
}

INLINE u32 word_of(const uint4& four, int i) { return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w; }
