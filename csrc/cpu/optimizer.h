// What the kernel of an optimizer step takes. The formulas are in ../common/optimizer_algorithms.h.
#pragma once

#include "../common/optimizer.h"
#include "../common/types.h"

namespace bnb {

struct CellTable;
struct LineTable;

// The code of a moment in 8 bits.
struct MomentCode {
    const float* values;    // 256
    const float* midpoints; // 255
    const CellTable* cells; // the midpoints as a lookup table, or null
    const LineTable* lines; // the midpoints as pieces of lines, or null; only beside cells
    uint32_t negatives;     // how many values have a minus sign, 0 where all have one
};

struct OptimizerArgs {
    OptimizerScalars scalars;
    OptimizerVariant variant;
    DType dtype;
    int moments; // K
    bool in_8bit;
    MomentCode codes[kMostMoments];
    uint32_t step; // for the random numbers
};

// Blocks of a parameter whose squares are summed up together, on one thread.
constexpr int64_t kBlocksPerChunk = 16;

// One parameter.
struct OptimizerTensor {
    void* p;
    const void* g;
    int64_t n;
    DType g_dtype;
    void* const* moments; // K of them
    float* const* absmax;
    float scale; // of the update, from the limit on its norm
    bool rounds_randomly;
    uint32_t seed;
};

} // namespace bnb
