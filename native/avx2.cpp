#if defined(__x86_64__)
#include "cpu.h"
#include "target.h"
TARGET_BEGIN("avx2,fma,f16c")
#include "avx2.h"
#include "int8.h"
#include "matmul.h"

namespace hf_fp8 {

extern const Kernels avx2_integer = kernels_of<Avx2Integer>("avx2", is_amd_with_avx2);

}  // namespace hf_fp8
TARGET_END
#endif
