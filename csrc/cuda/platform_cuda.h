// The vocabulary of kernels on NVIDIA GPUs; device.h lists it. Conditions on the architecture stand in these wrappers and nowhere else.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <tuple>
#include <utility>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 700 // these make a copy of a parameter that is looked up by a variable index
#undef __grid_constant__
#define __grid_constant__
#endif

namespace bnb {

constexpr int kWarpSize = 32;

// What the arguments of a kernel may take; before CUDA 13 there were GPUs that take no more.
constexpr int kParameterBytes = CUDART_VERSION >= 13000 ? 32764 : 4096;

// --------------------------------------------------------------------------------------------------------------------- warps
__device__ __forceinline__ uint32_t warp_max(uint32_t value) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(0xffffffffu, value);
#else
    for (int distance = 16; distance > 0; distance /= 2)
        value = max(value, __shfl_xor_sync(0xffffffffu, value, distance));
    return value;
#endif
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 610 // sum + a . b of four signed bytes each
__device__ __forceinline__ int __dp4a(int a, int b, int sum) {
    for (int shift = 24; shift >= 0; shift -= 8)
        sum += (int(uint32_t(a) << shift) >> 24) * (int(uint32_t(b) << shift) >> 24);
    return sum;
}
#endif

// ------------------------------------------------------------------------------------------------------------- shared memory
template <typename T> __device__ __forceinline__ T& shared_variable() {
    __shared__ T variable;
    return variable;
}

__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
}

// The address that instructions on shared memory take.
__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

template <int bytes, typename Word> __device__ __forceinline__ void copy_async(void* shared, const void* global, bool wanted) {
#if __CUDA_ARCH__ >= 800
    const int bytes_of_source = wanted ? bytes : 0;
    if constexpr (bytes == 16) // past the first-level cache
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global), "r"(bytes_of_source) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(shared_address(shared)), "l"(global), "n"(bytes), "r"(bytes_of_source)
                     : "memory");
#else
    *static_cast<Word*>(shared) = wanted ? *static_cast<const Word*>(global) : Word{};
#endif
}

__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool wanted = true) { copy_async<16, uint4>(shared, global, wanted); }
__device__ __forceinline__ void copy_async_8(void* shared, const void* global, bool wanted = true) { copy_async<8, uint2>(shared, global, wanted); }
__device__ __forceinline__ void copy_async_4(void* shared, const void* global, bool wanted = true) {
    copy_async<4, uint32_t>(shared, global, wanted);
}

__device__ __forceinline__ void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

template <int groups_left> __device__ __forceinline__ void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;\n" ::"n"(groups_left) : "memory");
#endif
}

// --------------------------------------------------------------------------------------------------------------- conversions
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(Half value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ __forceinline__ float widen(BFloat16 value) { return float_from_bits(uint32_t(value.bits) << 16); }

__device__ __forceinline__ void narrow_to(float value, float& result) { result = value; }
__device__ __forceinline__ void narrow_to(float value, Half& result) { result.bits = __half_as_ushort(__float2half_rn(value)); }
__device__ __forceinline__ void narrow_to(float value, BFloat16& result) { result.bits = __nv_bfloat16_raw(__float2bfloat16_rn(value)).x; }
template <typename T> __device__ __forceinline__ T narrow(float value) {
    T result;
    narrow_to(value, result);
    return result;
}

__device__ __forceinline__ uint32_t word_of(__half2 pair) { return *reinterpret_cast<uint32_t*>(&pair); }
__device__ __forceinline__ uint32_t word_of(__nv_bfloat162 pair) { return *reinterpret_cast<uint32_t*>(&pair); }

// Two values in one register, the first in its low half.
template <typename T> __device__ __forceinline__ uint32_t narrow_pair(float first, float second);
template <> __device__ __forceinline__ uint32_t narrow_pair<Half>(float first, float second) { return word_of(__floats2half2_rn(first, second)); }
template <> __device__ __forceinline__ uint32_t narrow_pair<BFloat16>(float first, float second) {
    return word_of(__floats2bfloat162_rn(first, second));
}

// -------------------------------------------------------------------------------------------------------------- tensor cores
// d[16, 8] = a[16, 16] . b[16, 8] + c of a warp, summed in fp32. Two elements a register; lane 4g + t holds
//   a   rows g, g + 8, g, g + 8 at columns 2t.., 2t.., 2t + 8.., 2t + 8..
//   b   column g at rows 2t.., 2t + 8..
//   c, d   row g at columns 2t, 2t + 1, then row g + 8 there
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]);

template <>
__device__ __forceinline__ void mma_m16n8k16<Half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};\n"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#elif __CUDA_ARCH__ >= 750
    asm("{\n.reg .f32 s0, s1, s2, s3;\n"
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {s0, s1, s2, s3}, {%4, %5}, {%8}, {%10, %11, %12, %13};\n"
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%6, %7}, {%9}, {s0, s1, s2, s3};\n}\n"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
    __trap();
#endif
}

template <> // from sm_80 on
__device__ __forceinline__ void mma_m16n8k16<BFloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};\n"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
    __trap();
#endif
}

// d[16, 8] = a[16, 32] . b[32, 8] + c of int8, modulo 2^32. Four elements a register; lane 4g + t holds
//   a   rows g, g + 8, g, g + 8 at columns 4t.., 4t.., 4t + 16.., 4t + 16..
//   b   column g at rows 4t.., 4t + 16..
//   c, d   as above
__device__ __forceinline__ void mma_m16n8k32_s8(uint32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const uint32_t (&c)[4]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};\n"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
#elif __CUDA_ARCH__ >= 750
    // The registers of a quarter are the fragments of m8n8k16 as they are.
#pragma unroll
    for (int half = 0; half < 2; ++half)
        asm("{\n.reg .s32 s0, s1;\n"
            "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {s0, s1}, {%2}, {%4}, {%6, %7};\n"
            "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%3}, {%5}, {s0, s1};\n}\n"
            : "=r"(d[2 * half]), "=r"(d[2 * half + 1])
            : "r"(a[half]), "r"(a[half + 2]), "r"(b[0]), "r"(b[1]), "r"(c[2 * half]), "r"(c[2 * half + 1]));
#else
    __trap();
#endif
}

// ----------------------------------------------------------------------------------------------------------------- host: devices
constexpr bool kIsEmulated = false;
constexpr int32_t kRuntimeVersion = CUDART_VERSION;

// Other libraries ask the runtime for the last error and would take one of ours for theirs: it is taken away.
inline int32_t check_device(cudaError_t error) {
    if (error == cudaSuccess)
        return kOk;
    cudaGetLastError();
    return report_device_error(cudaGetErrorString(error));
}

inline int32_t get_device(int& device) { return check_device(cudaGetDevice(&device)); }
inline int32_t set_device(int device) { return check_device(cudaSetDevice(device)); }

inline DeviceProperties ask_device(int device) {
    const auto attribute = [&](cudaDeviceAttr which) {
        int value = 0;
        check_device(cudaDeviceGetAttribute(&value, which, device));
        return value;
    };
    return {10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
            attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

// What a kernel's code for the current device was compiled for, 10 * major + minor; 0: it has none.
inline int32_t architecture_of(const void* kernel) {
    cudaFuncAttributes attributes{};
    return check_device(cudaFuncGetAttributes(&attributes, kernel)) == kOk ? attributes.ptxVersion : 0;
}

// ---------------------------------------------------------------------------------------------------------------- host: memory
// Null: there is none left. What is allocated on a stream exists in its order.
inline void* allocate_pages(size_t bytes) {
    void* p = nullptr;
    return check_device(cudaMallocManaged(&p, bytes, cudaMemAttachGlobal)) == kOk ? p : nullptr;
}

inline int32_t free_pages(void* p) { return check_device(cudaFree(p)); }

// To a device, or to the host if it is negative. Nothing where the GPU cannot fetch pages on its own.
inline int32_t move_pages(void* p, size_t bytes, int32_t device, Stream stream) {
    int can_fetch = 0, own = 0;
    int32_t status = device < 0 ? check_device(cudaGetDevice(&own)) : int32_t(kOk);
    if (status == kOk)
        status = check_device(cudaDeviceGetAttribute(&can_fetch, cudaDevAttrConcurrentManagedAccess, device < 0 ? own : device));
    if (status != kOk || !can_fetch)
        return status;
#if CUDART_VERSION >= 13000
    const cudaMemLocation place{device < 0 ? cudaMemLocationTypeHost : cudaMemLocationTypeDevice, device < 0 ? 0 : device};
    return check_device(cudaMemPrefetchAsync(p, bytes, place, 0, static_cast<cudaStream_t>(stream)));
#else
    return check_device(cudaMemPrefetchAsync(p, bytes, device < 0 ? cudaCpuDeviceId : device, static_cast<cudaStream_t>(stream)));
#endif
}

inline void* allocate_on_stream(size_t bytes, Stream stream) {
    void* p = nullptr;
    return check_device(cudaMallocAsync(&p, bytes, static_cast<cudaStream_t>(stream))) == kOk ? p : nullptr;
}

inline int32_t free_on_stream(void* p, Stream stream) { return check_device(cudaFreeAsync(p, static_cast<cudaStream_t>(stream))); }

// -------------------------------------------------------------------------------------------------------------- host: launches
constexpr size_t kSharedBytesWithoutAsking = 48 * 1024;

template <typename... Parameters, typename... Arguments>
int32_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream, Arguments&&... arguments) {
    const void* function = reinterpret_cast<const void*>(kernel);
    if (shared_bytes > kSharedBytesWithoutAsking) {
        const cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
        if (error != cudaSuccess)
            return check_device(error);
    }
    std::tuple<std::decay_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
    return std::apply(
        [&](auto&... value) {
            void* pointers[] = {const_cast<void*>(static_cast<const void*>(&value))...};
            return check_device(cudaLaunchKernel(function, grid, block, pointers, shared_bytes, static_cast<cudaStream_t>(stream)));
        },
        values);
}

} // namespace bnb
