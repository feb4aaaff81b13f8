// AVX-512 with permutations of bytes (VBMI): Ice Lake (2019) and Zen 4 (2022) on, all of which have VNNI and GFNI, too.
#pragma once
#include "avx512.h"

namespace hf_fp8 {
namespace {

// Numbers of bfloat16 that codes of E4M3 without their sign stand for: their upper and their lower bytes.
struct Bfloat16Table {
    alignas(64) uint8_t upper[128], lower[128];
    constexpr Bfloat16Table() : upper(), lower() {
        for (int code = 0; code < 128; code++) {
            int bits = 0x7FC0;
            if (code < 8) {
                const int top = code >= 4 ? 2 : code >= 2 ? 1 : 0;  // the leading one of multiples of 2^-9
                bits = code ? (118 + top) << 7 | (code - (1 << top)) << (7 - top) : 0;
            } else if (code < 0x7F)
                bits = ((code >> 3) + 120) << 7 | (code & 7) << 4;
            upper[code] = (uint8_t)(bits >> 8), lower[code] = (uint8_t)(bits & 0xFF);
        }
    }
};

struct Avx512Vbmi : Avx512 {
    // 64 codes of E4M3 as numbers of bfloat16, NaN included: those of the first halves of lanes, and the others. Two thirds of the
    // instructions of Avx512.
    INLINE void widen_64(__m512i codes, __m512i &first, __m512i &second) {
        static constexpr Bfloat16Table table;
        const __m512i u0 = _mm512_load_si512(table.upper), u1 = _mm512_load_si512(table.upper + 64);
        const __m512i l0 = _mm512_load_si512(table.lower), l1 = _mm512_load_si512(table.lower + 64);
        const __m512i sign = _mm512_and_si512(codes, _mm512_set1_epi8((char)0x80));
        const __m512i upper = _mm512_or_si512(_mm512_permutex2var_epi8(u0, codes, u1), sign);
        const __m512i lower = _mm512_permutex2var_epi8(l0, codes, l1);
        first = _mm512_unpacklo_epi8(lower, upper);
        second = _mm512_unpackhi_epi8(lower, upper);
    }

    // Vectors of the even and odd numbers of each half of lanes. NaN codes need no mark: their numbers are NaN.
    static int64_t shift(int64_t) { return 0; }
    INLINE void mark(Mark &, Bytes) {}
    INLINE bool marked(Mark) { return false; }
    template <int64_t C, int64_t J>
    INLINE F widen(Bytes b) {
        if constexpr (C == E4M3) {
            __m512i half[2];
            widen_64(b, half[0], half[1]);
            return _mm512_castsi512_ps(J % 2 ? _mm512_and_si512(half[J / 2], _mm512_set1_epi32((int)0xFFFF0000)) : _mm512_slli_epi32(half[J / 2], 16));
        } else
            return Avx512::widen<C, J>(b);
    }
    INLINE void order(int64_t code, const float *from, float *to) {
        for (int i = 0; i < 64; i++) to[code == E4M3 ? i / 8 % 2 * 32 + i % 2 * 16 + i / 16 * 4 + i % 8 / 2 : i] = from[i];
    }
};

}  // namespace
}  // namespace hf_fp8
