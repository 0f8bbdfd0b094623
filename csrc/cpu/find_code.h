// The code of v in an 8-bit quantisation: the number of midpoints below it. Two ways that agree bit for bit, for |v| <= 1.
#pragma once

#include "cells.h"
#include "lines.h"
#include "simd.h"

namespace bnb {
namespace BNB_ISA {

// One gather from the cell table, of which random data touch some ten KiB.
struct ByCell {
    const uint32_t* entries; // of cell 0

    explicit ByCell(const CellTable& cells) : entries(cells.entry - kLowestCell) {}

    inline I32 code(F32 v) const {
        const I32 raw = bits(v);
        const I32 ordered = xor_bits(raw, shift_right<1>(shift_right_signed<31>(raw)));
        const I32 entry = gather(entries, shift_right_signed<16>(ordered));
        return shift_right<16>(add_bits(entry, and_bits(ordered, splat_bits(0xffffu))));
    }
};

// For small inputs and unusual maps: a binary search over the midpoints in eight gathers.
struct BySearch {
    const float* midpoints;

    explicit BySearch(const float* midpoints) : midpoints(midpoints) {}

    inline I32 code(F32 v) const {
        I32 path = splat_bits(0); // after s steps: the s upper bits of the code
        path = descend<7>(path, v);
        path = descend<6>(path, v);
        path = descend<5>(path, v);
        path = descend<4>(path, v);
        path = descend<3>(path, v);
        path = descend<2>(path, v);
        path = descend<1>(path, v);
        return descend<0>(path, v);
    }

  private:
    template <int bit> inline I32 descend(I32 path, F32 v) const {
        const I32 index = add_bits(shift_left<bit + 1>(path), splat_bits((1u << bit) - 1));
        return twice_plus(path, less(gather(midpoints, index), v));
    }
};

#if defined(BNB_HAS_LINE_LOOKUP)
// By lines, in a fraction of the time of a gather where permutations look up 32 floats at once. A code without thresholds below zero takes no negative
// numbers and needs no care for signs.
//
// Four vectors go through it side by side, every operation for all of them before the next: one after the other their long chains of dependent
// operations would fill a processor's window and leave it waiting.
template <bool kSigned> struct ByLines {
    static constexpr int kTogether = 4;

    LineLookup<kSigned> segment, slope, offset, bound;

    explicit ByLines(const LineTable& lines)
        : segment(reinterpret_cast<const float*>(lines.segment + (kSigned ? 0 : 16))), slope(lines.slope), offset(lines.offset), bound(lines.bound) {}

    // Writes the codes of x * scale, a product below 2, with the signs of x. False: some are so near to a threshold that nothing is known, and nothing
    // is written.
    inline bool write_codes(const float* x, F32 scale, uint8_t* out) const {
        F32 v[kTogether];
        Mask is_negative[kTogether];
        I32 place[kTogether], line[kTogether], exact[kTogether];
        for (int k = 0; k < kTogether; ++k) {
            const F32 value = load(x + k * W);
            v[k] = mul(value, scale);
            if constexpr (kSigned)
                is_negative[k] = less(value, splat(0.0f));
        }
        for (int k = 0; k < kTogether; ++k) {
            if constexpr (kSigned) // a number at a cut belongs to the lower values: a negative one to the larger magnitudes
                place[k] = add_where(is_negative[k], max_bits(magnitude_bits(v[k]), bits(splat(kLowestMagnitude))), splat_bits((16u << 24) + 1));
            else
                place[k] = bits(v[k] = max(v[k], splat(kLowestMagnitude)));
        }
        for (int k = 0; k < kTogether; ++k)
            line[k] = bits(segment.of(shift_right<24>(place[k])));
        for (int k = 0; k < kTogether; ++k)
            line[k] = shift_right<24>(add_bits(line[k], and_bits(place[k], splat_bits(0xffffffu))));
        for (int k = 0; k < kTogether; ++k)
            v[k] = fused(slope.of(line[k]), v[k], offset.of(line[k]));
        for (int k = 0; k < kTogether; ++k)
            exact[k] = truncate(min(v[k], bound.of(line[k])));
        if (any_low_word_below(2 * kLineTolerance, exact))
            return false;
        store_high_words<kSigned>(out, exact);
        return true;
    }
};
#endif

} // namespace BNB_ISA
} // namespace bnb
