// h = scales * (A x) for the rows of every slot, A as operand A of the tensor cores: see lora.cuh. A row's bits depend
// on nothing but the row and its adapters: the warps' sums are added in their order, the slices by lora_expand.
#include "lora.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * 32)
lora_shrink(const u64* table, const int* slots, const int* rows,
            const float* scales, const u16* x, float* h, int stride, int module,
            int parts, int width, int T, int K) {
  __shared__ uint4 memory[WARPS * DEPTH * 256 + WARPS * COLUMNS * 32];
  let_next_begin();
  const LoraShrink of = {{table, slots, rows, stride}, scales, x, h, module, parts, width, T, K};
  lora_shrink_unit<WARPS, DEPTH, COLUMNS>(of, blockIdx.x, memory);
}
