// Weights of 8, 6, 5, 4, 3 or 2 bits as kernels/mixed.py lays them out, made fp16 in registers.
#pragma once
#include "ptx.cuh"

// A lane's BITS words for a tile of 16 rows and a step of 64 columns, which begins at `from`.
template <int BITS> INLINE void read_words(u32* words, const u32* from, int lane) {
#pragma unroll
  for (int i = 0; i < BITS / 4; i++) {
    const uint4 four = load_once((const uint4*)from + i * 32 + lane);
    words[i * 4] = four.x, words[i * 4 + 1] = four.y, words[i * 4 + 2] = four.z, words[i * 4 + 3] = four.w;
  }
  if (BITS & 2) {
    const uint2 two = load_once((const uint2*)(from + BITS / 4 * 128) + lane);
    words[BITS / 4 * 4] = two.x, words[BITS / 4 * 4 + 1] = two.y;
  }
  if (BITS & 1) words[BITS - 1] = from[(BITS - 1) * 32 + lane];
}

INLINE u32 in_both(int mask) { return (u32)mask << 16 | (u32)mask; }

// Pair i = 4 j + 2 p + h has row l/4 + 8 h, columns 16 (l%4) + 4 j + 2 p + {0, 1}. Its lowest bits are read where they
// are, at bit `position` of both halves after a shift by whole bytes: under the exponent of base(i) they count as ones.
template <int BITS> struct Pair {
  static constexpr int LOW = BITS == 8 ? 8 : BITS >= 4 ? 4 : 2, HIGH = BITS - LOW;
  static INLINE int position(int i) { return i * LOW % 8; }
  static INLINE u32 base(int i) { return in_both(0x6400 - (position(i) << 10)); }

  static INLINE u32 read(const u32* words, int i) {  // base(i) + q
    const int at = position(i);
    u32 pair = words[i * LOW / 16] >> (i * LOW % 16 & 8) & in_both((1 << LOW) - 1 << at) | base(i);
    if (HIGH) {
      const int shift = i * HIGH % 16 - LOW - at;
      const u32 word = words[LOW + i * HIGH / 16], moved = shift < 0 ? word << -shift : word >> shift;
      pair |= moved & in_both((1 << HIGH) - 1 << LOW + at);
    }
    return pair;
  }
};

struct Levels {  // scale and negative zero point of rows r and r + 8, each in both halves of a word
  u32 scale[2], zero[2];
};

INLINE Levels read_levels(u32 scales, u32 zeros) {
  Levels levels;
  levels.scale[0] = permute(scales, 0, 0x1010), levels.scale[1] = permute(scales, 0, 0x3232);
  if (ZEROS) levels.zero[0] = permute(zeros, 0, 0x1010), levels.zero[1] = permute(zeros, 0, 0x3232);
  return levels;
}

// The differences are exact and the product is rounded once.
template <int BITS> INLINE u32 dequantise_pair(const u32* words, const Levels& levels, int i) {
  const int middle = 1 << BITS - 1 + Pair<BITS>::position(i);
  const u32 base = Pair<BITS>::base(i);
  const u32 zero = ZEROS ? subtract_halves(base, levels.zero[i & 1]) : base + in_both(middle);
  return multiply_halves(subtract_halves(Pair<BITS>::read(words, i), zero), levels.scale[i & 1]);
}

// Where the columns of one width begin in a row of tiles: steps, words of a lane, groups.
struct Place {
  int step, words, group;

  // `layout`: the step after the last of this width times 32, and the binary logarithm of its columns in a group.
  template <int BITS> INLINE void pass(int layout) {
    const int count = (layout >> 5) - step, shift = layout & 31;
    step += count, words += count * BITS, group += (count * 64 + (1 << shift) - 1) >> shift;
  }
};
