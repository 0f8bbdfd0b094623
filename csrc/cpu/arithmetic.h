// The two ways a floating point product multiplies. Tiles are written once against either.
//
//   FloatArithmetic     weights fl(code value * scale) in fp32, activations in fp32: every set, every element type
//   BFloat16Arithmetic  weights fl(code value * scale) rounded to bfloat16 as dequantisation would, products of pairs summed in fp32: AVX512_BF16
//                       with bfloat16 activations
//
// Both scale a 4-bit level before it is rounded. Levels rounded first and scaled afterwards would give each code a fixed error, which adds up over K
// as soon as the activations have a mean.
#pragma once

#include "simd.h"

namespace bnb {
namespace BNB_ISA {

// A granule is a run of codes under one scale that one load spreads over the lanes: lane i holds kGranule / kLanes neighbouring codes, and step s
// uses the s-th nibble of every lane. K is a summation index, so the activations are put in that order once instead of unpacking every weight.
template <typename Arithmetic, int kGranule> constexpr int source_in_granule(int step, int lane) {
    constexpr int kCodesPerLane = kGranule / Arithmetic::kLanes;
    return kCodesPerLane == 1 ? lane : kCodesPerLane * lane + (step ^ 1); // the first of two codes is in the high nibble
}

struct FloatArithmetic {
    using Activation = float;
    using Cell = float; // of a panel: what one 32-bit lane multiplies
    using Vector = F32;
    using Codes = I32;
    using Table = Table16;

    static constexpr int kLanes = W;
    static constexpr int kDepth = 1; // elements of K in a cell
    static constexpr int kWideGranule = 8 * W < 64 ? 8 * W : 64;
    static constexpr int64_t kChain = 128; // most products added up one after another: fp32 results show the rounding of longer chains

    template <int kGranule> BNB_INLINE Codes load_codes(const uint8_t* p) {
        constexpr int kCodesPerLane = kGranule / kLanes;
        static_assert(kCodesPerLane == 2 || kCodesPerLane == 4 || kCodesPerLane == 8, "a lane holds one, two or four bytes");
        if constexpr (kCodesPerLane == 2)
            return load_bytes(p);
        else if constexpr (kCodesPerLane == 4)
            return load_16bit(p);
        else
            return load_32bit(p);
    }

    BNB_INLINE Codes next_codes(Codes codes) { return shift_right<4>(codes); }
    BNB_INLINE Table scaled_table(Table16 levels, float scale) { return scaled(levels, scale); }
    BNB_INLINE Vector lookup(const Table& table, Codes codes) { return lookup16(table, low_nibbles(codes)); }

    template <typename T> BNB_INLINE void convert(const T* from, int64_t count, Activation* to) {
        int64_t i = 0;
        for (; i + W <= count; i += W)
            store(to + i, load(from + i));
        for (; i < count; ++i)
            to[i] = to_float(from[i]);
    }

    // A granule in the order of the lookups: those of step s to out + s * stride.
    template <int kGranule> BNB_INLINE void pack(const Activation* x, Activation* out, int64_t stride) {
        for (int step = 0; step < kGranule / kLanes; ++step)
            for (int lane = 0; lane < kLanes; ++lane)
                out[step * stride + lane] = x[source_in_granule<FloatArithmetic, kGranule>(step, lane)];
    }

    BNB_INLINE Vector load_activations(const Activation* x) { return load(x); }
    BNB_INLINE Vector broadcast(const Activation* x) { return splat(*x); }
    BNB_INLINE Vector load_cells(const Cell* p) { return load(p); }

    BNB_INLINE void store_pair(F32 even, F32 odd, Cell* p, int64_t stride) {
        store(p, even);
        store(p + stride, odd);
    }

    BNB_INLINE F32 dot(Vector w, Vector x, F32 sum) { return mul_add(w, x, sum); }
};

#if defined(__AVX512BF16__)
#define BNB_HAS_BFLOAT16_ARITHMETIC

struct BFloat16Arithmetic {
    struct Vector {
        __m512bh v;
    };
    struct Table {
        __m512i v; // the 16 levels of a block, twice: a word index may have any fifth bit
    };
    using Activation = BFloat16;
    using Cell = uint32_t; // two elements of K
    using Codes = I32;

    static constexpr int kLanes = 2 * W;
    static constexpr int kDepth = 2;
    static constexpr int kWideGranule = 64;
    static constexpr int64_t kChain = int64_t(1) << 20; // no limit: the result is rounded far more coarsely than the sum

    template <int kGranule> BNB_INLINE Codes load_codes(const uint8_t* p) {
        if constexpr (kGranule == 64) {
            return {_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
        } else {
            static_assert(kGranule == 32, "one code a word");
            return load_nibble_words(p);
        }
    }

    BNB_INLINE Codes next_codes(Codes codes) { return {_mm512_srli_epi16(codes.v, 4)}; }

    BNB_INLINE Table scaled_table(Table16 levels, float scale) {
        const __m512 values = scaled(levels, scale).v;
        return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(values, values))};
    }

    BNB_INLINE Vector lookup(Table table, Codes codes) { return as_vector(_mm512_permutexvar_epi16(codes.v, table.v)); }

    BNB_INLINE void convert(const BFloat16* from, int64_t count, Activation* to) { memcpy(to, from, size_t(count) * sizeof *to); }

    template <int kGranule> BNB_INLINE void pack(const Activation* x, Activation* out, int64_t stride) {
        const __m512i first = _mm512_loadu_si512(x);
        if constexpr (kGranule == kLanes) {
            _mm512_storeu_si512(out, first);
        } else {
            static_assert(source_in_granule<BFloat16Arithmetic, kGranule>(0, 1) == 3, "the odd elements come first");
            const __m512i second = _mm512_loadu_si512(x + kLanes);
            const __m512i fours = _mm512_mullo_epi32(iota(), _mm512_set1_epi32(0x00040004)); // 0, 0, 4, 4, ...
            const __m512i even = _mm512_add_epi32(fours, _mm512_set1_epi32(0x00020000));     // 0, 2, 4, 6, ...
            const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
            _mm512_storeu_si512(out, _mm512_permutex2var_epi16(first, odd, second));
            _mm512_storeu_si512(out + stride, _mm512_permutex2var_epi16(first, even, second));
        }
    }

    BNB_INLINE Vector load_activations(const Activation* x) { return as_vector(_mm512_loadu_si512(x)); }

    BNB_INLINE Vector broadcast(const Activation* x) {
        int32_t pair;
        memcpy(&pair, x, sizeof pair);
        return as_vector(_mm512_set1_epi32(pair));
    }

    BNB_INLINE Vector load_cells(const Cell* p) { return as_vector(_mm512_loadu_si512(p)); }

    BNB_INLINE void store_pair(F32 even, F32 odd, Cell* p, int64_t) {
        const __m512i interleave = _mm512_add_epi32(_mm512_set1_epi32(0x00100000), _mm512_mullo_epi32(iota(), _mm512_set1_epi32(0x00010001)));
        const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd.v, even.v));
        _mm512_storeu_si512(p, _mm512_permutexvar_epi16(interleave, halves));
    }

    BNB_INLINE F32 dot(Vector w, Vector x, F32 sum) { return {_mm512_dpbf16_ps(sum.v, w.v, x.v)}; }

  private:
    BNB_INLINE Vector as_vector(__m512i words) { return {reinterpret_cast<__m512bh>(words)}; }
    BNB_INLINE __m512i iota() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
};
#endif

} // namespace BNB_ISA
} // namespace bnb
