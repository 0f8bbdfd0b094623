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
    Table32 segment, cut, slope, offset, low, high;

    explicit ByLines(const LineTable& lines)
        : segment(load_table32(reinterpret_cast<const float*>(lines.segment))), cut(load_table32(reinterpret_cast<const float*>(lines.cut))),
          slope(load_table32(lines.slope)), offset(load_table32(lines.offset)), low(load_table32(lines.low)), high(load_table32(lines.high)) {}

    // Codes of v, |v| < 2, with the signs of x. `is_sure` is false where a result must not be used.
    inline I32 code(F32 v, F32 x, bool& is_sure) const {
        const I32 sign = shift_right<31>(bits(add(x, splat(0.0f)))); // of zero, whose own does not count: 0
        // A number at a cut belongs to the lower values: a negative one to the larger magnitudes.
        const I32 place = max_bits(add_bits(magnitude_bits(v), sign), splat_bits(kLowestOctave << 23));
        const I32 octave = shift_right<23>(place);
        const I32 lower = bits(lookup32(segment, octave));
        const I32 number = select(less(lookup32(cut, octave), from_bits(place)), add_bits(lower, splat_bits(1)), lower);
        const I32 line = or_bits(number, shift_left<4>(sign));
        const F32 exact = fused(lookup32(slope, line), v, lookup32(offset, line));
        const F32 inside = min(max(exact, lookup32(low, line)), lookup32(high, line));
        is_sure = !any(less(from_bits(magnitude_bits(beside_whole(inside))), splat(kLineTolerance)));
        return truncate(inside);
    }
};
#endif

} // namespace BNB_ISA
} // namespace bnb
