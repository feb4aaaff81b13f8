// Which of the instruction sets an x86 processor, and its operating system, have. Before TARGET_BEGIN, as these run on any of them.
#pragma once
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace hf_fp8 {

static inline int has_avx2() {
    unsigned a, b, c = 0, d;  // Clang before 19 and GCC before 11 know no name for F16C
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) && (c & 1u << 29);
}
static inline int is_amd_with_avx2() { return has_avx2() && __builtin_cpu_is("amd"); }
static inline int has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
static inline int has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
static inline int has_avx512_vbmi() { return has_avx512_vnni() && __builtin_cpu_supports("avx512vbmi"); }
// Whether there are tiles (AMX), and Linux lets this process use them: it has to be asked once.
static inline int has_amx() {
#if defined(__linux__)
    unsigned a, b, c, d;
    if (!has_avx512_vbmi() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    const unsigned tiles = 1u << 24, bfloat16 = 1u << 22;
    const long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return (d & tiles) && (d & bfloat16) && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return 0;
#endif
}

}  // namespace hf_fp8
