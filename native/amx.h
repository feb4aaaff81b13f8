// Inputs times weights of one byte on the tiles of AMX: an instruction adds the products of two matrices of bfloat16, 16 x 32 and 32 x 16,
// to one of float32, 16 x 16.
//
// Codes are numbers of bfloat16, whose scales are applied to sums. A float32 input is the sum of three bfloat16 numbers, exactly (but for
// less than 2^-192 of the largest one in its row, which tiles take for 0), a float16 input of two; each part is multiplied. So sums are as
// exact as those of float32, and up to three times as fast.
// A tile of weights has rows of codes as they are in memory, widened; one of inputs has pairs of numbers of up to 16 rows.
#pragma once
#include "avx512_vbmi.h"
#include "parallel.h"

namespace hf_fp8 {

struct AmxMatmul {
    static constexpr int64_t SIDE = 16, STEP = 32;             // of a tile; the latter along the reduction
    static constexpr int64_t TILE = SIDE * STEP;               // numbers
    static constexpr int64_t AHEAD = 256;                      // bytes that rows of codes are fetched ahead
    static constexpr int64_t GROUP = 8;                        // pairs of tiles of weights in one item of work, at most
    static constexpr int64_t ROWS = 256;                       // of inputs in one item of work: with their weights and sums less than half of 2 MB
    static constexpr int64_t ALONE = 256;                      // rows of inputs with which a thread works for itself, at least
    static constexpr int64_t SERIAL = 1 << 16;                 // as in Matmul

    // ---- state of the processor

    // GCC's instructions on tiles do not say which memory they read: what was written before has to be there.
    INLINE void barrier() { asm volatile("" ::: "memory"); }

    struct Config {
        uint8_t palette = 0, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {};  // in a row of each tile
        uint8_t rows[16] = {};
    };

    // What was configured before is configured again in the end: other libraries may count on it.
    class Tiles {
      public:
        Tiles() {
            _tile_storeconfig(&before);
            barrier();
        }
        ~Tiles() {
            barrier();
            if (before.palette) _tile_loadconfig(&before);
            else _tile_release();
        }
        // The number of columns of each tile of sums or inputs; those of weights have 0.
        void configure(const int64_t (&columns)[8]) {
            bool same = used.palette;
            for (int i = 0; i < 8; i++) same &= used.bytes[i] == (columns[i] ? 4 * columns[i] : 64);
            if (same) return;
            used.palette = 1;
            for (int i = 0; i < 8; i++) {
                used.rows[i] = SIDE;
                used.bytes[i] = (uint16_t)(columns[i] ? 4 * columns[i] : 64);
            }
            barrier();
            _tile_loadconfig(&used);
        }

      private:
        alignas(64) Config before, used;
    };

    // ---- inputs

    struct Inputs {
        uint16_t *x;
        double *factor;       // what the products of a row of the output are to be multiplied by
        int64_t depth;        // whole tiles
        float *scales;        // of the rows of each matrix times a power of two, if rows are summed over and have one each; or null
        double *up;           // what makes up for that, for each matrix
    };
    struct Segment {
        int64_t matrix, first, last;  // rows of the output
        int64_t at;                   // columns of tiles of inputs before it
    };
    static constexpr int64_t FEW = SIDE;  // rows of a segment whose parts are columns of the same tiles
    template <int P>
    INLINE int64_t columns_of(const Product &p, int64_t rows) {
        if (p.transposed) return P * tiles_of(rows) * SIDE;
        return rows <= FEW && P * rows > SIDE ? tiles_of(P * rows) * SIDE : P * rows;
    }

    // 16 vectors of 16 numbers, transposed.
    INLINE void transpose(__m512i *a) {
        __m512i b[16];
        for (int i = 0; i < 8; i++) {
            b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
            b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
        }
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 2; j++) {
                a[4 * i + 2 * j] = _mm512_unpacklo_epi64(b[4 * i + j], b[4 * i + 2 + j]);
                a[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(b[4 * i + j], b[4 * i + 2 + j]);
            }
        for (int j = 0; j < 4; j++)
            for (int i = 0; i < 2; i++) {
                b[8 * i + j] = _mm512_shuffle_i32x4(a[8 * i + j], a[8 * i + 4 + j], 0x88);
                b[8 * i + 4 + j] = _mm512_shuffle_i32x4(a[8 * i + j], a[8 * i + 4 + j], 0xDD);
            }
        for (int j = 0; j < 8; j++) {
            a[j] = _mm512_shuffle_i32x4(b[j], b[8 + j], 0x88);
            a[8 + j] = _mm512_shuffle_i32x4(b[j], b[8 + j], 0xDD);
        }
    }

    // For a permutation of 16-bit numbers: the upper ones of all of 32 bits.
    INLINE __m512i upper_halves() {
        alignas(64) static const uint16_t odd[32] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                     33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
        return _mm512_load_si512(odd);
    }

    // The parts of 32 numbers, each 32 numbers of bfloat16. Parts after the first of infinity and NaN are 0.
    template <int P>
    INLINE void split(__m512 first, __m512 second, __m512i *parts) {
        const __m512i order = upper_halves(), high = _mm512_set1_epi32((int)0xFFFF0000);
        __m512 v[2] = {first, second};
        __mmask16 finite[2];
        for (int i = 0; i < 2; i++) {
            finite[i] = _mm512_fpclass_ps_mask(v[i], 0x99) ^ 0xFFFF;
            // A NaN stays one without its lower bits.
            __mmask16 is_nan = _mm512_cmp_ps_mask(v[i], v[i], _CMP_UNORD_Q);
            __m512i bits = _mm512_castps_si512(v[i]);
            v[i] = _mm512_castsi512_ps(_mm512_mask_or_epi32(bits, is_nan, bits, _mm512_set1_epi32(0x00400000)));
        }
        for (int p = 0; p < P; p++) {
            parts[p] = _mm512_permutex2var_epi16(_mm512_castps_si512(v[0]), order, _mm512_castps_si512(v[1]));
            for (int i = 0; i < 2; i++)
                v[i] = _mm512_maskz_sub_ps(finite[i], v[i], _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v[i]), high)));
        }
    }

    // Up to 16 rows of the output, from `first` on: for each step a tile for each part; or, if `joined`, as few tiles as have a column for
    // each part of each row, the first parts of all rows first.
    template <int P>
    static void pack_inputs(const Product &p, const Inputs &in, int64_t matrix, int64_t first, int64_t width, bool joined, uint16_t *to) {
        const int64_t k = p.transposed ? p.weights.n : p.weights.k;
        const float *scales = in.scales ? in.scales + matrix * k : nullptr;
        const double factor = in.scales ? in.up[matrix] : 1.0;
        float up[SIDE], more[SIDE];
        bool as_is[SIDE];
        int64_t start[SIDE];
        for (int64_t r = 0; r < width; r++) {
            start[r] = p.source(first + r) * p.x_stride;
            as_is[r] = P == 1 && !scales && is_moderate(p, start[r], k);
            if (as_is[r]) {
                in.factor[first + r] = factor;
                continue;
            }
            __m512i largest = _mm512_setzero_si512();
            for (int64_t i = 0; i < k; i += SIDE) {
                __m512i magnitude = _mm512_castps_si512(_mm512_abs_ps(read(p, scales, start[r], i, k)));
                __mmask16 finite = _mm512_cmplt_epu32_mask(magnitude, _mm512_set1_epi32(0x7F800000));
                largest = _mm512_mask_max_epu32(largest, finite, largest, magnitude);
            }
            // The largest of a row becomes about 2^90, so that no part of a number is subnormal, which tiles take for 0.
            const int64_t exponent = 90 - ((int64_t)(_mm512_reduce_max_epu32(largest) >> 23) - 127);
            in.factor[first + r] = two_to(-exponent) * factor;
            up[r] = as_float((uint32_t)(127 + exponent / 2) << 23);
            more[r] = as_float((uint32_t)(127 + exponent - exponent / 2) << 23);
        }
        const int64_t apart = joined ? width : SIDE, tiles = joined ? tiles_of(P * width) : P;
        for (int64_t d = 0; d < in.depth; d += STEP) {
            __m512i columns[P * SIDE];
            for (int64_t i = 0; width < SIDE && i < P * SIDE; i++) columns[i] = _mm512_setzero_si512();
            for (int64_t r = 0; r < width; r++) {
                if (P == 1 && as_is[r]) {
                    columns[r] = read_bfloat16(p, start[r], d, k);
                    continue;
                }
                __m512i parts[P];
                __m512 a = _mm512_set1_ps(up[r]), b = _mm512_set1_ps(more[r]);
                split<P>(_mm512_mul_ps(_mm512_mul_ps(read(p, scales, start[r], d, k), a), b),
                         _mm512_mul_ps(_mm512_mul_ps(read(p, scales, start[r], d + SIDE, k), a), b), parts);
                for (int q = 0; q < P; q++) columns[q * apart + r] = parts[q];
            }
            if (p.transposed) {  // rows as they are
                for (int i = 0; i < P * SIDE; i++, to += STEP) _mm512_storeu_si512(to, columns[i]);
                continue;
            }
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t count = !joined ? width : tiles == 1 ? P * width : SIDE;
                const __mmask16 some = (__mmask16)((1u << count) - 1);
                if (count > 1) transpose(columns + t * SIDE);
                for (int64_t i = 0; count > 1 && i < SIDE; i++) _mm512_mask_storeu_epi32(to + i * 2 * count, some, columns[t * SIDE + i]);
                if (count == 1) _mm512_storeu_si512(to, columns[t * SIDE]);
                to += STEP * count;
            }
        }
    }
    // 32 bfloat16 inputs of a row from number `i` of k on, and zeros.
    INLINE __m512i read_bfloat16(const Product &p, int64_t start, int64_t i, int64_t k) {
        const __mmask32 some = k - i >= STEP ? 0xFFFFFFFF : k > i ? ((__mmask32)1 << (k - i)) - 1 : 0;
        return _mm512_maskz_loadu_epi16(some, (const uint16_t *)p.x + start + i);
    }

    // Whether the finite bfloat16 inputs of a row are 0 or from 2^-64 to 2^91: neither products nor sums, times scales of blocks that
    // are up to 2^50 apart, leave float32's range.
    INLINE bool is_moderate(const Product &p, int64_t start, int64_t k) {
        if (p.x_dtype != BFLOAT16) return false;
        const __m512i low = _mm512_set1_epi16(63 << 7), high = _mm512_set1_epi16(218 << 7), infinite = _mm512_set1_epi16(0x7F80);
        __mmask32 odd = 0;
        for (int64_t i = 0; i < k; i += STEP) {
            const __m512i magnitude = _mm512_and_si512(read_bfloat16(p, start, i, k), _mm512_set1_epi16(0x7FFF));
            odd |= _mm512_mask_cmplt_epu16_mask(_mm512_test_epi16_mask(magnitude, magnitude), magnitude, low);
            odd |= _mm512_mask_cmplt_epu16_mask(_mm512_cmplt_epu16_mask(magnitude, infinite), high, magnitude);
        }
        return !odd;
    }
    INLINE int64_t tiles_of(int64_t columns) { return divide_up(columns, SIDE); }

    // 16 inputs of a row from number `i` of k on, times their scales if there are any, and zeros.
    INLINE __m512 read(const Product &p, const float *scales, int64_t start, int64_t i, int64_t k) {
        const int64_t count = k - i, at = start + i;
        const __mmask16 some = count >= SIDE ? 0xFFFF : count > 0 ? (__mmask16)((1u << count) - 1) : 0;
        __m512 found;
        if (p.x_dtype == FLOAT32)
            found = _mm512_maskz_loadu_ps(some, (const float *)p.x + at);
        else {
            const __m256i half = _mm256_maskz_loadu_epi16(some, (const uint16_t *)p.x + at);
            found = p.x_dtype == FLOAT16 ? _mm512_cvtph_ps(half) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        }
        return scales ? _mm512_mul_ps(found, _mm512_maskz_loadu_ps(some, scales + i)) : found;
    }

    // ---- weights

    // 64 codes as numbers of bfloat16: those of the first halves of lanes, and the others.
    template <int64_t C>
    INLINE void widen(__m512i codes, __m512i &first, __m512i &second) {
        if constexpr (C == INT8) {
            auto of = [](__m128i c) __attribute__((always_inline)) {  // exact: eight bits
                return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(c)));
            };
            const __m512i order = upper_halves();
            codes = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), codes);
            first = _mm512_permutex2var_epi16(of(_mm512_extracti32x4_epi32(codes, 0)), order, of(_mm512_extracti32x4_epi32(codes, 1)));
            second = _mm512_permutex2var_epi16(of(_mm512_extracti32x4_epi32(codes, 2)), order, of(_mm512_extracti32x4_epi32(codes, 3)));
        } else
            Avx512Vbmi::widen_64(codes, first, second);
    }

    // 16 rows of codes from row n0 on, columns d0 to d0 + count: a tile for each step.
    template <int64_t C>
    static void widen_rows(const Weights &g, int64_t matrix, int64_t n0, int64_t d0, int64_t count, uint16_t *to) {
        const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // halves of lanes become neighbours
        for (int64_t r = 0; r < SIDE; r++, to += STEP) {
            const uint8_t *codes = g.row(matrix, least(n0 + r, g.n - 1)) + d0;
            for (int64_t i = 0; i < count; i += 2 * STEP) {
                const int64_t here = count - i;
                const __mmask64 some = here >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << here) - 1;
                __m512i first, second;
                widen<C>(_mm512_permutexvar_epi64(order, _mm512_maskz_loadu_epi8(some, codes + i)), first, second);
                _mm_prefetch((const char *)codes + i + AHEAD, _MM_HINT_T0);
                _mm512_store_si512(to + i * SIDE, first);
                _mm512_store_si512(to + (i + STEP) * SIDE, second);
            }
        }
    }

    // The same for a weight that is not transposed: rows r0 to r0 + count, and `across` tiles of 16 columns from j0 on. A tile has pairs of
    // rows; tiles of the same columns are `depth` rows apart.
    template <int64_t C>
    static void widen_columns(const Weights &g, int64_t matrix, int64_t j0, int64_t across, int64_t depth, int64_t r0, int64_t count, uint16_t *to) {
        // So that what `widen` and the halves of lanes below put together are 16 neighbours.
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        for (int64_t r = 0; r < divide_up(count, STEP) * STEP; r += 2, to += 2 * SIDE) {
            const uint8_t *w = g.row(matrix, least(r0 + r, g.n - 1)) + j0;
            for (int64_t t = 0; t < across; t += 4) {
                const int64_t here = least((across - t) * SIDE, g.k - j0 - t * SIDE);
                const __mmask64 some = here >= 64 ? ~(__mmask64)0 : here > 0 ? ((__mmask64)1 << here) - 1 : 0;
                __m512i v[2][2];
                for (int i = 0; i < 2; i++) {
                    const uint8_t *codes = w + i * g.row_stride + t * SIDE;
                    _mm_prefetch((const char *)codes + 8 * g.row_stride, _MM_HINT_T0);
                    const __m512i read = _mm512_maskz_loadu_epi8(r + i < count ? some : 0, codes);
                    widen<C>(_mm512_permutexvar_epi32(order, read), v[i][0], v[i][1]);
                }
                for (int64_t i = 0; i < least(4, across - t); i++) {
                    const __m512i a = v[0][i / 2], b = v[1][i / 2];
                    _mm512_store_si512(to + (t + i) * depth * SIDE, i % 2 ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b));
                }
            }
        }
    }

    // ---- products

    // Two tiles of inputs, or one, of the same rows: where they are, and how many rows each has.
    struct Pair {
        const uint16_t *x[2];
        int64_t width[2];
    };

    // Adds products of `steps` steps to the sums, or starts them. Tiles 0 to 3 are sums, 4 and 5 weights, 6 and 7 inputs.
    template <int P, int T, bool X>
    INLINE void add(const uint16_t *const *w, const Pair &pair, int64_t steps, float *const (*sums)[2], bool start) {
        barrier();
        if (start) {
            _tile_zero(0);
            _tile_zero(2);
            if (T == 2) {
                _tile_zero(1);
                _tile_zero(3);
            }
        } else {
            _tile_loadd(0, sums[0][0], 64);
            _tile_loadd(2, sums[1][0], 64);
            if (T == 2) {
                _tile_loadd(1, sums[0][1], 64);
                _tile_loadd(3, sums[1][1], 64);
            }
        }
        const uint16_t *w0 = w[0], *w1 = w[1], *x0 = pair.x[0], *x1 = pair.x[1];
        const int64_t stride0 = 4 * pair.width[0], stride1 = 4 * pair.width[1];
        for (int64_t s = 0; s < steps; s++, w0 += TILE, w1 += TILE) {
            _tile_loadd(4, w0, 64);
            _tile_loadd(5, w1, 64);
            for (int q = 0; q < P; q++, x0 += STEP / 4 * stride0, x1 += STEP / 4 * stride1) {
                _tile_loadd(6, x0, stride0);
                if constexpr (X) {
                    _tile_dpbf16ps(0, 6, 4);
                    _tile_dpbf16ps(2, 6, 5);
                } else {
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(2, 5, 6);
                }
                if (T == 1) continue;
                _tile_loadd(7, x1, stride1);
                if constexpr (X) {
                    _tile_dpbf16ps(1, 7, 4);
                    _tile_dpbf16ps(3, 7, 5);
                } else {
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_dpbf16ps(3, 5, 7);
                }
            }
        }
        _tile_stored(0, sums[0][0], 64);
        _tile_stored(2, sums[1][0], 64);
        if (T == 2) {
            _tile_stored(1, sums[0][1], 64);
            _tile_stored(3, sums[1][1], 64);
        }
    }

    // Scales and biases of 32 columns of the output.
    struct Scales {
        const Weights *weights = nullptr;
        bool transposed = false, is_one = true;  // whether all sums of a column have one scale
        int64_t matrix = 0, index[2 * SIDE];
        float down[2 * SIDE];
        alignas(64) float up[2 * SIDE], bias[2 * SIDE];
        Scales() = default;
        Scales(const Product &p, const Inputs &in, int64_t m, int64_t j0) : weights(&p.weights), transposed(p.transposed), matrix(m) {
            const Weights &g = p.weights;
            const int64_t blocks = g.grid_cols(), width = transposed ? g.k : g.n;
            is_one = blocks == 1 && (!transposed || in.scales || g.parts * g.grid_rows() == 1);
            ScaleRange all;
            if (transposed && !is_one) all = ScaleRange(g, g.scale_of(m, 0), g.parts * g.grid_rows() * blocks);
            ScaleRows rows(g, m);
            for (int64_t j = 0; j < 2 * SIDE; j++) {
                const int64_t column = least(j0 + j, width - 1);
                index[j] = transposed ? column / g.block_cols : rows.of(column);
                const ScaleRange range = is_one ? ScaleRange() : transposed ? all : ScaleRange(g, index[j], blocks);
                down[j] = range.down;
                up[j] = !is_one ? (float)range.up : in.scales ? 1.0f : read_float(g.scales, g.scale_dtype, transposed ? g.scale_of(m, 0) : index[j]);
                bias[j] = p.bias ? read_float(p.bias, p.bias_dtype, column) : 0.0f;
            }
        }
        // Where the scales of products from number `from` of the reduction on end.
        ALWAYS_INLINE int64_t end(int64_t from) const {
            const Weights &g = *weights;
            if (!transposed) return (from / g.block_cols + 1) * g.block_cols;
            const int64_t each = g.n / g.parts, in_part = from % each;
            return from + least(g.block_rows - in_part % g.block_rows, each - in_part);
        }
        // Adds a tile of sums of one block of the reduction to those of all; `column`: of its first row, or, if transposed, its first column.
        ALWAYS_INLINE void add(const float *block_sums, int64_t column, int64_t from, float *to) const {
            alignas(64) float scale[SIDE];
            const int64_t first = transposed ? weights->scale_of(matrix, from) : from / weights->block_cols;
            for (int64_t j = 0; j < SIDE; j++)
                scale[j] = read_float(weights->scales, weights->scale_dtype, first + index[column + j]) * down[column + j];
            for (int64_t r = 0; r < SIDE; r++, block_sums += SIDE, to += SIDE) {
                const __m512 each = transposed ? _mm512_load_ps(scale) : _mm512_set1_ps(scale[r]);
                _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_load_ps(block_sums), each, _mm512_load_ps(to)));
            }
        }
        // One row of the output, 32 columns from j0 on.
        ALWAYS_INLINE void write(const Product &p, const Inputs &in, int64_t row, __m512 first, __m512 second, int64_t j0) const {
            const int64_t width = transposed ? weights->k : weights->n, at = p.target(row) * width + j0;
            __m512 v[2] = {first, second};
            // Products with powers of two are exact unless inputs are huge or tiny; with those, all is done in double.
            const double factor = in.factor[row], rest = factor * 0x1p45;
            const bool is_one = factor == 1.0, in_range = is_one || (rest >= 0x1p-105 && rest <= 0x1p35);
            const __m512 a = _mm512_set1_ps(is_one ? 1.0f : 0x1p-45f), b = _mm512_set1_ps(is_one ? 1.0f : (float)rest);
            for (int64_t i = 0; i < 2; i++) {
                if (in_range) {
                    const __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(v[i], a), b);
                    v[i] = _mm512_fmadd_ps(scaled, _mm512_load_ps(up + i * SIDE), _mm512_load_ps(bias + i * SIDE));
                    continue;
                }
                alignas(64) float values[SIDE];
                _mm512_store_ps(values, v[i]);
                for (int64_t j = 0, c = i * SIDE; j < SIDE; j++, c++) values[j] = (float)((double)values[j] * up[c] * factor + bias[c]);
                v[i] = _mm512_load_ps(values);
            }
            if (p.out_dtype == BFLOAT16 && width - j0 >= 2 * SIDE) return _mm512_storeu_si512((uint16_t *)p.out + at, to_bfloat16(v[0], v[1]));
            alignas(64) float values[2 * SIDE];
            for (int64_t i = 0; i < 2; i++) _mm512_store_ps(values + i * SIDE, v[i]);
            Avx512::write(values, least(2 * SIDE, width - j0), p.out, p.out_dtype, at);
        }
        // As the function for one number.
        INLINE __m512i to_bfloat16(__m512 first, __m512 second) {
            __m512i bits[2] = {_mm512_castps_si512(first), _mm512_castps_si512(second)};
            for (__m512i &b : bits) {
                const __mmask16 is_nan = _mm512_cmp_ps_mask(_mm512_castsi512_ps(b), _mm512_castsi512_ps(b), _CMP_UNORD_Q);
                const __m512i last = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
                b = _mm512_add_epi32(b, _mm512_add_epi32(last, _mm512_set1_epi32(0x7FFF)));
                b = _mm512_mask_mov_epi32(b, is_nan, _mm512_set1_epi32(0x7FC00000));
            }
            return _mm512_permutex2var_epi16(bits[0], upper_halves(), bits[1]);
        }
    };

    // ---- up to 16 rows of inputs

    // Two tiles of weights times up to 3 of inputs, whose columns are parts of rows. Tiles 0 to 5 are sums, 6 weights, 7 inputs.
    template <int T>
    INLINE void add_step(const uint16_t *const *w, const uint16_t *x, int64_t last) {
        const uint16_t *x1 = x + TILE, *x2 = x + (T - 1) * TILE;
        barrier();
        _tile_loadd(6, w[0], 64);
        _tile_loadd(7, x, 4 * last);
        _tile_dpbf16ps(0, 6, 7);
        if (T == 1) {
            _tile_loadd(6, w[1], 64);
            _tile_dpbf16ps(3, 6, 7);
            return;
        }
        _tile_loadd(7, x1, 64);
        _tile_dpbf16ps(1, 6, 7);
        if (T == 3) {
            _tile_loadd(7, x2, 64);
            _tile_dpbf16ps(2, 6, 7);
        }
        _tile_loadd(6, w[1], 64);
        if (T == 3) _tile_dpbf16ps(5, 6, 7);
        if (T == 3) _tile_loadd(7, x1, 64);
        _tile_dpbf16ps(4, 6, 7);
        _tile_loadd(7, x, 64);
        _tile_dpbf16ps(3, 6, 7);
    }
    template <int T>
    INLINE void start_sums() {
        _tile_zero(0);
        _tile_zero(3);
        if (T > 1) {
            _tile_zero(1);
            _tile_zero(4);
        }
        if (T > 2) {
            _tile_zero(2);
            _tile_zero(5);
        }
    }
    template <int T>
    INLINE void store_sums(float (*to)[SIDE * SIDE]) {
        _tile_stored(0, to[0], 64);
        _tile_stored(3, to[3], 64);
        if (T > 1) {
            _tile_stored(1, to[1], 64);
            _tile_stored(4, to[4], 64);
        }
        if (T > 2) {
            _tile_stored(2, to[2], 64);
            _tile_stored(5, to[5], 64);
        }
    }

    // Sums of 32 rows of weights, from n0 on: each code is widened, multiplied and forgotten.
    template <int64_t C, int T>
    static void few_sums(const Weights &g, const Scales &scales, int64_t matrix, int64_t n0, const uint16_t *x, int64_t last, float (*sums)[SIDE * SIDE]) {
        alignas(64) uint16_t widened[2][2 * TILE];
        alignas(64) float apart[6][SIDE * SIDE];
        const int64_t step_size = T * last * STEP;
        if (!scales.is_one) {
            memset(sums, 0, 6 * sizeof *sums);
            memset(apart, 0, sizeof apart);
        }
        start_sums<T>();
        for (int64_t d = 0; d < g.k; d += 2 * STEP) {
            for (int i = 0; i < 2; i++) widen_rows<C>(g, matrix, n0 + i * SIDE, d, least(2 * STEP, g.k - d), widened[i]);
            for (int64_t at = d; at < least(d + 2 * STEP, g.k); at += STEP, x += step_size) {
                const uint16_t *w[2] = {widened[0] + (at - d) * SIDE, widened[1] + (at - d) * SIDE};
                add_step<T>(w, x, last);
                if (scales.is_one || ((at + STEP) % g.block_cols && at + STEP < g.k)) continue;
                store_sums<T>(apart);
                for (int i = 0; i < 2; i++)
                    for (int j = 0; j < T; j++) scales.add(apart[3 * i + j], i * SIDE, at, sums[3 * i + j]);
                start_sums<T>();
            }
        }
        if (scales.is_one) store_sums<T>(sums);
    }

    template <int64_t C, int P>
    static void few(const Product &p, const Inputs &in, const Segment &s, int64_t n0, int64_t pairs) {
        const Weights &g = p.weights;
        const int64_t rows = s.last - s.first, tiles = tiles_of(P * rows), last = tiles == 1 ? P * rows : SIDE;
        const uint16_t *x = in.x + s.at * in.depth;
        Tiles state;
        state.configure({last, last, last, last, last, last, 0, last});
        for (int64_t q = 0; q < pairs; q++, n0 += 2 * SIDE) {
            alignas(64) float sums[6][SIDE * SIDE], values[SIDE][2 * SIDE] = {};
            Scales scales(p, in, s.matrix, n0);
            if (P == 1 || tiles == 1) few_sums<C, 1>(g, scales, s.matrix, n0, x, last, sums);
            else if (P == 2 || tiles == 2) few_sums<C, 2>(g, scales, s.matrix, n0, x, last, sums);
            else few_sums<C, 3>(g, scales, s.matrix, n0, x, last, sums);
            for (int i = 0; i < 2; i++)
                for (int64_t t = 0; t < tiles; t++) {
                    __m512i v[SIDE];
                    for (int64_t r = 0; r < SIDE; r++) v[r] = _mm512_load_si512(sums[3 * i + t] + r * SIDE);
                    transpose(v);
                    for (int64_t c = t * SIDE; c < least(P * rows, (t + 1) * SIDE); c++) {
                        float *to = values[c % rows] + i * SIDE;
                        _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), _mm512_castsi512_ps(v[c - t * SIDE])));
                    }
                }
            for (int64_t m = 0; m < rows; m++)
                scales.write(p, in, s.first + m, _mm512_load_ps(values[m]), _mm512_load_ps(values[m] + SIDE), n0);
        }
    }

    // ---- more rows

    // Products of the numbers d0 to d0 + count of the reduction, which `panel` and `pair` hold, to sums[weights][inputs].
    template <int P, bool X>
    static void add_all(const Scales &scales, const uint16_t *const *panel, Pair pair, int64_t here, int64_t d0, int64_t count, float *const (*sums)[2]) {
        if (scales.is_one) {
            const int64_t steps = divide_up(count, STEP);
            return here == 2 ? add<P, 2, X>(panel, pair, steps, sums, d0 == 0) : add<P, 1, X>(panel, pair, steps, sums, d0 == 0);
        }
        alignas(64) float held[4][SIDE * SIDE] = {};
        float *const apart[2][2] = {{held[0], held[1]}, {held[2], held[3]}};
        const uint16_t *w[2] = {panel[0], panel[1]};
        for (int64_t from = d0, end; from < d0 + count; from = end) {
            end = least(scales.end(from), d0 + count);
            const int64_t steps = divide_up(end - from, STEP);
            here == 2 ? add<P, 2, X>(w, pair, steps, apart, true) : add<P, 1, X>(w, pair, steps, apart, true);
            for (int i = 0; i < 2; i++) {
                for (int64_t j = 0; j < here; j++) scales.add(apart[i][j], i * SIDE, from, sums[i][j]);
                w[i] += steps * TILE;
                pair.x[i] += steps * P * STEP * pair.width[i];
            }
        }
    }

    // Rows of a segment times `pairs` pairs of tiles of weights, from column j0 of the output on. X: of a weight that is not transposed.
    template <int64_t C, int P, bool X>
    static bool many(const Product &p, const Inputs &in, const Segment &s, int64_t j0, int64_t pairs) {
        const Weights &g = p.weights;
        const int64_t rows = s.last - s.first, tiles = tiles_of(rows), across = 2 * pairs, reduction = X ? g.n : g.k;
        // So that weights for all of the item, or those for two tiles with the inputs, stay in the caches.
        // By all rows, not those of this thread: parts of a block are scaled one by one, so the sum would depend on how many threads there are.
        const int64_t most = (p.ends ? rows : p.rows) <= 128 ? 512 : P == 1 ? 384 : 256;
        const int64_t depth = divide_up(reduction, divide_up(reduction, most) * 2 * STEP) * 2 * STEP;  // parts of about the same size
        uint16_t *panel = (uint16_t *)memory(PANEL, across * depth * SIDE * sizeof(uint16_t));
        float *sums = (float *)memory(SUMS, tiles * across * SIDE * SIDE * sizeof(float));
        if (!panel || !sums) return false;
        Scales scales[GROUP];
        for (int64_t q = 0; q < pairs; q++) scales[q] = Scales(p, in, s.matrix, j0 + q * 2 * SIDE);
        if (!scales[0].is_one) memset(sums, 0, tiles * across * SIDE * SIDE * sizeof(float));
        Tiles state;
        for (int64_t d0 = 0; d0 < reduction; d0 += depth) {
            const int64_t count = least(depth, reduction - d0);
            if (X) widen_columns<C>(g, s.matrix, j0, across, depth, d0, count, panel);
            for (int64_t t = 0; !X && t < across; t++) widen_rows<C>(g, s.matrix, j0 + t * SIDE, d0, count, panel + t * depth * SIDE);
            for (int64_t m = 0; m < tiles; m += 2) {
                const int64_t here = least(2, tiles - m);
                Pair pair;
                for (int64_t i = 0; i < 2; i++) {
                    pair.width[i] = X ? SIDE : i < here ? least(SIDE, rows - (m + i) * SIDE) : pair.width[0];
                    pair.x[i] = in.x + s.at * in.depth + ((m + i) * SIDE * in.depth + d0 * pair.width[i]) * P;
                }
                const int64_t first = pair.width[0], second = pair.width[1];
                state.configure({first, second, first, second, 0, 0, first, second});
                for (int64_t q = 0; q < pairs; q++) {
                    const uint16_t *const w[2] = {panel + 2 * q * depth * SIDE, panel + (2 * q + 1) * depth * SIDE};
                    float *to = sums + (m * across + 2 * q) * SIDE * SIDE;
                    float *const each[2][2] = {{to, to + across * SIDE * SIDE}, {to + SIDE * SIDE, to + (across + 1) * SIDE * SIDE}};
                    add_all<P, X>(scales[q], w, pair, here, d0, count, each);
                }
            }
        }
        for (int64_t m = 0; m < tiles; m++)
            for (int64_t q = 0; q < pairs; q++) {
                __m512i v[2][SIDE];
                for (int i = 0; i < 2; i++) {
                    const float *from = sums + (m * across + 2 * q + i) * SIDE * SIDE;
                    for (int64_t r = 0; r < SIDE; r++) v[i][r] = _mm512_load_si512(from + r * SIDE);
                    if (!X) transpose(v[i]);
                }
                for (int64_t r = 0; r < least(SIDE, rows - m * SIDE); r++)
                    scales[q].write(p, in, s.first + m * SIDE + r, _mm512_castsi512_ps(v[0][r]), _mm512_castsi512_ps(v[1][r]), j0 + q * 2 * SIDE);
            }
        return true;
    }

    // ---- all

    template <int64_t C, int P, bool X>
    static int run(const Product &p) {
        const Weights &g = p.weights;
        const int64_t reduction = X ? g.n : g.k;
        int64_t active = 0, rows = 0, columns = 0, packs = 0;
        const int64_t each = rows_each(p);
        const auto segments = [&](auto &&use) {
            int64_t first = 0, at = 0;
            for (int64_t e = 0; e < (p.ends ? g.count : 1); e++) {
                const int64_t last = p.ends ? p.ends[e] : p.rows;
                for (int64_t next; first < last; first = next) {
                    next = least(first + each, last);
                    use(Segment{e, first, next, at});
                    at += columns_of<P>(p, next - first);
                }
            }
        };
        segments([&](const Segment &s) {
            active++;
            rows = s.last;
            columns = s.at + columns_of<P>(p, s.last - s.first);
            packs += tiles_of(s.last - s.first);
        });
        if (!active) return 0;
        Inputs in;
        in.depth = divide_up(reduction, STEP) * STEP;
        const int64_t scaled = X && scales_inputs(g) ? g.count : 0;
        in.factor = (double *)memory(NATURAL, (rows + scaled) * sizeof(double) + scaled * g.n * sizeof(float));
        if (!in.factor) return -1;
        in.up = in.factor + rows;
        in.scales = scaled ? (float *)(in.up + scaled) : nullptr;
        for_each(scaled, scaled * g.n < SERIAL ? 1 : p.threads, [&](int64_t matrix) {
            ScaleRows of(g, matrix);
            const ScaleRange range(g, g.scale_of(matrix, 0), g.parts * g.grid_rows());
            in.up[matrix] = range.up;
            for (int64_t r = 0; r < g.n; r++) in.scales[matrix * g.n + r] = read_float(g.scales, g.scale_dtype, of.of(r)) * range.down;
        });
        return !p.ends && p.rows >= ALONE * p.threads ? apart<C, P, X>(p, in, each) : together<C, P, X>(p, in, segments, active, columns, packs);
    }

    // Rows of a segment, at most. Those of one weight are shared out evenly: `few` adds in another order than `many`, and is not to get the
    // rest of more rows, or sums would depend on the number of threads.
    static int64_t rows_each(const Product &p) {
        if (p.ends) return ROWS;
        const int64_t threads = p.rows < ALONE * p.threads ? 1 : p.threads;
        return divide_up(p.rows, threads * divide_up(p.rows, threads * ROWS) * SIDE) * SIDE;
    }

    // Each thread packs its rows and multiplies them with all of the weight: what another one packed is in the cache of another core.
    // 512 rows, bfloat16, two threads of a Xeon, ms, this way / the other: 192 x 576 0.11 / 0.21, 576 x 576 0.29 / 0.39.
    template <int64_t C, int P, bool X>
    static int apart(const Product &p, const Inputs &in, int64_t each) {
        const int64_t all = divide_up(X ? p.weights.k : p.weights.n, 2 * SIDE);
        int failed = 0;
        for_each(divide_up(p.rows, each), p.threads, [&](int64_t i) {
            typename Avx512::Mode mode;
            const Segment s = {0, i * each, least((i + 1) * each, p.rows), 0};
            Inputs own = in;
            own.x = (uint16_t *)memory(INPUTS, columns_of<P>(p, s.last - s.first) * in.depth * sizeof(uint16_t));
            bool done = own.x;
            for (int64_t row = s.first; done && row < s.last; row += SIDE)
                pack_inputs<P>(p, own, 0, row, least(SIDE, s.last - row), false, own.x + (row - s.first) * P * in.depth);
            for (int64_t q = 0; done && q < all; q += GROUP) done = many<C, P, X>(p, own, s, q * 2 * SIDE, least(GROUP, all - q));
            if (!done) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
            release_large(INPUTS);
        });
        return failed ? -1 : 0;
    }

    // Few rows, or those of several weights: all are packed, then each thread takes some columns of the output.
    template <int64_t C, int P, bool X, class Segments>
    static int together(const Product &p, Inputs in, const Segments &segments, int64_t active, int64_t columns, int64_t packs) {
        struct Item {
            Segment segment;
            int64_t from, pairs;
        };
        struct Packed {
            int64_t matrix, first, width, at;
            bool joined;
        };
        const Weights &g = p.weights;
        const int64_t all = divide_up(X ? g.k : g.n, 2 * SIDE), pairs = least(GROUP, divide_up(all * active, p.threads * 4));
        const int64_t items = active * divide_up(all, pairs);
        Item *list = (Item *)memory(ITEMS, items * sizeof(Item) + packs * sizeof(Packed));
        in.x = (uint16_t *)memory(INPUTS, columns * in.depth * sizeof(uint16_t));
        if (!list || !in.x) return -1;
        Packed *packed = (Packed *)(list + items);
        int64_t listed = 0, packs_listed = 0;
        segments([&](const Segment &s) {
            for (int64_t q = 0; q < all; q += pairs) list[listed++] = Item{s, q * 2 * SIDE, least(pairs, all - q)};
            const bool joined = !X && s.last - s.first <= FEW;
            for (int64_t row = s.first; row < s.last; row += SIDE)
                packed[packs_listed++] = Packed{s.matrix, row, least(SIDE, s.last - row), s.at + (row - s.first) * P, joined};
        });
        for_each(packs, p.rows * in.depth < SERIAL ? 1 : p.threads, [&](int64_t i) {
            typename Avx512::Mode mode;
            const Packed &each = packed[i];
            pack_inputs<P>(p, in, each.matrix, each.first, each.width, each.joined, in.x + each.at * in.depth);
        });
        int failed = 0;
        for_each(items, g.n * g.k * active <= SERIAL ? 1 : p.threads, [&](int64_t i) {
            typename Avx512::Mode mode;
            const Item &each = list[i];
            if (!X && each.segment.last - each.segment.first <= FEW)
                few<C, P>(p, in, each.segment, each.from, each.pairs);
            else if (!many<C, P, X>(p, in, each.segment, each.from, each.pairs))
                __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        });
        return failed ? -1 : 0;
    }

    // Whether rows of a weight that are summed over have one scale each: then inputs are multiplied by it.
    static bool scales_inputs(const Weights &g) { return g.block_cols >= g.k && g.parts * g.grid_rows() > 1; }

    template <int64_t C>
    static int of_dtype(const Product &p) {
        // Times their scales, inputs have 24 bits. For outputs of 8 or 11 bits 16 are enough; dense weights would have 8 or 11, too.
        if (p.transposed && scales_inputs(p.weights)) return p.out_dtype == FLOAT32 ? run<C, 3, true>(p) : run<C, 2, true>(p);
        if (p.transposed) return p.x_dtype == BFLOAT16 ? run<C, 1, true>(p) : p.x_dtype == FLOAT16 ? run<C, 2, true>(p) : run<C, 3, true>(p);
        return p.x_dtype == BFLOAT16 ? run<C, 1, false>(p) : p.x_dtype == FLOAT16 ? run<C, 2, false>(p) : run<C, 3, false>(p);
    }

    // Rows of inputs for each matrix, on average, up to which vectors are as fast: 2048 x 2048, one thread of a Xeon, ms, vectors / tiles:
    // 1 row 0.32 / 0.47, 2 rows 0.37 / 0.49, 4 rows 0.73 / 0.51.
    static constexpr int64_t VECTORS = 2;

    // Whether it multiplies: weights of one byte, whose scales are those of whole steps of the reduction, by enough rows.
    static bool takes(const Product &p) {
        const Weights &g = p.weights;
        if (is_float(g.code) || g.code == INT4) return false;
        if (p.transposed) return g.block_cols >= g.k || (g.block_rows % STEP == 0 && (g.parts == 1 || g.n / g.parts % STEP == 0));
        int64_t used = 1;
        if (p.ends) {
            used = p.ends[0] > 0;
            for (int64_t e = 1; e < g.count; e++) used += p.ends[e] > p.ends[e - 1];
        }
        return p.rows > VECTORS * used && (g.block_cols >= g.k || g.block_cols % STEP == 0);
    }

    static int multiply(const Product *p) {
        const int found = p->weights.code == E4M3 ? of_dtype<E4M3>(*p) : of_dtype<INT8>(*p);
        release_large();
        return found;
    }
};

}  // namespace hf_fp8
