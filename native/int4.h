// Weights of 4 bits: words of 32 bits hold eight codes of a row each, the first in the lowest bits. A code's value is its nibble less 8.
//
// Nibble j of all words of a vector is one vector of numbers: no codes change places. Inputs are stored in that order. As a lane holds
// eight columns next to each other, which have one scale and one zero point, these are numbers of lanes, whatever the size of a block.
#pragma once
#include "common.h"
#include "parallel.h"

namespace hf_fp8 {

template <class I>
struct Int4 {
    typedef typename I::F F;
    static constexpr int W = I::W;
    static constexpr int64_t WORD = 8, CHUNK = WORD * W;  // columns of a word, and of a vector of them
    static constexpr int64_t PIECE = 2048;                // columns whose scales are spread at a time
    static constexpr int64_t MOST_WORDS = PIECE / WORD;
    static constexpr int64_t SERIAL = 1 << 16;  // as in Matmul
    static_assert(PIECE % CHUNK == 0 && MOST_WORDS % W == 0, "whole chunks");

    // One chunk of inputs in the order in which `nibble` gives codes.
    static void order(const float *from, float *to) {
        for (int64_t j = 0; j < WORD; j++)
            for (int64_t i = 0; i < W; i++) to[j * W + i] = from[i * WORD + j];
    }

    // Up to PIECE columns, from `column` on, and the blocks that their words lie in.
    struct Piece {
        int64_t column, columns, words;
        int64_t each, first, before, blocks;  // words of a block; the first block; words of it that lie before the piece; blocks
        ALWAYS_INLINE Piece(const Weights &g, int64_t all, int64_t column)
            : column(column), columns(least(PIECE, g.k - column)), words(divide_up(columns, WORD)) {
            each = all == 1 ? divide_up(g.k, WORD) : g.block_cols / WORD;
            first = column ? column / WORD / each : 0;
            before = column / WORD - first * each, blocks = divide_up(before + words, each);
        }
    };
    // Numbers of blocks, or of words. There is room for a vector from the last one on.
    template <class T>
    using Numbers = T[MOST_WORDS + W];
    template <class T>
    static void spread(const T *values, const Piece &p, T *to) {
        for (int64_t i = 0, until = p.each - p.before; i < p.words; until += p.each, values++)
            for (const int64_t end = least(until, p.words); i < end; i++) to[i] = *values;
    }

    // Where the numbers of a vector of words are: those of blocks of 2^shift words, which are as they were read, or of single words.
    struct Places {
        bool spreads, is_one;  // is_one: for all words of a vector
        int64_t shift;
        typename I::Lanes lanes;
        ALWAYS_INLINE Places(const Weights &g, int64_t all) {
            const int64_t each = g.block_cols / WORD;
            spreads = all > 1 && (each & (each - 1));
            shift = all == 1 ? 62 : spreads ? 0 : __builtin_ctzll(each);
            is_one = 1ll << shift >= W;
            lanes = I::lanes(shift);
        }
        ALWAYS_INLINE F load(const float *p) const { return is_one ? I::set1(*p) : I::load_lanes(p, lanes); }
        ALWAYS_INLINE int64_t at(const Piece &p, int64_t word) const { return ((spreads ? 0 : p.before) + word) >> shift; }
    };
    // of_block(b): of block b of the piece. Of lanes after the last column, nothing is added to sums.
    template <class OfBlock>
    INLINE void fill(const Piece &p, bool spreads, Numbers<float> &to, const OfBlock &of_block) {
        int64_t count = p.blocks;
        for (int64_t b = 0; b < count; b++) to[b] = of_block(b);
        if (spreads) {
            Numbers<float> values;
            for (int64_t b = 0; b < count; b++) values[b] = to[b];
            spread(values, p, to);
            count = p.words;
        }
        I::store(to + count, I::zero());
    }
    // Not inlined, four times each, into `sums`: compiling would take half as long again, for a hundredth of the time of a product.
    NOT_INLINED static ScaleRange range_of(const Weights &g, int64_t index, int64_t blocks) { return ScaleRange(g, index, blocks); }
    NOT_INLINED static void read_scales(const Weights &g, int64_t index, float down, const Piece &p, bool spreads, Numbers<float> &to) {
        if (g.scale_dtype == BFLOAT16) {  // the most common one, without the wait for numbers that were just stored
            const uint16_t *from = (const uint16_t *)g.scales + index + p.first;
            return fill(p, spreads, to, [&](int64_t b) __attribute__((always_inline)) { return from_bfloat16(from[b]) * down; });
        }
        Numbers<float> held;
        const float *from = (const float *)g.scales + index + p.first;
        if (g.scale_dtype == FLOAT16) I::read(g.scales, FLOAT16, index + p.first, p.blocks, held), from = held;
        fill(p, spreads, to, [&](int64_t b) __attribute__((always_inline)) { return from[b] * down; });
    }
    // What is to be added to numbers of nibbles.
    NOT_INLINED static void read_zero_points(const Weights::ZeroPoints &zeros, const Piece &p, bool spreads, Numbers<float> &to) {
        fill(p, spreads, to, [&](int64_t b) __attribute__((always_inline)) { return (float)(8 - zeros[p.first + b]); });
    }

    // One chunk of R rows of codes, `byte` bytes after w, times M rows of x. Z: with zero points.
    template <bool Z, int R, int M>
    INLINE void chunk(const uint8_t *const *w, int64_t byte, const Numbers<float> *scales, const Numbers<float> *added, int64_t place,
                      const Places &places, const float *x, int64_t stride, F (*total)[M]) {
        typename I::Bytes words[R];
        F acc[R][M], more[R];
        for (int r = 0; r < R; r++) {
            words[r] = I::bytes(w[r] + byte);
            if (Z) more[r] = places.load(added[r] + place);
            if (I::AHEAD) I::prefetch(w[r] + byte + I::AHEAD);
            for (int m = 0; m < M; m++) acc[r][m] = I::zero();
        }
        unroll<WORD>([&](auto j) __attribute__((always_inline)) {
            constexpr int64_t J = decltype(j)::value;
            F d[R];
            for (int r = 0; r < R; r++) {
                d[r] = I::template nibble<J>(words[r]);
                if (Z) d[r] = I::add(d[r], more[r]);
            }
            for (int m = 0; m < M; m++) {
                F v = I::load(x + m * stride + J * W);
                for (int r = 0; r < R; r++) acc[r][m] = I::fma(d[r], v, acc[r][m]);
            }
        });
        for (int r = 0; r < R; r++) {
            F scale = places.load(scales[r] + place);
            for (int m = 0; m < M; m++) total[r][m] = I::fma(acc[r][m], scale, total[r][m]);
        }
    }

    // Sums of R rows of codes times M rows of x, scaled. Z: with zero points.
    template <bool Z, int R, int M>
    static void sums(const uint8_t *const *w, const float *x, int64_t stride, const Weights &g, int64_t blocks, const int64_t *scale_of,
                     const Weights::ZeroPoints *zeros, double *out) {
        const Places places(g, blocks);
        alignas(64) Numbers<float> scales[R], added[Z ? R : 1];
        ScaleRange range[R];
        F total[R][M];
        uint8_t rest[R][CHUNK / 2];  // the last chunk, if it is not whole
        const uint8_t *from[R];
        int64_t byte = 0;
        for (int r = 0; r < R; r++) {
            from[r] = w[r];
            range[r] = range_of(g, scale_of[r], blocks);
            for (int m = 0; m < M; m++) total[r][m] = I::zero();
        }
        for (int64_t column = 0; column < g.k; column += PIECE) {
            const Piece piece(g, blocks, column);
            for (int r = 0; r < R; r++) {
                read_scales(g, scale_of[r], range[r].down, piece, places.spreads, scales[r]);
                if (Z) read_zero_points(zeros[r], piece, places.spreads, added[r]);
            }
            for (int64_t i = 0; i < piece.columns; i += CHUNK, byte += CHUNK / 2) {
                if (i + CHUNK > piece.columns) {
                    for (int r = 0; r < R; r++) {
                        memset(rest[r], 0, sizeof rest[r]);
                        from[r] = (const uint8_t *)memcpy(rest[r], w[r] + byte, (piece.words - i / WORD) * sizeof(int32_t));
                    }
                    byte = 0;
                }
                chunk<Z, R, M>(from, byte, scales, added, places.at(piece, i / WORD), places, x + column + i, stride, total);
            }
        }
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++) out[r * M + m] = (double)I::sum(total[r][m]) * range[r].up;
    }

    template <int R, int M>
    static void dots(const uint8_t *const *w, const float *x, int64_t stride, const Weights &g, int64_t matrix, const int64_t *rows,
                     int64_t blocks, const int64_t *scale_of, double *out) {
        if (!g.zero_points) return sums<false, R, M>(w, x, stride, g, blocks, scale_of, nullptr, out);
        Weights::ZeroPoints zeros[R];
        for (int r = 0; r < R; r++) zeros[r] = g.zero_points_of(matrix, rows[r], blocks);
        sums<true, R, M>(w, x, stride, g, blocks, scale_of, zeros, out);
    }

    // ---- unpack

    // less: what is to be subtracted from both nibbles of each byte.
    static void unpack_bytes(const uint8_t *__restrict codes, const uint8_t *__restrict less, int64_t count, int8_t *__restrict to) {
        for (int64_t i = 0; i < count / 2; i++) {
            to[2 * i] = (int8_t)((codes[i] & 15) - less[i]);
            to[2 * i + 1] = (int8_t)((codes[i] >> 4) - less[i]);
        }
        if (count % 2) to[count - 1] = (int8_t)((codes[count / 2] & 15) - less[count / 2]);
    }

    static int unpack(const Weights *given, int8_t *out, int64_t threads) {
        const Weights &g = *given;
        const int64_t step = SERIAL / (g.k + 1) + 1, pieces = divide_up(g.n, step), blocks = g.grid_cols();
        if (g.count * g.n * g.k <= SERIAL) threads = 1;
        for_each(g.count * pieces, threads, [&](int64_t i) {
            const int64_t matrix = i / pieces, last = least((i % pieces + 1) * step, g.n);
            Numbers<uint32_t> less;
            if (!g.zero_points) memset(less, 8, sizeof less);
            for (int64_t r = i % pieces * step; r < last; r++)
                for (int64_t column = 0; column < g.k; column += PIECE) {
                    const Piece piece(g, blocks, column);
                    if (g.zero_points) {
                        const Weights::ZeroPoints zeros = g.zero_points_of(matrix, r, blocks);
                        Numbers<uint32_t> values;
                        for (int64_t b = 0; b < piece.blocks; b++) values[b] = zeros[piece.first + b] * 0x01010101u;
                        spread(values, piece, less);
                    }
                    unpack_bytes(g.row(matrix, r) + column / 2, (const uint8_t *)less, piece.columns, out + (matrix * g.n + r) * g.k + column);
                }
        });
        return 0;
    }
};

}  // namespace hf_fp8
