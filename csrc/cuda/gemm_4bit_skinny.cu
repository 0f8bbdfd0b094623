// out = A . W^T + bias for a few tokens (up to 16 at a time): bound by reading the weight, 0.5625 bytes an element for NF4 in blocks of 64.
//
// A warp takes kChunk columns of 8 * kRowGroups rows of W at a time; the warps of a block take the chunks of the same rows in turn and add up their
// sums at the end, always in the same order. Rows of W are rows of a tensor-core product and the tokens its columns, so that one to eight tokens cost
// the same. What it must protect is not arithmetic but the path to shared memory, which serves one look-up of a warp every two clocks: a row of the
// product is needed twice anyway, since levels in 16 bits are not exact. One look-up therefore gives both, {hi, lo} with hi + lo = level to about 17
// bits, in rows g and g + 8 of one product, and their sums are added in fp32 and scaled in fp32, once for each block of the weight. The error is below
// that of a weight rounded to 16 bits, whatever the mean of the activations.
//
// That asks that the columns a product sums over lie in one block of the row: kUnit columns, the largest of 32, 64, 128 that divides both the block
// size and K. Lane 4g + t holds kUnit / 4 successive codes of row g; step i of the unit multiplies its columns 4i .. 4i + 3 of that, in the
// places 2t, 2t + 1, 2t + 8, 2t + 9 of the instruction, and A's fragment for those is 8 successive bytes of token g.
//
// Loads of a chunk are issued before the previous one is multiplied. Should cost about 1.7 to 2.2 instructions an element with up to 8 tokens, of 4.4
// that a Hopper GPU has time for at its full memory bandwidth.
#include "gemm_4bit_tensor.h"

namespace bnb {
namespace {

constexpr int kWarps = 8;
constexpr int kChunk = 128;

// What a lane loads of a chunk ahead of its use.
template <bool nested, int kUnit, int kRowGroups> struct Chunk {
    uint32_t codes[kRowGroups][4];
    RawScale<nested> scales[kRowGroups][kChunk / kUnit];
};

template <int words> __device__ __forceinline__ void load_words(uint32_t* to, const uint8_t* from) {
    const auto loaded = load_once(reinterpret_cast<const Vector<uint32_t, words>*>(from));
#pragma unroll
    for (int i = 0; i < words; ++i)
        to[i] = loaded.value[i];
}

// One warp's part of the product. Rows and tokens beyond the last repeat it, and are not stored: what is wrong in one row or column of a product stays
// there. Units beyond the last have scale 0 and activations 0.
template <typename T, bool nested, int kUnit, int kRowGroups, int kTokenGroups> struct SkinnyWarp {
    static constexpr int kUnits = kChunk / kUnit;
    static constexpr int kWords = kUnit / 32;  // of codes, that a lane holds of a unit; as many vectors of activations
    static constexpr int kColumns = kUnit / 4; // of a unit, that a lane holds
    using ChunkOfLane = Chunk<nested, kUnit, kRowGroups>;

    const BlockScales& scales;
    const uint32_t K;
    const int shift;
    const float offset;
    const uint8_t* codes[kRowGroups]; // of the lane's rows, at its columns
    RowBlocks blocks[kRowGroups];
    const T* tokens[kTokenGroups];
    float sums[kRowGroups][kTokenGroups][2] = {};

    __device__ __forceinline__ SkinnyWarp(const GemmArgs4bit& args, int shift, int64_t first_row, int64_t first_token)
        : scales(args.scales), K(uint32_t(args.K)), shift(shift), offset(scale_offset<nested>(args.scales)) {
        const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
        for (int r = 0; r < kRowGroups; ++r) {
            const int64_t row = min(first_row + r * 8 + g, args.N - 1);
            codes[r] = args.B + (row * args.K + t * kColumns) / 2;
            blocks[r] = RowBlocks(row, args.K, shift);
        }
#pragma unroll
        for (int group = 0; group < kTokenGroups; ++group)
            tokens[group] = static_cast<const T*>(args.A) + min(first_token + group * 8 + g, args.M - 1) * args.K + t * kColumns;
    }

    __device__ __forceinline__ uint32_t block(int r, uint32_t first, int unit) const {
        if constexpr (kUnit == 64) // a unit is a block
            return blocks[r].first + first / 64 + unit;
        else
            return blocks[r].block(first + unit * kUnit, shift);
    }

    __device__ __forceinline__ void load(ChunkOfLane& chunk, uint32_t first) const {
#pragma unroll
        for (int r = 0; r < kRowGroups; ++r) {
            const uint8_t* row = codes[r] + first / 2;
#pragma unroll
            for (int unit = 0; unit < kUnits; ++unit) {
                chunk.scales[r][unit] = {};
                if (first + unit * kUnit < K) {
                    load_words<kWords>(chunk.codes[r] + unit * kWords, row + unit * kUnit / 2);
                    chunk.scales[r][unit] = fetch_scale<nested>(scales, block(r, first, unit));
                }
            }
        }
    }

    __device__ __forceinline__ void multiply(const ChunkOfLane& chunk, uint32_t first, const unsigned char* table, uint32_t copy) {
        uint4 x[kTokenGroups][4];
#pragma unroll
        for (int group = 0; group < kTokenGroups; ++group) {
            const uint4* token = reinterpret_cast<const uint4*>(tokens[group] + first);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int unit = i / kWords;
                x[group][i] = first + unit * kUnit < K ? __ldg(token + unit * (kUnit / 8) + i % kWords) : make_uint4(0, 0, 0, 0);
            }
        }
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit)
#pragma unroll
            for (int r = 0; r < kRowGroups; ++r) {
                float products[kTokenGroups][4] = {};
#pragma unroll
                for (int i = 0; i < kUnit / 16; ++i) {
                    const uint32_t word = chunk.codes[r][unit * kWords + i / 2];
                    const uint2 early = look_up<kWideStep>(table, word, i % 2 * 2, copy), late = look_up<kWideStep>(table, word, i % 2 * 2 + 1, copy);
                    const uint32_t a[4] = {early.x, early.y, late.x, late.y};
#pragma unroll
                    for (int group = 0; group < kTokenGroups; ++group) {
                        const uint4& columns = x[group][unit * kWords + i / 2];
                        const uint32_t b[2] = {i % 2 ? columns.z : columns.x, i % 2 ? columns.w : columns.y};
                        mma_m16n8k16<T>(products[group], a, b, products[group]);
                    }
                }
                const float scale = first + unit * kUnit < K ? decode_scale<nested>(scales, chunk.scales[r][unit], offset) : 0.0f;
#pragma unroll
                for (int group = 0; group < kTokenGroups; ++group)
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        sums[r][group][i] += (products[group][i] + products[group][i + 2]) * scale;
            }
    }
};

// Entries are the pair's high parts, then its low parts.
template <typename T> __device__ __forceinline__ void fill_split_pairs(unsigned char* table, float level) {
    const float rounded = widen(narrow<T>(level));
    fill_pairs<kWideStep>(table, narrow_pair<T>(rounded, level - rounded),
                     [](uint32_t high, uint32_t low) { return make_uint2(__byte_perm(high, low, 0x5410), __byte_perm(high, low, 0x7632)); });
}

template <typename T, bool nested, int kUnit, int kRowGroups, int kTokenGroups>
__global__ void __launch_bounds__(kWarps* kWarpSize, 2)
    gemm_4bit_skinny(const __grid_constant__ GemmArgs4bit args, const __grid_constant__ Levels16 levels, int shift) {
    constexpr int rows = 8 * kRowGroups, tokens = 8 * kTokenGroups;
    constexpr uint32_t stride = kWarps * kChunk;
    unsigned char* table = dynamic_shared_memory();
    const int64_t first_row = int64_t(blockIdx.x) * rows, first_token = int64_t(blockIdx.y) * tokens;
    const int lane = lane_index(), warp = warp_index();

    SkinnyWarp<T, nested, kUnit, kRowGroups, kTokenGroups> state(args, shift, first_row, first_token);
    Chunk<nested, kUnit, kRowGroups> even, odd;
    uint32_t k = uint32_t(warp * kChunk);
    state.load(even, k);
    fill_split_pairs<T>(table, level_of_code(args, levels, lane % 16));
    __syncthreads();
    for (; k < state.K; k += 2 * stride) {
        state.load(odd, k + stride);
        state.multiply(even, k, table, copy_of_lane());
        state.load(even, k + 2 * stride);
        state.multiply(odd, k + stride, table, copy_of_lane());
    }

    __syncthreads(); // the table's memory now takes the sums of the warps: [warp][token][row]
    float* sums = reinterpret_cast<float*>(table);
#pragma unroll
    for (int r = 0; r < kRowGroups; ++r)
#pragma unroll
        for (int group = 0; group < kTokenGroups; ++group)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                sums[(warp * tokens + group * 8 + lane % 4 * 2 + i) * rows + r * 8 + lane / 4] = state.sums[r][group][i];
    __syncthreads();
#pragma unroll 1
    for (int i = int(threadIdx.x); i < tokens * rows; i += kWarps * kWarpSize) {
        const int64_t token = first_token + i / rows, row = first_row + i % rows;
        if (token >= args.M || row >= args.N)
            continue;
        float sum = args.bias == nullptr ? 0.0f : widen(static_cast<const T*>(args.bias)[row]);
#pragma unroll
        for (int w = 0; w < kWarps; ++w)
            sum += sums[w * tokens * rows + i];
        static_cast<T*>(args.out)[token * args.N + row] = narrow<T>(sum);
    }
}

template <typename T, bool nested, int kUnit, int kRowGroups, int kTokenGroups> int32_t run(const GemmArgs4bit& args, Stream stream) {
    const int64_t token_blocks = divide_up(args.M, 8 * kTokenGroups);
    if (token_blocks > 65535)
        return kUnsupported;
    const dim3 grid(unsigned(divide_up(args.N, 8 * kRowGroups)), unsigned(token_blocks));
    return launch(gemm_4bit_skinny<T, nested, kUnit, kRowGroups, kTokenGroups>, grid, dim3(kWarps * kWarpSize), kTableBytes<kWideStep>, stream, args,
                  levels_of_type(args.quant_type), BlockOf(args.blocksize).shift);
}

template <typename T, bool nested, int kUnit> int32_t run_tile(const GemmArgs4bit& args, int32_t tile, Stream stream) {
    if (args.M > 8)
        return run<T, nested, kUnit, 2, 2>(args, stream);
    if (tile == 32)
        return run<T, nested, kUnit, 4, 1>(args, stream);
    return tile == 16 ? run<T, nested, kUnit, 2, 1>(args, stream) : run<T, nested, kUnit, 1, 1>(args, stream);
}

template <typename T, bool nested> int32_t run_unit(const GemmArgs4bit& args, int32_t tile, Stream stream) {
    if (args.K % 128 == 0 && args.blocksize % 128 == 0)
        return run_tile<T, nested, 128>(args, tile, stream);
    if (args.K % 64 == 0 && args.blocksize == 64)
        return run_tile<T, nested, 64>(args, tile, stream);
    return run_tile<T, nested, 32>(args, tile, stream);
}

} // namespace

int32_t launch_gemm_4bit_skinny(const GemmArgs4bit& args, const GemmPlan& plan, Stream stream) {
    if (!suits_tensor_cores(args, args.A, args.K) || (plan.tile != 8 && plan.tile != 16 && plan.tile != 32))
        return kUnsupported;
    const bool nested = args.scales.absmax_8bit != nullptr;
    if (args.dtype == kBFloat16)
        return nested ? run_unit<BFloat16, true>(args, plan.tile, stream) : run_unit<BFloat16, false>(args, plan.tile, stream);
    return nested ? run_unit<Half, true>(args, plan.tile, stream) : run_unit<Half, false>(args, plan.tile, stream);
}

} // namespace bnb
