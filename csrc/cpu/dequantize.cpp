// Dequantisation: y[i] = fl(level[code[i]] * absmax[i / blocksize]) in fp32, rounded once to the output type.
//
// Reads half a byte (4 bit) or a byte (8 bit) an element and writes 2 or 4; the levels stay in registers where the set has room for them.
#include "blocks.h"
#include "kernels.h"

namespace bnb {
namespace BNB_ISA {
namespace {

template <typename T> void dequantize_blocks_4bit(const DequantizeArgs4bit& args, int64_t first, int64_t last) {
    const float* levels = (args.quant_type == kNF4 ? kNF4Levels : kFP4Levels).value;
    const Table16 table = load_table16(levels);
    T* y = static_cast<T*>(args.output);
    for (int64_t block = first; block < last; ++block) {
        const Range range = elements_of_block(block, args.blocksize, args.n);
        const float absmax = args.absmax[block];
        const F32 scale = splat(absmax);
        int64_t i = range.begin;
        const auto put_until = [&](int64_t end) {
            for (; i < end; ++i)
                y[i] = from_float<T>(levels[get_nibble(args.input, i)] * absmax);
        };
        if (i & 1) // odd block sizes: the first element is in the low nibble
            put_until(i + 1);
        for (; i + W <= range.end; i += W)
            store(y + i, mul(lookup16(table, load_nibbles(args.input + i / 2)), scale));
        put_until(range.end);
    }
}

template <typename T> void dequantize_blocks_blockwise(const DequantizeArgsBlockwise& args, int64_t first, int64_t last) {
    const Table256 table = load_table256(args.code);
    for (int64_t block = first; block < last; ++block) {
        const Range range = elements_of_block(block, args.blocksize, args.n);
        const int64_t count = range.end - range.begin;
        const uint8_t* codes = args.input + range.begin;
        T* y = static_cast<T*>(args.output) + range.begin;
        const float absmax = args.absmax[block];
        const F32 scale = splat(absmax);
        int64_t i = 0;
        for (; i + W <= count; i += W)
            store(y + i, mul(lookup256(table, codes + i), scale));
        for (; i < count; ++i)
            y[i] = from_float<T>(args.code[codes[i]] * absmax);
    }
}

} // namespace

void dequantize_4bit(const DequantizeArgs4bit& args, int64_t first, int64_t last) {
    with_element_type(args.dtype, [&](auto* element) { dequantize_blocks_4bit<std::remove_pointer_t<decltype(element)>>(args, first, last); });
}

void dequantize_blockwise(const DequantizeArgsBlockwise& args, int64_t first, int64_t last) {
    with_element_type(args.dtype, [&](auto* element) { dequantize_blocks_blockwise<std::remove_pointer_t<decltype(element)>>(args, first, last); });
}

} // namespace BNB_ISA
} // namespace bnb
