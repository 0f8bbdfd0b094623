// 8-bit blockwise quantisation with any code of 256 ascending values: x[n] -> absmax[blocks], codes[n].
//
// Reads x once from memory, writes a byte an element.
#include "blocks.h"
#include "find_code.h"
#include "kernels.h"

namespace bnb {
namespace BNB_ISA {
namespace {

template <typename Finder, typename T> void quantize_blocks(const QuantizeArgsBlockwise& args, const Finder finder, int64_t first, int64_t last) {
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
            quantize_blocks<ByCell, T>(args, ByCell(*args.cells), first, last);
        else
            quantize_blocks<BySearch, T>(args, BySearch(args.midpoints), first, last);
    });
}

} // namespace BNB_ISA
} // namespace bnb
