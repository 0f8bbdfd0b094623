// The int8 product for few tokens, and for anything on GPUs without int8 tensor cores: out[M, N] = x[M, K] . w[N, K]^T in sums of four products.
//
// The weight is read once for every kTokens tokens, K bytes a row, and that is the bound: 16 columns of a row and a token cost one load each and four
// instructions that multiply and add, well below what memory allows. A block owns two rows of the weight; its four warps share the columns, so that
// layers with few rows keep all multiprocessors busy, and add up in a fixed order.
//
// A lane meets 16 columns of every warp's stretch, at a distance that is a multiple of the period of the classes: its four groups are of the same
// four classes at every turn, and scaling them apart costs nothing until the end.
#include "int8_product.h"

namespace bnb {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kRows = 2;
constexpr int kBlocks = 4;                                        // of a multiprocessor at least, which leaves a thread registers enough
constexpr int64_t kStretch = int64_t(kThreads) * kCodesPerVector; // columns that the block reads at a turn
static_assert(kStretch % kInt8Period == 0 && kWarpSize * kCodesPerVector % kInt8Period == 0, "a lane keeps its classes");

template <typename Sum, int kTokens> struct Partials {
    Sum sums[kWarps][kRows][kTokens];
    float outliers[kWarps][kRows][kTokens];
};

__device__ __forceinline__ int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A lane's share of the sums of a tile. Rows and tokens that do not exist repeat the last.
template <int kTokens> __device__ __forceinline__ void add_products(const Int8ProductArgs& args, int64_t row, int64_t token,
                                                                    uint32_t (&sums)[kRows][kTokens][kGroupsPerVector]) {
    const int8_t *w[kRows], *x[kTokens];
    uintptr_t addresses = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        w[r] = args.w + smaller(row + r, args.N - 1) * args.w_stride;
        addresses |= reinterpret_cast<uintptr_t>(w[r]);
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
        x[t] = args.x + smaller(token + t, args.M - 1) * args.x_stride;
        addresses |= reinterpret_cast<uintptr_t>(x[t]);
    }
    const int unit = unit_of(addresses, args.K);
    for (int64_t k = int64_t(threadIdx.x) * kCodesPerVector; k < args.K; k += kStretch) {
        CodeVector weights[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r)
            weights[r] = load_codes(w[r] + k, args.K - k, unit);
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
            const CodeVector codes = load_codes(x[t] + k, args.K - k, unit);
#pragma unroll
            for (int r = 0; r < kRows; ++r)
#pragma unroll
                for (int i = 0; i < kGroupsPerVector; ++i)
                    sums[r][t][i] = uint32_t(__dp4a(int(codes.value[i]), int(weights[r].value[i]), int(sums[r][t][i])));
        }
    }
}

// The lane's four sums as one: added up, or scaled by the statistics of their classes first.
__device__ __forceinline__ void total(const Int8ProductArgs&, int64_t, const uint32_t (&sums)[kGroupsPerVector], uint32_t& result) {
    result = sums[0] + sums[1] + sums[2] + sums[3];
}

__device__ __forceinline__ void total(const Int8ProductArgs& args, int64_t token, const uint32_t (&sums)[kGroupsPerVector], float& result) {
    const float* stats = args.x_stats + smaller(token, args.M - 1) * kInt8Classes + lane_index() % 4 * kGroupsPerVector;
    result = 0.0f;
#pragma unroll
    for (int i = 0; i < kGroupsPerVector; ++i)
        result += __int2float_rn(int(sums[i])) * stats[i];
}

template <int kTokens>
__device__ __forceinline__ void add_outliers(const Int8ProductArgs& args, int64_t row, int64_t token, int64_t count, float (&sums)[kRows][kTokens]) {
    for (int64_t j = threadIdx.x; j < count; j += kThreads)
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const float weight = outlier_weight(args, j, smaller(row + r, args.N - 1));
#pragma unroll
            for (int t = 0; t < kTokens; ++t)
                sums[r][t] += outlier_activation(args, j, smaller(token + t, args.M - 1)) * weight;
        }
}

template <typename Sum, int kTokens> __global__ void __launch_bounds__(kThreads, kBlocks)
    multiply_rows(Int8ProductArgs args, int64_t token_tiles, int64_t tiles) {
    Partials<Sum, kTokens>& partials = shared_variable<Partials<Sum, kTokens>>();
    const int64_t outliers = outlier_count(args);
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int64_t token = tile % token_tiles * kTokens, row = tile / token_tiles * kRows;
        uint32_t sums[kRows][kTokens][kGroupsPerVector] = {};
        float of_outliers[kRows][kTokens] = {};
        add_products<kTokens>(args, row, token, sums);
        if (outliers > 0)
            add_outliers<kTokens>(args, row, token, outliers, of_outliers);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
                Sum sum;
                total(args, token + t, sums[r][t], sum);
                sum = warp_sum(sum);
                const float outlier = outliers > 0 ? warp_sum(of_outliers[r][t]) : 0.0f;
                if (lane_index() == 0) {
                    partials.sums[warp_index()][r][t] = sum;
                    partials.outliers[warp_index()][r][t] = outlier;
                }
            }
        __syncthreads();
        const int r = int(threadIdx.x) / kTokens, t = int(threadIdx.x) % kTokens;
        const int64_t m = token + t, n = row + r;
        if (r < kRows && m < args.M && n < args.N) {
            Sum sum = partials.sums[0][r][t];
            float outlier = partials.outliers[0][r][t];
            for (int warp = 1; warp < kWarps; ++warp) {
                sum += partials.sums[warp][r][t];
                outlier += partials.outliers[warp][r][t];
            }
            if (outliers > 0)
                store_result(args.out, args.dtype, m * args.out_stride + n, __fadd_rn(value_of(args, m, n, sum), outlier));
            else
                store_sum(args, m, n, sum);
        }
        __syncthreads();
    }
}

template <typename Sum, int kTokens> int32_t run(const Int8ProductArgs& args, Stream stream) {
    const int64_t token_tiles = divide_up(args.M, kTokens), tiles = token_tiles * divide_up(args.N, kRows);
    constexpr int64_t kMostBlocks = 1 << 22; // AMD's launch fewer than 2^32 threads
    const unsigned blocks = unsigned(tiles < kMostBlocks ? tiles : kMostBlocks);
    return launch(multiply_rows<Sum, kTokens>, blocks, kThreads, 0, stream, args, token_tiles, tiles);
}

template <typename Sum> int32_t run_for_tokens(const Int8ProductArgs& args, Stream stream) {
    return args.M == 1 ? run<Sum, 1>(args, stream) : args.M == 2 ? run<Sum, 2>(args, stream) : run<Sum, 4>(args, stream);
}

} // namespace

int32_t launch_int8_rows(const Int8ProductArgs& args, Stream stream) {
    return args.classes > 1 ? run_for_tokens<float>(args, stream) : run_for_tokens<uint32_t>(args, stream);
}

} // namespace bnb
