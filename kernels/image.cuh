// Activations [T, K] in fp16 as q4_mid reads them: [K / 64][padded T][64], the columns of 64 in the order of the weights'
// operand A, and 16 bytes of them at a place that hangs on the token (the swizzle of 128 bytes).
#pragma once
#include "ptx.cuh"

// Columns 8 `eight` to 8 `eight` + 7 of a token.
INLINE void put_in_image(u32* image, int padded, int token, int eight, const uint4& pairs) {
  u32* to = image + ((size_t)(eight / 8) * padded + token) * 32 + eight % 8 / 2;
  const int chunk = eight % 2 * 4, turn = token & 7;
  to[(chunk ^ turn) * 4] = pairs.x, to[(chunk + 1 ^ turn) * 4] = pairs.y;
  to[(chunk + 2 ^ turn) * 4] = pairs.z, to[(chunk + 3 ^ turn) * 4] = pairs.w;
}
