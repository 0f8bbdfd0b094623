// The gradient of the int8 product on tensor cores, for bfloat16 and float16: out[M, K] = A[M, N] . W[N, K] with W = fl(fl(code * SCB) / 127) in
// fp32, rounded to the type of A, as dequantisation and a dense product would have it.
//
// The sum runs over the rows of the weight, and rows are what one register has to pair, while codes of a row are neighbours in memory. So a lane
// reads 8 columns of each of four rows: byte j of the four words is its part of the j-th of eight instructions, which have the columns 8g + j (g =
// lane / 4). The results of a lane are then 16 neighbouring columns of two tokens. The four rows of lane 4g + t are 4t .. 4t + 3, for which the
// activations of a token are neighbours too: nothing is shuffled.
//
// A block has 64 columns and 16, 32 or 64 tokens. Its warps share the rows, 16 at a time, and add up in a fixed order. Reads N K bytes of the weight
// once for every 64 tokens, at about five instructions a weight; the activations, K / 64 times M N, come from the second-level cache.
#include "int8_backward.h"

namespace bnb {
namespace {

constexpr int kLaneColumns = 8;
constexpr int kColumns = kWarpSize / 4 * kLaneColumns;
constexpr int kLaneRows = 4;
constexpr int kRows = 4 * kLaneRows; // of the weight in one step of a warp
constexpr int kTile = 16;            // tokens of one instruction

// What a lane needs for one step.
template <typename T, int token_tiles> struct Operands {
    Vector<uint32_t, 2> codes[kLaneRows];
    float stats[kLaneRows];
    Vector<uint32_t, 2> activations[token_tiles][2]; // of tokens g and g + 8 of a tile, in four rows
};

// Rows and tokens that do not exist are zeros: N is a multiple of kLaneRows, so that a lane has all of its rows or none.
template <typename T, int token_tiles> __device__ __forceinline__ void load_operands(const Int8BackwardArgs& args, int64_t column, int64_t token,
                                                                                     int64_t row, Operands<T, token_tiles>& to) {
    const bool has_rows = row < args.N;
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
        to.codes[i] = {};
        if (has_rows && column < args.K)
            to.codes[i] = load_vector<2>(reinterpret_cast<const uint32_t*>(args.CB + (row + i) * args.K + column));
        to.stats[i] = has_rows ? args.SCB[row + i] : 0.0f;
    }
#pragma unroll
    for (int tile = 0; tile < token_tiles; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t m = token + tile * kTile + half * 8;
            to.activations[tile][half] = {};
            if (has_rows && m < args.M)
                to.activations[tile][half] = load_vector<2>(reinterpret_cast<const uint32_t*>(static_cast<const T*>(args.A) + m * args.N + row));
        }
}

template <typename T, int token_tiles>
__device__ __forceinline__ void multiply_step(const Operands<T, token_tiles>& from, float (&sums)[token_tiles][kLaneColumns][4]) {
#pragma unroll
    for (int word = 0; word < 2; ++word) {
        float weights[kLaneRows][4];
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i) {
            floats_of_codes(from.codes[i].value[word], weights[i]);
#pragma unroll
            for (int j = 0; j < 4; ++j)
                weights[i][j] = weight_of(weights[i][j], from.stats[i]);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const uint32_t b[2] = {narrow_pair<T>(weights[0][j], weights[1][j]), narrow_pair<T>(weights[2][j], weights[3][j])};
#pragma unroll
            for (int tile = 0; tile < token_tiles; ++tile) {
                const auto& low = from.activations[tile][0].value;
                const auto& high = from.activations[tile][1].value;
                const uint32_t a[4] = {low[0], high[0], low[1], high[1]};
                float (&sum)[4] = sums[tile][4 * word + j];
                mma_m16n8k16<T>(sum, a, b, sum);
            }
        }
    }
}

// The sums of one token tile of all warps. A lane's 16 neighbouring columns are spread over as many rows, so that lanes do not collide.
struct TileSums {
    float of_warp[kBackwardWarps][kLaneColumns * 4][kWarpSize];
};

template <typename T> __device__ __forceinline__ void write_tile(const Int8BackwardArgs& args, int64_t first_column, int64_t token,
                                                                 const float (&own)[kLaneColumns][4], TileSums& sums) {
#pragma unroll
    for (int j = 0; j < kLaneColumns; ++j)
#pragma unroll
        for (int part = 0; part < 4; ++part)
            sums.of_warp[warp_index()][4 * j + part][lane_index()] = own[j][part];
    __syncthreads();
    for (int entry = int(threadIdx.x); entry < kTile * kColumns; entry += kBackwardThreads) {
        const int t = entry / kColumns, column = entry % kColumns;
        const int lane = t % 8 * 4 + column / 16, place = column % 8 * 4 + t / 8 * 2 + column / 8 % 2;
        float sum = sums.of_warp[0][place][lane];
        for (int warp = 1; warp < kBackwardWarps; ++warp)
            sum += sums.of_warp[warp][place][lane];
        if (token + t < args.M && first_column + column < args.K)
            static_cast<T*>(args.out)[(token + t) * args.K + first_column + column] = narrow<T>(sum);
    }
    __syncthreads();
}

template <typename T, int token_tiles> __global__ void __launch_bounds__(kBackwardThreads)
    multiply_tiles(Int8BackwardArgs args, int64_t column_tiles, int64_t tiles) {
    TileSums& shared = shared_variable<TileSums>();
    constexpr int64_t kStep = kBackwardWarps * kRows;
    const int64_t first_row = warp_index() * kRows + lane_index() % 4 * kLaneRows;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int64_t first_column = tile % column_tiles * kColumns, token = tile / column_tiles * kTile * token_tiles;
        const int64_t column = first_column + lane_index() / 4 * kLaneColumns, own_token = token + lane_index() / 4;
        float sums[token_tiles][kLaneColumns][4] = {};
        Operands<T, token_tiles> next;
        load_operands(args, column, own_token, first_row, next);
        for (int64_t row = 0; row < args.N; row += kStep) { // the same for all lanes
            const Operands<T, token_tiles> current = next;
            load_operands(args, column, own_token, row + kStep + first_row, next);
            multiply_step<T, token_tiles>(current, sums);
        }
#pragma unroll
        for (int i = 0; i < token_tiles; ++i)
            write_tile<T>(args, first_column, token + i * kTile, sums[i], shared);
    }
}

template <typename T, int token_tiles> int32_t run(const Int8BackwardArgs& args, Stream stream) {
    const int64_t column_tiles = divide_up(args.K, kColumns), tiles = column_tiles * divide_up(args.M, kTile * token_tiles);
    constexpr int64_t kMostBlocks = 1 << 30;
    return launch(multiply_tiles<T, token_tiles>, unsigned(tiles < kMostBlocks ? tiles : kMostBlocks), kBackwardThreads, 0, stream, args,
                  column_tiles, tiles);
}

template <typename T> int32_t run_for_tokens(const Int8BackwardArgs& args, Stream stream) {
    return args.M <= kTile ? run<T, 1>(args, stream) : args.M <= 2 * kTile ? run<T, 2>(args, stream) : run<T, 4>(args, stream);
}

} // namespace

int32_t launch_int8_backward_tiles(const Int8BackwardArgs& args, Stream stream) {
    const bool is_aligned_for_it =
        args.K % kLaneColumns == 0 && args.N % kLaneRows == 0 && is_aligned(args.CB, kLaneColumns) && is_aligned(args.A, 8);
    const int32_t least = args.dtype == kBFloat16 ? 80 : 75;
    if (args.dtype == kFloat32 || !is_aligned_for_it || device_properties().capability < least)
        return kUnsupported;
    return args.dtype == kBFloat16 ? run_for_tokens<BFloat16>(args, stream) : run_for_tokens<Half>(args, stream);
}

} // namespace bnb
