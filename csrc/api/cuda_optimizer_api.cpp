// Optimizers and paged memory on the GPU: the checks of arguments, and the calls of the launchers.
#include "cuda_optimizer_api.h"
#include "cuda_call.h"
#include "optimizer_arguments.h"

#include "../common/status.h"

namespace bnb {
namespace {

int64_t units_of(const OptimizerTensors& tensors) {
    int64_t units = 0;
    for (int64_t t = 0; t < tensors.count; ++t)
        units += optimizer_units(tensors.sizes[t]);
    return units;
}

OptimizerLaunch launch_of(const OptimizerTensors& tensors, const OptimizerSettings& settings, void* workspace) {
    OptimizerLaunch job{};
    job.tensors = &tensors;
    job.variant = variant_of(settings);
    job.scalars = scalars_of(settings);
    job.limit = limit_of(settings);
    job.dtype = DType(settings.dtype);
    job.step = uint32_t(settings.step);
    for (int k = 0; k < kMostMoments; ++k)
        job.qmaps[k] = settings.qmaps[k];
    if (workspace != nullptr) {
        job.squares = static_cast<OptimizerSquares*>(workspace);
        job.scales = reinterpret_cast<float*>(job.squares + units_of(tensors));
    }
    return job;
}

} // namespace
} // namespace bnb

using namespace bnb;

int64_t bnb_cuda_optimizer_workspace(const OptimizerTensors* tensors) {
    if (tensors == nullptr || tensors->count <= 0 || tensors->sizes == nullptr)
        return 0;
    return units_of(*tensors) * int64_t(sizeof(OptimizerSquares)) + tensors->count * int64_t(sizeof(float));
}

int32_t bnb_cuda_optimizer_step(const OptimizerTensors* tensors, const OptimizerSettings* settings, void* workspace, int64_t workspace_bytes,
                                int32_t device, void* stream) {
    if (tensors == nullptr || settings == nullptr || !are_settings(*settings) || !are_tensors(*tensors, *settings))
        return kBadArgument;
    const bool has_limit = settings->max_unorm > 0.0;
    if (has_limit && (workspace == nullptr || workspace_bytes < bnb_cuda_optimizer_workspace(tensors)))
        return kBadArgument;
    const OptimizerLaunch job = launch_of(*tensors, *settings, has_limit ? workspace : nullptr);
    return on_device(device, settings->qmaps[0] != nullptr ? launch_optimizer_step_8bit : launch_optimizer_step_32bit, job, stream);
}

int32_t bnb_cuda_prefetch_managed(void* p, int64_t bytes, int32_t to, int32_t device, void* stream) {
    if (!is_count(bytes) || (p == nullptr && bytes > 0))
        return kBadArgument;
    const DeviceGuard guard(device);
    return guard.status() != kOk || bytes == 0 ? guard.status() : prefetch_managed(p, size_t(bytes), to, stream);
}

int32_t bnb_cuda_free_managed(void* p) { return free_managed(p); }
