// LLM.int8() outside its matrix product: quantisation along rows and columns, and the ways back to floating point.
//
// Each reads its input once or, where a statistic must be known before the first code, twice, the second time from a cache.
#include "int8_rows.h"
#include "kernels.h"

namespace bnb {
namespace BNB_ISA {
namespace {

template <typename T> void quantize_rows(const Int8QuantizeArgs& args, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        const T* x = static_cast<const T*>(args.A) + row * args.columns;
        args.stats[row] = row_statistic(x, args.columns, args.limit);
        row_codes(x, args.columns, args.stats[row], args.is_outlier, args.codes + row * args.columns);
    }
}

// A strip of neighbouring columns is read row by row, once for its statistics and once for its codes.
constexpr int64_t kStrip = 256;

template <typename T> void quantize_strip(const Int8QuantizeArgs& args, int64_t first, int64_t count) {
    const T* A = static_cast<const T*>(args.A) + first;
    float inverse[kStrip], largest[kStrip] = {};
    bool all_ordinary = true;
    const auto inliers = [&](F32 v) { // magnitudes as bits, so that a NaN is the largest of all
        const I32 size = magnitude_bits(v);
        return drop(size, less(splat(args.limit), from_bits(size)));
    };
    for (int64_t row = 0; row < args.rows; ++row) {
        const T* x = A + row * args.columns;
        int64_t i = 0;
        for (; i + W <= count; i += W)
            store(largest + i, from_bits(max_bits(inliers(load(x + i)), bits(load(largest + i)))));
        if (i < count)
            store(largest + i, from_bits(max_bits(inliers(load_first(x + i, int(count - i))), bits(load(largest + i)))));
    }
    for (int64_t i = 0; i < count; ++i) {
        const float stat = absmax_from_bits(float_bits(largest[i]));
        args.stats[first + i] = stat;
        inverse[i] = kInt8Max / stat;
        all_ordinary = all_ordinary && is_ordinary(stat, inverse[i]);
    }
    for (int64_t row = 0; row < args.rows; ++row) {
        const T* x = A + row * args.columns;
        int8_t* codes = args.codes + row * args.columns + first;
        int64_t i = 0;
        for (; all_ordinary && i + W <= count; i += W) {
            const F32 value = load(x + i);
            const Mask is_outlier = less(splat(args.limit), from_bits(magnitude_bits(value)));
            store_bytes(reinterpret_cast<uint8_t*>(codes + i), drop(int8_codes(value, load(inverse + i)), is_outlier));
        }
        for (; i < count; ++i)
            codes[i] = magnitude(to_float(x[i])) > args.limit ? 0 : int8_code(to_float(x[i]), inverse[i]);
    }
}

} // namespace

void int8_find_outliers(const Int8QuantizeArgs& args, int64_t first_column, int64_t last_column) {
    with_element_type(args.dtype, [&](auto* element) {
        const auto* A = static_cast<const std::remove_pointer_t<decltype(element)>*>(args.A);
        find_outliers(A, args.rows, args.columns, args.limit, first_column, last_column, args.is_outlier);
    });
}

void int8_quantize_rows(const Int8QuantizeArgs& args, int64_t first, int64_t last) {
    with_element_type(args.dtype, [&](auto* element) { quantize_rows<std::remove_pointer_t<decltype(element)>>(args, first, last); });
}

void int8_quantize_columns(const Int8QuantizeArgs& args, int64_t first, int64_t last) {
    with_element_type(args.dtype, [&](auto* element) {
        for (int64_t column = first; column < last; column += kStrip)
            quantize_strip<std::remove_pointer_t<decltype(element)>>(args, column, last - column < kStrip ? last - column : kStrip);
    });
}

void int8_dequantize_rows(const Int8DequantizeArgs& args, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        const int8_t* codes = args.codes + row * args.columns;
        float* out = args.out + row * args.columns;
        const float stat = args.stats[row];
        int64_t i = 0;
        for (; i + W <= args.columns; i += W)
            store(out + i, mul(mul(to_floats(load_signed_bytes(codes + i)), splat(stat)), splat(kPerInt8Code)));
        for (; i < args.columns; ++i)
            out[i] = float(codes[i]) * stat * kPerInt8Code;
    }
}

void int8_scale_rows(const Int8ScaleArgs& args, int64_t first, int64_t last) {
    with_element_type(args.dtype, [&](auto* element) {
        auto* out = static_cast<std::remove_pointer_t<decltype(element)>*>(args.out);
        for (int64_t row = first; row < last; ++row) {
            const auto* sums = reinterpret_cast<const uint32_t*>(args.product + row * args.N);
            scale_row(sums, 0, args.row_stats[row], {args.col_stats, args.bias, nullptr}, args.N, out + row * args.N);
        }
    });
}

} // namespace BNB_ISA
} // namespace bnb
