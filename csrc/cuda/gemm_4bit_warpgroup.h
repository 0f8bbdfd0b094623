// What the kernels of 4-bit products by warp groups share: the ring of chunks that one group of a block fills and the others empty, and the way of a
// result from registers to memory.
#pragma once

#include "hopper.h"
#include "gemm_4bit_tensor.h"

namespace bnb {

constexpr int kSliceTerms = 64; // of a sum, in 128 bytes of a token
constexpr int kSlicePitch = kSliceTerms * 2;
constexpr int kProducers = kGroupThreads; // the first threads of a block
constexpr size_t kOperandAlignment = 1024;
constexpr size_t kMostSharedBytes = 227 * 1024;
constexpr int kRegisters = 65536; // of a multiprocessor

template <int stages> struct Barriers {
    uint64_t full[stages], empty[stages];
};

// Where a thread is in the ring.
template <int stages> struct Position {
    int stage = 0;
    uint32_t round = 0; // its low bit is the parity of the phase that fills the stage

    __device__ __forceinline__ void advance() {
        if (++stage == stages)
            stage = 0, ++round;
    }
    __device__ __forceinline__ int before() const { return stage == 0 ? stages - 1 : stage - 1; }
};

// One barrier for both kinds of warp groups, wherever they come from.
__device__ __forceinline__ void meet() { __syncthreads(); }

// Which of the groups that consume the thread is in.
__device__ __forceinline__ int consumer_group() { return int(threadIdx.x) / kGroupThreads - 1; }

// The first address from `memory` on that products can read an operand from.
__device__ __forceinline__ unsigned char* align_operand(unsigned char* memory) {
    return memory + (kOperandAlignment - shared_address(memory) % kOperandAlignment) % kOperandAlignment;
}

// A thread makes the barriers; the caller puts a barrier behind it. `consumers` and the producers are threads, and one of these starts the copies.
template <int stages> __device__ __forceinline__ void prepare_barriers(Barriers<stages>& barriers, int consumers) {
    if (threadIdx.x != 0)
        return;
    for (int stage = 0; stage < stages; ++stage) {
        barrier_init(&barriers.full[stage], kProducers + 1);
        barrier_init(&barriers.empty[stage], consumers / kWarpSize);
    }
    fence_barrier_init();
}

// Called by a warp that has read a stage. Without a branch: compilers do not let products overlap with one.
template <int stages> __device__ __forceinline__ void release(Barriers<stages>& barriers, int stage, bool is_filled) {
    __syncwarp();
    barrier_arrive(&barriers.empty[stage], is_filled && lane_index() == 0);
}

// Where results go: columns of [tokens, width], as a part of a sum in fp32 or, rounded and with the bias, as T.
template <typename T> struct ResultColumns {
    int64_t first_token, first_column, width;
    int token_count;
    const T* bias; // of all columns, or null
    T* out;
    float* partial; // or null

    // From results [tokens, columns] in shared memory, `pitch` floats from token to token, by the threads that consume. What a warp stores at once
    // are successive elements. `count` of them exist together and are aligned to their size.
    template <int columns, int pitch, int consumers, int count> __device__ __forceinline__ void store(const float* results) const {
        constexpr int vectors = columns / count, threads_of_token = vectors < consumers ? vectors : consumers;
        const int thread = int(threadIdx.x) - kProducers;
#pragma unroll
        for (int column = thread % threads_of_token * count; column < columns; column += threads_of_token * count) {
            if (first_column + column >= width)
                return;
            for (int token = thread / threads_of_token; token < token_count; token += consumers / threads_of_token)
                store_at(first_token + token, first_column + column, load_vector<count>(results + token * pitch + column));
        }
    }

    template <int count> __device__ __forceinline__ void store_at(int64_t token, int64_t column, const Vector<float, count>& sum) const {
        const int64_t at = token * width + column;
        if (partial != nullptr) {
            store_vector(partial + at, sum);
            return;
        }
        Vector<T, count> rounded;
#pragma unroll
        for (int i = 0; i < count; ++i)
            rounded.value[i] = narrow<T>(sum.value[i] + (bias == nullptr ? 0.0f : widen(bias[column + i])));
        store_vector(out + at, rounded);
    }
};

// ------------------------------------------------------------------------------------------------------------------------------- host
// Whether four neighbouring results of a token exist together, and lie where a vector can be stored.
inline bool has_vectors(int64_t width, const void* out, const float* partial) {
    return width % 4 == 0 && (partial == nullptr ? is_aligned(out, 8) : is_aligned(partial, 16));
}

// Hopper and nothing else, and coordinates that a copy can name.
inline bool suits_warp_groups(const GemmArgs4bit& args, int64_t row_of_activations) {
    constexpr int64_t most_tokens = int64_t(1) << 31;
    return suits_tensor_cores(args, args.A, row_of_activations) && device_properties().capability == 90 && args.M < most_tokens;
}

// Calls `run` with a null pointer to the element type, and as types whether statistics are nested and the tokens of a tile.
template <typename Run> int32_t with_tile(const GemmArgs4bit& args, const GemmPlan& plan, Run run) {
    return with_type_and_nesting(args, [&](auto* element, auto nested) -> int32_t {
        switch (plan.tile) {
        case 64:
            return run(element, nested, std::integral_constant<int, 64>());
        case 128:
            return run(element, nested, std::integral_constant<int, 128>());
        case 256:
            return run(element, nested, std::integral_constant<int, 256>());
        default:
            return kUnsupported;
        }
    });
}

} // namespace bnb
