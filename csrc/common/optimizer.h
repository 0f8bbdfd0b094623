// One step of an optimizer, as the C interface takes it and as the kernels do.
#pragma once

#include "macros.h"

#include <cmath>
#include <cstdint>

namespace bnb {

enum OptimizerAlgorithm : int64_t { kAdam = 0, kAdEMAMix = 1, kMomentum = 2, kLion = 3, kRMSprop = 4, kAdagrad = 5 };

constexpr int64_t kOptimizerBlocksize = 256;
constexpr int kMostMoments = 3;

// ------------------------------------------------------------------------------------------------------- as the C interface takes it
// Every field has 8 bytes, so that callers in other languages need no padding rules.

// What is stepped: `count` parameters, each with its gradient and K moments. Arrays of pointers and numbers, one entry a parameter unless said
// otherwise. Everything lies in one order, without gaps, and no two parameters overlap.
struct OptimizerTensors {
    int64_t count;
    const int64_t* sizes;
    void* const* p; // of the settings' dtype
    const void* const* g;
    const int64_t* g_dtypes;
    void* const* moments; // K entries a parameter: floats, or codes of 8 bits
    float* const* absmax; // for codes, K entries a parameter: one float for each 256 elements
    float* update_norms;  // with a limit: receive the norms of the updates
    const int64_t* seeds; // null: round to nearest
};

// Scalars are double as the caller has them: what is derived from them is rounded once.
struct OptimizerSettings {
    int64_t algorithm; // LAMB is kAdam and LARS is kMomentum, with a limit
    int64_t dtype;
    int64_t step; // from 1
    double lr, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale;
    double mean_correction, root_correction; // 1 - beta1^step and the root of 1 - beta2^step, or 1
    double max_unorm;                        // 0: no limit
    double param_norm;                       // what max_unorm multiplies; negative: each parameter's own
    int64_t decoupled_weight_decay, nesterov, amsgrad, centered, skip_zeros;
    const float* qmaps[kMostMoments]; // 256 ascending values for each of the K moments, or null: they are floats
};

// --------------------------------------------------------------------------------------------------------------- as the kernels take it
struct OptimizerVariant {
    OptimizerAlgorithm algorithm;
    bool has_largest;            // Adam: AMSGrad
    bool has_momentum, has_mean; // RMSprop
};

// The scalars of a step, rounded.
struct OptimizerScalars {
    float gnorm_scale;
    float kept;                                     // 1 - lr * weight_decay where decay is decoupled, else 1
    float decay;                                    // weight_decay where it is added to the gradient, else 0
    float step_size;                                // negative: p += step_size * direction
    float beta1, rest1, beta2, rest2, beta3, rest3; // rest = 1 - beta
    float alpha, eps, mean_correction, root_correction;
    bool first_step, nesterov, skips_zeros;
};

// The limit on the norm of an update. A parameter whose norm is 0 is not limited; it could never leave zero.
struct OptimizerLimit {
    float factor;      // of the direction, for the norm of the update
    float max_unorm;   // multiplies the parameter's own norm,
    float given_limit; // unless the limit is given; negative: it is not
};

// Sums of squares over a part of a parameter.
struct OptimizerSquares {
    double update, p;
};

struct OptimizerLimited {
    float norm;  // of the update
    float scale; // what the limit leaves of it
};

BNB_HD OptimizerLimited limit_update(const OptimizerLimit& limit, const OptimizerSquares& sum) {
    const float norm = float(sqrt(sum.update)) * limit.factor;
    const float most = limit.given_limit >= 0.0f ? limit.given_limit : limit.max_unorm * float(sqrt(sum.p));
    return {norm, norm > most && most > 0.0f ? most / norm : 1.0f};
}

} // namespace bnb
