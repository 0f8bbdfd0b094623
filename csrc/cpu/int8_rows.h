// Rows of LLM.int8(): from floating point to codes and from sums of codes to floating point. The definitions are in common/quantize.h.
#pragma once

#include "blocks.h"

namespace bnb {
namespace BNB_ISA {

// The largest magnitude of a row that is no outlier. A NaN is none.
template <typename T> static float row_statistic(const T* x, int64_t count, float limit) {
    if (float_bits(limit) == kInfinityBits)
        return block_absmax(x, count);
    const auto magnitudes = [&](F32 v) {
        const I32 size = magnitude_bits(v);
        return drop(size, less(splat(limit), from_bits(size)));
    };
    I32 largest = splat_bits(0);
    int64_t i = 0;
    for (; i + W <= count; i += W)
        largest = max_bits(largest, magnitudes(load(x + i)));
    if (i < count)
        largest = max_bits(largest, magnitudes(load_first(x + i, int(count - i))));
    return absmax_from_bits(reduce_max_bits(largest));
}

// Codes in the low bytes, for a finite inverse and no NaN.
BNB_INLINE I32 int8_codes(F32 x, F32 inverse) {
    const F32 v = mul(x, inverse);
    const F32 clamped = max(min(v, splat(kInt8Max)), splat(-kInt8Max));
    return and_bits(bits(add(clamped, splat(kRoundingShift))), splat_bits(0xff));
}

// `is_outlier` may be null; codes of outlier columns are 0.
template <typename T> static void row_codes(const T* x, int64_t count, float stat, const uint8_t* is_outlier, int8_t* codes) {
    const float inverse = kInt8Max / stat;
    int64_t i = 0;
    if (is_ordinary(stat, inverse)) {
        for (; i + W <= count; i += W) {
            I32 code = int8_codes(load(x + i), splat(inverse));
            if (is_outlier != nullptr)
                code = and_bits(code, add_bits(load_bytes(is_outlier + i), splat_bits(~0u)));
            store_bytes(reinterpret_cast<uint8_t*>(codes + i), code);
        }
    }
    for (; i < count; ++i)
        codes[i] = is_outlier != nullptr && is_outlier[i] ? 0 : int8_code(to_float(x[i]), inverse);
}

// As row_codes, with the second digits beside the codes.
template <typename T>
static void row_digits(const T* x, int64_t count, float stat, const uint8_t* is_outlier, int8_t* codes, int8_t* second) {
    const float inverse = kInt8Max / stat;
    const F32 shift = splat(kRoundingShift);
    int64_t i = 0;
    if (is_ordinary(stat, inverse)) {
        for (; i + W <= count; i += W) {
            const F32 v = mul(load(x + i), splat(inverse));
            const F32 clamped = max(min(v, splat(kInt8Max)), splat(-kInt8Max));
            const F32 shifted = add(clamped, shift);
            const F32 left = mul(sub(clamped, sub(shifted, shift)), splat(kInt8Digit));
            I32 kept = splat_bits(0xff);
            if (is_outlier != nullptr)
                kept = and_bits(kept, add_bits(load_bytes(is_outlier + i), splat_bits(~0u)));
            store_bytes(reinterpret_cast<uint8_t*>(codes + i), and_bits(bits(shifted), kept));
            store_bytes(reinterpret_cast<uint8_t*>(second + i), and_bits(bits(add(left, shift)), kept));
        }
    }
    for (; i < count; ++i) {
        const bool is_left_out = is_outlier != nullptr && is_outlier[i];
        codes[i] = is_left_out ? 0 : int8_code(to_float(x[i]), inverse);
        second[i] = is_left_out ? 0 : int8_second_digit(to_float(x[i]), inverse);
    }
}

// is_outlier of the columns [first, last). Rows are read in stretches of many columns, whose largest magnitudes so far stay in the first-level cache.
template <typename T>
static void find_outliers(const T* A, int64_t rows, int64_t columns, float limit, int64_t first, int64_t last, uint8_t* is_outlier) {
    constexpr int64_t kStretch = 1024;
    for (int64_t begin = first; begin < last; begin += kStretch) {
        const int64_t count = last - begin < kStretch ? last - begin : kStretch;
        float largest[kStretch];
        for (int64_t i = 0; i < count; ++i)
            largest[i] = -1.0f; // no number yet
        for (int64_t row = 0; row < rows; ++row) {
            const T* x = A + row * columns + begin;
            int64_t i = 0;
            for (; i + W <= count; i += W) // a NaN leaves the largest as it is
                store(largest + i, max(from_bits(magnitude_bits(load(x + i))), load(largest + i)));
            for (; i < count; ++i) {
                const float size = magnitude(to_float(x[i]));
                largest[i] = size > largest[i] ? size : largest[i];
            }
        }
        for (int64_t i = 0; i < count; ++i)
            is_outlier[begin + i] = largest[i] > limit;
    }
}

// Statistics of the columns of a product, its bias and the outliers' part of a row of it. Null pointers stand for zeros.
struct ScaleSources {
    const float* col_stats;
    const float* bias;
    const float* outliers;
};

// A row of a product in integers: of the codes, and of the second digits where there are any. Its correction is taken off every sum.
struct RowSums {
    const uint32_t* sums;
    uint32_t correction;
    const uint32_t* second;
    uint32_t second_correction;
};

BNB_INLINE I32 corrected(const uint32_t* sums, uint32_t correction, int64_t i, int count) {
    uint32_t last[W] = {};
    const uint32_t* p = sums + i;
    if (count < W) {
        memcpy(last, p, size_t(count) * sizeof *last);
        p = last;
    }
    return add_bits(load_32bit(reinterpret_cast<const uint8_t*>(p)), splat_bits(0u - correction));
}

BNB_INLINE F32 scale_sums(const RowSums& row, F32 row_stat, const ScaleSources& from, int64_t i, int count) {
    const auto load_count = [&](const float* p) { return count == W ? load(p + i) : load_first(p + i, count); };
    F32 sum = to_floats(corrected(row.sums, row.correction, i, count));
    if (row.second != nullptr)
        sum = add(sum, mul(to_floats(corrected(row.second, row.second_correction, i, count)), splat(kPerInt8Digit)));
    F32 value = mul(mul(sum, mul(row_stat, load_count(from.col_stats))), splat(kPerInt8Product));
    if (from.bias != nullptr)
        value = add(value, load_count(from.bias));
    if (from.outliers != nullptr)
        value = add(value, load_count(from.outliers));
    return value;
}

// One row of a product in floating point, rounded once.
template <typename T> static void scale_row(const RowSums& row, float row_stat, const ScaleSources& from, int64_t count, T* out) {
    const F32 stat = splat(row_stat);
    int64_t i = 0;
    for (; i + W <= count; i += W)
        store(out + i, scale_sums(row, stat, from, i, W));
    if (i < count) {
        const int rest = int(count - i);
        store_first(out + i, scale_sums(row, stat, from, i, rest), rest);
    }
}

} // namespace BNB_ISA
} // namespace bnb
