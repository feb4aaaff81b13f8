#include "target.h"
#if HF_FP8_HAS_AMX
#include "cpu.h"
TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma,f16c,amx-tile,amx-bf16")
#include "amx.h"

namespace hf_fp8 {

extern const Kernels avx512_vbmi;
static int multiply(const Product *p) { return AmxMatmul::takes(*p) ? AmxMatmul::multiply(p) : avx512_vbmi.multiply(p); }
extern const Kernels amx = {"amx", has_amx, &avx512_vbmi, multiply};

}  // namespace hf_fp8
TARGET_END
#endif
