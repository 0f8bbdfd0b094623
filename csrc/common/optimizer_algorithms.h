// The algorithms: from a gradient and the running moments, which it updates, the direction in which a parameter moves.
//
// The formulas, their sources and the order of their operations are those of bitsandbytes/backends/default/optimizers.py, so that results agree bit
// for bit: a product and a sum are fused exactly where PyTorch's own kernels fuse them.
//
// Written in the vocabulary of ../cpu/simd.h, which the includer chooses: vectors of a processor, or one element to a GPU's lane.
#pragma once

#include "optimizer.h"

#if !defined(BNB_ISA)
#error "include a vocabulary first: ../cpu/simd.h or ../cuda/one_element.h"
#endif

namespace bnb {
namespace BNB_ISA {

// An exponential moving average.
struct Average {
    F32 beta, rest;

    BNB_MEMBER Average(float beta, float rest) : beta(splat(beta)), rest(splat(rest)) {}

    BNB_MEMBER F32 of(F32 mean, F32 value) const { return fused(rest, value, mul(mean, beta)); }
    BNB_MEMBER F32 of_squares(F32 mean, F32 value) const { return fused(mul(rest, value), value, mul(mean, beta)); }
};

BNB_INLINE F32 larger(F32 a, F32 b) { return select(differ(a, a), a, max(a, b)); } // NaN if either is

template <bool kKeepsLargest> struct Adam {
    static constexpr int kMoments = kKeepsLargest ? 3 : 2;
    Average first, second;
    F32 eps;

    BNB_MEMBER explicit Adam(const OptimizerScalars& s) : first(s.beta1, s.rest1), second(s.beta2, s.rest2), eps(splat(s.eps)) {}

    BNB_MEMBER F32 direction(F32 g, F32* m) const {
        m[0] = first.of(m[0], g);
        m[1] = second.of_squares(m[1], g);
        if constexpr (kKeepsLargest)
            m[2] = larger(m[2], m[1]);
        return div(m[0], add(sqrt(m[kMoments - 1]), eps));
    }
};

struct AdEMAMix {
    static constexpr int kMoments = 3;
    Average fast, slow, second;
    F32 alpha, eps, mean_correction, root_correction;

    BNB_MEMBER explicit AdEMAMix(const OptimizerScalars& s)
        : fast(s.beta1, s.rest1), slow(s.beta3, s.rest3), second(s.beta2, s.rest2), alpha(splat(s.alpha)), eps(splat(s.eps)),
          mean_correction(splat(s.mean_correction)), root_correction(splat(s.root_correction)) {}

    BNB_MEMBER F32 direction(F32 g, F32* m) const {
        m[0] = fast.of(m[0], g);
        m[1] = slow.of(m[1], g);
        m[2] = second.of_squares(m[2], g);
        return div(fused(alpha, m[1], div(m[0], mean_correction)), add(div(sqrt(m[2]), root_correction), eps));
    }
};

struct Momentum {
    static constexpr int kMoments = 1;
    Average dampened;
    bool first_step, nesterov;

    BNB_MEMBER explicit Momentum(const OptimizerScalars& s) : dampened(s.beta1, s.rest2), first_step(s.first_step), nesterov(s.nesterov) {}

    BNB_MEMBER F32 direction(F32 g, F32* m) const {
        m[0] = first_step ? g : dampened.of(m[0], g);
        return nesterov ? fused(dampened.beta, m[0], g) : m[0];
    }
};

struct Lion {
    static constexpr int kMoments = 1;
    Average mixture, average;

    BNB_MEMBER explicit Lion(const OptimizerScalars& s) : mixture(s.beta1, s.rest1), average(s.beta2, s.rest2) {}

    BNB_MEMBER F32 direction(F32 g, F32* m) const {
        const F32 mixed = mixture.of(m[0], g), zero = splat(0.0f);
        m[0] = average.of(m[0], g);
        const F32 sign = select(less(zero, mixed), splat(1.0f), select(less(mixed, zero), splat(-1.0f), zero));
        return select(differ(mixed, mixed), mixed, sign);
    }
};

template <bool kHasMomentum, bool kHasMean> struct RMSprop {
    static constexpr int kMoments = 1 + kHasMomentum + kHasMean;
    Average average;
    F32 momentum, eps;

    BNB_MEMBER explicit RMSprop(const OptimizerScalars& s) : average(s.beta1, s.rest1), momentum(splat(s.beta2)), eps(splat(s.eps)) {}

    BNB_MEMBER F32 direction(F32 g, F32* m) const {
        m[0] = average.of_squares(m[0], g);
        F32 variance = m[0];
        if constexpr (kHasMean) {
            F32& mean = m[kMoments - 1];
            mean = average.of(mean, g);
            variance = larger(fused(mul(splat(-1.0f), mean), mean, variance), splat(0.0f));
        }
        const F32 update = div(g, add(sqrt(variance), eps));
        if constexpr (!kHasMomentum)
            return update;
        m[1] = add(mul(m[1], momentum), update);
        return m[1];
    }
};

struct Adagrad {
    static constexpr int kMoments = 1;
    F32 eps;

    BNB_MEMBER explicit Adagrad(const OptimizerScalars& s) : eps(splat(s.eps)) {}

    BNB_MEMBER F32 direction(F32 g, F32* m) const {
        m[0] = fused(g, g, m[0]);
        return div(g, add(sqrt(m[0]), eps));
    }
};

// How all algorithms move a parameter. What is the same for every element of it is worked out once.
template <typename Algorithm> struct Movement {
    Algorithm algorithm;
    F32 gnorm_scale, kept, decay, step_size;
    bool adds_decay;

    BNB_MEMBER explicit Movement(const OptimizerScalars& s)
        : algorithm(s), gnorm_scale(splat(s.gnorm_scale)), kept(splat(s.kept)), decay(splat(s.decay)), step_size(splat(s.step_size)),
          adds_decay(s.decay != 0.0f) {}

    // The direction of elements; their new moments are left in `moments`.
    BNB_MEMBER F32 direction(F32 raw_gradient, F32 value, F32* moments) const {
        F32 g = mul(raw_gradient, gnorm_scale);
        if (adds_decay)
            g = fused(decay, value, g);
        return algorithm.direction(g, moments);
    }

    // Where they go; `scale` is what the limit on the norm leaves of the update.
    BNB_MEMBER F32 moved(F32 value, F32 update, F32 scale) const { return fused(step_size, mul(update, scale), mul(value, kept)); }
};

// Calls function with a null pointer to the algorithm that the variant names.
template <typename Function> static inline void with_algorithm(const OptimizerVariant& variant, const Function& function) {
    switch (variant.algorithm) {
    case kAdam:
        return variant.has_largest ? function(static_cast<Adam<true>*>(nullptr)) : function(static_cast<Adam<false>*>(nullptr));
    case kAdEMAMix:
        return function(static_cast<AdEMAMix*>(nullptr));
    case kMomentum:
        return function(static_cast<Momentum*>(nullptr));
    case kLion:
        return function(static_cast<Lion*>(nullptr));
    case kRMSprop:
        if (variant.has_momentum)
            return variant.has_mean ? function(static_cast<RMSprop<true, true>*>(nullptr)) : function(static_cast<RMSprop<true, false>*>(nullptr));
        return variant.has_mean ? function(static_cast<RMSprop<false, true>*>(nullptr)) : function(static_cast<RMSprop<false, false>*>(nullptr));
    case kAdagrad:
        return function(static_cast<Adagrad*>(nullptr));
    }
}

} // namespace BNB_ISA
} // namespace bnb
