// What AVX2 and AVX-512 share.
#pragma once
#include <immintrin.h>

#include "scalar.h"

namespace hf_fp8 {
namespace {

// Subnormal numbers are kept, whatever the caller chose (torch.set_flush_denormal): widened codes may be subnormal.
struct KeepSubnormal {
    unsigned before = _mm_getcsr();
    KeepSubnormal() {
        if (before & 0x8040) _mm_setcsr(before & ~0x8040u);
    }
    ~KeepSubnormal() {
        if (before & 0x8040) _mm_setcsr(before);
    }
};

struct X86 : Scalar {
    typedef KeepSubnormal Mode;

    INLINE void prefetch(const uint8_t *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
    INLINE bool any_nan(const uint8_t *codes) {
        __m128i c = _mm_loadu_si128((const __m128i *)codes), sign = _mm_set1_epi8((char)0x80);
        return _mm_movemask_epi8(_mm_cmpeq_epi8(_mm_or_si128(c, sign), _mm_set1_epi8((char)0xFF)));
    }
    INLINE bool transpose(const uint8_t *const *rows, int64_t d, int64_t count, uint8_t (*tile)[16]) {
        if (count < 16) return Scalar::transpose(rows, d, count, tile);
        __m128i a[16], b[16], largest = _mm_setzero_si128();
        for (int r = 0; r < 16; r++) {
            a[r] = _mm_loadu_si128((const __m128i *)(rows[r] + d));
            largest = _mm_max_epu8(largest, _mm_add_epi8(a[r], a[r]));  // NaN codes, 0x7F and 0xFF, give 0xFE
        }
        // Four times: the first half of the rows interleaved with the second.
        for (int i = 0; i < 8; i++) {
            b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
            b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
        }
        for (int i = 0; i < 8; i++) {
            a[2 * i] = _mm_unpacklo_epi8(b[i], b[i + 8]);
            a[2 * i + 1] = _mm_unpackhi_epi8(b[i], b[i + 8]);
        }
        for (int i = 0; i < 8; i++) {
            b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
            b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
        }
        for (int i = 0; i < 8; i++) {
            _mm_storeu_si128((__m128i *)tile[2 * i], _mm_unpacklo_epi8(b[i], b[i + 8]));
            _mm_storeu_si128((__m128i *)tile[2 * i + 1], _mm_unpackhi_epi8(b[i], b[i + 8]));
        }
        return _mm_movemask_epi8(_mm_cmpeq_epi8(largest, _mm_set1_epi8((char)0xFE)));
    }
    INLINE void zip(const uint8_t *first, const uint8_t *second, uint8_t *to) {
        __m128i a = _mm_loadu_si128((const __m128i *)first), b = _mm_loadu_si128((const __m128i *)second);
        _mm_storeu_si128((__m128i *)to, _mm_unpacklo_epi8(a, b));
        _mm_storeu_si128((__m128i *)(to + 16), _mm_unpackhi_epi8(a, b));
    }
    INLINE void read(const void *p, int64_t dtype, int64_t start, int64_t count, float *to) {
        if (dtype != FLOAT16) return read_floats(p, dtype, start, count, to);
        const uint16_t *from = (const uint16_t *)p + start;
        int64_t i = 0;
        for (; i + 8 <= count; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
        for (; i < count; i++) to[i] = from_float16(from[i]);
    }
    INLINE void write(const float *from, int64_t count, void *p, int64_t dtype, int64_t start) {
        if (dtype != FLOAT16) return write_floats(from, count, p, dtype, start);
        uint16_t *to = (uint16_t *)p + start;
        int64_t i = 0;
        for (; i + 8 <= count; i += 8)
            _mm_storeu_si128((__m128i *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
        for (; i < count; i++) to[i] = to_float16(from[i]);
    }
};

}  // namespace
}  // namespace hf_fp8
