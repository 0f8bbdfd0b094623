// The thresholds of an 8-bit code as pieces of straight lines: where neighbouring values are equally far apart, the code of v is the whole part of
// slope * v + offset.
//
// The magnitudes from 0 to 1 are cut into at most 16 segments, at most once within two octaves. A cut is made exactly at a threshold; a segment has a
// line for each sign. The dynamic maps, whose values are spaced evenly within each power of ten, need nine segments. Lines fit to within
// kLineTolerance, so a result this near to a whole number says nothing and the cell table decides. Everywhere else the whole part is exact, since
// lines rise. Towards zero a line must not leave the codes of its segment by itself; where it does at the far end, a bound stops it.
#pragma once

#include "../common/types.h"

namespace bnb {

// Lines are in fixed point: 16 bits behind the point, kLineTolerance added.
struct LineTable {
    // For each pair of octaves, by the low five bits of half its exponent, negative numbers 16 further: the line at its lower end, shifted left by 24,
    // and what to add to the lower 24 bits of a magnitude for a carry beyond which the next line begins.
    uint32_t segment[32];
    // Those of negative numbers stand in the second half with their signs turned: they rise with the magnitude, to `bound`, which is half a step
    // within the last code.
    float slope[32], offset[32], bound[32];
    int negatives; // thresholds below zero
};

constexpr int kLinePoint = 16;
constexpr uint32_t kLineTolerance = 4;             // in units of the last of these bits
constexpr float kLowestMagnitude = 4.6566129e-10f; // 2^-31. Smaller magnitudes count as this one: no threshold is as small

// For codes that keep the sign of what they encode (keep_sign, with this many negative values). False, table unusable: the code is not made of such
// pieces.
bool build_lines(const float* midpoints, LineTable& table);

} // namespace bnb
