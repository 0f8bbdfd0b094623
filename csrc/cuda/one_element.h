// The vocabulary of ../cpu/simd.h with one element to a lane: as much of it as the formulas shared with the CPU need. Built without contraction, so
// that every operation rounds as there.
#pragma once

#include "device.h"

#define BNB_ISA gpu
#define BNB_INLINE BNB_HD

namespace bnb {
namespace BNB_ISA {

using F32 = float;
using I32 = uint32_t;
using Mask = bool;

BNB_INLINE F32 splat(float x) { return x; }
BNB_INLINE I32 splat_bits(uint32_t x) { return x; }
BNB_INLINE I32 lane_numbers() { return 0; }

BNB_INLINE F32 add(F32 a, F32 b) { return a + b; }
BNB_INLINE F32 mul(F32 a, F32 b) { return a * b; }
BNB_INLINE F32 div(F32 a, F32 b) { return a / b; }
BNB_INLINE F32 sqrt(F32 a) { return sqrtf(a); }
BNB_INLINE F32 fused(F32 a, F32 b, F32 c) { return fmaf(a, b, c); }
BNB_INLINE F32 min(F32 a, F32 b) { return a < b ? a : b; }
BNB_INLINE F32 max(F32 a, F32 b) { return a > b ? a : b; }
BNB_INLINE Mask less(F32 a, F32 b) { return a < b; }
BNB_INLINE Mask differ(F32 a, F32 b) { return a != b; }
template <typename T> BNB_INLINE T select(Mask m, T a, T b) { return m ? a : b; }

BNB_INLINE I32 bits(F32 a) { return float_bits(a); }
BNB_INLINE F32 from_bits(I32 a) { return float_from_bits(a); }
BNB_INLINE I32 magnitude_bits(F32 a) { return float_bits(a) & 0x7fffffffu; }
BNB_INLINE I32 max_bits(I32 a, I32 b) { return a > b ? a : b; }
BNB_INLINE I32 add_bits(I32 a, I32 b) { return a + b; }
BNB_INLINE I32 mul_bits(I32 a, I32 b) { return a * b; }
BNB_INLINE I32 and_bits(I32 a, I32 b) { return a & b; }
BNB_INLINE I32 or_bits(I32 a, I32 b) { return a | b; }
BNB_INLINE I32 xor_bits(I32 a, I32 b) { return a ^ b; }
template <int n> BNB_INLINE I32 shift_right(I32 a) { return a >> n; }
BNB_INLINE F32 to_floats(I32 a) { return float(int32_t(a)); }
BNB_INLINE I32 truncate(F32 a) { return uint32_t(int32_t(a)); }

} // namespace BNB_ISA
} // namespace bnb
