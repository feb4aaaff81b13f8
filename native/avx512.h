// AVX-512 F, BW, DQ and VL: x86-64-v4, from Skylake-SP (2017) and Zen 4 (2022) on.
#pragma once
#include "x86.h"

namespace hf_fp8 {
namespace {

struct Avx512 : X86 {
    static constexpr int W = 16, MR = 12, NV = 2, FEW = 24, AHEAD = 1024;
    typedef __m512 F;
    typedef __m512i Bytes;
    typedef __m512i Mark;

    INLINE F zero() { return _mm512_setzero_ps(); }
    INLINE F set1(float a) { return _mm512_set1_ps(a); }
    INLINE F load(const float *p) { return _mm512_loadu_ps(p); }
    INLINE void store(float *p, F f) { _mm512_storeu_ps(p, f); }
    INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
    INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    INLINE float sum(F f) { return _mm512_reduce_add_ps(f); }
    INLINE Bytes bytes(const uint8_t *p) { return _mm512_loadu_si512(p); }
    INLINE Mark unmarked() { return _mm512_setzero_si512(); }
    INLINE void mark(Mark &m, Bytes b) { m = _mm512_max_epu8(m, _mm512_add_epi8(b, b)); }
    INLINE bool marked(Mark m) { return _mm512_cmpeq_epi8_mask(m, _mm512_set1_epi8((char)0xFE)) != 0; }

    // As in Avx2Half.
    static int64_t shift(int64_t code) { return code == E4M3 ? 8 : 0; }
    template <int64_t C>
    INLINE F widen16(__m128i c) {
        if (C == INT8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(c));
        __m256i half = _mm256_slli_epi16(_mm256_cvtepi8_epi16(c), 7);
        return _mm512_cvtph_ps(_mm256_and_si256(half, _mm256_set1_epi16((short)0xBF80)));
    }
    template <int64_t C>
    INLINE F widen_half(__m256i h) {
        if (C == F16) return _mm512_cvtph_ps(h);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
    }
    template <int64_t C, int64_t J>
    INLINE F widen(Bytes b) {
        if constexpr (is_float(C)) return widen_half<C>(_mm512_extracti64x4_epi64(b, J % 2));
        else return widen16<C>(_mm512_extracti32x4_epi32(b, J));
    }
    INLINE void order(int64_t, const float *from, float *to) { memcpy(to, from, 64 * sizeof(float)); }
    typedef __m512i Lanes;
    INLINE Lanes lanes(int64_t shift) {
        return _mm512_srl_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm_cvtsi64_si128(shift));
    }
    INLINE F load_lanes(const float *p, const Lanes &l) { return _mm512_permutexvar_ps(l, load(p)); }
    template <int64_t J>
    INLINE F nibble(Bytes b) {
        const F numbers = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        return _mm512_permutexvar_ps(J ? _mm512_srli_epi32(b, 4 * J) : b, numbers);  // an index is the lowest 4 bits
    }
    template <int64_t C>
    INLINE void widen_row(const uint8_t *codes, const float *scales, float *to) {
        F f;
        if constexpr (is_float(C)) f = widen_half<C>(_mm256_loadu_si256((const __m256i *)codes));
        else f = widen16<C>(_mm_loadu_si128((const __m128i *)codes));
        if (C == E4M3) f = _mm512_mul_ps(f, _mm512_set1_ps(0x1p8f));
        _mm512_storeu_ps(to, _mm512_mul_ps(f, _mm512_loadu_ps(scales)));
    }

    typedef __m512i S;
    typedef __m512i P;
    INLINE S zero_sums() { return _mm512_setzero_si512(); }
    INLINE S load_sums(const int32_t *p) { return _mm512_loadu_si512(p); }
    INLINE void store_sums(int32_t *p, S s) { _mm512_storeu_si512(p, s); }
    INLINE P load_pairs(const int16_t *p) { return _mm512_loadu_si512(p); }
    INLINE P set_pair(const int16_t *p) {
        int32_t pair;
        memcpy(&pair, p, 4);
        return _mm512_set1_epi32(pair);
    }
    INLINE S add_products(P a, P b, S s) {
        s = _mm512_add_epi32(s, _mm512_madd_epi16(a, b));
        asm("" : "+v"(s));  // in this order: GCC would load all pairs first, and have no registers left for sums
        return s;
    }
    INLINE void interleave(const uint8_t *first, const uint8_t *second, int16_t *to) {
        __m128i a = _mm_loadu_si128((const __m128i *)first), b = _mm_loadu_si128((const __m128i *)second);
        _mm256_storeu_si256((__m256i *)to, _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b)));
        _mm256_storeu_si256((__m256i *)(to + 16), _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b)));
    }
};

}  // namespace
}  // namespace hf_fp8
