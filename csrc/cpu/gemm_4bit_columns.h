// Panels of the weight with its columns along the lanes: what the gradient out = A . W multiplies with.
//
// Columns lie side by side in memory, so codes go to their lanes as they are read. A step of the sum is a row of the weight: a panel touches a short
// run of every row, a cache line or less, which only the next panel will find in the cache. Hence the prefetching.
#pragma once

#include "gemm_4bit_common.h"
#include "panel.h"

namespace bnb {
namespace BNB_ISA {

template <typename Arithmetic> class WeightColumns {
  public:
    using Args = GemmArgs4bit;

    static int64_t lanes(const GemmArgs4bit& args) { return args.K; }
    static int64_t depth(const GemmArgs4bit& args) { return args.N; }

    WeightColumns(const GemmArgs4bit& args, int64_t) : args_(args), is_aligned_(is_aligned(args)) {}

    size_t scratch_bytes() const { return 0; }
    bool take(Scratch&) { return true; }

    void open(int64_t first, int64_t count) { first_ = first, count_ = count; }

    void fill(int64_t begin, int64_t end, typename Arithmetic::Cell* cells) const {
        const int64_t width = ceil_div(count_, W) * W;
        for (int64_t row = begin; row < end; row += 2, cells += 2 / Arithmetic::kDepth * width) {
            if (is_aligned_)
                fill_aligned(row, row + 1 < end, cells, width);
            else
                fill_any(row, row + 1 < end, cells, width);
        }
    }

  private:
    using Cell = typename Arithmetic::Cell;

    // The panel's run of one row or two. Scales change between granules at most.
    void fill_aligned(int64_t row, bool is_pair, Cell* cells, int64_t width) const {
        const Table16 levels = load_table16(levels_of(args_.quant_type));
        const int log2_blocksize = log2_of(args_.blocksize);
        const int64_t even = row * args_.K + first_, odd = is_pair ? even + args_.K : even;
        prefetch(args_.B + (even + kPrefetchRows * args_.K) / 2);
        prefetch(args_.B + (odd + kPrefetchRows * args_.K) / 2);
        F32 even_scale{}, odd_scale{};
        for (int64_t lane = 0; lane < count_; lane += W) {
            if (lane % kNarrowGranule == 0) {
                even_scale = splat(block_scale(args_, (even + lane) >> log2_blocksize));
                odd_scale = splat(block_scale(args_, (odd + lane) >> log2_blocksize));
            }
            const F32 odd_weights = is_pair ? weights_at(odd + lane, levels, odd_scale) : splat(0.0f);
            Arithmetic::store_pair(weights_at(even + lane, levels, even_scale), odd_weights, cells + lane, width);
        }
    }

    F32 weights_at(int64_t flat, const Table16& levels, F32 scale) const { return mul(lookup16(levels, load_nibbles(args_.B + flat / 2)), scale); }

    void fill_any(int64_t row, bool is_pair, Cell* cells, int64_t width) const {
        float pair[2][kPanelLanes] = {};
        const auto scale_of = [&](int64_t block) { return block_scale(args_, block); };
        for (int i = 0; i < (is_pair ? 2 : 1); ++i) {
            const int64_t flat = (row + i) * args_.K + first_;
            dequantize_span(args_, scale_of, flat, flat + count_, pair[i]);
        }
        for (int64_t lane = 0; lane < count_; lane += W)
            Arithmetic::store_pair(load(pair[0] + lane), load(pair[1] + lane), cells + lane, width);
    }

    const GemmArgs4bit& args_;
    bool is_aligned_;
    int64_t first_ = 0, count_ = 0;
};

} // namespace BNB_ISA
} // namespace bnb
