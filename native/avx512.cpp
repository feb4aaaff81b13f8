#if defined(__x86_64__)
#include "cpu.h"
#include "target.h"
TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "avx512.h"
#include "int8.h"
#include "matmul.h"

namespace hf_fp8 {

extern const Kernels avx512 = kernels_of<Avx512>("avx512", has_avx512);

}  // namespace hf_fp8
TARGET_END
#endif
