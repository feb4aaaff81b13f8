#if defined(__x86_64__)
#include "cpu.h"
#include "target.h"
TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma,f16c")
#include "avx512_vbmi.h"
#include "matmul.h"

namespace hf_fp8 {

extern const Kernels avx512_vnni;
extern const Kernels avx512_vbmi = {"avx512-vbmi", has_avx512_vbmi, &avx512_vnni, Matmul<Avx512Vbmi>::multiply};

}  // namespace hf_fp8
TARGET_END
#endif
