// 8-bit blockwise quantisation with any code of 256 ascending values: x[n] -> absmax[blocks], codes[n].
//
// Reads x once from memory, writes a byte an element. The code counts the midpoints below v: one gather from the cell table (cells.h), of which
// random data touch some ten KiB, or for small inputs and unusual maps a binary search over the midpoints in eight gathers.
#include "blocks.h"
#include "cells.h"
#include "kernels.h"

namespace bnb {
namespace BNB_ISA {
namespace {

struct ByCell {
    const uint32_t* entries; // of cell 0

    explicit ByCell(const QuantizeArgsBlockwise& args) : entries(args.cells->entry - kLowestCell) {}

    inline I32 code(F32 v) const {
        const I32 raw = bits(v);
        const I32 ordered = xor_bits(raw, shift_right<1>(shift_right_signed<31>(raw)));
        const I32 entry = gather(entries, shift_right_signed<16>(ordered));
        return shift_right<16>(add_bits(entry, and_bits(ordered, splat_bits(0xffffu))));
    }
};

struct BySearch {
    const float* midpoints;

    explicit BySearch(const QuantizeArgsBlockwise& args) : midpoints(args.midpoints) {}

    inline I32 code(F32 v) const {
        I32 path = splat_bits(0); // after s steps: the s upper bits of the code
        path = descend<7>(path, v);
        path = descend<6>(path, v);
        path = descend<5>(path, v);
        path = descend<4>(path, v);
        path = descend<3>(path, v);
        path = descend<2>(path, v);
        path = descend<1>(path, v);
        return descend<0>(path, v);
    }

  private:
    template <int bit> inline I32 descend(I32 path, F32 v) const {
        const I32 index = add_bits(shift_left<bit + 1>(path), splat_bits((1u << bit) - 1));
        return twice_plus(path, less(gather(midpoints, index), v));
    }
};

template <typename Finder, typename T> void quantize_blocks(const QuantizeArgsBlockwise& args, int64_t first, int64_t last) {
    const Finder finder(args);
    for (int64_t block = first; block < last; ++block) {
        const Range range = elements_of_block(block, args.blocksize, args.n);
        const int64_t count = range.end - range.begin;
        const T* x = static_cast<const T*>(args.input) + range.begin;
        uint8_t* out = args.output + range.begin;
        const float absmax = block_absmax(x, count);
        const float inverse = inverse_absmax(absmax);
        args.absmax[block] = absmax;
        int64_t i = 0;
        if (is_ordinary(absmax, inverse)) {
            const F32 scale = splat(inverse), one = splat(1.0f), minus_one = splat(-1.0f);
            for (; i + W <= count; i += W)
                store_bytes(out + i, finder.code(min(max(mul(load(x + i), scale), minus_one), one)));
        }
        for (; i < count; ++i)
            out[i] = uint8_t(blockwise_code(args.midpoints, normalise(to_float(x[i]), inverse)));
    }
}

} // namespace

void quantize_blockwise(const QuantizeArgsBlockwise& args, int64_t first, int64_t last) {
    with_element_type(args.dtype, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        if (args.cells != nullptr)
            quantize_blocks<ByCell, T>(args, first, last);
        else
            quantize_blocks<BySearch, T>(args, first, last);
    });
}

} // namespace BNB_ISA
} // namespace bnb
