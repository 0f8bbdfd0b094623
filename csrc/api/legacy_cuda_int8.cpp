// The C names of the published library for LLM.int8() on the GPU, on the device that is current. Matrices of the products lie column by column, as
// BLAS libraries have them: entry (i, j) of a matrix with leading dimension ld is element i + j * ld. The first argument is what get_context()
// returns.
#include "arguments.h"
#include "cuda_api.h"
#include "cuda_call.h"

#include "../common/quantize.h"

#include <cmath>

namespace bnb {
namespace {

// What igemmlt functions return.
constexpr int kDone = 0, kFailed = 1;

bool fits(int32_t rows, int32_t ld) { return rows >= 0 && ld >= rows; }

// A[k, m] and B[k, n], of which A is transposed: what both have in columns lies one after another.
bool are_operands(int32_t m, int32_t n, int32_t k, const void* A, const void* B, const void* C, int32_t lda, int32_t ldb, int32_t ldc) {
    const bool has_entries = m > 0 && n > 0;
    return n >= 0 && fits(k, lda) && fits(k, ldb) && fits(m, ldc) && (!has_entries || (C != nullptr && (k == 0 || (A != nullptr && B != nullptr))));
}

int multiply_to_int8(int32_t m, int32_t n, int32_t k, const int8_t* A, const int8_t* B, void* C, const float* row_scale, int32_t lda, int32_t ldb,
                     int32_t ldc, void* stream) {
    if (!are_operands(m, n, k, A, B, C, lda, ldb, ldc))
        return kFailed;
    Int8StridedArgs args{};
    args.a = A, args.a_row = lda, args.a_column = 1, args.b = B, args.b_row = 1, args.b_column = ldb;
    args.rows = m, args.columns = n, args.depth = k, args.batches = 1;
    args.out = C, args.out_row = 1, args.out_column = ldc, args.is_int8 = true, args.row_scale = row_scale;
    return launch_int8_strided(args, stream) == kOk ? kDone : kFailed;
}

void multiply_batches(bool transpose_a, bool transpose_b, int32_t m, int32_t n, int32_t k, const void* A, const void* B, void* C, int32_t lda,
                      int32_t ldb, int32_t ldc, int64_t stride_a, int64_t stride_b, int64_t stride_c, int32_t batches) {
    const bool has_work = m > 0 && n > 0 && k >= 0 && batches > 0 && C != nullptr && (k == 0 || (A != nullptr && B != nullptr));
    if (!has_work || !fits(transpose_a ? k : m, lda) || !fits(transpose_b ? n : k, ldb) || !fits(m, ldc))
        return;
    Int8StridedArgs args{};
    args.a = static_cast<const int8_t*>(A), args.b = static_cast<const int8_t*>(B), args.out = C;
    args.a_row = transpose_a ? lda : 1, args.a_column = transpose_a ? 1 : lda;
    args.b_row = transpose_b ? ldb : 1, args.b_column = transpose_b ? 1 : ldb;
    args.a_batch = stride_a, args.b_batch = stride_b, args.out_batch = stride_c;
    args.rows = m, args.columns = n, args.depth = k, args.batches = batches, args.out_row = 1, args.out_column = ldc;
    launch_int8_strided(args, nullptr);
}

} // namespace
} // namespace bnb

using namespace bnb;

// C[m, n] = A[k, m]^T . B[k, n] in int32; row_scale is not looked at.
BNB_API int cigemmlt_32(void*, int m, int n, int k, int8_t* A, int8_t* B, void* C, float*, int lda, int ldb, int ldc, void* stream) {
    if (!are_operands(m, n, k, A, B, C, lda, ldb, ldc))
        return kFailed;
    Int8ProductArgs args{};
    args.x = B, args.x_stride = ldb, args.w = A, args.w_stride = lda, args.M = n, args.N = m, args.K = k;
    args.classes = 1, args.out = C, args.out_stride = ldc;
    return launch_int8_product(args, kInt8Auto, stream) == kOk ? kDone : kFailed;
}

// The same rounded and saturated to int8: as it is, and with row i of C times row_scale[i] before.
BNB_API int cigemmlt_8(void*, int m, int n, int k, int8_t* A, int8_t* B, void* C, float*, int lda, int ldb, int ldc, void* stream) {
    return multiply_to_int8(m, n, k, A, B, C, nullptr, lda, ldb, ldc, stream);
}

BNB_API int cigemmlt_8_rowscale(void*, int m, int n, int k, int8_t* A, int8_t* B, void* C, float* row_scale, int lda, int ldb, int ldc,
                                void* stream) {
    return row_scale == nullptr && m > 0 ? kFailed : multiply_to_int8(m, n, k, A, B, C, row_scale, lda, ldb, ldc, stream);
}

// C[m, n] = op(A)[m, k] . op(B)[k, n] in int32, on the default stream.
BNB_API void cigemm(void*, bool transpose_a, bool transpose_b, int m, int n, int k, void* A, void* B, void* C, int lda, int ldb, int ldc) {
    multiply_batches(transpose_a, transpose_b, m, n, k, A, B, C, lda, ldb, ldc, 0, 0, 0, 1);
}

BNB_API void cbatched_igemm(void*, bool transpose_a, bool transpose_b, int m, int n, int k, void* A, void* B, void* C, int lda, int ldb, int ldc,
                            long stride_a, long stride_b, long stride_c, int batches) {
    multiply_batches(transpose_a, transpose_b, m, n, k, A, B, C, lda, ldb, ldc, stride_a, stride_b, stride_c, batches);
}

BNB_API void cdequant_mm_int32_fp16(int* A, float* row_stats, float* col_stats, void* out, void* bias, int rows, int columns, void* stream) {
    bnb_cuda_int8_mm_dequant(A, row_stats, col_stats, bias, kFloat16, out, rows, columns, kFloat16, kCurrentDevice, stream);
}

// Codes and statistics of the rows; those of at least `threshold`, if that is above 0, get the code 0.
BNB_API void cint8_vector_quant(void* A, int8_t* out, float* row_stats, float threshold, int rows, int columns, void* stream) {
    if (rows <= 0 || columns < 0 || row_stats == nullptr || (columns > 0 && (A == nullptr || out == nullptr)))
        return;
    const float limit = threshold > 0.0f ? nextafterf(threshold, -INFINITY) : INFINITY;
    launch_int8_quantize({A, kFloat16, rows, columns, limit, {}, 1, row_stats, out, columns}, stream);
}
