// Types that all files share: the operands as the C interface passes them, and scalar conversions between dtypes.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define HF_FP8_EXPORT extern "C" __declspec(dllexport)
#else
#define HF_FP8_EXPORT extern "C" __attribute__((visibility("default")))
#endif
#define ALWAYS_INLINE inline __attribute__((always_inline))
#define INLINE static ALWAYS_INLINE
#define NOT_INLINED __attribute__((noinline))

namespace hf_fp8 {

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

enum Dtype : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum Code : int64_t { E4M3 = 0, INT8 = 1, BF16 = 2, F16 = 3, INT4 = 4 };  // INT4: see int4.h
constexpr bool is_float(int64_t code) { return code == BF16 || code == F16; }  // numbers of 16 bits that were never quantized
constexpr int64_t size_of(int64_t code) { return is_float(code) ? 2 : 1; }

// Weights (count, n, k), each matrix times its scales. Everything is 64 bits wide, so that any language can fill it in.
struct Weights {
    const uint8_t *codes;
    const void *scales;
    int64_t code;         // Code
    int64_t scale_dtype;  // Dtype
    int64_t count, n, k;
    int64_t row_stride, stride;      // bytes from one row to the next, and from one matrix to the next
    int64_t parts;                   // matrices one above the other in n rows, each with a grid of scales of its own
    int64_t block_rows, block_cols;  // of one scale, at most n / parts and k
    const int32_t *zero_points;      // of INT4, for each row and block of columns: (count, parts, (n / parts) / 8, blocks); null: none

    // Always inlined: of a function that several files hold the linker keeps one, perhaps that of an instruction set that is missing.
    ALWAYS_INLINE int64_t grid_rows() const { return (n / parts + block_rows - 1) / block_rows; }
    ALWAYS_INLINE int64_t grid_cols() const { return (k + block_cols - 1) / block_cols; }
    ALWAYS_INLINE const uint8_t *row(int64_t matrix, int64_t r) const { return codes + matrix * stride + r * row_stride; }
    // Index of the first scale of row r; the others follow it.
    ALWAYS_INLINE int64_t scale_of(int64_t matrix, int64_t r) const {
        int64_t each = n / parts, part = r / each;
        return ((matrix * parts + part) * grid_rows() + (r - part * each) / block_rows) * grid_cols();
    }
    // Zero points of row r: `blocks` numbers of 4 bits, one in each word, from bit `shift` on. Eight rows share their words.
    struct ZeroPoints {
        const int32_t *words;
        int64_t shift;
        ALWAYS_INLINE int32_t operator[](int64_t block) const { return words[block] >> shift & 15; }
    };
    ALWAYS_INLINE ZeroPoints zero_points_of(int64_t matrix, int64_t r, int64_t blocks) const {
        const int64_t each = n / parts, part = parts == 1 ? 0 : r / each, in_part = r - part * each;
        return {zero_points + ((matrix * parts + part) * divide_up(each, 8) + in_part / 8) * blocks, in_part % 8 * 4};
    }
};

// Rows of inputs times the matrices that `ends` assigns to them, or all of them times the only matrix.
struct Product {
    Weights weights;
    const void *x;  // (any, k), or (any, n) if `transposed`
    int64_t x_dtype, x_stride;  // elements from one row to the next
    int64_t rows;               // of the output
    const int32_t *ends;        // (count,): rows of the output up to and including each matrix; null: one matrix for all
    const int64_t *sources;     // (rows,): row of x for each row of the output, times `share`; null: 0, 1, 2, ...
    const int64_t *targets;     // (rows,): where each row of the output is written; null: 0, 1, 2, ...
    int64_t share;              // consecutive numbers in `sources` that mean one row of x
    int64_t x_rows;
    const void *bias;  // (n,) or null
    int64_t bias_dtype;
    void *out;  // (any, n), rows next to each other; (any, k) if `transposed`
    int64_t out_dtype;
    int64_t transposed;  // x times the weight instead of its transpose
    int64_t threads;

    ALWAYS_INLINE int64_t source(int64_t row) const { return (sources ? sources[row] : row) / share; }
    ALWAYS_INLINE int64_t target(int64_t row) const { return targets ? targets[row] : row; }
};

INLINE float as_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
INLINE uint32_t as_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}
// Bits of the magnitude of a number, 0 for an infinite one and for NaN; and the larger of two, both as compilers make vectors of them.
INLINE int32_t finite_magnitude(float f) {
    const int32_t magnitude = (int32_t)(as_bits(f) & 0x7FFFFFFF);
    return magnitude < 0x7F800000 ? magnitude : 0;
}
INLINE int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }
INLINE float from_bfloat16(uint16_t b) { return as_float((uint32_t)b << 16); }
INLINE uint16_t to_bfloat16(float f) {
    uint32_t u = as_bits(f);
    if ((u & 0x7FFFFFFF) > 0x7F800000) return 0x7FC0;
    return (uint16_t)((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}
// The next two and `e4m3` use no subnormal numbers, which the processor may have been told to take for zeros.
INLINE float from_float16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7FFF;
    float magnitude = rest < 0x400 ? (float)(int32_t)rest * 0x1p-24f : as_float((rest << 13) + (rest < 0x7C00 ? 0x38000000 : 0x70000000));
    return as_float(as_bits(magnitude) | sign);
}
INLINE uint16_t to_float16(float f) {
    uint32_t u = as_bits(f), sign = u >> 16 & 0x8000;
    u &= 0x7FFFFFFF;
    if (u > 0x7F800000) return (uint16_t)(sign | 0x7E00);
    if (u >= 0x477FF000) return (uint16_t)(sign | 0x7C00);  // rounds to more than 65504
    if (u < 0x38800000)                                     // subnormal: the sum with 0.5 rounds to multiples of 2^-24
        return (uint16_t)(sign | (as_bits(as_float(u) + 0.5f) - 0x3F000000));
    return (uint16_t)(sign | ((u - 0x38000000 + 0xFFF + (u >> 13 & 1)) >> 13));
}
INLINE float read_float(const void *p, int64_t dtype, int64_t i) {
    if (dtype == FLOAT32) return ((const float *)p)[i];
    uint16_t half = ((const uint16_t *)p)[i];
    return dtype == BFLOAT16 ? from_bfloat16(half) : from_float16(half);
}
INLINE void write_float(void *p, int64_t dtype, int64_t i, float value) {
    if (dtype == FLOAT32)
        ((float *)p)[i] = value;
    else
        ((uint16_t *)p)[i] = dtype == BFLOAT16 ? to_bfloat16(value) : to_float16(value);
}
INLINE float e4m3(uint8_t c) {
    uint32_t rest = c & 0x7F;
    float magnitude = rest < 8 ? (float)(int32_t)rest * 0x1p-9f : as_float(rest == 0x7F ? 0x7FC00000 : (rest << 20) + 0x3C000000);
    return as_float(as_bits(magnitude) | (uint32_t)(c & 0x80) << 24);
}
INLINE void read_floats(const void *p, int64_t dtype, int64_t start, int64_t count, float *to) {
    if (dtype == FLOAT32) {
        memcpy(to, (const float *)p + start, count * sizeof(float));
        return;
    }
    const uint16_t *from = (const uint16_t *)p + start;
    if (dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++) to[i] = from_bfloat16(from[i]);
    else
        for (int64_t i = 0; i < count; i++) to[i] = from_float16(from[i]);
}
INLINE void write_floats(const float *from, int64_t count, void *p, int64_t dtype, int64_t start) {
    if (dtype == FLOAT32) {
        memcpy((float *)p + start, from, count * sizeof(float));
        return;
    }
    uint16_t *to = (uint16_t *)p + start;
    if (dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++) to[i] = to_bfloat16(from[i]);
    else
        for (int64_t i = 0; i < count; i++) to[i] = to_float16(from[i]);
}
INLINE float widen_one(int64_t code, const uint8_t *codes, int64_t i) {
    if (code == E4M3) return e4m3(codes[i]);
    if (code == INT8) return (float)(int8_t)codes[i];
    uint16_t half;
    memcpy(&half, codes + 2 * i, 2);
    return code == BF16 ? from_bfloat16(half) : from_float16(half);
}

template <int64_t V>
struct Number {
    static constexpr int64_t value = V;
};
// f(Number<0>()), ..., f(Number<N - 1>())
template <int N, class Function>
INLINE void unroll(const Function &f) {
    if constexpr (N > 0) {
        unroll<N - 1>(f);
        f(Number<N - 1>());
    }
}

INLINE double two_to(int64_t e) {
    uint64_t bits = (uint64_t)(1023 + e) << 52;
    double d;
    memcpy(&d, &bits, 8);
    return d;
}

// Index of the first scale of each row, for rows that come one after the other: divisions would take as long as short rows.
struct ScaleRows {
    const Weights *weights = nullptr;
    int64_t matrix = 0, blocks = 0, index = 0, until = -1;
    ALWAYS_INLINE ScaleRows() {}
    ALWAYS_INLINE ScaleRows(const Weights &w, int64_t m) : weights(&w), matrix(m), blocks(w.grid_cols()) {}
    ALWAYS_INLINE int64_t of(int64_t row) {
        const Weights &g = *weights;
        if (g.block_rows == 1) return (matrix * g.n + row) * blocks;
        if (row >= until) {
            const int64_t each = g.n / g.parts, in_part = row % each;
            index = g.scale_of(matrix, row);
            until = row + least(g.block_rows - in_part % g.block_rows, each - in_part);
        }
        return index;
    }
};

// The scales of a row, from number `index` on, times `down`, a power of two, are at most about 1, and times `up` themselves again.
struct ScaleRange {
    float down = 1.0f;
    double up = 1.0;
    ALWAYS_INLINE ScaleRange() {}
    ALWAYS_INLINE ScaleRange(const Weights &g, int64_t index, int64_t blocks) {
        int32_t largest = 0;  // bits of a magnitude, of which those of 16 bits are in the same order as their numbers
        if (g.scale_dtype == FLOAT32) {
            const float *scales = (const float *)g.scales + index;
            for (int64_t b = 0; b < blocks; b++) largest = larger(largest, finite_magnitude(scales[b]));
        } else {
            const uint16_t *scales = (const uint16_t *)g.scales + index;
            const int32_t infinite = g.scale_dtype == BFLOAT16 ? 0x7F80 : 0x7C00;
            for (int64_t b = 0; b < blocks; b++) {
                const int32_t magnitude = scales[b] & 0x7FFF;
                largest = larger(largest, magnitude < infinite ? magnitude : 0);
            }
            largest = (int32_t)as_bits(g.scale_dtype == BFLOAT16 ? from_bfloat16((uint16_t)largest) : from_float16((uint16_t)largest));
        }
        int64_t exponent = (int64_t)(largest >> 23) - 127;
        exponent = exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
        down = as_float((uint32_t)(127 - exponent) << 23);
        up = two_to(exponent);
    }
};

// x (rows, cols), and codes, or largest magnitudes, of it.
struct Rounding {
    const void *x;
    int64_t x_dtype, x_stride, rows, cols;
    const void *scales;  // one for each block, next to each other
    int64_t scale_dtype, block_rows, block_cols, code;
    void *out;
    int64_t threads;
};

// int8 codes of rows of inputs x (rows, cols), each with a scale of its own, and columns of x that are not quantized.
struct Tokens {
    const void *x;
    int64_t x_dtype, x_stride, rows, cols;
    const float *kept;  // (cols,): 0 for columns that are quantized as if they were zeros, else 1; null for all ones
    const int64_t *columns;
    int64_t count;  // of `columns`
    int8_t *codes;    // (rows, cols)
    float *scales;    // (rows,): the largest magnitude of what is kept / 127; `smallest` if that is 0
    float *outliers;  // (rows, count): the columns
    double smallest;
    int64_t threads;
};

// Columns of an int8 weight (n, any), times its scales (n,), next to each other: out (n, count).
struct Columns {
    const int8_t *codes;
    int64_t row_stride;
    const void *scales;
    int64_t scale_dtype, n;
    const int64_t *columns;
    int64_t count;
    float *out;
    int64_t threads;
};

// What one instruction set offers. Functions that it lacks, null, are those of `rest`.
struct Kernels {
    const char *name;
    int (*supported)();
    const Kernels *rest;
    int (*multiply)(const Product *);
    int (*dequantize)(const Weights *, void *out, int64_t out_dtype, int64_t threads);
    int (*multiply_int8)(const struct Int8Product *);
    int (*quantize)(const Rounding *);
    int (*amax)(const Rounding *);
    int (*quantize_tokens)(const Tokens *);
    int (*columns)(const Columns *);
    int (*unpack)(const Weights *, int8_t *out, int64_t threads);
};

// Codes of inputs (m, k) times codes of weights (n, k), both int8, exact in int32, times both scales.
struct Int8Product {
    const int8_t *x;
    int64_t x_stride;
    const float *x_scales;  // (m,)
    const int8_t *codes;
    int64_t row_stride;
    const void *scales;  // (n,)
    int64_t scale_dtype;
    const void *bias;
    int64_t bias_dtype;
    const float *added;  // (m, n) that is added to the scaled product, or null
    void *out;           // (m, n)
    int64_t out_dtype;
    int64_t m, n, k, threads;
};

}  // namespace hf_fp8
