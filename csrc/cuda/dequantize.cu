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

// Where values come from: codes, the values that codes stand for, and the scales of blocks. A block of threads keeps the values in shared memory.
template <bool nested> struct FourBits {
    static constexpr int kBits = 4;
    struct Levels {
        float value[16];
    };
    const uint8_t* codes;
    BlockScales scales;
    QuantType quant_type;

    __device__ __forceinline__ float level(int i) const { return (quant_type == kNF4 ? nf4_levels : fp4_levels).value[i]; }
    __device__ __forceinline__ float scale(int64_t block) const { return scale_of_block<nested>(scales, block); }
    static __device__ __forceinline__ int code(const uint8_t* codes, int64_t i) { return get_nibble(codes, i); }
};

struct EightBits {
    static constexpr int kBits = 8;
    struct Levels {
        float value[256];
    };
    const uint8_t* codes;
    const float* absmax;
    const float* values;

    __device__ __forceinline__ float level(int i) const { return values[i]; }
    __device__ __forceinline__ float scale(int64_t block) const { return __ldg(absmax + block); }
    static __device__ __forceinline__ int code(const uint8_t* codes, int64_t i) { return codes[i]; }
};

template <typename Source> __device__ __forceinline__ const float* shared_levels(const Source& source) {
    using Levels = typename Source::Levels;
    Levels& levels = shared_variable<Levels>();
    for (int i = int(threadIdx.x); i < int(sizeof(Levels) / sizeof(float)); i += kThreads)
        levels.value[i] = source.level(i);
    __syncthreads();
    return levels.value;
}

// Vectors are aligned, and blocks are powers of two of at least a vector.
template <typename T, typename Source>
__global__ void __launch_bounds__(kThreads, 4) dequantize_vectors(Source source, T* __restrict__ output, int64_t n, int block_shift) {
    constexpr int count = kPerVector<T>, packed_bytes = count * Source::kBits / 8, apart = kThreads * count;
    const float* levels = shared_levels(source);
    const int64_t begin = int64_t(blockIdx.x) * kVectorsPerThread * apart;
    const int64_t first = begin + int64_t(threadIdx.x) * count;
    if (begin + kVectorsPerThread * apart > n) { // the last part of the tensor
        for (int64_t i = first; i < n; i += apart)
            for (int64_t k = i; k < i + count && k < n; ++k)
                output[k] = narrow<T>(__fmul_rn(levels[Source::code(source.codes, k)], source.scale(k >> block_shift)));
        return;
    }
    Vector<uint8_t, packed_bytes> packed[kVectorsPerThread];
    float scales[kVectorsPerThread];
#pragma unroll
    for (int step = 0; step < kVectorsPerThread; ++step) {
        const int64_t i = first + step * apart;
        packed[step] = load_once(reinterpret_cast<const Vector<uint8_t, packed_bytes>*>(source.codes + i * Source::kBits / 8));
        scales[step] = source.scale(i >> block_shift);
    }
#pragma unroll
    for (int step = 0; step < kVectorsPerThread; ++step) {
        float values[count];
#pragma unroll
        for (int k = 0; k < count; ++k)
            values[k] = __fmul_rn(levels[Source::code(packed[step].value, k)], scales[step]);
        store_once(reinterpret_cast<Vector<T, count>*>(output + first + step * apart), narrow_vector<T>(values));
    }
}

// Any block size and any alignment: one element at a time.
template <typename T, typename Source>
__global__ void __launch_bounds__(kThreads) dequantize_elements(Source source, T* __restrict__ output, int64_t n, BlockOf block_of) {
    const float* levels = shared_levels(source);
    const int64_t i = global_thread();
    if (i < n)
        output[i] = narrow<T>(__fmul_rn(levels[Source::code(source.codes, i)], source.scale(block_of(i))));
}

template <typename Source> int32_t run(const Source& source, DType dtype, void* result, int64_t n, int64_t blocksize, Stream stream) {
    return with_element_type(dtype, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        constexpr int count = kPerVector<T>;
        T* output = static_cast<T*>(result);
        const BlockOf block_of(blocksize);
        if (block_of.shift >= 0 && blocksize >= count && is_aligned(output, 16) && is_aligned(source.codes, count * Source::kBits / 8)) {
            const int64_t grid = divide_up(n, int64_t(kThreads) * kVectorsPerThread * count);
            return launch(dequantize_vectors<T, Source>, unsigned(grid), kThreads, 0, stream, source, output, n, block_of.shift);
        }
        return launch(dequantize_elements<T, Source>, unsigned(divide_up(n, kThreads)), kThreads, 0, stream, source, output, n, block_of);
    });
}

} // namespace

int32_t launch_dequantize_4bit(const DequantizeArgs4bit& args, Stream stream) {
    if (args.scales.absmax_8bit != nullptr)
        return run(FourBits<true>{args.input, args.scales, args.quant_type}, args.dtype, args.output, args.n, args.blocksize, stream);
    return run(FourBits<false>{args.input, args.scales, args.quant_type}, args.dtype, args.output, args.n, args.blocksize, stream);
}

int32_t launch_dequantize_blockwise(const DequantizeArgsBlockwise& args, Stream stream) {
    return run(EightBits{args.input, args.absmax, args.code}, args.dtype, args.output, args.n, args.blocksize, stream);
}

} // namespace bnb
