// What the kernel of an optimizer step takes. The formulas are in optimizer_algorithms.h.
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

// The scalars of a step as the kernels use them.
struct OptimizerScalars {
    float gnorm_scale;
    float kept;  // 1 - lr * weight_decay where decay is decoupled, else 1
    float decay; // weight_decay where it is added to the gradient, else 0
    float step_size; // negative: p += step_size * direction
    float beta1, rest1, beta2, rest2, beta3, rest3; // rest = 1 - beta
    float alpha, eps, mean_correction, root_correction;
    bool first_step, nesterov, skips_zeros;
};

struct OptimizerArgs {
    OptimizerScalars scalars;
    OptimizerAlgorithm algorithm;
    DType dtype;
    int moments;      // K
    bool has_largest; // Adam: AMSGrad
    bool has_momentum, has_mean; // RMSprop
    bool in_8bit;
    MomentCode codes[kMostMoments];
    uint32_t step; // for the random numbers
};

// One parameter.
struct OptimizerTensor {
    void* p;
    const void* g;
    int64_t n;
    DType g_dtype;
    void* const* moments; // K of them
    float* const* absmax;
    float scale;       // of the update, from the limit on its norm
    bool rounds_randomly;
    uint32_t seed;
};

// Sums of squares over a part of a parameter.
struct OptimizerSquares {
    double update, p;
};

} // namespace bnb
