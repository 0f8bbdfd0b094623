// The product for a few tokens (M up to kMostDotTokens): every weight is looked up and multiplied in registers.
//
// A tile is kRows rows of the weight by kTokens tokens. Its accumulators hold partial sums along K in their lanes and are added up once at the end.
// For each granule of a row it loads the codes, scales the 16 levels, and then makes one lookup a vector of weights, used for all the tile's tokens;
// this costs about as much as two tokens' worth of multiplication, so more tokens want fewer rows and all want enough accumulators to hide the
// latency of a multiply-add. Weights are read from memory once, in order; activations are packed by each thread into the order of the lookups (see
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
constexpr int kDotGroup = 128;                          // rows that share one pass over packed activations
constexpr int64_t kDotCacheBytes = 32 << 10;            // of packed activations in one pass
constexpr int64_t kFewTokensAhead = 16 << 10;           // bytes of the weight

constexpr int tile_rows(int tokens) { return kManyRegisters ? (tokens <= 4 ? 4 : 2) : (tokens == 1 ? 2 : 1); }

// Accumulators for each row and token: the steps of a granule take turns when a tile is too small to keep the multipliers busy. The same for the
// single rows at the end, so that a row's sum does not depend on its neighbours.
constexpr int tile_turns(int tokens) { return tile_rows(tokens) * tokens <= 4 ? 2 : 1; }

// A stretch of K of a group of rows.
struct DotSpan {
    const uint8_t* codes; // of the first row, at the start of the stretch
    int64_t row_bytes;
    const float* scales;
    int64_t position; // of the first code, counted from the start of the first block in `scales`
    int64_t K;
    int log2_blocksize;
    int64_t length;      // of the stretch
    int64_t bytes_ahead; // to the rows that are fetched into the cache meanwhile
};

// Weights of a model come from memory, and rows begin in pages of their own, where the hardware's prefetching starts anew and an address must be
// translated first. For few tokens that takes longer than some tiles do.
template <int kRows> BNB_INLINE void prefetch_codes(const DotSpan& span, int64_t k) {
    constexpr int64_t kCodesInLine = 128; // a cache line of 64 bytes
    if (k % kCodesInLine == 0)
        for (int r = 0; r < kRows; ++r)
            prefetch(span.codes + r * span.row_bytes + k / 2 + span.bytes_ahead);
}

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
    constexpr int kTurns = tile_turns(kTokens);
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
        prefetch_codes<kRows>(span, k);
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

// Activations of up to kTileTokens tokens: for each vector of K in the order of the lookups, one vector a token.
template <typename Arithmetic, int kGranule, typename T>
static void pack_activations(const T* a, int64_t K, int64_t tokens, typename Arithmetic::Activation* out) {
    using Activation = typename Arithmetic::Activation;
    constexpr int kLanes = Arithmetic::kLanes;
    for (int64_t k = 0; k < K; k += kGranule, out += tokens * kGranule) {
        for (int64_t t = 0; t < tokens; ++t) {
            const T* from = a + t * K + k;
            if constexpr (std::is_same<T, Activation>::value) {
                Arithmetic::template pack<kGranule>(from, out + t * kLanes, tokens * kLanes);
            } else {
                Activation converted[kGranule];
                Arithmetic::convert(from, kGranule, converted);
                Arithmetic::template pack<kGranule>(converted, out + t * kLanes, tokens * kLanes);
            }
        }
    }
}

// One thread's rows, with its own copy of the packed activations.
template <typename Arithmetic, int kGranule, typename T> class DotWorker {
  public:
    explicit DotWorker(const GemmArgs4bit& args)
        : args_(args), scales_(args), tiles_(TokenTiles::of(args.M, kTileTokens)), levels_(load_table16(levels_of(args.quant_type))),
          log2_blocksize_(log2_of(args.blocksize)), scratch_(packed_bytes() + sums_bytes() + scales_bytes() + 3 * Scratch::kAlignment),
          packed_(static_cast<Activation*>(scratch_.take(packed_bytes()))), sums_(static_cast<float*>(scratch_.take(sums_bytes()))),
          decoded_(static_cast<float*>(scratch_.take(scales_bytes()))) {}

    bool is_ready() const { return packed_ != nullptr && sums_ != nullptr && decoded_ != nullptr; }

    void pack() const {
        for (int64_t tile = 0; tile < tiles_.count; ++tile) {
            const int64_t offset = tiles_.begin(tile) * args_.K;
            pack_activations<Arithmetic, kGranule>(static_cast<const T*>(args_.A) + offset, args_.K, tiles_.size(tile), packed_ + offset);
        }
    }

    // Rows [row, row + rows), at most kDotGroup.
    void multiply(int64_t row, int64_t rows) const {
        const BlockRange blocks = blocks_of_rows(args_, row, rows);
        const float* scales = scales_.of(blocks, decoded_);
        const int64_t K = args_.K, stretch = most_columns();
        memset(sums_, 0, sums_bytes());
        for (int64_t k = 0; k < K; k += stretch) {
            const int64_t first = row * K + k;
            const int64_t position = first - blocks.first * args_.blocksize;
            const DotSpan span{args_.B + first / 2, K / 2, scales, position, K, log2_blocksize_, smaller(stretch, K - k), bytes_ahead()};
            for (int64_t tile = 0; tile < tiles_.count; ++tile) {
                const int64_t token = tiles_.begin(tile), tokens = tiles_.size(tile);
                rows_function(tokens)(span, rows, levels_, packed_ + token * K + k * tokens, sums_ + token * kDotGroup);
            }
        }
        const T* bias = args_.bias != nullptr ? static_cast<const T*>(args_.bias) + row : nullptr;
        for (int64_t token = 0; token < args_.M; ++token)
            write_row(static_cast<T*>(args_.out) + token * args_.N + row, sums_ + token * kDotGroup, bias, rows);
    }

  private:
    using Activation = typename Arithmetic::Activation;
    using RowsFunction = void (*)(DotSpan, int64_t, Table16, const Activation*, float*);

    static RowsFunction rows_function(int64_t tokens) {
        static constexpr RowsFunction kFunctions[kTileTokens] = {
            dot_rows<Arithmetic, kGranule, 1>, dot_rows<Arithmetic, kGranule, 2>, dot_rows<Arithmetic, kGranule, 3>,
            dot_rows<Arithmetic, kGranule, 4>, dot_rows<Arithmetic, kGranule, 5>, dot_rows<Arithmetic, kGranule, 6>,
            dot_rows<Arithmetic, kGranule, 7>, dot_rows<Arithmetic, kGranule, 8>,
        };
        return kFunctions[tokens - 1];
    }

    // Columns of one stretch: the packed activations of a tile must fit the cache, and sums must stay short.
    int64_t most_columns() const {
        const int64_t fitting = kDotCacheBytes / (int64_t(sizeof(Activation)) * tiles_.size(0)) / kGranule * kGranule;
        return smaller(fitting, Arithmetic::kChain * Arithmetic::kLanes);
    }

    int64_t bytes_ahead() const {
        const int64_t row_bytes = args_.K / 2, next_tile = tile_rows(kTileTokens) * row_bytes;
        return args_.M <= 4 ? ceil_div(kFewTokensAhead, row_bytes) * row_bytes : next_tile;
    }

    size_t packed_bytes() const { return size_t(args_.M * args_.K) * sizeof(Activation); }
    size_t sums_bytes() const { return size_t(args_.M) * kDotGroup * sizeof(float); }
    size_t scales_bytes() const { return args_.absmax_8bit != nullptr ? size_t(most_blocks(args_, kDotGroup)) * sizeof(float) : 0; }

    const GemmArgs4bit& args_;
    BlockScales scales_;
    TokenTiles tiles_;
    Table16 levels_;
    int log2_blocksize_;
    Scratch scratch_;
    Activation* packed_;
    float* sums_;
    float* decoded_;
};

} // namespace BNB_ISA
} // namespace bnb
