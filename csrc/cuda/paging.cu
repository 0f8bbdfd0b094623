// Managed memory, which pages in and out of the device, and the few elementwise functions that are run on it.
#include "device.h"

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

void* allocate_managed(size_t bytes) { return allocate_pages(bytes); }
int32_t free_managed(void* p) { return free_pages(p); }
int32_t prefetch_managed(void* p, size_t bytes, int32_t device, Stream stream) { return move_pages(p, bytes, device, stream); }

void* allocate_in_order(size_t bytes, Stream stream) { return allocate_on_stream(bytes, stream); }
int32_t free_in_order(void* p, Stream stream) { return free_on_stream(p, stream); }

} // namespace bnb
