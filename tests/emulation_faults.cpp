// Kernels that are wrong in the ways that the emulation must notice, and one that uses every kind of waiting and is right. The first argument names one.
#include "../csrc/cuda/device.h"

#include <cstdio>
#include <cstdlib>

using namespace bnb;

namespace {

struct Row {
    float value[64];
};

__global__ void right(int* sums) {
    Row& row = shared_variable<Row>();
    const int own = int(threadIdx.x);
    row.value[own] = float(own);
    __syncthreads();
    const float other = row.value[63 - own];
    int total = int(warp_sum(other));
    if (own % 2 == 0)
        total += __shfl_xor_sync(0x55555555u, total, 2) + __popc(__ballot_sync(0x55555555u, own >= 32));
    total += int(warp_max(uint32_t(own))) + __syncthreads_count(own == 5);
    uint4* staged = reinterpret_cast<uint4*>(dynamic_shared_memory());
    copy_async_16(staged + own, reinterpret_cast<const uint4*>(sums) + 16 + own);
    copy_async_commit();
    copy_async_wait<0>();
    atomicAdd(&sums[blockIdx.x], total + int(staged[own].w));
}

__global__ void missing_barrier(int* sums) {
    Row& row = shared_variable<Row>();
    row.value[threadIdx.x] = 1.0f;
    const float other = row.value[63 - threadIdx.x];
    if (!(other == 1.0f))
        atomicAdd(&sums[0], 1);
}

__global__ void missing_wait(int* sums) {
    uint4* staged = reinterpret_cast<uint4*>(dynamic_shared_memory());
    copy_async_16(staged + threadIdx.x, reinterpret_cast<const uint4*>(sums) + 16 + threadIdx.x);
    copy_async_commit();
    if (staged[threadIdx.x].w == ~0u)
        atomicAdd(&sums[0], 1);
    copy_async_wait<0>();
}

__global__ void barrier_of_some(int*) {
    if (threadIdx.x < 40)
        __syncthreads();
}

__global__ void different_barriers(int*) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
}

__global__ void different_masks(int*) { __shfl_xor_sync(threadIdx.x % 32 < 16 ? 0xffffffffu : 0xffff0000u, 1, 1); }

__global__ void lane_outside_mask(int*) { __shfl_xor_sync(0xfffffffeu, 1, 1); }

__global__ void value_of_absent_lane(int*) {
    if (threadIdx.x % 2 == 0)
        __shfl_sync(0x55555555u, 1, 1);
}

__global__ void lane_that_ended(int*) {
    if (threadIdx.x != 7)
        __shfl_xor_sync(0xffffffffu, 1, 1);
}

__global__ void beyond_variable(int*) { shared_variable<Row>().value[64 + threadIdx.x] = 0.0f; }

__global__ void beyond_dynamic(int*) { dynamic_shared_memory()[64 * 16 + threadIdx.x] = 0; }

struct Huge {
    float value[13000];
};

__global__ void too_much_static(int*) { shared_variable<Huge>().value[0] = 0.0f; }

__global__ void misaligned_copy(int* sums) { copy_async_16(dynamic_shared_memory(), reinterpret_cast<const char*>(sums) + 4); }

struct Case {
    const char* name;
    void (*kernel)(int*);
};

// clang-format off
#define BNB_CASE(name) {#name, name}
const Case cases[] = {
    BNB_CASE(right), BNB_CASE(missing_barrier), BNB_CASE(missing_wait), BNB_CASE(barrier_of_some), BNB_CASE(different_barriers), BNB_CASE(different_masks),
    BNB_CASE(lane_outside_mask), BNB_CASE(value_of_absent_lane), BNB_CASE(lane_that_ended), BNB_CASE(beyond_variable), BNB_CASE(beyond_dynamic),
    BNB_CASE(too_much_static), BNB_CASE(misaligned_copy),
};
// clang-format on

} // namespace

// Prints the first two sums of two blocks of 64 threads, and the status of a launch with more shared memory than there is.
int main(int, char** arguments) {
    alignas(16) static int sums[16 * 4 + 64 * 4];
    for (int i = 64; i < 64 + 64 * 4; ++i)
        sums[i] = i % 4 == 3 ? 1000 : 0;
    for (const Case& test : cases)
        if (strcmp(test.name, arguments[1]) == 0) {
            const int32_t status = launch(test.kernel, 2, 64, 64 * 16, nullptr, sums);
            printf("%d %d %d %d\n", status, sums[0], sums[1], launch(test.kernel, 1, 64, 300000, nullptr, sums));
            return 0;
        }
    return 2;
}
