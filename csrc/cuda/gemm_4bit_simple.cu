// out[m, n] = sum over k of A[m, k] * level(code[n, k]) * scale(n, k) + bias[n]: the 4-bit product for everything. Any element type, any K (rows of
// an odd number of codes start in the middle of a byte), any block size, any alignment, every device. The kernels on tensor cores serve what is
// regular and large; this one also computes fp32 layers, for which there are none.
//
// A warp computes one row n for up to kTokens tokens m: its lanes stride along k and are added up at the end, in the same order every time. What a
// lane takes at once are 8 codes, 4 bytes: a warp reads 128 bytes of the row, and 16-byte vectors of A. It must move the weight once for kTokens
// tokens: bound by memory for one token (about 5 instructions an element), by the multiply-adds from four on. Weights are multiplied as fp32 level *
// scale.
#include "gemm_4bit_common.h"

namespace bnb {
namespace {

constexpr int kWarps = 8;
constexpr int kCodes = 8; // that a lane takes at once
constexpr int kStepsAhead = 4;

struct SimpleTable {
    float level[16];
};

// Which block an element is in. Division is for odd block sizes, and then in 32 bits: in 64 it would be a function call.
struct QuickBlockOf {
    uint32_t blocksize;
    int shift; // -1: not a power of two

    __device__ __forceinline__ int64_t operator()(int64_t element) const { return shift >= 0 ? element >> shift : uint32_t(element) / blocksize; }
};

// The K codes of one row, one or kCodes at a time.
struct Row {
    const uint8_t* codes;
    const BlockScales& scales;
    const QuickBlockOf& block_of;
    const float* level;
    int64_t begin; // of the row in the flat order of elements

    __device__ __forceinline__ float scale(int64_t k) const { return any_scale_of_block(scales, block_of(begin + k)); }
    __device__ __forceinline__ float weight(int64_t k) const { return __fmul_rn(level[get_nibble(codes, begin + k)], scale(k)); }
};

template <typename T, int kTokens>
__device__ __forceinline__ void add_codes(float (&sums)[kTokens], const Row& row, const T* A, int64_t K, int tokens, int64_t k) {
    const uint32_t word = load_once(reinterpret_cast<const uint32_t*>(row.codes + (row.begin + k) / 2));
    const float scale = row.scale(k);
    float weights[kCodes];
#pragma unroll
    for (int i = 0; i < kCodes; ++i)
        weights[i] = __fmul_rn(row.level[(word >> (4 * (i ^ 1))) & 15], scale);
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
        if (m >= tokens)
            break;
        constexpr int width = kPerVector<T>;
#pragma unroll
        for (int part = 0; part < kCodes; part += width) {
            const auto x = load_vector<width>(A + m * K + k + part);
#pragma unroll
            for (int i = 0; i < width; ++i)
                sums[m] += widen(x.value[i]) * weights[part + i];
        }
    }
}

template <typename T, int kTokens, bool vectors>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    gemm_4bit_simple(const __grid_constant__ GemmArgs4bit args, const __grid_constant__ Levels16 levels,
                     const __grid_constant__ QuickBlockOf block_of) {
    SimpleTable& table = shared_variable<SimpleTable>();
    if (threadIdx.x < 16)
        table.level[threadIdx.x] = level_of_code(args, levels, int(threadIdx.x));
    __syncthreads();

    const int64_t n = int64_t(blockIdx.x) * kWarps + warp_index(), K = args.K;
    if (n >= args.N)
        return;
    const Row row{args.B, args.scales, block_of, table.level, n * K};
    for (int64_t first = int64_t(blockIdx.y) * kTokens; first < args.M; first += int64_t(gridDim.y) * kTokens) {
        const T* A = static_cast<const T*>(args.A) + first * K;
        const int tokens = int(min(int64_t(kTokens), args.M - first));
        float sums[kTokens] = {};
        if constexpr (vectors) {
#pragma unroll kStepsAhead
            for (int64_t begin = 0; begin < K; begin += kWarpSize * kCodes) {
                const int64_t k = begin + lane_index() * kCodes;
                if (k < K)
                    add_codes(sums, row, A, K, tokens, k);
            }
        } else {
            for (int64_t begin = 0; begin < K; begin += kWarpSize) {
                const int64_t k = begin + lane_index();
                if (k >= K)
                    continue;
                const float weight = row.weight(k);
#pragma unroll
                for (int m = 0; m < kTokens; ++m)
                    if (m < tokens)
                        sums[m] += widen(A[m * K + k]) * weight;
            }
        }
        const float bias = args.bias == nullptr ? 0.0f : widen(static_cast<const T*>(args.bias)[n]);
#pragma unroll
        for (int m = 0; m < kTokens; ++m) {
            const float sum = warp_sum(sums[m]);
            if (m < tokens && lane_index() == 0)
                static_cast<T*>(args.out)[(first + m) * args.N + n] = narrow<T>(sum + bias);
        }
    }
}

constexpr int64_t kMostBlocksY = 65535;
constexpr int64_t kMostToDivide = UINT32_MAX;

template <typename T, int kTokens, bool vectors> int32_t run(const GemmArgs4bit& args, Stream stream) {
    const int64_t token_blocks = divide_up(args.M, kTokens);
    const dim3 grid(unsigned(divide_up(args.N, kWarps)), unsigned(token_blocks < kMostBlocksY ? token_blocks : kMostBlocksY));
    int shift = BlockOf(args.blocksize).shift;
    if (shift < 0 && args.N * args.K > kMostToDivide)
        return kUnsupported;
    if (shift < 0 && args.blocksize > kMostToDivide)
        shift = 62; // there is only one block
    return launch(gemm_4bit_simple<T, kTokens, vectors>, grid, dim3(kWarps * kWarpSize), 0, stream, args, levels_of_type(args.quant_type),
                  QuickBlockOf{uint32_t(args.blocksize), shift});
}

} // namespace

int32_t launch_gemm_4bit_simple(const GemmArgs4bit& args, Stream stream) {
    const bool vectors = args.K % kCodes == 0 && args.blocksize % kCodes == 0 && is_aligned(args.A, 16) && is_aligned(args.B, 4);
    return with_element_type(args.dtype, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        if (!vectors)
            return run<T, 4, false>(args, stream);
        return args.M == 1 ? run<T, 1, true>(args, stream) : run<T, 4, true>(args, stream);
    });
}

} // namespace bnb
