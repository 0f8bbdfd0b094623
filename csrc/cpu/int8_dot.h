// Tiles of the int8 product: sums of products of codes, exact modulo 2^32.
//
// A tile is a few rows of the weight by a few tokens, both read as they lie in memory with K along the lanes: nothing is transposed or unpacked,
// which serves one token as well as many. Each step loads a vector of every row and of every token and multiplies all pairs, so that the multipliers
// wait for neither; accumulators are added up over their lanes once for every kDotStretch of K, a few per cent of the work.
//
// Many tokens find the weight in the second-level cache, and ask for it a little ahead. Few read it from memory: they ask for the tile's next rows,
// since rows often begin in pages of their own, where the hardware's own prefetching starts anew.
#pragma once

#include "product.h"

namespace bnb {
namespace BNB_ISA {

#if defined(BNB_SIMD_AVX512)
constexpr int kDotRows = 4, kDotTokens = 6; // 24 accumulators of 32 registers
#elif defined(BNB_SIMD_NEON)
constexpr int kDotRows = 4, kDotTokens = 4;
#elif defined(BNB_SIMD_AVX2)
constexpr int kDotRows = 2, kDotTokens = 4; // 8 of 16
#else
constexpr int kDotRows = 1, kDotTokens = 4;
#endif
constexpr int64_t kDotStretch = 4096; // a tile's tokens stay in the first-level cache while the rows of a panel pass
constexpr int kDotPanel = 64;         // rows of the weight that stay in the second-level cache while the tokens pass
constexpr int64_t kPrefetchAhead = 512;

// A stretch of K of some rows of the weight and of the tokens to multiply with.
struct DotStretch {
    const int8_t* w;
    int64_t w_stride;
    const DotActivation* x; // readable up to a whole vector, zero beyond the end
    int64_t x_stride;
    int64_t length;
};

// Adds the tile's products to sums[token * kDotPanel + row]. The stretch is a multiple of kDotLanes or, kPartial, less than one vector: a matter of
// the type, because the compiler keeps accumulators in registers only where it sees a single loop.
template <int kRows, int kTokens, bool kPartial> static void dot_tile(const DotStretch& s, uint32_t* sums) {
    constexpr int kSums = (kRows * kTokens + 3) / 4 * 4; // reduced four at a time
    DotSum acc[kSums];
    BNB_UNROLL
    for (int i = 0; i < kSums; ++i)
        acc[i] = no_dots();
    for (int64_t k = 0; k < s.length; k += kDotLanes) {
        DotVector w[kRows];
        BNB_UNROLL
        for (int r = 0; r < kRows; ++r) {
            const int8_t* p = s.w + r * s.w_stride + k;
            w[r] = kPartial ? load_first_dot_weights(p, int(s.length)) : load_dot_weights(p);
            if (!kPartial)
                prefetch(p + (kTokens <= 2 ? kRows * s.w_stride : kPrefetchAhead));
        }
        BNB_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            const DotVector x = load_dot_activations(s.x + t * s.x_stride + k);
            BNB_UNROLL
            for (int r = 0; r < kRows; ++r)
                acc[r * kTokens + t] = dot(w[r], x, acc[r * kTokens + t]);
        }
    }
    uint32_t totals[kSums];
    BNB_UNROLL
    for (int i = 0; i < kSums; i += 4) {
        const I32 four[4] = {lanes_of(acc[i]), lanes_of(acc[i + 1]), lanes_of(acc[i + 2]), lanes_of(acc[i + 3])};
        reduce_add_4(four, totals + i);
    }
    for (int r = 0; r < kRows; ++r)
        for (int t = 0; t < kTokens; ++t)
            sums[t * kDotPanel + r] += totals[r * kTokens + t];
}

template <int kTokens, bool kPartial> static void dot_rows(DotStretch s, int64_t rows, uint32_t* sums) {
    int64_t row = 0;
    for (; row + kDotRows <= rows; row += kDotRows, s.w += kDotRows * s.w_stride)
        dot_tile<kDotRows, kTokens, kPartial>(s, sums + row);
    for (; row < rows; ++row, s.w += s.w_stride)
        dot_tile<1, kTokens, kPartial>(s, sums + row);
}

template <bool kPartial> static void dot_any_rows(const DotStretch& s, int64_t rows, int64_t tokens, uint32_t* sums) {
    using Function = void (*)(DotStretch, int64_t, uint32_t*);
    static constexpr Function kFunctions[] = {dot_rows<1, kPartial>, dot_rows<2, kPartial>, dot_rows<3, kPartial>,
                                              dot_rows<4, kPartial>, dot_rows<5, kPartial>, dot_rows<6, kPartial>};
    static_assert(kDotTokens <= int(sizeof kFunctions / sizeof *kFunctions), "a function for every number of tokens");
    kFunctions[tokens - 1](s, rows, sums);
}

// sums[token * kDotPanel + row] of `rows` rows of the weight at w, at most kDotPanel, and `tokens` tokens at x, at most kDotTokens.
static void dot_panel(const int8_t* w, int64_t rows, const DotActivation* x, int64_t x_stride, int64_t tokens, int64_t K, uint32_t* sums) {
    memset(sums, 0, size_t(tokens) * kDotPanel * sizeof *sums);
    const int64_t whole = K / kDotLanes * kDotLanes;
    for (int64_t k = 0; k < whole; k += kDotStretch)
        dot_any_rows<false>({w + k, K, x + k, x_stride, smaller(kDotStretch, whole - k)}, rows, tokens, sums);
    if (whole < K)
        dot_any_rows<true>({w + whole, K, x + whole, x_stride, K - whole}, rows, tokens, sums);
}

// Codes of one token as a tile wants them. Returns what every sum will hold too much.
[[maybe_unused]] static uint32_t pack_codes(const int8_t* codes, int64_t K, int64_t stride, DotActivation* out) {
    uint32_t sum = 0;
    for (int64_t k = 0; k < K; ++k) {
        if (kDotOffset != 0)
            sum += uint32_t(int32_t(codes[k]));
        out[k] = codes[k];
    }
    for (int64_t k = K; k < stride; ++k)
        out[k] = 0;
    return sum * kDotOffset;
}

} // namespace BNB_ISA
} // namespace bnb
