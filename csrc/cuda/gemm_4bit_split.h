// The second half of a product whose sums were split: adds up the parts in a fixed order, and the bias.
#pragma once

#include "device.h"

namespace bnb {
namespace {

constexpr int kSumThreads = 256;

// partial[splits, M, width]
template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    add_partial_sums(const float* __restrict__ partial, int splits, const T* __restrict__ bias, T* __restrict__ out, int64_t count, int64_t width) {
    for (int64_t i = global_thread(); i < count; i += global_threads()) {
        float sum = bias == nullptr ? 0.0f : widen(bias[i % width]);
#pragma unroll 4
        for (int split = 0; split < splits; ++split)
            sum += load_once(partial + split * count + i);
        out[i] = narrow<T>(sum);
    }
}

template <typename T> int32_t launch_add_partial_sums(const GemmArgs4bit& args, const float* partial, int splits, int64_t width, Stream stream) {
    constexpr int64_t most_blocks = 4096;
    const int64_t count = args.M * width, blocks = divide_up(count, kSumThreads);
    return launch(add_partial_sums<T>, dim3(unsigned(blocks < most_blocks ? blocks : most_blocks)), dim3(kSumThreads), 0, stream, partial, splits,
                  static_cast<const T*>(args.bias), static_cast<T*>(args.out), count, width);
}

} // namespace
} // namespace bnb
