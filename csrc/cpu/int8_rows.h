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

// What the codes of a token count, class by class, spread over the columns of a period.
struct ClassScales {
    float scale[kInt8Period];
    float inverse[kInt8Period];
    bool is_ordinary; // every inverse is finite and no scale NaN
};

// Scales from the largest magnitudes, no outliers, of the classes; in a class of zeros every code is 0.
template <typename T> static ClassScales class_scales(const T* x, int64_t count, float limit) {
    constexpr int kVectors = kInt8Period / W;
    I32 largest[kVectors];
    for (int j = 0; j < kVectors; ++j)
        largest[j] = splat_bits(0);
    const auto magnitudes = [&](F32 v) {
        const I32 size = magnitude_bits(v);
        return drop(size, less(splat(limit), from_bits(size)));
    };
    int64_t i = 0;
    for (; i + kInt8Period <= count; i += kInt8Period)
        for (int j = 0; j < kVectors; ++j)
            largest[j] = max_bits(largest[j], magnitudes(load(x + i + j * W)));
    for (int j = 0; i < count; i += W, ++j)
        largest[j] = max_bits(largest[j], magnitudes(load_first(x + i, int(count - i < W ? count - i : W))));

    float sizes[kInt8Period];
    for (int j = 0; j < kVectors; ++j)
        store(sizes + j * W, from_bits(largest[j]));
    ClassScales scales{};
    scales.is_ordinary = true;
    for (int k = 0; k < kInt8Period; k += 4) {
        uint32_t most = 0;
        for (int i = k; i < k + 4; ++i)
            most = float_bits(sizes[i]) > most ? float_bits(sizes[i]) : most;
        const float stat = absmax_from_bits(most), inverse = stat == 0.0f ? 0.0f : kInt8Max / stat;
        scales.is_ordinary &= is_ordinary(stat, inverse);
        for (int i = k; i < k + 4; ++i)
            scales.scale[i] = stat, scales.inverse[i] = inverse;
    }
    return scales;
}

// `is_outlier` may be null; codes of outlier columns are 0.
template <typename T> static void class_codes(const T* x, int64_t count, const ClassScales& scales, const uint8_t* is_outlier, int8_t* codes) {
    int64_t i = 0;
    if (scales.is_ordinary) {
        for (; i + W <= count; i += W) {
            I32 code = int8_codes(load(x + i), load(scales.inverse + i % kInt8Period));
            if (is_outlier != nullptr)
                code = and_bits(code, add_bits(load_bytes(is_outlier + i), splat_bits(~0u)));
            store_bytes(reinterpret_cast<uint8_t*>(codes + i), code);
        }
    }
    for (; i < count; ++i)
        codes[i] = is_outlier != nullptr && is_outlier[i] ? 0 : int8_code(to_float(x[i]), scales.inverse[i % kInt8Period]);
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

BNB_INLINE F32 load_count(const float* p, int count) { return count == W ? load(p) : load_first(p, count); }

// Adds the bias and the outliers' part of W, or `count`, entries of a row from i on.
BNB_INLINE F32 with_additions(F32 value, const ScaleSources& from, int64_t i, int count) {
    if (from.bias != nullptr)
        value = add(value, load_count(from.bias + i, count));
    return from.outliers != nullptr ? add(value, load_count(from.outliers + i, count)) : value;
}

// A row of a product in floating point, rounded once. `value(i, count)` is the product of W, or `count`, entries.
template <typename T, typename Value> static void scale_entries(const ScaleSources& from, int64_t count, T* out, const Value& value) {
    int64_t i = 0;
    for (; i + W <= count; i += W)
        store(out + i, with_additions(value(i, W), from, i, W));
    if (i < count) {
        const int rest = int(count - i);
        store_first(out + i, with_additions(value(i, rest), from, i, rest), rest);
    }
}

// The row of a product of codes under one statistic. `correction` is taken off every sum.
template <typename T>
static void scale_row(const uint32_t* sums, uint32_t correction, float row_stat, const ScaleSources& from, int64_t count, T* out) {
    const I32 excess = splat_bits(0u - correction);
    const F32 stat = splat(row_stat);
    scale_entries(from, count, out, [&](int64_t i, int entries) {
        uint32_t last[W] = {};
        const uint32_t* p = sums + i;
        if (entries < W) {
            memcpy(last, p, size_t(entries) * sizeof *last);
            p = last;
        }
        const F32 sum = to_floats(add_bits(load_32bit(reinterpret_cast<const uint8_t*>(p)), excess));
        return mul(mul(sum, mul(stat, load_count(from.col_stats + i, entries))), splat(kPerInt8Product));
    });
}

// The row of a product whose sums the statistics of its classes have scaled already.
template <typename T> static void scale_row(const float* sums, const ScaleSources& from, int64_t count, T* out) {
    scale_entries(from, count, out, [&](int64_t i, int entries) {
        return mul(mul(load_count(sums + i, entries), load_count(from.col_stats + i, entries)), splat(kPerInt8Product));
    });
}

} // namespace BNB_ISA
} // namespace bnb
