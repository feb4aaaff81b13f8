// AVX2, FMA and F16C: x86-64-v3, from Haswell (2013) and Zen (2017) on.
#pragma once
#include "x86.h"

namespace hf_fp8 {
namespace {

struct Avx2Base : X86 {
    static constexpr int W = 8, MR = 6, NV = 2, FEW = 20;
    typedef __m256 F;
    typedef __m256i Bytes;
    typedef __m256i Mark;

    INLINE F zero() { return _mm256_setzero_ps(); }
    INLINE F set1(float a) { return _mm256_set1_ps(a); }
    INLINE F load(const float *p) { return _mm256_loadu_ps(p); }
    INLINE void store(float *p, F f) { _mm256_storeu_ps(p, f); }
    INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
    INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    INLINE float sum(F f) {
        __m128 a = _mm_add_ps(_mm256_castps256_ps128(f), _mm256_extractf128_ps(f, 1));
        a = _mm_add_ps(a, _mm_movehl_ps(a, a));
        return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
    }
    INLINE Bytes bytes(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
    INLINE Mark unmarked() { return _mm256_setzero_si256(); }
    INLINE void mark(Mark &m, Bytes b) { m = _mm256_max_epu8(m, _mm256_add_epi8(b, b)); }  // NaN codes give 0xFE, the largest
    INLINE bool marked(Mark m) { return _mm256_movemask_epi8(_mm256_cmpeq_epi8(m, _mm256_set1_epi8((char)0xFE))); }

    template <int64_t C>
    INLINE F widen_half(__m128i h) {
        if (C == F16) return _mm256_cvtph_ps(h);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
    }
    template <int64_t C, int64_t J>
    INLINE F widen_half_of(Bytes b) { return widen_half<C>(J % 2 ? _mm256_extracti128_si256(b, 1) : _mm256_castsi256_si128(b)); }
    typedef __m256i Lanes;
    INLINE Lanes lanes(int64_t shift) { return _mm256_srl_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm_cvtsi64_si128(shift)); }
    INLINE F load_lanes(const float *p, const Lanes &l) { return _mm256_permutevar8x32_ps(load(p), l); }
    // With the bits of 2^23, or 2^7, above it, a nibble at bit 0, or 16, is a float32 that is this power too large.
    template <int64_t J>
    INLINE F nibble(Bytes b) {
        const __m256i moved = J % 4 ? _mm256_srli_epi32(b, J % 4 * 4) : b;
        const __m256i bits = _mm256_and_si256(moved, _mm256_set1_epi32(J < 4 ? 15 : 15 << 16));
        const F one = _mm256_set1_ps(J < 4 ? 0x1p23f : 0x1p7f), more = _mm256_set1_ps(J < 4 ? 0x1p23f + 8 : 0x1p7f + 8);
        return _mm256_sub_ps(_mm256_or_ps(_mm256_castsi256_ps(bits), one), more);
    }
    // The bits of an E4M3 code, moved to those of a float32, are the code divided by 2^120 (biases 7 and 127), subnormal codes too.
    template <int64_t C>
    INLINE F widen8(const uint8_t *codes) {
        if (is_float(C)) return widen_half<C>(_mm_loadu_si128((const __m128i *)codes));
        __m256i c = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)codes));
        if (C == INT8) return _mm256_cvtepi32_ps(c);
        return _mm256_castsi256_ps(_mm256_and_si256(_mm256_slli_epi32(c, 20), _mm256_set1_epi32((int)0x87F00000)));
    }
    template <int64_t C>
    INLINE void widen_row(const uint8_t *codes, const float *scales, float *to) {
        const __m256 up = _mm256_set1_ps(0x1p120f);
        for (int i = 0; i < 16; i += 8) {
            __m256 f = widen8<C>(codes + i * size_of(C));
            if (C == E4M3) f = _mm256_mul_ps(f, up);
            _mm256_storeu_ps(to + i, _mm256_mul_ps(f, _mm256_loadu_ps(scales + i)));
        }
    }

    typedef __m256i S;
    typedef __m256i P;
    INLINE S zero_sums() { return _mm256_setzero_si256(); }
    INLINE S load_sums(const int32_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
    INLINE void store_sums(int32_t *p, S s) { _mm256_storeu_si256((__m256i *)p, s); }
    INLINE P load_pairs(const int16_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
    INLINE P set_pair(const int16_t *p) {
        int32_t pair;
        memcpy(&pair, p, 4);
        return _mm256_set1_epi32(pair);
    }
    INLINE S add_products(P a, P b, S s) {
        s = _mm256_add_epi32(s, _mm256_madd_epi16(a, b));
        asm("" : "+x"(s));  // in this order: GCC would load all pairs first, and have no registers left for sums
        return s;
    }
    INLINE void interleave(const uint8_t *first, const uint8_t *second, int16_t *to) {
        __m128i a = _mm_loadu_si128((const __m128i *)first), b = _mm_loadu_si128((const __m128i *)second);
        _mm256_storeu_si256((__m256i *)to, _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b)));
        _mm256_storeu_si256((__m256i *)(to + 16), _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b)));
    }
};

// Codes are widened by integer operations, 4 of 32 bits at a time. Subnormal codes become subnormal floats, which costs nothing on AMD's
// processors and a hundred cycles and more on Intel's. One thread of a Zen 3, codes in the cache: 19 GB/s, Avx2Half 13 GB/s.
struct Avx2Integer : Avx2Base {
    static int64_t shift(int64_t code) { return code == E4M3 ? 120 : 0; }
    // Vector J holds bytes 4 i + J.
    template <int64_t C, int64_t J>
    INLINE F widen(Bytes b) {
        if constexpr (is_float(C)) return widen_half_of<C, J>(b);
        if (C == INT8) return _mm256_cvtepi32_ps(_mm256_srai_epi32(J == 3 ? b : _mm256_slli_epi32(b, 24 - 8 * J), 24));
        // In steps that two or four vectors share.
        __m256i c = _mm256_srai_epi16(J % 2 ? b : _mm256_slli_epi16(b, 8), 4);
        return _mm256_castsi256_ps(_mm256_and_si256(J < 2 ? _mm256_slli_epi32(c, 16) : c, _mm256_set1_epi32((int)0x87F00000)));
    }
    INLINE void order(int64_t code, const float *from, float *to) {
        if (is_float(code)) return (void)memcpy(to, from, 32 * sizeof(float));
        for (int j = 0; j < 4; j++)
            for (int i = 0; i < 8; i++) to[8 * j + i] = from[4 * i + j];
    }
};

// Codes become float16 numbers (the code divided by 2^8, biases 7 and 15), which the processor widens exactly, subnormal ones too.
struct Avx2Half : Avx2Base {
    static int64_t shift(int64_t code) { return code == E4M3 ? 8 : 0; }
    template <int64_t C, int64_t J>
    INLINE F widen(Bytes b) {
        if constexpr (is_float(C)) return widen_half_of<C, J>(b);
        __m128i part = J < 2 ? _mm256_castsi256_si128(b) : _mm256_extracti128_si256(b, 1);
        if (J % 2) part = _mm_srli_si128(part, 8);
        if (C == INT8) return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(part));
        return half(_mm_cvtepi8_epi16(part));
    }
    INLINE F half(__m128i c) { return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(c, 7), _mm_set1_epi16((short)0xBF80))); }
    INLINE void order(int64_t, const float *from, float *to) { memcpy(to, from, 32 * sizeof(float)); }
    template <int64_t C>
    INLINE void widen_row(const uint8_t *codes, const float *scales, float *to) {
        if (C != E4M3) return Avx2Base::widen_row<C>(codes, scales, to);
        const __m256 up = _mm256_set1_ps(0x1p8f);
        for (int i = 0; i < 16; i += 8) {
            __m256 f = _mm256_mul_ps(half(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)(codes + i)))), up);
            _mm256_storeu_ps(to + i, _mm256_mul_ps(f, _mm256_loadu_ps(scales + i)));
        }
    }
};

}  // namespace
}  // namespace hf_fp8
