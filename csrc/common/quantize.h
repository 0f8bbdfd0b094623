// The meaning of quantisation, one element at a time. Vector and GPU kernels are faster forms of these functions and must give the same bytes.
//
//   absmax = max |x| over the block (NaN if the block holds a NaN), inv = fl(1 / absmax), 0 for an all-zero block
//   v      = fl(x * inv), clamped to [-1, 1]
//   code   = number of decision thresholds below v
//
// Every comparison is written so that a NaN counts as above all thresholds.
#pragma once

#include "tables.h"
#include "types.h"

namespace bnb {

constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr uint32_t kQuietNaNBits = 0x7fc00000u;

// Bits of |x|. As unsigned integers they are ordered like the magnitudes, with every NaN above infinity, so an integer maximum propagates NaN.
BNB_HD uint32_t magnitude_bits(float x) { return float_bits(x) & 0x7fffffffu; }

BNB_HD float magnitude(float x) { return float_from_bits(magnitude_bits(x)); }

BNB_HD float absmax_from_bits(uint32_t largest) { return float_from_bits(largest > kInfinityBits ? kQuietNaNBits : largest); }

BNB_HD float inverse_absmax(float absmax) { return absmax == 0.0f ? 0.0f : 1.0f / absmax; }

// A denormal absmax has an infinite inverse. Zero stays zero then, and anything else saturates to +-1.
BNB_HD float normalise(float x, float inverse) {
    if (x == 0.0f && magnitude_bits(inverse) == kInfinityBits)
        return 0.0f;
    const float v = x * inverse;
    return v > 1.0f ? 1.0f : v < -1.0f ? -1.0f : v;
}

BNB_HD int nf4_code(float v) {
    constexpr NF4Thresholds thresholds = kNF4Thresholds;
    int code = 0;
    for (int i = 0; i < 15; ++i)
        code += !(v <= thresholds.value[i]);
    return code;
}

BNB_HD int fp4_code(float v) {
    constexpr FP4Thresholds thresholds = kFP4Thresholds;
    constexpr FP4CodeOfRank code_of_rank = kFP4CodeOfRank;
    const float magnitude = v < 0.0f ? -v : v;
    int rank = 0;
    for (int i = 0; i < 7; ++i)
        rank += !(magnitude <= thresholds.value[i]);
    const int sign = (v < 0.0f && rank != 0) ? 8 : 0;
    return sign | code_of_rank.value[rank];
}

// Decision threshold between two neighbours of an 8-bit code.
BNB_HD float midpoint(float lower, float upper) { return (lower + upper) * 0.5f; }

// Number of midpoints below v; `midpoints` holds 255 ascending values.
BNB_HD int blockwise_code(const float* midpoints, float v) {
    int code = 0;
    for (int step = 128; step > 0; step >>= 1)
        code += !(v <= midpoints[code + step - 1]) ? step : 0;
    return code;
}

// For moments of optimizers: a code whose value has not the sign of x moves by one, so that a small negative number does not become +0. The lowest
// `negatives` values have a minus sign; 0 where all have one sign, which leaves no choice.
BNB_HD int keep_sign(int code, float x, int negatives) {
    if (x < 0.0f && code >= negatives && negatives > 0)
        return code - 1;
    return x > 0.0f && code < negatives ? code + 1 : code;
}

// LLM.int8(): code = round(x * fl(127 / stat)) for the largest magnitude `stat` of a row or column, and 0 where that is not a number: a statistic of
// zero, infinity or NaN alone says what was there. Next to denormals only the inverse is infinite and codes saturate.
constexpr float kInt8Max = 127.0f;
constexpr float kPerInt8Code = 1.0f / 127.0f;
constexpr float kPerInt8Product = 1.0f / (127.0f * 127.0f);

// Added to a number below 2^22 it rounds that to the nearest integer, ties to even, and leaves it in the low bits.
constexpr float kRoundingShift = 12582912.0f; // 1.5 * 2^23

BNB_HD int8_t int8_code(float x, float inverse) {
    const float v = x * inverse;
    if (!(v == v))
        return 0;
    const float clamped = v > kInt8Max ? kInt8Max : v < -kInt8Max ? -kInt8Max : v;
    return int8_t(float_bits(clamped + kRoundingShift) & 0xffu);
}

// The layer's product scales 16 classes of columns of a token apart: column k is of class (k / 4) % 16. That is how the columns meet in the lanes of
// a vector of 64 codes, so that scaling a class apart costs nothing until the lanes are added up.
constexpr int kInt8Classes = 16;
constexpr int kInt8Period = 64; // columns after which the classes repeat
BNB_HD int int8_class(int64_t column) { return int(column / 4 % kInt8Classes); }

// Element 2j lives in the high nibble of byte j, element 2j+1 in the low one.
BNB_HD int get_nibble(const uint8_t* packed, int64_t i) { return (i & 1) ? packed[i >> 1] & 15 : packed[i >> 1] >> 4; }

// Elements are put in ascending order. An even one also fills its neighbour's nibble with the code of zero, which is what an odd count leaves there.
BNB_HD void put_nibble(uint8_t* packed, int64_t i, int code, int zero_code) {
    uint8_t& byte = packed[i >> 1];
    byte = uint8_t((i & 1) ? (byte & 0xf0) | code : (code << 4) | zero_code);
}

} // namespace bnb
