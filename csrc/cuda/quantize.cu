// Quantisation: absmax = max |x| of a block, code of v = fl(x * fl(1 / absmax)) by the rules of common/quantize.h.
//
// Reads 2 or 4 bytes an element and writes half a byte (4 bit) or a byte (8 bit): 2.56 bytes for bfloat16 to NF4 in blocks of 64. At the rate of memory
// that leaves about 20 instructions for an element, so thresholds are not compared one by one; coders.h finds a code in one look-up. A lane holds 8
// neighbouring elements, loads 16 bytes at once and stores 4 or 8. A block of up to 256 elements lies in one warp, whose lanes exchange their maxima by
// shuffles: no barrier, no second read. A larger block is read twice by one warp, the second time from the caches.
#include "coders.h"
#include "device.h"

namespace bnb {
namespace {

constexpr int kThreads = 256;
constexpr int kGroup = 8;          // elements of a lane
constexpr int kGroupsAtOnce = 4;   // that a lane has under way
constexpr int kWarpElements = kGroup * 32;
constexpr int kBlocksAtOnce = 4; // that a multiprocessor has room for
// 8 bit: with fewer elements a multiprocessor searches them faster than it fills the tables of CellCoder (an estimate: 75 elements a thread).
constexpr int64_t kElementsWorthCells = 75 * kThreads * kBlocksAtOnce;

template <typename T> struct QuantizeKernelArgs {
    const T* input;
    const float* code; // of 8 bits
    float* absmax;
    uint8_t* output;
    int64_t n, blocksize;
};

// 8 elements of one lane; those behind the end are 0.
template <typename T> struct Group {
    Vector<T, kPerVector<T>> part[kGroup / kPerVector<T>];

    __device__ __forceinline__ void load(const T* input, int64_t i, int64_t n) {
        if (i + kGroup <= n) {
#pragma unroll
            for (int k = 0; k < kGroup / kPerVector<T>; ++k)
                part[k] = load_once(reinterpret_cast<const Vector<T, kPerVector<T>>*>(input + i) + k);
            return;
        }
#pragma unroll
        for (int k = 0; k < kGroup; ++k)
            part[k / kPerVector<T>].value[k % kPerVector<T>] = i + k < n ? input[i + k] : T{};
    }

    __device__ __forceinline__ float operator[](int k) const { return widen(part[k / kPerVector<T>].value[k % kPerVector<T>]); }

    __device__ __forceinline__ uint32_t largest_bits() const {
        uint32_t largest = 0;
#pragma unroll
        for (int k = 0; k < kGroup; ++k)
            largest = max(largest, magnitude_bits((*this)[k]));
        return largest;
    }
};

// What the elements of a block are multiplied with, and whether the quick forms of the rules hold: neither NaN nor infinity, no overflow of the inverse.
struct Scale {
    float absmax, inverse;
    bool is_ordinary;

    __device__ __forceinline__ explicit Scale(uint32_t largest_bits)
        : absmax(absmax_from_bits(largest_bits)), inverse(inverse_absmax(absmax)),
          is_ordinary(largest_bits < kInfinityBits && magnitude_bits(inverse) < kInfinityBits) {}
};

template <int bits> struct Codes;
template <> struct Codes<4> { // the first of a pair in the high half of its byte
    uint32_t word = 0;
    __device__ __forceinline__ void put(int k, int code) { word |= uint32_t(code) << 4 * (k ^ 1); }
    __device__ __forceinline__ uint8_t byte(int index) const { return uint8_t(word >> 8 * index); }
    __device__ __forceinline__ void store(uint8_t* p) const { store_once(reinterpret_cast<uint32_t*>(p), word); }
};
template <> struct Codes<8> {
    uint32_t low = 0, high = 0;
    __device__ __forceinline__ void put(int k, int code) { (k < 4 ? low : high) |= uint32_t(code) << 8 * (k & 3); }
    __device__ __forceinline__ uint8_t byte(int index) const { return uint8_t((index < 4 ? low : high) >> 8 * (index & 3)); }
    __device__ __forceinline__ void store(uint8_t* p) const { store_once(reinterpret_cast<uint2*>(p), make_uint2(low, high)); }
};

// Encodes the elements from i on and stores their codes. The last byte of an odd count of 4-bit codes is filled up with the code of zero.
template <typename Coder, typename T>
__device__ __forceinline__ void encode(const QuantizeKernelArgs<T>& args, const Coder& coder, const Group<T>& group, const Scale& scale, int64_t i) {
    if (i >= args.n)
        return;
    uint8_t* output = args.output + i / 8 * Coder::kBits;
    Codes<Coder::kBits> codes;
    if (scale.is_ordinary) {
#pragma unroll
        for (int k = 0; k < kGroup; ++k)
            codes.put(k, coder.code(__fmul_rn(group[k], scale.inverse)));
    } else {
#pragma unroll
        for (int k = 0; k < kGroup; ++k)
            codes.put(k, i + k < args.n ? coder.any_code(normalise(group[k], scale.inverse)) : Coder::kZeroCode);
    }
    if (i + kGroup <= args.n)
        return codes.store(output);
    const int bytes = int(((args.n - i) * Coder::kBits + 7) / 8);
#pragma unroll
    for (int k = 0; k < Coder::kBits; ++k)
        if (k < bytes)
            output[k] = codes.byte(k);
}

// Blocks of 8 to 256 elements, powers of two. Aligned.
template <typename Coder, typename T> __global__ void __launch_bounds__(kThreads) quantize_small_blocks(QuantizeKernelArgs<T> args) {
    const Coder coder(shared_variable<typename Coder::Table>(), args.code);
    const int lanes = int(args.blocksize) / kGroup; // of a block
    const int64_t stride = int64_t(gridDim.x) * kThreads * kGroupsAtOnce * kGroup;
    for (int64_t begin = int64_t(blockIdx.x) * kThreads * kGroupsAtOnce * kGroup; begin < args.n; begin += stride) {
        const int64_t first = begin + int64_t(threadIdx.x) * kGroup;
        Group<T> groups[kGroupsAtOnce];
#pragma unroll
        for (int step = 0; step < kGroupsAtOnce; ++step)
            groups[step].load(args.input, first + step * kThreads * kGroup, args.n);
#pragma unroll
        for (int step = 0; step < kGroupsAtOnce; ++step) {
            const int64_t i = first + step * kThreads * kGroup;
            uint32_t largest = groups[step].largest_bits();
            for (int distance = 1; distance < lanes; distance *= 2)
                largest = max(largest, __shfl_xor_sync(kWholeWarp, largest, distance));
            const Scale scale(largest);
            if (lane_index() % lanes == 0 && i < args.n)
                args.absmax[i / args.blocksize] = scale.absmax;
            encode(args, coder, groups[step], scale, i);
        }
    }
}

// Blocks of a multiple of 256 elements, one by each warp. Aligned.
template <typename Coder, typename T> __global__ void __launch_bounds__(kThreads) quantize_large_blocks(QuantizeKernelArgs<T> args) {
    const Coder coder(shared_variable<typename Coder::Table>(), args.code);
    const int64_t blocks = args.n / args.blocksize + (args.n % args.blocksize != 0);
    constexpr int step = kWarpSize * kGroup;
    for (int64_t block = global_thread() / kWarpSize; block < blocks; block += global_threads() / kWarpSize) {
        const int64_t begin = block * args.blocksize, end = min(begin + args.blocksize, args.n);
        uint32_t largest = 0;
#pragma unroll 4
        for (int64_t i = begin + lane_index() * kGroup; i < end; i += step) {
            Group<T> group;
            group.load(args.input, i, args.n);
            largest = max(largest, group.largest_bits());
        }
        const Scale scale(warp_max(largest));
        if (lane_index() == 0)
            args.absmax[block] = scale.absmax;
#pragma unroll 4
        for (int64_t i = begin + lane_index() * kGroup; i < end; i += step) {
            Group<T> group;
            group.load(args.input, i, args.n);
            encode(args, coder, group, scale, i);
        }
    }
}

// Any block size, any alignment: an element at a time. A warp takes one block, or two of an odd size, which share a byte of 4-bit codes.
template <typename Coder, typename T> __global__ void __launch_bounds__(kThreads) quantize_any_blocks(QuantizeKernelArgs<T> args) {
    constexpr int per_byte = 8 / Coder::kBits;
    const Coder coder(shared_variable<typename Coder::Table>(), args.code);
    const int together = args.blocksize % per_byte == 0 ? 1 : 2;
    const int64_t blocks = args.n / args.blocksize + (args.n % args.blocksize != 0);
    for (int64_t block = global_thread() / kWarpSize * together; block < blocks; block += global_threads() / kWarpSize * together) {
        const int64_t begin = block * args.blocksize, middle = min(begin + args.blocksize, args.n);
        const int64_t end = together == 1 ? middle : min(middle + args.blocksize, args.n);
        uint32_t first = 0, second = 0;
        for (int64_t i = begin + lane_index(); i < middle; i += kWarpSize)
            first = max(first, magnitude_bits(widen(args.input[i])));
        for (int64_t i = middle + lane_index(); i < end; i += kWarpSize)
            second = max(second, magnitude_bits(widen(args.input[i])));
        const Scale scale_of_first(warp_max(first)), scale_of_second(warp_max(second));
        if (lane_index() == 0)
            args.absmax[block] = scale_of_first.absmax;
        if (lane_index() == 0 && middle < end)
            args.absmax[block + 1] = scale_of_second.absmax;
        for (int64_t i = begin + lane_index() * per_byte; i < end; i += kWarpSize * per_byte) {
            int byte = 0;
            for (int64_t k = i; k < i + per_byte; ++k) {
                const float inverse = k < middle ? scale_of_first.inverse : scale_of_second.inverse;
                const int code = k < end ? coder.any_code(normalise(widen(args.input[k]), inverse)) : Coder::kZeroCode;
                byte = byte << Coder::kBits | code;
            }
            args.output[i / per_byte] = uint8_t(byte);
        }
    }
}

bool is_power_of_two(int64_t x) { return x > 0 && (x & (x - 1)) == 0; }

// Coder for blocks of the usual sizes, AnyCoder for all others.
template <typename Coder, typename AnyCoder, typename T> int32_t run(const QuantizeKernelArgs<T>& args, int blocks_per_multiprocessor, Stream stream) {
    const bool are_groups_aligned = is_aligned(args.input, 16) && is_aligned(args.output, Coder::kBits);
    int64_t elements = min(args.blocksize, args.n) * (kThreads / kWarpSize); // of a block of threads
    auto kernel = quantize_any_blocks<AnyCoder, T>;
    if (are_groups_aligned && args.blocksize % kWarpElements == 0 && args.blocksize > kWarpElements) {
        kernel = quantize_large_blocks<Coder, T>;
    } else if (are_groups_aligned && is_power_of_two(args.blocksize) && args.blocksize >= kGroup && args.blocksize <= kWarpElements) {
        kernel = quantize_small_blocks<Coder, T>;
        elements = kThreads * kGroupsAtOnce * kGroup;
    }
    const int64_t most = int64_t(device_properties().multiprocessors) * blocks_per_multiprocessor;
    return launch(kernel, unsigned(min(divide_up(args.n, elements), most)), kThreads, 0, stream, args);
}

} // namespace

int32_t launch_quantize_4bit(const QuantizeArgs4bit& args, Stream stream) {
    return with_element_type(args.dtype, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        const QuantizeKernelArgs<T> kernel_args{static_cast<const T*>(args.input), nullptr, args.absmax, args.output, args.n, args.blocksize};
        constexpr int blocks = 8 * kBlocksAtOnce;
        return args.quant_type == kNF4 ? run<NF4Coder, NF4Coder>(kernel_args, blocks, stream) : run<FP4Coder, FP4Coder>(kernel_args, blocks, stream);
    });
}

int32_t launch_quantize_blockwise(const QuantizeArgsBlockwise& args, Stream stream) {
    return with_element_type(args.dtype, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        const QuantizeKernelArgs<T> kernel_args{static_cast<const T*>(args.input), args.code, args.absmax, args.output, args.n, args.blocksize};
        if (args.n / device_properties().multiprocessors < kElementsWorthCells)
            return run<SearchCoder, SearchCoder>(kernel_args, 8 * kBlocksAtOnce, stream);
        return run<CellCoder, SearchCoder>(kernel_args, kBlocksAtOnce, stream); // no more blocks than run at once: each fills its tables once
    });
}

} // namespace bnb
