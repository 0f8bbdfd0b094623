// What every kernel includes: the platform's vocabulary, then what all kernels share.
//
// Platforms give the same names: CUDA's keywords and intrinsics, and
//   kWarpSize, warp_max(uint32_t)                 the largest value among all lanes of the warp
//   shared_variable<T>()                          one T of the block (T, a struct of the kernel's own, is its name); for the CPU filled with NaN
//   dynamic_shared_memory()                       what the launch asked for, aligned to 16 bytes
//   copy_async_{16,8,4}(shared, global, wanted)   global to shared memory in the background, zeros if not wanted; copy_async_commit() ends a group,
//                                                 copy_async_wait<N>() waits until N groups are left. Before sm_80: at once
//   widen(x), narrow<T>(x), narrow_pair<T>(a, b)  Half and BFloat16 to float and back, rounding to nearest even
//   load_once(p), store_once(p, v)                4, 8 or 16 bytes that will not be touched again, so that they need not stay in the caches
//   launch(kernel, grid, block, shared_bytes, stream, arguments...)   returns a Status
// Tensor-core instructions are listed where they stand, in platform_cuda.h.
#pragma once

#if defined(__HIPCC__) // what nvcc knows by itself, such as __device__
#include <hip/hip_runtime.h>
#endif

#include "kernels.h"

#include "../common/status.h"
#include "../common/types.h"

#if defined(__CUDACC__)
#include "platform_cuda.h"
#elif defined(__HIPCC__)
#include "platform_hip.h"
#elif defined(BNB_CUDA_EMULATION)
#include "platform_host.h"
#else
#error "device.h is for CUDA, for HIP, or for the emulation of the tests"
#endif

namespace bnb {

constexpr uint32_t kWholeWarp = 0xffffffffu;

// ------------------------------------------------------------------------------------------------------------------------------ where am I
__device__ __forceinline__ int lane_index() { return int(threadIdx.x) % kWarpSize; }
__device__ __forceinline__ int warp_index() { return int(threadIdx.x) / kWarpSize; }

// Position of this thread in a grid of one dimension, and the number of its threads.
__device__ __forceinline__ int64_t global_thread() { return int64_t(blockIdx.x) * int64_t(blockDim.x) + int64_t(threadIdx.x); }
__device__ __forceinline__ int64_t global_threads() { return int64_t(gridDim.x) * int64_t(blockDim.x); }

// --------------------------------------------------------------------------------------------------------------------------- vectors
// `count` elements that are moved at once.
template <typename T, int count> struct alignas(sizeof(T) * count) Vector {
    T value[count];
};

// Elements of T in 16 bytes, the most that one instruction moves.
template <typename T> constexpr int kPerVector = 16 / int(sizeof(T));

// What one instruction moves.
template <int bytes> struct WordOfSize;
template <> struct WordOfSize<1> {
    using Type = unsigned char;
};
template <> struct WordOfSize<2> {
    using Type = unsigned short;
};
template <> struct WordOfSize<4> {
    using Type = unsigned int;
};
template <> struct WordOfSize<8> {
    using Type = uint2;
};
template <> struct WordOfSize<16> {
    using Type = uint4;
};

template <int count, typename T> __device__ __forceinline__ Vector<T, count> load_vector(const T* p) {
    return *reinterpret_cast<const Vector<T, count>*>(p);
}

// By an instruction of its own: compilers take the assignment of a vector apart.
template <typename T, int count> __device__ __forceinline__ void store_vector(T* p, const Vector<T, count>& values) {
    using Word = typename WordOfSize<sizeof values>::Type;
    Word word;
    memcpy(&word, &values, sizeof word);
    __stcg(reinterpret_cast<Word*>(p), word);
}

template <typename T> __device__ __forceinline__ T load_once(const T* p) {
    using Word = typename WordOfSize<sizeof(T)>::Type;
    const Word word = __ldcs(reinterpret_cast<const Word*>(p));
    T value;
    memcpy(&value, &word, sizeof value);
    return value;
}

template <typename T> __device__ __forceinline__ void store_once(T* p, const T& value) {
    using Word = typename WordOfSize<sizeof(T)>::Type;
    Word word;
    memcpy(&word, &value, sizeof word);
    __stcs(reinterpret_cast<Word*>(p), word);
}

// One 16-byte vector of floats rounded to T.
template <typename T> __device__ __forceinline__ Vector<T, kPerVector<T>> narrow_vector(const float (&values)[kPerVector<T>]) {
    Vector<uint32_t, 4> words;
    if constexpr (sizeof(T) == 4) {
        for (int i = 0; i < 4; ++i)
            words.value[i] = float_bits(values[i]);
    } else {
        for (int i = 0; i < 4; ++i)
            words.value[i] = narrow_pair<T>(values[2 * i], values[2 * i + 1]);
    }
    Vector<T, kPerVector<T>> result;
    memcpy(&result, &words, sizeof result);
    return result;
}

// -------------------------------------------------------------------------------------------------------------------------- reductions
// The sum over `width` neighbouring lanes, in the same order on every lane and in every run.
template <int width = kWarpSize, typename T> __device__ __forceinline__ T warp_sum(T value) {
    for (int distance = width / 2; distance > 0; distance /= 2)
        value += __shfl_xor_sync(kWholeWarp, value, distance);
    return value;
}

// ------------------------------------------------------------------------------------------------------------------------------- host
inline bool is_aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

inline int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// Calls `run` with a null pointer to the element type that `dtype` names.
template <typename Run> auto with_element_type(DType dtype, Run run) {
    switch (dtype) {
    case kFloat16:
        return run(static_cast<Half*>(nullptr));
    case kBFloat16:
        return run(static_cast<BFloat16*>(nullptr));
    default:
        return run(static_cast<float*>(nullptr));
    }
}

} // namespace bnb
