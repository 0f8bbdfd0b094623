// out = A . W^T + bias from some tens of tokens on, by products of warp groups on sm_90a.
//
// Computed is the transpose: W is the left operand, which warp groups take from registers, so that no dequantised weight passes through memory; the
// tokens are the right one, which the tensor cores read from shared memory themselves. A weight is level * scale in fp32 rounded once, which is
// exactly what dequantisation gives.
//
// A block computes the products of kRows rows of W with kTokens tokens. Columns are taken kChunk at a time through a ring of kStages stages. One warp
// group produces: a thread starts the copies of a chunk, tokens as slices of 64 columns and the codes as they are packed, and all decode the scales,
// one for 32 columns, which lie in one block of their row whatever its size. The other groups consume: each has kTiles tiles of 64 rows, and goes
// through a chunk in units of a tile and 32 columns: look the codes up, multiply by the scale, and leave 16 columns twice to the tensor cores, which
// are at it while the next unit is dequantised into other registers.
//
// A product's left operand has, in lane 4g + t, columns 2t, 2t + 1, 2t + 8 and 2t + 9 of rows g and g + 8: the bytes t of two successive words of a
// row's codes. The four lanes of a row read the same 16 bytes, and choose by the digit that a byte permutation takes from them, so neither operand
// has to be rearranged.
//
// Clocks of a multiprocessor for 32 weights: of shared memory 1 for look-ups, up to 0.5 for codes, 0.25 for copying codes and for scales, kTokens /
// 128 for what products read and kTokens / kRows / 2 for copying tokens, together 2.4, 3.0 and 4.8 with 64, 128 and 256 tokens; of tensor cores 1, 2
// and 4; of instructions 1. So shared memory binds: 256 tokens leave the tensor cores idle for a sixth of the time, 128 for a third, and 64 tokens
// need codes at two fifths of the rate of DRAM. Tall blocks keep the traffic of tokens low, which is why 64 and 128 tokens have 256 rows; for 256
// tokens there are registers for 128 rows.
//
// Where the rows do not fill the device, `splits` blocks share the sum over the columns: each writes its part in fp32, and a second kernel adds them
// up in a fixed order.
#include "gemm_4bit_split.h"
#include "gemm_4bit_warpgroup.h"

namespace bnb {
namespace {

constexpr int kUnitColumns = 32;
constexpr int kRowsOfTile = 64;

// How a block is cut for a number of tokens. Registers are those of a thread that produces or consumes; at launch all have as many.
template <int tokens> struct Shape;
template <> struct Shape<64> {
    static constexpr int kGroups = 4, kTiles = 1, kSlices = 2, kStages = 4, kProducerRegisters = 64, kConsumerRegisters = 104;
};
template <> struct Shape<128> {
    static constexpr int kGroups = 2, kTiles = 2, kSlices = 2, kStages = 3, kProducerRegisters = 56, kConsumerRegisters = 224;
};
template <> struct Shape<256> {
    static constexpr int kGroups = 2, kTiles = 1, kSlices = 1, kStages = 4, kProducerRegisters = 56, kConsumerRegisters = 224;
};

template <int tokens> struct Layout : Shape<tokens> {
    using Shape<tokens>::kGroups, Shape<tokens>::kTiles, Shape<tokens>::kSlices, Shape<tokens>::kStages;

    static constexpr int kConsumers = kGroups * kGroupThreads;
    static constexpr int kThreads = kProducers + kConsumers;
    static constexpr int kRows = kGroups * kTiles * kRowsOfTile;
    static constexpr int kChunk = kSlices * kSliceTerms;
    static constexpr int kUnits = kChunk / kUnitColumns; // of a row
    static constexpr int kCodeBytes = kChunk / 2;        // of a row
    static constexpr Swizzle kCodeSwizzle = kCodeBytes == 64 ? Swizzle::k64Bytes : Swizzle::k32Bytes;
    static constexpr int kPitch = kRows + 4; // floats from token to token of the result: the lanes of a store are in different banks

    static constexpr size_t kSliceBytes = size_t(tokens) * kSlicePitch;
    static constexpr size_t kCopyBytes = kSlices * kSliceBytes + size_t(kRows) * kCodeBytes;
    static constexpr size_t kScaleBytes = size_t(kRows) * kUnits * sizeof(float);
    static constexpr size_t kRingBytes = kStages * kCopyBytes;
    static constexpr size_t kSharedBytes = kTableBytes<kWideStep> + kOperandAlignment + kRingBytes + kStages * kScaleBytes;

    static constexpr int kLaunchRegisters = kRegisters / kThreads / 8 * 8;
    static_assert(kProducers * Shape<tokens>::kProducerRegisters + kConsumers * Shape<tokens>::kConsumerRegisters <= kThreads * kLaunchRegisters);
    static_assert(kSharedBytes + 2 * kStages * sizeof(uint64_t) <= kMostSharedBytes);
    static_assert(size_t(tokens) * kPitch * sizeof(float) <= kRingBytes); // which takes the result in the end
    static_assert(kUnits * kTiles % 2 == 0);                              // two sets of fragments take turns
};

// A block's view of its operands. The first 128 threads produce.
template <typename T, bool nested, int kTokens> struct WarpgroupBlock : Layout<kTokens> {
    using Cut = Layout<kTokens>;
    using Ring = Position<Cut::kStages>;
    static constexpr int kOwnRows = Cut::kRows / kProducers; // of a thread that produces

    const GemmArgs4bit& args;
    const int shift;
    const uint32_t begin, end; // columns of this block
    const int64_t first_token = int64_t(blockIdx.x) * kTokens, first_row = int64_t(blockIdx.y) * Cut::kRows;
    unsigned char* const table;
    unsigned char* const ring;
    float* const scales;
    Barriers<Cut::kStages>& barriers;

    __device__ __forceinline__ WarpgroupBlock(const GemmArgs4bit& args, int shift, uint32_t columns, unsigned char* memory)
        : args(args), shift(shift), begin(blockIdx.z * columns), end(min(uint32_t(args.K), begin + columns)), table(memory),
          ring(align_operand(memory + kTableBytes<kWideStep>)), scales(reinterpret_cast<float*>(ring + Cut::kRingBytes)),
          barriers(shared_variable<Barriers<Cut::kStages>>()) {}

    __device__ __forceinline__ unsigned char* slice_of(int stage, int slice) const {
        return ring + stage * Cut::kCopyBytes + slice * Cut::kSliceBytes;
    }
    __device__ __forceinline__ unsigned char* codes_of(int stage) const { return slice_of(stage, Cut::kSlices); }
    __device__ __forceinline__ float* scales_of(int stage, int row) const { return scales + (stage * Cut::kRows + row) * Cut::kUnits; }

    __device__ __forceinline__ void prepare(const Levels16& levels) {
        prepare_barriers(barriers, Cut::kConsumers);
        fill_float_pairs<kWideStep>(table, level_of_code(args, levels, lane_index() % 16));
        __syncthreads();
    }

    // ------------------------------------------------------------------------------------------------------------------- producing
    __device__ __forceinline__ void copy(const TensorMap& tokens, const TensorMap& codes, uint32_t first, int stage) const {
        uint64_t* full = &barriers.full[stage];
        barrier_arrive_expecting(full, int(Cut::kCopyBytes));
#pragma unroll
        for (int slice = 0; slice < Cut::kSlices; ++slice)
            copy_tile(slice_of(stage, slice), tokens, int(first) + slice * kSliceTerms, int(first_token), full);
        copy_tile(codes_of(stage), codes, int(first / 2), int(first_row), full);
    }

    // Of a row's units beyond the last column those of the last are fetched.
    __device__ __forceinline__ uint32_t block_of(const RowBlocks& row, uint32_t first, int unit) const {
        return row.block(int(min(first + uint32_t(unit * kUnitColumns), uint32_t(args.K) - kUnitColumns)), shift);
    }

    __device__ __forceinline__ void fetch_scales(RawScale (&raw)[kOwnRows][Cut::kUnits], const RowBlocks (&rows)[kOwnRows], uint32_t first) const {
#pragma unroll
        for (int r = 0; r < kOwnRows; ++r)
#pragma unroll
            for (int unit = 0; unit < Cut::kUnits; ++unit)
                raw[r][unit] = fetch_scale<nested>(args.scales, block_of(rows[r], first, unit));
    }

    // Columns that do not exist count as 0, even next to an infinite scale.
    __device__ __forceinline__ void store_scales(const RawScale (&raw)[kOwnRows][Cut::kUnits], const RowBlocks (&rows)[kOwnRows], uint32_t first,
                                                 int stage, float offset) const {
#pragma unroll
        for (int r = 0; r < kOwnRows; ++r) {
            const int row = int(threadIdx.x) + r * kProducers;
            Vector<float, Cut::kUnits> values;
#pragma unroll
            for (int unit = 0; unit < Cut::kUnits; ++unit) {
                const float scale = decode_scale<nested>(args.scales, raw[r][unit], block_of(rows[r], first, unit), offset);
                values.value[unit] = first + uint32_t(unit * kUnitColumns) < uint32_t(args.K) ? scale : 0.0f;
            }
            *reinterpret_cast<Vector<float, Cut::kUnits>*>(scales_of(stage, row)) = values;
        }
    }

    __device__ __forceinline__ void produce(const TensorMap& tokens, const TensorMap& codes) const {
        const float offset = scale_offset<nested>(args.scales);
        RowBlocks rows[kOwnRows];
#pragma unroll
        for (int r = 0; r < kOwnRows; ++r)
            rows[r] = RowBlocks(min(first_row + int(threadIdx.x) + r * kProducers, args.N - 1), args.K, shift);
        RawScale raw[kOwnRows][Cut::kUnits], following[kOwnRows][Cut::kUnits];
        fetch_scales(raw, rows, begin);
        Ring at;
        for (uint32_t first = begin; first < end; first += Cut::kChunk, at.advance()) {
            fetch_scales(following, rows, first + Cut::kChunk);
            barrier_wait(&barriers.empty[at.stage], ~at.round & 1);
            if (threadIdx.x == 0)
                copy(tokens, codes, first, at.stage);
            store_scales(raw, rows, first, at.stage, offset);
            barrier_arrive(&barriers.full[at.stage]);
            memcpy(raw, following, sizeof raw);
        }
    }

    // ------------------------------------------------------------------------------------------------------------------- consuming
    // The first of the lane's two rows of a tile; the other is 8 further.
    __device__ __forceinline__ int own_row(int tile) const {
        return (consumer_group() * Cut::kTiles + tile) * kRowsOfTile + warp_index() % 4 * 16 + lane_index() / 4;
    }

    __device__ __forceinline__ void dequantise(uint32_t (&fragments)[2][4], int stage, int tile, int unit) const {
        const int g = lane_index() / 4, row = own_row(tile);
        const uint32_t byte = 0x7604u + 16u * uint32_t(lane_index() % 4), copy = copy_of_lane(); // as look_up() has it, the byte being the lane's
        const int vector = unit ^ (Cut::kCodeSwizzle == Swizzle::k64Bytes ? g / 2 : g / 4);
        Vector<uint32_t, 4> words[2];
        float scale[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            words[r] = *reinterpret_cast<const Vector<uint32_t, 4>*>(codes_of(stage) + (row + r * 8) * Cut::kCodeBytes + vector * 16);
            scale[r] = scales_of(stage, row + r * 8)[unit];
        }
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t offset = __byte_perm(words[i % 2].value[step * 2 + i / 2], copy, byte);
                fragments[step][i] = scaled_pair<T>(*reinterpret_cast<const uint2*>(table + offset), scale[i % 2], scale[i % 2]);
            }
    }

    __device__ __forceinline__ void consume(float (&sums)[Cut::kTiles][kTokens / 2]) const {
        uint32_t fragments[2][2][4];
        settle(sums);
        Ring at;
        for (uint32_t first = begin; first < end; first += Cut::kChunk, at.advance()) {
            barrier_wait(&barriers.full[at.stage], at.round & 1);
#pragma unroll
            for (int unit = 0; unit < Cut::kUnits; ++unit)
#pragma unroll
                for (int tile = 0; tile < Cut::kTiles; ++tile) {
                    uint32_t (&own)[2][4] = fragments[(unit * Cut::kTiles + tile) % 2];
                    dequantise(own, at.stage, tile, unit);
                    const uint64_t operand = describe_operand(slice_of(at.stage, unit / 2)) + uint64_t(unit % 2 * 4);
                    settle(own);
                    group_fence();
#pragma unroll
                    for (int step = 0; step < 2; ++step)
                        group_multiply<T>(sums[tile], own[step], operand + uint64_t(step * 2));
                    group_commit();
                    group_wait<1>(); // the other set of fragments is free
                    if (unit == 0 && tile == 0)
                        release(barriers, at.before(), first != begin); // its last products have just ended
                }
        }
        group_wait<0>();
    }

    // ------------------------------------------------------------------------------------------------------------------- the result
    // By way of shared memory, so that what a warp stores at once are successive rows of W, that is successive elements of the result.
    __device__ __forceinline__ float* result_of(int token, int row) const { return reinterpret_cast<float*>(ring) + token * Cut::kPitch + row; }

    __device__ __forceinline__ void lay_out(const float (&sums)[Cut::kTiles][kTokens / 2]) const {
        const int t = lane_index() % 4;
#pragma unroll
        for (int tile = 0; tile < Cut::kTiles; ++tile)
#pragma unroll
            for (int i = 0; i < kTokens / 2; ++i)
                *result_of(i / 4 * 8 + t * 2 + i % 2, own_row(tile) + i / 2 % 2 * 8) = sums[tile][i];
    }

    __device__ __forceinline__ void store(float* partial, bool has_vectors) const {
        const int token_count = int(min(int64_t(kTokens), args.M - first_token));
        const ResultColumns<T> to{first_token, first_row, args.N, token_count, static_cast<const T*>(args.bias), static_cast<T*>(args.out), partial};
        if (has_vectors)
            to.template store<Cut::kRows, Cut::kPitch, Cut::kConsumers, 4>(result_of(0, 0));
        else
            to.template store<Cut::kRows, Cut::kPitch, Cut::kConsumers, 1>(result_of(0, 0));
    }
};

// Blocks (x, y, z): tokens, rows, and parts of `columns` columns. Those that share rows come together, so that codes are read from DRAM once.
template <typename T, bool nested, int kTokens>
__global__ void __launch_bounds__(Layout<kTokens>::kThreads, 1)
    gemm_4bit_warpgroup(const __grid_constant__ TensorMap tokens, const __grid_constant__ TensorMap codes, const __grid_constant__ GemmArgs4bit args,
                        const __grid_constant__ Levels16 levels, int shift, uint32_t columns, float* partial, bool has_vectors) {
    using Cut = Layout<kTokens>;
    WarpgroupBlock<T, nested, kTokens> block(args, shift, columns, dynamic_shared_memory());
    block.prepare(levels);
    if (threadIdx.x < kProducers) {
        keep_registers<Cut::kProducerRegisters>();
        block.produce(tokens, codes);
        meet();
        meet();
    } else {
        take_registers<Cut::kConsumerRegisters>();
        float sums[Cut::kTiles][kTokens / 2] = {};
        block.consume(sums);
        settle(sums);
        meet(); // nobody reads the ring any more
        block.lay_out(sums);
        meet();
        block.store(partial == nullptr ? nullptr : partial + int64_t(blockIdx.z) * args.M * args.N, has_vectors);
    }
}

template <typename T, bool nested, int kTokens> int32_t run_tokens(const GemmArgs4bit& args, const GemmPlan& plan, Stream stream) {
    using Cut = Layout<kTokens>;
    const int64_t chunks = divide_up(args.K, Cut::kChunk);
    const int64_t splits = plan.splits < chunks ? plan.splits : chunks, columns = divide_up(chunks, splits) * Cut::kChunk;
    const int64_t used = divide_up(args.K, columns), row_blocks = divide_up(args.N, Cut::kRows);
    if (row_blocks > 65535 || used > 65535)
        return kUnsupported;
    TensorMap tokens, codes;
    int32_t status = make_tensor_map(tokens, args.A, 2, args.K, args.M, kSliceTerms, kTokens, Swizzle::k128Bytes);
    if (status == kOk)
        status = make_tensor_map(codes, args.B, 1, args.K / 2, args.N, Cut::kCodeBytes, Cut::kRows, Cut::kCodeSwizzle);
    if (status != kOk)
        return status;
    float* partial = used > 1 ? plan.partial : nullptr;
    const dim3 grid(unsigned(divide_up(args.M, kTokens)), unsigned(row_blocks), unsigned(used));
    status =
        launch(gemm_4bit_warpgroup<T, nested, kTokens>, grid, dim3(Cut::kThreads), Cut::kSharedBytes, stream, tokens, codes, args,
               levels_of_type(args.quant_type), BlockOf(args.blocksize).shift, uint32_t(columns), partial, has_vectors(args.N, args.out, partial));
    return status != kOk || used == 1 ? status : launch_add_partial_sums<T>(args, partial, int(used), args.N, stream);
}

} // namespace

int32_t launch_gemm_4bit_warpgroup(const GemmArgs4bit& args, const GemmPlan& plan, Stream stream) {
    if (!suits_warp_groups(args, args.K))
        return kUnsupported;
    return with_tile(args, plan, [&](auto* element, auto nested, auto tokens) {
        return run_tokens<std::remove_pointer_t<decltype(element)>, decltype(nested)::value, decltype(tokens)::value>(args, plan, stream);
    });
}

} // namespace bnb
