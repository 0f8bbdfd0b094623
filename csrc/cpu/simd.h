// A small vector vocabulary, so that a kernel is written once and compiled for each instruction set. Only these headers contain intrinsics.
//
//   W                               lanes in a vector
//   F32, I32, Mask                  W floats, W 32-bit integers, W truth values
//   splat(f), splat_bits(i)         the same value in every lane
//   load(p), store(p, v)            W elements of float, Half or BFloat16; conversion rounds to nearest even, denormals and NaN kept
//   stream(p, v)                    store past the caches, for large results that nobody reads soon; p is a multiple of W elements. Other threads see
//                                   it after finish_streams()
//   load_first(p, n), store_first   the same for the first n lanes only, 0 <= n < W; other lanes read as 0, memory beyond is not touched
//   add sub mul min max             as the names say; min(a, b) and max(a, b) return b where a is NaN
//   mul_add(a, b, c)                a * b + c, rounded once where the set can fuse and twice otherwise: not for results that must be exact
//   fused(a, b, c)                  a * b + c, rounded once on every set
//   div sqrt                        correctly rounded
//   reduce_add(v)                   sum of the lanes
//   bits(v), from_bits(i)           reinterpretation
//   magnitude_bits(v)               bits with the sign cleared
//   add_bits and_bits or_bits xor_bits, shift_left<n>, shift_right<n> (zeros in), shift_right_signed<n>
//   max_bits(a, b), reduce_max_bits unsigned
//   mul_bits(a, b)                  the low 32 bits of the product
//   lane_numbers()                  0, 1, 2, ...
//   to_floats(i)                    signed integers, rounded to nearest even
//   truncate(v)                     towards zero, to signed integers; for |v| < 2^31
//   less(a, b)                      Mask of a < b
//   differ(a, b)                    Mask of a != b, true where either is NaN
//   select(m, a, b)                 a where m, b elsewhere
//   drop(i, m)                      0 where m, i elsewhere
//   twice_plus(i, m)                2 * i + (m ? 1 : 0): one step down a binary search tree
//   Table8, lookup8(t, i)           t[i] for i in [0, 8), the table kept in registers
//   Table16, lookup16(t, i)         t[i] for i in [0, 16)
//   Table256                        lookup256_pair(t, p, out): t[p[lane]] for the 2 * W bytes at p, in two vectors; lookup256_four in four
//   gather(p, i)                    p[i] for each lane, p of float or uint32_t
//   load_bytes(p), store_bytes(p,i) W bytes, widened to or cut from 32 bits; load_signed_bytes(p) of int8
//   load_nibbles(p)                 W codes from W / 2 bytes, high nibble first. Bits above the fourth are undefined: only lookup16 may use them
//   store_nibbles(p, a, b)          W bytes from 2 * W codes below 16
//   load_16bit(p), load_32bit(p)    W little-endian integers of that width, widened to 32 bits; p needs no alignment
//   shift_right_by(i, n)            shift_right by a count known at run time only
//   low_nibbles(i)                  i fit for lookup16, whatever stands above the fourth bit
//   scaled(t, f)                    a Table16 with every entry multiplied by f
//   WordTable, narrowed(t, p)       a Table16 with every entry rounded to the 16-bit type of p
//   put_words<kStreams>(p, t, c)    stores, or streams, the entries of a WordTable for the kWords codes at c, two to a byte, high nibble first
//   reduce_add_4(v, out)            out[i] is the sum of the lanes of v[i], for four vectors of floats or integers
//   load_columns(p, stride, rows, columns, out)
//                                   a transposition: lane i of out[j] is the 32-bit word j at p + i * stride, for W columns. Lanes from `rows` on
//                                   repeat the last row, words from `columns` on (1 <= columns <= W) are 0 and not read
//   Dot weights and activations     kDotLanes 8-bit integers to be multiplied in pairs: load_dot_weights(p), load_first_dot_weights(p, n) with 0 for
//                                   the rest, 0 < n < kDotLanes; load_dot_activations(p) of kDotLanes DotActivations, a type that holds int8
//   dot(w, x, sum)                  adds the kDotLanes products to a DotSum, modulo 2^32; it starts as no_dots() and ends as lanes_of(sum). Weights
//                                   count kDotOffset more than they are. Lane i sums kDotLanes / W
//                                   columns next to each other. sums_of_quads(sum) has in its first lane, and in every one after so many that hold
//                                   four columns together, the sum of these four
#pragma once

#include "../common/types.h"

#if !defined(BNB_ISA)
#error "compile with -DBNB_ISA=<set> and -DBNB_SIMD_<SET>"
#endif

// Static for the reason given at BNB_HD.
#define BNB_INLINE BNB_HD

namespace bnb {
namespace BNB_ISA {

// A hint; any address is allowed.
BNB_INLINE void prefetch(const void* p) {
#if defined(__GNUC__)
    __builtin_prefetch(p);
#else
    (void)p;
#endif
}

} // namespace BNB_ISA
} // namespace bnb

#if defined(BNB_SIMD_AVX512)
#include "simd_avx512.h"
#elif defined(BNB_SIMD_AVX2)
#include "simd_avx2.h"
#elif defined(BNB_SIMD_NEON)
#include "simd_neon.h"
#else
#include "simd_scalar.h"
#endif
