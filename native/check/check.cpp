// Compares the library with plain loops in double precision, with each instruction set that this processor has.
//
//     g++ -std=c++17 -O2 native/*.cpp native/check/check.cpp -pthread -o check && ./check
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include <thread>

#include "numbers.h"

extern "C" {
const char *hf_fp8_name(int64_t);
int64_t hf_fp8_use(int64_t);
int64_t hf_fp8_multiply(const Product *);
int64_t hf_fp8_multiply_int8(const Int8Product *);
int64_t hf_fp8_dequantize(const Weights *, void *, int64_t, int64_t);
int64_t hf_fp8_quantize(const Rounding *);
int64_t hf_fp8_amax(const Rounding *);
int64_t hf_fp8_quantize_tokens(const Tokens *);
int64_t hf_fp8_columns(const Columns *);
int64_t hf_fp8_unpack(const Weights *, int8_t *, int64_t);
void hf_fp8_use_openmp(void *, void *, void *, void *);
}

// What OpenMP runtimes offer, with two or three threads whatever was asked for.
static void gomp_parallel(void (*body)(void *), void *data, unsigned, unsigned) {
    std::thread second(body, data), third(body, data);
    body(data), second.join(), third.join();
}
static void fork_call(void *, int32_t, void (*body)(int32_t *, int32_t *, void *), ...) {
    va_list list;
    va_start(list, body);
    void *data = va_arg(list, void *);
    va_end(list);
    std::thread second(body, nullptr, nullptr, data);
    body(nullptr, nullptr, data), second.join();
}
static void push_threads(void *, int32_t, int32_t) {}
static int32_t thread_number(void *) { return 0; }
static void choose_threads() {
    void *gomp = (void *)gomp_parallel, *fork = (void *)fork_call;
    const int64_t way = pick(3);
    hf_fp8_use_openmp(way == 1 ? gomp : nullptr, way == 2 ? fork : nullptr, (void *)push_threads, (void *)thread_number);
}

enum Kind { ANY, WITH_NAN, SUBNORMAL_CODES, HUGE_INPUTS, TINY_INPUTS };
struct Case {
    const char *instructions, *function;
    int64_t m, n, k, parts, block_rows, block_cols, code, transposed, matrices;
    Kind kind;
};
static int64_t checked;
// Whether a number is the rounding of one within `error` of the wanted one; prints the case if not.
static bool agrees(const Case &c, const Numbers &out, int64_t at, double wanted, double error) {
    checked++;
    const double found = out[at];
    if (isnan(wanted) && isnan(found)) return true;
    if (rounded(wanted - error, out.dtype) <= found && found <= rounded(wanted + error, out.dtype)) return true;
    const char *kinds[] = {"", ", some NaN", ", all subnormal or the lowest", ", huge inputs", ", tiny inputs"};
    printf("%s: %s, m=%d n=%d k=%d, %d matrices, %d parts, scales of %d x %d, ", c.instructions, c.function, (int)c.m, (int)c.n, (int)c.k,
           (int)c.matrices, (int)c.parts, (int)c.block_rows, (int)c.block_cols);
    const char *codes[] = {"E4M3", "int8", "bfloat16", "float16", "int4"};
    printf("%s%s%s: number %d, %s, is %.9g, not %.9g\n", codes[c.code], kinds[c.kind],
           c.transposed ? ", transposed" : "", (int)at, FORMATS[out.dtype].name, found, wanted);
    return false;
}

// The products of random inputs and a weight whose numbers are `dense`.
static bool check_products(Case c, const Weights &weights, const std::vector<double> &dense) {
    // Inputs, and where those of several matrices come from and go to.
    c.function = "multiply";
    const int64_t width = c.transposed ? c.k : c.n, depth = c.transposed ? c.n : c.k;
    const bool moved = c.matrices > 1;
    const int64_t share = moved ? 1 + pick(3) : 1, x_rows = moved ? c.m / share + 2 : c.m, out_rows = moved ? c.m + 3 : c.m;
    const int64_t x_stride = depth + 3 * pick(2), middle = c.kind == HUGE_INPUTS ? 115 : c.kind == TINY_INPUTS ? -130 : 0;
    const Numbers x(x_rows * x_stride - (x_stride - depth), pick(c.kind == HUGE_INPUTS ? 2 : 3), middle - 8, middle + 5), bias(width, pick(3), -3, 3);
    Numbers out(out_rows * width, pick(3));
    std::vector<int32_t> ends(c.matrices, (int32_t)c.m);  // of five the second has none
    for (int64_t e = 0; e + 1 < c.matrices; e++)
        ends[e] = e == 1 ? ends[0] : (int32_t)least(c.m, (e ? ends[e - 1] : 0) + pick(c.m / c.matrices + 2));
    std::vector<int64_t> sources(c.m), targets(out_rows);
    const bool in_order = pick(2);
    for (int64_t i = 0; i < c.m; i++) sources[i] = in_order || !moved ? i : pick(x_rows * share);
    for (int64_t i = 0; i < out_rows; i++) {
        const int64_t other = moved ? pick(i + 1) : i;
        targets[i] = targets[other], targets[other] = i;
    }
    const void *given_bias = pick(2) && !c.transposed ? bias.bytes.data() : nullptr;
    const Product product = {weights, x.bytes.data(), x.dtype, x_stride, c.m, moved ? ends.data() : nullptr,
                             moved ? sources.data() : nullptr, moved ? targets.data() : nullptr, share, x_rows,
                             given_bias, bias.dtype, out.bytes.data(), out.dtype, c.transposed, 3};
    hf_fp8_multiply(&product);
    // AMX multiplies inputs of 16 bits here, times scales, where outputs have no more.
    const double relative = c.transposed && out.dtype != FLOAT32 && !strcmp(c.instructions, "amx") ? 0x1p-15 : 2e-6;
    std::vector<double> row(depth);
    for (int64_t i = 0, e = 0; i < c.m; i++) {
        while (ends[e] <= i) e++;
        for (int64_t d = 0; d < depth; d++) row[d] = x[sources[i] / share * x_stride + d];
        for (int64_t j = 0; j < width; j++) {
            const double *w = &dense[e * c.n * c.k + (c.transposed ? j : j * c.k)];
            double sum = given_bias ? bias[j] : 0, size = fabs(sum);
            for (int64_t d = 0; d < depth; d++, w += c.transposed ? c.k : 1) sum += row[d] * *w, size += fabs(row[d] * *w);
            if (!agrees(c, out, targets[i] * width + j, sum, size * relative)) return false;
        }
    }
    for (int64_t i = c.m; i < out_rows; i++)  // nothing was written there
        for (int64_t j = 0; j < width; j++)
            if (!agrees(c, out, targets[i] * width + j, Numbers(1, out.dtype)[0], 0)) return false;
    return true;
}

// dequantize and multiply
static bool check_weight(Case c) {
    // Codes, rows and matrices apart from each other, up to the last code; scales; and their products. Strides are of codes here.
    const int64_t row_stride = c.k + 3, stride = c.n * row_stride + 5, total = c.matrices * c.n * c.k, each = c.n / c.parts;
    const uint8_t bits = c.kind == SUBNORMAL_CODES || (c.kind == TINY_INPUTS && pick(2)) ? 0x87 : 0xFF;
    const Numbers halves(c.matrices * stride - 8, c.code == BF16 ? BFLOAT16 : FLOAT16, -26, 4);
    std::vector<uint8_t> codes = halves.bytes;
    if (!is_float(c.code)) codes.resize(c.matrices * stride - 8);
    for (uint8_t &code : codes) {
        if (is_float(c.code)) break;
        code = (uint8_t)pick(256) & bits;
        if (c.code == E4M3 && (code & 0x7F) == 0x7F) code = 0x7E;
    }
    for (int64_t i = pick(c.n); i < c.matrices * c.n && c.kind == WITH_NAN; i += 1 + pick(c.n))
        codes[i / c.n * stride + i % c.n * row_stride + pick(c.k)] = pick(2) ? 0xFF : 0x7F;
    const int64_t across = divide_up(c.k, c.block_cols), down = divide_up(each, c.block_rows);
    const bool extreme = c.kind == HUGE_INPUTS || c.kind == TINY_INPUTS;
    const int64_t power = c.kind == HUGE_INPUTS ? -40 : c.kind == TINY_INPUTS ? 40 : -8;
    const Numbers scales(c.matrices * c.parts * down * across, pick(extreme ? 2 : 3), power, power + 6);
    double values[256];
    for (int i = 0; i < 256; i++) values[i] = c.code == E4M3 ? decode(i, 3, 4) : (int8_t)i;
    std::vector<double> dense(total);
    for (int64_t i = 0; i < total; i++) {
        const int64_t matrix = i / c.k / c.n, row = i / c.k % c.n, column = i % c.k;
        const int64_t grid = (matrix * c.parts + row / each) * down * across;
        const int64_t block = row % each / c.block_rows * across + column / c.block_cols;
        const int64_t at = matrix * stride + row * row_stride + column;
        dense[i] = (is_float(c.code) ? halves[at] : values[codes[at]]) * scales[grid + block];
    }
    const Weights weights = {codes.data(), scales.bytes.data(), c.code, scales.dtype, c.matrices, c.n, c.k,
                             row_stride * size_of(c.code), stride * size_of(c.code), c.parts, c.block_rows, c.block_cols};
    choose_threads();
    if (pick(8) == 0) {
        c.function = "dequantize";
        Numbers out(total, pick(3));
        hf_fp8_dequantize(&weights, out.bytes.data(), out.dtype, 3);
        for (int64_t i = 0; i < total; i++)
            if (!agrees(c, out, i, rounded(dense[i], FLOAT32), 0)) return false;
    }
    return check_products(c, weights, dense);
}

// Memory that ends where a page starts that cannot be read.
struct Guarded {
    size_t size, page = sysconf(_SC_PAGESIZE), pages;
    char *all;
    explicit Guarded(const std::vector<uint8_t> &bytes) : size(bytes.size()), pages((size + page - 1) / page * page) {
        all = (char *)mmap(nullptr, pages + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        memcpy(all + pages - size, bytes.data(), size);
        mprotect(all + pages, page, PROT_NONE);
    }
    ~Guarded() { munmap(all, pages + page); }
    const void *data() const { return all + pages - size; }
};

// unpack and multiply, of words of eight codes of 4 bits
static bool check_int4(Case c, bool has_zero_points) {
    // Strides are of words here. Bits after the last column, and of rows after the last one of a part, are any.
    const int64_t row_stride = divide_up(c.k, 8) + pick(3), stride = c.n * row_stride + pick(3), total = c.matrices * c.n * c.k;
    const int64_t each = c.n / c.parts, across = divide_up(c.k, c.block_cols), words = divide_up(each, 8);
    std::vector<uint8_t> codes(4 * ((c.matrices - 1) * stride + (c.n - 1) * row_stride + divide_up(c.k, 8)));
    std::vector<uint8_t> zeros(4 * c.matrices * c.parts * words * across);
    for (uint8_t &byte : codes) byte = (uint8_t)pick(256);
    for (uint8_t &byte : zeros) byte = (uint8_t)pick(256);
    const bool extreme = c.kind == HUGE_INPUTS || c.kind == TINY_INPUTS;
    const int64_t power = c.kind == HUGE_INPUTS ? -40 : c.kind == TINY_INPUTS ? 40 : -8;
    Numbers scales(c.matrices * c.parts * each * across, pick(extreme ? 2 : 3), power, power + 6);
    if (c.kind == WITH_NAN)
        for (int64_t i = pick(3 * across), size = FORMATS[scales.dtype].bytes; i < (int64_t)scales.bytes.size() / size; i += 1 + pick(9 * across))
            memset(&scales.bytes[i * size], 0xFF, size);
    const auto nibble = [](const std::vector<uint8_t> &bytes, int64_t word, int64_t i) { return bytes[4 * word + i / 2] >> (i % 2 * 4) & 15; };
    std::vector<double> dense(total);
    std::vector<int8_t> wanted(total), out(total, 99);
    for (int64_t i = 0; i < total; i++) {
        const int64_t matrix = i / c.k / c.n, row = i / c.k % c.n, column = i % c.k, part = matrix * c.parts + row / each, in_part = row % each;
        const int64_t block = column / c.block_cols, of = nibble(codes, matrix * stride + row * row_stride + column / 8, column % 8);
        const int64_t less = has_zero_points ? nibble(zeros, (part * words + in_part / 8) * across + block, in_part % 8) : 8;
        wanted[i] = (int8_t)(of - less);
        dense[i] = wanted[i] * scales[(part * each + in_part) * across + block];
    }
    const Guarded held_codes(codes), held_scales(scales.bytes), held_zeros(zeros);
    const Weights weights = {(const uint8_t *)held_codes.data(), held_scales.data(), INT4, scales.dtype, c.matrices, c.n, c.k, 4 * row_stride,
                             4 * stride, c.parts, 1, c.block_cols, has_zero_points ? (const int32_t *)held_zeros.data() : nullptr};
    choose_threads();
    hf_fp8_unpack(&weights, out.data(), 3);
    checked += total;
    for (int64_t i = 0; i < total; i++)
        if (out[i] != wanted[i])
            return printf("%s: unpack, n=%d k=%d, blocks of %d: number %d is %d, not %d\n", c.instructions, (int)c.n, (int)c.k, (int)c.block_cols,
                          (int)i, out[i], wanted[i]), false;
    return check_products(c, weights, dense);
}

// All numbers of 16 bits, and of float32 those around the halves between two of them, as scales of codes that are 1.
static bool check_conversions(const char *name, int64_t from, int64_t to) {
    const int64_t count = 1 << 16, low[] = {0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001};
    const std::vector<uint8_t> ones(count, 1);
    Numbers scales(count, from), out(count, to);
    for (int64_t i = 0; i < count; i++) {
        const int64_t bits = from == FLOAT32 ? i << 16 | low[pick(8)] : i;
        memcpy(&scales.bytes[i * FORMATS[from].bytes], &bits, FORMATS[from].bytes);
    }
    const Weights weights = {ones.data(), scales.bytes.data(), INT8, from, 1, 1, count, count, count, 1, 1, 1};
    hf_fp8_dequantize(&weights, out.bytes.data(), to, 1);
    const Case c = {name, "dequantize", 1, 1, count, 1, 1, 1, INT8, 0, 1, ANY};
    for (int64_t i = 0; i < count; i++)
        if (!agrees(c, out, i, rounded(scales[i], to), 0)) return false;
    return true;
}

// quantize and amax, of numbers from the lowest to beyond the largest code, some NaN or infinite
static bool check_quantize(Case c) {
    const int64_t x_stride = c.k + 2, across = divide_up(c.k, c.block_cols), down = divide_up(c.n, c.block_rows);
    Numbers x(c.n * x_stride - 2, pick(3), -13, c.code == E4M3 ? 11 : 8);
    if (c.kind == WITH_NAN)  // all bits are 1, or the exponent's
        for (int64_t i = pick(c.k), size = FORMATS[x.dtype].bytes; i < c.n * x_stride - 2; i += 1 + pick(c.k)) {
            const uint32_t bits = pick(2) ? 0xFFFFFFFF : x.dtype == FLOAT32 ? 0x7F800000 : x.dtype == BFLOAT16 ? 0x7F80 : 0x7C00;
            memcpy(&x.bytes[i * size], &bits, size);
        }
    const Numbers scales(down * across, pick(3), -2, 2);
    Numbers largest(down * across, FLOAT32);
    std::vector<uint8_t> codes(c.n * c.k);
    choose_threads();
    Rounding rounding = {x.bytes.data(), x.dtype, x_stride, c.n, c.k, scales.bytes.data(), scales.dtype,
                         c.block_rows, c.block_cols, c.code, codes.data(), 3};
    hf_fp8_quantize(&rounding);
    rounding.out = largest.bytes.data();
    hf_fp8_amax(&rounding);
    std::vector<double> wanted(down * across);
    for (int64_t i = 0; i < c.n * c.k; i++) {
        const int64_t row = i / c.k, column = i % c.k, block = row / c.block_rows * across + column / c.block_cols;
        const double value = x[row * x_stride + column];
        wanted[block] = isnan(value) || isnan(wanted[block]) ? NAN : fmax(wanted[block], fabs(value));
        const double v = rounded(value / scales[block], FLOAT32), most = c.code == E4M3 ? 448 : 127;
        const double unit = c.code == INT8 ? 1 : ldexp(1, (int)fmax(ilogb(v ? fmin(fabs(v), most) : 1e-9) - 3, -9));
        double code = c.code == E4M3 ? decode(codes[i], 3, 4) : (int8_t)codes[i], nearest = nearbyint(fmin(fabs(v), most) / unit) * unit;
        if (c.code == E4M3 ? isnan(v) || isinf(value) : isnan(v)) nearest = c.code == E4M3 ? NAN : 0;
        checked++;
        if (isnan(nearest) ? isnan(code) : code == copysign(nearest, v)) continue;
        return printf("%s: quantize, %s, %.9g / %.9g: %g, not %g\n", c.instructions, FORMATS[x.dtype].name, value, scales[block], code, nearest), false;
    }
    for (int64_t i = 0; i < down * across; i++)
        if (!agrees(c, largest, i, wanted[i], 0)) return false;
    return true;
}

// int8 inputs, some of whose columns are set aside, and those columns of an int8 weight
static bool check_tokens(Case c) {
    const int64_t x_stride = c.k + 3, count = pick(least(c.k, 5));
    const int64_t low = c.kind == TINY_INPUTS ? -149 : c.kind == HUGE_INPUTS ? 110 : -9;
    Numbers x(c.m * x_stride - 3, pick(3), low, low + 14);
    if (c.kind == WITH_NAN)
        for (int64_t i = pick(c.k), size = FORMATS[x.dtype].bytes; i < c.m * x_stride - 3; i += 1 + pick(3 * c.k)) memset(&x.bytes[i * size], 0xFF, size);
    if (pick(3) == 0) memset(x.bytes.data(), 0, c.k * FORMATS[x.dtype].bytes);
    std::vector<int64_t> columns(count);
    std::vector<float> kept(c.k, 1.0f);
    for (int64_t &column : columns) column = pick(c.k), kept[column] = 0.0f;
    std::vector<int8_t> codes(c.m * c.k);
    Numbers scales(c.m, FLOAT32), outliers(c.m * count, FLOAT32);
    choose_threads();
    const float smallest = 0x1p-126f;
    const Tokens tokens = {x.bytes.data(), x.dtype, x_stride, c.m, c.k, count || pick(2) ? kept.data() : nullptr, columns.data(), count,
                           codes.data(), (float *)scales.bytes.data(), (float *)outliers.bytes.data(), smallest, 3};
    hf_fp8_quantize_tokens(&tokens);
    c.function = "quantize_tokens";
    for (int64_t r = 0; r < c.m; r++) {
        double largest = 0;
        const auto value = [&](int64_t j) { return x[r * x_stride + j] * kept[j]; };
        for (int64_t j = 0; j < c.k; j++) largest = isnan(value(j)) || isnan(largest) ? NAN : fmax(largest, fabs(value(j)));
        const double scale = largest == 0 || rounded(largest / 127, FLOAT32) == 0 ? smallest : rounded(largest / 127, FLOAT32);
        if (!agrees(c, scales, r, scale, 0)) return false;
        for (int64_t j = 0; j < c.k; j++) {
            const double v = rounded(value(j) / scale, FLOAT32), wanted = isnan(v) ? 0 : nearbyint(fmax(-127, fmin(127, v)));
            checked++;
            if (codes[r * c.k + j] == wanted) continue;
            return printf("%s: quantize_tokens, %.9g / %.9g: %d, not %g\n", c.instructions, value(j), scale, codes[r * c.k + j], wanted), false;
        }
        for (int64_t j = 0; j < count; j++)
            if (!agrees(c, outliers, r * count + j, x[r * x_stride + columns[j]], 0)) return false;
    }
    const int64_t row_stride = c.k + pick(2);
    std::vector<int8_t> weight(c.n * row_stride);
    for (int8_t &code : weight) code = (int8_t)pick(256);
    const Numbers of_rows(c.n, pick(3), -12, 3);
    Numbers out(c.n * count, FLOAT32);
    const Columns given = {weight.data(), row_stride, of_rows.bytes.data(), of_rows.dtype, c.n, columns.data(), count, (float *)out.bytes.data(), 3};
    hf_fp8_columns(&given);
    c.function = "columns";
    for (int64_t i = 0; i < c.n * count; i++)
        if (!agrees(c, out, i, rounded(weight[i / count * row_stride + columns[i % count]] * of_rows[i / count], FLOAT32), 0)) return false;
    return true;
}

static bool check_int8(const Case &c) {
    const int64_t x_stride = c.k + 1, row_stride = c.k + 2;
    std::vector<int8_t> x(c.m * x_stride - 1), codes(c.n * row_stride - 2);
    const bool largest = c.kind == SUBNORMAL_CODES;
    for (int8_t &code : x) code = (int8_t)(largest ? -128 : pick(256));
    for (int8_t &code : codes) code = (int8_t)(largest ? -128 : pick(256));
    const Numbers x_scales(c.m, FLOAT32, -12, -3), scales(c.n, pick(3), -12, -3);
    const Numbers bias(c.n, pick(3), -3, 3), added(c.m * c.n, FLOAT32, -3, 3);
    Numbers out(c.m * c.n, pick(3));
    const void *given_bias = pick(2) ? bias.bytes.data() : nullptr, *given_added = pick(2) ? added.bytes.data() : nullptr;
    choose_threads();
    const Int8Product product = {x.data(), x_stride, (const float *)x_scales.bytes.data(), codes.data(), row_stride,
                                 scales.bytes.data(), scales.dtype, given_bias, bias.dtype, (const float *)given_added,
                                 out.bytes.data(), out.dtype, c.m, c.n, c.k, 3};
    hf_fp8_multiply_int8(&product);
    for (int64_t i = 0; i < c.m * c.n; i++) {
        int64_t sum = 0;
        for (int64_t d = 0; d < c.k; d++) sum += x[i / c.n * x_stride + d] * codes[i % c.n * row_stride + d];
        const double scaled = sum * x_scales[i / c.n] * scales[i % c.n];
        const double a = given_added ? added[i] : 0, b = given_bias ? bias[i % c.n] : 0;
        if (!agrees(c, out, i, scaled + a + b, (fabs(scaled) + fabs(a) + fabs(b)) * 4e-7)) return false;
    }
    return true;
}

static bool check_all(const char *name) {
    state = 88172645463325252;
    for (int64_t from : {FLOAT32, BFLOAT16, FLOAT16})
        for (int64_t to : {FLOAT32, BFLOAT16, FLOAT16})
            if (!check_conversions(name, from, to)) return false;
    const struct Scales {
        int64_t n, parts, rows, cols;
    } of_one[] = {{131, 1, 1, 555}, {131, 1, 131, 555}, {130, 2, 65, 555}, {131, 1, 1, 64},
                  {131, 1, 1, 37}, {131, 1, 13, 64}, {130, 2, 13, 64}, {130, 2, 13, 37}},
      of_five[] = {{34, 1, 1, 77}, {34, 2, 5, 64}, {34, 2, 5, 19}, {34, 1, 1, 16}};
    for (int64_t transposed : {0, 1}) {
        for (const Scales &s : of_one)
            for (int64_t m : {1, 2, 3, 5, 7, 17, 30, 70})
                for (int64_t code : {E4M3, INT8, pick(2) ? BF16 : F16}) {
                    const Kind kind = code == E4M3 ? (Kind)pick(5) : ANY;
                    if (!check_weight({name, "", m, s.n, 555, s.parts, s.rows, s.cols, code, transposed, 1, kind})) return false;
                }
        for (const Scales &s : of_five)
            for (int64_t m : {1, 4, 9, 40, 90})
                for (int64_t code : {E4M3, F16})
                    if (!check_weight({name, "", m, s.n, 77, s.parts, s.rows, s.cols, code, transposed, 5, code == E4M3 ? (Kind)pick(2) : ANY}))
                        return false;
        for (const Scales &s : {Scales{270, 1, 1, 450}, Scales{270, 1, 1, 64}, Scales{270, 2, 13, 37}}) {  // several parts in every direction
            const int64_t code = s.cols == 64 ? INT8 : E4M3;
            if (!check_weight({name, "", 780, s.n, 450, s.parts, s.rows, s.cols, code, transposed, 1, code == E4M3 ? (Kind)pick(5) : ANY})) return false;
        }
        for (int64_t n : {1, 15, 33})
            for (int64_t k : {1, 15, 16, 33, 65})
                for (int64_t m : {1, 6, 31, 500})
                    for (int64_t code : {E4M3, pick(2) ? BF16 : F16})
                        if (!check_weight({name, "", m, n, k, 1, 1, k, code, transposed, 1, code == E4M3 ? (Kind)pick(5) : ANY})) return false;
    }
    for (bool has_zero_points : {false, true}) {
        for (int64_t k : {1, 7, 8, 33, 127, 128, 260, 555, 2048, 4700})
            for (int64_t cols : {k, (int64_t)8, (int64_t)16, (int64_t)24, (int64_t)32, (int64_t)64, (int64_t)128, (int64_t)384, (int64_t)4096})
                for (int64_t m : {1, 2, 3, 4, 5, 6, 7, 19}) {
                    const int64_t parts = 1 + pick(2), n = parts * (1 + pick(k > 600 ? 9 : 40));
                    if (!check_int4({name, "", m, n, k, parts, 1, least(cols, k), INT4, 0, 1, (Kind)(pick(3) ? 0 : pick(5))}, has_zero_points)) return false;
                }
        for (int64_t cols : {8, 16, 40, 128})
            for (int64_t m : {1, 4, 9, 40, 90})
                if (!check_int4({name, "", m, 34, 300, 1 + pick(2), 1, cols, INT4, 0, 5, (Kind)pick(2)}, has_zero_points)) return false;
        if (!check_int4({name, "", 500, 270, 450, 2, 1, 64, INT4, 0, 1, ANY}, has_zero_points)) return false;  // several parts in every direction
    }
    for (int64_t code : {E4M3, INT8})
        for (int64_t k : {1, 37, 600})
            for (int64_t rows : {1, 5, 131})
                for (int64_t cols : {(int64_t)1, (int64_t)16, k})
                    for (Kind kind : {ANY, WITH_NAN}) {
                        const Case c = {name, "amax", 1, 131, k, 1, rows, least(cols, k), code, 0, 1, kind};
                        if (!check_quantize(c)) return false;
                    }
    for (int64_t m : {1, 3, 130})
        for (int64_t k : {1, 37, 256, 1037})
            for (Kind kind : {ANY, WITH_NAN, HUGE_INPUTS, TINY_INPUTS})
                if (!check_tokens({name, "", m, pick(2) ? 7 : 600, k, 1, 1, k, INT8, 0, 1, kind})) return false;
    for (int64_t m : {1, 2, 3, 5, 7, 17, 30, 70, 500})
        for (int64_t n : {1, 16, 77})
            for (int64_t k : {1, 16, 63, 1037})
                if (!check_int8({name, "multiply_int8", m, n, k, 1, 1, k, INT8, 0, 1, pick(4) ? ANY : SUBNORMAL_CODES})) return false;
    return true;
}

int main() {
    for (int64_t i = 0; hf_fp8_name(i); i++) {
        checked = 0;
        const bool present = hf_fp8_use(i) == 0;
        if (present && !check_all(hf_fp8_name(i))) return 1;
        if (present) printf("%s: %lld numbers are right\n", hf_fp8_name(i), (long long)checked);
        if (!present) printf("%s: this processor does not have it\n", hf_fp8_name(i));
    }
}
