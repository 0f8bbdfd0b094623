// The vocabulary of kernels on the CPU, for tests; see emulation.h. Names are CUDA's own, or those that platform_cuda.h gives to its instructions.
#pragma once

#include "emulation.h"

#include "../common/types.h"

#include <cmath>
#include <cstdlib>
#include <tuple>
#include <utility>

#define __global__ static
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static thread_local
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::bnb::emulation::here().thread)
#define blockIdx (::bnb::emulation::here().block)
#define blockDim (::bnb::emulation::here().block_size)
#define gridDim (::bnb::emulation::here().grid_size)

#define __syncthreads() ((void)::bnb::emulation::block_barrier(__LINE__))
#define __syncthreads_or(vote) int(::bnb::emulation::block_barrier(__LINE__, (vote) != 0) > 0)
#define __syncthreads_count(vote) ::bnb::emulation::block_barrier(__LINE__, (vote) != 0)

// ------------------------------------------------------------------------------------------------------------------------- vector types
struct alignas(8) uint2 {
    unsigned int x, y;
};
struct alignas(16) uint4 {
    unsigned int x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

inline uint2 make_uint2(unsigned int x, unsigned int y) { return {x, y}; }
inline uint4 make_uint4(unsigned int x, unsigned int y, unsigned int z, unsigned int w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// --------------------------------------------------------------------------------------------------------------------------- arithmetic
// Compiled with -ffp-contract=off: every operation rounds once, to nearest.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline float __int2float_rn(int a) { return float(a); }
inline float __uint2float_rn(unsigned int a) { return float(a); }
inline int __float2int_rn(float a) { return int(std::nearbyint(a)); }

inline unsigned int __float_as_uint(float a) { return bnb::float_bits(a); }
inline int __float_as_int(float a) { return int(bnb::float_bits(a)); }
inline float __uint_as_float(unsigned int a) { return bnb::float_from_bits(a); }
inline float __int_as_float(int a) { return bnb::float_from_bits(uint32_t(a)); }

inline int __popc(unsigned int a) { return __builtin_popcount(a); }
inline int __clz(int a) { return a == 0 ? 32 : __builtin_clz(unsigned(a)); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline unsigned int __umulhi(unsigned int a, unsigned int b) { return unsigned(uint64_t(a) * b >> 32); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned int min(unsigned int a, unsigned int b) { return a < b ? a : b; }
inline unsigned int max(unsigned int a, unsigned int b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// Byte i of the result is byte (selector >> 4i) & 7 of the eight bytes b:a; with bit 3 of that digit, its sign eight times.
inline unsigned int __byte_perm(unsigned int a, unsigned int b, unsigned int selector) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    unsigned int result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned int digit = selector >> 4 * i & 15;
        const unsigned int byte = unsigned(bytes >> 8 * (digit & 7)) & 0xff;
        result |= (digit & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i;
    }
    return result;
}

// The larger of each half.
inline unsigned int __vmaxu2(unsigned int a, unsigned int b) { return max(a & 0xffffu, b & 0xffffu) | max(a >> 16, b >> 16) << 16; }

inline int __dp4a(int a, int b, int c) {
    uint32_t sum = uint32_t(c);
    for (int i = 0; i < 4; ++i)
        sum += uint32_t(int(int8_t(a >> 8 * i)) * int(int8_t(b >> 8 * i)));
    return int(sum);
}

// ------------------------------------------------------------------------------------------------------------------------ memory, atomics
template <typename T> inline T __ldg(const T* p) { return *p; }
template <typename T> inline T __ldcs(const T* p) { return *p; }
template <typename T> inline T __ldcg(const T* p) { return *p; }
template <typename T> inline void __stcs(T* p, T value) { *p = value; }
template <typename T> inline void __stcg(T* p, T value) { *p = value; }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T> inline T exchange_for(T* p, T value) { return std::exchange(*p, value); }
template <typename T> inline T atomicAdd(T* p, T value) { return exchange_for(p, T(*p + value)); }
template <typename T> inline T atomicOr(T* p, T value) { return exchange_for(p, T(*p | value)); }
template <typename T> inline T atomicAnd(T* p, T value) { return exchange_for(p, T(*p & value)); }
template <typename T> inline T atomicMax(T* p, T value) { return exchange_for(p, *p < value ? value : *p); }
template <typename T> inline T atomicMin(T* p, T value) { return exchange_for(p, value < *p ? value : *p); }
template <typename T> inline T atomicExch(T* p, T value) { return exchange_for(p, value); }
template <typename T> inline T atomicCAS(T* p, T expected, T value) { return exchange_for(p, *p == expected ? value : *p); }

// ------------------------------------------------------------------------------------------------------------------------- warp operations
namespace bnb {
namespace emulation {

// What a lane brings to a shuffle: its value, and the lane whose value it wants.
template <typename T> struct Wish {
    T value;
    int lane;
};

template <typename T> void give_wishes(const Part (&parts)[kWarpSize], uint32_t mask) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
        if ((mask >> lane & 1) == 0)
            continue;
        const int source = static_cast<const Wish<T>*>(parts[lane].in)->lane;
        if ((mask >> source & 1) == 0)
            fail("lane %d wants the value of lane %d, which the mask %#x leaves out", lane, source, mask);
        *static_cast<T*>(parts[lane].out) = static_cast<const Wish<T>*>(parts[source].in)->value;
    }
}

template <typename T> T shuffle_from(uint32_t mask, T value, int lane) {
    const Wish<T> wish{value, lane};
    T result;
    warp_operation(mask, give_wishes<T>, &wish, &result);
    return result;
}

// The lanes' values are combined, and every lane gets the result.
template <typename T, T (*combine)(T, T)> void give_combined(const Part (&parts)[kWarpSize], uint32_t mask) {
    bool is_first = true;
    T total{};
    for (int lane = 0; lane < kWarpSize; ++lane)
        if (mask >> lane & 1) {
            const T value = *static_cast<const T*>(parts[lane].in);
            total = is_first ? value : combine(total, value);
            is_first = false;
        }
    for (int lane = 0; lane < kWarpSize; ++lane)
        if (mask >> lane & 1)
            *static_cast<T*>(parts[lane].out) = total;
}

template <typename T, T (*combine)(T, T)> T combine_lanes(uint32_t mask, T value) {
    T result;
    warp_operation(mask, give_combined<T, combine>, &value, &result);
    return result;
}

template <typename T> T larger(T a, T b) { return a < b ? b : a; }
template <typename T> T smaller(T a, T b) { return b < a ? b : a; }
template <typename T> T sum(T a, T b) { return a + b; }
template <typename T> T union_of(T a, T b) { return a | b; }
template <typename T> T intersection(T a, T b) { return a & b; }

inline int own_lane() { return here().lane; }

} // namespace emulation
} // namespace bnb

template <typename T> T __shfl_sync(unsigned int mask, T value, int lane, int width = 32) {
    return bnb::emulation::shuffle_from(mask, value, (bnb::emulation::own_lane() & ~(width - 1)) + (lane & (width - 1)));
}
template <typename T> T __shfl_xor_sync(unsigned int mask, T value, int distance, int width = 32) {
    const int own = bnb::emulation::own_lane(), other = own ^ distance;
    return bnb::emulation::shuffle_from(mask, value, other / width > own / width ? own : other);
}
template <typename T> T __shfl_down_sync(unsigned int mask, T value, int distance, int width = 32) {
    const int own = bnb::emulation::own_lane();
    return bnb::emulation::shuffle_from(mask, value, own % width + distance < width ? own + distance : own);
}
template <typename T> T __shfl_up_sync(unsigned int mask, T value, int distance, int width = 32) {
    const int own = bnb::emulation::own_lane();
    return bnb::emulation::shuffle_from(mask, value, own % width >= distance ? own - distance : own);
}

inline void __syncwarp(unsigned int mask = 0xffffffffu) {
    bnb::emulation::combine_lanes<unsigned int, bnb::emulation::union_of<unsigned int>>(mask, 0u);
}
inline unsigned int __ballot_sync(unsigned int mask, int vote) {
    return bnb::emulation::combine_lanes<unsigned int, bnb::emulation::union_of<unsigned int>>(mask, vote ? 1u << bnb::emulation::own_lane() : 0u);
}
inline int __any_sync(unsigned int mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned int mask, int vote) { return __ballot_sync(mask, vote) == mask; }

namespace bnb {

constexpr int kWarpSize = emulation::kWarpSize;

constexpr int kParameterBytes = 4096;

inline uint32_t warp_max(uint32_t value) { return emulation::combine_lanes<uint32_t, emulation::larger<uint32_t>>(~0u, value); }

// ---------------------------------------------------------------------------------------------------------------------- shared memory
template <typename T> T& shared_variable() {
    static emulation::SharedSlot slot;
    return *static_cast<T*>(emulation::shared_storage(slot, sizeof(T), alignof(T)));
}

inline unsigned char* dynamic_shared_memory() { return static_cast<unsigned char*>(emulation::dynamic_shared_storage()); }

inline void copy_async_16(void* shared, const void* global, bool wanted = true) { emulation::copy_async(shared, global, 16, wanted ? 16 : 0); }
inline void copy_async_8(void* shared, const void* global, bool wanted = true) { emulation::copy_async(shared, global, 8, wanted ? 8 : 0); }
inline void copy_async_4(void* shared, const void* global, bool wanted = true) { emulation::copy_async(shared, global, 4, wanted ? 4 : 0); }
inline void copy_async_commit() { emulation::commit_group(); }
template <int groups_left> inline void copy_async_wait() { emulation::wait_group(groups_left); }

// -------------------------------------------------------------------------------------------------------------------------- conversions
inline float widen(float value) { return value; }
inline float widen(Half value) { return to_float(value); }
inline float widen(BFloat16 value) { return to_float(value); }
template <typename T> inline T narrow(float value) { return from_float<T>(value); }

// Two values in one register, the first in its low half.
template <typename T> inline uint32_t narrow_pair(float first, float second) {
    return uint32_t(from_float<T>(first).bits) | uint32_t(from_float<T>(second).bits) << 16;
}

// ------------------------------------------------------------------------------------------------------------------------ tensor cores
// What a lane brings to a product of its warp; how the fragments are laid out is said in platform_cuda.h.
struct MmaOperands {
    uint32_t a[4], b[2];
    float c[4];
};

template <typename T> float half_of_word(uint32_t word, int half) { return to_float(T{uint16_t(word >> 16 * half)}); }

template <typename T> void multiply_m16n8k16(const emulation::Part (&parts)[kWarpSize], uint32_t mask) {
    if (mask != ~0u)
        emulation::fail("a product of a warp lacks lanes: mask %#x", mask);
    float a[16][16], b[16][8];
    const auto operands = [&](int lane) { return static_cast<const MmaOperands*>(parts[lane].in); };
    for (int lane = 0; lane < kWarpSize; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i)
            for (int half = 0; half < 2; ++half)
                a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = half_of_word<T>(operands(lane)->a[i], half);
        for (int i = 0; i < 2; ++i)
            for (int half = 0; half < 2; ++half)
                b[2 * t + i * 8 + half][g] = half_of_word<T>(operands(lane)->b[i], half);
    }
    for (int lane = 0; lane < kWarpSize; ++lane)
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
            double sum = operands(lane)->c[i];
            for (int k = 0; k < 16; ++k)
                sum += double(a[row][k]) * b[k][column];
            static_cast<float*>(parts[lane].out)[i] = float(sum);
        }
}

template <typename T> void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
    if (emulation::architecture() < (std::is_same<T, BFloat16>::value ? 80 : 75))
        emulation::fail("this device has no tensor cores for these elements");
    MmaOperands operands;
    memcpy(operands.a, a, sizeof a);
    memcpy(operands.b, b, sizeof b);
    memcpy(operands.c, c, sizeof c);
    emulation::warp_operation(~0u, multiply_m16n8k16<T>, &operands, d);
}

struct IntegerMmaOperands {
    uint32_t a[4], b[2], c[4];
};

inline void multiply_m16n8k32_s8(const emulation::Part (&parts)[kWarpSize], uint32_t mask) {
    if (mask != ~0u)
        emulation::fail("a product of a warp lacks lanes: mask %#x", mask);
    int8_t a[16][32], b[8][32];
    const auto operands = [&](int lane) { return static_cast<const IntegerMmaOperands*>(parts[lane].in); };
    for (int lane = 0; lane < kWarpSize; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i)
            memcpy(a[g + i % 2 * 8] + 4 * t + i / 2 * 16, &operands(lane)->a[i], 4);
        for (int i = 0; i < 2; ++i)
            memcpy(b[g] + 4 * t + i * 16, &operands(lane)->b[i], 4);
    }
    for (int lane = 0; lane < kWarpSize; ++lane)
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
            int32_t sum = 0;
            for (int k = 0; k < 32; ++k)
                sum += int32_t(a[row][k]) * b[column][k];
            static_cast<uint32_t*>(parts[lane].out)[i] = operands(lane)->c[i] + uint32_t(sum);
        }
}

inline void mma_m16n8k32_s8(uint32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const uint32_t (&c)[4]) {
    if (emulation::architecture() < 75)
        emulation::fail("this device has no tensor cores for int8");
    IntegerMmaOperands operands;
    memcpy(operands.a, a, sizeof a);
    memcpy(operands.b, b, sizeof b);
    memcpy(operands.c, c, sizeof c);
    emulation::warp_operation(~0u, multiply_m16n8k32_s8, &operands, d);
}

// ----------------------------------------------------------------------------------------------------------------------- host: devices
constexpr bool kIsEmulated = true;
constexpr int32_t kRuntimeVersion = 0;

inline thread_local int current_device = 0;

inline int32_t get_device(int& device) { return device = current_device, int32_t(kOk); }
inline int32_t set_device(int device) {
    if (device != 0 && device != 1)
        return report_device_error("the emulation has two devices, number 0 and 1");
    return current_device = device, int32_t(kOk);
}
inline DeviceProperties ask_device(int) { return {emulation::capability(), 4, emulation::shared_memory_limit()}; }
inline int32_t architecture_of(const void*) { return emulation::architecture(); }

// ------------------------------------------------------------------------------------------------------------------------ host: memory
inline void* allocate_pages(size_t bytes) { return malloc(bytes); }
inline int32_t free_pages(void* p) {
    free(p);
    return kOk;
}
inline int32_t move_pages(void*, size_t, int32_t, Stream) { return kOk; }
inline void* allocate_on_stream(size_t bytes, Stream) { return malloc(bytes); }
inline int32_t free_on_stream(void* p, Stream) { return free_pages(p); }

// ---------------------------------------------------------------------------------------------------------------------- host: launches
template <typename... Parameters, typename... Arguments>
int32_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream, Arguments&&... arguments) {
    const std::tuple<std::decay_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
    const bool done = emulation::launch(grid, block, shared_bytes, [&] { std::apply(kernel, values); });
    return done ? int32_t(kOk) : report_device_error("the emulated device cannot launch this grid, block or amount of shared memory");
}

} // namespace bnb
