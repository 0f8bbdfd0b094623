// The scale of a 4-bit block, decoded where it is needed.
#pragma once

#include "device.h"

namespace bnb {

constexpr int kNestedBlockShift = 8; // 256 scales share a float

// The two-step form rounds the product and the sum apart; so does this.
template <bool nested> __device__ __forceinline__ float scale_of_block(const BlockScales& scales, int64_t block) {
    if constexpr (!nested)
        return __ldg(scales.absmax + block);
    const float value = __ldg(scales.absmax_code + __ldg(scales.absmax_8bit + block));
    return __fadd_rn(__fmul_rn(value, __ldg(scales.absmax + (block >> kNestedBlockShift))), __ldg(scales.absmax_offset));
}

} // namespace bnb
