// The vocabulary of kernels on AMD GPUs; device.h lists it. There are no tensor-core instructions: kernels that need them are not built for HIP.
#pragma once

#include <hip/hip_bfloat16.h>
#include <hip/hip_fp16.h>
#include <hip/hip_runtime.h>

#include <tuple>
#include <utility>

#define __grid_constant__

// The threads of a block; what a second argument asks for is not what it asks of nvcc.
#undef __launch_bounds__
#define __launch_bounds__(threads, ...) __attribute__((amdgpu_flat_work_group_size(1, threads)))

namespace bnb {

constexpr int kParameterBytes = 4096; // what the arguments of a kernel may take

// ----------------------------------------------------------------------------------------------------------------------- warps
// A warp is 32 lanes here as well, although the wavefronts of some GPUs have 64 and hold two: the host, which is compiled once for all of them, has to
// know what it launches. Lanes of a warp run in step, so that masks say nothing.
constexpr int kWarpSize = 32;

template <typename T> __device__ __forceinline__ T __shfl_sync(uint32_t, T value, int lane, int width = kWarpSize) {
    return __shfl(value, lane, width);
}
template <typename T> __device__ __forceinline__ T __shfl_xor_sync(uint32_t, T value, int lanes, int width = kWarpSize) {
    return __shfl_xor(value, lanes, width);
}
template <typename T> __device__ __forceinline__ T __shfl_up_sync(uint32_t, T value, unsigned lanes, int width = kWarpSize) {
    return __shfl_up(value, lanes, width);
}
template <typename T> __device__ __forceinline__ T __shfl_down_sync(uint32_t, T value, unsigned lanes, int width = kWarpSize) {
    return __shfl_down(value, lanes, width);
}

// The warp's half of what the wavefront votes.
__device__ __forceinline__ uint32_t __ballot_sync(uint32_t, bool vote) { return uint32_t(__ballot(vote) >> (__lane_id() & 32)); }
__device__ __forceinline__ bool __any_sync(uint32_t mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
__device__ __forceinline__ bool __all_sync(uint32_t mask, bool vote) { return __ballot_sync(mask, !vote) == 0; }

// What lanes have written is seen by the others of the wavefront.
__device__ __forceinline__ void __syncwarp() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
    __builtin_amdgcn_wave_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}

__device__ __forceinline__ uint32_t warp_max(uint32_t value) {
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
        value = max(value, __shfl_xor(value, distance, kWarpSize));
    return value;
}

// The larger of each half.
__device__ __forceinline__ uint32_t __vmaxu2(uint32_t a, uint32_t b) { return max(a & 0xffffu, b & 0xffffu) | max(a >> 16, b >> 16) << 16; }

// sum + a . b of four signed bytes each.
__device__ __forceinline__ int __dp4a(int a, int b, int sum) {
    char4 of_a, of_b;
    memcpy(&of_a, &a, sizeof a);
    memcpy(&of_b, &b, sizeof b);
    return amd_mixed_dot(of_a, of_b, sum, false);
}

// ---------------------------------------------------------------------------------------------------------------------- memory
template <typename T> __device__ __forceinline__ T& shared_variable() {
    __shared__ T variable;
    return variable;
}

__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
    extern __shared__ __attribute__((aligned(16))) unsigned char dynamic_memory[];
    return dynamic_memory;
}

// There is no copy in the background: it happens at once.
template <typename Word> __device__ __forceinline__ void copy_now(void* shared, const void* global, bool wanted) {
    *static_cast<Word*>(shared) = wanted ? *static_cast<const Word*>(global) : Word{};
}
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool wanted = true) { copy_now<uint4>(shared, global, wanted); }
__device__ __forceinline__ void copy_async_8(void* shared, const void* global, bool wanted = true) { copy_now<uint2>(shared, global, wanted); }
__device__ __forceinline__ void copy_async_4(void* shared, const void* global, bool wanted = true) { copy_now<uint32_t>(shared, global, wanted); }
__device__ __forceinline__ void copy_async_commit() {}
template <int groups_left> __device__ __forceinline__ void copy_async_wait() {}

template <typename T> __device__ __forceinline__ T __ldcs(const T* p) { return *p; }
template <typename T> __device__ __forceinline__ T __ldcg(const T* p) { return *p; }
template <typename T> __device__ __forceinline__ void __stcs(T* p, T value) { *p = value; }
template <typename T> __device__ __forceinline__ void __stcg(T* p, T value) { *p = value; }

// ----------------------------------------------------------------------------------------------------------------- conversions
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(Half value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ __forceinline__ float widen(BFloat16 value) { return to_float(value); }

__device__ __forceinline__ void narrow_to(float value, float& result) { result = value; }
__device__ __forceinline__ void narrow_to(float value, Half& result) { result.bits = __half_as_ushort(__float2half_rn(value)); }
__device__ __forceinline__ void narrow_to(float value, BFloat16& result) { round_to(value, result); }
template <typename T> __device__ __forceinline__ T narrow(float value) {
    T result;
    narrow_to(value, result);
    return result;
}

// Two values in one register, the first in its low half.
template <typename T> __device__ __forceinline__ uint32_t narrow_pair(float first, float second) {
    return uint32_t(narrow<T>(first).bits) | uint32_t(narrow<T>(second).bits) << 16;
}

// --------------------------------------------------------------------------------------------------------------- host: devices
constexpr bool kIsEmulated = false;
constexpr int32_t kRuntimeVersion = 1000 * HIP_VERSION_MAJOR + 10 * HIP_VERSION_MINOR;

// Other libraries ask the runtime for the last error and would take one of ours for theirs: it is taken away.
inline int32_t check_device(hipError_t error) {
    if (error == hipSuccess)
        return kOk;
    (void)hipGetLastError();
    return report_device_error(hipGetErrorString(error));
}

inline int32_t get_device(int& device) { return check_device(hipGetDevice(&device)); }
inline int32_t set_device(int device) { return check_device(hipSetDevice(device)); }

// The capability says nothing about tensor cores here: it stays below that of every NVIDIA GPU.
constexpr int32_t kAnyCapability = 1;

inline DeviceProperties ask_device(int device) {
    const auto attribute = [&](hipDeviceAttribute_t which) {
        int value = 0;
        check_device(hipDeviceGetAttribute(&value, which, device));
        return value;
    };
    return {kAnyCapability, attribute(hipDeviceAttributeMultiprocessorCount), attribute(hipDeviceAttributeMaxSharedMemoryPerBlock)};
}

inline int32_t architecture_of(const void*) { return kAnyCapability; }

// ---------------------------------------------------------------------------------------------------------------- host: memory
// Null: there is none left. What is allocated on a stream exists in its order.
inline void* allocate_pages(size_t bytes) {
    void* p = nullptr;
    return check_device(hipMallocManaged(&p, bytes, hipMemAttachGlobal)) == kOk ? p : nullptr;
}

inline int32_t free_pages(void* p) { return check_device(hipFree(p)); }

// To a device, or to the host if it is negative. Nothing where the GPU cannot fetch pages on its own.
inline int32_t move_pages(void* p, size_t bytes, int32_t device, Stream stream) {
    int can_fetch = 0, own = 0;
    int32_t status = device < 0 ? check_device(hipGetDevice(&own)) : int32_t(kOk);
    if (status == kOk)
        status = check_device(hipDeviceGetAttribute(&can_fetch, hipDeviceAttributeConcurrentManagedAccess, device < 0 ? own : device));
    if (status != kOk || !can_fetch)
        return status;
    return check_device(hipMemPrefetchAsync(p, bytes, device < 0 ? hipCpuDeviceId : device, static_cast<hipStream_t>(stream)));
}

inline void* allocate_on_stream(size_t bytes, Stream stream) {
    void* p = nullptr;
    return check_device(hipMallocAsync(&p, bytes, static_cast<hipStream_t>(stream))) == kOk ? p : nullptr;
}

inline int32_t free_on_stream(void* p, Stream stream) { return check_device(hipFreeAsync(p, static_cast<hipStream_t>(stream))); }

// -------------------------------------------------------------------------------------------------------------- host: launches
template <typename... Parameters, typename... Arguments>
int32_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream, Arguments&&... arguments) {
    std::tuple<std::decay_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
    return std::apply(
        [&](auto&... value) {
            void* pointers[] = {const_cast<void*>(static_cast<const void*>(&value))...};
            return check_device(
                hipLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers, shared_bytes, static_cast<hipStream_t>(stream)));
        },
        values);
}

} // namespace bnb
