// 4-bit quantisation: x[n] -> absmax[blocks], packed[n / 2].
//
// Reads x once from memory (the second pass over a block finds it in the first-level cache) and writes half a byte an element. The code is found by a
// binary search over the thresholds, held in registers: each step looks up the threshold to compare with and appends one bit to the index.
#include "blocks.h"
#include "kernels.h"

namespace bnb {
namespace BNB_ISA {
namespace {

// Thresholds of one level of the search tree, for index 0, 1, ...: first, first + stride, first + 2 * stride, ...
BNB_INLINE Table8 tree_level(const float* thresholds, int first, int stride, int count) {
    float level[8] = {};
    for (int i = 0; i < count; ++i)
        level[i] = thresholds[first + i * stride];
    return load_table8(level);
}

// NF4: fifteen thresholds make four levels, and the index is the code.
struct NF4 {
    static constexpr int zero_code = kNF4ZeroCode;

    F32 root = splat(kNF4Thresholds.value[7]);
    Table8 second = tree_level(kNF4Thresholds.value, 3, 8, 2);
    Table8 third = tree_level(kNF4Thresholds.value, 1, 4, 4);
    Table8 fourth = tree_level(kNF4Thresholds.value, 0, 2, 8);

    BNB_INLINE int scalar_code(float v) { return nf4_code(v); }

    inline I32 vector_code(F32 v) const {
        I32 index = twice_plus(splat_bits(0), less(root, v));
        index = twice_plus(index, less(lookup8(second, index), v));
        index = twice_plus(index, less(lookup8(third, index), v));
        return twice_plus(index, less(lookup8(fourth, index), v));
    }
};

// FP4: seven thresholds for |v| make three levels; the sign bit below the rank completes the index of the code.
struct FP4 {
    static constexpr int zero_code = kFP4ZeroCode;

    F32 root = splat(kFP4Thresholds.value[3]);
    Table8 second = tree_level(kFP4Thresholds.value, 1, 4, 2);
    Table8 third = tree_level(kFP4Thresholds.value, 0, 2, 4);
    Table16 codes = code_table();

    BNB_INLINE int scalar_code(float v) { return fp4_code(v); }

    BNB_INLINE Table16 code_table() {
        float table[16];
        for (int rank = 0; rank < 8; ++rank) {
            const uint32_t code = kFP4CodeOfRank.value[rank];
            table[2 * rank] = float_from_bits(code);
            table[2 * rank + 1] = float_from_bits(rank == 0 ? code : code | 8u);
        }
        return load_table16(table);
    }

    inline I32 vector_code(F32 v) const {
        const F32 magnitude = from_bits(magnitude_bits(v));
        I32 rank = twice_plus(splat_bits(0), less(root, magnitude));
        rank = twice_plus(rank, less(lookup8(second, rank), magnitude));
        rank = twice_plus(rank, less(lookup8(third, rank), magnitude));
        return bits(lookup16(codes, or_bits(shift_left<1>(rank), shift_right<31>(bits(v)))));
    }
};

template <typename Code, typename T>
BNB_INLINE void quantize_range(const Code& code, const T* x, uint8_t* packed, Range range, float inverse, bool ordinary) {
    int64_t i = range.begin;
    const auto put_until = [&](int64_t end) {
        for (; i < end; ++i)
            put_nibble(packed, i, Code::scalar_code(normalise(to_float(x[i]), inverse)), Code::zero_code);
    };
    if (ordinary) {
        if (i & 1) // odd block sizes: this block shares a byte with the one before
            put_until(i + 1);
        const F32 scale = splat(inverse);
        for (; i + 2 * W <= range.end; i += 2 * W)
            store_nibbles(packed + i / 2, code.vector_code(mul(load(x + i), scale)), code.vector_code(mul(load(x + i + W), scale)));
    }
    put_until(range.end);
}

template <typename Code, typename T> void quantize_blocks(const QuantizeArgs4bit& args, int64_t first, int64_t last) {
    const Code code;
    const T* x = static_cast<const T*>(args.input);
    for (int64_t block = first; block < last; ++block) {
        const Range range = elements_of_block(block, args.blocksize, args.n);
        const float absmax = block_absmax(x + range.begin, range.end - range.begin);
        const float inverse = inverse_absmax(absmax);
        args.absmax[block] = absmax;
        quantize_range(code, x, args.output, range, inverse, is_ordinary(absmax, inverse));
    }
}

} // namespace

void quantize_4bit(const QuantizeArgs4bit& args, int64_t first, int64_t last) {
    with_element_type(args.dtype, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        if (args.quant_type == kNF4)
            quantize_blocks<NF4, T>(args, first, last);
        else
            quantize_blocks<FP4, T>(args, first, last);
    });
}

} // namespace BNB_ISA
} // namespace bnb
