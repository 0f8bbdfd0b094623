// What the forms of the 4-bit product share: scales, the way rows of the result are written, and whether the layout is a friendly one.
#pragma once

#include "../common/status.h"
#include "blocks.h"
#include "gemm_4bit_arithmetic.h"
#include "kernels.h"
#include "scratch.h"
#include "threads.h"

#if defined(__clang__)
#define BNB_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define BNB_UNROLL _Pragma("GCC unroll 16")
#else
#define BNB_UNROLL
#endif

namespace bnb {
namespace BNB_ISA {

constexpr int kNarrowGranule = 32;

BNB_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
BNB_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

// Scales of a range of blocks: where they are, or for nested statistics decoded into `decoded`.
[[maybe_unused]] static const float* block_scales(const GemmArgs4bit& args, BlockRange blocks, float* decoded) {
    if (args.absmax_8bit == nullptr)
        return args.absmax + blocks.first;
    const Table256 code = load_table256(args.absmax_code);
    const float offset = args.absmax_offset[0];
    for (int64_t block = blocks.first; block <= blocks.last;) {
        const float absmax = args.absmax[block >> 8];
        const int64_t end = smaller((block | 255) + 1, blocks.last + 1); // 256 blocks share one second-level absmax
        const uint8_t* codes = args.absmax_8bit;
        float* out = decoded - blocks.first;
        for (; block + W <= end; block += W)
            store(out + block, add(mul(lookup256(code, codes + block), splat(absmax)), splat(offset)));
        for (; block < end; ++block)
            out[block] = args.absmax_code[codes[block]] * absmax + offset;
    }
    return decoded;
}

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

// out[i] = sums[i] + bias[i] in fp32, rounded once. `bias` may be null; sums are readable up to a multiple of W.
template <typename T> static void write_row(T* out, const float* sums, const T* bias, int64_t count) {
    int64_t i = 0;
    for (; i + W <= count; i += W) {
        const F32 sum = load(sums + i);
        store(out + i, bias != nullptr ? add(sum, load(bias + i)) : sum);
    }
    if (i < count) {
        const int rest = int(count - i);
        const F32 sum = load(sums + i);
        store_first(out + i, bias != nullptr ? add(sum, load_first(bias + i, rest)) : sum, rest);
    }
}

// Tokens are dealt out evenly to as few tiles as will hold them.
struct TokenTiles {
    int64_t count, base, extra;
    BNB_INLINE TokenTiles of(int64_t tokens, int64_t most) {
        const int64_t count = ceil_div(tokens, most);
        return {count, tokens / count, tokens % count};
    }
    int64_t begin(int64_t tile) const { return tile * base + smaller(tile, extra); }
    int64_t size(int64_t tile) const { return base + (tile < extra ? 1 : 0); }
};

// Waking and joining a thread costs about as long as this many products.
constexpr int64_t kProductsPerThread = int64_t(1) << 20;

// Calls function(begin, end) -> Status on ranges of [0, count).
template <typename Function> static int32_t try_parallel(int64_t count, int64_t grain, int threads, const Function& function) {
    SharedStatus status;
    parallel_for(count, grain, threads, [&](int64_t begin, int64_t end, int) { status.report(function(begin, end)); });
    return status.get();
}

// Calls Product::run<Arithmetic, T>(args) with the arithmetic that this set has for the element type.
template <typename Product> static int32_t with_arithmetic(const GemmArgs4bit& args) {
    switch (args.dtype) {
    case kFloat32:
        return Product::template run<FloatArithmetic, float>(args);
    case kFloat16:
        return Product::template run<FloatArithmetic, Half>(args);
    default:
#if defined(BNB_HAS_BFLOAT16_ARITHMETIC)
        return Product::template run<BFloat16Arithmetic, BFloat16>(args);
#else
        return Product::template run<FloatArithmetic, BFloat16>(args);
#endif
    }
}

} // namespace BNB_ISA
} // namespace bnb
