// Values to codes, the largest magnitude of blocks, and int8 inputs: what `quantize`, `amax_of` and `quantize_input` of numerics.py
// compute, bit for bit.
// Plain loops, which compilers turn into vectors of the instruction set that they are compiled for.
#pragma once
#include "common.h"
#include "parallel.h"

namespace hf_fp8 {

template <class I>
struct Quantize {
    static constexpr int64_t PIECE = 256;        // values at a time, in the first cache
    static constexpr int64_t ITEM = 1 << 16;     // values in one item of work
    static constexpr int64_t SERIAL = 1 << 15;

    // v divided by its scale, as a code of E4M3: to nearest, ties to even, at most 448. Infinite x: NaN.
    INLINE uint8_t to_e4m3(float x, float v) {
        const uint32_t sign = as_bits(v) >> 24 & 0x80, magnitude = as_bits(v) & 0x7FFFFFFF;
        const uint32_t clamped = magnitude > 0x43E00000 ? 0x43E00000 : magnitude;  // 448
        // Three bits after the leading one; below 2^-6 multiples of 2^-9, which are the last bits of the sum with 2^14.
        const uint32_t normal = ((clamped + 0x7FFFF + (clamped >> 20 & 1)) >> 20) - (120 << 3);
        const uint32_t small = as_bits(as_float(clamped) + 0x1p14f) - 0x46800000;
        const uint32_t code = (clamped < 0x3C800000 ? small : normal) | sign;
        const uint32_t of_nan = magnitude > 0x7F800000 ? 0x7F | sign : code;
        return (uint8_t)((as_bits(x) & 0x7FFFFFFF) == 0x7F800000 ? 0x7F : of_nan);
    }
    INLINE uint8_t to_int8(float v) {
        const float low = v < -127.0f ? -127.0f : v, clamped = low > 127.0f ? 127.0f : low;
        const float number = clamped == clamped ? clamped : 0.0f;
        return (uint8_t)(as_bits(number + 0x1.8p23f) & 0xFF);  // the last bits of the sum are the nearest integer
    }

    static int quantize(const Rounding *given) {
        const Rounding &p = *given;
        const int64_t blocks = divide_up(p.cols, p.block_cols), step = ITEM / (p.cols + 1) + 1;
        for_each(divide_up(p.rows, step), p.rows * p.cols <= SERIAL ? 1 : p.threads, [&](int64_t i) {
            typename I::Mode mode;
            for (int64_t r = i * step; r < least((i + 1) * step, p.rows); r++)
                for (int64_t b = 0; b < blocks; b++) {
                    const float scale = read_float(p.scales, p.scale_dtype, r / p.block_rows * blocks + b);
                    const int64_t end = least((b + 1) * p.block_cols, p.cols);
                    for (int64_t c = b * p.block_cols; c < end; c += PIECE) {
                        float x[PIECE];
                        const int64_t count = least(PIECE, end - c);
                        I::read(p.x, p.x_dtype, r * p.x_stride + c, count, x);
                        uint8_t *to = (uint8_t *)p.out + r * p.cols + c;
                        if (p.code == E4M3)
                            for (int64_t j = 0; j < count; j++) to[j] = to_e4m3(x[j], x[j] / scale);
                        else
                            for (int64_t j = 0; j < count; j++) to[j] = to_int8(x[j] / scale);
                    }
                }
        });
        return 0;
    }

    // out: float32, one number for each block; NaN if there is one in it.
    static int amax(const Rounding *given) {
        const Rounding &p = *given;
        const int64_t blocks = divide_up(p.cols, p.block_cols), rows = divide_up(p.rows, p.block_rows);
        // Bits of magnitudes are ordered as the numbers are, with NaN above infinity.
        for_each(rows, p.rows * p.cols <= SERIAL ? 1 : p.threads, [&](int64_t block_row) {
            typename I::Mode mode;
            uint32_t *out = (uint32_t *)p.out + block_row * blocks;
            for (int64_t b = 0; b < blocks; b++) out[b] = 0;
            for (int64_t r = block_row * p.block_rows; r < least((block_row + 1) * p.block_rows, p.rows); r++)
                for (int64_t b = 0; b < blocks; b++) {
                    const int64_t end = least((b + 1) * p.block_cols, p.cols);
                    uint32_t largest = out[b];
                    for (int64_t c = b * p.block_cols; c < end; c += PIECE) {
                        float x[PIECE];
                        const int64_t count = least(PIECE, end - c);
                        I::read(p.x, p.x_dtype, r * p.x_stride + c, count, x);
                        for (int64_t j = 0; j < count; j++) {
                            const uint32_t magnitude = as_bits(x[j]) & 0x7FFFFFFF;
                            largest = magnitude > largest ? magnitude : largest;
                        }
                    }
                    out[b] = largest;
                }
        });
        return 0;
    }

    // Some numbers of a row, in float32; zeros (or NaN) where they are not kept.
    INLINE void read_kept(const Tokens &p, int64_t row, int64_t c, int64_t count, float *x) {
        I::read(p.x, p.x_dtype, row * p.x_stride + c, count, x);
        if (p.kept)
            for (int64_t j = 0; j < count; j++) x[j] *= p.kept[c + j];
    }

    // A row is read twice, the second time from a cache.
    static int tokens(const Tokens *given) {
        const Tokens &p = *given;
        const int64_t step = ITEM / (p.cols + 1) + 1;
        for_each(divide_up(p.rows, step), p.rows * p.cols <= SERIAL ? 1 : p.threads, [&](int64_t i) {
            typename I::Mode mode;
            float x[PIECE];
            for (int64_t r = i * step; r < least((i + 1) * step, p.rows); r++) {
                uint32_t largest = 0;
                for (int64_t c = 0; c < p.cols; c += PIECE) {
                    const int64_t count = least(PIECE, p.cols - c);
                    read_kept(p, r, c, count, x);
                    for (int64_t j = 0; j < count; j++) {
                        const uint32_t magnitude = as_bits(x[j]) & 0x7FFFFFFF;
                        largest = magnitude > largest ? magnitude : largest;
                    }
                }
                const float quotient = as_float(largest) / 127.0f, scale = quotient == 0.0f ? (float)p.smallest : quotient;
                p.scales[r] = scale;
                for (int64_t c = 0; c < p.cols; c += PIECE) {
                    const int64_t count = least(PIECE, p.cols - c);
                    read_kept(p, r, c, count, x);
                    uint8_t *to = (uint8_t *)p.codes + r * p.cols + c;
                    for (int64_t j = 0; j < count; j++) to[j] = to_int8(x[j] / scale);
                }
                for (int64_t j = 0; j < p.count; j++)
                    p.outliers[r * p.count + j] = read_float(p.x, p.x_dtype, r * p.x_stride + p.columns[j]);
            }
        });
        return 0;
    }

    // Row by row, as memory is read in lines: 64 columns of a 2048 x 2048 weight 0.28 ms, column by column 1.65 (Xeon, two threads).
    static int columns(const Columns *given) {
        const Columns &p = *given;
        const int64_t step = 256, ahead = 8;  // rows
        for_each(divide_up(p.n, step), p.n * p.count <= SERIAL / 4 ? 1 : p.threads, [&](int64_t i) {
            typename I::Mode mode;
            for (int64_t r = i * step; r < least((i + 1) * step, p.n); r++) {
                const float scale = read_float(p.scales, p.scale_dtype, r);
                const int8_t *from = p.codes + r * p.row_stride, *next = from + least(ahead, p.n - 1 - r) * p.row_stride;
                for (int64_t j = 0; j < p.count; j++) {
                    I::prefetch((const uint8_t *)next + p.columns[j]);
                    p.out[r * p.count + j] = from[p.columns[j]] * scale;
                }
            }
        });
        return 0;
    }
};

}  // namespace hf_fp8
