// What the C functions for optimizers share: the checks of their arguments, and the numbers that kernels get.
#pragma once

#include "arguments.h"

#include "../common/optimizer.h"

namespace bnb {

inline bool is_algorithm(int64_t algorithm) { return algorithm >= kAdam && algorithm <= kAdagrad; }

inline int moments_of(const OptimizerSettings& settings) {
    switch (settings.algorithm) {
    case kAdam:
        return settings.amsgrad ? 3 : 2;
    case kAdEMAMix:
        return 3;
    case kRMSprop:
        return 1 + (settings.beta2 > 0.0) + (settings.centered != 0);
    default:
        return 1;
    }
}

inline bool are_settings(const OptimizerSettings& settings) {
    if (!is_algorithm(settings.algorithm) || !is_dtype(int32_t(settings.dtype)) || settings.dtype != int32_t(settings.dtype) || settings.step < 1)
        return false;
    const int moments = moments_of(settings);
    for (int k = 1; k < moments; ++k)
        if ((settings.qmaps[k] == nullptr) != (settings.qmaps[0] == nullptr))
            return false;
    return true;
}

inline bool are_tensors(const OptimizerTensors& tensors, const OptimizerSettings& settings) {
    if (!is_count(tensors.count))
        return false;
    if (tensors.count == 0)
        return true;
    const bool in_8bit = settings.qmaps[0] != nullptr, has_limit = settings.max_unorm > 0.0;
    if (!tensors.sizes || !tensors.p || !tensors.g || !tensors.g_dtypes || !tensors.moments || (in_8bit && !tensors.absmax) ||
        (has_limit && !tensors.update_norms))
        return false;
    const int moments = moments_of(settings);
    int64_t total = 0;
    for (int64_t t = 0; t < tensors.count; ++t) {
        const int64_t dtype = tensors.g_dtypes[t];
        if (!is_count(tensors.sizes[t]) || dtype != int32_t(dtype) || !is_dtype(int32_t(dtype)))
            return false;
        total += tensors.sizes[t];
        if (!is_count(total))
            return false;
        if (tensors.sizes[t] == 0)
            continue;
        if (!tensors.p[t] || !tensors.g[t])
            return false;
        for (int64_t k = t * moments; k < (t + 1) * moments; ++k)
            if (!tensors.moments[k] || (in_8bit && !tensors.absmax[k]))
                return false;
    }
    return true;
}

// What Adam's direction is multiplied by: both bias corrections in one.
inline double factor_of(const OptimizerSettings& s) { return s.algorithm == kAdam ? s.root_correction / s.mean_correction : 1.0; }

inline OptimizerScalars scalars_of(const OptimizerSettings& s) {
    const bool decoupled = s.decoupled_weight_decay && (s.algorithm == kAdam || s.algorithm == kAdEMAMix || s.algorithm == kLion);
    const bool decays = s.weight_decay > 0.0;
    OptimizerScalars scalars{};
    scalars.gnorm_scale = float(s.gnorm_scale);
    scalars.kept = decays && decoupled ? float(1.0 - s.lr * s.weight_decay) : 1.0f;
    scalars.decay = decays && !decoupled ? float(s.weight_decay) : 0.0f;
    scalars.step_size = float(-s.lr * factor_of(s));
    scalars.beta1 = float(s.beta1), scalars.rest1 = float(1.0 - s.beta1);
    scalars.beta2 = float(s.beta2), scalars.rest2 = float(1.0 - s.beta2);
    scalars.beta3 = float(s.beta3), scalars.rest3 = float(1.0 - s.beta3);
    scalars.alpha = float(s.alpha);
    scalars.eps = float(s.algorithm == kAdam ? s.root_correction * s.eps : s.eps);
    scalars.mean_correction = float(s.mean_correction), scalars.root_correction = float(s.root_correction);
    scalars.first_step = s.step == 1, scalars.nesterov = s.nesterov != 0, scalars.skips_zeros = s.skip_zeros != 0;
    return scalars;
}

inline OptimizerVariant variant_of(const OptimizerSettings& s) {
    return {OptimizerAlgorithm(s.algorithm), s.amsgrad != 0, s.beta2 > 0.0, s.centered != 0};
}

inline OptimizerLimit limit_of(const OptimizerSettings& s) {
    return {float(factor_of(s)), float(s.max_unorm), s.param_norm >= 0.0 ? float(s.max_unorm * s.param_norm) : -1.0f};
}

} // namespace bnb
