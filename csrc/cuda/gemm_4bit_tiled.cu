// out = A . W^T + bias for up to a few hundred tokens, on tensor cores of sm_80 and later.
//
// A block computes kRows rows of W for kTokens tokens. Each of its warps has 32 rows of its own, so that no weight is dequantised twice in a block:
// two tiles of 16 rows, against which all tokens of the block are multiplied. The columns are taken kChunk at a time, and lane 4g + t has 32
// successive codes of rows g, g + 8, g + 16 and g + 24, one vector of 16 bytes each. They lie in one block of their row whatever the block size: the
// scale goes into the weight, level * scale in fp32 rounded once, which is exactly what dequantisation gives.
//
// Codes and activations come by asynchronous copies, kStages chunks deep. A lane copies its own codes, so these need no barrier; activations are
// shared. Of those a lane needs, for step i of a chunk, four successive elements of a token, and for two steps 16 bytes: they are stored so that the
// eight lanes which shared memory serves at once find theirs in different banks.
//
// Per chunk of 4096 weights a warp spends 128 clocks of shared memory on look-ups and 2 a token on activations; the products themselves take 4 a
// token. So 16 tokens should reach most of the memory's rate, and 64 or 128 two thirds of what this kind of instruction can do.
//
// Where the rows do not fill the device, `splits` blocks share the sum over the columns: each writes its part in fp32, and a second kernel adds them
// up in a fixed order.
#include "gemm_4bit_tensor.h"
#include "gemm_4bit_split.h"

namespace bnb {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kRowsOfWarp = 32;
constexpr int kRows = kWarps * kRowsOfWarp;
constexpr int kChunk = 128;
constexpr int kVectorsOfToken = kChunk / 8; // of 16 bytes, in a chunk
constexpr int kOwnRows = 4;                 // of a lane
constexpr int kPitch = kRowsOfWarp + 4;     // floats from token to token of a warp's result: the lanes of a store are in different banks

template <int kTokens> constexpr size_t kTokenBytes = size_t(kTokens) * kChunk * 2;
constexpr size_t kCodeBytes = size_t(kRows) * kChunk / 2;
template <int kTokens> constexpr size_t kStageBytes = kTokenBytes<kTokens> + kCodeBytes;
template <int kTokens, int kStages> constexpr size_t kRingBytes = kStages * kStageBytes<kTokens>;
template <int kTokens, int kStages, int kStep> constexpr size_t kSharedBytes = kTableBytes<kStep> + kRingBytes<kTokens, kStages>;

// Tokens whose results a warp stores at a time, by way of what was the ring.
template <int kTokens> constexpr int kStoredTokens = kTokens < 32 ? kTokens : 32;
template <int kTokens> constexpr size_t kResultBytes = size_t(kWarps) * kStoredTokens<kTokens> * kPitch * sizeof(float);

// Where vector `i` of a token lies among the token's vectors.
__device__ __forceinline__ int place_of_vector(int token, int i) { return (i % 4 * 4 + i / 4) ^ (token % 2 * 4); }

// A block's view of its operands.
template <typename T, bool nested, int kTokens, int kStages, int kStep> struct TiledBlock {
    // Where sums take half of the registers, a loop stays one, so that the other half does not hold what comes later in it.
    static constexpr bool kFrugal = kTokens == 128;

    const GemmArgs4bit& args;
    const int shift;
    const uint32_t K, end; // columns in all; the first one beyond this block's
    const int64_t first_token;
    const int token_count;  // of this block
    const T* const vectors; // the one of a chunk's activations that the thread copies of its first token
    unsigned char* const table;
    unsigned char* const ring;
    const uint8_t* const codes; // of the warp's first row
    uint32_t places[kOwnRows];  // of the lane's rows, at its columns, in bytes from there
    RowBlocks blocks[kOwnRows];
    float sums[2][kTokens / 8][4] = {};

    __device__ __forceinline__ TiledBlock(const GemmArgs4bit& args, int shift, uint32_t end, unsigned char* memory)
        : args(args), shift(shift), K(uint32_t(args.K)), end(end), first_token(int64_t(blockIdx.y) * kTokens),
          token_count(int(min(int64_t(kTokens), args.M - first_token))),
          vectors(static_cast<const T*>(args.A) + (first_token + int(threadIdx.x) / kVectorsOfToken) * args.K +
                  int(threadIdx.x) % kVectorsOfToken * 8),
          table(memory), ring(memory + kTableBytes<kStep>), codes(args.B + base_row() * args.K / 2) {
        const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
        for (int r = 0; r < kOwnRows; ++r) {
            const int64_t row = min(first_row() + r * 8 + g, args.N - 1); // rows beyond the last repeat it, and are not stored
            places[r] = uint32_t((row - base_row()) * args.K + t * 32) / 2;
            blocks[r] = RowBlocks(row, args.K, shift);
        }
    }

    __device__ __forceinline__ int64_t first_row() const { return int64_t(blockIdx.x) * kRows + warp_index() * kRowsOfWarp; }
    __device__ __forceinline__ int64_t base_row() const { return min(first_row(), args.N - 1); }
    __device__ __forceinline__ unsigned char* tokens_of(int stage) const { return ring + stage * kStageBytes<kTokens>; }
    __device__ __forceinline__ unsigned char* codes_of(int stage, int r) const {
        return tokens_of(stage) + kTokenBytes<kTokens> + ((warp_index() * kOwnRows + r) * kWarpSize + lane_index()) * 16;
    }
    __device__ __forceinline__ uint32_t own_column(uint32_t first) const { return first + uint32_t(lane_index() % 4 * 32); }

    __device__ __forceinline__ uint32_t block_of(int r, uint32_t first) const { return blocks[r].block(int(min(own_column(first), K - 32)), shift); }

    // Starts to copy a chunk. Activations beyond the last token or column become zeros; codes there are left as they are and get scale 0.
    __device__ __forceinline__ void fetch(uint32_t first, int stage) const {
        constexpr int tokens_at_once = kThreads / kVectorsOfToken;
        if (first >= end)
            return;
        if (own_column(first) < K)
#pragma unroll
            for (int r = 0; r < kOwnRows; ++r)
                copy_async_16(codes_of(stage, r), codes + places[r] + first / 2);
        const int token = int(threadIdx.x) / kVectorsOfToken, i = int(threadIdx.x) % kVectorsOfToken;
        unsigned char* to = tokens_of(stage) + (token * kVectorsOfToken + place_of_vector(token, i)) * 16;
        const bool has_column = first + uint32_t(i * 8) < K;
#pragma unroll
        for (int next = 0; next < kTokens; next += tokens_at_once) // an even number, so that the place of vector i stays
            copy_async_16(to + next * kVectorsOfToken * 16, vectors + first + next * int64_t(K), has_column && token + next < token_count);
    }

    // Those beyond the last column are fetched from there, and then count as 0.
    __device__ __forceinline__ void fetch_scales(RawScale (&raw)[kOwnRows], uint32_t first) const {
#pragma unroll
        for (int r = 0; r < kOwnRows; ++r)
            raw[r] = fetch_scale<nested>(args.scales, block_of(r, first));
    }

    __device__ __forceinline__ void decode_scales(float (&scales)[kOwnRows], const RawScale (&raw)[kOwnRows], uint32_t first, float offset) const {
#pragma unroll
        for (int r = 0; r < kOwnRows; ++r) {
            const float scale = decode_scale<nested>(args.scales, raw[r], block_of(r, first), offset);
            scales[r] = own_column(first) < K ? scale : 0.0f;
        }
    }

    __device__ __forceinline__ void multiply(const float (&scales)[kOwnRows], int stage) {
        const int g = lane_index() / 4, t = lane_index() % 4;
        Vector<uint32_t, 4> words[kOwnRows];
        if constexpr (!kFrugal)
#pragma unroll
            for (int r = 0; r < kOwnRows; ++r)
                words[r] = *reinterpret_cast<const Vector<uint32_t, 4>*>(codes_of(stage, r));
#pragma unroll kFrugal ? 1 : 4
        for (int pair = 0; pair < 4; ++pair) { // of steps
            uint32_t word[kOwnRows];
#pragma unroll
            for (int r = 0; r < kOwnRows; ++r)
                word[r] = kFrugal ? *reinterpret_cast<const uint32_t*>(codes_of(stage, r) + pair * 4) : words[r].value[pair];
            uint32_t a[2][2][4]; // of a step and a tile
#pragma unroll
            for (int step = 0; step < 2; ++step)
#pragma unroll
                for (int tile = 0; tile < 2; ++tile)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int r = tile * 2 + i % 2;
                        const uint2 levels = look_up<kStep>(table, word[r], step * 2 + i / 2, copy_of_lane());
                        a[step][tile][i] = scaled_pair<T>(levels, scales[r], scales[r]);
                    }
#pragma unroll
            for (int j = 0; j < kTokens / 8; ++j) {
                const int token = j * 8 + g;
                const unsigned char* at = tokens_of(stage) + (token * kVectorsOfToken + place_of_vector(token, t * 4 + pair)) * 16;
                const auto x = *reinterpret_cast<const Vector<uint32_t, 4>*>(at);
#pragma unroll
                for (int step = 0; step < 2; ++step)
#pragma unroll
                    for (int tile = 0; tile < 2; ++tile) {
                        const uint32_t b[2] = {x.value[step * 2], x.value[step * 2 + 1]};
                        mma_m16n8k16<T>(sums[tile][j], a[step][tile], b, sums[tile][j]);
                    }
            }
        }
    }

    // By way of shared memory, so that what a warp stores at once are successive rows of W, that is successive elements of the result.
    __device__ __forceinline__ void store(float* partial) {
        constexpr int stored = kStoredTokens<kTokens>;
        const int g = lane_index() / 4, t = lane_index() % 4;
        float* result = reinterpret_cast<float*>(ring) + warp_index() * stored * kPitch;
        const int64_t row = first_row() + lane_index();
        const bool has_bias = args.bias != nullptr && partial == nullptr && row < args.N;
        const float bias = has_bias ? widen(static_cast<const T*>(args.bias)[row]) : 0.0f;
#pragma unroll
        for (int first = 0; first < kTokens; first += stored) {
#pragma unroll
            for (int tile = 0; tile < 2; ++tile)
#pragma unroll
                for (int j = 0; j < stored / 8; ++j)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        result[(j * 8 + t * 2 + i % 2) * kPitch + tile * 16 + i / 2 * 8 + g] = sums[tile][first / 8 + j][i];
            __syncwarp();
            const int tokens = row < args.N ? min(stored, token_count - first) : 0;
            for (int token = 0; token < tokens; ++token) {
                const float sum = result[token * kPitch + lane_index()] + bias;
                const int64_t at = (first_token + first + token) * args.N + row;
                if (partial != nullptr)
                    partial[at] = sum;
                else
                    static_cast<T*>(args.out)[at] = narrow<T>(sum);
            }
            __syncwarp(); // before the next tokens take the place of these
        }
    }
};

// Blocks (x, y, z): rows, tokens, and parts of `columns` columns.
template <typename T, bool nested, int kTokens, int kStages, int kStep>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_4bit_tiled(const __grid_constant__ GemmArgs4bit args, const __grid_constant__ Levels16 levels, int shift, uint32_t columns, float* partial) {
    const uint32_t begin = blockIdx.z * columns, end = min(uint32_t(args.K), begin + columns);
    TiledBlock<T, nested, kTokens, kStages, kStep> block(args, shift, end, dynamic_shared_memory());
    const float offset = scale_offset<nested>(args.scales);
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) {
        block.fetch(begin + stage * kChunk, stage);
        copy_async_commit();
    }
    RawScale raw[kOwnRows];
    block.fetch_scales(raw, begin);
    fill_float_pairs<kStep>(block.table, level_of_code(args, levels, lane_index() % 16));

    int stage = 0;
    for (uint32_t first = begin; first < end; first += kChunk) {
        float scales[kOwnRows];
        block.decode_scales(scales, raw, first, offset);
        block.fetch_scales(raw, first + kChunk);
        copy_async_wait<kStages - 2>();
        __syncthreads(); // the copies of all threads are there, and nobody reads the chunk before, whose memory is filled next
        block.fetch(first + (kStages - 1) * kChunk, (stage + kStages - 1) % kStages);
        copy_async_commit();
        block.multiply(scales, stage);
        stage = (stage + 1) % kStages;
    }
    copy_async_wait<0>();
    __syncthreads();
    block.store(partial == nullptr ? nullptr : partial + int64_t(blockIdx.z) * args.M * args.N);
}

template <typename T, bool nested, int kTokens, int kStages, int kStep>
int32_t run_stages(const GemmArgs4bit& args, const GemmPlan& plan, Stream stream) {
    static_assert(kResultBytes<kTokens> <= kRingBytes<kTokens, kStages>);
    const int64_t chunks = divide_up(args.K, kChunk);
    const int64_t splits = plan.splits < chunks ? plan.splits : chunks, columns = divide_up(chunks, splits) * kChunk;
    const int64_t used = divide_up(args.K, columns), token_blocks = divide_up(args.M, kTokens);
    if (token_blocks > 65535 || used > 65535)
        return kUnsupported;
    const dim3 grid(unsigned(divide_up(args.N, kRows)), unsigned(token_blocks), unsigned(used));
    const int32_t status =
        launch(gemm_4bit_tiled<T, nested, kTokens, kStages, kStep>, grid, dim3(kThreads), kSharedBytes<kTokens, kStages, kStep>, stream, args,
               levels_of_type(args.quant_type), BlockOf(args.blocksize).shift, uint32_t(columns), used > 1 ? plan.partial : nullptr);
    return status != kOk || used == 1 ? status : launch_add_partial_sums<T>(args, plan.partial, int(used), args.N, stream);
}

// Deep and with the quick table where the device has 160 KB for a block, else what every device has room for.
template <typename T, bool nested, int kTokens, int kDeep, int kShallow>
int32_t run_tokens(const GemmArgs4bit& args, const GemmPlan& plan, Stream stream) {
    static_assert(kSharedBytes<kTokens, kShallow, kNarrowStep> <= kLeastSharedMemory);
    if (kSharedBytes<kTokens, kDeep, kWideStep> <= size_t(device_properties().shared_memory_limit))
        return run_stages<T, nested, kTokens, kDeep, kWideStep>(args, plan, stream);
    return run_stages<T, nested, kTokens, kShallow, kNarrowStep>(args, plan, stream);
}

template <typename T, bool nested> int32_t run(const GemmArgs4bit& args, const GemmPlan& plan, Stream stream) {
    switch (plan.tile) {
    case 16:
        return run_tokens<T, nested, 16, 4, 3>(args, plan, stream);
    case 32:
        return run_tokens<T, nested, 32, 4, 2>(args, plan, stream);
    case 128:
        if (kSharedBytes<128, 3, kWideStep> <= size_t(device_properties().shared_memory_limit))
            return run_stages<T, nested, 128, 3, kWideStep>(args, plan, stream);
        [[fallthrough]];
    case 64:
        return run_tokens<T, nested, 64, 3, 2>(args, plan, stream);
    default:
        return kUnsupported;
    }
}

} // namespace

int32_t launch_gemm_4bit_tiled(const GemmArgs4bit& args, const GemmPlan& plan, Stream stream) {
    if (!suits_tensor_cores(args, args.A, args.K) || device_properties().capability < 80)
        return kUnsupported;
    return with_type_and_nesting(
        args, [&](auto* element, auto nested) { return run<std::remove_pointer_t<decltype(element)>, decltype(nested)::value>(args, plan, stream); });
}

} // namespace bnb
