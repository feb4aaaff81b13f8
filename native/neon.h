// NEON, which every 64-bit ARM processor has.
#pragma once
#include <arm_neon.h>

#include "scalar.h"

namespace hf_fp8 {
namespace {

struct Neon : Scalar {
    static constexpr int W = 4, MR = 6, NV = 4, FEW = 12;
    typedef float32x4_t F;
    typedef uint8x16_t Bytes;
    typedef uint8x16_t Mark;

    INLINE F zero() { return vdupq_n_f32(0.0f); }
    INLINE F set1(float a) { return vdupq_n_f32(a); }
    INLINE F load(const float *p) { return vld1q_f32(p); }
    INLINE void store(float *p, F f) { vst1q_f32(p, f); }
    INLINE F add(F a, F b) { return vaddq_f32(a, b); }
    INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    INLINE float sum(F f) { return vaddvq_f32(f); }
    INLINE Bytes bytes(const uint8_t *p) { return vld1q_u8(p); }
    INLINE void prefetch(const uint8_t *p) { __builtin_prefetch(p); }
    INLINE Mark unmarked() { return vdupq_n_u8(0); }
    INLINE void mark(Mark &m, Bytes b) { m = vmaxq_u8(m, vshlq_n_u8(b, 1)); }
    INLINE bool marked(Mark m) { return vmaxvq_u8(m) == 0xFE; }

    typedef uint8x16_t Lanes;
    INLINE Lanes lanes(int64_t shift) {
        uint8_t bytes[16];
        for (int i = 0; i < 16; i++) bytes[i] = (uint8_t)(4 * ((int64_t)(i / 4) >> shift) + i % 4);
        return vld1q_u8(bytes);
    }
    INLINE F load_lanes(const float *p, const Lanes &l) { return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(load(p)), l)); }
    // With the bits of 2^23, or 2^7, above it, a nibble at bit 0, or 16, is a float32 that is this power too large.
    template <int64_t J>
    INLINE F nibble(Bytes b) {
        const uint32x4_t words = vreinterpretq_u32_u8(b), moved = J % 4 ? vshrq_n_u32(words, J % 4 ? J % 4 * 4 : 1) : words;
        const F one = vdupq_n_f32(J < 4 ? 0x1p23f : 0x1p7f), more = vdupq_n_f32(J < 4 ? 0x1p23f + 8 : 0x1p7f + 8);
        return vsubq_f32(vbslq_f32(vdupq_n_u32(J < 4 ? 15 : 15 << 16), vreinterpretq_f32_u32(moved), one), more);
    }
    // Codes become float16 numbers (the code divided by 2^8), which the processor widens exactly, subnormal ones too.
    static int64_t shift(int64_t code) { return code == E4M3 ? 8 : 0; }
    template <int64_t C>
    INLINE F widen_half(uint16x4_t h) {
        if (C == F16) return vcvt_f32_f16(vreinterpret_f16_u16(h));
        return vreinterpretq_f32_u32(vshll_n_u16(h, 16));
    }
    template <int64_t C, int64_t J>
    INLINE F widen(Bytes b) {
        if constexpr (is_float(C)) {
            uint16x8_t h = vreinterpretq_u16_u8(b);
            return widen_half<C>(J % 2 ? vget_high_u16(h) : vget_low_u16(h));
        }
        int8x16_t c = vreinterpretq_s8_u8(b);
        int8x8_t half = J < 2 ? vget_low_s8(c) : vget_high_s8(c);
        if (C == INT8) {
            int16x8_t wide = vmovl_s8(half);
            return vcvtq_f32_s32(vmovl_s16(J % 2 ? vget_high_s16(wide) : vget_low_s16(wide)));
        }
        uint16x8_t bits = vandq_u16(vreinterpretq_u16_s16(vshll_n_s8(half, 7)), vdupq_n_u16(0xBF80));
        return vcvt_f32_f16(vreinterpret_f16_u16(J % 2 ? vget_high_u16(bits) : vget_low_u16(bits)));
    }
    template <int64_t C>
    INLINE void widen_row(const uint8_t *codes, const float *scales, float *to) {
        Bytes b[2] = {vld1q_u8(codes), is_float(C) ? vld1q_u8(codes + 16) : vdupq_n_u8(0)};
        unroll<4>([&](auto j) __attribute__((always_inline)) {
            constexpr int64_t J = decltype(j)::value;
            F f = widen<C, J>(b[is_float(C) ? J / 2 : 0]);
            if (C == E4M3) f = vmulq_n_f32(f, 0x1p8f);
            vst1q_f32(to + 4 * J, vmulq_f32(f, vld1q_f32(scales + 4 * J)));
        });
    }
    INLINE bool any_nan(const uint8_t *codes) { return vmaxvq_u8(vshlq_n_u8(vld1q_u8(codes), 1)) == 0xFE; }
    INLINE void zip(const uint8_t *first, const uint8_t *second, uint8_t *to) {
        vst2q_u8(to, (uint8x16x2_t){{vld1q_u8(first), vld1q_u8(second)}});
    }
    INLINE bool transpose(const uint8_t *const *rows, int64_t d, int64_t count, uint8_t (*tile)[16]) {
        if (count < 16) return Scalar::transpose(rows, d, count, tile);
        uint8x16_t a[16], b[16], largest = vdupq_n_u8(0);
        for (int r = 0; r < 16; r++) {
            a[r] = vld1q_u8(rows[r] + d);
            largest = vmaxq_u8(largest, vshlq_n_u8(a[r], 1));
        }
        // Four times: the first half of the rows interleaved with the second.
        for (int step = 0; step < 4; step++) {
            for (int i = 0; i < 8; i++) {
                b[2 * i] = vzip1q_u8(a[i], a[i + 8]);
                b[2 * i + 1] = vzip2q_u8(a[i], a[i + 8]);
            }
            for (int i = 0; i < 16; i++) a[i] = b[i];
        }
        for (int i = 0; i < 16; i++) vst1q_u8(tile[i], a[i]);
        return vmaxvq_u8(largest) == 0xFE;
    }

    typedef int32x4_t S;
    typedef int16x8_t P;
    INLINE S zero_sums() { return vdupq_n_s32(0); }
    INLINE S load_sums(const int32_t *p) { return vld1q_s32(p); }
    INLINE void store_sums(int32_t *p, S s) { vst1q_s32(p, s); }
    INLINE P load_pairs(const int16_t *p) { return vld1q_s16(p); }
    INLINE P set_pair(const int16_t *p) {
        int32_t pair;
        memcpy(&pair, p, 4);
        return vreinterpretq_s16_s32(vdupq_n_s32(pair));
    }
    // Products of int8 numbers fit into 16 bits.
    INLINE S add_products(P a, P b, S s) { return vpadalq_s16(s, vmulq_s16(a, b)); }
};

}  // namespace
}  // namespace hf_fp8
