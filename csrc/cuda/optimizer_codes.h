// Moments in 8 bits: what a code means, and the code of a value, from tables in shared memory.
//
// A lookup by 32 lanes in a table of 256 values costs about 3.5 passes through the banks of shared memory. With a copy of the values for each lane it
// is one; that is done where the memory allows. The way back needs one lookup too: in a table of cells as ../cpu/cells.h describes it, cut down to
// the magnitudes from 2^-24 to 1, between which all thresholds of the maps in use lie. That table also keeps the sign of what it encodes (keep_sign):
// negative numbers have cells of their own, and the threshold between the negative values and the others lies behind all of these. A map that this
// does not fit, because two thresholds meet in a cell or one lies closer to zero, is searched instead; so is any map if there is no room for cells.
#pragma once

#include "one_element.h"

#include "../common/optimizer.h"
#include "../common/quantize.h"

namespace bnb {

constexpr int kCodes = 256;
constexpr uint32_t kSmallestBits = 0x33800000u; // of 2^-24
constexpr uint32_t kOneBits = 0x3f800000u;
constexpr int kLastCell = int((kOneBits - kSmallestBits) >> 16);
constexpr int kFirstCell = -kLastCell - 1;

// Where the tables of a launch are and what they are made of. Moments with one map share its tables.
struct CodeTables {
    const float* maps[kMostMoments]; // 256 ascending values each
    int32_t count;
    int32_t of_moment[kMostMoments];
    int32_t copies;  // of the values: a power of two, 1 to kWarpSize
    uint32_t stride; // bytes from one value to the next
    bool has_cells;
};

struct CodeTraits {
    int32_t negatives; // how many values have a minus sign, 0 where all have one
    bool has_cells;
};

// The tables of one map in shared memory, one behind the other.
struct CodeTable {
    float* values;                   // `copies` of each
    const unsigned char* own_values; // of the lane, tables.stride bytes apart
    float* midpoints;                // 255, and infinity
    CodeTraits* traits;
    uint32_t* cells; // of cell 0

    static BNB_MEMBER int words(const CodeTables& tables) {
        return kCodes * tables.copies + kCodes + int(sizeof(CodeTraits) / sizeof(float)) + (tables.has_cells ? kLastCell + 1 - kFirstCell : 0);
    }

    __device__ __forceinline__ CodeTable(const CodeTables& tables, int number) {
        values = reinterpret_cast<float*>(dynamic_shared_memory()) + number * words(tables);
        own_values = reinterpret_cast<const unsigned char*>(values + (lane_index() & (tables.copies - 1)));
        midpoints = values + kCodes * tables.copies;
        traits = reinterpret_cast<CodeTraits*>(midpoints + kCodes);
        cells = reinterpret_cast<uint32_t*>(traits + 1) - kFirstCell;
    }
};

// Where a magnitude with this sign is in the order of the cells: the cell above 16 bits that say where in the cell.
BNB_HD int32_t place_in_cells(float magnitude, bool is_negative) {
    const int32_t above = int32_t(float_bits(magnitude)) - int32_t(kSmallestBits), place = above > 0 ? above : 0;
    return is_negative ? ~place : place;
}

struct Threshold {
    int cell;            // beyond the first or the last: below or above everything
    uint32_t from_above; // 0xffff less its place in the cell
    bool fits;
};

BNB_HD Threshold locate_threshold(const float* midpoints, int number, int negatives) {
    if (number < 0)
        return {kFirstCell - 1, 0, true};
    const float value = midpoints[number], magnitude = float_from_bits(magnitude_bits(value));
    if (number == negatives - 1) // behind all negative numbers, whatever their magnitude
        return {-1, 0, value < 0.0f};
    if (value == 1.0f || !(magnitude <= 1.0f)) // nothing lies above 1, though rounding may leave a value a little larger
        return {value < 0.0f ? kFirstCell - 1 : kLastCell + 1, 0, true};
    const int32_t place = place_in_cells(magnitude, value < 0.0f);
    return {place >> 16, 0xffffu - (uint32_t(place) & 0xffffu), float_bits(magnitude) >= kSmallestBits};
}

// Fills the cells that lie behind threshold `number - 1` up to that of threshold `number`, by one warp. False: the map does not fit.
__device__ inline bool fill_cells(const CodeTable& table, int number, int negatives) {
    const Threshold before = locate_threshold(table.midpoints, number - 1, negatives), own = locate_threshold(table.midpoints, number, negatives);
    const bool is_inside = own.cell >= kFirstCell && own.cell <= kLastCell;
    if (!own.fits || own.cell < before.cell || (is_inside && own.cell == before.cell))
        return false;
    const int last = is_inside ? own.cell : own.cell < kFirstCell ? kFirstCell - 1 : kLastCell;
    for (int cell = before.cell + 1 + lane_index(); cell <= last; cell += kWarpSize)
        table.cells[cell] = uint32_t(number) << 16 | (cell == own.cell ? own.from_above : 0);
    return true;
}

// Makes the tables of one map; for all threads of the block, of which there are at least 256.
__device__ inline void build_table(const CodeTables& tables, int number) {
    const CodeTable table(tables, number);
    const float* map = tables.maps[number];
    const int thread = int(threadIdx.x), threads = int(blockDim.x);
    for (int i = thread; i < kCodes * tables.copies; i += threads)
        table.values[i] = map[i / tables.copies];
    if (thread < kCodes) // a midpoint of -0 becomes +0
        table.midpoints[thread] = thread + 1 < kCodes ? midpoint(map[thread], map[thread + 1]) + 0.0f : float_from_bits(kInfinityBits);
    const int negatives = __syncthreads_count(thread < kCodes && float_bits(map[thread % kCodes]) >> 31) % kCodes;
    bool fits = tables.has_cells;
    for (int i = warp_index(); tables.has_cells && i < kCodes; i += threads / kWarpSize)
        fits = fill_cells(table, i, negatives) && fits;
    const bool has_cells = !__syncthreads_or(!fits);
    if (thread == 0)
        *table.traits = {negatives, has_cells};
}

__device__ inline void build_tables(const CodeTables& tables) {
    for (int i = 0; i < tables.count; ++i)
        build_table(tables, i);
    __syncthreads();
}

// The value of byte `i` of `word`.
__device__ __forceinline__ float decode(const CodeTables& tables, const CodeTable& table, uint32_t word, int i) {
    return *reinterpret_cast<const float*>(table.own_values + __byte_perm(word, 0, 0x4440u + unsigned(i)) * tables.stride);
}

// The code of x in byte 2; only with cells, and with a finite inverse.
__device__ __forceinline__ uint32_t encode_by_cell(const CodeTable& table, float x, float inverse) {
    const int32_t place = place_in_cells(fabsf(x) * inverse, x < 0.0f);
    return table.cells[place >> 16] + (uint32_t(place) & 0xffffu);
}

__device__ __forceinline__ uint32_t encode_by_search(const CodeTable& table, int negatives, float x, float inverse) {
    return uint32_t(keep_sign(blockwise_code(table.midpoints, normalise(x, inverse)), x, negatives)) << 16;
}

// The codes of four values, in order from the lowest byte.
template <typename Encode> __device__ __forceinline__ uint32_t encode_four(const Encode& encode) {
    return __byte_perm(__byte_perm(encode(0), encode(1), 0x0062), __byte_perm(encode(2), encode(3), 0x0062), 0x5410);
}

} // namespace bnb
