// out[M, K] = A[M, N] . W[N, K], the gradient of the 4-bit product with respect to its activations, by products of warp groups on sm_90a.
//
// As in gemm_4bit_warpgroup.cu the weight is the left operand, transposed and from registers, and the tokens are the right one. The sum runs over the
// rows n of W: a chunk is 64 of them, which are a slice of the tokens and, of the packed weight, rows of as many bytes as the block has columns,
// again in slices that a swizzle keeps free of bank conflicts. Producers decode the scales of the rows, one for 32 columns.
//
// A step is 16 rows. A lane 4g + t has, in the places of an instruction, rows 2t, 2t + 1, 2t + 8 and 2t + 9, and of each kTiles neighbouring bytes,
// so that the lanes g cover neighbouring memory. An instruction wants two successive terms of a sum in one register: nibbles of two rows are brought
// together into bytes, and then looked up as pairs. Byte b of a lane belongs to tile b: the code in its high nibble is row g of the tile, that in its
// low nibble row g + 8. So a lane's results are 2 * kTiles neighbouring columns.
//
// Clocks of a multiprocessor for 32 weights with 64, 128 and 256 tokens: of shared memory 1.9, 2.9 and 5.0, of which 1 is for look-ups; of tensor
// cores 1, 2 and 4; of instructions about 1.
//
// Where the columns do not fill the device, `splits` blocks share the sum over the rows: each writes its part in fp32, and a second kernel adds them
// up in a fixed order.
#include "gemm_4bit_split.h"
#include "gemm_4bit_warpgroup.h"

namespace bnb {
namespace {

constexpr int kGroups = 2; // that consume
constexpr int kConsumers = kGroups * kGroupThreads;
constexpr int kThreads = kProducers + kConsumers;
constexpr int kWarps = kConsumers / kWarpSize;
constexpr int kChunk = kSliceTerms; // rows of W
constexpr int kStepRows = 16;
constexpr int kUnitColumns = 32; // with one scale
constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;
static_assert(kProducers * kProducerRegisters + kConsumers * kConsumerRegisters <= kThreads * (kRegisters / kThreads / 8 * 8));

// How a block is cut for a number of tokens: every thread that consumes has 128 sums.
template <int tokens> struct Layout {
    static constexpr int kTiles = 256 / tokens;
    static constexpr int kStages = tokens == 256 ? 4 : 5;
    static constexpr int kColumnBytes = kWarps * 8 * kTiles; // of codes, in a row of W
    static constexpr int kColumns = 2 * kColumnBytes;
    static constexpr int kSliceBytes = kColumnBytes < 128 ? kColumnBytes : 128;
    static constexpr Swizzle kCodeSwizzle = kSliceBytes == 128 ? Swizzle::k128Bytes : Swizzle::k64Bytes;
    static constexpr int kUnits = kColumns / kUnitColumns;
    static constexpr int kPitch = kColumns + 4; // floats from token to token of the result

    static constexpr size_t kTokenBytes = size_t(tokens) * kSlicePitch;
    static constexpr size_t kCopyBytes = kTokenBytes + size_t(kChunk) * kColumnBytes;
    static constexpr size_t kScaleBytes = size_t(kChunk) * kUnits * sizeof(float);
    static constexpr size_t kRingBytes = kStages * (kCopyBytes + kScaleBytes);
    static constexpr size_t kSharedBytes = kTableBytes<kWideStep> + kOperandAlignment + kRingBytes;

    static_assert(kSharedBytes + 2 * kStages * sizeof(uint64_t) <= kMostSharedBytes);
    static_assert(size_t(tokens) * kPitch * sizeof(float) <= kRingBytes); // which takes the result in the end
};

// A block's view of its operands.
template <typename T, bool nested, int kTokens> struct BackwardBlock {
    using Cut = Layout<kTokens>;
    using Ring = Position<Cut::kStages>;
    static constexpr int kTiles = Cut::kTiles;
    static constexpr int kOwnUnits = Cut::kUnits * kChunk / kProducers; // of a thread that produces
    static constexpr int kWords = kTiles == 4 ? 2 : 1;                  // that hold a lane's bytes of two rows that are 8 apart

    const GemmArgs4bit& args;
    const int shift;
    const uint32_t begin, end; // rows of this block
    const int64_t first_token = int64_t(blockIdx.x) * kTokens, first_column = int64_t(blockIdx.y) * Cut::kColumns;
    unsigned char* const table;
    unsigned char* const ring;
    float* const scales; // [stages, units, rows]
    Barriers<Cut::kStages>& barriers;

    __device__ __forceinline__ BackwardBlock(const GemmArgs4bit& args, int shift, uint32_t rows, unsigned char* memory)
        : args(args), shift(shift), begin(blockIdx.z * rows), end(min(uint32_t(args.N), begin + rows)), table(memory),
          ring(align_operand(memory + kTableBytes<kWideStep>)), scales(reinterpret_cast<float*>(ring + Cut::kStages * Cut::kCopyBytes)),
          barriers(shared_variable<Barriers<Cut::kStages>>()) {}

    __device__ __forceinline__ unsigned char* tokens_of(int stage) const { return ring + stage * Cut::kCopyBytes; }
    __device__ __forceinline__ unsigned char* codes_of(int stage) const { return tokens_of(stage) + Cut::kTokenBytes; }
    __device__ __forceinline__ float* scales_of(int stage, int unit) const { return scales + (stage * Cut::kUnits + unit) * kChunk; }

    __device__ __forceinline__ void prepare(const Levels16& levels) {
        prepare_barriers(barriers, kConsumers);
        fill_float_pairs<kWideStep>(table, level_of_code(args, levels, lane_index() % 16));
        __syncthreads();
    }

    // ------------------------------------------------------------------------------------------------------------------- producing
    __device__ __forceinline__ void copy(const TensorMap& tokens, const TensorMap& codes, uint32_t first, int stage) const {
        uint64_t* full = &barriers.full[stage];
        barrier_arrive_expecting(full, int(Cut::kCopyBytes));
        copy_tile(tokens_of(stage), tokens, int(first), int(first_token), full);
#pragma unroll
        for (int slice = 0; slice < Cut::kColumnBytes / Cut::kSliceBytes; ++slice)
            copy_tile(codes_of(stage) + slice * kChunk * Cut::kSliceBytes, codes, int(first_column / 2) + slice * Cut::kSliceBytes, int(first), full);
    }

    // A thread has one row of a chunk, and every other unit of its columns. Beyond the last row and column it has those.
    __device__ __forceinline__ static int own_row() { return int(threadIdx.x) % kChunk; }
    __device__ __forceinline__ static int own_unit(int i) { return i * (kProducers / kChunk) + int(threadIdx.x) / kChunk; }
    __device__ __forceinline__ uint32_t block_of(uint32_t first, int i) const {
        const int64_t row = min(int64_t(first) + own_row(), args.N - 1);
        return uint32_t((row * args.K + min(first_column + own_unit(i) * kUnitColumns, args.K - kUnitColumns)) >> shift);
    }

    __device__ __forceinline__ void fetch_scales(RawScale (&raw)[kOwnUnits], uint32_t first) const {
#pragma unroll
        for (int i = 0; i < kOwnUnits; ++i)
            raw[i] = fetch_scale<nested>(args.scales, block_of(first, i));
    }

    // Rows that do not exist count as 0, even if the last scale is infinite.
    __device__ __forceinline__ void store_scales(const RawScale (&raw)[kOwnUnits], uint32_t first, int stage, float offset) const {
#pragma unroll
        for (int i = 0; i < kOwnUnits; ++i) {
            const float scale = decode_scale<nested>(args.scales, raw[i], block_of(first, i), offset);
            scales_of(stage, own_unit(i))[own_row()] = int64_t(first) + own_row() < args.N ? scale : 0.0f;
        }
    }

    __device__ __forceinline__ void produce(const TensorMap& tokens, const TensorMap& codes) const {
        const float offset = scale_offset<nested>(args.scales);
        RawScale raw[kOwnUnits], following[kOwnUnits];
        fetch_scales(raw, begin);
        Ring at;
        for (uint32_t first = begin; first < end; first += kChunk, at.advance()) {
            fetch_scales(following, first + kChunk);
            barrier_wait(&barriers.empty[at.stage], ~at.round & 1);
            if (threadIdx.x == 0)
                copy(tokens, codes, first, at.stage);
            store_scales(raw, first, at.stage, offset);
            barrier_arrive(&barriers.full[at.stage]);
            memcpy(raw, following, sizeof raw);
        }
    }

    // ------------------------------------------------------------------------------------------------------------------- consuming
    // The first of the lane's bytes in a row.
    __device__ __forceinline__ static int own_byte() { return ((consumer_group() * 4 + warp_index() % 4) * 8 + lane_index() / 4) * kTiles; }

    // The lane's bytes of the row `row` of a step, in a word.
    __device__ __forceinline__ uint32_t codes_at(int stage, int step, int row) const {
        constexpr int rows_of_pattern = Cut::kSliceBytes == 128 ? 1 : 2; // that have one place in the swizzle
        const int vectors = Cut::kSliceBytes / 16, within = own_byte() % Cut::kSliceBytes;
        const int vector = (within / 16) ^ (row / rows_of_pattern % vectors);
        const unsigned char* slice = codes_of(stage) + own_byte() / Cut::kSliceBytes * kChunk * Cut::kSliceBytes;
        using Bytes = typename WordOfSize<kTiles>::Type;
        return *reinterpret_cast<const Bytes*>(slice + (step * kStepRows + row) * Cut::kSliceBytes + vector * 16 + within % 16);
    }

    // Two rows that are 8 apart in one word, if it has room for both.
    __device__ __forceinline__ void fetch_codes(uint32_t (&words)[kWords], int stage, int step, int row) const {
        const uint32_t near = codes_at(stage, step, row), far = codes_at(stage, step, row + 8);
        if constexpr (kWords == 2)
            words[0] = near, words[1] = far;
        else
            words[0] = near | far << 8 * kTiles;
    }

    __device__ __forceinline__ void dequantise(uint32_t (&fragments)[kTiles][4], int stage, int step) const {
        const int t = lane_index() % 4, unit = own_byte() * 2 / kUnitColumns;
        uint32_t one[kWords], other[kWords];
        fetch_codes(one, stage, step, t * 2);
        fetch_codes(other, stage, step, t * 2 + 1);
        Vector<float, 2> scale[2];
#pragma unroll
        for (int half = 0; half < 2; ++half)
            scale[half] = load_vector<2>(scales_of(stage, unit) + step * kStepRows + t * 2 + half * 8);
        uint32_t pairs[2][kWords]; // of high nibbles, of low ones
#pragma unroll
        for (int word = 0; word < kWords; ++word) {
            pairs[0][word] = (one[word] & 0xf0f0f0f0u) | ((other[word] >> 4) & 0x0f0f0f0fu);
            pairs[1][word] = ((one[word] << 4) & 0xf0f0f0f0u) | (other[word] & 0x0f0f0f0fu);
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int half = i / 2, byte = kWords == 2 ? tile : half * kTiles + tile;
                const uint2 levels = look_up<kWideStep>(table, pairs[i % 2][kWords == 2 ? half : 0], byte, copy_of_lane());
                fragments[tile][i] = scaled_pair<T>(levels, scale[half].value[0], scale[half].value[1]);
            }
    }

    __device__ __forceinline__ void consume(float (&sums)[kTiles][kTokens / 2]) const {
        uint32_t fragments[2][kTiles][4];
        settle(sums);
        Ring at;
        for (uint32_t first = begin; first < end; first += kChunk, at.advance()) {
            barrier_wait(&barriers.full[at.stage], at.round & 1);
#pragma unroll
            for (int step = 0; step < kChunk / kStepRows; ++step) {
                uint32_t (&own)[kTiles][4] = fragments[step % 2];
                dequantise(own, at.stage, step);
                const uint64_t operand = describe_operand(tokens_of(at.stage)) + uint64_t(step * 2);
                settle(own);
                group_fence();
#pragma unroll
                for (int tile = 0; tile < kTiles; ++tile)
                    group_multiply<T>(sums[tile], own[tile], operand);
                group_commit();
                group_wait<1>(); // the other set of fragments is free
                if (step == 0)
                    release(barriers, at.before(), first != begin); // its last products have just ended
            }
        }
        group_wait<0>();
    }

    // ------------------------------------------------------------------------------------------------------------------- the result
    __device__ __forceinline__ float* result_of(int token, int column) const { return reinterpret_cast<float*>(ring) + token * Cut::kPitch + column; }

    __device__ __forceinline__ void lay_out(const float (&sums)[kTiles][kTokens / 2]) const {
        const int t = lane_index() % 4;
#pragma unroll
        for (int i = 0; i < kTokens / 4; ++i) {
            Vector<float, 2 * kTiles> columns;
#pragma unroll
            for (int column = 0; column < 2 * kTiles; ++column)
                columns.value[column] = sums[column / 2][i / 2 * 4 + column % 2 * 2 + i % 2];
            memcpy(result_of(i / 2 * 8 + t * 2 + i % 2, own_byte() * 2), &columns, sizeof columns);
        }
    }

    __device__ __forceinline__ void store(float* partial, bool has_vectors) const {
        const int token_count = int(min(int64_t(kTokens), args.M - first_token));
        const ResultColumns<T> to{first_token, first_column, args.K, token_count, nullptr, static_cast<T*>(args.out), partial};
        if (has_vectors)
            to.template store<Cut::kColumns, Cut::kPitch, kConsumers, 4>(result_of(0, 0));
        else
            to.template store<Cut::kColumns, Cut::kPitch, kConsumers, 1>(result_of(0, 0));
    }
};

// Blocks (x, y, z): tokens, columns, and parts of `rows` rows. Those that share columns come together, so that codes are read from DRAM once.
template <typename T, bool nested, int kTokens>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_4bit_warpgroup_backward(const __grid_constant__ TensorMap tokens, const __grid_constant__ TensorMap codes,
                                 const __grid_constant__ GemmArgs4bit args, const __grid_constant__ Levels16 levels, int shift, uint32_t rows,
                                 float* partial, bool has_vectors) {
    BackwardBlock<T, nested, kTokens> block(args, shift, rows, dynamic_shared_memory());
    block.prepare(levels);
    if (threadIdx.x < kProducers) {
        keep_registers<kProducerRegisters>();
        block.produce(tokens, codes);
        meet();
        meet();
    } else {
        take_registers<kConsumerRegisters>();
        float sums[Layout<kTokens>::kTiles][kTokens / 2] = {};
        block.consume(sums);
        settle(sums);
        meet(); // nobody reads the ring any more
        block.lay_out(sums);
        meet();
        block.store(partial == nullptr ? nullptr : partial + int64_t(blockIdx.z) * args.M * args.K, has_vectors);
    }
}

template <typename T, bool nested, int kTokens> int32_t run_tokens(const GemmArgs4bit& args, const GemmPlan& plan, Stream stream) {
    using Cut = Layout<kTokens>;
    const int64_t chunks = divide_up(args.N, kChunk);
    const int64_t splits = plan.splits < chunks ? plan.splits : chunks, rows = divide_up(chunks, splits) * kChunk;
    const int64_t used = divide_up(args.N, rows), column_blocks = divide_up(args.K, Cut::kColumns);
    if (column_blocks > 65535 || used > 65535)
        return kUnsupported;
    TensorMap tokens, codes;
    int32_t status = make_tensor_map(tokens, args.A, 2, args.N, args.M, kSliceTerms, kTokens, Swizzle::k128Bytes);
    if (status == kOk)
        status = make_tensor_map(codes, args.B, 1, args.K / 2, args.N, Cut::kSliceBytes, kChunk, Cut::kCodeSwizzle);
    if (status != kOk)
        return status;
    float* partial = used > 1 ? plan.partial : nullptr;
    const dim3 grid(unsigned(divide_up(args.M, kTokens)), unsigned(column_blocks), unsigned(used));
    status = launch(gemm_4bit_warpgroup_backward<T, nested, kTokens>, grid, dim3(kThreads), Cut::kSharedBytes, stream, tokens, codes, args,
                    levels_of_type(args.quant_type), BlockOf(args.blocksize).shift, uint32_t(rows), partial, has_vectors(args.K, args.out, partial));
    return status != kOk || used == 1 ? status : launch_add_partial_sums<T>(args, partial, int(used), args.K, stream);
}

} // namespace

int32_t launch_gemm_4bit_warpgroup_backward(const GemmArgs4bit& args, const GemmPlan& plan, Stream stream) {
    if (!suits_warp_groups(args, args.N))
        return kUnsupported;
    return with_tile(args, plan, [&](auto* element, auto nested, auto tokens) {
        return run_tokens<std::remove_pointer_t<decltype(element)>, decltype(nested)::value, decltype(tokens)::value>(args, plan, stream);
    });
}

} // namespace bnb
