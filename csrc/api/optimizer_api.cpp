// Optimizers: the split over threads, and the calls into the kernels.
#include "api.h"
#include "code_tables.h"
#include "optimizer_arguments.h"

#include "../common/status.h"
#include "../cpu/dispatch.h"
#include "../cpu/optimizer.h"
#include "../cpu/scratch.h"
#include "../cpu/threads.h"

namespace bnb {
namespace {

// The arguments that all parameters share. False: a code is not ascending. `midpoints` is memory for them.
bool prepare(const OptimizerSettings& settings, int64_t elements, float (*midpoints)[255], OptimizerArgs& args) {
    static thread_local CellCache cell_caches[kMostMoments];
    static thread_local LineCache line_caches[kMostMoments];
    args.scalars = scalars_of(settings);
    args.variant = variant_of(settings);
    args.dtype = DType(settings.dtype);
    args.moments = moments_of(settings);
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

// Deals the blocks of all parameters out to threads as one line, in whole chunks. Calls function(parameter, chunk, first block, last block) for each
// stretch that lies in one parameter; it begins with this chunk, numbered over all parameters. Stretches are as long as they can be: called anew for
// every chunk, the kernel of an 8-bit step took a fifth longer where its data came from memory.
template <typename Function> void for_stretches(const OptimizerTensors& tensors, int32_t threads, const Function& function) {
    int64_t blocks = 0;
    for (int64_t t = 0; t < tensors.count; ++t)
        blocks += blocks_of(tensors.sizes[t]);
    parallel_for(blocks, kElementsPerThread / kOptimizerBlocksize, threads, [&](int64_t begin, int64_t end, int) {
        int64_t line = 0, number = 0; // of the parameter's first block and first chunk
        for (int64_t t = 0; t < tensors.count && line < end; ++t) {
            const int64_t length = blocks_of(tensors.sizes[t]);
            const auto block_at = [&](int64_t place) { // a chunk belongs to the thread that its first block falls to
                const int64_t block = place > line ? ceil_divide(place - line, kBlocksPerChunk) * kBlocksPerChunk : 0;
                return block < length ? block : length;
            };
            const int64_t first = block_at(begin), last = block_at(end);
            if (first < last)
                function(t, number + first / kBlocksPerChunk, first, last);
            line += length;
            number += chunks_of(tensors.sizes[t]);
        }
    });
}

// Norms are summed up in the order of the chunks, whatever thread measured them.
void find_scales(const OptimizerTensors& tensors, const OptimizerSettings& settings, const OptimizerSquares* squares, float* scales) {
    const OptimizerLimit limit = limit_of(settings);
    for (int64_t t = 0; t < tensors.count; ++t) {
        OptimizerSquares sum{0.0, 0.0};
        for (int64_t chunk = 0; chunk < chunks_of(tensors.sizes[t]); ++chunk, ++squares) {
            sum.update += squares->update;
            sum.p += squares->p;
        }
        const OptimizerLimited limited = limit_update(limit, sum);
        tensors.update_norms[t] = limited.norm;
        scales[t] = limited.scale;
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
    float midpoints[kMostMoments][255];
    OptimizerArgs args{};
    if (!prepare(*settings, elements, midpoints, args))
        return kBadCode;
    Scratch scratch(has_limit ? chunks * sizeof(OptimizerSquares) + tensors->count * sizeof(float) + 2 * Scratch::kAlignment : 0);
    auto* squares = static_cast<OptimizerSquares*>(has_limit ? scratch.take(chunks * sizeof(OptimizerSquares)) : nullptr);
    auto* scales = static_cast<float*>(has_limit ? scratch.take(tensors->count * sizeof(float)) : nullptr);
    if (has_limit && (squares == nullptr || scales == nullptr))
        return kOutOfMemory;

    const KernelTable& table = kernels();
    const auto tensor = [&](int64_t t) { return tensor_of(*tensors, t, args.moments, args.in_8bit); };
    if (has_limit) {
        for_stretches(*tensors, threads, [&](int64_t t, int64_t chunk, int64_t first, int64_t last) {
            table.optimizer_measure(args, tensor(t), first, last, squares + chunk);
        });
        find_scales(*tensors, *settings, squares, scales);
    }
    for_stretches(*tensors, threads, [&](int64_t t, int64_t, int64_t first, int64_t last) {
        OptimizerTensor one = tensor(t);
        if (has_limit)
            one.scale = scales[t];
        table.optimizer_step(args, one, first, last);
    });
    return kOk;
}
