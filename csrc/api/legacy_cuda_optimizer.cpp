// The C names of the published library for optimizers and paged memory on the GPU, for projects that call them through ctypes. Thin forms of the
// functions in cuda_optimizer_api.h on the device that is current, in its default stream. They return nothing: where they cannot do their work
// nothing changes, and bnb_cuda_last_error() may say why.
#include "cuda_optimizer_api.h"

#include "../common/types.h"
#include "../cuda/kernels.h"

#include <cmath>

using namespace bnb;

namespace {

struct Algorithm {
    OptimizerAlgorithm number;
    bool has_two_states, has_two_rows, has_beta2;
};

constexpr Algorithm kAdamAlgorithm{kAdam, true, false, true}, kAdEMAMixAlgorithm{kAdEMAMix, true, true, true},
    kMomentumAlgorithm{kMomentum, false, false, false}, kRMSpropAlgorithm{kRMSprop, false, false, false},
    kAdagradAlgorithm{kAdagrad, false, false, true}, kLionAlgorithm{kLion, false, false, true};

struct Scalars {
    float beta1, beta2, beta3, alpha, eps, weight_decay;
    int32_t step;
    float lr, gnorm_scale;
    bool skip_zeros;
};

OptimizerSettings settings_of(const Algorithm& algorithm, DType dtype, const Scalars& s) {
    OptimizerSettings settings{};
    settings.algorithm = algorithm.number, settings.dtype = dtype, settings.step = s.step;
    settings.lr = s.lr, settings.beta1 = s.beta1, settings.beta2 = algorithm.has_beta2 ? s.beta2 : 0.0f, settings.beta3 = s.beta3;
    settings.alpha = s.alpha, settings.eps = s.eps, settings.weight_decay = s.weight_decay, settings.gnorm_scale = s.gnorm_scale;
    settings.mean_correction = 1.0 - std::pow(double(s.beta1), s.step);
    settings.root_correction = std::sqrt(1.0 - std::pow(double(s.beta2), s.step));
    settings.decoupled_weight_decay = 1, settings.skip_zeros = s.skip_zeros;
    return settings;
}

// One parameter with its states, and what the structure of the interface points to.
template <typename Element> struct Parameter {
    int64_t size, dtype;
    void* p;
    const void* g;
    void* moments[kMostMoments];
    float* absmax[kMostMoments];

    Parameter(const Algorithm& algorithm, DType dtype, void* p, const void* g, Element* state1, Element* state2, int32_t n)
        : size(n), dtype(dtype), p(p), g(g), moments{}, absmax{} {
        int count = 0;
        moments[count++] = state1;
        if (algorithm.has_two_rows)
            moments[count++] = state1 + n;
        if (algorithm.has_two_states)
            moments[count++] = state2;
    }

    OptimizerTensors tensors(float* norm) { return {1, &size, &p, &g, &dtype, moments, absmax, norm, nullptr}; }
};

void step_32bit(const Algorithm& algorithm, DType dtype, void* g, void* p, float* state1, float* state2, float* unorm, float max_unorm,
                float param_norm, const Scalars& s, int32_t n) {
    if (n < 0 || s.step < 1)
        return;
    Parameter<float> parameter(algorithm, dtype, p, g, state1, state2, n);
    const OptimizerTensors tensors = parameter.tensors(unorm);
    OptimizerSettings settings = settings_of(algorithm, dtype, s);
    settings.max_unorm = max_unorm;
    settings.param_norm = param_norm > 0.0f ? param_norm : 0.0f;
    const int64_t bytes = bnb_cuda_optimizer_workspace(&tensors);
    void* workspace = max_unorm > 0.0f ? allocate_in_order(size_t(bytes), nullptr) : nullptr;
    bnb_cuda_optimizer_step(&tensors, &settings, workspace, bytes, kCurrentDevice, nullptr);
    if (workspace != nullptr)
        free_in_order(workspace, nullptr);
}

void step_8bit(const Algorithm& algorithm, DType dtype, void* p, void* g, uint8_t* state1, uint8_t* state2, const Scalars& s, float* qmap1,
               float* qmap2, float* absmax1, float* absmax2, int32_t n) {
    if (n < 0 || s.step < 1 || qmap1 == nullptr)
        return;
    Parameter<uint8_t> parameter(algorithm, dtype, p, g, state1, state2, n);
    OptimizerSettings settings = settings_of(algorithm, dtype, s);
    int count = 0;
    const auto add = [&](float* qmap, float* absmax) {
        settings.qmaps[count] = qmap;
        parameter.absmax[count++] = absmax;
    };
    add(qmap1, absmax1);
    if (algorithm.has_two_rows)
        add(qmap1, absmax1 + (n + kOptimizerBlocksize - 1) / kOptimizerBlocksize);
    if (algorithm.has_two_states)
        add(qmap2, absmax2);
    const OptimizerTensors tensors = parameter.tensors(nullptr);
    bnb_cuda_optimizer_step(&tensors, &settings, nullptr, 0, kCurrentDevice, nullptr);
}

} // namespace

#define BNB_STEP_32BIT(name, algorithm, suffix, dtype)                                                                                               \
    BNB_API void c##name##32bit_grad_##suffix(void* g, void* p, float* state1, float* state2, float* unorm, float max_unorm, float param_norm,       \
                                              float beta1, float beta2, float beta3, float alpha, float eps, float weight_decay, int32_t step,       \
                                              float lr, float gnorm_scale, bool skip_zeros, int32_t n) {                                             \
        step_32bit(algorithm, dtype, g, p, state1, state2, unorm, max_unorm, param_norm,                                                             \
                   {beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale, skip_zeros}, n);                                           \
    }

#define BNB_STEP_8BIT(name, algorithm, suffix, dtype)                                                                                                \
    BNB_API void c##name##_8bit_blockwise_grad_##suffix(void* p, void* g, uint8_t* state1, uint8_t* state2, float beta1, float beta2, float beta3,   \
                                                        float alpha, float eps, int32_t step, float lr, float* qmap1, float* qmap2, float* absmax1,  \
                                                        float* absmax2, float weight_decay, float gnorm_scale, bool skip_zeros, int32_t n) {         \
        step_8bit(algorithm, dtype, p, g, state1, state2, {beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale, skip_zeros}, qmap1, \
                  qmap2, absmax1, absmax2, n);                                                                                                       \
    }

#define BNB_EACH_DTYPE(X, name, algorithm) X(name, algorithm, fp32, kFloat32) X(name, algorithm, fp16, kFloat16) X(name, algorithm, bf16, kBFloat16)
#define BNB_EACH_OLD_DTYPE(X, name, algorithm) X(name, algorithm, 32, kFloat32) X(name, algorithm, 16, kFloat16)

BNB_EACH_DTYPE(BNB_STEP_32BIT, adam, kAdamAlgorithm)
BNB_EACH_DTYPE(BNB_STEP_32BIT, ademamix, kAdEMAMixAlgorithm)
BNB_EACH_DTYPE(BNB_STEP_32BIT, lion, kLionAlgorithm)
BNB_EACH_OLD_DTYPE(BNB_STEP_32BIT, momentum, kMomentumAlgorithm)
BNB_EACH_OLD_DTYPE(BNB_STEP_32BIT, rmsprop, kRMSpropAlgorithm)
BNB_EACH_OLD_DTYPE(BNB_STEP_32BIT, adagrad, kAdagradAlgorithm)

BNB_EACH_DTYPE(BNB_STEP_8BIT, adam, kAdamAlgorithm)
BNB_EACH_DTYPE(BNB_STEP_8BIT, ademamix, kAdEMAMixAlgorithm)
BNB_EACH_DTYPE(BNB_STEP_8BIT, lion, kLionAlgorithm)
BNB_EACH_DTYPE(BNB_STEP_8BIT, momentum, kMomentumAlgorithm)
BNB_EACH_DTYPE(BNB_STEP_8BIT, rmsprop, kRMSpropAlgorithm)
BNB_EACH_DTYPE(BNB_STEP_8BIT, adagrad, kAdagradAlgorithm)

BNB_API void* cget_managed_ptr(size_t bytes) { return allocate_managed(bytes); }

BNB_API void cprefetch(void* p, size_t bytes, int32_t device) { prefetch_managed(p, bytes, device, nullptr); }

BNB_API void cfill_fp32(float* a, float*, float value, int64_t n) {
    if (a != nullptr && n > 0)
        launch_elementwise(Elementwise::kFill, a, nullptr, value, n, nullptr);
}

BNB_API void cfill_uint8(uint8_t* a, uint8_t*, uint8_t value, int64_t n) {
    if (a != nullptr && n > 0)
        launch_fill_bytes(a, value, n, nullptr);
}

BNB_API void carange_fp32(float* a, float*, float, int64_t n) {
    if (a != nullptr && n > 0)
        launch_elementwise(Elementwise::kCount, a, nullptr, 0.0f, n, nullptr);
}

BNB_API void c_mul_fp32(float* a, float* b, float, int64_t n) {
    if (a != nullptr && b != nullptr && n > 0)
        launch_elementwise(Elementwise::kMultiply, a, b, 0.0f, n, nullptr);
}
