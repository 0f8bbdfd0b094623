// A lookup table that finds the code of an 8-bit quantisation in one step.
//
// Cell of v: the upper 16 bits of its ordered bits, that is sign, exponent and 7 bits of mantissa. The common maps have at most one decision
// threshold in a cell, so a cell needs the number of thresholds in lower cells and where its own threshold lies among the 65536 values of the lower
// 16 bits. With
//     entry = count << 16 | (0xffff - low 16 bits of the threshold)      (count << 16 where the cell has none)
// the carry of entry + (low 16 bits of v) out of bit 15 says whether v lies above the threshold, and (sum >> 16) is the code. Exact: the ordered
// bits are a strictly monotone function of v. Maps with a crowded cell have no table; the kernels then search the thresholds.
#pragma once

#include "../common/types.h"

namespace bnb {

// v in [-1, 1] has cells -0x3f81 .. 0x3f80.
constexpr int32_t kLowestCell = -0x3f81;
constexpr int32_t kHighestCell = 0x3f80;

struct CellTable {
    uint32_t entry[kHighestCell - kLowestCell + 1]; // entry[cell - kLowestCell]
};

// Bits that are ordered, as signed integers, like the values. -0 comes between the negative numbers and +0, which is right for v: it lies above every
// negative threshold and not above zero. A threshold of -0 must be made +0 first.
BNB_HD int32_t ordered_bits(float v) {
    const int32_t bits = int32_t(float_bits(v));
    return bits ^ int32_t(uint32_t(bits >> 31) >> 1);
}

// False, table unusable: two thresholds share a cell.
bool build_cells(const float* midpoints, CellTable& table);

} // namespace bnb
