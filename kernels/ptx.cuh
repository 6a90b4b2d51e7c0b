// Every fragment of PTX and every builtin that the kernels use, named by what it does. Numbers of 16 bits travel as
// u16, pairs of them as u32, the first in the low half. Compiled for the CPU (EMULATED), the same names are C++.
#pragma once
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef EMULATED
#include "emulated_ptx.h"
#else
#define INLINE __device__ __forceinline__
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
typedef u32 shared_t;  // an address in shared memory

// --- numbers

INLINE float half_to_float(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
INLINE u32 pack_half(float low, float high) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
INLINE u32 pack_bfloat(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
INLINE u32 multiply_halves(u32 a, u32 b) {
  u32 d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
INLINE u32 subtract_halves(u32 a, u32 b) {
  u32 d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
INLINE u32 fma_halves(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
INLINE u32 permute(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }
INLINE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// --- memory

INLINE uint4 load_once(const uint4* p) {  // constant data that is read once
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
INLINE uint2 load_once(const uint2* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
INLINE u32 load_once(const u32* p) {
  u32 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
// Copies to shared memory that the copying thread alone reads, after it has waited for all but the PENDING latest groups.
template <int BYTES> INLINE void copy_async(void* to, const void* from) {
  const u32 at = (u32)__cvta_generic_to_shared(to);
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(BYTES) : "memory");
}
INLINE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> INLINE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }
INLINE float4 load_fresh(const float4* p) {  // what other blocks wrote
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
}
INLINE float load_fresh(const float* p) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}
INLINE void fence_device() { __threadfence(); }
INLINE int count_up(int* p) { return atomicAdd(p, 1); }
INLINE u32 count_up(u32* p, u32 n) { return atomicAdd(p, n); }

// --- programmatic dependent launch: before the wait, only what no kernel writes may be read

#if __CUDA_ARCH__ >= 900
INLINE void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;"); }
// What an earlier kernel wrote is read after this, and through pointers without __restrict__: with it, a load may be
// moved before this, or be given what the read-only cache still holds from before.
INLINE void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#else
INLINE void let_next_begin() {}
INLINE void wait_for_previous() {}
#endif

// --- tensor cores: d[4] += a (16 rows, 16 columns) times b (16 rows, 8 columns), fp16 in, fp32 out

INLINE void multiply_16x8x16(float* d, const u32* a, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
INLINE void multiply_16x8x16_bfloat(float* d, const u32* a, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A matrix of 8 x 8, a pair of row g in columns 2 t and 2 t + 1 from lane 4 g + t: transposed, in the same places.
INLINE u32 transpose_8x8(u32 pair) {
  u32 transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// --- Hopper: bulk copies, barriers in shared memory that count their bytes, products of a warpgroup

#if __CUDA_ARCH__ >= 900
INLINE shared_t shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
INLINE void barrier_init(shared_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
INLINE void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
INLINE void barrier_expect(shared_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
INLINE void barrier_arrive(shared_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
INLINE void barrier_wait(shared_t barrier, u32 phase) {
  asm volatile(
      "{\n.reg .pred P;\nL1_%=: mbarrier.try_wait.parity.shared::cta.b64 P, [%0], %1;\n"
      "@P bra L2_%=;\nbra L1_%=;\nL2_%=:\n}" ::"r"(barrier), "r"(phase) : "memory");
}
INLINE void copy_bulk(shared_t to, const void* from, int bytes, shared_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
INLINE void sync_threads(int barrier, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(count) : "memory");
}
INLINE uint4 load_shared_four(shared_t p) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(p));
  return v;
}
INLINE u32 load_shared(shared_t p) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(p));
  return v;
}
#endif
#if __CUDA_ARCH_FEAT_SM90_ALL
INLINE void warpgroup_pin(u32* a) { asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory"); }
INLINE void warpgroup_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INLINE void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> INLINE void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Columns of 64 halves each, swizzled by 128 bytes, eight columns after 1024 bytes.
INLINE u64 describe(shared_t p) { return (u64)((p & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62; }
INLINE u64 describe_after(u64 description, int bytes) { return description + (bytes >> 4); }

#define FLOATS8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define FLOATS32(d, i) FLOATS8(d, i), FLOATS8(d, i + 8), FLOATS8(d, i + 16), FLOATS8(d, i + 24)
#define WARPGROUP_PRODUCT(N, D, A, B, ADDS, ...)                                                                  \
  template <> INLINE void warpgroup_multiply<N>(float* d, const u32* a, u64 b, int adds) {                        \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADDS ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N             \
                 "k16.f32.f16.f16 {" D "},{" A "}," B ",p,1,1,0;\n}"                                              \
                 : __VA_ARGS__                                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds));                                \
  }
// d[N/2] = (adds ? d : 0) + a (64 rows, 16 columns, in registers) times b (16 rows, N columns, described)
template <int N> INLINE void warpgroup_multiply(float* d, const u32* a, u64 b, int adds);
WARPGROUP_PRODUCT(16,
                  "%0,%1,%2,%3,%4,%5,%6,%7",
                  "%8,%9,%10,%11", "%12", "%13", FLOATS8(d, 0))
WARPGROUP_PRODUCT(32,
                  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15",
                  "%16,%17,%18,%19", "%20", "%21", FLOATS8(d, 0), FLOATS8(d, 8))
WARPGROUP_PRODUCT(64,
                  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
                  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31",
                  "%32,%33,%34,%35", "%36", "%37", FLOATS32(d, 0))
WARPGROUP_PRODUCT(128,
                  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
                  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
                  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
                  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63",
                  "%64,%65,%66,%67", "%68", "%69", FLOATS32(d, 0), FLOATS32(d, 32))
#endif
#endif
