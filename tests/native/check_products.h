// Checks of matrix products and of LLM.int8(): codes and integers are exact, sums lie within what their rounding allows.
#pragma once

#include "models.h"

namespace driver {

// By what share of the sum of magnitudes a sum may be off: by rounding in float32, or, where the instructions multiply bfloat16, as much as a dense
// weight of that dtype would have been rounded by.
inline double sum_tolerance(const Library& lib, int dtype) {
    return dtype == 2 && strcmp(lib.cpu_isa(), "avx512bf16") == 0 ? rounding_of(dtype) : 2e-7;
}

// Whether y is the sum of terms whose magnitudes add up to `magnitude`, rounded to dtype.
inline bool is_close(const Library& lib, float y, double expected, double magnitude, int dtype) {
    const double smallest = dtype == 1 ? 3e-8 : 0.0; // half of the least float16
    return std::fabs(double(y) - expected) <= rounding_of(dtype) * 1.01 * std::fabs(expected) + sum_tolerance(lib, dtype) * magnitude + smallest;
}

struct Shape {
    int64_t M, N, K;
};

constexpr Shape kShapes[] = {{1, 1, 1},    {1, 7, 64},  {1, 33, 130}, {2, 16, 256}, {3, 24, 129}, {5, 1, 1000}, {8, 32, 192}, {17, 9, 65},
                             {33, 48, 64}, {64, 5, 96}, {4, 130, 2},  {0, 4, 8},    {3, 0, 8},    {3, 4, 0},    {1, 300, 257}};

// ------------------------------------------------------------------------------------------------------------------------------- 4-bit weights

// A weight [N, K] with plain or nested statistics, and what it means.
struct Weight4bit {
    Buffer<uint8_t> packed, absmax_8bit;
    Buffer<float> absmax, code, offset;
    std::vector<float> dense;
    int64_t blocksize;
    int quant_type;
    bool nested;

    Weight4bit(Random& random, const Shape& s, int64_t blocksize, int quant_type, bool nested)
        : packed((s.N * s.K + 1) / 2), absmax_8bit(blocks_of(s.N * s.K, blocksize)),
          absmax(nested ? blocks_of(absmax_8bit.size(), 256) : absmax_8bit.size()), code(256), offset(1), dense(size_t(s.N * s.K)),
          blocksize(blocksize), quant_type(quant_type), nested(nested) {
        for (int64_t i = 0; i < packed.size(); ++i)
            packed[i] = uint8_t(random.bits());
        for (int64_t i = 0; i < absmax_8bit.size(); ++i)
            absmax_8bit[i] = uint8_t(random.bits());
        for (int64_t i = 0; i < absmax.size(); ++i)
            absmax[i] = float(0.02 + random.uniform());
        const std::vector<float> table = code_table(true);
        std::copy(table.begin(), table.end(), code.data());
        offset[0] = 0.7f;
        for (int64_t i = 0; i < s.N * s.K; ++i)
            dense[size_t(i)] = level_4bit(nibble(packed.data(), i), quant_type) * scale(i / blocksize);
    }
    float scale(int64_t block) const { return nested ? code[absmax_8bit[block]] * absmax[block / 256] + offset[0] : absmax[block]; }
    const uint8_t* nested_codes() const { return nested ? absmax_8bit.data() : nullptr; }
};

inline void check_gemm_4bit_case(const Library& lib, Random& random, const Shape& s, int dtype) {
    const int64_t blocksize = int64_t(32) << random.below(8);
    const int quant_type = kQuantTypes[random.below(2)];
    const Weight4bit w(random, s, blocksize, quant_type, random.below(2) != 0);
    const Elements A = elements(random, s.M * s.K, dtype), bias = elements(random, s.N, dtype), G = elements(random, s.M * s.N, dtype);
    const bool has_bias = random.below(2) != 0;

    Elements out(s.M * s.N, dtype);
    long wrong = lib.cpu_gemm_4bit(A.data(), w.packed.data(), w.absmax.data(), w.nested_codes(), w.code.data(), w.offset.data(),
                                   has_bias ? bias.data() : nullptr, out.data(), s.M, s.N, s.K, blocksize, quant_type, dtype, 0) != 0;
    for (int64_t m = 0; m < s.M; ++m)
        for (int64_t n = 0; n < s.N; ++n) {
            double sum = has_bias ? bias[n] : 0.0, magnitude = std::fabs(sum);
            for (int64_t k = 0; k < s.K; ++k) {
                const double term = double(A[m * s.K + k]) * w.dense[size_t(n * s.K + k)];
                sum += term, magnitude += std::fabs(term);
            }
            wrong += !is_close(lib, out[m * s.N + n], sum, magnitude, dtype);
        }
    expect(wrong == 0 && out.bytes.guard_is_whole(), "gemm_4bit: %ld wrong, [%ld, %ld, %ld], blocksize %ld, type %d, nested %d, bias %d, %s", wrong,
           long(s.M), long(s.N), long(s.K), long(blocksize), quant_type, w.nested, has_bias, kDTypeNames[dtype]);

    Elements back(s.M * s.K, dtype);
    wrong = lib.cpu_gemm_4bit_backward(G.data(), w.packed.data(), w.absmax.data(), w.nested_codes(), w.code.data(), w.offset.data(), back.data(), s.M,
                                       s.N, s.K, blocksize, quant_type, dtype, 0) != 0;
    for (int64_t m = 0; m < s.M; ++m)
        for (int64_t k = 0; k < s.K; ++k) {
            double sum = 0.0, magnitude = 0.0;
            for (int64_t n = 0; n < s.N; ++n) {
                const double term = double(G[m * s.N + n]) * w.dense[size_t(n * s.K + k)];
                sum += term, magnitude += std::fabs(term);
            }
            wrong += !is_close(lib, back[m * s.K + k], sum, magnitude, dtype);
        }
    expect(wrong == 0 && back.bytes.guard_is_whole(), "gemm_4bit_backward: %ld wrong, [%ld, %ld, %ld], blocksize %ld, type %d, nested %d, %s", wrong,
           long(s.M), long(s.N), long(s.K), long(blocksize), quant_type, w.nested, kDTypeNames[dtype]);
}

// ------------------------------------------------------------------------------------------------------------------------------- 8-bit matrices

inline Buffer<int8_t> codes_int8(Random& random, int64_t n) {
    Buffer<int8_t> codes(n);
    for (int64_t i = 0; i < n; ++i)
        codes[i] = int8_t(random.below(20) ? random.below(255) - 127 : -128);
    return codes;
}

inline Buffer<float> scales(Random& random, int64_t n) {
    Buffer<float> values(n);
    for (int64_t i = 0; i < n; ++i)
        values[i] = float(0.05 + random.uniform());
    return values;
}

inline void check_int8_quantize_case(const Library& lib, Random& random, const Shape& s, int dtype, Kind kind) {
    const int64_t rows = s.M, columns = s.K;
    const Elements A = elements(random, rows * columns, dtype, kind);
    const float threshold = random.below(2) ? 2.0f : 0.0f;
    const bool wants_columns = random.below(2) != 0, has_threshold = threshold > 0.0f;
    Buffer<uint8_t> is_outlier(columns);
    Buffer<float> row_stats(rows), col_stats(columns);
    Buffer<int8_t> row_codes(rows * columns), col_codes(rows * columns);
    long wrong = lib.cpu_int8_quantize(A.data(), dtype, rows, columns, threshold, has_threshold ? is_outlier.data() : nullptr, row_stats.data(),
                                       row_codes.data(), wants_columns ? col_stats.data() : nullptr, wants_columns ? col_codes.data() : nullptr, 0);
    const auto is_inlier = [&](float x) { return !has_threshold || !(std::fabs(x) >= threshold); };
    const auto stat_over = [&](int64_t first, int64_t step, int64_t n) {
        float largest = 0.0f;
        for (int64_t i = 0; i < n; ++i) {
            const float x = A[first + i * step];
            if (is_inlier(x))
                largest = std::isnan(x) || std::isnan(largest) ? NAN : std::max(largest, std::fabs(x));
        }
        return largest;
    };
    std::vector<bool> outlier(size_t(columns), false);
    for (int64_t i = 0; i < rows * columns; ++i)
        if (!is_inlier(A[i]))
            outlier[size_t(i % columns)] = true;
    for (int64_t k = 0; k < columns && has_threshold; ++k)
        wrong += bool(is_outlier[k]) != outlier[size_t(k)];
    for (int64_t row = 0; row < rows; ++row) {
        wrong += !same(row_stats[row], stat_over(row * columns, 1, columns));
        for (int64_t k = 0; k < columns; ++k)
            wrong += row_codes[row * columns + k] != (outlier[size_t(k)] ? 0 : code_int8(A[row * columns + k], row_stats[row]));
    }
    for (int64_t k = 0; k < columns && wants_columns; ++k) {
        wrong += !same(col_stats[k], stat_over(k, columns, rows));
        for (int64_t row = 0; row < rows; ++row) {
            const float x = A[row * columns + k];
            wrong += col_codes[row * columns + k] != (is_inlier(x) ? code_int8(x, col_stats[k]) : 0);
        }
    }
    expect(wrong == 0 && row_codes.guard_is_whole() && col_codes.guard_is_whole(), "int8_quantize: %ld wrong, [%ld, %ld], threshold %g, %s, kind %d",
           wrong, long(rows), long(columns), threshold, kDTypeNames[dtype], kind);

    const Buffer<int8_t> codes = codes_int8(random, rows * columns);
    const Buffer<float> stats = scales(random, rows);
    Buffer<float> values(rows * columns);
    wrong = lib.cpu_int8_dequantize(codes.data(), stats.data(), rows, columns, values.data(), 0);
    for (int64_t i = 0; i < rows * columns; ++i)
        wrong += !same(values[i], codes[i] * stats[i / columns] * (1.0f / 127.0f));
    expect(wrong == 0, "int8_dequantize: %ld wrong, [%ld, %ld]", wrong, long(rows), long(columns));
}

inline void check_int8_product_case(const Library& lib, Random& random, const Shape& s, int dtype) {
    const Buffer<int8_t> CA = codes_int8(random, s.M * s.K), CB = codes_int8(random, s.N * s.K);
    const Buffer<float> SCA = scales(random, s.M), SCB = scales(random, s.N), bias = scales(random, s.N);
    const bool has_bias = random.below(2) != 0;

    Buffer<int32_t> product(s.M * s.N);
    long wrong = lib.cpu_int8_matmul(CA.data(), CB.data(), product.data(), s.M, s.N, s.K, 0);
    for (int64_t m = 0; m < s.M; ++m)
        for (int64_t n = 0; n < s.N; ++n) {
            int64_t sum = 0;
            for (int64_t k = 0; k < s.K; ++k)
                sum += CA[m * s.K + k] * CB[n * s.K + k];
            wrong += product[m * s.N + n] != sum;
        }
    expect(wrong == 0 && product.guard_is_whole(), "int8_matmul: %ld wrong, [%ld, %ld, %ld]", wrong, long(s.M), long(s.N), long(s.K));

    Elements values(s.M * s.N, dtype);
    wrong = lib.cpu_int8_mm_dequant(product.data(), SCA.data(), SCB.data(), has_bias ? bias.data() : nullptr, values.data(), s.M, s.N, dtype, 0);
    for (int64_t i = 0; i < s.M * s.N; ++i) {
        const float scaled = float(product[i]) * (SCA[i / s.N] * SCB[i % s.N]) * (1.0f / (127.0f * 127.0f));
        wrong += !same(values[i], as_dtype(has_bias ? scaled + bias[i % s.N] : scaled, dtype));
    }
    expect(wrong == 0, "int8_mm_dequant: %ld wrong, [%ld, %ld], %s", wrong, long(s.M), long(s.N), kDTypeNames[dtype]);

    const Elements A = elements(random, s.M * s.K, dtype);
    const int64_t outliers = s.K == 0 ? 0 : random.below(std::min<int64_t>(s.K, 4));
    Buffer<int64_t> columns(outliers);
    for (int64_t j = 0; j < outliers; ++j)
        columns[j] = random.below(s.K);
    Elements out(s.M * s.N, dtype);
    wrong = lib.cpu_int8_scaled_mm(CA.data(), CB.data(), SCA.data(), SCB.data(), outliers ? A.data() : nullptr, columns.data(), outliers,
                                   has_bias ? bias.data() : nullptr, out.data(), s.M, s.N, s.K, dtype, 0);
    for (int64_t m = 0; m < s.M; ++m)
        for (int64_t n = 0; n < s.N; ++n) {
            double sum = double(product[m * s.N + n]) * SCA[m] * SCB[n] / (127.0 * 127.0), magnitude = std::fabs(sum);
            for (int64_t j = 0; j < outliers; ++j) {
                const double term = double(A[m * s.K + columns[j]]) * CB[n * s.K + columns[j]] * SCB[n] / 127.0;
                sum += term, magnitude += std::fabs(term);
            }
            sum += has_bias ? bias[n] : 0.0;
            wrong += !is_close(lib, out[m * s.N + n], sum, magnitude + 2.0, dtype);
        }
    expect(wrong == 0 && out.bytes.guard_is_whole(), "int8_scaled_mm: %ld wrong, [%ld, %ld, %ld], %ld outliers, %s", wrong, long(s.M), long(s.N),
           long(s.K), long(outliers), kDTypeNames[dtype]);
}

inline void check_int8_linear_case(const Library& lib, Random& random, const Shape& s, int dtype) {
    const Elements A = elements(random, s.M * s.K, dtype), G = elements(random, s.M * s.N, dtype);
    const Buffer<int8_t> CB = codes_int8(random, s.N * s.K);
    const Buffer<float> SCB = scales(random, s.N), bias = scales(random, s.N);
    const float threshold = random.below(2) ? 2.0f : 0.0f;
    const bool has_threshold = threshold > 0.0f;
    Buffer<uint8_t> is_outlier(s.K);
    Elements out(s.M * s.N, dtype);
    long wrong = lib.cpu_int8_linear(A.data(), CB.data(), SCB.data(), bias.data(), threshold, has_threshold ? is_outlier.data() : nullptr, out.data(),
                                     s.M, s.N, s.K, dtype, 0);
    std::vector<bool> outlier(size_t(s.K), false);
    for (int64_t i = 0; i < s.M * s.K; ++i)
        if (has_threshold && std::fabs(A[i]) >= threshold)
            outlier[size_t(i % s.K)] = true;
    for (int64_t k = 0; k < s.K && has_threshold && s.M * s.N > 0; ++k)
        wrong += bool(is_outlier[k]) != outlier[size_t(k)];
    for (int64_t m = 0; m < s.M; ++m) {
        float stats[16] = {}; // of the classes of columns
        for (int64_t k = 0; k < s.K; ++k)
            if (const float x = std::fabs(A[m * s.K + k]); !has_threshold || x < threshold)
                stats[k / 4 % 16] = std::max(stats[k / 4 % 16], x);
        for (int64_t n = 0; n < s.N; ++n) {
            double sum = bias[n], magnitude = sum;
            for (int64_t k = 0; k < s.K; ++k) {
                const float stat = stats[k / 4 % 16], x = A[m * s.K + k];
                const double a = outlier[size_t(k)] ? double(x) : code_int8(x, stat) * double(stat) / 127.0;
                const double term = a * CB[n * s.K + k] * SCB[n] / 127.0;
                sum += term, magnitude += std::fabs(term);
            }
            wrong += !is_close(lib, out[m * s.N + n], sum, magnitude, dtype);
        }
    }
    expect(wrong == 0 && out.bytes.guard_is_whole(), "int8_linear: %ld wrong, [%ld, %ld, %ld], threshold %g, %s", wrong, long(s.M), long(s.N),
           long(s.K), threshold, kDTypeNames[dtype]);

    Elements back(s.M * s.K, dtype);
    wrong = lib.cpu_int8_linear_backward(G.data(), CB.data(), SCB.data(), back.data(), s.M, s.N, s.K, dtype, 0);
    for (int64_t m = 0; m < s.M; ++m)
        for (int64_t k = 0; k < s.K; ++k) {
            double sum = 0.0, magnitude = 0.0;
            for (int64_t n = 0; n < s.N; ++n) {
                const double term = double(G[m * s.N + n]) * CB[n * s.K + k] * SCB[n] / 127.0;
                sum += term, magnitude += std::fabs(term);
            }
            wrong += !is_close(lib, back[m * s.K + k], sum, magnitude, dtype);
        }
    expect(wrong == 0 && back.bytes.guard_is_whole(), "int8_linear_backward: %ld wrong, [%ld, %ld, %ld], %s", wrong, long(s.M), long(s.N), long(s.K),
           kDTypeNames[dtype]);
}

inline void check_products(const Library& lib, Random& random) {
    for (const Shape& shape : kShapes)
        for (const int dtype : kDTypes)
            for (int repeat = 0; repeat < 3; ++repeat) {
                check_gemm_4bit_case(lib, random, shape, dtype);
                check_int8_quantize_case(lib, random, shape, dtype, Kind(random.below(kKinds)));
                check_int8_product_case(lib, random, shape, dtype);
                check_int8_linear_case(lib, random, shape, dtype);
            }
}

} // namespace driver
