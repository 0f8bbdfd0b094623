// Quantisation: absmax = max |x| of a block, code of v = fl(x * fl(1 / absmax)) by the rules of common/quantize.h.
//
// Reads 2 or 4 bytes an element and writes half a byte (4 bit) or a byte (8 bit): 2.56 bytes for bfloat16 to NF4 in blocks of 64. At the rate of memory
// that leaves about 20 instructions for an element, so thresholds are not compared one by one; coders.h finds a code in one look-up. A lane holds a group
// of neighbouring elements, 32 bytes, and stores their codes at once; what a block costs is shared by 8 or 16 elements. A block of up to 32 groups lies
// in one warp, whose lanes exchange their maxima by shuffles: no barrier, no second read. A larger block is read twice by one warp, the second time from
// the caches.
#include "block_scales.h"
#include "coders.h"
#include "device.h"

namespace bnb {
namespace {

constexpr int kThreads = 256;
template <typename T> constexpr int kGroup = 32 / int(sizeof(T)); // elements of a lane
constexpr int kGroupsAtOnce = 2;                                  // that a lane has under way
constexpr int kMostLanes = 32;                                    // that share a small block
constexpr int kBlocksAtOnce = 4;                                  // that a multiprocessor has room for
// 8 bit: with fewer elements a multiprocessor searches them faster than it fills the tables of CellCoder (an estimate: 75 elements a thread).
constexpr int64_t kElementsWorthCells = 75 * kThreads * kBlocksAtOnce;

template <typename T> struct QuantizeKernelArgs {
    const T* input;
    const float* code; // of 8 bits
    float* absmax;
    uint8_t* output;
    int64_t n, blocksize;
};

// The elements of one lane. Those behind the end of the tensor are 0.
template <typename T> struct Group {
    Vector<T, kPerVector<T>> part[kGroup<T> / kPerVector<T>];

    __device__ __forceinline__ void load(const T* p) {
#pragma unroll
        for (int k = 0; k < kGroup<T> / kPerVector<T>; ++k)
            part[k] = load_once(reinterpret_cast<const Vector<T, kPerVector<T>>*>(p) + k);
    }

    __device__ __forceinline__ void load_up_to(const T* p, int count) {
        if (count >= kGroup<T>)
            return load(p);
#pragma unroll
        for (int k = 0; k < kGroup<T>; ++k)
            part[k / kPerVector<T>].value[k % kPerVector<T>] = k < count ? p[k] : T{};
    }

    __device__ __forceinline__ float operator[](int k) const { return widen(part[k / kPerVector<T>].value[k % kPerVector<T>]); }

    // Bits of the largest magnitude as a float. Two elements of 16 bits are compared at once: their bits are ordered like a float's.
    __device__ __forceinline__ uint32_t largest_bits() const {
        uint32_t words[kGroup<T> * int(sizeof(T)) / 4];
        memcpy(words, part, sizeof words);
        constexpr uint32_t magnitudes = sizeof(T) == 4 ? 0x7fffffffu : 0x7fff7fffu;
        uint32_t largest = words[0] & magnitudes;
#pragma unroll
        for (int k = 1; k < int(sizeof words) / 4; ++k)
            largest = sizeof(T) == 4 ? max(largest, words[k] & magnitudes) : __vmaxu2(largest, words[k] & magnitudes);
        if constexpr (sizeof(T) == 4)
            return largest;
        else
            return float_bits(widen(T{uint16_t(max(largest & 0xffffu, largest >> 16))}));
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

// The codes of a group. The first of a pair of 4 bits is in the high half of its byte.
template <int bits, int count> struct Codes {
    Vector<uint32_t, count * bits / 32> words = {};

    __device__ __forceinline__ void put(int k, int code) {
        const int place = bits == 4 ? k ^ 1 : k;
        words.value[k * bits / 32] |= uint32_t(code) << place * bits % 32;
    }
};

// The codes of up to a group of elements, one by one: for blocks with NaN, infinities or nothing but denormals, and for the end of the tensor, where the last
// byte of an odd count of 4-bit codes is filled up with the code of zero.
template <typename Coder, typename T>
__device__ __forceinline__ void encode_slowly(const Coder& coder, const T* x, int count, float inverse, uint8_t* output) {
    constexpr int per_byte = 8 / Coder::kBits;
    count = min(count, kGroup<T>);
#pragma unroll 1
    for (int first = 0; first < count; first += per_byte) {
        int byte = 0;
#pragma unroll 1
        for (int k = first; k < first + per_byte; ++k)
            byte = byte << Coder::kBits | (k < count ? coder.any_code(normalise(widen(x[k]), inverse)) : Coder::kZeroCode);
        output[first / per_byte] = uint8_t(byte);
    }
}

// Stores the codes of the elements at x, which `group` holds. `count` of them are left in the tensor.
template <typename Coder, typename T>
__device__ __forceinline__ void encode(const Coder& coder, const Group<T>& group, const Scale& scale, const T* x, int count, uint8_t* output) {
    if (!scale.is_ordinary || count < kGroup<T>)
        return encode_slowly(coder, x, count, scale.inverse, output);
    Codes<Coder::kBits, kGroup<T>> codes;
#pragma unroll
    for (int k = 0; k < kGroup<T>; ++k)
        codes.put(k, coder.code(__fmul_rn(group[k], scale.inverse)));
    store_once(reinterpret_cast<decltype(codes.words)*>(output), codes.words);
}

// How many elements are left, as far as that matters to a block of threads.
__device__ __forceinline__ int count_left(int64_t left) { return int(min(left, int64_t(1) << 30)); }

// Blocks of 1 to 32 groups, powers of two. Aligned.
template <typename Coder, typename T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) quantize_small_blocks(QuantizeKernelArgs<T> args, int block_shift) {
    const Coder coder(shared_variable<typename Coder::Table>(), args.code);
    constexpr int apart = kThreads * kGroup<T>;
    const int lanes = (1 << block_shift) / kGroup<T>; // of a block
    const bool is_first_lane = (lane_index() & (lanes - 1)) == 0;
    const int64_t stride = int64_t(gridDim.x) * kGroupsAtOnce * apart;
    for (int64_t begin = int64_t(blockIdx.x) * kGroupsAtOnce * apart; begin < args.n; begin += stride) {
        const int64_t first = begin + int64_t(threadIdx.x) * kGroup<T>;
        const int left = count_left(args.n - first);
        const T* x = args.input + first;
        uint8_t* output = args.output + first / 8 * Coder::kBits;
        float* absmax = args.absmax + (first >> block_shift);
        Group<T> groups[kGroupsAtOnce];
        if (begin + kGroupsAtOnce * apart <= args.n) {
#pragma unroll
            for (int step = 0; step < kGroupsAtOnce; ++step)
                groups[step].load(x + step * apart);
        } else {
#pragma unroll
            for (int step = 0; step < kGroupsAtOnce; ++step)
                groups[step].load_up_to(x + step * apart, left - step * apart);
        }
#pragma unroll
        for (int step = 0; step < kGroupsAtOnce; ++step) {
            uint32_t largest = groups[step].largest_bits();
#pragma unroll
            for (int distance = 1; distance < kMostLanes; distance *= 2)
                if (distance < lanes)
                    largest = max(largest, __shfl_xor_sync(kWholeWarp, largest, distance));
            const Scale scale(largest);
            if (is_first_lane && step * apart < left)
                absmax[step * (apart >> block_shift)] = scale.absmax;
            encode(coder, groups[step], scale, x + step * apart, left - step * apart, output + step * apart / 8 * Coder::kBits);
        }
    }
}

// Blocks of a multiple of 32 groups, one by each warp. Aligned.
template <typename Coder, typename T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) quantize_large_blocks(QuantizeKernelArgs<T> args) {
    const Coder coder(shared_variable<typename Coder::Table>(), args.code);
    const int64_t blocks = args.n / args.blocksize + (args.n % args.blocksize != 0);
    constexpr int apart = kWarpSize * kGroup<T>;
    for (int64_t block = global_thread() / kWarpSize; block < blocks; block += global_threads() / kWarpSize) {
        const int64_t first = block * args.blocksize + lane_index() * kGroup<T>, end = min((block + 1) * args.blocksize, args.n);
        uint32_t largest = 0;
#pragma unroll 4
        for (int64_t i = first; i < end; i += apart) {
            Group<T> group;
            group.load_up_to(args.input + i, count_left(end - i));
            largest = max(largest, group.largest_bits());
        }
        const Scale scale(warp_max(largest));
        if (lane_index() == 0)
            args.absmax[block] = scale.absmax;
#pragma unroll 2
        for (int64_t i = first; i < end; i += apart) {
            Group<T> group;
            group.load_up_to(args.input + i, count_left(end - i));
            encode(coder, group, scale, args.input + i, count_left(end - i), args.output + i / 8 * Coder::kBits);
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

// Coder for blocks of the usual sizes, AnyCoder for all others.
template <typename Coder, typename AnyCoder, typename T> int32_t run(const QuantizeKernelArgs<T>& args, int blocks_per_multiprocessor,
                                                                     Stream stream) {
    const int64_t most = int64_t(device_properties().multiprocessors) * blocks_per_multiprocessor;
    const auto grid = [&](int64_t elements_of_a_block) { return unsigned(min(divide_up(args.n, elements_of_a_block), most)); };
    const bool are_groups_aligned = is_aligned(args.input, 16) && is_aligned(args.output, kGroup<T> * Coder::kBits / 8);
    const int shift = BlockOf(args.blocksize).shift;
    if (are_groups_aligned && shift >= 0 && args.blocksize >= kGroup<T> && args.blocksize <= kGroup<T> * kMostLanes)
        return launch(quantize_small_blocks<Coder, T>, grid(kThreads * kGroupsAtOnce * kGroup<T>), kThreads, 0, stream, args, shift);
    const unsigned blocks = grid(min(args.blocksize, args.n) * (kThreads / kWarpSize));
    if (are_groups_aligned && args.blocksize % (kGroup<T> * kMostLanes) == 0)
        return launch(quantize_large_blocks<Coder, T>, blocks, kThreads, 0, stream, args);
    return launch(quantize_any_blocks<AnyCoder, T>, blocks, kThreads, 0, stream, args);
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
