// The token of a row, one block each: from what sample_scan found and, with filters, from the row in few passes.
// A place orders the tokens, the likeliest first and the lower id of equals: all filters but min_p keep those up to one.
#include "sample.cuh"

constexpr int THREADS = 1024, DIGIT = 8, BINS = 1 << DIGIT, LISTED = 4096;
constexpr int NEAR = 14, FAR = 41;  // halvings of the top mass: most filters cut above NEAR; from FAR on a mass is 0

__shared__ u32 low_of[BINS], high_of[BINS];  // sums of 64 bits
__shared__ u64 of_warp[THREADS / 32];
__shared__ float listed_value[LISTED];
__shared__ int listed_id[LISTED];
__shared__ int found_bin;
__shared__ u64 found_before;
__shared__ Row row;

INLINE u64 place_of(float value, int id) { return (u64)~rank_of(value) << 24 | (u32)id; }

__shared__ struct {  // of the row only logits from `least` on matter, so many as there are candidates
  const void* logits;
  size_t start;
  int count;
  float top, sharp, least;
  u32 candidates;
  u64 limit;  // the last place that is kept
} s;

INLINE void clear_bins() {
  __syncthreads();
  for (int i = threadIdx.x; i < BINS; i += THREADS) low_of[i] = high_of[i] = 0;
  if (threadIdx.x == 0) found_bin = -1;
  __syncthreads();
}
INLINE void add_to_bin(int bin, u64 n) {
  const u32 low = (u32)n, old = count_up(low_of + bin, low), high = (u32)(n >> 32) + (old + low < low);
  if (high) count_up(high_of + bin, high);
}
INLINE u64 in_bin(int bin) { return (u64)high_of[bin] << 32 | low_of[bin]; }

template <class F> INLINE void visit_row(F f) {
  for (int first = threadIdx.x * STRIP; first < s.count; first += THREADS * STRIP) {
    float value[STRIP];
    load_strip(value, s.logits, s.start, first, s.count, row);
#pragma unroll
    for (int i = 0; i < STRIP; i++)
      if (value[i] >= s.least && value[i] > MINUS_INFINITY) f(value[i], first + i);
  }
}
template <class F> INLINE void visit(F f) {
  if (s.candidates > LISTED) return visit_row(f);
  for (u32 i = threadIdx.x; i < s.candidates; i += THREADS) f(listed_value[i], listed_id[i]);
}

// List the candidates, from `halvings` of the top mass on; the sum of their masses.
INLINE u64 gather(int halvings) {
  __syncthreads();
  if (threadIdx.x == 0) s.candidates = 0, s.least = s.top - halvings / s.sharp;
  clear_bins();
  visit_row([&](float value, int id) {
    const u32 at = count_up(&s.candidates, 1);
    if (at < LISTED) listed_value[at] = value, listed_id[at] = id;
    add_to_bin(0, mass(value, s.top, s.sharp));
  });
  __syncthreads();
  return in_bin(0);
}

// The bin up to which, with those before it, the sum reaches `target`, less what is before it; -1 if none.
INLINE int find_bin(u64& target) {
  constexpr int each = BINS / 32;
  __syncthreads();
  if (threadIdx.x < 32) {
    u64 own = 0;
#pragma unroll
    for (int i = 0; i < each; i++) own += in_bin(threadIdx.x * each + i);
    const u64 until = sum_up_to_lane(own);
    u64 before = until - own;
    if (before < target && target <= until) {
      int bin = threadIdx.x * each;
      for (; before + in_bin(bin) < target; bin++) before += in_bin(bin);
      found_bin = bin, found_before = before;
    }
  }
  __syncthreads();
  if (found_bin >= 0) target -= found_before;
  return found_bin;
}

// Keep only places up to the one where masses, or the number of tokens, reach `target`; all, if they do not.
INLINE void cut(bool counts, u64 target) {
  u64 prefix = 0;
  for (int shift = 48; shift >= 0; shift -= DIGIT) {
    clear_bins();
    visit([&](float value, int id) {
      const u64 place = place_of(value, id);
      if (place <= s.limit && place >> shift + DIGIT == prefix)
        add_to_bin(place >> shift & BINS - 1, counts ? 1 : mass(value, s.top, s.sharp));
    });
    const int bin = find_bin(target);
    if (bin < 0) return;
    prefix = prefix << DIGIT | bin;
  }
  if (threadIdx.x == 0) s.limit = prefix;
}

INLINE bool kept(float value, int id, float min_p) {
  return place_of(value, id) <= s.limit && exp2_fast((value - s.top) * s.sharp) >= min_p;
}

// The mass of what is kept in the chunk that has the number of the lane.
INLINE u64 mass_of_chunk(float min_p) {
  clear_bins();
  visit([&](float value, int id) {
    if (kept(value, id, min_p)) add_to_bin(id / CHUNK, mass(value, s.top, s.sharp));
  });
  __syncthreads();
  return in_bin(threadIdx.x % 32);
}

// What top_k and top_p keep of a row whose mass is `whole`.
INLINE void cut_tail(u64 whole) {
  const u64 near = gather(NEAR);
  const bool enough = row.top_k > 0     ? s.candidates >= row.top_k
                      : row.top_p < 1.f ? (double)near >= (double)row.top_p * whole
                                        : row.min_p >= exp2_fast(-NEAR);
  if (!enough) gather(FAR);
  if (row.top_k > 0) {
    cut(true, row.top_k);
    if (row.top_p < 1.f) whole = shuffle(sum_up_to_lane(mass_of_chunk(0)), 31);
  }
  if (row.top_p < 1.f) cut(false, max(1ull, (u64)(row.top_p * (double)whole)));
}

struct Output {
  long long* tokens;
  float* probabilities;
  long long* drawn;
};
INLINE void tell(const Output& out, long long token, float probability) {
  out.tokens[blockIdx.x] = token;
  out.probabilities[blockIdx.x] = probability;
  if (out.drawn && row.seat >= 0) out.drawn[row.seat] = token;
}

// Of what is kept in a chunk: the first token, by ids, up to which the masses exceed `share` of their sum.
INLINE void draw_in_chunk(int chunk, float top, double share, bool filters, u64 whole,
                          const Output& out) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = chunk * CHUNK + threadIdx.x * STRIP;
  float value[STRIP];
  u64 own = 0;
  load_strip(value, s.logits, s.start, first, s.count, row);
#pragma unroll
  for (int i = 0; i < STRIP; i++) {
    if (filters && !kept(value[i], first + i, row.min_p)) value[i] = MINUS_INFINITY;
    own += mass(value[i], top, s.sharp);
  }
  const u64 in_warp = sum_up_to_lane(own);
  if (lane == 31) of_warp[warp] = in_warp;
  __syncthreads();
  const u64 warps = sum_up_to_lane(of_warp[lane]), sum = shuffle(warps, 31), ahead = shuffle(warps, (warp - 1) & 31);
  const u64 target = min(sum - 1, (u64)(share * (double)sum));
  u64 before = in_warp - own + (warp ? ahead : 0);
#pragma unroll
  for (int i = 0; i < STRIP; i++) {
    const u64 until = before + mass(value[i], top, s.sharp);
    if (before <= target && target < until)
      tell(out, first + i, (float)((double)mass(value[i], s.top, s.sharp) / (double)whole));
    before = until;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
sample_draw(const void* logits, const Row* rows, const u64* highest,
            const u64* sums, long long* tokens, float* probabilities,
            long long* drawn, int V, int vocab_size, int chunks) {
  let_next_begin();
  wait_for_previous();
  if (threadIdx.x < sizeof(Row) / 4) ((u32*)&row)[threadIdx.x] = ((const u32*)(rows + blockIdx.x))[threadIdx.x];
  __syncthreads();
  const Output out = {tokens, probabilities, drawn};
  const int lane = threadIdx.x % 32, part = blockIdx.x * chunks + lane;
  const u64 own = lane < chunks ? highest[part] : 0, best = highest_of_warp(own);
  const float top = value_of(best >> 32), sharp = sharpness(row);
  if (top - top != 0 || row.temperature <= 0) {
    if (threadIdx.x == 0) tell(out, top - top == 0 ? (long long)(u32)~best : -1, 1);
    return;
  }
  if (threadIdx.x == 0)
    s.logits = logits, s.start = blockIdx.x * (size_t)V, s.count = vocab_size, s.top = top, s.sharp = sharp,
    s.limit = ~0ull;
  __syncthreads();
  const float own_top = value_of(own >> 32);
  u64 mine = own_top > MINUS_INFINITY ? (u64)((double)sums[part] * exp2_fast((own_top - top) * sharp)) : 0;
  const bool filters = row.top_k > 0 || row.top_p < 1.f || row.min_p > 0;
  if (filters) {
    cut_tail(shuffle(sum_up_to_lane(mine), 31));
    mine = mass_of_chunk(row.min_p);
  }
  const u64 until = sum_up_to_lane(mine), whole = shuffle(until, 31), before = until - mine;
  const u64 target = min(whole - 1, (u64)(row.number * (double)whole));
  const int chunk = (int)highest_of_warp(before <= target && target < until ? lane + 1 : 0) - 1;
  const double share = (double)(target - shuffle(before, chunk)) / (double)shuffle(mine, chunk);
  draw_in_chunk(chunk, value_of(shuffle(own, chunk) >> 32), share, filters, whole, out);
}
