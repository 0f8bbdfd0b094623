// Managed memory, which pages in and out of the device, and the few elementwise functions that are run on it.
#include "device.h"

#include <cstdlib>

namespace bnb {
namespace {

constexpr int kThreads = 256;

struct Fill {
    float value;
    __device__ __forceinline__ float operator()(float, float, int64_t) const { return value; }
};

struct Count {
    __device__ __forceinline__ float operator()(float, float, int64_t i) const { return float(i); }
};

struct Multiply {
    __device__ __forceinline__ float operator()(float a, float b, int64_t) const { return a * b; }
};

// b may be null; a is not read where the operation does not need it.
template <typename Operation> __global__ void elementwise_kernel(float* a, const float* b, int64_t n, const Operation operation) {
    for (int64_t i = global_thread(); i < n; i += global_threads())
        a[i] = operation(b == nullptr ? 0.0f : a[i], b == nullptr ? 0.0f : b[i], i);
}

__global__ void fill_bytes_kernel(uint8_t* a, uint8_t value, int64_t n) {
    for (int64_t i = global_thread(); i < n; i += global_threads())
        a[i] = value;
}

dim3 grid_for(int64_t n) {
    const int64_t blocks = divide_up(n, kThreads), most = 8 * int64_t(device_properties().multiprocessors);
    return dim3(unsigned(blocks < most ? blocks : most));
}

template <typename Operation> int32_t launch_operation(float* a, const float* b, int64_t n, const Operation& operation, Stream stream) {
    return launch(elementwise_kernel<Operation>, grid_for(n), dim3(kThreads), 0, stream, a, b, n, operation);
}

} // namespace

int32_t launch_elementwise(Elementwise operation, float* a, const float* b, float value, int64_t n, Stream stream) {
    switch (operation) {
    case Elementwise::kFill:
        return launch_operation(a, nullptr, n, Fill{value}, stream);
    case Elementwise::kCount:
        return launch_operation(a, nullptr, n, Count{}, stream);
    case Elementwise::kMultiply:
        return launch_operation(a, b, n, Multiply{}, stream);
    }
    return kBadArgument;
}

int32_t launch_fill_bytes(uint8_t* a, uint8_t value, int64_t n, Stream stream) {
    return launch(fill_bytes_kernel, grid_for(n), dim3(kThreads), 0, stream, a, value, n);
}

#if defined(BNB_CUDA_EMULATION)

void* allocate_managed(size_t bytes) { return malloc(bytes); }

int32_t free_managed(void* p) {
    free(p);
    return kOk;
}

int32_t prefetch_managed(void*, size_t, int32_t, Stream) { return kOk; }

void* allocate_in_order(size_t bytes, Stream) { return malloc(bytes); }

int32_t free_in_order(void* p, Stream) { return free_managed(p); }

#else

void* allocate_managed(size_t bytes) {
    void* p = nullptr;
    return check_device(cudaMallocManaged(&p, bytes, cudaMemAttachGlobal)) == kOk ? p : nullptr;
}

int32_t free_managed(void* p) { return check_device(cudaFree(p)); }

int32_t prefetch_managed(void* p, size_t bytes, int32_t device, Stream stream) {
    int current = 0, moves_pages = 0;
    int32_t status = check_device(cudaGetDevice(&current));
    const int one_of_both = device < 0 ? current : device;
    if (status == kOk)
        status = check_device(cudaDeviceGetAttribute(&moves_pages, cudaDevAttrConcurrentManagedAccess, one_of_both));
    if (status != kOk || moves_pages == 0)
        return status;
#if CUDART_VERSION >= 13000
    const cudaMemLocation place{device < 0 ? cudaMemLocationTypeHost : cudaMemLocationTypeDevice, device < 0 ? 0 : device};
    return check_device(cudaMemPrefetchAsync(p, bytes, place, 0, static_cast<cudaStream_t>(stream)));
#else
    return check_device(cudaMemPrefetchAsync(p, bytes, device < 0 ? cudaCpuDeviceId : device, static_cast<cudaStream_t>(stream)));
#endif
}

void* allocate_in_order(size_t bytes, Stream stream) {
    void* p = nullptr;
    return check_device(cudaMallocAsync(&p, bytes, static_cast<cudaStream_t>(stream))) == kOk ? p : nullptr;
}

int32_t free_in_order(void* p, Stream stream) { return check_device(cudaFreeAsync(p, static_cast<cudaStream_t>(stream))); }

#endif

} // namespace bnb
