// What the forms of the 4-bit product share: scales, and whether the layout is a friendly one.
#pragma once

#include "blocks.h"
#include "product.h"

namespace bnb {
namespace BNB_ISA {

constexpr int kNarrowGranule = 32;

BNB_INLINE const float* levels_of(QuantType quant_type) { return (quant_type == kNF4 ? kNF4Levels : kFP4Levels).value; }

// Rows start on a byte, and scales change only between granules: the layout of nearly every real weight. The bound on K keeps positions inside a
// group of rows in 32 bits.
BNB_INLINE bool is_aligned(const GemmArgs4bit& args) {
    const bool is_power_of_two = (args.blocksize & (args.blocksize - 1)) == 0;
    return args.K > 0 && args.K % kNarrowGranule == 0 && args.K < (int64_t(1) << 24) && is_power_of_two && args.blocksize >= kNarrowGranule &&
           args.blocksize < (int64_t(1) << 24);
}

// Valid for the block sizes that is_aligned accepts.
BNB_INLINE int log2_of(int64_t power_of_two) {
    int exponent = 0;
    while ((int64_t(1) << exponent) < power_of_two)
        ++exponent;
    return exponent;
}

struct BlockRange {
    int64_t first, last; // last is included
};

BNB_INLINE BlockRange blocks_of_rows(const GemmArgs4bit& args, int64_t first_row, int64_t rows) {
    return {first_row * args.K / args.blocksize, ((first_row + rows) * args.K - 1) / args.blocksize};
}

// Upper bound on the blocks that `rows` rows touch.
BNB_INLINE int64_t most_blocks(const GemmArgs4bit& args, int64_t rows) { return rows * args.K / args.blocksize + 2; }

// Scales of the weight's blocks: where they are, or for nested statistics decoded. The code is made ready for lookups once.
class BlockScales {
  public:
    explicit BlockScales(const GemmArgs4bit& args) : args_(args) {
        if (args.absmax_8bit != nullptr)
            code_ = load_table256(args.absmax_code);
    }

    // Those of a range of blocks, with room for them in `decoded`.
    const float* of(BlockRange blocks, float* decoded) const {
        if (args_.absmax_8bit == nullptr)
            return args_.absmax + blocks.first;
        for (int64_t block = blocks.first; block <= blocks.last;) {
            const int64_t end = smaller((block | 255) + 1, blocks.last + 1); // 256 blocks share one second-level absmax
            decode(block, end, args_.absmax[block >> 8], decoded + (block - blocks.first));
            block = end;
        }
        return decoded;
    }

  private:
    void decode(int64_t begin, int64_t end, float absmax, float* out) const {
        const float offset = args_.absmax_offset[0];
        int64_t i = 0;
        for (; begin + i + 4 * W <= end; i += 4 * W) {
            F32 values[4];
            lookup256_four(code_, args_.absmax_8bit + begin + i, values);
            for (int k = 0; k < 4; ++k)
                store(out + i + k * W, add(mul(values[k], splat(absmax)), splat(offset)));
        }
        for (; begin + i < end; ++i)
            out[i] = args_.absmax_code[args_.absmax_8bit[begin + i]] * absmax + offset;
    }

    const GemmArgs4bit& args_;
    Table256 code_;
};

// The same for a single block.
BNB_INLINE float block_scale(const GemmArgs4bit& args, int64_t block) {
    if (args.absmax_8bit == nullptr)
        return args.absmax[block];
    return args.absmax_code[args.absmax_8bit[block]] * args.absmax[block >> 8] + args.absmax_offset[0];
}

// Weights of flat elements [begin, end) in fp32, for any block size and alignment; scale_of(block) gives the scale of a block.
template <typename ScaleOf> static void dequantize_span(const GemmArgs4bit& args, const ScaleOf& scale_of, int64_t begin, int64_t end, float* out) {
    const float* levels = levels_of(args.quant_type);
    const Table16 table = load_table16(levels);
    for (int64_t i = begin; i < end;) {
        const int64_t block = i / args.blocksize;
        const int64_t block_end = smaller(end, (block + 1) * args.blocksize);
        const float scale = scale_of(block);
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

} // namespace BNB_ISA
} // namespace bnb
