// What the kernels of the int8 product share: reading codes, and what becomes of a sum.
#pragma once

#include "int8_elements.h"

#include "../common/quantize.h"

namespace bnb {

// Columns of one vector of codes: four groups of four, of neighbouring classes.
constexpr int kCodesPerVector = 16;
constexpr int kGroupsPerVector = 4;

using CodeVector = Vector<uint32_t, kGroupsPerVector>;

// The largest unit of 16, 4 or 1 columns that rows can be read in from an address on without reading beyond their end.
BNB_HD int unit_of(uintptr_t address, int64_t K) {
    const uintptr_t all = address | uintptr_t(K);
    return all % kCodesPerVector == 0 ? kCodesPerVector : all % 4 == 0 ? 4 : 1;
}

// Codes from p on, `left` of which exist; zeros beyond.
__device__ __forceinline__ CodeVector load_codes(const int8_t* p, int64_t left, int unit) {
    CodeVector codes = {};
    if (unit == kCodesPerVector) {
        if (left > 0)
            codes = *reinterpret_cast<const CodeVector*>(p);
    } else if (unit == 4) {
#pragma unroll
        for (int i = 0; i < kGroupsPerVector; ++i)
            if (4 * i < left)
                codes.value[i] = *reinterpret_cast<const uint32_t*>(p + 4 * i);
    } else {
#pragma unroll
        for (int i = 0; i < kCodesPerVector; ++i)
            if (i < left)
                codes.value[i / 4] |= uint32_t(uint8_t(p[i])) << 8 * (i % 4);
    }
    return codes;
}

__device__ __forceinline__ float dequantised(int8_t code, float stat) { return __fmul_rn(__fmul_rn(float(code), stat), kPerInt8Code); }

// How many outlier columns there are: a number that may be known to the device only.
__device__ __forceinline__ int64_t outlier_count(const Int8ProductArgs& args) {
    if (args.outlier_columns == nullptr)
        return 0;
    return args.outlier_count != nullptr ? *args.outlier_count : args.outliers;
}

// The terms of outlier column j: an activation of token m, a weight of row n. Both are 0 for a column that is not there.
__device__ __forceinline__ float outlier_activation(const Int8ProductArgs& args, int64_t j, int64_t m) {
    const int64_t column = args.outlier_columns[j];
    return column >= 0 && column < args.K ? load_float(args.A, args.dtype, m * args.K + column) : 0.0f;
}

__device__ __forceinline__ float outlier_weight(const Int8ProductArgs& args, int64_t j, int64_t n) {
    const int64_t column = args.outlier_columns[j];
    return column >= 0 && column < args.K ? dequantised(args.w[n * args.w_stride + column], args.w_stats[n]) : 0.0f;
}

__device__ __forceinline__ float with_bias(const Int8ProductArgs& args, int64_t n, float value) {
    return args.bias != nullptr ? __fadd_rn(value, load_float(args.bias, args.bias_dtype, n)) : value;
}

// The value of a sum of codes under one statistic, and of one whose classes are scaled already.
__device__ __forceinline__ float value_of(const Int8ProductArgs& args, int64_t m, int64_t n, uint32_t sum) {
    const float scale = __fmul_rn(args.x_stats[m], args.w_stats[n]);
    return with_bias(args, n, __fmul_rn(__fmul_rn(__int2float_rn(int(sum)), scale), kPerInt8Product));
}

__device__ __forceinline__ float value_of(const Int8ProductArgs& args, int64_t, int64_t n, float sum) {
    return with_bias(args, n, __fmul_rn(__fmul_rn(sum, args.w_stats[n]), kPerInt8Product));
}

// Writes the entry of a sum without outlier columns: the sum itself or its value.
template <typename Sum> __device__ __forceinline__ void store_sum(const Int8ProductArgs& args, int64_t m, int64_t n, Sum sum) {
    const int64_t index = m * args.out_stride + n;
    if (args.x_stats == nullptr)
        static_cast<uint32_t*>(args.out)[index] = uint32_t(sum);
    else
        store_result(args.out, args.dtype, index, value_of(args, m, n, sum));
}

} // namespace bnb
