// Tiles of the int8 product: sums of products of codes, exact modulo 2^32, of all columns or of each class of columns (see common/quantize.h). Sums of
// classes are scaled and added up in fp32.
//
// A tile is a few rows of the weight by a few tokens, both read as they lie in memory with K along the lanes: nothing is transposed or unpacked,
// which serves one token as well as many. Each step loads a vector of every row and of every token and multiplies all pairs, so that the multipliers
// wait for neither; accumulators are added up over their lanes once for every kDotStretch of K, a few per cent of the work.
//
// Many tokens find the weight in the second-level cache, and ask for it a little ahead. Few read it from memory: they ask for the tile's next rows,
// since rows often begin in pages of their own, where the hardware's own prefetching starts anew.
#pragma once

#include "../common/quantize.h"
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

// A class is what one lane sums up, of every vector of 64 codes or, where vectors are shorter, of every so many of them: a phase.
constexpr int kDotPhases = kInt8Period / kDotLanes;
constexpr int kLaneScales = kDotPhases * W; // of a token: the scale of each lane in each phase, 0 for a lane without a class of its own

// Stretches of K, the last of which may be less than one vector.
constexpr int64_t whole_vectors(int64_t K) { return K / kDotLanes * kDotLanes; }
constexpr int64_t stretches_of(int64_t K) { return (whole_vectors(K) + kDotStretch - 1) / kDotStretch + (whole_vectors(K) < K ? 1 : 0); }

// What is the same for all rows and tokens of one product.
struct DotSource {
    const int8_t* w;
    const DotActivation* x; // readable up to a whole vector, zero beyond the end
    int64_t x_stride;
    int64_t K;
    const float* scales;         // for sums of classes: kLaneScales of each token
    const uint32_t* corrections; // and what to add to the sum of each lane: of each token W for each stretch of K
};

// A stretch of K of some rows of the weight and of the tokens to multiply with.
struct DotStretch {
    const int8_t* w;
    int64_t w_stride;
    const DotActivation* x;
    int64_t x_stride;
    int64_t length;
    const float* scales; // of the phase in which the stretch begins
    const uint32_t* corrections;
    int64_t correction_stride; // from token to token
};

// Adds the tile's products to sums[token * kDotPanel + row]; Sum is uint32_t for those of all columns, float for those of classes, scaled. The stretch
// is a multiple of kDotLanes or, kPartial, less than one vector: a matter of the type, because the compiler keeps accumulators in registers only where
// it sees a single loop.
template <int kRows, int kTokens, bool kPartial, typename Sum> static void dot_tile(const DotStretch& s, Sum* sums) {
    constexpr bool kClasses = std::is_same<Sum, float>::value;
    constexpr int kPhases = kClasses && !kPartial ? kDotPhases : 1;
    constexpr int kSums = (kRows * kTokens + 3) / 4 * 4; // reduced four at a time
    for (int phase = 0; phase < kPhases; ++phase) {
        DotSum acc[kSums];
        BNB_UNROLL
        for (int i = 0; i < kSums; ++i)
            acc[i] = no_dots();
        for (int64_t k = phase * kDotLanes; k < s.length; k += kPhases * kDotLanes) {
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
        const auto lanes = [&](int i) {
            const int t = i % kTokens;
            if constexpr (!kClasses) {
                return lanes_of(acc[i]);
            } else {
                I32 sum = sums_of_quads(acc[i]);
                if constexpr (kDotOffset != 0)
                    sum = add_bits(sum, load_32bit(reinterpret_cast<const uint8_t*>(s.corrections + t * s.correction_stride)));
                return mul(to_floats(sum), load(s.scales + t * kLaneScales + phase * W));
            }
        };
        Sum totals[kSums];
        BNB_UNROLL
        for (int i = 0; i < kSums; i += 4) {
            const decltype(lanes(0)) four[4] = {lanes(i), lanes(i + 1), lanes(i + 2), lanes(i + 3)};
            reduce_add_4(four, totals + i);
        }
        for (int r = 0; r < kRows; ++r)
            for (int t = 0; t < kTokens; ++t)
                sums[t * kDotPanel + r] += totals[r * kTokens + t];
    }
}

template <int kTokens, bool kPartial, typename Sum> static void dot_rows(DotStretch s, int64_t rows, Sum* sums) {
    int64_t row = 0;
    for (; row + kDotRows <= rows; row += kDotRows, s.w += kDotRows * s.w_stride)
        dot_tile<kDotRows, kTokens, kPartial>(s, sums + row);
    for (; row < rows; ++row, s.w += s.w_stride)
        dot_tile<1, kTokens, kPartial>(s, sums + row);
}

template <bool kPartial, typename Sum> static void dot_any_rows(const DotStretch& s, int64_t rows, int64_t tokens, Sum* sums) {
    using Function = void (*)(DotStretch, int64_t, Sum*);
    static constexpr Function kFunctions[] = {dot_rows<1, kPartial, Sum>, dot_rows<2, kPartial, Sum>, dot_rows<3, kPartial, Sum>,
                                              dot_rows<4, kPartial, Sum>, dot_rows<5, kPartial, Sum>, dot_rows<6, kPartial, Sum>};
    static_assert(kDotTokens <= int(sizeof kFunctions / sizeof *kFunctions), "a function for every number of tokens");
    kFunctions[tokens - 1](s, rows, sums);
}

// sums[token * kDotPanel + row] of `rows` rows of the weight, at most kDotPanel, and `tokens` tokens, at most kDotTokens.
template <typename Sum> static void dot_panel(const DotSource& from, int64_t rows, int64_t tokens, Sum* sums) {
    memset(sums, 0, size_t(tokens) * kDotPanel * sizeof *sums);
    const int64_t K = from.K, whole = whole_vectors(K), stretches = stretches_of(K);
    for (int64_t k = 0, i = 0; k < K; ++i) {
        const bool is_partial = k == whole;
        const int64_t length = is_partial ? K - whole : smaller(kDotStretch, whole - k);
        DotStretch stretch{from.w + k, K, from.x + k, from.x_stride, length, nullptr, nullptr, stretches * W};
        if (std::is_same<Sum, float>::value) {
            stretch.scales = from.scales + k % kInt8Period / kDotLanes * W; // whole stretches begin in the first phase
            stretch.corrections = from.corrections + i * W;
        }
        if (is_partial)
            dot_any_rows<true>(stretch, rows, tokens, sums);
        else
            dot_any_rows<false>(stretch, rows, tokens, sums);
        k += length;
    }
}

// Codes of one token as a tile wants them.
[[maybe_unused]] static void pack_codes(const int8_t* codes, int64_t K, int64_t stride, DotActivation* out) {
    for (int64_t k = 0; k < K; ++k)
        out[k] = codes[k];
    for (int64_t k = K; k < stride; ++k)
        out[k] = 0;
}

// What every sum of all columns will hold too much.
[[maybe_unused]] static uint32_t total_correction(const int8_t* codes, int64_t K) {
    uint32_t sum = 0;
    for (int64_t k = 0; k < K && kDotOffset != 0; ++k)
        sum += uint32_t(int32_t(codes[k]));
    return sum * kDotOffset;
}

// What is to be added to every lane's sum in each stretch of K, for packed codes: less what weights of 0 would give.
[[maybe_unused]] static void lane_corrections(const DotActivation* x, int64_t K, uint32_t* out) {
    if (kDotOffset == 0)
        return;
    const int8_t zeros[kDotLanes] = {};
    const DotVector nothing = load_dot_weights(zeros);
    for (int64_t k = 0; k < K; out += W) {
        const int64_t whole = whole_vectors(K), end = k == whole ? K : smaller(k + kDotStretch, whole);
        DotSum sum = no_dots();
        for (; k < end; k += kDotLanes)
            sum = dot(nothing, load_dot_activations(x + k), sum);
        k = end;
        float lanes[W];
        store(lanes, from_bits(lanes_of(sum)));
        for (int i = 0; i < W; ++i)
            out[i] = 0u - float_bits(lanes[i]);
    }
}

// The scales of the lanes from those of the columns of a period.
[[maybe_unused]] static void lane_scales(const float* of_columns, float* out) {
    constexpr int kColumns = kInt8Period / kLaneScales; // of a lane
    for (int i = 0; i < kLaneScales; ++i)
        out[i] = i * kColumns % 4 == 0 ? of_columns[i * kColumns] : 0.0f;
}

} // namespace BNB_ISA
} // namespace bnb
