// The C interface to the GPU kernels. Sizes are 64-bit counts of elements, pointers are to memory of `device`; every function puts its work on `stream`
// (cudaStream_t or hipStream_t), waits for nothing and returns a Status: kDeviceError where the driver refused, with its words in
// bnb_cuda_last_error(). Codes of dtypes and quantisation types as in api.h.
#pragma once

#include "../common/macros.h"

#include <cstdint>

// The same as in the CPU library.
BNB_API const char* bnb_status_message(int32_t status);

// What the driver said last on this thread, or "".
BNB_API const char* bnb_cuda_last_error(void);

// The release of the runtime the library was built with: 1000 * major + 10 * minor.
BNB_API int32_t bnb_cuda_version(void);

// 10 * major + minor, or 0 without such a device.
BNB_API int32_t bnb_cuda_capability(int32_t device);

// absmax: ceil(n / blocksize) floats; out: ceil(n / 2) bytes.
BNB_API int32_t bnb_cuda_quantize_4bit(const void* A, int32_t dtype, int64_t n, int64_t blocksize, int32_t quant_type, float* absmax, uint8_t* out,
                                       int32_t device, void* stream);

// code: 256 ascending floats. That they are is not checked: it would take a copy to the host. Others give codes without meaning.
BNB_API int32_t bnb_cuda_quantize_blockwise(const float* code, const void* A, int32_t dtype, int64_t n, int64_t blocksize, float* absmax,
                                            uint8_t* out, int32_t device, void* stream);

BNB_API int32_t bnb_cuda_dequantize_blockwise(const float* code, const uint8_t* A, const float* absmax, int64_t n, int64_t blocksize, int32_t dtype,
                                              void* out, int32_t device, void* stream);

// With absmax_8bit (nested statistics) absmax holds one float for each 256 blocks.
BNB_API int32_t bnb_cuda_dequantize_4bit(const uint8_t* A, const float* absmax, const uint8_t* absmax_8bit, const float* absmax_code,
                                         const float* absmax_offset, int64_t n, int64_t blocksize, int32_t quant_type, int32_t dtype, void* out,
                                         int32_t device, void* stream);

// ---------------------------------------------------------------------------------------------------------------- 4-bit products
// out[M, N] = A[M, K] . dequantised(B)[N, K]^T + bias. levels: values of the 16 codes, or null for those of quant_type. `kernel` (0 simple, 1 skinny,
// 2 tiled, 3 warpgroup), `tile` and `splits` say how, see cuda/kernels.h; what that kernel cannot do a simpler one does. More than one split needs
// `partial`, splits * M * N floats.
BNB_API int32_t bnb_cuda_gemm_4bit(const void* A, const uint8_t* B, const float* absmax, const uint8_t* absmax_8bit, const float* absmax_code,
                                   const float* absmax_offset, const float* levels, const void* bias, void* out, int64_t M, int64_t N, int64_t K,
                                   int64_t blocksize, int32_t quant_type, int32_t dtype, int32_t kernel, int32_t tile, int32_t splits, float* partial,
                                   int64_t partial_count, int32_t device, void* stream);

// out[M, K] = A[M, N] . dequantised(B)[N, K] by kernel 2 or 3; what the last cannot do the other does. kUnsupported: not on this device, or not for
// this type, these sizes or addresses.
BNB_API int32_t bnb_cuda_gemm_4bit_backward(const void* A, const uint8_t* B, const float* absmax, const uint8_t* absmax_8bit,
                                            const float* absmax_code, const float* absmax_offset, void* out, int64_t M, int64_t N, int64_t K,
                                            int64_t blocksize, int32_t quant_type, int32_t dtype, int32_t kernel, int32_t tile, int32_t splits,
                                            float* partial, int64_t partial_count, int32_t device, void* stream);

// ------------------------------------------------------------------------------------------------------------------------ LLM.int8()
// As in api.h. Outlier columns stay on the device: is_outlier has `columns` truth values, outlier_list room for as many indices, which come in
// ascending order, and outlier_count one number; the last two may be null. Without a threshold all three are null.
BNB_API int32_t bnb_cuda_int8_quantize(const void* A, int32_t dtype, int64_t rows, int64_t columns, double threshold, uint8_t* is_outlier,
                                       int64_t* outlier_list, int64_t* outlier_count, float* row_stats, int8_t* row_codes, float* col_stats,
                                       int8_t* col_codes, int32_t device, void* stream);

// Rows of codes are `stride` apart; out of dtype, its rows are not.
BNB_API int32_t bnb_cuda_int8_dequantize(const int8_t* codes, int64_t stride, const float* stats, int64_t rows, int64_t columns, int32_t dtype,
                                         void* out, int32_t device, void* stream);

// `kernel`: 0 chooses; others are for tests and tuning, see cuda/kernels.h. kUnsupported: not on this device.
BNB_API int32_t bnb_cuda_int8_matmul(const int8_t* A, const int8_t* B, int32_t* out, int64_t M, int64_t N, int64_t K, int32_t kernel, int32_t device,
                                     void* stream);

BNB_API int32_t bnb_cuda_int8_mm_dequant(const int32_t* product, const float* row_stats, const float* col_stats, const void* bias, int32_t bias_dtype,
                                         void* out, int64_t M, int64_t N, int32_t dtype, int32_t device, void* stream);

// Outlier columns that A has not are passed over.
BNB_API int32_t bnb_cuda_int8_scaled_mm(const int8_t* CA, const int8_t* CB, const float* SCA, const float* SCB, const void* A,
                                        const int64_t* outlier_columns, int64_t outliers, const void* bias, int32_t bias_dtype, void* out, int64_t M,
                                        int64_t N, int64_t K, int32_t dtype, int32_t kernel, int32_t device, void* stream);

// Bytes of workspace that the layer needs, whose address must be a multiple of 16; with a threshold or without.
BNB_API int64_t bnb_cuda_int8_linear_workspace(int64_t M, int64_t K, int32_t has_threshold);

BNB_API int32_t bnb_cuda_int8_linear(const void* A, const int8_t* CB, const float* SCB, const void* bias, int32_t bias_dtype, double threshold,
                                     uint8_t* is_outlier, void* workspace, int64_t workspace_bytes, void* out, int64_t M, int64_t N, int64_t K,
                                     int32_t dtype, int32_t kernel, int32_t device, void* stream);

BNB_API int32_t bnb_cuda_int8_linear_backward(const void* A, const int8_t* CB, const float* SCB, void* out, int64_t M, int64_t N, int64_t K,
                                              int32_t dtype, int32_t kernel, int32_t device, void* stream);
