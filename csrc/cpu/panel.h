// The floating point product in panels: for many tokens, and for layouts that other forms cannot read.
//
// A panel is a strip of the quantised weight, kPanelLanes wide. A stretch of it along the sum is dequantised once into a small buffer that stays in
// the second-level cache, with the strip's width along the lanes: cells[step][lane]. A tile then multiplies it with up to kPanelTokens tokens: at
// each step it loads the panel's vectors and broadcasts one activation of each token, straight from the caller's memory. With kPanelTokens *
// kPanelVectors accumulators there is far more arithmetic than loading, so the multipliers run near their peak; the order of the lanes is also the
// order of the result, and any number of tokens divides evenly into tiles.
//
// A product with the transposed weight has rows along the lanes (gemm_4bit_rows.h), its gradient columns (gemm_4bit_columns.h, int8_backward.cpp).
//
// Bytes: codes and scales once for every kMostPanelTokens tokens; the activations once for each panel, from whichever cache holds them.
#pragma once

#include "product.h"

namespace bnb {
namespace BNB_ISA {

#if defined(BNB_SIMD_AVX512) || defined(BNB_SIMD_NEON)
constexpr int kPanelVectors = 4; // with kPanelTokens: 24 accumulators of 32 registers
#elif defined(BNB_SIMD_AVX2)
constexpr int kPanelVectors = 2; // 12 of 16
#else
constexpr int kPanelVectors = 1;
#endif
constexpr int kPanelTokens = 6;
constexpr int kPanelLanes = kPanelVectors * W;
constexpr int kMostPanelTokens = 512;
constexpr int64_t kPanelBytes = 256 << 10;
constexpr int64_t kPrefetchRows = 32; // how far ahead a panel of columns asks for its rows

template <typename Arithmetic> constexpr int64_t panel_stretch() {
    return kPanelBytes / (kPanelLanes * int64_t(sizeof(typename Arithmetic::Cell))) * Arithmetic::kDepth;
}

// sums[token][lane] (+)= cells . activations over `depth` cells, for kTokens tokens at a distance of `stride` elements.
template <typename Arithmetic, int kTokens, int kVectors>
static void panel_tile(const typename Arithmetic::Cell* cells, const typename Arithmetic::Activation* a, int64_t stride, int64_t depth, bool is_first,
                       float* sums) {
    do { // at least once: no products are a sum of zero
        F32 acc[kTokens][kVectors];
        BNB_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            BNB_UNROLL
            for (int v = 0; v < kVectors; ++v)
                acc[t][v] = splat(0.0f);
        }
        const int64_t chain = smaller(depth, Arithmetic::kChain);
        for (int64_t k = 0; k < chain; ++k, cells += kVectors * W, a += Arithmetic::kDepth) {
            typename Arithmetic::Vector w[kVectors];
            BNB_UNROLL
            for (int v = 0; v < kVectors; ++v)
                w[v] = Arithmetic::load_cells(cells + v * W);
            BNB_UNROLL
            for (int t = 0; t < kTokens; ++t) {
                const auto x = Arithmetic::broadcast(a + t * stride);
                BNB_UNROLL
                for (int v = 0; v < kVectors; ++v)
                    acc[t][v] = Arithmetic::dot(w[v], x, acc[t][v]);
            }
        }
        BNB_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            BNB_UNROLL
            for (int v = 0; v < kVectors; ++v) {
                float* sum = sums + (t * kVectors + v) * W;
                store(sum, is_first ? acc[t][v] : add(load(sum), acc[t][v]));
            }
        }
        is_first = false;
        depth -= chain;
    } while (depth > 0);
}

template <typename Arithmetic> struct PanelTiles {
    using Function = void (*)(const typename Arithmetic::Cell*, const typename Arithmetic::Activation*, int64_t, int64_t, bool, float*);

    template <int kVectors> static Function of_tokens(int64_t tokens) {
        static constexpr Function kFunctions[kPanelTokens] = {
            panel_tile<Arithmetic, 1, kVectors>, panel_tile<Arithmetic, 2, kVectors>, panel_tile<Arithmetic, 3, kVectors>,
            panel_tile<Arithmetic, 4, kVectors>, panel_tile<Arithmetic, 5, kVectors>, panel_tile<Arithmetic, 6, kVectors>,
        };
        return kFunctions[tokens - 1];
    }

    template <int kVectors = kPanelVectors> static Function of(int64_t tokens, int64_t vectors) {
        if constexpr (kVectors > 1)
            if (vectors != kVectors)
                return of<kVectors - 1>(tokens, vectors);
        return of_tokens<kVectors>(tokens);
    }
};

// Activations as a panel wants them: of the arithmetic's type, every row readable up to a whole cell.
template <typename Arithmetic> struct PanelActivations {
    const typename Arithmetic::Activation* data;
    int64_t stride;
    int64_t first, tokens; // which rows of the result they stand for
};

// One thread's panels. `Weights` says which side of the matrix lies along the lanes and dequantises stretches of it:
//
//   Args                          of the kernel: A, bias, out, M, threads are used here
//   lanes(args), depth(args)      sizes of the product along the lanes and along the sum
//   Weights(args, stretch)        for stretches of at most so many steps of the sum
//   scratch_bytes(), take(s)      working memory; take returns false when there is none
//   open(first, count)            go to the panel of lanes [first, first + count)
//   fill(begin, end, cells)       steps [begin, end) of the sum as cells[step][lane]; an odd last step is followed by one that multiplies with zero
template <typename Arithmetic, typename T, typename Weights> class PanelWorker {
  public:
    using Args = typename Weights::Args;

    explicit PanelWorker(const Args& args)
        : args_(args), depth_(Weights::depth(args)), stretch_(smaller(panel_stretch<Arithmetic>(), ceil_div(depth_, W) * W)),
          weights_(args, stretch_), scratch_(cells_bytes() + sums_bytes() + weights_.scratch_bytes() + 4 * Scratch::kAlignment),
          cells_(static_cast<Cell*>(scratch_.take(cells_bytes()))), sums_(static_cast<float*>(scratch_.take(sums_bytes()))),
          is_ready_(cells_ != nullptr && sums_ != nullptr && weights_.take(scratch_)) {}

    bool is_ready() const { return is_ready_; }

    // Tiles [first, last) of the tokens against one panel.
    void multiply(const PanelActivations<Arithmetic>& a, const TokenTiles& tiles, int64_t first, int64_t last, int64_t panel_index) {
        const int64_t lane = panel_index * kPanelLanes;
        const int64_t all_lanes = Weights::lanes(args_);
        const int64_t count = smaller(kPanelLanes, all_lanes - lane);
        const int64_t vectors = ceil_div(count, W), width = vectors * W;
        const int64_t origin = tiles.begin(first);
        weights_.open(lane, count);
        int64_t k = 0;
        do { // at least once: an empty sum still writes zeros
            const int64_t end = smaller(depth_, k + stretch_);
            weights_.fill(k, end, cells_);
            for (int64_t tile = first; tile < last; ++tile) {
                const int64_t token = tiles.begin(tile);
                const auto multiply_tile = PanelTiles<Arithmetic>::of(tiles.size(tile), vectors);
                multiply_tile(cells_, a.data + token * a.stride + k, a.stride, ceil_div(end - k, Arithmetic::kDepth), k == 0,
                              sums_ + (token - origin) * width);
            }
            k = end;
        } while (k < depth_);
        const T* bias = args_.bias != nullptr ? static_cast<const T*>(args_.bias) + lane : nullptr;
        for (int64_t token = origin; token < tiles.begin(last); ++token)
            write_row(static_cast<T*>(args_.out) + (a.first + token) * all_lanes + lane, sums_ + (token - origin) * width, bias, count);
    }

  private:
    using Cell = typename Arithmetic::Cell;

    size_t cells_bytes() const { return size_t(stretch_ / Arithmetic::kDepth + 1) * kPanelLanes * sizeof(Cell); }
    size_t sums_bytes() const { return size_t(smaller(args_.M, kMostPanelTokens)) * kPanelLanes * sizeof(float); }

    const Args& args_;
    int64_t depth_, stretch_;
    Weights weights_;
    Scratch scratch_;
    Cell* cells_;
    float* sums_;
    bool is_ready_;
};

// All panels against the tokens of `a`. The work is a line of tiles, panel after panel; a thread takes a stretch of it, so that few panels and many
// tokens divide as well as many panels and few tokens.
template <typename Arithmetic, typename T, typename Weights>
static int32_t multiply_panels(const typename Weights::Args& args, const PanelActivations<Arithmetic>& a) {
    constexpr int64_t kMostTiles = kMostPanelTokens / kPanelTokens;
    constexpr int64_t kTilesWorthAPanel = 8; // dequantising a panel costs some tiles' work: a smaller share of one is not worth a thread
    const TokenTiles tiles = TokenTiles::of(a.tokens, kPanelTokens);
    const int64_t panels = ceil_div(Weights::lanes(args), kPanelLanes);
    const int64_t cost_of_tile = (Weights::depth(args) + 1) * kPanelLanes * ceil_div(a.tokens, tiles.count);
    const int64_t grain = ceil_div(kProductsPerThread, cost_of_tile);
    const int64_t least = smaller(tiles.count, kTilesWorthAPanel);
    return try_parallel(panels * tiles.count, grain > least ? grain : least, args.threads, [&](int64_t begin, int64_t end) -> int32_t {
        PanelWorker<Arithmetic, T, Weights> worker(args);
        if (!worker.is_ready())
            return kOutOfMemory;
        while (begin < end) {
            const int64_t first = begin % tiles.count;
            const int64_t count = smaller(smaller(tiles.count - first, end - begin), kMostTiles);
            worker.multiply(a, tiles, first, first + count, begin / tiles.count);
            begin += count;
        }
        return kOk;
    });
}

// Activations that a panel cannot read where they are (another type; pairs cut by an odd depth) are converted a few hundred tokens at a time.
template <typename Arithmetic, typename T, typename Weights> static int32_t multiply_converted(const typename Weights::Args& args) {
    using Activation = typename Arithmetic::Activation;
    constexpr int64_t kMostConverted = 4 << 20; // bytes
    const int64_t depth = Weights::depth(args);
    const int64_t stride = ceil_div(depth, Arithmetic::kDepth) * Arithmetic::kDepth;
    const int64_t row_bytes = (stride > 0 ? stride : 1) * int64_t(sizeof(Activation));
    const int64_t fitting = kMostConverted / row_bytes;
    const int64_t chunk = smaller(args.M, fitting > 8 * kPanelTokens ? fitting : 8 * kPanelTokens);
    Scratch scratch(size_t(chunk * row_bytes) + Scratch::kAlignment);
    auto* converted = static_cast<Activation*>(scratch.take(size_t(chunk * row_bytes)));
    if (converted == nullptr)
        return kOutOfMemory;
    for (int64_t first = 0; first < args.M; first += chunk) {
        const int64_t tokens = smaller(chunk, args.M - first);
        parallel_for(tokens, ceil_div(kProductsPerThread, depth + 1), args.threads, [&](int64_t begin, int64_t end, int) {
            for (int64_t token = begin; token < end; ++token) {
                const T* from = static_cast<const T*>(args.A) + (first + token) * depth;
                Activation* to = converted + token * stride;
                Arithmetic::convert(from, depth, to);
                for (int64_t k = depth; k < stride; ++k)
                    to[k] = Activation{};
            }
        });
        const int32_t status = multiply_panels<Arithmetic, T, Weights>(args, {converted, stride, first, tokens});
        if (status != kOk)
            return status;
    }
    return kOk;
}

// The whole product in panel form.
template <typename Arithmetic, typename T, typename Weights> static int32_t multiply_in_panels(const typename Weights::Args& args) {
    const int64_t depth = Weights::depth(args);
    if constexpr (std::is_same<T, typename Arithmetic::Activation>::value)
        if (depth % Arithmetic::kDepth == 0)
            return multiply_panels<Arithmetic, T, Weights>(args, {static_cast<const T*>(args.A), depth, 0, args.M});
    return multiply_converted<Arithmetic, T, Weights>(args);
}

} // namespace BNB_ISA
} // namespace bnb
