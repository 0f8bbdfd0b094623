// What the kernels of 4-bit products on tensor cores share: tables of pairs of levels, and where the scales of a row begin.
//
// The packed layout serves tensor cores as it stands. A product sums over k, so its terms may come in any order as long as both operands agree: a
// lane takes the codes that lie together in memory, and calls them the columns that the instruction wants of it. Only the activations have to follow,
// and theirs lie together too.
//
// A byte holds two codes and is looked up whole: the table has an entry of 8 bytes for each of the 256 pairs. Lanes of a warp look up different bytes
// at the same time, so each of the 16 lanes that shared memory serves at once has a copy of the table in banks of its own.
#pragma once

#include "gemm_4bit_common.h"

#include <type_traits>

namespace bnb {

constexpr int kTableCopies = 16;
constexpr int kEntryBytes = 8;

// Bytes from one pair's entries to the next. With the wide step the low byte of an entry's offset is the lane's and the second one the pair itself,
// so that one byte permutation makes the address; it costs as much shared memory again.
constexpr int kNarrowStep = kTableCopies * kEntryBytes;
constexpr int kWideStep = 2 * kNarrowStep;
template <int step> constexpr size_t kTableBytes = size_t(256) * size_t(step);

__device__ __forceinline__ uint32_t copy_of_lane() { return uint32_t(lane_index() % kTableCopies * kEntryBytes); }

// The entry of byte `byte` of a word.
template <int step> __device__ __forceinline__ uint2 look_up(const unsigned char* table, uint32_t word, int byte, uint32_t copy) {
    uint32_t offset;
    if constexpr (step == kWideStep)
        offset = __byte_perm(word, copy, 0x7604u + 16u * uint32_t(byte));
    else
        offset = ((byte == 0 ? word * kNarrowStep : word >> (8 * byte - 7)) & 0x7f80u) | copy;
    return *reinterpret_cast<const uint2*>(table + offset);
}

// Fills the table with pairs of 32-bit values, one for each code: lane i brings the value of code i % 16. All warps of the block take part; the
// caller puts a barrier behind it. make(first, second): the entry of a byte with these codes, the first in its high nibble.
template <int step, typename Make> __device__ __forceinline__ void fill_pairs(unsigned char* table, uint32_t value_of_code, Make make) {
    constexpr int lanes_per_pair = kNarrowStep / 16;
    constexpr int pairs_per_warp = kWarpSize / lanes_per_pair;
    const int lane = lane_index(), warps = int(blockDim.x) / kWarpSize;
    for (int first = warp_index() * pairs_per_warp; first < 256; first += warps * pairs_per_warp) {
        const int pair = first + lane / lanes_per_pair;
        const uint32_t high = __shfl_sync(kWholeWarp, value_of_code, pair >> 4), low = __shfl_sync(kWholeWarp, value_of_code, pair & 15);
        const uint2 entry = make(high, low);
        *reinterpret_cast<uint4*>(table + pair * step + lane % lanes_per_pair * 16) = make_uint4(entry.x, entry.y, entry.x, entry.y);
    }
}

// Levels as fp32 pairs, to be scaled in fp32 and rounded once: the weight that dequantisation gives.
template <int step> __device__ __forceinline__ void fill_float_pairs(unsigned char* table, float level) {
    fill_pairs<step>(table, float_bits(level), [](uint32_t high, uint32_t low) { return make_uint2(high, low); });
}

// A pair of levels times their scales, rounded to T: one register of a fragment.
template <typename T> __device__ __forceinline__ uint32_t scaled_pair(uint2 levels, float first_scale, float second_scale) {
    return narrow_pair<T>(__fmul_rn(float_from_bits(levels.x), first_scale), __fmul_rn(float_from_bits(levels.y), second_scale));
}

// Blocks along a row of the weight. Their numbers and the length of a row fit into 32 bits: launchers see to it.
struct RowBlocks {
    uint32_t first; // block of the row's first element
    int start;      // where in that block the row begins

    __device__ __forceinline__ RowBlocks() {}
    __device__ __forceinline__ RowBlocks(int64_t row, int64_t columns, int shift) {
        const int64_t begin = row * columns;
        first = uint32_t(begin >> shift);
        start = int(begin & ((int64_t(1) << shift) - 1));
    }
    __device__ __forceinline__ uint32_t block(int column, int shift) const { return first + uint32_t((start + column) >> shift); }
};

// A scale as it comes from memory, its float or its code. Fetching and decoding are apart so that a kernel can fetch early. What else decoding needs,
// a table and a float for 256 blocks, stays in the first-level cache.
using RawScale = uint32_t;

template <bool nested> __device__ __forceinline__ RawScale fetch_scale(const BlockScales& scales, uint32_t block) {
    if constexpr (nested)
        return __ldg(scales.absmax_8bit + block);
    else
        return float_bits(__ldg(scales.absmax + block));
}

template <bool nested> __device__ __forceinline__ float decode_scale(const BlockScales& scales, RawScale raw, uint32_t block, float offset) {
    if constexpr (nested)
        return __fadd_rn(__fmul_rn(__ldg(scales.absmax_code + raw), __ldg(scales.absmax + (block >> kNestedBlockShift))), offset);
    else
        return float_from_bits(raw);
}

template <bool nested> __device__ __forceinline__ float scale_offset(const BlockScales& scales) {
    if constexpr (nested)
        return __ldg(scales.absmax_offset);
    else
        return 0.0f;
}

// ------------------------------------------------------------------------------------------------------------------------------- host
constexpr size_t kLeastSharedMemory = 99 * 1024; // that a block can have from sm_80 on

constexpr int64_t kMostColumns = int64_t(1) << 27; // 32 rows of codes are within reach of 32 bits
constexpr int64_t kMostBlocks = int64_t(1) << 31;

// What every kernel here needs: 16-bit elements that the device's tensor cores know, rows of whole 16-byte vectors, each run of 32 codes in one
// block.
inline bool suits_tensor_cores(const GemmArgs4bit& args, const void* activations, int64_t row_of_activations) {
    const int capability = device_properties().capability;
    const bool has_type = args.dtype == kFloat16 ? capability >= 75 : args.dtype == kBFloat16 && capability >= 80;
    const bool is_regular = args.K % 32 == 0 && args.K > 0 && args.N > 0 && args.blocksize % 32 == 0 && BlockOf(args.blocksize).shift >= 0;
    const bool fits = args.K <= kMostColumns && args.N <= kMostColumns && args.N * args.K / args.blocksize < kMostBlocks;
    const bool is_readable = is_aligned(args.B, 16) && is_aligned(activations, 16) && row_of_activations % 8 == 0;
    return has_type && is_regular && fits && is_readable;
}

// Calls `run` with a null pointer to the 16-bit element type of the product, and whether its statistics are nested as a type.
template <typename Run> int32_t with_type_and_nesting(const GemmArgs4bit& args, Run run) {
    const auto with_type = [&](auto* element) {
        return args.scales.absmax_8bit != nullptr ? run(element, std::true_type()) : run(element, std::false_type());
    };
    return args.dtype == kBFloat16 ? with_type(static_cast<BFloat16*>(nullptr)) : with_type(static_cast<Half*>(nullptr));
}

} // namespace bnb
