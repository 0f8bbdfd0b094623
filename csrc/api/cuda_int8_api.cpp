// LLM.int8() on the GPU: argument checks, and the order of the kernels.
#include "cuda_api.h"
#include "cuda_call.h"
#include "int8_arguments.h"

#include "../common/quantize.h"

namespace bnb {
namespace {

bool is_kernel(int32_t kernel) { return kernel >= kInt8Auto && kernel <= kInt8Wide; }

bool is_bias(const void* bias, int32_t dtype) { return bias == nullptr || is_dtype(dtype); }

int64_t size_of(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

const void* rows_from(const void* matrix, DType dtype, int64_t row, int64_t columns) {
    return static_cast<const char*>(matrix) + row * columns * size_of(dtype);
}

// A row whose outliers nobody else must know of is quantised in one pass.
bool takes_one_pass(const Int8QuantizeArgs& args) { return args.outliers.mask == nullptr || args.rows == 1; }

int32_t quantize(const Int8QuantizeArgs& args, Stream stream) {
    if (takes_one_pass(args))
        return launch_int8_quantize(args, stream);
    const int32_t status = launch_int8_statistics(args, stream);
    return status == kOk ? launch_int8_codes(args, stream) : status;
}

// ---------------------------------------------------------------------------------------------------------------------------- the layer
// Codes of the activations live for a slab of tokens only, so that they need little memory and stay in the cache.
constexpr int64_t kSlab = 8192;
constexpr int64_t kCodesAlignment = 16;

struct Workspace {
    int64_t codes_stride, list_at, count_at, stats_at, codes_at, bytes;

    Workspace(int64_t M, int64_t K, bool has_threshold) {
        const auto aligned = [](int64_t bytes) { return ceil_divide(bytes, kCodesAlignment) * kCodesAlignment; };
        codes_stride = aligned(K);
        list_at = 0;
        count_at = has_threshold ? aligned(K * int64_t(sizeof(int64_t))) : 0;
        stats_at = has_threshold ? count_at + kCodesAlignment : 0;
        codes_at = stats_at + M * kInt8Classes * int64_t(sizeof(float));
        bytes = codes_at + (M < kSlab ? M : kSlab) * codes_stride;
    }
};

int32_t multiply_slabs(const Int8QuantizeArgs& all, const Int8ProductArgs& product, Int8Kernel kernel, Stream stream) {
    const bool one_pass = takes_one_pass(all);
    int32_t status = one_pass ? int32_t(kOk) : launch_int8_statistics(all, stream);
    for (int64_t row = 0; row < all.rows && status == kOk; row += kSlab) {
        Int8QuantizeArgs slab = all;
        slab.A = rows_from(all.A, all.dtype, row, all.columns);
        slab.rows = all.rows - row < kSlab ? all.rows - row : kSlab;
        slab.stats += row * kInt8Classes;
        if (row > 0)
            slab.outliers.list = slab.outliers.count = nullptr; // they are there
        status = one_pass ? launch_int8_quantize(slab, stream) : launch_int8_codes(slab, stream);
        if (status != kOk)
            break;
        Int8ProductArgs part = product;
        part.M = slab.rows;
        part.x_stats = slab.stats;
        part.A = slab.A;
        part.out = const_cast<void*>(rows_from(product.out, product.dtype, row, product.N));
        status = launch_int8_product(part, kernel, stream);
    }
    return status;
}

} // namespace
} // namespace bnb

using namespace bnb;

int32_t bnb_cuda_int8_quantize(const void* A, int32_t dtype, int64_t rows, int64_t columns, double threshold, uint8_t* is_outlier,
                               int64_t* outlier_list, int64_t* outlier_count, float* row_stats, int8_t* row_codes, float* col_stats,
                               int8_t* col_codes, int32_t device, void* stream) {
    if (!is_dtype(dtype) || !is_matrix(rows, columns) || !is_threshold(threshold, is_outlier, columns))
        return kBadArgument;
    if (!holds(A, rows * columns) || !holds(row_stats, rows) || !holds(row_codes, rows * columns))
        return kBadArgument;
    const bool lists = outlier_count != nullptr;
    if (lists ? !(threshold > 0.0) || !holds(outlier_list, columns) : outlier_list != nullptr)
        return kBadArgument;
    if (col_stats != nullptr && !holds(col_codes, rows * columns))
        return kBadArgument;
    const Int8Outliers outliers{is_outlier, outlier_list, outlier_count};
    const Int8QuantizeArgs by_rows{A, DType(dtype), rows, columns, limit_of(threshold), outliers, 1, row_stats, row_codes, columns};
    const DeviceGuard guard(device);
    int32_t status = guard.status() == kOk ? quantize(by_rows, stream) : guard.status();
    if (status != kOk || col_stats == nullptr)
        return status;
    Int8QuantizeArgs by_columns = by_rows;
    by_columns.stats = col_stats, by_columns.codes = col_codes;
    return launch_int8_quantize_columns(by_columns, stream);
}

int32_t bnb_cuda_int8_dequantize(const int8_t* codes, int64_t stride, const float* stats, int64_t rows, int64_t columns, int32_t dtype, void* out,
                                 int32_t device, void* stream) {
    if (!is_dtype(dtype) || !is_matrix(rows, columns) || stride < columns || !is_matrix(rows, stride))
        return kBadArgument;
    if (!holds(codes, rows * columns) || !holds(stats, rows) || !holds(out, rows * columns))
        return kBadArgument;
    return on_device(device, launch_int8_dequantize, Int8DequantizeArgs{codes, stride, stats, out, DType(dtype), rows, columns}, stream);
}

int32_t bnb_cuda_int8_mm_dequant(const int32_t* product, const float* row_stats, const float* col_stats, const void* bias, int32_t bias_dtype,
                                 void* out, int64_t M, int64_t N, int32_t dtype, int32_t device, void* stream) {
    if (!is_dtype(dtype) || !is_bias(bias, bias_dtype) || !is_matrix(M, N))
        return kBadArgument;
    if (!holds(product, M * N) || !holds(row_stats, M) || !holds(col_stats, N) || !holds(out, M * N))
        return kBadArgument;
    return on_device(device, launch_int8_mm_dequant, Int8ScaleArgs{product, row_stats, col_stats, bias, DType(bias_dtype), out, DType(dtype), M, N},
                     stream);
}

int32_t bnb_cuda_int8_matmul(const int8_t* A, const int8_t* B, int32_t* out, int64_t M, int64_t N, int64_t K, int32_t kernel, int32_t device,
                             void* stream) {
    if (!are_matrices(M, N, K) || !is_kernel(kernel) || !holds(A, M * K) || !holds(B, N * K) || !holds(out, M * N))
        return kBadArgument;
    Int8ProductArgs args{};
    args.x = A, args.x_stride = K, args.w = B, args.w_stride = K, args.M = M, args.N = N, args.K = K;
    args.classes = 1, args.out = out, args.out_stride = N;
    const DeviceGuard guard(device);
    return guard.status() == kOk ? launch_int8_product(args, Int8Kernel(kernel), stream) : guard.status();
}

int32_t bnb_cuda_int8_scaled_mm(const int8_t* CA, const int8_t* CB, const float* SCA, const float* SCB, const void* A, const int64_t* outlier_columns,
                                int64_t outliers, const void* bias, int32_t bias_dtype, void* out, int64_t M, int64_t N, int64_t K, int32_t dtype,
                                int32_t kernel, int32_t device, void* stream) {
    if (!is_dtype(dtype) || !is_bias(bias, bias_dtype) || !are_matrices(M, N, K) || !is_kernel(kernel) || !is_count(outliers))
        return kBadArgument;
    if (!holds(CA, M * K) || !holds(CB, N * K) || !holds(SCA, M) || !holds(SCB, N) || !holds(out, M * N))
        return kBadArgument;
    if (outliers > 0 && (outlier_columns == nullptr || !holds(A, M * K)))
        return kBadArgument;
    Int8ProductArgs args{};
    args.x = CA, args.x_stride = K, args.w = CB, args.w_stride = K, args.M = M, args.N = N, args.K = K;
    args.x_stats = SCA, args.classes = 1, args.w_stats = SCB, args.bias = bias, args.bias_dtype = DType(bias_dtype), args.A = A;
    args.outlier_columns = outliers > 0 ? outlier_columns : nullptr, args.outliers = outliers;
    args.out = out, args.out_stride = N, args.dtype = DType(dtype);
    const DeviceGuard guard(device);
    return guard.status() == kOk ? launch_int8_product(args, Int8Kernel(kernel), stream) : guard.status();
}

int64_t bnb_cuda_int8_linear_workspace(int64_t M, int64_t K, int32_t has_threshold) {
    return is_matrix(M, K) ? Workspace(M, K, has_threshold != 0).bytes : -1;
}

int32_t bnb_cuda_int8_linear(const void* A, const int8_t* CB, const float* SCB, const void* bias, int32_t bias_dtype, double threshold,
                             uint8_t* is_outlier, void* workspace, int64_t workspace_bytes, void* out, int64_t M, int64_t N, int64_t K, int32_t dtype,
                             int32_t kernel, int32_t device, void* stream) {
    if (!is_dtype(dtype) || !is_bias(bias, bias_dtype) || !are_matrices(M, N, K) || !is_kernel(kernel) || !is_threshold(threshold, is_outlier, K))
        return kBadArgument;
    if (!holds(A, M * K) || !holds(CB, N * K) || !holds(SCB, N) || !holds(out, M * N))
        return kBadArgument;
    const Workspace layout(M, K, threshold > 0.0);
    if (workspace_bytes < layout.bytes || !holds(workspace, layout.bytes) || reinterpret_cast<uintptr_t>(workspace) % kCodesAlignment != 0)
        return kBadArgument;
    char* base = static_cast<char*>(workspace);
    Int8Outliers outliers{};
    if (threshold > 0.0)
        outliers = {is_outlier, reinterpret_cast<int64_t*>(base + layout.list_at), reinterpret_cast<int64_t*>(base + layout.count_at)};
    Int8QuantizeArgs activations{};
    activations.A = A, activations.dtype = DType(dtype), activations.rows = M, activations.columns = K, activations.limit = limit_of(threshold);
    activations.outliers = outliers, activations.classes = kInt8Classes, activations.stats = reinterpret_cast<float*>(base + layout.stats_at);
    activations.codes = reinterpret_cast<int8_t*>(base + layout.codes_at), activations.codes_stride = layout.codes_stride;
    Int8ProductArgs product{};
    product.x = activations.codes, product.x_stride = layout.codes_stride, product.w = CB, product.w_stride = K, product.N = N, product.K = K;
    product.classes = kInt8Classes, product.w_stats = SCB, product.bias = bias, product.bias_dtype = DType(bias_dtype);
    product.outlier_columns = outliers.list, product.outlier_count = outliers.count;
    product.out = out, product.out_stride = N, product.dtype = DType(dtype);
    const DeviceGuard guard(device);
    return guard.status() == kOk ? multiply_slabs(activations, product, Int8Kernel(kernel), stream) : guard.status();
}

int32_t bnb_cuda_int8_linear_backward(const void* A, const int8_t* CB, const float* SCB, void* out, int64_t M, int64_t N, int64_t K, int32_t dtype,
                                      int32_t kernel, int32_t device, void* stream) {
    if (!is_dtype(dtype) || !are_matrices(M, N, K) || kernel < kInt8BackwardAuto || kernel > kInt8BackwardTiles)
        return kBadArgument;
    if (!holds(A, M * N) || !holds(CB, N * K) || !holds(SCB, N) || !holds(out, M * K))
        return kBadArgument;
    const DeviceGuard guard(device);
    if (guard.status() != kOk)
        return guard.status();
    return launch_int8_backward({A, CB, SCB, out, DType(dtype), M, N, K}, Int8BackwardKernel(kernel), stream);
}
