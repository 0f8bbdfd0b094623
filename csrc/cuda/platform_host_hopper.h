// The vocabulary of hopper.h on the CPU, for tests; emulation_hopper.cpp does the work.
#pragma once

#include "platform_host.h"

namespace bnb {

// A copy of what the driver would encode.
struct TensorMap {
    const unsigned char* matrix;
    int64_t rows, bytes_of_row;
    int box_rows, box_bytes; // the bytes of a row
    int bytes_of_element;
    Swizzle swizzle;
};

namespace emulation {

// What a thread brings to a product of its warp group.
struct GroupProduct {
    float* d;
    int count; // of d
    const uint32_t* a;
    uint64_t b;
    float (*widen)(uint16_t);
};

uint32_t shared_address(const void* p);
void barrier_init(uint64_t* barrier, int arrivals);
void fence_barrier_init();
void barrier_arrive(uint64_t* barrier, int bytes);
void barrier_wait(const uint64_t* barrier, uint32_t parity);
void copy_tile(void* shared, const TensorMap& map, int x, int y, uint64_t* barrier);
void group_fence();
void group_multiply(const GroupProduct& product);
void group_commit();
void group_wait(int groups_left);

template <typename T> float widen_bits(uint16_t bits) { return to_float(T{bits}); }

} // namespace emulation

// The address that instructions on shared memory take.
inline uint32_t shared_address(const void* p) { return emulation::shared_address(p); }

inline void barrier_init(uint64_t* barrier, int arrivals) { emulation::barrier_init(barrier, arrivals); }
inline void fence_barrier_init() { emulation::fence_barrier_init(); }
inline void barrier_arrive(uint64_t* barrier, bool wanted = true) {
    if (wanted)
        emulation::barrier_arrive(barrier, 0);
}
inline void barrier_arrive_expecting(uint64_t* barrier, int bytes) { emulation::barrier_arrive(barrier, bytes); }
inline void barrier_wait(uint64_t* barrier, uint32_t parity) { emulation::barrier_wait(barrier, parity); }
inline void copy_tile(void* shared, const TensorMap& map, int x, int y, uint64_t* barrier) { emulation::copy_tile(shared, map, x, y, barrier); }

template <int> inline void keep_registers() {}
template <int> inline void take_registers() {}
template <typename Value, int count> inline void settle(Value (&)[count]) {}

inline void group_fence() { emulation::group_fence(); }
inline void group_commit() { emulation::group_commit(); }
template <int groups_left> inline void group_wait() { emulation::group_wait(groups_left); }
template <typename T, int count> inline void group_multiply(float (&d)[count], const uint32_t (&a)[4], uint64_t b) {
    static_assert(count % 4 == 0 && count <= 128);
    emulation::group_multiply({d, count, a, b, emulation::widen_bits<T>});
}

// kUnsupported for what the driver would refuse.
inline int32_t make_tensor_map(TensorMap& result, const void* matrix, int bytes_of_element, int64_t columns, int64_t rows, int box_columns,
                               int box_rows, Swizzle swizzle) {
    const int64_t pitch = columns * bytes_of_element;
    const int box_bytes = box_columns * bytes_of_element;
    const bool has_sizes = columns > 0 && rows > 0 && columns <= int64_t(1) << 32 && rows <= int64_t(1) << 32;
    const bool has_box = box_columns > 0 && box_columns <= 256 && box_rows > 0 && box_rows <= 256 && box_bytes % 16 == 0;
    const bool has_pitch = reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && pitch % 16 == 0 && pitch < int64_t(1) << 40;
    if (!has_sizes || !has_box || !has_pitch || box_bytes > 16 << int(swizzle))
        return kUnsupported;
    result = {static_cast<const unsigned char*>(matrix), rows, pitch, box_rows, box_bytes, bytes_of_element, swizzle};
    return kOk;
}

} // namespace bnb
