// The gradient of the int8 product with respect to its activations, for any type, shape, alignment and GPU: out[M, K] = A[M, N] . W[N, K] with
// W = fl(fl(code * SCB) / 127) in fp32.
//
// A lane has four neighbouring columns, one word of codes a row, and eight tokens; the warps of a block share the rows and add up in a fixed order.
// The weight is read once for every eight tokens. What has tensor cores and is aligned goes to int8_backward_tiles.cu.
#include "int8_backward.h"

namespace bnb {
namespace {

constexpr int kTokens = 8;
constexpr int kLaneColumns = 4;
constexpr int kColumns = kWarpSize * kLaneColumns;

struct Sums {
    float of_warp[kBackwardWarps][kTokens][kColumns];
};

// Four codes from p on, `left` of which exist.
__device__ __forceinline__ uint32_t load_word(const int8_t* p, int64_t left, bool is_word) {
    if (is_word && left >= kLaneColumns)
        return *reinterpret_cast<const uint32_t*>(p);
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i)
        if (i < left)
            word |= uint32_t(uint8_t(p[i])) << 8 * i;
    return word;
}

template <typename T> __global__ void __launch_bounds__(kBackwardThreads)
    multiply_simply(Int8BackwardArgs args, int64_t column_tiles, int64_t tiles) {
    Sums& sums = shared_variable<Sums>();
    const bool is_word = args.K % kLaneColumns == 0 && reinterpret_cast<uintptr_t>(args.CB) % kLaneColumns == 0;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int64_t first_column = tile % column_tiles * kColumns, token = tile / column_tiles * kTokens;
        const int64_t column = first_column + lane_index() * kLaneColumns;
        const T* A = static_cast<const T*>(args.A) + token * args.N;
        float own[kTokens][kLaneColumns] = {};
        for (int64_t n = warp_index(); n < args.N; n += kBackwardWarps) {
            float weights[kLaneColumns];
            floats_of_codes(load_word(args.CB + n * args.K + column, args.K - column, is_word), weights);
            const float stat = args.SCB[n];
#pragma unroll
            for (int i = 0; i < kLaneColumns; ++i)
                weights[i] = weight_of(weights[i], stat);
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
                const float a = token + t < args.M ? widen(A[t * args.N + n]) : 0.0f;
#pragma unroll
                for (int i = 0; i < kLaneColumns; ++i)
                    own[t][i] += a * weights[i];
            }
        }
#pragma unroll
        for (int t = 0; t < kTokens; ++t)
#pragma unroll
            for (int i = 0; i < kLaneColumns; ++i)
                sums.of_warp[warp_index()][t][i * kWarpSize + lane_index()] = own[t][i];
        __syncthreads();
        for (int entry = int(threadIdx.x); entry < kTokens * kColumns; entry += kBackwardThreads) {
            const int t = entry / kColumns, i = entry % kColumns;
            const int place = i % kLaneColumns * kWarpSize + i / kLaneColumns;
            float sum = sums.of_warp[0][t][place];
            for (int warp = 1; warp < kBackwardWarps; ++warp)
                sum += sums.of_warp[warp][t][place];
            if (token + t < args.M && first_column + i < args.K)
                static_cast<T*>(args.out)[(token + t) * args.K + first_column + i] = narrow<T>(sum);
        }
        __syncthreads();
    }
}

} // namespace

int32_t launch_int8_backward_simple(const Int8BackwardArgs& args, Stream stream) {
    const int64_t column_tiles = divide_up(args.K, kColumns), tiles = column_tiles * divide_up(args.M, kTokens);
    constexpr int64_t kMostBlocks = 1 << 22; // AMD's launch fewer than 2^32 threads
    const unsigned blocks = unsigned(tiles < kMostBlocks ? tiles : kMostBlocks);
    return with_element_type(args.dtype, [&](auto* element) {
        return launch(multiply_simply<std::remove_pointer_t<decltype(element)>>, blocks, kBackwardThreads, 0, stream, args, column_tiles, tiles);
    });
}

} // namespace bnb
