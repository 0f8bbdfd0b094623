// The C names of the published library for 4-bit products on the GPU, for projects that call them through ctypes. Thin forms of the functions in
// cuda_api.h on the device that is current. They return nothing: where they cannot do their work the output stays as it was, and
// bnb_cuda_last_error() may say why. They bring no memory for partial sums, so no sum is split.
#include "cuda_api.h"

#include "../common/types.h"
#include "../cuda/kernels.h"

namespace {

constexpr int64_t kSkinnyTokens = 16; // what that kernel is made for
constexpr int32_t kSkinnyRows = 16, kTiledTokens = 64;

struct Scales {
    const float* absmax;
    const uint8_t* absmax_8bit;
    const float* absmax_code;
    const float* absmax_offset;
};

void multiply(const void* A, const uint8_t* B, const Scales& scales, const float* levels, const void* bias, void* out, int32_t M, int32_t N,
              int32_t K, int32_t blocksize, int32_t quant_type, int32_t dtype, void* stream) {
    const bool is_skinny = M <= kSkinnyTokens;
    bnb_cuda_gemm_4bit(A, B, scales.absmax, scales.absmax_8bit, scales.absmax_code, scales.absmax_offset, levels, bias, out, M, N, K, blocksize,
                       quant_type, dtype, is_skinny ? bnb::kGemmSkinny : bnb::kGemmTiled, is_skinny ? kSkinnyRows : kTiledTokens, 1, nullptr, 0,
                       bnb::kCurrentDevice, stream);
}

} // namespace

// X(suffix, dtype)
#define BNB_EACH_DTYPE(X) X(fp32, bnb::kFloat32) X(fp16, bnb::kFloat16) X(bf16, bnb::kBFloat16)

// out[m] = A[k] . B[m, k]^T for one token, n = 1, with the 16 levels `datatype`. Rows of B follow each other without gaps, as quantisation leaves
// them, so that the strides say nothing new.
#define BNB_LEGACY_GEMV(suffix, dtype)                                                                                                               \
    BNB_API void cgemm_4bit_inference_naive_##suffix(int m, int n, int k, void* A, uint8_t* B, float* absmax, float* datatype, void* out,            \
                                                     int /*lda*/, int /*ldb*/, int /*ldc*/, int blocksize, void* stream) {                           \
        if (n == 1 && datatype != nullptr)                                                                                                           \
            multiply(A, B, {absmax, nullptr, nullptr, nullptr}, datatype, nullptr, out, 1, m, k, blocksize, bnb::kNF4, dtype, stream);               \
    }

BNB_EACH_DTYPE(BNB_LEGACY_GEMV)

// out[M, N] = A[M, K] . B[N, K]^T + bias. quant_type: 1 FP4, 2 NF4.
#define BNB_LEGACY_GEMM(suffix, dtype)                                                                                                               \
    BNB_API void cgemm_4bit_##suffix(void* A, uint8_t* B, float* absmax, uint8_t* absmax_8bit, float* absmax_code, float* absmax_offset, void* out,  \
                                     void* bias, int M, int N, int K, int blocksize, int quant_type, void* stream) {                                 \
        multiply(A, B, {absmax, absmax_8bit, absmax_code, absmax_offset}, nullptr, bias, out, M, N, K, blocksize, quant_type, dtype, stream);        \
    }

BNB_EACH_DTYPE(BNB_LEGACY_GEMM)
