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

// With absmax_8bit (nested statistics) absmax holds one float for each 256 blocks.
BNB_API int32_t bnb_cuda_dequantize_4bit(const uint8_t* A, const float* absmax, const uint8_t* absmax_8bit, const float* absmax_code,
                                         const float* absmax_offset, int64_t n, int64_t blocksize, int32_t quant_type, int32_t dtype, void* out,
                                         int32_t device, void* stream);
