// The int8 product on tensor cores: out[M, N] = x[M, K] . w[N, K]^T, its sums exact, or scaled by the statistics of 16 classes of columns.
//
// One instruction multiplies 16 rows of the weight with 8 tokens over 32 columns, of which every register holds a group of four. Which columns meet
// in it is free as long as both operands agree. Eight groups of one class, from eight periods of 64 columns, are what a sum under one statistic
// wants: a stretch of 512 columns is 16 instructions, one a class, with nothing shuffled in memory or in registers. A thread reads 16 bytes at a time
// from shared memory, the same register of four instructions, of neighbouring classes; pieces of 16 bytes are placed so that such reads do not
// collide.
//
// The sum of one class over a stretch is below 2^19, so it is started from the bits of 1.5 * 2^23: the result is a float already, and is scaled and
// added by two instructions. A sum of integers needs neither.
//
// Memory is read in pieces of kQuarters * 16 bytes of a period, ahead by all but one of the stages of a ring in shared memory. Tiles that follow each
// other share rows of the weight. How large a tile is says the file of the architecture.
#pragma once

#include "int8_product.h"

namespace bnb {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kPeriods = 8; // in the columns of one instruction
constexpr int64_t kStretch = kPeriods * kInt8Period;
constexpr int kPieceBytes = 16;

// A block's tile: row_warps * row_tiles * 16 rows of the weight by token_warps * token_tiles * 8 tokens. `shares` warps have the same entries and
// take turns in the quarters of a stage.
template <int row_warps, int token_warps, int row_tiles, int token_tiles, int quarters, int stages> struct Shape {
    static constexpr int kRowTiles = row_tiles, kTokenTiles = token_tiles, kTokenWarps = token_warps, kQuarters = quarters, kStages = stages;
    static constexpr int kSpatialWarps = row_warps * token_warps;
    static constexpr int kShares = kWarps / kSpatialWarps;
    static constexpr int kRows = row_warps * row_tiles * 16, kTokens = token_warps * token_tiles * 8;
    static constexpr int kRowBytes = kPeriods * quarters * kPieceBytes; // of a row in a stage
    static constexpr int kStageBytes = (kRows + kTokens) * kRowBytes;
    static constexpr int kTileStride = kRows + 4; // of the finished tile, which takes the place of the stages
    static constexpr int kStatsBytes = kInt8Classes * kTokens * int(sizeof(float));
    static constexpr int kSharedBytes = stages * kStageBytes + kStatsBytes;
    static constexpr int kBlocks = row_tiles * token_tiles > 8 ? 1 : 2; // of a multiprocessor, which share its registers
    static constexpr int kTokenStep = kThreads / kRows;                 // from entry to entry of a thread that writes
    static_assert(kThreads % kRows == 0, "a thread writes one row of the tile");
    static_assert(kShares * kSpatialWarps == kWarps && quarters % kShares == 0, "all warps have work");
    static_assert(kTokens * kTileStride * int(sizeof(float)) <= stages * kStageBytes, "the tile fits");
};

// Where piece `piece` of row `row` of a stage lies. A quarter of a warp reads one quarter of four periods of two rows: eight pieces for the eight
// places in a line of 128 bytes.
template <int quarters> __device__ __forceinline__ int place_of(int row, int piece) {
    if constexpr (quarters == 4)
        return piece ^ (piece >> 3 & 1) ^ (row & 1) << 1;
    else
        return piece ^ (row & 1);
}

int copy_unit(const Int8ProductArgs& args) {
    return unit_of(reinterpret_cast<uintptr_t>(args.x) | reinterpret_cast<uintptr_t>(args.w) | uintptr_t(args.x_stride) | uintptr_t(args.w_stride),
                   args.K);
}

// Starts the copy of the rows of one operand, the first of them `base`; rows beyond `existing` and columns beyond K are zeros. A thread has the same
// piece of every so many rows.
template <int quarters, int rows> __device__ __forceinline__ void copy_rows(unsigned char* to, const int8_t* base, int64_t stride, int64_t existing,
                                                                            int64_t K, int64_t column, int unit) {
    constexpr int kPieces = kPeriods * quarters, kRowStep = kThreads / kPieces;
    static_assert(kThreads % kPieces == 0 && rows % kRowStep == 0 && kRowStep % 2 == 0, "all threads have as much to do, in the same place of a row");
    const int piece = int(threadIdx.x) % kPieces, first = int(threadIdx.x) / kPieces;
    const int64_t k = column + piece / quarters * kInt8Period + piece % quarters * kPieceBytes;
    to += first * kPieces * kPieceBytes + place_of<quarters>(first, piece) * kPieceBytes;
    const int8_t* from = base + first * stride + k;
    if (unit != kPieceBytes) {
        for (int row = first; row < rows; row += kRowStep, to += kRowStep * kPieces * kPieceBytes, from += kRowStep * stride)
            *reinterpret_cast<CodeVector*>(to) = load_codes(from, row < existing ? K - k : 0, unit);
        return;
    }
#pragma unroll 2
    for (int row = first; row < rows; row += kRowStep, to += kRowStep * kPieces * kPieceBytes, from += kRowStep * stride)
        copy_async_16(to, from, row < existing && k < K);
}

struct Tile {
    int64_t row, token; // the first of each
};

// Starts the copy of the columns of one step.
template <typename S>
__device__ __forceinline__ void copy_stage(const Int8ProductArgs& args, Tile tile, int step, unsigned char* stage, int unit) {
    constexpr int kSteps = kGroupsPerVector / S::kQuarters; // of a stretch
    const int64_t column = int64_t(step / kSteps) * kStretch + step % kSteps * S::kQuarters * kPieceBytes;
    const int8_t *w = args.w + tile.row * args.w_stride, *x = args.x + tile.token * args.x_stride;
    copy_rows<S::kQuarters, S::kRows>(stage, w, args.w_stride, args.N - tile.row, args.K, column, unit);
    copy_rows<S::kQuarters, S::kTokens>(stage + S::kRows * S::kRowBytes, x, args.x_stride, args.M - tile.token, args.K, column, unit);
}

// ---------------------------------------------------------------------------------------------------------------------------------- one stage
template <int quarters> __device__ __forceinline__ CodeVector load_piece(const unsigned char* rows, int row, int period, int quarter) {
    constexpr int kRowBytes = kPeriods * quarters * kPieceBytes;
    return *reinterpret_cast<const CodeVector*>(rows + row * kRowBytes + place_of<quarters>(row, period * quarters + quarter) * kPieceBytes);
}

__device__ __forceinline__ void accumulate(const uint32_t (&w)[4], const uint32_t (&x)[2], uint32_t (&sums)[4], const uint32_t (&)[2]) {
    mma_m16n8k32_s8(sums, w, x, sums);
}

// 2^23 * 1.5 and a small integer as bits are that sum as a float.
__device__ __forceinline__ void accumulate(const uint32_t (&w)[4], const uint32_t (&x)[2], float (&sums)[4], const float (&stats)[2]) {
    const uint32_t zero = float_bits(kRoundingShift), zeros[4] = {zero, zero, zero, zero};
    uint32_t products[4];
    mma_m16n8k32_s8(products, w, x, zeros);
#pragma unroll
    for (int i = 0; i < 4; ++i)
        sums[i] = __fmaf_rn(__fsub_rn(float_from_bits(products[i]), kRoundingShift), stats[i % 2], sums[i]);
}

// Which entries of the tile a thread holds: of each 16 x 8, rows `row` and row + 8, tokens `token` and token + 1.
template <typename S> struct Position {
    int share, row, token, row_of_fragment, token_of_fragment, slot;

    __device__ __forceinline__ Position() {
        const int warp = warp_index(), lane = lane_index();
        const int spatial = warp % S::kSpatialWarps;
        share = warp / S::kSpatialWarps;
        row = spatial / S::kTokenWarps * S::kRowTiles * 16 + lane / 4;
        token = spatial % S::kTokenWarps * S::kTokenTiles * 8 + 2 * (lane % 4);
        row_of_fragment = row;
        token_of_fragment = token - 2 * (lane % 4) + lane / 4;
        slot = lane % 4;
    }
};

// Statistics of the two tokens of a thread, for sums that are scaled.
__device__ __forceinline__ void load_pair(const float*, uint32_t (&)[2]) {}

__device__ __forceinline__ void load_pair(const float* stats, float (&pair)[2]) {
    const auto both = load_vector<2>(stats);
    pair[0] = both.value[0];
    pair[1] = both.value[1];
}

template <typename S, typename Sum> __device__ __forceinline__ void multiply_stage(const unsigned char* stage, const float* stats, int first_quarter,
                                                                                   const Position<S>& at,
                                                                                   Sum (&sums)[S::kRowTiles][S::kTokenTiles][4]) {
    const unsigned char* tokens = stage + S::kRows * S::kRowBytes;
#pragma unroll 1
    for (int turn = 0; turn < S::kQuarters; turn += S::kShares) {
        const int quarter = turn + at.share;
        const float* own_stats = stats + (first_quarter + quarter) * kGroupsPerVector * S::kTokens + at.token;
        CodeVector w[S::kRowTiles][4];
#pragma unroll
        for (int i = 0; i < S::kRowTiles; ++i)
#pragma unroll
            for (int part = 0; part < 4; ++part)
                w[i][part] = load_piece<S::kQuarters>(stage, at.row_of_fragment + 16 * i + 8 * (part % 2), at.slot + 4 * (part / 2), quarter);
#pragma unroll
        for (int j = 0; j < S::kTokenTiles; ++j) {
            const CodeVector x[2] = {load_piece<S::kQuarters>(tokens, at.token_of_fragment + 8 * j, at.slot, quarter),
                                     load_piece<S::kQuarters>(tokens, at.token_of_fragment + 8 * j, at.slot + 4, quarter)};
#pragma unroll
            for (int group = 0; group < kGroupsPerVector; ++group) {
                const uint32_t codes[2] = {x[0].value[group], x[1].value[group]};
                Sum pair[2];
                load_pair(own_stats + group * S::kTokens + 8 * j, pair);
#pragma unroll
                for (int i = 0; i < S::kRowTiles; ++i) {
                    const uint32_t weights[4] = {w[i][0].value[group], w[i][1].value[group], w[i][2].value[group], w[i][3].value[group]};
                    accumulate(weights, codes, sums[i][j], pair);
                }
            }
        }
    }
}

// --------------------------------------------------------------------------------------------------------------------------- the finished tile
// Puts the sums of all shares, one after another, into tile[token][row].
template <typename S, typename Sum>
__device__ __forceinline__ void gather_tile(const Sum (&sums)[S::kRowTiles][S::kTokenTiles][4], const Position<S>& at, Sum* tile) {
    for (int share = 0; share < S::kShares; ++share) {
        __syncthreads();
        if (at.share != share)
            continue;
#pragma unroll
        for (int i = 0; i < S::kRowTiles; ++i)
#pragma unroll
            for (int j = 0; j < S::kTokenTiles; ++j)
#pragma unroll
                for (int part = 0; part < 4; ++part) {
                    Sum& entry = tile[(at.token + 8 * j + part % 2) * S::kTileStride + at.row + 16 * i + 8 * (part / 2)];
                    entry = share == 0 ? sums[i][j][part] : entry + sums[i][j][part];
                }
    }
    __syncthreads();
}

// The outlier columns, a few at a time, in shared memory.
constexpr int kOutliersAtOnce = 8;

template <typename S> struct OutlierPanel {
    alignas(32) float activations[S::kTokens][kOutliersAtOnce];
    float weights[kOutliersAtOnce][S::kRows];
};

template <typename S>
__device__ __forceinline__ void fill_panel(const Int8ProductArgs& args, Tile tile, int64_t first, int64_t count, OutlierPanel<S>& panel) {
    for (int i = int(threadIdx.x); i < S::kTokens * kOutliersAtOnce; i += kThreads) {
        const int token = i / kOutliersAtOnce, j = i % kOutliersAtOnce;
        const bool exists = first + j < count && tile.token + token < args.M;
        panel.activations[token][j] = exists ? outlier_activation(args, first + j, tile.token + token) : 0.0f;
    }
    for (int i = int(threadIdx.x); i < S::kRows * kOutliersAtOnce; i += kThreads) {
        const int row = i % S::kRows, j = i / S::kRows;
        const bool exists = first + j < count && tile.row + row < args.N;
        panel.weights[j][row] = exists ? outlier_weight(args, first + j, tile.row + row) : 0.0f;
    }
}

// Adds the outlier columns to the values of a tile.
template <typename S>
__device__ __forceinline__ void add_outliers(const Int8ProductArgs& args, Tile tile, int64_t count, int row, int token, float* values) {
    OutlierPanel<S>& panel = shared_variable<OutlierPanel<S>>();
    for (int64_t first = 0; first < count; first += kOutliersAtOnce) {
        fill_panel<S>(args, tile, first, count, panel);
        __syncthreads();
        float weights[kOutliersAtOnce];
#pragma unroll
        for (int j = 0; j < kOutliersAtOnce; ++j)
            weights[j] = panel.weights[j][row];
#pragma unroll 4
        for (int own = token; own < S::kTokens; own += S::kTokenStep) {
            const auto activations = load_vector<kOutliersAtOnce>(panel.activations[own]);
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < kOutliersAtOnce; ++j)
                sum += activations.value[j] * weights[j];
            values[own * S::kTileStride + row] += sum;
        }
        __syncthreads();
    }
}

// A thread has one row and every so many tokens of the finished tile.
template <typename S, typename Sum> __device__ __forceinline__ void write_tile(const Int8ProductArgs& args, Tile tile, Sum* sums) {
    const int row = int(threadIdx.x) % S::kRows, token = int(threadIdx.x) / S::kRows;
    const int64_t n = tile.row + row, tokens = n < args.N ? args.M - tile.token : 0;
    const int64_t count = outlier_count(args);
    float* values = reinterpret_cast<float*>(sums);
    if (count > 0) {
        for (int own = token; own < S::kTokens && own < tokens; own += S::kTokenStep)
            values[own * S::kTileStride + row] = value_of(args, tile.token + own, n, sums[own * S::kTileStride + row]);
        add_outliers<S>(args, tile, count, row, token, values);
        for (int own = token; own < S::kTokens && own < tokens; own += S::kTokenStep)
            store_result(args.out, args.dtype, (tile.token + own) * args.out_stride + n, values[own * S::kTileStride + row]);
        return;
    }
#pragma unroll 4
    for (int own = token; own < S::kTokens; own += S::kTokenStep)
        if (own < tokens)
            store_sum(args, tile.token + own, n, sums[own * S::kTileStride + row]);
}

// -------------------------------------------------------------------------------------------------------------------------------------- kernel
template <typename S> __device__ __forceinline__ void load_stats(const Int8ProductArgs& args, int64_t token, float* stats) {
#pragma unroll 1
    for (int i = int(threadIdx.x); i < S::kTokens * kInt8Classes; i += kThreads) {
        const int64_t m = token + i / kInt8Classes;
        stats[i % kInt8Classes * S::kTokens + i / kInt8Classes] = m < args.M ? args.x_stats[m * kInt8Classes + i % kInt8Classes] : 0.0f;
    }
}

template <typename S, typename Sum> __global__ void __launch_bounds__(kThreads, S::kBlocks)
    multiply_tiles(Int8ProductArgs args, int token_tiles, int unit) {
    unsigned char* stages = dynamic_shared_memory();
    float* stats = reinterpret_cast<float*>(stages + S::kStages * S::kStageBytes);
    constexpr int kSteps = kGroupsPerVector / S::kQuarters, kAhead = S::kStages - 1;
    const int steps = int((args.K + kStretch - 1) / kStretch) * kSteps;
    const int number = int(blockIdx.x);
    const Tile tile{int64_t(number / token_tiles) * S::kRows, int64_t(number % token_tiles) * S::kTokens};
    const Position<S> at;
    if (args.classes > 1)
        load_stats<S>(args, tile.token, stats);
    Sum sums[S::kRowTiles][S::kTokenTiles][4] = {};
    for (int step = -kAhead; step < steps; ++step) {
        if (step >= 0) {
            copy_async_wait<kAhead - 1>();
            __syncthreads(); // all see this stage, and nobody reads the one before any more
        }
        if (step + kAhead < steps)
            copy_stage<S>(args, tile, step + kAhead, stages + (step + kAhead) % S::kStages * S::kStageBytes, unit);
        copy_async_commit();
        if (step >= 0)
            multiply_stage<S>(stages + step % S::kStages * S::kStageBytes, stats, step % kSteps * S::kQuarters, at, sums);
    }
    Sum* finished = reinterpret_cast<Sum*>(stages);
    gather_tile<S>(sums, at, finished);
    write_tile<S>(args, tile, finished);
}

template <typename S> int32_t run(const Int8ProductArgs& args, Stream stream) {
    constexpr int64_t kMost = 0x7fffffff; // blocks of a grid, and steps
    const int64_t token_tiles = divide_up(args.M, S::kTokens), tiles = token_tiles * divide_up(args.N, S::kRows);
    const int shared_bytes = S::kSharedBytes + int(sizeof(OutlierPanel<S>));
    if (device_properties().shared_memory_limit < shared_bytes || tiles > kMost || args.K > kMost)
        return kUnsupported;
    const auto kernel = args.classes > 1 ? multiply_tiles<S, float> : multiply_tiles<S, uint32_t>;
    return launch(kernel, unsigned(tiles), kThreads, S::kSharedBytes, stream, args, int(token_tiles), copy_unit(args));
}

} // namespace
} // namespace bnb
