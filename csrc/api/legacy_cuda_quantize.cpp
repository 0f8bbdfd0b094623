// The C names of the published library for quantisation on the GPU, for projects that call them through ctypes. Thin forms of the functions in
// cuda_api.h on the device that is current. They return nothing: where they cannot do their work the output stays as it was, and bnb_cuda_last_error()
// may say why.
#include "cuda_api.h"

#include "../common/types.h"
#include "../cuda/kernels.h"

namespace {

// What other functions of the published library take as a handle. Nothing is kept in it.
struct Context {};

} // namespace

BNB_API void* get_context(void) {
    static Context context;
    return &context;
}

// X(suffix, dtype)
#define BNB_EACH_DTYPE(X) X(fp32, bnb::kFloat32) X(fp16, bnb::kFloat16) X(bf16, bnb::kBFloat16)

// X(suffix, dtype, name of the 4-bit type, 4-bit type). The code is that of 8 bits, so it is not looked at here.
#define BNB_LEGACY_4BIT(suffix, dtype, name, quant_type)                                                                                             \
    BNB_API void cquantize_blockwise_##suffix##_##name(float*, void* A, float* absmax, uint8_t* out, int32_t blocksize, int32_t n) {                 \
        bnb_cuda_quantize_4bit(A, dtype, n, blocksize, quant_type, absmax, out, bnb::kCurrentDevice, nullptr);                                       \
    }                                                                                                                                                \
    BNB_API void cdequantize_blockwise_##suffix##_##name(float*, uint8_t* A, float* absmax, void* out, int32_t blocksize, int32_t n, void* stream) { \
        bnb_cuda_dequantize_4bit(A, absmax, nullptr, nullptr, nullptr, n, blocksize, quant_type, dtype, out, bnb::kCurrentDevice, stream);           \
    }

#define BNB_LEGACY(suffix, dtype)                                                                                                                    \
    BNB_API void cquantize_blockwise_##suffix(float* code, void* A, float* absmax, uint8_t* out, int32_t blocksize, int32_t n) {                     \
        bnb_cuda_quantize_blockwise(code, A, dtype, n, blocksize, absmax, out, bnb::kCurrentDevice, nullptr);                                        \
    }                                                                                                                                                \
    BNB_API void cdequantize_blockwise_##suffix(float* code, uint8_t* A, float* absmax, void* out, int32_t blocksize, int32_t n, void* stream) {     \
        bnb_cuda_dequantize_blockwise(code, A, absmax, n, blocksize, dtype, out, bnb::kCurrentDevice, stream);                                       \
    }                                                                                                                                                \
    BNB_LEGACY_4BIT(suffix, dtype, fp4, bnb::kFP4)                                                                                                   \
    BNB_LEGACY_4BIT(suffix, dtype, nf4, bnb::kNF4)

BNB_EACH_DTYPE(BNB_LEGACY)
