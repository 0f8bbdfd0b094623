#include "lines.h"

#include "../common/quantize.h"

#include <math.h>

namespace bnb {
namespace {

constexpr int kMidpoints = 255;
constexpr int kMostSegments = 16;
constexpr float kUnit = float(1 << kLinePoint);
constexpr double kFit = kLineTolerance / kUnit / 4; // the rest is for rounding
constexpr uint32_t kLowestPair = 48;                // half the exponent of kLowestMagnitude

// The thresholds of one sign in ascending order of their magnitudes.
struct Side {
    int count;
    double magnitude[kMidpoints];

    Side(const float* midpoints, bool negative) : count(0) {
        for (int i = 0; i < kMidpoints; ++i) {
            const float m = negative ? -midpoints[kMidpoints - 1 - i] : midpoints[i];
            if (m > 0.0f)
                magnitude[count++] = m;
        }
    }

    // How many of the thresholds from `first` on lie on a line that comes no lower than one code below them where it begins, at the threshold before.
    int length_of_line(int first) const {
        const double begin = first > 0 ? magnitude[first - 1] : 0.0;
        double flattest = 0.0, steepest = (1.0 + kFit) / (magnitude[first] - begin); // slopes that pass all thresholds so far
        int next = first + 1;
        for (; next < count; ++next) {
            const double distance = magnitude[next] - magnitude[first], rise = next - first;
            flattest = fmax(flattest, (rise - kFit) / distance);
            steepest = fmin(steepest, (rise + kFit) / distance);
            if (flattest > steepest)
                break;
        }
        return next - first;
    }

    // The fewest cuts that leave straight lines between them. Returns their number; cuts[] are indices of thresholds.
    int find_cuts(int* cuts) const {
        int needed[kMidpoints + 2], length[kMidpoints + 2];
        needed[count] = needed[count + 1] = 0;
        for (int first = count - 1; first >= 0; --first) {
            length[first] = 0;
            needed[first] = 1 + needed[first + 1];
            const int longest = length_of_line(first);
            for (int tried = 1; tried <= longest; ++tried) {
                const int end = first + tried;
                const int total = end == count ? 0 : 1 + needed[end + 1];
                if (total <= needed[first]) {
                    needed[first] = total;
                    length[first] = tried;
                }
            }
        }
        int found = 0;
        for (int first = 0; first + (first < count ? length[first] : 0) < count; first = cuts[found - 1] + 1)
            cuts[found++] = first + length[first];
        return found;
    }
};

struct Cuts {
    int count = 0;
    float at[2 * kMidpoints];

    void add(float magnitude) {
        int i = count;
        while (i > 0 && at[i - 1] > magnitude)
            --i;
        if (i > 0 && at[i - 1] == magnitude)
            return;
        for (int k = count++; k > i; --k)
            at[k] = at[k - 1];
        at[i] = magnitude;
    }
};

bool find_pairs_of_octaves(const Cuts& cuts, LineTable& table) {
    constexpr uint32_t kWithinPair = 0xffffff;
    uint32_t segments[16] = {};
    for (int i = 0; i < cuts.count; ++i) {
        const uint32_t bits = float_bits(cuts.at[i]), pair = bits >> 24;
        if (pair < kLowestPair || pair > 63 || (i > 0 && float_bits(cuts.at[i - 1]) >> 24 == pair))
            return false;
        segments[pair - kLowestPair] += kWithinPair - (bits & kWithinPair);
        for (uint32_t later = pair + 1; later <= 63; ++later)
            segments[later - kLowestPair] += kWithinPair + 1;
    }
    for (uint32_t i = 0; i < 16; ++i) {
        table.segment[(kLowestPair + i) & 31] = segments[i];
        table.segment[(kLowestPair + i + 16) & 31] = segments[i] + (uint32_t(kMostSegments) << 24);
    }
    return true;
}

// The line of a segment of one sign through its thresholds, those from `first` to `end`, and whether it does what it should, computed as the kernels
// do: passes the thresholds, and stays on the right side of the next code from there to `nearest`, the end of the segment towards zero.
bool fit_line(const float* midpoints, int first, int end, bool is_negative, float nearest, float& slope, float& offset, float& bound) {
    double rise = 0.0, start = first + 0.5;
    if (end - first == 1) { // any rising line through the only threshold
        rise = 0.25 / (fabs(double(midpoints[first])) + 1e-30);
        start = first + 1.0 - rise * midpoints[first];
    } else if (end - first > 1) {
        rise = double(end - 1 - first) / (double(midpoints[end - 1]) - double(midpoints[first]));
        start = first + 1.0 - rise * midpoints[first];
    }
    const float sign = is_negative ? -1.0f : 1.0f;
    slope = sign * float(rise) * kUnit;
    offset = float(sign * start * kUnit + kLineTolerance);
    bound = sign * (is_negative ? first + 0.5f : end + 0.5f) * kUnit;
    if (!(fabsf(slope) < 1e30f))
        return false;
    for (int i = first; i < end; ++i) // truncation may take one unit more
        if (!(fabsf(fmaf(slope, midpoints[i], offset) - sign * float(i + 1) * kUnit - kLineTolerance) < kLineTolerance - 1))
            return false;
    const float begin = fmaf(slope, nearest, offset), least = (is_negative ? -(end + 1) : first) * kUnit;
    return begin >= least;
}

} // namespace

bool build_lines(const float* midpoints, LineTable& table) {
    table.negatives = 0;
    for (int i = 0; i < kMidpoints; ++i) {
        if (!(magnitude(midpoints[i]) > kLowestMagnitude) || !(magnitude(midpoints[i]) < INFINITY))
            return false;
        table.negatives += midpoints[i] < 0.0f;
    }
    Cuts cuts;
    for (int negative = 0; negative < 2; ++negative) {
        const Side side(midpoints, negative != 0);
        int found[kMidpoints];
        const int count = side.find_cuts(found);
        for (int i = 0; i < count; ++i)
            cuts.add(float(side.magnitude[found[i]]));
    }
    if (cuts.count >= kMostSegments || !find_pairs_of_octaves(cuts, table))
        return false;
    for (int segment = 0; segment <= cuts.count; ++segment) {
        const float lower = segment > 0 ? cuts.at[segment - 1] : 0.0f, upper = segment < cuts.count ? cuts.at[segment] : INFINITY;
        int below_lower = 0, below_upper = 0, above_upper = 0, above_lower = 0; // thresholds on either side, of both signs
        for (int i = 0; i < kMidpoints; ++i) {
            below_lower += midpoints[i] <= lower && (segment > 0 || midpoints[i] < 0.0f);
            below_upper += midpoints[i] < upper;
            above_upper += midpoints[i] <= -upper;
            above_lower += midpoints[i] < -lower;
        }
        if (above_lower == table.negatives && above_lower > 0) {
            --above_lower;
            above_upper = above_upper < above_lower ? above_upper : above_lower;
        }
        const auto fits = [&](int first, int end, bool is_negative) {
            const int line = segment + (is_negative ? kMostSegments : 0);
            const float nearest = is_negative ? -lower : lower;
            return fit_line(midpoints, first, end, is_negative, nearest, table.slope[line], table.offset[line], table.bound[line]);
        };
        if (!fits(below_lower, below_upper, false) || !fits(above_upper, above_lower, true))
            return false;
    }
    return true;
}

} // namespace bnb
