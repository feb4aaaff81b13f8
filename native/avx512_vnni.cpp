#if defined(__x86_64__)
#include "cpu.h"
#include "target.h"
TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#include "avx512.h"
#include "int8.h"

namespace hf_fp8 {
namespace {

// Products of pairs and their sum are one instruction (vpdpwssd).
struct Avx512Vnni : Avx512 {
    INLINE S add_products(P a, P b, S s) {
        s = _mm512_dpwssd_epi32(s, a, b);
        asm("" : "+v"(s));  // as in Avx512
        return s;
    }
};

}  // namespace

extern const Kernels avx512;
extern const Kernels avx512_vnni = {"avx512-vnni", has_avx512_vnni, &avx512, nullptr, nullptr, Int8Matmul<Avx512Vnni>::multiply};

}  // namespace hf_fp8
TARGET_END
#endif
