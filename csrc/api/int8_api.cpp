// LLM.int8(): argument checks, the split over threads, and the call into the kernels.
#include "api.h"
#include "int8_arguments.h"

#include "../common/status.h"
#include "../cpu/dispatch.h"
#include "../cpu/threads.h"

namespace bnb {
namespace {

// Calls function(begin, end) on ranges of `count` items that cost about `each` elements of work.
template <typename Function> void for_ranges(int64_t count, int64_t each, int32_t threads, const Function& function) {
    parallel_for(count, ceil_divide(kElementsPerThread, each + 1), threads, [&](int64_t begin, int64_t end, int) { function(begin, end); });
}

int32_t multiply(Int8ProductArgs args) {
    if (!is_dtype(args.dtype) || !are_matrices(args.M, args.N, args.K) || args.threads < 0)
        return kBadArgument;
    if (!holds(args.CB, args.N * args.K) || !holds(args.out, args.M * args.N) || !holds(args.codes != nullptr ? args.codes : args.A, args.M * args.K))
        return kBadArgument;
    if (args.threads == 0)
        args.threads = default_threads();
    return kernels().int8_product(args);
}

} // namespace
} // namespace bnb

using namespace bnb;

int32_t bnb_cpu_int8_quantize(const void* A, int32_t dtype, int64_t rows, int64_t columns, double threshold, uint8_t* is_outlier, float* row_stats,
                              int8_t* row_codes, float* col_stats, int8_t* col_codes, int32_t threads) {
    if (!is_dtype(dtype) || !is_matrix(rows, columns) || !is_threshold(threshold, is_outlier, columns) || threads < 0)
        return kBadArgument;
    if (!holds(A, rows * columns) || !holds(row_stats, rows) || !holds(row_codes, rows * columns))
        return kBadArgument;
    const bool wants_columns = col_stats != nullptr;
    if (wants_columns && !holds(col_codes, rows * columns))
        return kBadArgument;
    const KernelTable& table = kernels();
    const Int8QuantizeArgs by_rows{A, rows, columns, DType(dtype), limit_of(threshold), is_outlier, row_stats, row_codes};
    const Int8QuantizeArgs by_columns{A, rows, columns, DType(dtype), by_rows.limit, is_outlier, col_stats, col_codes};
    if (is_outlier != nullptr)
        for_ranges(columns, rows, threads, [&](int64_t begin, int64_t end) { table.int8_find_outliers(by_rows, begin, end); });
    for_ranges(rows, columns, threads, [&](int64_t begin, int64_t end) { table.int8_quantize_rows(by_rows, begin, end); });
    if (wants_columns)
        for_ranges(columns, rows, threads, [&](int64_t begin, int64_t end) { table.int8_quantize_columns(by_columns, begin, end); });
    return kOk;
}

int32_t bnb_cpu_int8_dequantize(const int8_t* codes, const float* stats, int64_t rows, int64_t columns, float* out, int32_t threads) {
    if (!is_matrix(rows, columns) || threads < 0)
        return kBadArgument;
    if (!holds(codes, rows * columns) || !holds(stats, rows) || !holds(out, rows * columns))
        return kBadArgument;
    const Int8DequantizeArgs args{codes, stats, out, rows, columns};
    for_ranges(rows, columns, threads, [&](int64_t begin, int64_t end) { kernels().int8_dequantize_rows(args, begin, end); });
    return kOk;
}

int32_t bnb_cpu_int8_mm_dequant(const int32_t* product, const float* row_stats, const float* col_stats, const float* bias, void* out, int64_t M,
                                int64_t N, int32_t dtype, int32_t threads) {
    if (!is_dtype(dtype) || !is_matrix(M, N) || threads < 0)
        return kBadArgument;
    if (!holds(product, M * N) || !holds(row_stats, M) || !holds(col_stats, N) || !holds(out, M * N))
        return kBadArgument;
    const Int8ScaleArgs args{product, row_stats, col_stats, bias, out, M, N, DType(dtype)};
    for_ranges(M, N, threads, [&](int64_t begin, int64_t end) { kernels().int8_scale_rows(args, begin, end); });
    return kOk;
}

int32_t bnb_cpu_int8_matmul(const int8_t* A, const int8_t* B, int32_t* out, int64_t M, int64_t N, int64_t K, int32_t threads) {
    Int8ProductArgs args{};
    args.codes = A, args.CB = B, args.out = out;
    args.M = M, args.N = N, args.K = K, args.threads = threads;
    return multiply(args);
}

int32_t bnb_cpu_int8_scaled_mm(const int8_t* CA, const int8_t* CB, const float* SCA, const float* SCB, const void* A, const int64_t* outlier_columns,
                               int64_t outliers, const float* bias, void* out, int64_t M, int64_t N, int64_t K, int32_t dtype, int32_t threads) {
    if (!is_count(outliers) || !holds(outlier_columns, outliers) || !holds(SCA, M) || !holds(SCB, N))
        return kBadArgument;
    if (outliers > 0 && !holds(A, M))
        return kBadArgument;
    for (int64_t j = 0; j < outliers; ++j)
        if (outlier_columns[j] < 0 || outlier_columns[j] >= K)
            return kBadArgument;
    if (CA == nullptr && M > 0 && K > 0)
        return kBadArgument;
    Int8ProductArgs args{};
    args.codes = CA, args.row_stats = SCA, args.CB = CB, args.SCB = SCB, args.A = A;
    args.outlier_columns = outlier_columns, args.outliers = outliers, args.bias = bias, args.out = out;
    args.M = M, args.N = N, args.K = K, args.dtype = DType(dtype), args.threads = threads;
    return multiply(args);
}

int32_t bnb_cpu_int8_linear(const void* A, const int8_t* CB, const float* SCB, const float* bias, double threshold, uint8_t* is_outlier, void* out,
                            int64_t M, int64_t N, int64_t K, int32_t dtype, int32_t threads) {
    if (!is_threshold(threshold, is_outlier, K) || !holds(SCB, N))
        return kBadArgument;
    Int8ProductArgs args{};
    args.quantises = true, args.A = A, args.limit = limit_of(threshold), args.is_outlier = is_outlier, args.CB = CB, args.SCB = SCB, args.bias = bias,
    args.out = out;
    args.M = M, args.N = N, args.K = K, args.dtype = DType(dtype), args.threads = threads;
    return multiply(args);
}

int32_t bnb_cpu_int8_linear_backward(const void* A, const int8_t* CB, const float* SCB, void* out, int64_t M, int64_t N, int64_t K, int32_t dtype,
                                     int32_t threads) {
    if (!is_dtype(dtype) || !are_matrices(M, N, K) || threads < 0)
        return kBadArgument;
    if (!holds(A, M * N) || !holds(CB, N * K) || !holds(SCB, N) || !holds(out, M * K))
        return kBadArgument;
    if (M == 0 || K == 0)
        return kOk;
    const Int8BackwardArgs args{A, CB, SCB, nullptr, out, M, N, K, DType(dtype), threads != 0 ? threads : default_threads()};
    return kernels().int8_backward(args);
}
