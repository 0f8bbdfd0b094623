// Blocks of the flat order of elements, and their 4-bit scales, decoded where they are needed.
#pragma once

#include "device.h"

namespace bnb {

// Which block an element is in. Sizes that are powers of two, as all usual ones are, need no division.
struct BlockOf {
    int64_t blocksize;
    int shift; // -1: not a power of two

    explicit BlockOf(int64_t blocksize) : blocksize(blocksize), shift(-1) {
        for (int bits = 0; bits < 62; ++bits)
            if (int64_t(1) << bits == blocksize)
                shift = bits;
    }

    __device__ __forceinline__ int64_t operator()(int64_t element) const { return shift >= 0 ? element >> shift : element / blocksize; }
};

constexpr int kNestedBlockShift = 8; // 256 scales share a float

// The two-step form rounds the product and the sum apart; so does this.
template <bool nested> __device__ __forceinline__ float scale_of_block(const BlockScales& scales, int64_t block) {
    if constexpr (!nested)
        return __ldg(scales.absmax + block);
    const float value = __ldg(scales.absmax_code + __ldg(scales.absmax_8bit + block));
    return __fadd_rn(__fmul_rn(value, __ldg(scales.absmax + (block >> kNestedBlockShift))), __ldg(scales.absmax_offset));
}

} // namespace bnb
