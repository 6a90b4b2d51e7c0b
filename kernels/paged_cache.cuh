// Sixteen rows of K or V in a page as operands of products of 16 x 16. A row of DIM numbers has BITS for each: 16 are
// fp16 or bf16; 8 and 4 are codes of a rotated row (kernels/pool.py), with a scale of fp16 for each 32, which become
// fp16. A lane's words hold pairs 0, 1, ... of its numbers.
#pragma once
#include "number.cuh"

constexpr bool CODES = K_BITS < 16;
constexpr int PARTS = DIM / 64;  // runs that are rotated together

template <int BYTES> INLINE void load_words(u32* to, const unsigned char* from) {
  if constexpr (BYTES == 16) *(uint4*)to = load_once((const uint4*)from);
  if constexpr (BYTES == 8) *(uint2*)to = load_once((const uint2*)from);
  if constexpr (BYTES == 4) *to = load_once((const u32*)from);
}

// A lane's part of a row of K: `part` of 4; of a row of V: `part` of 8.
template <int BITS, int LANES> struct Numbers {
  static constexpr int BYTES = LANES == 8 ? BITS : BITS == 4 ? 8 : 16, LOADS = DIM * BITS / 8 / LANES / BYTES;
  alignas(16) u32 words[DIM * BITS / 32 / LANES];
  alignas(8) u32 scales[BITS < 16 ? PARTS : 2];

  INLINE void load(const unsigned char* pool, const unsigned char* scale_pool, size_t row, int part) {
#pragma unroll
    for (int i = 0; i < LOADS; i++)
      load_words<BYTES>(words + i * BYTES / 4, pool + row * (DIM * BITS / 8) + (i * LANES + part) * BYTES);
    if constexpr (BITS < 16) load_words<PARTS * 4>(scales, scale_pool + row * (PARTS * 4));
  }

  // Pair x of the lane's, in fp16 or bf16.
  INLINE u32 pair(int x, int part) const {
    if constexpr (BITS == 16) {
      return words[x];
    } else {
      u32 codes;  // 1024 more
      if constexpr (BITS == 8) codes = permute(words[x / 2], 0x64646464, x % 2 ? 0x4342 : 0x4140);
      if constexpr (BITS == 4) codes = (words[x / 4] >> x % 4 * 4 & 0x000f000f) | 0x64006400;
      const u32 scale = permute(scales[x / (LANES == 8 ? 4 : 8)], 0, part < LANES / 2 ? 0x1010 : 0x3232);
      return multiply_halves(subtract_halves(codes, BITS == 8 ? 0x64806480 : 0x64086408), scale);
    }
  }

  // Which number of the row is the first or second of pair x.
  static INLINE int number(int x, int part, int second) {
    constexpr int MORE = BITS == 4 ? 4 : 1, EACH = DIM / LANES / LOADS;  // numbers of a load
    const int pair = x % (EACH / 2), within = BITS == 4 ? pair / 4 * 8 + pair % 4 : pair * 2;
    return (x / (EACH / 2) * LANES + part) * EACH + within + second * MORE;
  }
};

// Number i of a row so that warps hold what is rotated together, a number for each lane.
INLINE int in_order(int i) { return CODES ? i / 64 * 64 + i % 32 * 2 + i / 32 % 2 : i; }

// The rotation of a warp's numbers, which is its own inverse.
INLINE float rotate(float x, int lane) {
#pragma unroll
  for (int stride = 1; stride < 32; stride *= 2) {
    const float other = __shfl_xor_sync(~0u, x, stride);
    x = lane & stride ? other - x : x + other;
  }
  return x;
}
