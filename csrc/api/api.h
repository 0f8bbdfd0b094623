// The C interface of the library. Sizes are 64-bit counts of elements; every function returns a Status (common/status.h) and changes nothing when it
// is not 0.
//
// dtype: 0 float32, 1 float16, 2 bfloat16.   quant_type: 1 FP4, 2 NF4.   threads: how many the caller allows, 0 for the default of the OpenMP
// runtime.
#pragma once

#include "../common/macros.h"
#include "../common/optimizer.h"

#include <cstdint>

BNB_API const char* bnb_status_message(int32_t status);

// absmax: ceil(n / blocksize) floats; out: ceil(n / 2) bytes.
BNB_API int32_t bnb_cpu_quantize_4bit(const void* A, int32_t dtype, int64_t n, int64_t blocksize, int32_t quant_type, float* absmax, uint8_t* out,
                                      int32_t threads);

BNB_API int32_t bnb_cpu_dequantize_4bit(const uint8_t* A, const float* absmax, int64_t n, int64_t blocksize, int32_t quant_type, int32_t dtype,
                                        void* out, int32_t threads);

// code: 256 ascending floats.
BNB_API int32_t bnb_cpu_quantize_blockwise(const float* code, const void* A, int32_t dtype, int64_t n, int64_t blocksize, float* absmax, uint8_t* out,
                                           int32_t threads);

BNB_API int32_t bnb_cpu_dequantize_blockwise(const float* code, const uint8_t* A, const float* absmax, int64_t n, int64_t blocksize, int32_t dtype,
                                             void* out, int32_t threads);

// out[M, N] = A[M, K] . dequantised(B)[N, K]^T + bias. With absmax_8bit (nested statistics) absmax holds one float for each 256 blocks.
BNB_API int32_t bnb_cpu_gemm_4bit(const void* A, const uint8_t* B, const float* absmax, const uint8_t* absmax_8bit, const float* absmax_code,
                                  const float* absmax_offset, const void* bias, void* out, int64_t M, int64_t N, int64_t K, int64_t blocksize,
                                  int32_t quant_type, int32_t dtype, int32_t threads);

// out[M, K] = A[M, N] . dequantised(B)[N, K]: the gradient of the product above with respect to its A.
BNB_API int32_t bnb_cpu_gemm_4bit_backward(const void* A, const uint8_t* B, const float* absmax, const uint8_t* absmax_8bit, const float* absmax_code,
                                           const float* absmax_offset, void* out, int64_t M, int64_t N, int64_t K, int64_t blocksize,
                                           int32_t quant_type, int32_t dtype, int32_t threads);

// LLM.int8(). Matrices are row by row; `threshold` in the unit of A, 0 for none; is_outlier: `columns` truth values, null without a threshold.
// Codes and statistics [rows] of the rows and, unless null, codes and statistics [columns] of the columns. Codes of the rows are 0 in outlier
// columns.
BNB_API int32_t bnb_cpu_int8_quantize(const void* A, int32_t dtype, int64_t rows, int64_t columns, double threshold, uint8_t* is_outlier,
                                      float* row_stats, int8_t* row_codes, float* col_stats, int8_t* col_codes, int32_t threads);

BNB_API int32_t bnb_cpu_int8_dequantize(const int8_t* codes, const float* stats, int64_t rows, int64_t columns, float* out, int32_t threads);

// out[M, N] = A[M, K] . B[N, K]^T modulo 2^32.
BNB_API int32_t bnb_cpu_int8_matmul(const int8_t* A, const int8_t* B, int32_t* out, int64_t M, int64_t N, int64_t K, int32_t threads);

// out[M, N] of dtype = product * row_stats * col_stats / 127^2 + bias (fp32, or null).
BNB_API int32_t bnb_cpu_int8_mm_dequant(const int32_t* product, const float* row_stats, const float* col_stats, const float* bias, void* out,
                                        int64_t M, int64_t N, int32_t dtype, int32_t threads);

// The product of codes CA and CB, dequantised as above, plus that of `outliers` columns of A (of dtype, null when there are none) and CB.
BNB_API int32_t bnb_cpu_int8_scaled_mm(const int8_t* CA, const int8_t* CB, const float* SCA, const float* SCB, const void* A,
                                       const int64_t* outlier_columns, int64_t outliers, const float* bias, void* out, int64_t M, int64_t N,
                                       int64_t K, int32_t dtype, int32_t threads);

// The whole layer: A and out of dtype. is_outlier as above.
BNB_API int32_t bnb_cpu_int8_linear(const void* A, const int8_t* CB, const float* SCB, const float* bias, double threshold, uint8_t* is_outlier,
                                    void* out, int64_t M, int64_t N, int64_t K, int32_t dtype, int32_t threads);

// Its gradient with respect to A: out[M, K] = A[M, N] . dequantised(CB)[N, K].
BNB_API int32_t bnb_cpu_int8_linear_backward(const void* A, const int8_t* CB, const float* SCB, void* out, int64_t M, int64_t N, int64_t K,
                                             int32_t dtype, int32_t threads);

// One step of many parameters. kBadCode: a code table is not ascending.
BNB_API int32_t bnb_cpu_optimizer_step(const bnb::OptimizerTensors* tensors, const bnb::OptimizerSettings* settings, int32_t threads);

// Name of the instruction set in use.
BNB_API const char* bnb_cpu_isa(void);

// Switches to the set of that name, or changes nothing and returns a status other than 0.
BNB_API int32_t bnb_cpu_select_isa(const char* name);

BNB_API int32_t bnb_cpu_isa_supported(const char* name);

// Path of the OpenMP runtime whose threads are used, or "".
BNB_API const char* bnb_cpu_openmp_library(void);
