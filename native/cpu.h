// Which of the instruction sets an x86 processor, and its operating system, have. Before TARGET_BEGIN, as these run on any of them.
#pragma once
#include <cpuid.h>

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

}  // namespace hf_fp8
