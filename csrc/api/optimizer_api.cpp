// Optimizers: argument checks, the scalars of a step, the split over threads, and the call into the kernels.
#include "api.h"
#include "arguments.h"
#include "code_tables.h"

#include "../common/status.h"
#include "../cpu/dispatch.h"
#include "../cpu/optimizer.h"
#include "../cpu/scratch.h"
#include "../cpu/threads.h"

#include <cmath>

namespace bnb {
namespace {

// Blocks whose squares are summed up together, and which stay on one thread.
constexpr int64_t kBlocksPerChunk = 16;

bool is_algorithm(int64_t algorithm) { return algorithm >= kAdam && algorithm <= kAdagrad; }

int moments_of(const OptimizerSettings& settings) {
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

bool are_settings(const OptimizerSettings& settings) {
    if (!is_algorithm(settings.algorithm) || !is_dtype(int32_t(settings.dtype)) || settings.dtype != int32_t(settings.dtype) || settings.step < 1)
        return false;
    const int moments = moments_of(settings);
    for (int k = 1; k < moments; ++k)
        if ((settings.qmaps[k] == nullptr) != (settings.qmaps[0] == nullptr))
            return false;
    return true;
}

bool are_tensors(const OptimizerTensors& tensors, const OptimizerSettings& settings) {
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

OptimizerScalars scalars_of(const OptimizerSettings& s, double factor) {
    const bool decoupled = s.decoupled_weight_decay && (s.algorithm == kAdam || s.algorithm == kAdEMAMix || s.algorithm == kLion);
    const bool decays = s.weight_decay > 0.0;
    OptimizerScalars scalars{};
    scalars.gnorm_scale = float(s.gnorm_scale);
    scalars.kept = decays && decoupled ? float(1.0 - s.lr * s.weight_decay) : 1.0f;
    scalars.decay = decays && !decoupled ? float(s.weight_decay) : 0.0f;
    scalars.step_size = float(-s.lr * factor);
    scalars.beta1 = float(s.beta1), scalars.rest1 = float(1.0 - s.beta1);
    scalars.beta2 = float(s.beta2), scalars.rest2 = float(1.0 - s.beta2);
    scalars.beta3 = float(s.beta3), scalars.rest3 = float(1.0 - s.beta3);
    scalars.alpha = float(s.alpha);
    scalars.eps = float(s.algorithm == kAdam ? s.root_correction * s.eps : s.eps);
    scalars.mean_correction = float(s.mean_correction), scalars.root_correction = float(s.root_correction);
    scalars.first_step = s.step == 1, scalars.nesterov = s.nesterov != 0, scalars.skips_zeros = s.skip_zeros != 0;
    return scalars;
}

// The arguments that all parameters share. False: a code is not ascending. `midpoints` is memory for them.
bool prepare(const OptimizerSettings& settings, double factor, int64_t elements, float (*midpoints)[255], OptimizerArgs& args) {
    static thread_local CellCache cell_caches[kMostMoments];
    static thread_local LineCache line_caches[kMostMoments];
    args.scalars = scalars_of(settings, factor);
    args.algorithm = OptimizerAlgorithm(settings.algorithm);
    args.dtype = DType(settings.dtype);
    args.moments = moments_of(settings);
    args.has_largest = settings.amsgrad != 0;
    args.has_momentum = settings.beta2 > 0.0;
    args.has_mean = settings.centered != 0;
    args.in_8bit = settings.qmaps[0] != nullptr;
    args.step = uint32_t(settings.step);
    for (int k = 0; args.in_8bit && k < args.moments; ++k) {
        const float* values = settings.qmaps[k];
        if (!is_ascending(values))
            return false;
        find_midpoints(values, midpoints[k]);
        uint32_t negatives = 0;
        for (int i = 0; i < 256; ++i)
            negatives += float_bits(values[i]) >> 31;
        negatives &= 0xffu; // all of one sign: none
        const CellTable* cells = cell_caches[k].find(midpoints[k], elements);
        const LineTable* lines = cells != nullptr ? line_caches[k].find(midpoints[k], elements) : nullptr;
        const bool agrees = lines != nullptr && uint32_t(lines->negatives) == negatives;
        args.codes[k] = {values, midpoints[k], cells, agrees ? lines : nullptr, negatives};
    }
    return true;
}

OptimizerTensor tensor_of(const OptimizerTensors& tensors, int64_t t, int moments, bool in_8bit) {
    OptimizerTensor tensor{};
    tensor.p = tensors.p[t], tensor.g = tensors.g[t], tensor.n = tensors.sizes[t], tensor.g_dtype = DType(tensors.g_dtypes[t]);
    tensor.moments = tensors.moments + t * moments;
    tensor.absmax = in_8bit ? tensors.absmax + t * moments : nullptr;
    tensor.scale = 1.0f;
    tensor.rounds_randomly = tensors.seeds != nullptr;
    tensor.seed = tensor.rounds_randomly ? uint32_t(tensors.seeds[t]) : 0;
    return tensor;
}

int64_t blocks_of(int64_t n) { return ceil_divide(n, kOptimizerBlocksize); }
int64_t chunks_of(int64_t n) { return ceil_divide(n, kOptimizerBlocksize * kBlocksPerChunk); }

// Deals the blocks of all parameters out to threads as one line. Calls function(parameter, chunk, first block, last block) for every chunk, numbered
// over all parameters. A chunk belongs to the thread that its first block falls to.
template <typename Function> void for_chunks(const OptimizerTensors& tensors, int32_t threads, const Function& function) {
    int64_t blocks = 0;
    for (int64_t t = 0; t < tensors.count; ++t)
        blocks += blocks_of(tensors.sizes[t]);
    parallel_for(blocks, kElementsPerThread / kOptimizerBlocksize, threads, [&](int64_t begin, int64_t end, int) {
        int64_t line = 0, number = 0; // of the parameter's first block and first chunk
        for (int64_t t = 0; t < tensors.count && line < end; ++t) {
            const int64_t length = blocks_of(tensors.sizes[t]), chunks = chunks_of(tensors.sizes[t]);
            for (int64_t chunk = line < begin ? ceil_divide(begin - line, kBlocksPerChunk) : 0; chunk < chunks; ++chunk) {
                const int64_t first = chunk * kBlocksPerChunk;
                if (line + first >= end)
                    break;
                function(t, number + chunk, first, first + kBlocksPerChunk < length ? first + kBlocksPerChunk : length);
            }
            line += length;
            number += chunks;
        }
    });
}

// How much of each update the limit on its norm leaves. Norms are summed up in the order of the chunks, whatever thread measured them.
void find_scales(const OptimizerTensors& tensors, const OptimizerSettings& settings, double factor, const OptimizerSquares* squares, float* scales) {
    for (int64_t t = 0; t < tensors.count; ++t) {
        OptimizerSquares sum{0.0, 0.0};
        for (int64_t chunk = 0; chunk < chunks_of(tensors.sizes[t]); ++chunk, ++squares) {
            sum.update += squares->update;
            sum.p += squares->p;
        }
        const float norm = float(std::sqrt(sum.update)) * float(factor);
        const bool is_given = settings.param_norm >= 0.0;
        const float limit = is_given ? float(settings.max_unorm * settings.param_norm) : float(settings.max_unorm) * float(std::sqrt(sum.p));
        tensors.update_norms[t] = norm;
        scales[t] = norm > limit && limit > 0.0f ? limit / norm : 1.0f;
    }
}

} // namespace
} // namespace bnb

using namespace bnb;

int32_t bnb_cpu_optimizer_step(const OptimizerTensors* tensors, const OptimizerSettings* settings, int32_t threads) {
    if (tensors == nullptr || settings == nullptr || threads < 0 || !are_settings(*settings) || !are_tensors(*tensors, *settings))
        return kBadArgument;
    int64_t elements = 0, chunks = 0;
    for (int64_t t = 0; t < tensors->count; ++t) {
        elements += tensors->sizes[t];
        chunks += chunks_of(tensors->sizes[t]);
    }
    const bool has_limit = settings->max_unorm > 0.0;
    const double factor = settings->algorithm == kAdam ? settings->root_correction / settings->mean_correction : 1.0;
    float midpoints[kMostMoments][255];
    OptimizerArgs args{};
    if (!prepare(*settings, factor, elements, midpoints, args))
        return kBadCode;
    Scratch scratch(has_limit ? chunks * sizeof(OptimizerSquares) + tensors->count * sizeof(float) + 2 * Scratch::kAlignment : 0);
    auto* squares = static_cast<OptimizerSquares*>(has_limit ? scratch.take(chunks * sizeof(OptimizerSquares)) : nullptr);
    auto* scales = static_cast<float*>(has_limit ? scratch.take(tensors->count * sizeof(float)) : nullptr);
    if (has_limit && (squares == nullptr || scales == nullptr))
        return kOutOfMemory;

    const KernelTable& table = kernels();
    const auto tensor = [&](int64_t t) { return tensor_of(*tensors, t, args.moments, args.in_8bit); };
    if (has_limit) {
        for_chunks(*tensors, threads, [&](int64_t t, int64_t chunk, int64_t first, int64_t last) {
            squares[chunk] = table.optimizer_measure(args, tensor(t), first, last);
        });
        find_scales(*tensors, *settings, factor, squares, scales);
    }
    for_chunks(*tensors, threads, [&](int64_t t, int64_t, int64_t first, int64_t last) {
        OptimizerTensor one = tensor(t);
        if (has_limit)
            one.scale = scales[t];
        table.optimizer_step(args, one, first, last);
    });
    return kOk;
}
