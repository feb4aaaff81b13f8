// Numbers of all dtypes, random and rounded, written without the library's conversions.
#pragma once
#include <math.h>

#include <vector>

#include "../common.h"

using namespace hf_fp8;

static const struct {
    const char *name;
    int mantissa, exponent;  // bits
    int bytes;
} FORMATS[] = {{"float32", 23, 8, 4}, {"bfloat16", 7, 8, 2}, {"float16", 10, 5, 2}};  // in the order of Dtype

static uint64_t state;
// A random number below `count`: xorshift, the same numbers on every machine.
static int64_t pick(int64_t count) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (int64_t)((state >> 11) % (uint64_t)count);
}
// The value of bits of a format; a format with 4 bits of exponent is E4M3.
static double decode(uint32_t bits, int mantissa, int exponent) {
    const int field = bits >> mantissa & ((1 << exponent) - 1), fraction = bits & ((1 << mantissa) - 1);
    const int bias = (1 << (exponent - 1)) - 1;
    double value = ldexp(field ? fraction + (1 << mantissa) : fraction, (field ? field : 1) - bias - mantissa);
    if (exponent == 4 ? (bits & 0x7F) == 0x7F : field == 2 * bias + 1) value = exponent == 4 || fraction ? NAN : INFINITY;
    return bits >> (mantissa + exponent) & 1 ? -value : value;
}
// The number of a dtype that is nearest to a value, the even one of two.
static double rounded(double value, int64_t dtype) {
    if (value == 0 || !isfinite(value)) return value;
    const int top = 1 << (FORMATS[dtype].exponent - 1), mantissa = FORMATS[dtype].mantissa;
    const int unit = (int)fmax(ilogb(value) - mantissa, 2 - top - mantissa);
    const double found = ldexp(nearbyint(ldexp(value, -unit)), unit);
    return fabs(found) >= ldexp(1, top) ? copysign(INFINITY, found) : found;
}

struct Numbers {
    int64_t dtype;
    std::vector<uint8_t> bytes;
    Numbers(int64_t count, int64_t dtype) : dtype(dtype), bytes(count * FORMATS[dtype].bytes, 0xA5) {}
    // Random ones of both signs, with exponents from `low` to `high` as far as the dtype has them.
    Numbers(int64_t count, int64_t dtype, int64_t low, int64_t high) : Numbers(count, dtype) {
        const auto &f = FORMATS[dtype];
        const int64_t bias = (1 << (f.exponent - 1)) - 1;
        for (int64_t i = 0; i < count; i++) {
            int64_t field = low + pick(high - low + 1) + bias;
            field = field < 0 ? 0 : least(field, 2 * bias);
            const int64_t rest = pick(2 << f.mantissa), sign = rest >> f.mantissa, mantissa = rest & ((1 << f.mantissa) - 1);
            const uint32_t bits = (uint32_t)((sign << f.exponent | field) << f.mantissa | mantissa);
            memcpy(&bytes[i * f.bytes], &bits, f.bytes);
        }
    }
    double operator[](int64_t i) const {
        const auto &f = FORMATS[dtype];
        uint32_t bits = 0;
        memcpy(&bits, &bytes[i * f.bytes], f.bytes);
        return decode(bits, f.mantissa, f.exponent);
    }
};
