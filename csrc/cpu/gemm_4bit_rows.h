// Panels of the weight with its rows along the lanes: what out = A . W^T multiplies with.
//
// Rows are contiguous in memory, so lanes must be brought together from as many places. The codes are transposed, not the weights: a 32-bit word
// holds eight codes, so one transposition serves eight vectors. Layouts whose rows begin inside a byte or whose scales change inside a granule are
// dequantised row by row first and transposed afterwards.
#pragma once

#include "gemm_4bit_common.h"
#include "panel.h"

namespace bnb {
namespace BNB_ISA {

constexpr int kPrefetchDistance = 8 * W; // bytes of a row: two transpositions ahead

// Rows [row, row + rows) of the weight, at most kPanelLanes, with the scales of the blocks they touch.
struct PanelRows {
    int64_t row, rows;
    const float* scales;
    int64_t first_block; // the one that scales[0] belongs to

    int64_t vectors() const { return ceil_div(rows, W); }
};

// Columns [begin, end) of the panel into cells, by way of `rows`: W * ceil(end - begin, W) floats.
template <typename Arithmetic>
static void fill_any(const GemmArgs4bit& args, const PanelRows& panel, int64_t begin, int64_t end, float* rows, typename Arithmetic::Cell* cells) {
    const auto scale_of = [&](int64_t block) { return panel.scales[block - panel.first_block]; };
    const int64_t stride = panel.vectors() * W;
    const int64_t length = ceil_div(end - begin, W) * W;
    for (int64_t v = 0; v < panel.vectors(); ++v) {
        const int64_t count = smaller(W, panel.rows - v * W);
        for (int64_t r = 0; r < count; ++r) {
            const int64_t flat = (panel.row + v * W + r) * args.K;
            dequantize_span(args, scale_of, flat + begin, flat + end, rows + r * length);
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

template <typename Arithmetic> class WeightRows {
  public:
    using Args = GemmArgs4bit;

    static int64_t lanes(const GemmArgs4bit& args) { return args.N; }
    static int64_t depth(const GemmArgs4bit& args) { return args.K; }

    WeightRows(const GemmArgs4bit& args, int64_t stretch) : args_(args), scales_(args), stretch_(stretch), is_aligned_(is_aligned(args)) {}

    size_t scratch_bytes() const { return rows_bytes() + scales_bytes(); }

    bool take(Scratch& scratch) {
        rows_ = static_cast<float*>(scratch.take(rows_bytes()));
        decoded_ = static_cast<float*>(scratch.take(scales_bytes()));
        return rows_ != nullptr && decoded_ != nullptr;
    }

    void open(int64_t first, int64_t count) {
        panel_ = {first, count, nullptr, 0};
        if (args_.K > 0) {
            const BlockRange blocks = blocks_of_rows(args_, first, count);
            panel_.scales = scales_.of(blocks, decoded_);
            panel_.first_block = blocks.first;
        }
    }

    void fill(int64_t begin, int64_t end, typename Arithmetic::Cell* cells) const {
        if (is_aligned_)
            fill_aligned<Arithmetic>(args_, panel_, begin, end, cells);
        else
            fill_any<Arithmetic>(args_, panel_, begin, end, rows_, cells);
    }

  private:
    size_t rows_bytes() const { return is_aligned_ ? 0 : size_t(stretch_) * W * sizeof(float); }
    size_t scales_bytes() const { return args_.absmax_8bit != nullptr ? size_t(most_blocks(args_, kPanelLanes)) * sizeof(float) : 0; }

    const GemmArgs4bit& args_;
    BlockScales scales_;
    int64_t stretch_;
    bool is_aligned_;
    PanelRows panel_{};
    float* rows_ = nullptr;
    float* decoded_ = nullptr;
};

} // namespace BNB_ISA
} // namespace bnb
