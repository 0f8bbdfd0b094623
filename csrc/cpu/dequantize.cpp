// Dequantisation: y[i] = fl(level[code[i]] * absmax[i / blocksize]) in fp32, rounded once to the output type.
//
// Reads half a byte (4 bit) or a byte (8 bit) an element and writes 2 or 4; the levels stay in registers where the set has room for them. A block of
// 4-bit codes has 16 values: they are multiplied, and rounded to 16 bits, once for the block. Results larger than the caches are written past them:
// storing there would first fetch the lines that it overwrites.
#include "blocks.h"
#include "kernels.h"

namespace bnb {
namespace BNB_ISA {
namespace {

constexpr int64_t kLargerThanCaches = int64_t(32) << 20;

// Whether every whole group of so many elements of every block of a result may be streamed.
template <typename T> bool is_streamable(const void* output, int64_t n, int64_t blocksize, int64_t group) {
    const bool is_aligned = reinterpret_cast<uintptr_t>(output) % (size_t(group) * sizeof(T)) == 0;
    return n * int64_t(sizeof(T)) >= kLargerThanCaches && blocksize % group == 0 && is_aligned;
}

template <bool kStreams, typename T> BNB_INLINE void put(T* p, F32 v) {
    if (kStreams)
        stream(p, v);
    else
        store(p, v);
}

template <bool kStreams, typename T> void dequantize_blocks_4bit(const DequantizeArgs4bit& args, int64_t first, int64_t last) {
    const float* levels = (args.quant_type == kNF4 ? kNF4Levels : kFP4Levels).value;
    const Table16 table = load_table16(levels);
    T* y = static_cast<T*>(args.output);
    for (int64_t block = first; block < last; ++block) {
        const Range range = elements_of_block(block, args.blocksize, args.n);
        const float absmax = args.absmax[block];
        const Table16 values = scaled(table, absmax);
        int64_t i = range.begin;
        const auto put_until = [&](int64_t end) {
            for (; i < end; ++i)
                y[i] = from_float<T>(levels[get_nibble(args.input, i)] * absmax);
        };
        if (i & 1) // odd block sizes: the first element is in the low nibble
            put_until(i + 1);
        if constexpr (sizeof(T) == 2) {
            const WordTable words = narrowed(values, y);
            for (; i + kWords <= range.end; i += kWords)
                put_words<kStreams>(y + i, words, args.input + i / 2);
        }
        for (; i + W <= range.end; i += W)
            put<kStreams>(y + i, lookup16(values, load_nibbles(args.input + i / 2)));
        put_until(range.end);
    }
}

template <bool kStreams, typename T> void dequantize_blocks_blockwise(const DequantizeArgsBlockwise& args, int64_t first, int64_t last) {
    const Table256 table = load_table256(args.code);
    for (int64_t block = first; block < last; ++block) {
        const Range range = elements_of_block(block, args.blocksize, args.n);
        const int64_t count = range.end - range.begin;
        const uint8_t* codes = args.input + range.begin;
        T* y = static_cast<T*>(args.output) + range.begin;
        const float absmax = args.absmax[block];
        const F32 scale = splat(absmax);
        int64_t i = 0;
        for (; i + 2 * W <= count; i += 2 * W) {
            F32 values[2];
            lookup256_pair(table, codes + i, values);
            put<kStreams>(y + i, mul(values[0], scale));
            put<kStreams>(y + i + W, mul(values[1], scale));
        }
        for (; i < count; ++i)
            y[i] = from_float<T>(args.code[codes[i]] * absmax);
    }
}

template <typename Args, typename Plain, typename Streaming>
void run(const Args& args, bool streams, Plain plain, Streaming streaming, int64_t first, int64_t last) {
    if (!streams)
        return plain(args, first, last);
    streaming(args, first, last);
    finish_streams();
}

} // namespace

void dequantize_4bit(const DequantizeArgs4bit& args, int64_t first, int64_t last) {
    with_element_type(args.dtype, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        const bool streams = is_streamable<T>(args.output, args.n, args.blocksize, sizeof(T) == 2 ? kWords : W);
        run(args, streams, dequantize_blocks_4bit<false, T>, dequantize_blocks_4bit<true, T>, first, last);
    });
}

void dequantize_blockwise(const DequantizeArgsBlockwise& args, int64_t first, int64_t last) {
    with_element_type(args.dtype, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        const bool streams = is_streamable<T>(args.output, args.n, args.blocksize, W);
        run(args, streams, dequantize_blocks_blockwise<false, T>, dequantize_blocks_blockwise<true, T>, first, last);
    });
}

} // namespace BNB_ISA
} // namespace bnb
