// Stochastic rounding to 16 bits: the definition is in bitsandbytes/backends/default/rounding.py.
//
// Written in the vocabulary of ../cpu/simd.h, which the includer chooses.
#pragma once

#include "types.h"

#if !defined(BNB_ISA)
#error "include a vocabulary first: ../cpu/simd.h or ../cuda/one_element.h"
#endif

namespace bnb {
namespace BNB_ISA {

// "lowbias32" of Chris Wellons, https://nullprogram.com/blog/2018/07/31/
BNB_INLINE I32 mix(I32 x) {
    x = mul_bits(xor_bits(x, shift_right<16>(x)), splat_bits(0x7feb352du));
    x = mul_bits(xor_bits(x, shift_right<15>(x)), splat_bits(0x846ca68bu));
    return xor_bits(x, shift_right<16>(x));
}

// The random numbers of the elements `first` to `first + W`, which share the upper 32 bits of their index.
struct RandomBits {
    I32 seed_and_step;

    BNB_MEMBER RandomBits(uint32_t seed, uint32_t step) : seed_and_step(mix(add_bits(mix(splat_bits(seed)), splat_bits(step)))) {}

    BNB_MEMBER I32 of(int64_t first) const {
        const I32 low = add_bits(lane_numbers(), splat_bits(uint32_t(first)));
        return shift_right<16>(mix(xor_bits(xor_bits(low, seed_and_step), mix(splat_bits(uint32_t(first >> 32))))));
    }
};

// Both return floats that the format holds, unless they are too large for it.

BNB_INLINE F32 round_randomly(BFloat16*, F32 v, I32 random) { return from_bits(and_bits(add_bits(bits(v), random), splat_bits(0xffff0000u))); }

BNB_INLINE F32 round_randomly(Half*, F32 v, I32 random) {
    const F32 smallest_normal = splat(6.103515625e-5f); // 2^-14
    const F32 size = from_bits(magnitude_bits(v));
    const F32 normal = from_bits(and_bits(add_bits(bits(v), shift_right<3>(random)), splat_bits(0xffffe000u)));
    const I32 in_fixed_point = truncate(mul(min(size, smallest_normal), splat(1099511627776.0f))); // 2^40: 16 bits below the last
    const I32 fixed = shift_right<16>(add_bits(in_fixed_point, random));
    const I32 sign = and_bits(bits(v), splat_bits(0x80000000u));
    const F32 denormal = from_bits(or_bits(bits(mul(to_floats(fixed), splat(5.9604644775390625e-8f))), sign)); // 2^-24
    return select(less(size, smallest_normal), denormal, normal);
}

BNB_INLINE F32 round_randomly(float*, F32 v, I32) { return v; }

// NaN and infinity stay what they are.
template <typename T> BNB_INLINE F32 round_finite_randomly(T* type, F32 v, I32 random) {
    const Mask is_finite = less(from_bits(magnitude_bits(v)), from_bits(splat_bits(0x7f800000u)));
    return select(is_finite, round_randomly(type, v, random), v);
}

} // namespace BNB_ISA
} // namespace bnb
