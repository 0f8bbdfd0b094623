// Checks of the optimizers: moments and parameters after a step, within rounding of the formulas in double precision.
#pragma once

#include "models.h"

namespace driver {

inline int moments_of(const bnb::OptimizerSettings& s) {
    switch (s.algorithm) {
    case bnb::kAdam:
        return s.amsgrad ? 3 : 2;
    case bnb::kAdEMAMix:
        return 3;
    case bnb::kRMSprop:
        return 1 + (s.beta2 > 0.0) + (s.centered != 0);
    default:
        return 1;
    }
}

inline bool decouples(const bnb::OptimizerSettings& s) {
    return s.decoupled_weight_decay && (s.algorithm == bnb::kAdam || s.algorithm == bnb::kAdEMAMix || s.algorithm == bnb::kLion);
}

// The moments of an algorithm that are never negative.
inline bool is_unsigned(const bnb::OptimizerSettings& s, int moment) {
    return (s.algorithm == bnb::kAdam && moment > 0) || (s.algorithm == bnb::kAdEMAMix && moment == 2) ||
           (s.algorithm == bnb::kRMSprop && moment == 0) || s.algorithm == bnb::kAdagrad;
}

// One parameter with its gradient and moments: floats, or codes with their statistics.
struct Parameter {
    Elements p, g;
    std::vector<Buffer<float>> floats, absmax;
    std::vector<Buffer<uint8_t>> codes;

    Parameter(Random& random, const bnb::OptimizerSettings& s, int64_t n, int g_dtype)
        : p(elements(random, n, int(s.dtype))), g(elements(random, n, g_dtype)) {
        for (int k = 0; k < moments_of(s); ++k) {
            floats.emplace_back(n);
            codes.emplace_back(n);
            absmax.emplace_back(blocks_of(n, 256));
            // Not near zero, and the mean of a centred algorithm below its deviation: a quotient of moments would have no bounded error there.
            const float size = s.centered && k > 0 ? 0.1f : 1.0f;
            for (int64_t i = 0; i < n; ++i) {
                floats[size_t(k)][i] = is_unsigned(s, k) ? float(random.uniform()) + 0.5f : random.normal() * 0.3f * size;
                codes[size_t(k)][i] = uint8_t(is_unsigned(s, k) ? 128 + random.below(128) : 64 + random.below(192));
            }
            for (int64_t b = 0; b < absmax.back().size(); ++b)
                absmax.back()[b] = float(0.5 + random.uniform()) * size;
        }
    }
    double moment(const bnb::OptimizerSettings& s, int k, int64_t i) const {
        return s.qmaps[0] == nullptr ? floats[size_t(k)][i] : double(s.qmaps[k][codes[size_t(k)][i]] * absmax[size_t(k)][i / 256]);
    }
};

// How far a stored moment may be from its exact value: the distance to the next code, which may be the one with its sign, or to the block's scale.
inline double moment_tolerance(const bnb::OptimizerSettings& s, const Parameter& after, int k, int64_t i, double exact) {
    const double rounding = 1e-5 * std::fabs(exact) + 1e-6;
    if (s.qmaps[0] == nullptr)
        return rounding;
    const int code = after.codes[size_t(k)][i];
    const float* table = s.qmaps[k];
    const double below = code > 0 ? table[code] - table[code - 1] : table[0] + 1.0, above = code < 255 ? table[code + 1] - table[code] : 0.0;
    return std::max(below, above) * after.absmax[size_t(k)][i / 256] + rounding;
}

inline void check_optimizer_case(const Library& lib, Random& random, bnb::OptimizerSettings s, bool in_8bit) {
    const int moments = moments_of(s);
    std::vector<std::vector<float>> tables;
    for (int k = 0; k < moments; ++k)
        tables.push_back(code_table(!is_unsigned(s, k)));
    for (int k = 0; in_8bit && k < moments; ++k)
        s.qmaps[k] = tables[size_t(k)].data();

    const int64_t sizes[] = {1, 255, 0, 256, 257, 5000};
    std::vector<Parameter> before;
    for (const int64_t n : sizes)
        before.emplace_back(random, s, n, random.below(2) ? int(s.dtype) : kDTypes[random.below(3)]);
    std::vector<Parameter> after = before;

    std::vector<int64_t> dtypes;
    std::vector<void*> p, stored;
    std::vector<const void*> g;
    std::vector<float*> absmax;
    Buffer<float> norms(int64_t(after.size()));
    for (Parameter& parameter : after) {
        p.push_back(parameter.p.data());
        g.push_back(parameter.g.data());
        dtypes.push_back(parameter.g.dtype);
        for (int k = 0; k < moments; ++k) {
            stored.push_back(in_8bit ? static_cast<void*>(parameter.codes[size_t(k)].data()) : parameter.floats[size_t(k)].data());
            absmax.push_back(parameter.absmax[size_t(k)].data());
        }
    }
    const bnb::OptimizerTensors tensors{int64_t(after.size()), sizes,         p.data(),     g.data(), dtypes.data(),
                                        stored.data(),         absmax.data(), norms.data(), nullptr};
    long wrong_p = lib.cpu_optimizer_step(&tensors, &s, 0) != 0, wrong_moments = 0;

    for (size_t t = 0; t < before.size(); ++t) {
        const Parameter &old = before[t], &now = after[t];
        std::vector<double> direction(size_t(old.p.n)), value(size_t(old.p.n));
        double factor = 1.0, squares = 0.0, squares_of_p = 0.0;
        for (int64_t i = 0; i < old.p.n; ++i) {
            double m[3] = {}, gradient = old.g[i] * s.gnorm_scale;
            for (int k = 0; k < moments; ++k)
                m[k] = old.moment(s, k, i);
            value[size_t(i)] = old.p[i];
            if (decouples(s))
                value[size_t(i)] *= 1.0 - s.lr * s.weight_decay;
            else
                gradient += s.weight_decay * old.p[i];
            direction[size_t(i)] = direction_of(s, gradient, m, factor);
            squares += direction[size_t(i)] * direction[size_t(i)] * factor * factor;
            squares_of_p += value[size_t(i)] * value[size_t(i)];
            for (int k = 0; k < moments; ++k)
                wrong_moments += !(std::fabs(now.moment(s, k, i) - m[k]) <= moment_tolerance(s, now, k, i, m[k]));
        }
        double scale = 1.0;
        if (s.max_unorm > 0.0 && old.p.n > 0) {
            const double norm = std::sqrt(squares), limit = s.max_unorm * (s.param_norm >= 0.0 ? s.param_norm : std::sqrt(squares_of_p));
            wrong_p += std::fabs(norms[int64_t(t)] - norm) > 1e-4 * norm;
            scale = norm > limit && limit > 0.0 ? limit / norm : 1.0;
        }
        for (int64_t i = 0; i < old.p.n; ++i) {
            const double expected = value[size_t(i)] - s.lr * factor * scale * direction[size_t(i)];
            const double allowed = rounding_of(int(s.dtype)) * 1.01 * std::fabs(expected) + 2e-5 * (std::fabs(value[size_t(i)]) + s.lr) + 1e-7;
            wrong_p += !(std::fabs(now.p[i] - expected) <= allowed);
        }
        wrong_p += !now.p.bytes.guard_is_whole();
        for (int k = 0; k < moments; ++k)
            wrong_moments +=
                !now.floats[size_t(k)].guard_is_whole() || !now.codes[size_t(k)].guard_is_whole() || !now.absmax[size_t(k)].guard_is_whole();
    }
    expect(wrong_p == 0 && wrong_moments == 0, "optimizer %ld in %d bits: %ld parameters and %ld moments wrong, %s, decay %g, limit %g, step %ld",
           long(s.algorithm), in_8bit ? 8 : 32, wrong_p, wrong_moments, kDTypeNames[s.dtype], s.weight_decay, s.max_unorm, long(s.step));
}

inline bnb::OptimizerSettings drawn_settings(Random& random, int64_t algorithm, int64_t dtype) {
    bnb::OptimizerSettings s{};
    s.algorithm = algorithm, s.dtype = dtype, s.step = 1 + random.below(3);
    s.lr = 0.01, s.beta1 = 0.9, s.beta2 = algorithm == bnb::kMomentum ? 0.25 : 0.99, s.beta3 = 0.999, s.alpha = 2.0, s.eps = 1e-6;
    s.weight_decay = random.below(2) ? 0.05 : 0.0;
    s.gnorm_scale = random.below(2) ? 1.0 : 0.5;
    s.mean_correction = 1.0 - std::pow(s.beta1, double(s.step)), s.root_correction = std::sqrt(1.0 - std::pow(s.beta2, double(s.step)));
    s.max_unorm = random.below(3) ? 0.0 : 0.02, s.param_norm = random.below(2) ? -1.0 : 3.0;
    s.decoupled_weight_decay = random.below(2);
    s.nesterov = algorithm == bnb::kMomentum && random.below(2);
    s.amsgrad = algorithm == bnb::kAdam && random.below(2);
    s.centered = algorithm == bnb::kRMSprop && random.below(2);
    if (algorithm == bnb::kRMSprop && random.below(2))
        s.beta2 = 0.0;
    return s;
}

inline void check_optimizers(const Library& lib, Random& random) {
    for (int64_t algorithm = bnb::kAdam; algorithm <= bnb::kAdagrad; ++algorithm)
        for (const int dtype : kDTypes)
            for (int repeat = 0; repeat < 6; ++repeat)
                check_optimizer_case(lib, random, drawn_settings(random, algorithm, dtype), repeat % 2 != 0);
}

} // namespace driver
