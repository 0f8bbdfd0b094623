// From a scaled value to its code: fast forms of the functions in common/quantize.h, which give the same codes.
//
// A coder has a Table in shared memory that the block fills together, and
//   code(v)        for |v| <= 1 + 2^-23, not NaN
//   any_code(v)    for every v
#pragma once

#include "device.h"

#include "../common/quantize.h"

namespace bnb {

__constant__ NF4Thresholds nf4_thresholds = kNF4Thresholds;
__constant__ FP4Thresholds fp4_thresholds = kFP4Thresholds;

// 4 bits: the interval [-1, 1] is cut into cells of 1 / 15.49, narrower than the smallest distance of two thresholds (0.0805), so that a cell holds one
// at most. One fused multiply-add, whose rounding is monotone, leaves 8 * cell and three bits below it in the low byte of a float near 1.5 * 2^20. The
// cell knows how many thresholds lie in lower cells and its own threshold, or infinity; the sign of threshold - v does the rest, and is positive in a
// tie. The table is made by the same multiply-add, so that a threshold and a value in one cell meet there.
constexpr int kCells = 32;

struct Cell {
    float threshold;
    uint32_t below;
};

struct CellTable4bit {
    Cell cell[kCells];
};

__device__ __forceinline__ int cell_of(float v) { return int(float_bits(__fmaf_rn(v, 15.49f, 1572880.0f)) >> 3 & (kCells - 1)); }

template <typename Thresholds> __device__ __forceinline__ void fill_cells(CellTable4bit& table, const Thresholds& thresholds) {
    constexpr int count = int(sizeof(Thresholds) / sizeof(float));
    const int own = int(threadIdx.x);
    if (own >= kCells)
        return;
    Cell cell{float_from_bits(kInfinityBits), 0};
    for (int i = 0; i < count; ++i) {
        const float threshold = thresholds.value[i];
        cell.below += cell_of(threshold) < own;
        cell.threshold = cell_of(threshold) == own ? threshold : cell.threshold;
    }
    table.cell[own] = cell;
}

__device__ __forceinline__ int count_below(const CellTable4bit& table, float v) {
    const Cell cell = table.cell[cell_of(v)];
    return int(cell.below + (float_bits(__fsub_rn(cell.threshold, v)) >> 31));
}

struct NF4Coder {
    using Table = CellTable4bit;
    static constexpr int kBits = 4;
    static constexpr int kZeroCode = kNF4ZeroCode, kNaNCode = 15;
    const Table& table;

    __device__ __forceinline__ NF4Coder(Table& table, const float*) : table(table) {
        fill_cells(table, nf4_thresholds);
        __syncthreads();
    }
    __device__ __forceinline__ int code(float v) const { return count_below(table, v); }
    __device__ __forceinline__ int any_code(float v) const { return v == v ? code(v) : kNaNCode; }
};

// Nibble r: the low bits of the code whose magnitude has rank r.
constexpr uint32_t pack_codes_of_ranks() {
    uint32_t packed = 0;
    for (int rank = 0; rank < 8; ++rank)
        packed |= uint32_t(kFP4CodeOfRank.value[rank]) << 4 * rank;
    return packed;
}
constexpr uint32_t kCodesOfRanks = pack_codes_of_ranks();

struct FP4Coder {
    using Table = CellTable4bit;
    static constexpr int kBits = 4;
    static constexpr int kZeroCode = kFP4ZeroCode, kNaNCode = kFP4CodeOfRank.value[7];
    const Table& table;

    __device__ __forceinline__ FP4Coder(Table& table, const float*) : table(table) {
        fill_cells(table, fp4_thresholds);
        __syncthreads();
    }
    __device__ __forceinline__ int code(float v) const {
        const int rank = count_below(table, magnitude(v));
        return (kCodesOfRanks >> 4 * rank & 15) | (v < 0.0f && rank != 0 ? 8 : 0);
    }
    __device__ __forceinline__ int any_code(float v) const { return v == v ? code(v) : kNaNCode; }
};

// 8 bits, any ascending code of 256 values: a binary search over the midpoints.
struct Midpoints {
    float value[256]; // the last is infinity
};

__device__ __forceinline__ void fill_midpoints(Midpoints& midpoints, const float* code) {
    for (int i = int(threadIdx.x); i < 256; i += int(blockDim.x))
        midpoints.value[i] = i < 255 ? midpoint(code[i], code[i + 1]) : float_from_bits(kInfinityBits);
}

struct SearchCoder {
    using Table = Midpoints;
    static constexpr int kBits = 8;
    static constexpr int kZeroCode = 0; // no code is padded
    const Table& table;

    __device__ __forceinline__ SearchCoder(Table& table, const float* code) : table(table) {
        fill_midpoints(table, code);
        __syncthreads();
    }
    __device__ __forceinline__ int code(float v) const { return any_code(v > 1.0f ? 1.0f : v < -1.0f ? -1.0f : v); }
    __device__ __forceinline__ int any_code(float v) const { return blockwise_code(table.value, v); }
};

// The same without a search, for large tensors. Cell of v: sign, exponent and 7 bits of mantissa; smaller magnitudes than 2^-24 share the lowest cell of
// their sign. The usual maps have one midpoint in a cell at most. Then the number of midpoints in lower cells is the index of the one that v may lie
// above. Every lane has its own copy of the midpoints, in its own bank. Maps with a crowded cell, such as those of few bits, are searched.
struct CellCoder {
    static constexpr int kBits = 8;
    static constexpr int kZeroCode = 0;
    static constexpr int kShift = 16, kLowest = (127 - 24) << 7, kCellsOfSign = (24 << 7) + 1;

    struct Table {
        float midpoint[256][kWarpSize];
        uint8_t below[2 * kCellsOfSign];
        Midpoints midpoints;
    };
    const Table& table;
    bool is_searched;

    __device__ __forceinline__ CellCoder(Table& table, const float* code) : table(table) {
        fill_midpoints(table.midpoints, code);
        __syncthreads();
        const float* midpoints = table.midpoints.value;
        const int own = int(threadIdx.x), threads = int(blockDim.x);
        bool is_crowded = false;
        for (int i = own; i < 254; i += threads)
            is_crowded |= is_inside(midpoints[i]) && is_inside(midpoints[i + 1]) && cell_of(midpoints[i] + 0.0f) == cell_of(midpoints[i + 1] + 0.0f);
        is_searched = __syncthreads_or(is_crowded);
        if (is_searched)
            return;
        for (int i = own; i < 256 * kWarpSize; i += threads)
            table.midpoint[i / kWarpSize][i % kWarpSize] = midpoints[i / kWarpSize];
        for (int cell = own; cell < 2 * kCellsOfSign; cell += threads)
            table.below[cell] = uint8_t(midpoints_in_lower_cells(midpoints, cell));
        __syncthreads();
    }

    __device__ __forceinline__ int code(float v) const {
        v = v > 1.0f ? 1.0f : v < -1.0f ? -1.0f : v;
        if (is_searched)
            return blockwise_code(table.midpoints.value, v);
        const int below = table.below[cell_of(v)];
        return below + (v > table.midpoint[below][lane_index()]);
    }
    __device__ __forceinline__ int any_code(float v) const { return blockwise_code(table.midpoints.value, v); }

  private:
    static __device__ __forceinline__ bool is_inside(float v) { return magnitude(v) <= 1.0f; }

    // Ascending with v, for |v| <= 1. -0 is in the cell below that of 0; no midpoint lies between them.
    static __device__ __forceinline__ int cell_of(float v) {
        const int place = max(int(magnitude_bits(v) >> kShift) - kLowest, 0);
        const int sign = int(float_bits(v)) >> 31; // 0 or -1
        return kCellsOfSign + (place ^ sign);
    }

    // Midpoints are in ascending order, so their cells are too.
    static __device__ __forceinline__ int midpoints_in_lower_cells(const float* midpoints, int cell) {
        int count = 0;
        for (int step = 128; step > 0; step >>= 1) {
            const float middle = midpoints[count + step - 1];
            const int place = is_inside(middle) ? cell_of(middle + 0.0f) : middle < 0.0f ? -1 : 2 * kCellsOfSign;
            count += place < cell ? step : 0;
        }
        return count;
    }
};

} // namespace bnb
