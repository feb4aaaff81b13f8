// int8 inputs times int8 weights, summed exactly in int32. `I::Pairs` multiplies pairs of numbers widened to 16 bits.
#pragma once
#include "matmul.h"
#include "quantize.h"

namespace hf_fp8 {

template <class I>
struct Int8Matmul {
    typedef typename I::S S;
    static constexpr int W = I::W, MR = I::MR, NV = I::NV, NR = W * NV;
    static constexpr int64_t DEPTH = 512, GROUP = 4, ROWS = 480, SERIAL = 1 << 16;
    static constexpr int64_t EIGHT = 8;    // numbers of one row of inputs that lie next to each other
    static constexpr int64_t PACKED = 48;  // rows of inputs that are copied in one item of work
    static_assert(PACKED % MR == 0 && ROWS % PACKED == 0, "whole tiles");

    // Pairs of 16-bit numbers (d, d + 1) of NR rows of the weight, next to each other; zeros after the last column.
    static void pack(const Int8Product &p, int64_t j0, int64_t d0, int64_t count, int16_t *to) {
        for (int64_t half = 0; half < NR; half += 16) {
            const uint8_t *w[16];
            for (int r = 0; r < 16; r++) w[r] = (const uint8_t *)p.codes + least(j0 + half + r, p.n - 1) * p.row_stride;
            for (int64_t d = 0; d < count; d += 16) {
                uint8_t tile[17][16];
                const int64_t here = least(16, count - d);
                I::transpose(w, d0 + d, here, tile);
                if (here % 2) memset(tile[here], 0, 16);
                for (int64_t i = 0; i < here; i += 2) I::interleave(tile[i], tile[i + 1], to + (d + i) * NR + 2 * half);
            }
        }
    }

    // x: pairs of M rows, four of each at a time.
    template <int M>
    INLINE void tile(const int16_t *x, const int16_t *panel, int64_t pairs, int32_t *sums, int64_t stride, bool first) {
        S acc[M][NV];
        for (int m = 0; m < M; m++)
            for (int v = 0; v < NV; v++) acc[m][v] = first ? I::zero_sums() : I::load_sums(sums + m * stride + v * W);
        auto add = [&](int64_t j) __attribute__((always_inline)) {
            typename I::P w[NV];
            for (int v = 0; v < NV; v++) w[v] = I::load_pairs(panel + j * 2 * NR + v * 2 * W);
            for (int m = 0; m < M; m++) {
                typename I::P value = I::set_pair(x + m * EIGHT + 2 * j);
                for (int v = 0; v < NV; v++) acc[m][v] = I::add_products(value, w[v], acc[m][v]);
            }
        };
        for (int64_t d = EIGHT / 2; d <= pairs; d += EIGHT / 2, x += M * EIGHT, panel += EIGHT * NR)
            unroll<EIGHT / 2>([&](auto j) __attribute__((always_inline)) { add(decltype(j)::value); });
        for (int64_t j = 0; j < pairs % (EIGHT / 2); j++) add(j);
        for (int m = 0; m < M; m++)
            for (int v = 0; v < NV; v++) I::store_sums(sums + m * stride + v * W, acc[m][v]);
    }

    static void tiles(int64_t rows, const int16_t *x, const int16_t *panel, int64_t pairs, int32_t *sums, int64_t stride, bool first) {
        switch (rows) {
            case 1: return tile<1>(x, panel, pairs, sums, stride, first);
            case 2: return tile<2>(x, panel, pairs, sums, stride, first);
            case 3: return tile<3>(x, panel, pairs, sums, stride, first);
            case 4: return tile<4>(x, panel, pairs, sums, stride, first);
            case 5: return tile<5>(x, panel, pairs, sums, stride, first);
            case 6: return tile<6>(x, panel, pairs, sums, stride, first);
            default: return tile<MR>(x, panel, pairs, sums, stride, first);
        }
    }
    static int64_t rows_of_tile(int64_t left) { return left >= MR ? MR : least(6, left); }

    // Inputs of tiles, in 16 bits, as Matmul has them.
    static void pack_inputs(const Int8Product &p, int64_t from, int64_t to, int64_t stride, int16_t *packed) {
        for (int64_t m = from, here; m < to; m += here) {
            const int64_t block = m / ROWS * ROWS;
            here = rows_of_tile(least(block + ROWS, p.m) - m);
            for (int64_t r = 0; r < here; r++) {
                int16_t *at = packed + m * stride + r * EIGHT;
                const int8_t *x = p.x + (m + r) * p.x_stride;
                for (int64_t d = 0; d < stride; d += EIGHT, at += here * EIGHT)
                    for (int64_t i = 0; i < EIGHT; i++) at[i] = d + EIGHT <= p.k || d + i < p.k ? x[d + i] : 0;
            }
        }
    }

    static bool item(const Int8Product &p, const int16_t *x, int64_t x_stride, int64_t first, int64_t last, int64_t j0, int64_t panels) {
        const int64_t rows = last - first, stride = panels * NR, columns = least(stride, p.n - j0);
        int16_t *panel = (int16_t *)memory(PANEL, panels * DEPTH * NR * sizeof(int16_t));
        int32_t *sums = (int32_t *)memory(SUMS, rows * stride * sizeof(int32_t));
        if (!panel || !sums) return false;
        for (int64_t d0 = 0; d0 < p.k; d0 += DEPTH) {
            const int64_t count = least(DEPTH, p.k - d0);
            for (int64_t q = 0; q < panels; q++) pack(p, j0 + q * NR, d0, count, panel + q * DEPTH * NR);
            for (int64_t m = 0; m < rows;) {
                const int64_t here = rows_of_tile(rows - m);
                const int16_t *from = x + (first + m) * x_stride + d0 * here;
                for (int64_t q = 0; q < panels; q++)
                    tiles(here, from, panel + q * DEPTH * NR, (count + 1) / 2, sums + m * stride + q * NR, stride, d0 == 0);
                m += here;
            }
        }
        float scales[GROUP * NR], values[GROUP * NR];
        for (int64_t j = 0; j < columns; j++) scales[j] = read_float(p.scales, p.scale_dtype, j0 + j);
        for (int64_t m = 0; m < rows; m++) {
            const int32_t *from = sums + m * stride;
            const float scale = p.x_scales[first + m];
            // The scale of a weight first, or, if the product with it may overflow, the smaller of both.
            for (int64_t j = 0; j < columns; j++) {
                const bool swap = scales[j] >= 0x1p90f && scale < scales[j];
                values[j] = (float)from[j] * (swap ? scale : scales[j]) * (swap ? scales[j] : scale);
            }
            if (p.added)
                for (int64_t j = 0; j < columns; j++) values[j] += p.added[(first + m) * p.n + j0 + j];
            if (p.bias)
                for (int64_t j = 0; j < columns; j++) values[j] += read_float(p.bias, p.bias_dtype, j0 + j);
            I::write(values, columns, p.out, p.out_dtype, (first + m) * p.n + j0);
        }
        return true;
    }

    static int multiply(const Int8Product *given) {
        const Int8Product &p = *given;
        const int64_t x_stride = divide_up(p.k, EIGHT) * EIGHT, all = divide_up(p.n, NR), blocks = divide_up(p.m, ROWS);
        const int64_t threads = p.n * p.k <= SERIAL && p.m < 8 ? 1 : p.threads;
        const int64_t group = least(GROUP, divide_up(all * blocks, threads * 4)), across = divide_up(all, group);
        int16_t *x = (int16_t *)memory(NATURAL, p.m * x_stride * sizeof(int16_t));
        if (!x) return -1;
        for_each(divide_up(p.m, PACKED), p.m * p.k < SERIAL ? 1 : threads, [&](int64_t i) {
            pack_inputs(p, i * PACKED, least((i + 1) * PACKED, p.m), x_stride, x);
        });
        int failed = 0;
        for_each(across * blocks, threads, [&](int64_t i) {
            typename I::Mode mode;
            const int64_t first = i / across * ROWS, q = i % across * group;
            if (!item(p, x, x_stride, first, least(first + ROWS, p.m), q * NR, least(group, all - q)))
                __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        });
        release_large();
        return failed ? -1 : 0;
    }
};

template <class I>
constexpr Kernels kernels_of(const char *name, int (*supported)()) {
    return {name, supported, nullptr, Matmul<I>::multiply, Matmul<I>::dequantize, Int8Matmul<I>::multiply,
            Quantize<I>::quantize, Quantize<I>::amax, Quantize<I>::tokens, Quantize<I>::columns, Int4<I>::unpack};
}

}  // namespace hf_fp8
