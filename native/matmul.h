// Inputs times weights of 4, 8 or 16 bits, for any instruction set. `I` describes one: see scalar.h, which is the plainest.
//
// Few rows of input: `dots`. A few rows of weights at a time are widened in registers and multiplied by up to six rows of inputs, so
// each code is read once. Sums are scaled in the end, or after each block of columns.
// Many rows: `Panels`. Columns of the product, a panel at a time, are widened, scaled and stored with the reduction dimension outermost;
// a tile of MR rows times one panel is then a sum of outer products that stays in registers.
#pragma once
#include "common.h"
#include "int4.h"
#include "parallel.h"

namespace hf_fp8 {

template <class I>
struct Matmul {
    typedef typename I::F F;
    static constexpr int W = I::W, CHUNK = 4 * W, MR = I::MR, NV = I::NV, NR = W * NV;
    static constexpr int MOST = 6;            // rows of inputs in one call of `dots`
    static constexpr int64_t DEPTH = 512;     // of a panel; 64 bytes x 512 are 32 kB
    static constexpr int64_t GROUP = 4;       // panels that use a block of inputs while it is in the cache
    static constexpr int64_t MOST_COLUMNS = GROUP * NR;
    static constexpr int64_t ROWS = 480;      // of inputs in one item of work
    static constexpr int64_t FOUR = 4;        // numbers of one row of inputs that lie next to each other
    static constexpr int64_t PIECE = 256;     // numbers that are copied at a time
    static constexpr int64_t PACKED = 48;     // rows of inputs that are copied in one item of work
    static_assert(PACKED % MR == 0, "whole tiles");
    static constexpr int64_t ITEM = 1 << 18;  // codes in one item of work of `dots`, if there are enough for all threads
    static constexpr int64_t SERIAL = 1 << 16;  // codes up to which one thread does all: starting others takes as long

    // ---- inputs

    // Inputs of `dots`, in float32 and in the order in which codes are widened, padded with zeros to whole chunks. Each row is
    // multiplied by a power of two: it makes up for the factor of widened codes, and keeps products in the range of float32.
    struct Inputs {
        float *x;
        double *factor;  // what the products of a row are to be multiplied by
        int64_t stride;
    };

    template <int64_t C>
    static bool prepare(const Product &p, Inputs &in) {
        constexpr int64_t CHUNK = C == INT4 ? Int4<I>::CHUNK : Matmul::CHUNK;
        const int64_t k = p.weights.k, shift = I::shift(C);
        in.stride = divide_up(k, CHUNK) * CHUNK;
        size_t bytes = p.x_rows * (in.stride * sizeof(float) + sizeof(double));
        // From the start of a line of the cache on: vectors that lie in two lines take twice as long to load.
        in.x = (float *)memory(INPUTS, bytes);
        if (!in.x) return false;
        in.factor = (double *)(in.x + p.x_rows * in.stride);
        auto row = [&](int64_t r) {
            float *to = in.x + r * in.stride;
            int64_t start = r * p.x_stride;
            int32_t largest = 0;
            for (int64_t i = 0; i < in.stride; i += CHUNK) {
                float values[CHUNK];
                int64_t count = least(CHUNK, k - i);
                if (count == CHUNK)  // a number that the compiler knows
                    I::read(p.x, p.x_dtype, start + i, CHUNK, values);
                else
                    I::read(p.x, p.x_dtype, start + i, count, values);
                for (int64_t j = count; j < CHUNK; j++) values[j] = 0.0f;
                for (int64_t j = 0; j < CHUNK; j++) largest = larger(largest, finite_magnitude(values[j]));
                if (C == INT4)
                    Int4<I>::order(values, to + i);
                else
                    I::order(C, values, to + i);
            }
            // Up to 2^126 if codes are 2^120 times smaller, so that products are about 1 to 2^15; else up to 2^90. The exponent of a
            // subnormal number is taken to be that of the smallest normal one.
            // Numbers that were never quantized are multiplied as they are.
            const int64_t up = is_float(C) ? 0 : (shift > 100 ? 126 : 90) - ((int64_t)(largest >> 23) - 127);
            in.factor[r] = two_to(shift - up);
            // Two steps, as 2^up may be more than float32 holds.
            float a = as_float((uint32_t)(127 + up / 2) << 23), b = as_float((uint32_t)(127 + up - up / 2) << 23);
            for (int64_t i = 0; i < in.stride; i++) to[i] = to[i] * a * b;
        };
        if (p.x_rows * k < SERIAL)
            for (int64_t r = 0; r < p.x_rows; r++) row(r);
        else
            for_each(p.x_rows, p.threads, row);
        return true;
    }

    // ---- few rows

    // Rows of codes that are in registers at the same time. With few inputs all registers are for sums, and loads of inputs cost nothing.
    static constexpr int together(int r, int m) { return m <= 2 ? 1 : r; }

    template <int64_t C, int A, int R, int M>
    INLINE void accumulate(const uint8_t *const *w, const float *x, int64_t stride, int64_t from, int64_t to, F (*acc)[A][M],
                           typename I::Mark &mark) {
        constexpr int S = size_of(C);
        int64_t i = from;
        for (; i + CHUNK <= to; i += CHUNK) chunk<C, A, R, M>([&](int r) __attribute__((always_inline)) { return w[r] + i * S; }, x + i, stride, acc, mark);
        if (i < to) {
            uint8_t rest[R][CHUNK * S];
            for (int r = 0; r < R; r++) {
                memset(rest[r], 0, CHUNK * S);
                memcpy(rest[r], w[r] + i * S, (to - i) * S);
            }
            chunk<C, A, R, M>([&](int r) __attribute__((always_inline)) { return rest[r]; }, x + i, stride, acc, mark);
        }
    }

    // One chunk of R rows of codes, at codes_of(row).
    template <int64_t C, int A, int R, int M, class CodesOf>
    INLINE void chunk(const CodesOf &codes_of, const float *x, int64_t stride, F (*acc)[A][M], typename I::Mark &mark) {
        constexpr int S = size_of(C), T = together(R, M);
        for (int first = 0; first < R; first += T) {
            typename I::Bytes c[T][S];
            for (int r = 0; r < T; r++)
                for (int s = 0; s < S; s++) {
                    c[r][s] = I::bytes(codes_of(first + r) + s * CHUNK);
                    if (I::AHEAD) I::prefetch(codes_of(first + r) + s * CHUNK + I::AHEAD);
                    if (C == E4M3) I::mark(mark, c[r][s]);
                }
            unroll<4>([&](auto j) __attribute__((always_inline)) {
                constexpr int J = decltype(j)::value;
                F d[T];
                for (int r = 0; r < T; r++) d[r] = I::template widen<C, J>(c[r][J * S / 4]);
                for (int m = 0; m < M; m++) {
                    F v = I::load(x + m * stride + J * W);
                    for (int r = 0; r < T; r++) acc[first + r][J % A][m] = I::fma(d[r], v, acc[first + r][J % A][m]);
                }
            });
        }
    }

    template <int A, int M>
    INLINE F sum_of(const F (&acc)[A][M], int m) {
        F found = acc[0][m];
        for (int a = 1; a < A; a++) found = I::add(found, acc[a][m]);
        return found;
    }

    static bool has_nan(const uint8_t *codes, int64_t k) {
        bool found = false;
        for (int64_t i = 0; i < k; i++) found |= (codes[i] & 0x7F) == 0x7F;
        return found;
    }

    // Sums of R rows of codes times M rows of x, with the scales of blocks of columns if there is more than one.
    template <int64_t C, int R, int M>
    static void dots(const uint8_t *const *w, const float *x, int64_t stride, const Weights &g, int64_t blocks, const int64_t *scale_of,
                     double *out) {
        typename I::Mark mark = I::unmarked();  // of all rows together
        // Sums that do not wait for each other: about 8, as an addition takes 4 cycles, and two can start in each.
        constexpr int A = R * M >= 8 ? 1 : R * M >= 4 ? 2 : 4;
        F acc[R][A][M];
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++)
                for (int a = 0; a < A; a++) acc[r][a][m] = I::zero();
        double power[R];
        if (blocks == 1) {
            accumulate<C, A, R, M>(w, x, stride, 0, g.k, acc, mark);
            for (int r = 0; r < R; r++) power[r] = read_float(g.scales, g.scale_dtype, scale_of[r]);
        } else {
            ScaleRange range[R];
            for (int r = 0; r < R; r++) {
                range[r] = ScaleRange(g, scale_of[r], blocks);
                power[r] = range[r].up;
            }
            F total[R][M];
            for (int r = 0; r < R; r++)
                for (int m = 0; m < M; m++) total[r][m] = I::zero();
            for (int64_t b = 0; b < blocks; b++) {
                int64_t from = b * g.block_cols;
                accumulate<C, A, R, M>(w, x, stride, from, least(from + g.block_cols, g.k), acc, mark);
                for (int r = 0; r < R; r++) {
                    F s = I::set1(read_float(g.scales, g.scale_dtype, scale_of[r] + b) * range[r].down);
                    for (int m = 0; m < M; m++) {
                        total[r][m] = I::fma(sum_of<A, M>(acc[r], m), s, total[r][m]);
                        for (int a = 0; a < A; a++) acc[r][a][m] = I::zero();
                    }
                }
            }
            for (int r = 0; r < R; r++)
                for (int m = 0; m < M; m++) acc[r][0][m] = total[r][m];
        }
        const bool marked = C == E4M3 && I::marked(mark);
        for (int r = 0; r < R; r++) {
            const bool is_nan = marked && has_nan(w[r], g.k);
            for (int m = 0; m < M; m++)
                out[r * M + m] = is_nan ? (double)as_float(0x7FC00000) : (double)I::sum(sum_of<A, M>(acc[r], m)) * power[r];
        }
    }

    struct Segment {
        int64_t matrix, first, last;  // rows of the output
    };

    // R rows at a time, each of another part of the rows: processors fetch several sequences ahead of the reads at the same time, each of
    // them up to the end of a page. 2048 x 2048 on a Zen 3, one thread: 13 GB/s, and 10 if rows come one after the other.
    template <int64_t C, int R, int M>
    static void few_rows(const Product &p, const Inputs &in, int64_t matrix, int64_t first, int64_t n0, int64_t n1) {
        const Weights &g = p.weights;
        const int64_t x0 = p.source(first), part = divide_up(n1 - n0, R);
        ScaleRows scale_rows[R];
        for (ScaleRows &each : scale_rows) each = ScaleRows(g, matrix);
        int64_t to[M];
        for (int m = 0; m < M; m++) to[m] = p.target(first + m) * g.n;
        for (int64_t i = n0; i < n0 + part; i++) {
            const uint8_t *w[R];
            int64_t rows[R], scale_of[R];
            for (int r = 0; r < R; r++) {
                rows[r] = least(i + r * part, n1 - 1);
                w[r] = g.row(matrix, rows[r]);
                scale_of[r] = scale_rows[r].of(rows[r]);
            }
            double found[R * M];
            const float *x = in.x + x0 * in.stride;
            if constexpr (C == INT4)
                Int4<I>::template dots<R, M>(w, x, in.stride, g, matrix, rows, scale_rows[0].blocks, scale_of, found);
            else
                dots<C, R, M>(w, x, in.stride, g, scale_rows[0].blocks, scale_of, found);
            for (int r = 0; r < R && i + r * part < n1; r++) {
                const int64_t row = i + r * part;
                double bias = p.bias ? read_float(p.bias, p.bias_dtype, row) : 0.0;
                for (int m = 0; m < M; m++)
                    write_float(p.out, p.out_dtype, to[m] + row, (float)(found[r * M + m] * in.factor[x0 + m] + bias));
            }
        }
    }

    // Rows first to last of the output times rows n0 to n1 of a matrix.
    template <int64_t C>
    static void few(const Product &p, const Inputs &in, const Segment &s, int64_t n0, int64_t n1) {
        for (int64_t first = s.first; first < s.last;) {
            // As many as lie next to each other.
            int64_t count = 1, x = p.source(first);
            while (count < MOST && first + count < s.last && p.source(first + count) == x + count) count++;
            // Rows of codes at a time, the fastest of 1 to 4 on a Zen 3 (2048 x 2048): as many as there are registers for their sums.
            // Inputs that are not in the nearest cache are waited for less often if more rows share them; codes of 4 bits leave time for it.
            constexpr int ROWS = C == INT4 ? (MR * NV >= 24 ? 4 : 3) : is_float(C) ? 1 : 2;
            switch (count) {
                case 1: few_rows<C, 4, 1>(p, in, s.matrix, first, n0, n1); break;
                case 2: few_rows<C, 4, 2>(p, in, s.matrix, first, n0, n1); break;
                case 3: few_rows<C, C == INT4 ? 4 : is_float(C) ? 1 : 3, 3>(p, in, s.matrix, first, n0, n1); break;
                case 4: few_rows<C, ROWS, 4>(p, in, s.matrix, first, n0, n1); break;
                case 5: few_rows<C, ROWS, 5>(p, in, s.matrix, first, n0, n1); break;
                default: few_rows<C, ROWS, 6>(p, in, s.matrix, first, n0, n1);
            }
            first += count;
        }
    }

    // ---- many rows

    // Panel of columns j0 to j0 + NR of the product, reduction indices d0 to d0 + count: to[d][NR]. The weight is transposed in
    // tiles of 16 x 16 bytes; both bytes of a 16-bit number are put together again afterwards.
    template <int64_t C>
    static void pack(const Weights &g, int64_t matrix, int64_t j0, int64_t d0, int64_t count, float *to) {
        for (int64_t half = 0; half < NR; half += 16) {
            const uint8_t *w[16];
            int64_t scale_of[16];
            ScaleRows scale_rows(g, matrix);
            for (int r = 0; r < 16; r++) {
                int64_t row = least(j0 + half + r, g.n - 1);
                w[r] = g.row(matrix, row);
                scale_of[r] = scale_rows.of(row);
            }
            float scales[16];
            int64_t block = -1, block_end = d0;
            constexpr int64_t S = size_of(C), STEP = 16 / S;
            for (int64_t d = d0; d < d0 + count; d += STEP) {
                const int64_t here = least(STEP, d0 + count - d);
                uint8_t tile[16][16];
                bool has_nan = I::transpose(w, d * S, here * S, tile) && C == E4M3;
                for (int64_t i = 0; i < here; i++) {
                    if (d + i >= block_end) {
                        block = (d + i) / g.block_cols;
                        block_end = (block + 1) * g.block_cols;
                        for (int r = 0; r < 16; r++) scales[r] = read_float(g.scales, g.scale_dtype, scale_of[r] + block);
                    }
                    float *row = to + (d - d0 + i) * NR + half;
                    uint8_t pairs[32];
                    if (S == 2) I::zip(tile[2 * i], tile[2 * i + 1], pairs);
                    I::template widen_row<C>(S == 2 ? pairs : tile[i], scales, row);
                    if (has_nan)
                        for (int r = 0; r < 16; r++)
                            if ((tile[i][r] & 0x7F) == 0x7F) row[r] = as_float(0x7FC00000);
                }
            }
        }
    }

    // The same for x times the weight, all panels at once: columns of the product are columns of the weight, and rows are summed over.
    template <int64_t C>
    static void pack_transposed(const Weights &g, int64_t matrix, int64_t j0, int64_t panels, int64_t d0, int64_t count, float *to) {
        ScaleRows scale_rows(g, matrix);
        int64_t block[MOST_COLUMNS], before = -1;
        float scales[MOST_COLUMNS];
        for (int64_t r = 0; r < panels * NR; r++) block[r] = least(j0 + r, g.k - 1) / g.block_cols;
        const bool is_one = block[0] == block[panels * NR - 1];
        constexpr int64_t S = size_of(C);
        const uint8_t *w = g.row(matrix, d0) + j0 * S;
        for (int64_t d = 0; d < count; d++, w += g.row_stride) {
            I::prefetch(w + 8 * g.row_stride);
            const int64_t first = scale_rows.of(d0 + d);
            if (first != before) {
                before = first;
                float one = read_float(g.scales, g.scale_dtype, first + block[0]);
                for (int64_t r = 0; r < panels * NR; r++) scales[r] = is_one ? one : read_float(g.scales, g.scale_dtype, first + block[r]);
            }
            for (int64_t half = 0; half < panels * NR; half += 16) {
                const int64_t width = g.k - j0 - half;
                float *row = to + half / NR * DEPTH * NR + d * NR + half % NR;
                const uint8_t *codes = w + half * S;
                uint8_t rest[16 * S];
                if (width < 16) {
                    memset(rest, 0, sizeof rest);
                    codes = width > 0 ? (const uint8_t *)memcpy(rest, codes, width * S) : rest;
                }
                widen_16<C>(codes, scales + half, row);
            }
        }
    }

    // x: of M rows, four numbers of each at a time.
    template <int M>
    INLINE void tile(const float *x, const float *panel, int64_t depth, float *sums, int64_t stride, bool first) {
        F acc[M][NV];
        for (int m = 0; m < M; m++)
            for (int v = 0; v < NV; v++) acc[m][v] = first ? I::zero() : I::load(sums + m * stride + v * W);
        auto add = [&](int64_t j) __attribute__((always_inline)) {
            F w[NV];
            for (int v = 0; v < NV; v++) w[v] = I::load(panel + j * NR + v * W);
            for (int m = 0; m < M; m++) {
                F value = I::set1(x[m * FOUR + j]);
                for (int v = 0; v < NV; v++) acc[m][v] = I::fma(value, w[v], acc[m][v]);
            }
        };
        for (int64_t d = FOUR; d <= depth; d += FOUR, x += M * FOUR, panel += FOUR * NR)
            unroll<FOUR>([&](auto j) __attribute__((always_inline)) { add(decltype(j)::value); });
        for (int64_t j = 0; j < depth % FOUR; j++) add(j);
        for (int m = 0; m < M; m++)
            for (int v = 0; v < NV; v++) I::store(sums + m * stride + v * W, acc[m][v]);
    }

    static void tiles(int64_t rows, const float *x, const float *panel, int64_t depth, float *sums, int64_t stride, bool first) {
        switch (rows) {
            case 1: return tile<1>(x, panel, depth, sums, stride, first);
            case 2: return tile<2>(x, panel, depth, sums, stride, first);
            case 3: return tile<3>(x, panel, depth, sums, stride, first);
            case 4: return tile<4>(x, panel, depth, sums, stride, first);
            case 5: return tile<5>(x, panel, depth, sums, stride, first);
            case 6: return tile<6>(x, panel, depth, sums, stride, first);
            default: return tile<MR>(x, panel, depth, sums, stride, first);
        }
    }
    // Rows of the tile that starts `left` rows before the last: whole ones, then what `tiles` has besides.
    static int64_t rows_of_tile(int64_t left) { return left >= MR ? MR : least(6, left); }

    // Inputs of tiles, in float32. Rows far from each other would share a few lines of the cache if k is a power of two.
    static void pack_inputs(const Product &p, const Segment &s, int64_t from, int64_t to, int64_t depth, float *packed) {
        const int64_t stride = divide_up(depth, FOUR) * FOUR;
        for (int64_t m = from, here; m < to; m += here) {
            here = rows_of_tile(s.last - m);
            for (int64_t r = 0; r < here; r++) {
                float *at = packed + m * stride + r * FOUR;
                for (int64_t d = 0; d < depth; d += PIECE) {
                    float values[PIECE + FOUR];
                    const int64_t count = least(PIECE, depth - d);
                    I::read(p.x, p.x_dtype, p.source(m + r) * p.x_stride + d, count, values);
                    for (int64_t i = 0; i < count; i += FOUR, at += here * FOUR) memcpy(at, values + i, FOUR * sizeof(float));
                }
            }
        }
    }

    // Rows of the output times `panels` panels from column j0 on.
    template <int64_t C>
    static bool many(const Product &p, const float *x, const Segment &s, int64_t j0, int64_t panels) {
        const Weights &g = p.weights;
        const int64_t rows = s.last - s.first, depth = p.transposed ? g.n : g.k, width = p.transposed ? g.k : g.n;
        const int64_t stride = panels * NR, x_stride = divide_up(depth, FOUR) * FOUR;
        float *panel = (float *)memory(PANEL, panels * DEPTH * NR * sizeof(float));
        float *sums = (float *)memory(SUMS, rows * stride * sizeof(float));
        if (!panel || !sums) return false;
        for (int64_t d0 = 0; d0 < depth; d0 += DEPTH) {
            const int64_t count = least(DEPTH, depth - d0);
            if (p.transposed)
                pack_transposed<C>(g, s.matrix, j0, panels, d0, count, panel);
            else
                for (int64_t q = 0; q < panels; q++) pack<C>(g, s.matrix, j0 + q * NR, d0, count, panel + q * DEPTH * NR);
            for (int64_t m = 0; m < rows;) {
                const int64_t here = rows_of_tile(rows - m);
                const float *from = x + (s.first + m) * x_stride + d0 * here;
                for (int64_t q = 0; q < panels; q++)
                    tiles(here, from, panel + q * DEPTH * NR, count, sums + m * stride + q * NR, stride, d0 == 0);
                m += here;
            }
        }
        const int64_t columns = least(stride, width - j0);
        for (int64_t m = 0; m < rows; m++) {
            float *from = sums + m * stride;
            if (p.bias)
                for (int64_t j = 0; j < columns; j++) from[j] += read_float(p.bias, p.bias_dtype, j0 + j);
            I::write(from, columns, p.out, p.out_dtype, p.target(s.first + m) * width + j0);
        }
        return true;
    }

    // ---- all

    static bool runs_few(const Product &p, int64_t rows) {
        const Weights &g = p.weights;
        if (g.code == INT4) return true;
        return rows <= I::FEW && !p.transposed && (g.block_cols >= g.k || g.block_cols % CHUNK == 0);
    }

    struct Item {
        Segment segment;
        int64_t from, count;  // rows of the weight; columns of the output and panels; or rows of inputs
        bool is_few;
    };

    template <int64_t C>
    static int run(const Product &p) {
        const Weights &g = p.weights;
        const int64_t depth = p.transposed ? g.n : g.k, width = p.transposed ? g.k : g.n;
        int64_t threads = p.threads, active = 0, items = 0, rows = 0, chunks = 0;
        bool few_used = false, many_used = false;
        auto segments = [&](auto &&use) {
            int64_t first = 0;
            for (int64_t e = 0; e < (p.ends ? g.count : 1); e++) {
                int64_t last = p.ends ? p.ends[e] : p.rows;
                for (int64_t at = first; at < last; at += ROWS) use(Segment{e, at, least(at + ROWS, last)});
                first = last;
            }
        };
        segments([&](const Segment &s) {
            bool is_few = runs_few(p, s.last - s.first);
            active++;
            rows = s.last;
            if (!is_few) chunks += divide_up(s.last - s.first, PACKED);
            (is_few ? few_used : many_used) = true;
        });
        if (!active) return 0;
        const int64_t all = divide_up(width, NR), enough = divide_up(2 * threads, active), large = g.n * g.k / ITEM;
        const int64_t step = divide_up(g.n, least(enough > large ? enough : large, divide_up(g.n, 12)));
        const int64_t group = least(GROUP, divide_up(all * active, threads * 4));
        segments([&](const Segment &s) { items += runs_few(p, s.last - s.first) ? divide_up(g.n, step) : divide_up(all, group); });
        Item *list = (Item *)memory(ITEMS, (items + chunks) * sizeof(Item)), *packed = list + items;
        if (!list) return -1;
        items = chunks = 0;
        segments([&](const Segment &s) {
            if (runs_few(p, s.last - s.first))
                for (int64_t n = 0; n < g.n; n += step) list[items++] = Item{s, n, least(step, g.n - n), true};
            else {
                for (int64_t q = 0; q < all; q += group) list[items++] = Item{s, q * NR, least(group, all - q), false};
                for (int64_t m = s.first; m < s.last; m += PACKED) packed[chunks++] = Item{s, m, least(PACKED, s.last - m), false};
            }
        });
        Inputs in = {};
        if (few_used && !prepare<C>(p, in)) return -1;
        float *x = nullptr;
        if (many_used) {
            x = (float *)memory(NATURAL, rows * divide_up(depth, FOUR) * FOUR * sizeof(float));
            if (!x) return -1;
            for_each(chunks, chunks * PACKED * depth < SERIAL ? 1 : threads, [&](int64_t i) {
                typename I::Mode mode;
                pack_inputs(p, packed[i].segment, packed[i].from, packed[i].from + packed[i].count, depth, x);
            });
        }
        int failed = 0;
        if (g.n * g.k * active <= SERIAL && !many_used) threads = 1;
        for_each(items, threads, [&](int64_t i) {
            typename I::Mode mode;
            const Item &item = list[i];
            if (item.is_few)
                few<C>(p, in, item.segment, item.from, item.from + item.count);
            else if constexpr (C != INT4)
                if (!many<C>(p, x, item.segment, item.from, item.count)) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        });
        return failed ? -1 : 0;
    }

    template <class Use>
    INLINE int of_code(int64_t code, const Use &use) {
        switch (code) {
            case E4M3: return use(Number<E4M3>());
            case INT8: return use(Number<INT8>());
            case BF16: return use(Number<BF16>());
            default: return use(Number<F16>());
        }
    }

    static int multiply(const Product *p) {
        typename I::Mode mode;
        int found = p->weights.code == INT4 ? run<INT4>(*p) : of_code(p->weights.code, [&](auto code) { return run<decltype(code)::value>(*p); });
        release_large();
        return found;
    }

    // ---- dequantize

    template <int64_t C>
    static void dequantize_row(const Weights &g, int64_t blocks, int64_t scale_of, int64_t matrix, int64_t r, void *out, int64_t out_dtype) {
        constexpr int64_t S = size_of(C), PIECE = 256;  // values at a time, in the first cache, if they are converted to 16 bits
        const uint8_t *w = g.row(matrix, r);
        const int64_t start = (matrix * g.n + r) * g.k;
        for (int64_t b = 0; b < blocks; b++) {
            const float scale = read_float(g.scales, g.scale_dtype, scale_of + b);
            float scales[16];
            for (int i = 0; i < 16; i++) scales[i] = scale;
            const int64_t end = least((b + 1) * g.block_cols, g.k);
            for (int64_t piece = b * g.block_cols; piece < end; piece += PIECE) {
                const int64_t size = least(PIECE, end - piece), whole = size / 16 * 16;
                float held[PIECE], *values = out_dtype == FLOAT32 ? (float *)out + start + piece : held;
                for (int64_t i = 0; i < whole; i += 16) widen_16<C>(w + (piece + i) * S, scales, values + i);
                if (whole < size) {
                    uint8_t rest[16 * S] = {0};
                    float last[16];
                    memcpy(rest, w + (piece + whole) * S, (size - whole) * S);
                    widen_16<C>(rest, scales, last);
                    memcpy(values + whole, last, (size - whole) * sizeof(float));
                }
                if (values == held) I::write(held, size, out, out_dtype, start + piece);
            }
        }
    }

    template <int64_t C>
    INLINE void widen_16(const uint8_t *codes, const float *scales, float *to) {
        I::template widen_row<C>(codes, scales, to);
        if (C == E4M3 && I::any_nan(codes))
            for (int j = 0; j < 16; j++)
                if ((codes[j] & 0x7F) == 0x7F) to[j] = as_float(0x7FC00000);
    }

    static int dequantize(const Weights *g, void *out, int64_t out_dtype, int64_t threads) {
        const int64_t step = SERIAL / (g->k + 1) + 1, pieces = divide_up(g->n, step);
        if (g->count * g->n * g->k <= SERIAL) threads = 1;
        for_each(g->count * pieces, threads, [&](int64_t i) {
            typename I::Mode mode;
            const int64_t matrix = i / pieces, last = least((i % pieces + 1) * step, g->n);
            ScaleRows scale_rows(*g, matrix);
            of_code(g->code, [&](auto code) {
                for (int64_t r = i % pieces * step; r < last; r++)
                    dequantize_row<decltype(code)::value>(*g, scale_rows.blocks, scale_rows.of(r), matrix, r, out, out_dtype);
                return 0;
            });
        });
        return 0;
    }
};

}  // namespace hf_fp8
