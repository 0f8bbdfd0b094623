// Argument checks, the device, and the call of the launchers.
#include "cuda_api.h"
#include "arguments.h"
#include "cuda_call.h"

#include "../common/status.h"

namespace bnb {
namespace {

bool are_sizes(int64_t n, int64_t blocksize) { return is_count(n) && blocksize > 0; }

bool has_scales(const BlockScales& scales) {
    const bool has_nested = scales.absmax_code != nullptr && scales.absmax_offset != nullptr;
    return scales.absmax != nullptr && (scales.absmax_8bit == nullptr || has_nested);
}

} // namespace
} // namespace bnb

using namespace bnb;

const char* bnb_status_message(int32_t status) { return status_message(status); }

const char* bnb_cuda_last_error(void) { return last_device_error(); }

int32_t bnb_cuda_version(void) { return runtime_version(); }

int32_t bnb_cuda_capability(int32_t device) {
    const DeviceGuard guard(device);
    return guard.status() == kOk ? device_properties().capability : 0;
}

int32_t bnb_cuda_dequantize_4bit(const uint8_t* A, const float* absmax, const uint8_t* absmax_8bit, const float* absmax_code,
                                 const float* absmax_offset, int64_t n, int64_t blocksize, int32_t quant_type, int32_t dtype, void* out,
                                 int32_t device, void* stream) {
    const BlockScales scales{absmax, absmax_8bit, absmax_code, absmax_offset};
    if (!is_dtype(dtype) || !is_quant_type(quant_type) || !are_sizes(n, blocksize))
        return kBadArgument;
    if (n == 0)
        return kOk;
    if (A == nullptr || out == nullptr || !has_scales(scales))
        return kBadArgument;
    return on_device(device, launch_dequantize_4bit, DequantizeArgs4bit{A, scales, out, n, blocksize, QuantType(quant_type), DType(dtype)}, stream);
}

int32_t bnb_cuda_quantize_4bit(const void* A, int32_t dtype, int64_t n, int64_t blocksize, int32_t quant_type, float* absmax, uint8_t* out,
                               int32_t device, void* stream) {
    if (!is_dtype(dtype) || !is_quant_type(quant_type) || !are_sizes(n, blocksize))
        return kBadArgument;
    if (n == 0)
        return kOk;
    if (A == nullptr || absmax == nullptr || out == nullptr)
        return kBadArgument;
    return on_device(device, launch_quantize_4bit, QuantizeArgs4bit{A, absmax, out, n, blocksize, QuantType(quant_type), DType(dtype)}, stream);
}

int32_t bnb_cuda_quantize_blockwise(const float* code, const void* A, int32_t dtype, int64_t n, int64_t blocksize, float* absmax, uint8_t* out,
                                    int32_t device, void* stream) {
    if (!is_dtype(dtype) || !are_sizes(n, blocksize))
        return kBadArgument;
    if (n == 0)
        return kOk;
    if (code == nullptr || A == nullptr || absmax == nullptr || out == nullptr)
        return kBadArgument;
    return on_device(device, launch_quantize_blockwise, QuantizeArgsBlockwise{code, A, absmax, out, n, blocksize, DType(dtype)}, stream);
}

int32_t bnb_cuda_dequantize_blockwise(const float* code, const uint8_t* A, const float* absmax, int64_t n, int64_t blocksize, int32_t dtype,
                                      void* out, int32_t device, void* stream) {
    if (!is_dtype(dtype) || !are_sizes(n, blocksize))
        return kBadArgument;
    if (n == 0)
        return kOk;
    if (code == nullptr || A == nullptr || absmax == nullptr || out == nullptr)
        return kBadArgument;
    return on_device(device, launch_dequantize_blockwise, DequantizeArgsBlockwise{code, A, absmax, out, n, blocksize, DType(dtype)}, stream);
}
