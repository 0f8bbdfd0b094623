// The C names of the published library, for projects that call it through ctypes. Thin forms of the functions in api.h, on the runtime's default
// number of threads. They return nothing, so bad arguments leave the output untouched.
#include "api.h"

#include "../common/quantize.h"
#include "../cpu/cpu_features.h"

#include <cstdlib>

namespace bnb {
namespace {

using Count = long long;

// -1, a size that every function refuses, for a negative factor or a product beyond 64 bits.
Count checked_product(Count a, Count b) {
    if (a <= 0 || b <= 0)
        return a == 0 || b == 0 ? 0 : -1;
    return a <= INT64_MAX / b ? a * b : -1;
}

struct Buffer {
    void* data;

    explicit Buffer(size_t bytes) : data(malloc(bytes)) {}
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { free(data); }

    template <typename T> T* as() const { return static_cast<T*>(data); }
};

// The weight layout of `_convert_weight_packed_for_cpu`: rows in blocks of 32, columns in pairs. Byte ((block * K / 2) + pair) * 32 + j holds column
// 2 * pair + j % 2 of two rows: row 32 * block + j / 2 in its low nibble, the row 16 further down in its high nibble.
void unpack_row_blocks(const uint8_t* packed, int64_t N, int64_t K, uint8_t* canonical) {
    const int64_t pairs = K / 2;
    for (int64_t n = 0; n < N; ++n) {
        const int64_t in_block = n % 32;
        const uint8_t* block = packed + (n - in_block) * pairs;
        const int shift = in_block < 16 ? 0 : 4;
        for (int64_t pair = 0; pair < pairs; ++pair) {
            const uint8_t* columns = block + pair * 32 + 2 * (in_block % 16);
            canonical[n * pairs + pair] = uint8_t(((columns[0] >> shift) & 15) << 4 | ((columns[1] >> shift) & 15));
        }
    }
}

// bfloat16 [blocks, N] -> float [N, blocks]
void transpose_absmax(const BFloat16* absmax, int64_t blocks, int64_t N, float* result) {
    for (int64_t n = 0; n < N; ++n)
        for (int64_t block = 0; block < blocks; ++block)
            result[n * blocks + block] = to_float(absmax[block * N + n]);
}

void copy_rows(const BFloat16* from, int64_t from_stride, BFloat16* to, int64_t to_stride, int64_t rows, int64_t columns) {
    for (int64_t row = 0; row < rows; ++row)
        memcpy(to + row * to_stride, from + row * from_stride, size_t(columns) * sizeof(BFloat16));
}

void gemv_packed(QuantType quant_type, int64_t M, int64_t N, int64_t K, const BFloat16* x, const uint8_t* weight, const BFloat16* absmax,
                 BFloat16* out, int64_t blocksize, int64_t x_stride, int64_t out_stride) {
    const bool is_shape = M > 0 && N > 0 && K > 0 && blocksize > 0 && N % 32 == 0 && K % 2 == 0 && K % blocksize == 0;
    if (!is_shape || x_stride < K || out_stride < N || x == nullptr || weight == nullptr || absmax == nullptr || out == nullptr)
        return;
    const int64_t most = INT64_MAX / 16;
    if (K > most / N || x_stride > most / M || out_stride > most / M)
        return;
    const int64_t blocks = K / blocksize;
    const Buffer canonical(size_t(N * K / 2)), scales(size_t(N * blocks) * sizeof(float));
    const Buffer rows(size_t(M * K) * sizeof(BFloat16)), result(size_t(M * N) * sizeof(BFloat16));
    if (!canonical.data || !scales.data || !rows.data || !result.data)
        return;
    unpack_row_blocks(weight, N, K, canonical.as<uint8_t>());
    transpose_absmax(absmax, blocks, N, scales.as<float>());
    copy_rows(x, x_stride, rows.as<BFloat16>(), K, M, K);
    const int32_t status = bnb_cpu_gemm_4bit(rows.data, canonical.as<uint8_t>(), scales.as<float>(), nullptr, nullptr, nullptr, nullptr, result.data,
                                             M, N, K, blocksize, quant_type, kBFloat16, 0);
    if (status == 0)
        copy_rows(result.as<BFloat16>(), N, out, out_stride, M, N);
}

} // namespace
} // namespace bnb

using bnb::Count;

// X(suffix, dtype)
#define BNB_EACH_DTYPE(X) X(fp32, bnb::kFloat32) X(fp16, bnb::kFloat16) X(bf16, bnb::kBFloat16)

#define BNB_BLOCKWISE(suffix, dtype)                                                                                                                 \
    BNB_API void cquantize_blockwise_cpu_##suffix(float* code, void* A, float* absmax, uint8_t* out, Count blocksize, Count n) {                     \
        bnb_cpu_quantize_blockwise(code, A, dtype, n, blocksize, absmax, out, 0);                                                                    \
    }                                                                                                                                                \
    BNB_API void cdequantize_blockwise_cpu_##suffix(float* code, uint8_t* A, const float* absmax, void* out, Count blocksize, Count n) {             \
        bnb_cpu_dequantize_blockwise(code, A, absmax, n, blocksize, dtype, out, 0);                                                                  \
    }                                                                                                                                                \
    BNB_API void cdequantize_blockwise_cpu_fp4_##suffix(uint8_t* A, const float* absmax, void* out, Count blocksize, Count rows, Count columns) {    \
        bnb_cpu_dequantize_4bit(A, absmax, bnb::checked_product(rows, columns), blocksize, bnb::kFP4, dtype, out, 0);                                \
    }                                                                                                                                                \
    BNB_API void cdequantize_blockwise_cpu_nf4_##suffix(uint8_t* A, const float* absmax, void* out, Count blocksize, Count rows, Count columns) {    \
        bnb_cpu_dequantize_4bit(A, absmax, bnb::checked_product(rows, columns), blocksize, bnb::kNF4, dtype, out, 0);                                \
    }

BNB_EACH_DTYPE(BNB_BLOCKWISE)

// Any M, weight in the layout described at unpack_row_blocks, absmax as bfloat16 [K / blocksize, N]. Strides in elements.
#define BNB_GEMV(name, quant_type)                                                                                                                   \
    BNB_API void gemv_4bit_inference_cpu_##name##_bf16(int64_t M, int64_t N, int64_t K, const bnb::BFloat16* x, const uint8_t* weight,               \
                                                       const bnb::BFloat16* absmax, bnb::BFloat16* out, int64_t blocksize, int64_t x_stride,         \
                                                       int64_t out_stride) {                                                                         \
        bnb::gemv_packed(quant_type, M, N, K, x, weight, absmax, out, blocksize, x_stride, out_stride);                                              \
    }

BNB_GEMV(fp4, bnb::kFP4)
BNB_GEMV(nf4, bnb::kNF4)

// What this machine can do.
BNB_API bool has_avx512f_cpu(void) { return bnb::cpu_has_avx512f(); }
BNB_API bool has_avx512bf16_cpu(void) { return bnb::cpu_has_avx512bf16(); }
