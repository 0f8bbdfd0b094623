// The C interface of the library. Sizes are 64-bit counts of elements; every function returns a Status (common/status.h) and changes nothing when it
// is not 0.
//
// dtype: 0 float32, 1 float16, 2 bfloat16.   quant_type: 1 FP4, 2 NF4.   threads: how many the caller allows, 0 for the default of the OpenMP
// runtime.
#pragma once

#include "../common/macros.h"

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

// Name of the instruction set in use.
BNB_API const char* bnb_cpu_isa(void);

// Switches to the set of that name, or changes nothing and returns a status other than 0.
BNB_API int32_t bnb_cpu_select_isa(const char* name);

BNB_API int32_t bnb_cpu_isa_supported(const char* name);

// Path of the OpenMP runtime whose threads are used, or "".
BNB_API const char* bnb_cpu_openmp_library(void);
