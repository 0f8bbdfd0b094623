// The product for a few tokens (M up to kMostDotTokens): every weight is looked up and multiplied in registers.
//
// A tile is kRows rows of the weight by kTokens tokens. Its accumulators hold partial sums along K in their lanes and are added up once at the end. For
// each granule of a row it loads the codes, scales the 16 levels, and then makes one lookup a vector of weights, used for all the tile's tokens; this
// costs about as much as two tokens' worth of multiplication, so more tokens want fewer rows and all want enough accumulators to hide the latency of a
// multiply-add. Weights are read from memory once, in order; activations are packed by each thread into the order of the lookups (see
// source_in_granule), and K is cut so that the activations of a tile stay in the first-level cache while a group of rows passes.
//
// Bytes: N K / 2 of codes and N K / blocksize scales, which is all that matters for M = 1.
#pragma once

#include "gemm_4bit_common.h"

namespace bnb {
namespace BNB_ISA {

constexpr bool kManyRegisters = W == 16; // 32 vectors, a table in one of them
constexpr int kTileTokens = 8;
constexpr int kMostDotTokens = kManyRegisters ? 40 : 8; // from here on a panel is faster
constexpr int kDotGroup = 64;               // rows that share one pass over packed activations
constexpr int64_t kDotCacheBytes = 32 << 10; // of packed activations in one pass

constexpr int tile_rows(int tokens) { return kManyRegisters ? (tokens <= 4 ? 4 : 2) : (tokens == 1 ? 2 : 1); }

// Accumulators for each row and token: the steps of a granule take turns when there are too few tokens to keep the multipliers busy.
constexpr int tile_turns(int rows, int tokens) { return rows * tokens <= 4 ? 2 : 1; }

// A stretch of K of a group of rows.
struct DotSpan {
    const uint8_t* codes; // of the first row, at the start of the stretch
    int64_t row_bytes;
    const float* scales;
    int64_t position;     // of the first code, counted from the start of the first block in `scales`
    int64_t K;
    int log2_blocksize;
    int64_t length;       // of the stretch
};

template <typename Arithmetic, int kGranule, int kRows> struct Granules {
    typename Arithmetic::Codes codes[kRows];
    typename Arithmetic::Table tables[kRows];

    BNB_INLINE Granules load(const DotSpan& span, Table16 levels, int64_t k) {
        Granules granules;
        BNB_UNROLL
        for (int r = 0; r < kRows; ++r) {
            granules.codes[r] = Arithmetic::template load_codes<kGranule>(span.codes + r * span.row_bytes + k / 2);
            granules.tables[r] = Arithmetic::scaled_table(levels, span.scales[(span.position + r * span.K + k) >> span.log2_blocksize]);
        }
        return granules;
    }
};

// Adds the tile's products to sums[token * kDotGroup + row].
template <typename Arithmetic, int kGranule, int kRows, int kTokens>
static void dot_tile(const DotSpan& span, Table16 levels, const typename Arithmetic::Activation* x, float* sums) {
    constexpr int kLanes = Arithmetic::kLanes;
    constexpr int kTurns = tile_turns(kRows, kTokens);
    constexpr int kSums = (kRows * kTokens + 3) / 4 * 4; // reduced four at a time
    F32 acc[kTurns][kSums];
    BNB_UNROLL
    for (int i = 0; i < kTurns * kSums; ++i)
        acc[i / kSums][i % kSums] = splat(0.0f);

    using TileGranules = Granules<Arithmetic, kGranule, kRows>;
    TileGranules next = TileGranules::load(span, levels, 0);
    for (int64_t k = 0; k < span.length; k += kGranule) {
        TileGranules now = next;
        if constexpr (kManyRegisters) // a granule ahead: from a load to the first product is too long a way for the processor to overlap by itself
            next = TileGranules::load(span, levels, smaller(k + kGranule, span.length - kGranule));
        else
            now = TileGranules::load(span, levels, k);
        BNB_UNROLL
        for (int step = 0; step < kGranule / kLanes; ++step) {
            typename Arithmetic::Vector w[kRows];
            BNB_UNROLL
            for (int r = 0; r < kRows; ++r) {
                w[r] = Arithmetic::lookup(now.tables[r], now.codes[r]);
                now.codes[r] = Arithmetic::next_codes(now.codes[r]);
            }
            BNB_UNROLL
            for (int t = 0; t < kTokens; ++t) {
                const auto activations = Arithmetic::load_activations(x + t * kLanes);
                BNB_UNROLL
                for (int r = 0; r < kRows; ++r) {
                    F32& sum = acc[step % kTurns][r * kTokens + t];
                    sum = Arithmetic::dot(w[r], activations, sum);
                }
            }
            x += kTokens * kLanes;
        }
    }

    float totals[kSums];
    BNB_UNROLL
    for (int i = 0; i < kSums; ++i)
        acc[0][i] = kTurns == 2 ? add(acc[0][i], acc[kTurns - 1][i]) : acc[0][i];
    BNB_UNROLL
    for (int i = 0; i < kSums; i += 4)
        reduce_add_4(acc[0] + i, totals + i);
    for (int r = 0; r < kRows; ++r)
        for (int t = 0; t < kTokens; ++t)
            sums[t * kDotGroup + r] += totals[r * kTokens + t];
}

template <typename Arithmetic, int kGranule, int kTokens>
static void dot_rows(DotSpan span, int64_t rows, Table16 levels, const typename Arithmetic::Activation* x, float* sums) {
    constexpr int kRows = tile_rows(kTokens);
    int64_t row = 0;
    const auto advance = [&](int64_t by) {
        span.codes += by * span.row_bytes;
        span.position += by * span.K;
        row += by;
    };
    for (; row + kRows <= rows; advance(kRows))
        dot_tile<Arithmetic, kGranule, kRows, kTokens>(span, levels, x, sums + row);
    for (; row < rows; advance(1))
        dot_tile<Arithmetic, kGranule, 1, kTokens>(span, levels, x, sums + row);
}

// Activations of `tokens` tokens: for each vector of K in the order of the lookups, one vector a token.
template <typename Arithmetic, int kGranule, typename T>
static void pack_activations(const T* a, int64_t K, int64_t tokens, typename Arithmetic::Activation* out) {
    constexpr int kLanes = Arithmetic::kLanes;
    for (int64_t k = 0; k < K; k += kGranule)
        for (int step = 0; step < kGranule / kLanes; ++step)
            for (int64_t t = 0; t < tokens; ++t, out += kLanes)
                for (int lane = 0; lane < kLanes; ++lane)
                    out[lane] = Arithmetic::activation(a[t * K + k + source_in_granule<Arithmetic, kGranule>(step, lane)]);
}

template <typename Arithmetic, int kGranule, typename T> static int32_t dot_rows_of_thread(const GemmArgs4bit& args, int64_t begin, int64_t end) {
    using Activation = typename Arithmetic::Activation;
    using RowsFunction = void (*)(DotSpan, int64_t, Table16, const Activation*, float*);
    static constexpr RowsFunction kRowsFunctions[kTileTokens] = {
        dot_rows<Arithmetic, kGranule, 1>, dot_rows<Arithmetic, kGranule, 2>, dot_rows<Arithmetic, kGranule, 3>, dot_rows<Arithmetic, kGranule, 4>,
        dot_rows<Arithmetic, kGranule, 5>, dot_rows<Arithmetic, kGranule, 6>, dot_rows<Arithmetic, kGranule, 7>, dot_rows<Arithmetic, kGranule, 8>,
    };
    const int64_t K = args.K;
    const size_t x_bytes = size_t(args.M * K) * sizeof(Activation), sums_bytes = size_t(args.M) * kDotGroup * sizeof(float);
    const size_t scales_bytes = args.absmax_8bit != nullptr ? size_t(most_blocks(args, kDotGroup)) * sizeof(float) : 0;
    Scratch scratch(x_bytes + sums_bytes + scales_bytes + 3 * Scratch::kAlignment);
    auto* x = static_cast<Activation*>(scratch.take(x_bytes));
    auto* sums = static_cast<float*>(scratch.take(sums_bytes));
    auto* decoded = static_cast<float*>(scratch.take(scales_bytes));
    if (x == nullptr || sums == nullptr || decoded == nullptr)
        return kOutOfMemory;

    const TokenTiles tiles = TokenTiles::of(args.M, kTileTokens);
    for (int64_t tile = 0; tile < tiles.count; ++tile)
        pack_activations<Arithmetic, kGranule>(static_cast<const T*>(args.A) + tiles.begin(tile) * K, K, tiles.size(tile), x + tiles.begin(tile) * K);

    const Table16 levels = load_table16(levels_of(args.quant_type));
    const int log2_blocksize = log2_of(args.blocksize);
    const int64_t fitting = kDotCacheBytes / (int64_t(sizeof(Activation)) * tiles.size(0)) / kGranule * kGranule;
    const int64_t stretch = smaller(fitting, Arithmetic::kChain * Arithmetic::kLanes);
    const T* bias = static_cast<const T*>(args.bias);
    for (int64_t row = begin; row < end; row += kDotGroup) {
        const int64_t rows = smaller(kDotGroup, end - row);
        const BlockRange blocks = blocks_of_rows(args, row, rows);
        const float* scales = block_scales(args, blocks, decoded);
        memset(sums, 0, sums_bytes);
        for (int64_t k = 0; k < K; k += stretch) {
            const DotSpan span{args.B + (row * K + k) / 2, K / 2, scales, row * K + k - blocks.first * args.blocksize, K, log2_blocksize,
                               smaller(stretch, K - k)};
            for (int64_t tile = 0; tile < tiles.count; ++tile) {
                const int64_t token = tiles.begin(tile), tokens = tiles.size(tile);
                kRowsFunctions[tokens - 1](span, rows, levels, x + token * K + k * tokens, sums + token * kDotGroup);
            }
        }
        for (int64_t token = 0; token < args.M; ++token)
            write_row(static_cast<T*>(args.out) + token * args.N + row, sums + token * kDotGroup, bias != nullptr ? bias + row : nullptr, rows);
    }
    return kOk;
}

} // namespace BNB_ISA
} // namespace bnb
