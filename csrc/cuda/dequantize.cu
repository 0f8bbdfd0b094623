// Dequantisation: y[i] = fl(level[code[i]] * absmax[i / blocksize]) in fp32, rounded once to the output type.
//
// Reads half a byte (4 bit) or a byte (8 bit) an element and writes 2 or 4, with the scales 2.56 bytes for NF4 in blocks of 64 to bfloat16: bound by
// memory as long as an element costs fewer than about 20 instructions. A lane makes one vector of 16 bytes at a time from the few packed bytes that
// hold it, so that the 32 stores of a warp are one run of memory; four such vectors, a block's width apart, keep enough loads in flight. A table of
// 16 floats lies in 16 different banks of shared memory, so that lookups never collide.
#include "block_scales.h"
#include "device.h"

#include "../common/quantize.h"

namespace bnb {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorsPerThread = 4;

__constant__ Levels16 fp4_levels = kFP4Levels;
__constant__ Levels16 nf4_levels = kNF4Levels;

__device__ __forceinline__ const Levels16& shared_levels(QuantType quant_type) {
    Levels16& levels = shared_variable<Levels16>();
    if (threadIdx.x < 16)
        levels.value[threadIdx.x] = (quant_type == kNF4 ? nf4_levels : fp4_levels).value[threadIdx.x];
    __syncthreads();
    return levels;
}

// Every vector lies in one block and is aligned.
template <typename T, bool nested>
__global__ void __launch_bounds__(kThreads)
    dequantize_4bit_vectors(const uint8_t* __restrict__ input, BlockScales scales, T* __restrict__ output, int64_t n, BlockOf block_of, QuantType quant_type) {
    constexpr int count = kPerVector<T>;
    const Levels16& levels = shared_levels(quant_type);
    const int64_t first = (int64_t(blockIdx.x) * kVectorsPerThread * kThreads + threadIdx.x) * count;
#pragma unroll
    for (int step = 0; step < kVectorsPerThread; ++step) {
        const int64_t i = first + int64_t(step) * kThreads * count;
        if (i >= n)
            return;
        const float scale = scale_of_block<nested>(scales, block_of(i));
        if (i + count > n) {
            for (int64_t k = i; k < n; ++k)
                output[k] = narrow<T>(__fmul_rn(levels.value[get_nibble(input, k)], scale));
            return;
        }
        const auto packed = load_once(reinterpret_cast<const Vector<uint8_t, count / 2>*>(input + i / 2));
        float values[count];
#pragma unroll
        for (int k = 0; k < count; ++k)
            values[k] = __fmul_rn(levels.value[get_nibble(packed.value, k)], scale);
        store_once(reinterpret_cast<Vector<T, count>*>(output + i), narrow_vector<T>(values));
    }
}

// Any block size and any alignment: one element at a time.
template <typename T, bool nested>
__global__ void __launch_bounds__(kThreads)
    dequantize_4bit_elements(const uint8_t* __restrict__ input, BlockScales scales, T* __restrict__ output, int64_t n, BlockOf block_of, QuantType quant_type) {
    const Levels16& levels = shared_levels(quant_type);
    const int64_t i = global_thread();
    if (i < n)
        output[i] = narrow<T>(__fmul_rn(levels.value[get_nibble(input, i)], scale_of_block<nested>(scales, block_of(i))));
}

template <typename T, bool nested> int32_t run_4bit(const DequantizeArgs4bit& args, Stream stream) {
    constexpr int count = kPerVector<T>;
    T* output = static_cast<T*>(args.output);
    const bool is_regular = args.blocksize % count == 0 && is_aligned(output, 16) && is_aligned(args.input, count / 2);
    const int64_t elements = is_regular ? int64_t(kThreads) * kVectorsPerThread * count : kThreads;
    return launch(is_regular ? dequantize_4bit_vectors<T, nested> : dequantize_4bit_elements<T, nested>, unsigned(divide_up(args.n, elements)), kThreads, 0,
                  stream, args.input, args.scales, output, args.n, BlockOf(args.blocksize), args.quant_type);
}

} // namespace

int32_t launch_dequantize_4bit(const DequantizeArgs4bit& args, Stream stream) {
    return with_element_type(args.dtype, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        return args.scales.absmax_8bit == nullptr ? run_4bit<T, false>(args, stream) : run_4bit<T, true>(args, stream);
    });
}

} // namespace bnb
