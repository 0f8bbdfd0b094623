// The product for many tokens, and for layouts that the dot form cannot read.
//
// A panel is kPanelRows rows of the weight. A stretch of it along K is dequantised once into a small buffer that stays in the second-level cache, with
// rows along the lanes: cells[k][row]. A tile then multiplies it with up to kPanelTokens tokens: for each k it loads the panel's vectors and broadcasts one
// activation of each token, straight from the caller's memory. With kPanelTokens * kPanelVectors accumulators there is far more arithmetic than loading,
// so the multipliers run near their peak; rows in lanes is also the order of the result, and any number of tokens divides evenly into tiles.
//
// To put rows along the lanes the codes are transposed, not the weights: a 32-bit word holds eight codes, so one transposition serves eight vectors.
// Layouts whose rows begin inside a byte or whose scales change inside a granule are dequantised row by row first and transposed afterwards.
//
// Bytes: codes and scales once for every kMostPanelTokens tokens; the activations once for each panel, from whichever cache holds them.
#pragma once

#include "gemm_4bit_common.h"

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
constexpr int kPanelRows = kPanelVectors * W;
constexpr int kMostPanelTokens = 512;
constexpr int64_t kPanelBytes = 256 << 10;
constexpr int kPrefetchDistance = 8 * W; // bytes of a row: two transpositions ahead

template <typename Arithmetic> constexpr int64_t panel_stretch() {
    return kPanelBytes / (kPanelRows * int64_t(sizeof(typename Arithmetic::Cell))) * Arithmetic::kDepth;
}

// Rows [row, row + rows) of the weight, at most kPanelRows, with the scales of the blocks they touch.
struct PanelRows {
    int64_t row, rows;
    const float* scales;
    int64_t first_block; // the one that scales[0] belongs to

    int64_t vectors() const { return ceil_div(rows, W); }
};

// Weights of flat elements [begin, end) in fp32, for any block size and alignment.
static void dequantize_span(const GemmArgs4bit& args, const PanelRows& panel, int64_t begin, int64_t end, float* out) {
    const float* levels = levels_of(args.quant_type);
    const Table16 table = load_table16(levels);
    for (int64_t i = begin; i < end;) {
        const int64_t block = i / args.blocksize;
        const int64_t block_end = smaller(end, (block + 1) * args.blocksize);
        const float scale = panel.scales[block - panel.first_block];
        const auto put_until = [&](int64_t stop) {
            for (; i < stop; ++i)
                out[i - begin] = levels[get_nibble(args.B, i)] * scale;
        };
        if (i & 1)
            put_until(i + 1);
        for (; i + W <= block_end; i += W)
            store(out + (i - begin), mul(lookup16(table, load_nibbles(args.B + i / 2)), splat(scale)));
        put_until(block_end);
    }
}

// Columns [begin, end) of the panel into cells, by way of `rows`: W * ceil(end - begin, W) floats.
template <typename Arithmetic>
static void fill_any(const GemmArgs4bit& args, const PanelRows& panel, int64_t begin, int64_t end, float* rows, typename Arithmetic::Cell* cells) {
    const int64_t stride = panel.vectors() * W;
    const int64_t length = ceil_div(end - begin, W) * W;
    for (int64_t v = 0; v < panel.vectors(); ++v) {
        const int64_t count = smaller(W, panel.rows - v * W);
        for (int64_t r = 0; r < count; ++r) {
            const int64_t flat = (panel.row + v * W + r) * args.K;
            dequantize_span(args, panel, flat + begin, flat + end, rows + r * length);
        }
        for (int64_t k = begin; k < end; k += W) {
            const int columns = int(smaller(W, end - k));
            I32 weights[W];
            load_columns(reinterpret_cast<const uint8_t*>(rows + (k - begin)), length * int64_t(sizeof(float)), int(count), columns, weights);
            auto* out = cells + (k - begin) / Arithmetic::kDepth * stride + v * W;
            for (int j = 0; j < columns; j += 2)
                Arithmetic::store_pair(from_bits(weights[j]), from_bits(weights[j + 1]), out + j / Arithmetic::kDepth * stride, stride);
        }
    }
}

// Eight codes of each of W rows.
template <typename Arithmetic>
BNB_INLINE void store_word(I32 codes, const Table16& levels, F32 scale, typename Arithmetic::Cell* out, int64_t stride) {
    BNB_UNROLL
    for (int pair = 0; pair < 4; ++pair) {
        const F32 even = mul(lookup16(levels, low_nibbles(shift_right<4>(codes))), scale);
        const F32 odd = mul(lookup16(levels, low_nibbles(codes)), scale);
        Arithmetic::store_pair(even, odd, out + 2 * pair / Arithmetic::kDepth * stride, stride);
        codes = shift_right<8>(codes);
    }
}

// Columns [begin, end) of the panel into cells, where is_aligned(args).
template <typename Arithmetic>
static void fill_aligned(const GemmArgs4bit& args, const PanelRows& panel, int64_t begin, int64_t end, typename Arithmetic::Cell* cells) {
    const Table16 levels = load_table16(levels_of(args.quant_type));
    const int log2_blocksize = log2_of(args.blocksize);
    const int64_t lowest_bit = args.K & -args.K;
    const int64_t same_scale = smaller(args.blocksize, lowest_bit); // columns between two changes of scale
    const int64_t stride = panel.vectors() * W;
    for (int64_t v = 0; v < panel.vectors(); ++v) {
        const int64_t row = panel.row + v * W;
        const int count = int(smaller(W, panel.rows - v * W));
        uint32_t row_starts[W]; // counted from the start of the first block
        for (int r = 0; r < W; ++r)
            row_starts[r] = uint32_t((row + (r < count ? r : count - 1)) * args.K - panel.first_block * args.blocksize);
        const I32 row_positions = load_32bit(reinterpret_cast<const uint8_t*>(row_starts));
        F32 scale = splat(0.0f);
        for (int64_t k = begin; k < end; k += 8 * W) {
            const int words = int(smaller(W, (end - k) / 8));
            I32 codes[W];
            const uint8_t* packed = args.B + (row * args.K + k) / 2;
            load_columns(packed, args.K / 2, count, words, codes);
            for (int r = 0; r < W; ++r) // so many streams at once are too much for the hardware's own prefetching
                prefetch(packed + r * (args.K / 2) + kPrefetchDistance);
            for (int j = 0; j < words; ++j) {
                const int64_t column = k + 8 * j;
                if (column == begin || (column & (same_scale - 1)) == 0) {
                    scale = gather(panel.scales, shift_right_by(add_bits(row_positions, splat_bits(uint32_t(column))), log2_blocksize));
                }
                store_word<Arithmetic>(codes[j], levels, scale, cells + (column - begin) / Arithmetic::kDepth * stride + v * W, stride);
            }
        }
    }
}

// sums[token][row] (+)= cells . activations over `depth` cells, for kTokens tokens at a distance of `stride` elements.
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

template <typename Arithmetic, typename T> class PanelWorker {
  public:
    explicit PanelWorker(const GemmArgs4bit& args)
        : args_(args), is_aligned_(is_aligned(args)), stretch_(smaller(panel_stretch<Arithmetic>(), ceil_div(args.K, W) * W)),
          scratch_(cells_bytes() + sums_bytes() + rows_bytes() + scales_bytes() + 4 * Scratch::kAlignment),
          cells_(static_cast<Cell*>(scratch_.take(cells_bytes()))), sums_(static_cast<float*>(scratch_.take(sums_bytes()))),
          rows_(static_cast<float*>(scratch_.take(rows_bytes()))), decoded_(static_cast<float*>(scratch_.take(scales_bytes()))) {}

    bool is_ready() const { return cells_ != nullptr && sums_ != nullptr && rows_ != nullptr && decoded_ != nullptr; }

    // Tiles [first, last) of the tokens against one panel.
    void multiply(const PanelActivations<Arithmetic>& a, const TokenTiles& tiles, int64_t first, int64_t last, int64_t panel_index) const {
        const int64_t row = panel_index * kPanelRows;
        PanelRows panel{row, smaller(kPanelRows, args_.N - row), nullptr, 0};
        if (args_.K > 0) {
            const BlockRange blocks = blocks_of_rows(args_, panel.row, panel.rows);
            panel.scales = block_scales(args_, blocks, decoded_);
            panel.first_block = blocks.first;
        }
        const int64_t width = panel.vectors() * W;
        const int64_t origin = tiles.begin(first);
        int64_t k = 0;
        do { // at least once: an empty K still writes zeros
            const int64_t end = smaller(args_.K, k + stretch_);
            if (is_aligned_)
                fill_aligned<Arithmetic>(args_, panel, k, end, cells_);
            else
                fill_any<Arithmetic>(args_, panel, k, end, rows_, cells_);
            for (int64_t tile = first; tile < last; ++tile) {
                const int64_t token = tiles.begin(tile);
                PanelTiles<Arithmetic>::of(tiles.size(tile), panel.vectors())(cells_, a.data + token * a.stride + k, a.stride,
                                                                              ceil_div(end - k, Arithmetic::kDepth), k == 0,
                                                                              sums_ + (token - origin) * width);
            }
            k = end;
        } while (k < args_.K);
        const T* bias = args_.bias != nullptr ? static_cast<const T*>(args_.bias) + panel.row : nullptr;
        for (int64_t token = origin; token < tiles.begin(last); ++token)
            write_row(static_cast<T*>(args_.out) + (a.first + token) * args_.N + panel.row, sums_ + (token - origin) * width, bias, panel.rows);
    }

  private:
    using Cell = typename Arithmetic::Cell;

    size_t cells_bytes() const { return size_t(stretch_ / Arithmetic::kDepth + 1) * kPanelRows * sizeof(Cell); }
    size_t sums_bytes() const { return size_t(smaller(args_.M, kMostPanelTokens)) * kPanelRows * sizeof(float); }
    size_t rows_bytes() const { return is_aligned_ ? 0 : size_t(stretch_) * W * sizeof(float); }
    size_t scales_bytes() const { return args_.absmax_8bit != nullptr ? size_t(most_blocks(args_, kPanelRows)) * sizeof(float) : 0; }

    const GemmArgs4bit& args_;
    bool is_aligned_;
    int64_t stretch_;
    Scratch scratch_;
    Cell* cells_;
    float* sums_;
    float* rows_;
    float* decoded_;
};

} // namespace BNB_ISA
} // namespace bnb
