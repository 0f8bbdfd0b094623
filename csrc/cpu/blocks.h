// What the quantise and dequantise kernels share: which elements a block holds, its scale, and the choice of the element type.
#pragma once

#include "../common/quantize.h"
#include "simd.h"

#include <type_traits>

namespace bnb {
namespace BNB_ISA {

struct Range {
    int64_t begin, end;
};

BNB_INLINE Range elements_of_block(int64_t block, int64_t blocksize, int64_t n) {
    const int64_t begin = block * blocksize;
    return {begin, n - begin < blocksize ? n : begin + blocksize};
}

template <typename T> BNB_INLINE float block_absmax(const T* x, int64_t count) {
    I32 largest0 = splat_bits(0), largest1 = largest0;
    int64_t i = 0;
    for (; i + 2 * W <= count; i += 2 * W) {
        largest0 = max_bits(largest0, magnitude_bits(load(x + i)));
        largest1 = max_bits(largest1, magnitude_bits(load(x + i + W)));
    }
    if (i + W <= count) {
        largest0 = max_bits(largest0, magnitude_bits(load(x + i)));
        i += W;
    }
    if (i < count)
        largest1 = max_bits(largest1, magnitude_bits(load_first(x + i, int(count - i))));
    return absmax_from_bits(reduce_max_bits(max_bits(largest0, largest1)));
}

// For an ordinary block x * inverse is finite for every element, so that vector code needs no rule for NaN. The others (NaN or infinity in the
// block, or an absmax so small that its inverse overflows) are left to the scalar definition.
BNB_INLINE bool is_ordinary(float absmax, float inverse) { return float_bits(absmax) < kInfinityBits && float_bits(inverse) < kInfinityBits; }

// Calls function with a null pointer to the element type that dtype names.
template <typename Function> BNB_INLINE void with_element_type(DType dtype, const Function& function) {
    if (dtype == kFloat32)
        function(static_cast<float*>(nullptr));
    else if (dtype == kFloat16)
        function(static_cast<Half*>(nullptr));
    else
        function(static_cast<BFloat16*>(nullptr));
}

} // namespace BNB_ISA
} // namespace bnb
