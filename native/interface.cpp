// The functions that the library exports. They call those of the best instruction set that the processor has.
#include "common.h"
#include "target.h"

namespace hf_fp8 {

#if defined(__x86_64__)
extern const Kernels amx, avx512_vbmi, avx512_vnni, avx512, avx2_integer, avx2_half;
#elif defined(__aarch64__)
extern const Kernels neon;
#endif
extern const Kernels scalar;

// In order of preference.
static const Kernels *const all[] = {
#if defined(__x86_64__)
#if HF_FP8_HAS_AMX
    &amx,
#endif
    &avx512_vbmi, &avx512_vnni, &avx512, &avx2_integer, &avx2_half,
#elif defined(__aarch64__)
    &neon,
#endif
    &scalar,
};
static const int COUNT = sizeof all / sizeof *all;
static const Kernels *chosen;

static const Kernels *kernels() {
    for (int i = 0; !chosen && i < COUNT; i++)
        if (all[i]->supported()) chosen = all[i];
    return chosen;
}

template <class Function>
static Function find(Function Kernels::*function) {
    const Kernels *found = kernels();
    while (!(found->*function)) found = found->rest;
    return found->*function;
}

}  // namespace hf_fp8

using namespace hf_fp8;

// Changes whenever arguments do.
HF_FP8_EXPORT int64_t hf_fp8_version() { return 5; }

// The name of instruction set number `index` that this library was built with, in order of preference; null after the last.
HF_FP8_EXPORT const char *hf_fp8_name(int64_t index) { return index < COUNT ? all[index]->name : nullptr; }

// The number of the instruction set in use.
HF_FP8_EXPORT int64_t hf_fp8_used() {
    for (int64_t i = 0; i < COUNT; i++)
        if (all[i] == kernels()) return i;
    return -1;
}

// Uses another instruction set. -1 if the processor lacks it.
HF_FP8_EXPORT int64_t hf_fp8_use(int64_t index) {
    if (index < 0 || index >= COUNT || !all[index]->supported()) return -1;
    chosen = all[index];
    return 0;
}

// The following return 0, or -1 if there is not enough memory.

HF_FP8_EXPORT int64_t hf_fp8_multiply(const Product *product) { return find(&Kernels::multiply)(product); }

HF_FP8_EXPORT int64_t hf_fp8_multiply_int8(const Int8Product *product) { return find(&Kernels::multiply_int8)(product); }

// out: (count, n, k)
HF_FP8_EXPORT int64_t hf_fp8_dequantize(const Weights *weights, void *out, int64_t out_dtype, int64_t threads) {
    return find(&Kernels::dequantize)(weights, out, out_dtype, threads);
}

// Codes of INT4 less their zero points; scales are not read. out: (count, n, k)
HF_FP8_EXPORT int64_t hf_fp8_unpack(const Weights *weights, int8_t *out, int64_t threads) { return find(&Kernels::unpack)(weights, out, threads); }

// Codes (rows, cols) of x, next to each other.
HF_FP8_EXPORT int64_t hf_fp8_quantize(const Rounding *rounding) { return find(&Kernels::quantize)(rounding); }

// The largest magnitude of each block, in float32; scales are not read.
HF_FP8_EXPORT int64_t hf_fp8_amax(const Rounding *rounding) { return find(&Kernels::amax)(rounding); }

// int8 codes of rows of inputs, and the columns that are left as they are.
HF_FP8_EXPORT int64_t hf_fp8_quantize_tokens(const Tokens *tokens) { return find(&Kernels::quantize_tokens)(tokens); }

// Dequantized columns of an int8 weight.
HF_FP8_EXPORT int64_t hf_fp8_columns(const Columns *columns) { return find(&Kernels::columns)(columns); }
