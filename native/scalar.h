// Plain C++, for any processor; also what an instruction set must offer. Compilers make vectors of these loops.
#pragma once
#include "common.h"

namespace hf_fp8 {
namespace {

struct Scalar {
    static constexpr int W = 4;    // floats in F
    static constexpr int MR = 4;   // rows of inputs in a tile
    static constexpr int NV = 4;   // F in a row of a panel; W * NV is a multiple of 16
    static constexpr int FEW = 8;  // rows of inputs up to which `dots` is used
    static constexpr int AHEAD = 0;  // bytes that codes are fetched ahead

    struct F {
        float v[W];
    };
    struct Bytes {  // 4 * W codes of one byte, or 2 * W of two
        uint8_t v[4 * W];
    };
    typedef bool Mark;  // whether NaN codes were seen
    struct [[maybe_unused]] Mode {};  // sets the processor's modes while it exists

    static F zero() { return F{}; }
    static F set1(float a) { return F{{a, a, a, a}}; }
    static F load(const float *p) {
        F f;
        memcpy(&f, p, sizeof f);
        return f;
    }
    static void store(float *p, F f) { memcpy(p, &f, sizeof f); }
    static F add(F a, F b) {
        for (int i = 0; i < W; i++) a.v[i] += b.v[i];
        return a;
    }
    static F fma(F a, F b, F c) {
        for (int i = 0; i < W; i++) c.v[i] += a.v[i] * b.v[i];
        return c;
    }
    static float sum(F f) { return (f.v[0] + f.v[1]) + (f.v[2] + f.v[3]); }

    static Bytes bytes(const uint8_t *p) {
        Bytes b;
        memcpy(&b, p, sizeof b);
        return b;
    }
    static void prefetch(const uint8_t *) {}
    static Mark unmarked() { return false; }
    static void mark(Mark &m, Bytes b) {
        for (uint8_t c : b.v) m |= (c & 0x7F) == 0x7F;
    }
    static bool marked(Mark m) { return m; }
    // Vector J of the four or two of the codes, divided by 2^shift; NaN codes of E4M3 give any number.
    template <int64_t C, int64_t J>
    static F widen(Bytes b) {
        F f;
        for (int i = 0; i < W; i++) f.v[i] = widen_one(C, b.v, (is_float(C) ? J % 2 : J) * W + i);
        return f;
    }
    // The numbers, -8 to 7, of the nibbles of words from bit 4 J on.
    template <int64_t J>
    static F nibble(Bytes b) {
        F f;
        for (int i = 0; i < W; i++) f.v[i] = (float)((b.v[4 * i + J / 2] >> (J % 2 * 4) & 15) - 8);
        return f;
    }
    // Lane i of a vector that `load_lanes` loads is number i >> shift from p on, of W that are read.
    struct Lanes {
        int v[W];
    };
    static Lanes lanes(int64_t shift) {
        Lanes found;
        for (int i = 0; i < W; i++) found.v[i] = (int)((int64_t)i >> shift);
        return found;
    }
    static F load_lanes(const float *p, const Lanes &l) {
        F f;
        for (int i = 0; i < W; i++) f.v[i] = p[l.v[i]];
        return f;
    }
    static int64_t shift(int64_t) { return 0; }
    // One chunk of inputs in the order in which `widen` gives codes.
    static void order(int64_t, const float *from, float *to) { memcpy(to, from, 4 * W * sizeof(float)); }

    // 16 codes times 16 scales, as `dequantize` defines it; NaN codes of E4M3 give any number.
    template <int64_t C>
    static void widen_row(const uint8_t *codes, const float *scales, float *to) {
        for (int i = 0; i < 16; i++) to[i] = widen_one(C, codes, i) * scales[i];
    }
    static bool any_nan(const uint8_t *codes) {
        bool found = false;
        for (int i = 0; i < 16; i++) found |= (codes[i] & 0x7F) == 0x7F;
        return found;
    }
    // Bytes d to d + count (at most 16) of 16 rows: tile[byte][row]; whether there are NaN codes of E4M3 among them.
    static bool transpose(const uint8_t *const *rows, int64_t d, int64_t count, uint8_t (*tile)[16]) {
        bool found = false;
        for (int r = 0; r < 16; r++)
            for (int64_t i = 0; i < count; i++) {
                uint8_t c = rows[r][d + i];
                tile[i][r] = c;
                found |= (c & 0x7F) == 0x7F;
            }
        return found;
    }
    // Pairs of bytes: number i of the first 16, then of the second.
    static void zip(const uint8_t *first, const uint8_t *second, uint8_t *to) {
        for (int i = 0; i < 16; i++) {
            to[2 * i] = first[i];
            to[2 * i + 1] = second[i];
        }
    }
    // int8 times int8: sums of W int32 numbers, and W pairs of 16-bit numbers.
    struct S {
        int32_t v[W];
    };
    struct P {
        int16_t v[2 * W];
    };
    static S zero_sums() { return S{}; }
    static S load_sums(const int32_t *p) {
        S s;
        memcpy(&s, p, sizeof s);
        return s;
    }
    static void store_sums(int32_t *p, S s) { memcpy(p, &s, sizeof s); }
    static P load_pairs(const int16_t *p) {
        P found;
        memcpy(&found, p, sizeof found);
        return found;
    }
    static P set_pair(const int16_t *p) {
        P found;
        for (int i = 0; i < 2 * W; i++) found.v[i] = p[i % 2];
        return found;
    }
    static S add_products(P a, P b, S s) {
        for (int i = 0; i < W; i++) s.v[i] += (int32_t)a.v[2 * i] * b.v[2 * i] + (int32_t)a.v[2 * i + 1] * b.v[2 * i + 1];
        return s;
    }
    // 16 pairs: number i of the first 16 codes, then of the second.
    static void interleave(const uint8_t *first, const uint8_t *second, int16_t *to) {
        for (int i = 0; i < 16; i++) {
            to[2 * i] = (int8_t)first[i];
            to[2 * i + 1] = (int8_t)second[i];
        }
    }

    static void read(const void *p, int64_t dtype, int64_t start, int64_t count, float *to) { read_floats(p, dtype, start, count, to); }
    static void write(const float *from, int64_t count, void *p, int64_t dtype, int64_t start) {
        write_floats(from, count, p, dtype, start);
    }
};

}  // namespace
}  // namespace hf_fp8
