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

#if defined(BNB_HAS_TABLE32)
// By lines, in half the time of a gather where permutations look up 32 floats at once.
struct ByLines {
    Table32 segment, slope, offset, bound;

    explicit ByLines(const LineTable& lines)
        : segment(load_table32(reinterpret_cast<const float*>(lines.segment))), slope(load_table32(lines.slope)), offset(load_table32(lines.offset)),
          bound(load_table32(lines.bound)) {}

    // Codes of v, |v| < 2, with the signs of x. They must not be used if `nearest` comes below kLineTolerance: it becomes the distance, of any
    // sign, from the nearest whole number.
    inline I32 code(F32 v, F32 x, F32& nearest) const {
        const I32 sign = shift_right<31>(bits(add(x, splat(0.0f)))); // of zero, whose own does not count: 0
        // A number at a cut belongs to the lower values: a negative one to the larger magnitudes.
        const I32 place = max_bits(add_bits(magnitude_bits(v), sign), splat_bits(kLowestOctave << 23));
        const I32 carried = add_bits(bits(lookup32(segment, shift_right<23>(place))), and_bits(place, splat_bits(0x7fffffu)));
        const I32 line = or_bits(shift_right<23>(carried), shift_left<4>(sign));
        const F32 exact = min(fused(lookup32(slope, line), v, lookup32(offset, line)), lookup32(bound, line));
        nearest = nearer_zero(nearest, beside_whole(exact));
        return absolute(truncate(exact));
    }
};
#endif

} // namespace BNB_ISA
} // namespace bnb
