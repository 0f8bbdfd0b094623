// out[M, K] = A[M, N] . W[N, K], the gradient of the 4-bit product with respect to its activations, on tensor cores of sm_80 and later.
//
// The sum runs over the rows n of W, and columns k of W become rows of a tensor-core product whose columns are the tokens. Both are permuted so that
// the packed layout serves as it stands: in a step of 16 rows, lane 4g + t takes rows 4t .. 4t + 3, in the places 2t, 2t + 1, 2t + 8, 2t + 9 of the
// instruction, and of each the same run of codes, so that the eight lanes g cover neighbouring memory. An instruction wants two successive terms of a
// sum in one register: nibbles of two rows are brought together into bytes, four operations for 16 codes, and then looked up as pairs. Byte b of them
// is a tile of 16 columns of W: its codes from high nibbles are row g of that tile, those from low nibbles row g + 8.
//
// Scales differ from row to row of W, so they go into the weight: level * scale in fp32 rounded once, which is exactly what dequantisation gives.
//
// The warps of a block take steps in turn. Everything a lane needs of a step, codes and gradients, it copies itself, asynchronously and kStages steps
// deep, so the loop has no barrier. A warp's result has 128 floats a lane, whatever number of tokens it is for: with kTokens tokens it covers 64 * 64
// / kTokens columns. The warps' sums are added in shared memory in a fixed order, and those of `splits` blocks, which share the sum over n where
// columns do not fill the device, by a second kernel.
//
// About 3.5 instructions a weight and 4 wavefronts of shared memory for 64 weights; up to 128 tokens it moves the packed weight once or twice, 0.56
// bytes an element, where a dense product moves 4.6.
#include "gemm_4bit_split.h"
#include "gemm_4bit_tensor.h"

namespace bnb {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kStepRows = 16;
constexpr uint32_t kStride = kWarps * kStepRows;
constexpr int kOwnRows = 4; // of a step, that a lane holds
constexpr int kRounds = 4;  // in which the warps' sums are added up
constexpr int kPitch = kWarpSize + 1;

// One step of a lane, in shared memory: its codes, row by row, then four gradients of each of its tokens. In vectors of 16 bytes, each of which has
// the lanes of the warp side by side.
template <int kTokens> struct Step {
    static constexpr int kWords = 64 / kTokens; // of 8 codes, that a lane holds of a row
    static constexpr int kGroups = kTokens / 8;
    static constexpr int kVectors = kWords + kGroups / 2;
    static constexpr size_t kBytes = size_t(kVectors) * kWarpSize * 16; // of a warp
    static constexpr int kColumns = 8 * kWords;                         // of a lane

    __device__ __forceinline__ static int place(int byte) { return (byte / 16 * kWarpSize + lane_index()) * 16 + byte % 16; }
};

template <int kTokens, int kStages, int kStep> constexpr size_t kSharedBytes = kTableBytes<kStep> + kStages * kWarps * Step<kTokens>::kBytes;

template <int bytes> __device__ __forceinline__ void copy_async_bytes(void* shared, const void* global) {
    if constexpr (bytes == 16)
        copy_async_16(shared, global);
    else if constexpr (bytes == 8)
        copy_async_8(shared, global);
    else
        copy_async_4(shared, global);
}

template <typename T, bool nested, int kTokens, int kStages, int kStep> struct BackwardWarp {
    using StepOfWarp = Step<kTokens>;
    static constexpr int kWords = StepOfWarp::kWords, kGroups = StepOfWarp::kGroups, kTiles = 4 * kWords;

    const GemmArgs4bit& args;
    const int shift;
    const uint32_t end; // the first row beyond this block's
    const int64_t first_token;
    uint32_t column; // the first of the lane's
    unsigned char* const table;
    unsigned char* const ring; // of the warp
    float sums[kTiles][kGroups][4] = {};

    __device__ __forceinline__ BackwardWarp(const GemmArgs4bit& args, int shift, uint32_t end, unsigned char* memory)
        : args(args), shift(shift), end(end), first_token(int64_t(blockIdx.y) * kTokens), table(memory),
          ring(memory + kTableBytes<kStep> + warp_index() * kStages * StepOfWarp::kBytes) {
        const uint32_t last = uint32_t(args.K - StepOfWarp::kColumns); // columns beyond repeat it, and are not stored
        column = min(first_column() + uint32_t(lane_index() / 4 * StepOfWarp::kColumns), last);
    }

    __device__ __forceinline__ uint32_t first_column() const { return blockIdx.x * uint32_t(8 * StepOfWarp::kColumns); }
    __device__ __forceinline__ uint32_t own_row(uint32_t n) const { return n + uint32_t(lane_index() % 4 * kOwnRows); }
    __device__ __forceinline__ uint32_t block_of(uint32_t n, int r) const {
        const uint32_t row = min(own_row(n), uint32_t(args.N - kOwnRows)) + uint32_t(r);
        return uint32_t((int64_t(row) * args.K + column) >> shift);
    }
    // Four rows exist together: N is a multiple of 8.
    __device__ __forceinline__ bool has_rows(uint32_t n) const { return n < end && own_row(n) < uint32_t(args.N); }

    // Codes of rows that do not exist are left as they are and get scale 0; their gradients are 0.
    __device__ __forceinline__ void fetch(uint32_t n, int stage) const {
        unsigned char* to = ring + stage * StepOfWarp::kBytes;
        const int64_t row = own_row(n);
        const bool exists = has_rows(n);
        if (exists) {
            const uint8_t* codes = args.B + (row * args.K + column) / 2;
#pragma unroll
            for (int r = 0; r < kOwnRows; ++r)
                copy_async_bytes<4 * kWords>(to + StepOfWarp::place(r * 4 * kWords), codes + r * (args.K / 2));
        }
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            const int64_t token = first_token + group * 8 + lane_index() / 4;
            const bool wanted = exists && token < args.M;
            const T* from = static_cast<const T*>(args.A) + (wanted ? token * args.N + row : 0);
            copy_async_8(to + StepOfWarp::place(16 * kWords + 8 * group), from, wanted);
        }
    }

    // Those of rows that do not exist are fetched from the last ones, and then count as 0.
    __device__ __forceinline__ void fetch_scales(RawScale (&raw)[kOwnRows], uint32_t n) const {
#pragma unroll
        for (int r = 0; r < kOwnRows; ++r)
            raw[r] = fetch_scale<nested>(args.scales, block_of(n, r));
    }

    __device__ __forceinline__ void decode_scales(float (&scales)[kOwnRows], const RawScale (&raw)[kOwnRows], uint32_t n, float offset) const {
#pragma unroll
        for (int r = 0; r < kOwnRows; ++r) {
            const float scale = decode_scale<nested>(args.scales, raw[r], block_of(n, r), offset);
            scales[r] = has_rows(n) ? scale : 0.0f;
        }
    }

    __device__ __forceinline__ void multiply(const float (&scales)[kOwnRows], int stage) {
        const unsigned char* from = ring + stage * StepOfWarp::kBytes;
        uint32_t words[kOwnRows * kWords], gradients[2 * kGroups];
#pragma unroll
        for (int v = 0; v < StepOfWarp::kVectors; ++v) {
            const auto vector = *reinterpret_cast<const Vector<uint32_t, 4>*>(from + StepOfWarp::place(16 * v));
#pragma unroll
            for (int i = 0; i < 4; ++i)
                (v < kWords ? words[v * 4 + i] : gradients[(v - kWords) * 4 + i]) = vector.value[i];
        }
#pragma unroll
        for (int word = 0; word < kWords; ++word) {
            uint32_t pairs[4]; // {even, odd columns} of rows 0, 1, then of rows 2, 3
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint32_t one = words[2 * i * kWords + word], other = words[(2 * i + 1) * kWords + word];
                pairs[2 * i] = (one & 0xf0f0f0f0u) | ((other >> 4) & 0x0f0f0f0fu);
                pairs[2 * i + 1] = ((one << 4) & 0xf0f0f0f0u) | (other & 0x0f0f0f0fu);
            }
#pragma unroll
            for (int byte = 0; byte < 4; ++byte) {
                uint32_t a[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int r = i / 2 * 2;
                    a[i] = scaled_pair<T>(look_up<kStep>(table, pairs[i], byte, copy_of_lane()), scales[r], scales[r + 1]);
                }
#pragma unroll
                for (int group = 0; group < kGroups; ++group) {
                    const uint32_t b[2] = {gradients[2 * group], gradients[2 * group + 1]};
                    mma_m16n8k16<T>(sums[word * 4 + byte][group], a, b, sums[word * 4 + byte][group]);
                }
            }
        }
    }

    // Adds up what the warps of the block have, a quarter of the tiles at a time, and stores it.
    __device__ __forceinline__ void store(float* partial) const {
        constexpr int values = kWords * kGroups * 4; // of a lane, in a round
        float* memory = reinterpret_cast<float*>(table);
#pragma unroll
        for (int round = 0; round < kRounds; ++round) {
            __syncthreads();
#pragma unroll
            for (int tile = 0; tile < kWords; ++tile)
#pragma unroll
                for (int group = 0; group < kGroups; ++group)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        memory[(warp_index() * values + (tile * kGroups + group) * 4 + i) * kPitch + lane_index()] =
                            sums[round * kWords + tile][group][i];
            __syncthreads();
#pragma unroll 1
            for (int c = int(threadIdx.x); c < values * kWarpSize; c += kThreads) {
                const int odd = c % 2, tile = c / 2 % kWords, g = c / (2 * kWords) % 8, token_of_block = c / (16 * kWords);
                const int value = (tile * kGroups + token_of_block / 8) * 4 + odd * 2 + token_of_block % 2, lane = g * 4 + token_of_block % 8 / 2;
                const int64_t token = first_token + token_of_block;
                const int64_t k = int64_t(first_column()) + g * StepOfWarp::kColumns + 2 * (round * kWords + tile) + odd;
                if (token >= args.M || k >= args.K)
                    continue;
                float sum = 0.0f;
#pragma unroll
                for (int warp = 0; warp < kWarps; ++warp)
                    sum += memory[(warp * values + value) * kPitch + lane];
                if (partial != nullptr)
                    partial[token * args.K + k] = sum;
                else
                    static_cast<T*>(args.out)[token * args.K + k] = narrow<T>(sum);
            }
        }
    }
};

// Blocks (x, y, z): columns, tokens, and parts of `rows` rows.
template <typename T, bool nested, int kTokens, int kStages, int kStep>
__global__ void __launch_bounds__(kThreads)
    gemm_4bit_backward(const __grid_constant__ GemmArgs4bit args, const __grid_constant__ Levels16 levels, int shift, uint32_t rows, float* partial) {
    const uint32_t begin = blockIdx.z * rows, end = min(uint32_t(args.N), begin + rows);
    BackwardWarp<T, nested, kTokens, kStages, kStep> warp(args, shift, end, dynamic_shared_memory());
    const float offset = scale_offset<nested>(args.scales);
    const uint32_t first = begin + uint32_t(warp_index() * kStepRows);
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) {
        warp.fetch(first + stage * kStride, stage);
        copy_async_commit();
    }
    RawScale raw[kOwnRows];
    warp.fetch_scales(raw, first);
    fill_float_pairs<kStep>(warp.table, level_of_code(args, levels, lane_index() % 16));
    __syncthreads();

    int stage = 0;
    for (uint32_t n = first; n < end; n += kStride) {
        float scales[kOwnRows];
        warp.decode_scales(scales, raw, n, offset);
        warp.fetch_scales(raw, n + kStride);
        copy_async_wait<kStages - 2>();
        warp.fetch(n + (kStages - 1) * kStride, stage == 0 ? kStages - 1 : stage - 1); // what the step before has read
        copy_async_commit();
        warp.multiply(scales, stage);
        stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    copy_async_wait<0>();
    warp.store(partial == nullptr ? nullptr : partial + int64_t(blockIdx.z) * args.M * args.K);
}

template <typename T, bool nested, int kTokens, int kStages, int kStep>
int32_t run_stages(const GemmArgs4bit& args, const GemmPlan& plan, Stream stream) {
    const int64_t turns = divide_up(args.N, kStride);
    const int64_t splits = plan.splits < turns ? plan.splits : turns, rows = divide_up(turns, splits) * kStride;
    const int64_t used = divide_up(args.N, rows), token_blocks = divide_up(args.M, kTokens);
    if (token_blocks > 65535 || used > 65535)
        return kUnsupported;
    const dim3 grid(unsigned(divide_up(args.K, 8 * Step<kTokens>::kColumns)), unsigned(token_blocks), unsigned(used));
    constexpr size_t bytes = kSharedBytes<kTokens, kStages, kStep>;
    const int32_t status = launch(gemm_4bit_backward<T, nested, kTokens, kStages, kStep>, grid, dim3(kThreads), bytes, stream, args,
                                  levels_of_type(args.quant_type), BlockOf(args.blocksize).shift, uint32_t(rows), used > 1 ? plan.partial : nullptr);
    return status != kOk || used == 1 ? status : launch_add_partial_sums<T>(args, plan.partial, int(used), args.K, stream);
}

// Deep and with the quick table where the device has 144 KB for a block, else what every device has room for.
template <typename T, bool nested, int kTokens> int32_t run_tokens(const GemmArgs4bit& args, const GemmPlan& plan, Stream stream) {
    static_assert(kSharedBytes<kTokens, 3, kNarrowStep> <= kLeastSharedMemory);
    if (kSharedBytes<kTokens, 4, kWideStep> <= size_t(device_properties().shared_memory_limit))
        return run_stages<T, nested, kTokens, 4, kWideStep>(args, plan, stream);
    return run_stages<T, nested, kTokens, 3, kNarrowStep>(args, plan, stream);
}

template <typename T, bool nested> int32_t run(const GemmArgs4bit& args, const GemmPlan& plan, Stream stream) {
    switch (plan.tile) {
    case 16:
        return run_tokens<T, nested, 16>(args, plan, stream);
    case 32:
        return run_tokens<T, nested, 32>(args, plan, stream);
    case 64:
        return run_tokens<T, nested, 64>(args, plan, stream);
    default:
        return kUnsupported;
    }
}

} // namespace

int32_t launch_gemm_4bit_backward(const GemmArgs4bit& args, const GemmPlan& plan, Stream stream) {
    if (!suits_tensor_cores(args, args.A, args.N) || device_properties().capability < 80)
        return kUnsupported;
    return with_type_and_nesting(
        args, [&](auto* element, auto nested) { return run<std::remove_pointer_t<decltype(element)>, decltype(nested)::value>(args, plan, stream); });
}

} // namespace bnb
