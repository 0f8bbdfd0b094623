// The code of v in an 8-bit quantisation: the number of midpoints below it. Two ways that agree bit for bit, for |v| <= 1.
#pragma once

#include "cells.h"
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

} // namespace BNB_ISA
} // namespace bnb
