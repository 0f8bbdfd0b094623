// Fills the tables of parameters and launches the kernels; included by the files that build them.
#pragma once

#include "optimizer_kernel.h"

namespace bnb {
namespace BNB_ISA {

template <int kMoments> void take_states(States<kMoments, false>& states, const OptimizerTensors& tensors, int64_t t) {
    for (int k = 0; k < kMoments; ++k)
        states.moments[k] = static_cast<float*>(tensors.moments[t * kMoments + k]);
}

template <int kMoments> void take_states(States<kMoments, true>& states, const OptimizerTensors& tensors, int64_t t) {
    for (int k = 0; k < kMoments; ++k) {
        states.moments[k] = static_cast<uint8_t*>(tensors.moments[t * kMoments + k]);
        states.absmax[k] = tensors.absmax[t * kMoments + k];
    }
}

// Moments with one map share its tables. As much is laid out as the device has memory for.
inline size_t lay_out_codes(const float* const* qmaps, int moments, CodeTables& tables) {
    for (int k = 0; k < moments; ++k) {
        int number = 0;
        while (number < tables.count && tables.maps[number] != qmaps[k])
            ++number;
        tables.maps[number] = qmaps[k];
        tables.count = number < tables.count ? tables.count : number + 1;
        tables.of_moment[k] = number;
    }
    const auto bytes = [&](int copies, bool has_cells) {
        tables.copies = copies;
        tables.stride = uint32_t(copies) * sizeof(float);
        tables.has_cells = has_cells;
        return sizeof(float) * size_t(CodeTable::words(tables)) * size_t(tables.count);
    };
    const size_t limit = size_t(device_properties().shared_memory_limit);
    for (const int copies : {kWarpSize, 1})
        if (bytes(copies, true) <= limit)
            return bytes(copies, true);
    return bytes(1, false);
}

// The parameters from `first` on, as many as the table holds. Returns the first that is left.
template <typename Table> int64_t fill_table(const OptimizerTensors& tensors, int64_t first, Table& table) {
    table.args.count = 0;
    table.args.units = 0;
    int64_t t = first;
    for (; t < tensors.count && table.args.count < Table::kRoom; ++t) {
        auto& entry = table.entries[table.args.count++];
        entry.p = tensors.p[t], entry.g = tensors.g[t], entry.n = tensors.sizes[t];
        entry.g_dtype = DType(tensors.g_dtypes[t]);
        entry.seed = tensors.seeds == nullptr ? 0 : uint32_t(tensors.seeds[t]);
        entry.first_unit = table.args.units;
        take_states(entry.states, tensors, t);
        table.args.units += optimizer_units(entry.n);
    }
    return t;
}

template <typename Algorithm, bool in_8bit> int32_t launch_steps(const OptimizerLaunch& job, Stream stream) {
    constexpr int kMoments = Algorithm::kMoments, threads = kThreads<kMoments, in_8bit>;
    const OptimizerTensors& tensors = *job.tensors;
    StepTable<kMoments, in_8bit> table{};
    StepArgs& args = table.args;
    args.scalars = job.scalars, args.limit = job.limit, args.dtype = job.dtype, args.step = job.step;
    args.rounds_randomly = tensors.seeds != nullptr;
    args.squares = job.squares;
    const size_t shared_bytes = in_8bit ? lay_out_codes(job.qmaps, kMoments, args.codes) : 0;
    const int64_t most_blocks = int64_t(kBlocksPerMultiprocessor<kMoments, in_8bit>) * device_properties().multiprocessors;
    for (int64_t first = 0, behind = 0; first < tensors.count; first = behind) {
        behind = fill_table(tensors, first, table);
        const auto run = [&](auto kernel) {
            const dim3 grid(unsigned(args.units < most_blocks ? args.units : most_blocks));
            return args.units == 0 ? int32_t(kOk) : launch(kernel, grid, dim3(threads), shared_bytes, stream, table);
        };
        int32_t status = kOk;
        if (job.squares != nullptr) {
            args.scales = job.scales + first;
            args.norms = tensors.update_norms + first;
            status = run(step_kernel<Algorithm, in_8bit, true>);
            if (status == kOk)
                status = launch(limit_kernel<kMoments, in_8bit>, dim3(unsigned(args.count)), dim3(kLimitThreads), 0, stream, table);
        }
        if (status == kOk)
            status = run(step_kernel<Algorithm, in_8bit, false>);
        if (status != kOk)
            return status;
    }
    return kOk;
}

template <bool in_8bit> int32_t launch_optimizer(const OptimizerLaunch& job, Stream stream) {
    int32_t status = kOk;
    with_algorithm(job.variant, [&](auto* algorithm) { status = launch_steps<std::remove_pointer_t<decltype(algorithm)>, in_8bit>(job, stream); });
    return status;
}

} // namespace BNB_ISA
} // namespace bnb
