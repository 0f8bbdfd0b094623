// out = A . W^T + bias for a few tokens (up to 16 at a time): bound by reading the weight, 0.5625 bytes an element for NF4 in blocks of 64.
//
// A warp takes kChunk columns of 8 * kRowGroups rows of W at a time; the warps of a block take the chunks of the same rows in turn and add up their
// sums at the end, always in the same order. Rows of W are rows of a tensor-core product and the tokens its columns, so that one to eight tokens cost
// the same. What it must protect is not arithmetic but the path to shared memory, which serves one look-up of a warp every two clocks: a row of the
// product is needed twice anyway, since levels in 16 bits are not exact. One look-up therefore gives both, {hi, lo} with hi + lo = level to about 17
// bits, in rows g and g + 8 of one product, and their sums are added in fp32 and scaled in fp32, once for each block of the weight. The error is
// below that of a weight rounded to 16 bits, whatever the mean of the activations.
//
// That asks that the columns a product sums over lie in one block of the row: kUnit columns, the largest of 32, 64, 128 that divides both the block
// size and K. Lane 4g + t holds kUnit / 4 successive codes of row g; step i of the unit multiplies its columns 4i .. 4i + 3 of that, in the
// places 2t, 2t + 1, 2t + 8, 2t + 9 of the instruction, and A's fragment for those is 8 successive bytes of token g.
//
// Loads of a chunk are issued before the previous one is multiplied. In blocks of 64, nested, with 32 rows a warp, an element costs 3.1 instructions
// and 1.3 clocks of shared memory for 32 of them: a Hopper GPU has time for 4.4 and 1.1 at its full memory bandwidth, so it should reach 80 % of
// that.
#include "gemm_4bit_tensor.h"

namespace bnb {
namespace {

constexpr int kChunk = 128;

// Blocks of a multiprocessor and warps of a block: as many as registers allow for what a lane holds.
template <int kRowGroups, int kTokenGroups> struct Residency {
    static constexpr bool kIsHeavy = kRowGroups == 4 || kTokenGroups == 2;
    static constexpr int kWarps = kIsHeavy ? 4 : 8;
    static constexpr int kBlocks = kIsHeavy ? 3 : 2;
};

// What a lane loads of a chunk ahead of its use. All four lanes of a row need its scales: they share the loading of them, scale c of the row groups'
// units by lane c % 4.
template <int kUnit, int kRowGroups> struct Chunk {
    static constexpr int kUnits = kChunk / kUnit;
    static constexpr int kScales = kRowGroups * kUnits;
    static constexpr int kOwnScales = (kScales + 3) / 4;

    uint32_t codes[kRowGroups][4];
    RawScale scales[kOwnScales];
};

template <int words> __device__ __forceinline__ void load_words(uint32_t* to, const uint8_t* from) {
    const auto loaded = load_once(reinterpret_cast<const Vector<uint32_t, words>*>(from));
#pragma unroll
    for (int i = 0; i < words; ++i)
        to[i] = loaded.value[i];
}

// One warp's part of the product. Tokens beyond the last repeat it, and are not stored: what is wrong in one column of a product stays there. Units
// beyond the last have scale 0 and activations 0.
template <typename T, bool nested, int kUnit, int kRowGroups, int kTokenGroups> struct SkinnyWarp {
    using ChunkOfLane = Chunk<kUnit, kRowGroups>;
    static constexpr int kUnits = ChunkOfLane::kUnits, kScales = ChunkOfLane::kScales, kOwnScales = ChunkOfLane::kOwnScales;
    static constexpr int kWords = kUnit / 32;  // of codes, that a lane holds of a unit; as many vectors of activations
    static constexpr int kColumns = kUnit / 4; // of a unit, that a lane holds

    const BlockScales& scales;
    const uint32_t K;
    const int shift;
    const float offset;
    const uint8_t* codes;         // of the lane's first row, at its columns; the others follow 8 rows apart
    RowBlocks blocks[kOwnScales]; // of the rows whose scales the lane loads
    const T* tokens[kTokenGroups];
    float sums[kRowGroups][kTokenGroups][2] = {};

    __device__ __forceinline__ SkinnyWarp(const GemmArgs4bit& args, int shift, int64_t first_row, int64_t first_token)
        : scales(args.scales), K(uint32_t(args.K)), shift(shift), offset(scale_offset<nested>(args.scales)) {
        const int g = lane_index() / 4, t = lane_index() % 4;
        const int64_t row = min(first_row + g, args.N - 1);
        codes = args.B + (row * args.K + t * kColumns) / 2;
#pragma unroll
        for (int i = 0; i < kOwnScales; ++i)
            blocks[i] = RowBlocks(row + own_scale(i) / kUnits * 8, args.K, shift);
#pragma unroll
        for (int group = 0; group < kTokenGroups; ++group)
            tokens[group] = static_cast<const T*>(args.A) + min(first_token + group * 8 + g, args.M - 1) * args.K + t * kColumns;
    }

    __device__ __forceinline__ static int own_scale(int i) { return (lane_index() % 4 + 4 * i) % kScales; }
    __device__ __forceinline__ static uint32_t column_of_scale(int i, uint32_t first) { return first + uint32_t(own_scale(i) % kUnits * kUnit); }

    __device__ __forceinline__ void load(ChunkOfLane& chunk, uint32_t first) const {
#pragma unroll
        for (int i = 0; i < kOwnScales; ++i) {
            const uint32_t k = column_of_scale(i, first);
            chunk.scales[i] = k < K ? fetch_scale<nested>(scales, blocks[i].block(int(k), shift)) : 0;
        }
#pragma unroll
        for (int r = 0; r < kRowGroups; ++r) {
            const uint8_t* row = codes + r * (4 * int64_t(K)) + first / 2;
#pragma unroll
            for (int unit = 0; unit < kUnits; ++unit)
                if (first + unit * kUnit < K)
                    load_words<kWords>(chunk.codes[r] + unit * kWords, row + unit * kUnit / 2);
        }
    }

    __device__ __forceinline__ void multiply(const ChunkOfLane& chunk, uint32_t first, const unsigned char* table, uint32_t copy) {
        float own_scales[kOwnScales];
#pragma unroll
        for (int i = 0; i < kOwnScales; ++i) {
            const uint32_t k = column_of_scale(i, first);
            own_scales[i] = k < K ? decode_scale<nested>(scales, chunk.scales[i], blocks[i].block(int(k), shift), offset) : 0.0f;
        }
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
                const int c = r * kUnits + unit;
                const float scale = __shfl_sync(kWholeWarp, own_scales[c / 4], c % 4, 4);
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
__global__ void __launch_bounds__(Residency<kRowGroups, kTokenGroups>::kWarps* kWarpSize, Residency<kRowGroups, kTokenGroups>::kBlocks)
    gemm_4bit_skinny(const __grid_constant__ GemmArgs4bit args, const __grid_constant__ Levels16 levels, int shift) {
    constexpr int rows = 8 * kRowGroups, tokens = 8 * kTokenGroups, warps = Residency<kRowGroups, kTokenGroups>::kWarps;
    constexpr uint32_t stride = warps * kChunk;
    unsigned char* table = dynamic_shared_memory();
    // The last block starts earlier where rows do not fill it, and computes again what the one before does.
    const int64_t first_row = min(int64_t(blockIdx.x) * rows, max(args.N - rows, int64_t(0))), first_token = int64_t(blockIdx.y) * tokens;
    const int lane = lane_index(), warp = warp_index();

    SkinnyWarp<T, nested, kUnit, kRowGroups, kTokenGroups> state(args, shift, first_row, first_token);
    Chunk<kUnit, kRowGroups> even, odd;
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
    for (int i = int(threadIdx.x); i < tokens * rows; i += warps * kWarpSize) {
        const int64_t token = first_token + i / rows, row = first_row + i % rows;
        if (token >= args.M || row >= args.N)
            continue;
        float sum = args.bias == nullptr ? 0.0f : widen(static_cast<const T*>(args.bias)[row]);
#pragma unroll
        for (int w = 0; w < warps; ++w)
            sum += sums[w * tokens * rows + i];
        static_cast<T*>(args.out)[token * args.N + row] = narrow<T>(sum);
    }
}

template <typename T, bool nested, int kUnit, int kRowGroups, int kTokenGroups> int32_t run(const GemmArgs4bit& args, Stream stream) {
    const int64_t token_blocks = divide_up(args.M, 8 * kTokenGroups);
    if (token_blocks > 65535)
        return kUnsupported;
    const dim3 grid(unsigned(divide_up(args.N, 8 * kRowGroups)), unsigned(token_blocks));
    const dim3 block(Residency<kRowGroups, kTokenGroups>::kWarps * kWarpSize);
    return launch(gemm_4bit_skinny<T, nested, kUnit, kRowGroups, kTokenGroups>, grid, block, kTableBytes<kWideStep>, stream, args,
                  levels_of_type(args.quant_type), BlockOf(args.blocksize).shift);
}

// Narrow units need many scales at a time, and two groups of tokens many activations: fewer rows are left for them.
template <typename T, bool nested, int kUnit> int32_t run_tile(const GemmArgs4bit& args, int32_t tile, Stream stream) {
    const bool one_group = args.M <= 8;
    if constexpr (kUnit > 32) {
        if (one_group && tile == 32 && args.N >= 32)
            return run<T, nested, kUnit, 4, 1>(args, stream);
        if (tile > 8 && args.N >= 16)
            return one_group ? run<T, nested, kUnit, 2, 1>(args, stream) : run<T, nested, kUnit, 2, 2>(args, stream);
    }
    return one_group ? run<T, nested, kUnit, 1, 1>(args, stream) : run<T, nested, kUnit, 1, 2>(args, stream);
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
    return with_type_and_nesting(args, [&](auto* element, auto nested) {
        return run_unit<std::remove_pointer_t<decltype(element)>, decltype(nested)::value>(args, plan.tile, stream);
    });
}

} // namespace bnb
