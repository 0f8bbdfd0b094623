// What kernels for sm_90a have besides device.h: barriers that count bytes, copies of tiles by the tensor memory engine, products of warp groups.
//
//   barrier_init(b, arrivals)            a barrier in shared memory, at the start of phase 0; a phase ends when that many arrivals have come and all bytes
//                                        that were announced. fence_barrier_init() before anybody else may use it
//   barrier_arrive(b, wanted)            what the thread wrote before is seen by those who wait for the phase; nothing if not wanted
//   barrier_arrive_expecting(b, bytes)   the same, announcing bytes of copies
//   barrier_wait(b, parity)              until the phase of this parity has ended; the phase before the first one has
//   copy_tile(shared, map, x, y, b)      starts to copy the box of `map` whose first element is column x of row y; what lies outside the matrix is 0.
//                                        The barrier gets its bytes. Shared memory aligned to 128 bytes
//   keep_registers<n>, take_registers<n> of a whole warp group: the most that a thread of it has from here on
//
// A warp group is four warps, 128 threads that start at a multiple of 128; all of them call
//   group_multiply<T>(d, a, b)           d[64, n] += a[64, 16] . b[n, 16]^T in the background, n = 2 * (elements of d). Two elements of `a` a register; warp w
//                                        has rows 16w.. of `a` and `d` as in mma_m16n8k16, n / 8 of whose results lie one after the other in d. b: what
//                                        describe_operand gives for its first row and column
//   group_fence()                        before products: what was written to registers counts
//   group_commit()                       ends a group of products
//   group_wait<n>()                      until n groups are left. Before that neither d nor a nor b may be touched
//   settle(registers)                    an array is computed before this, and used after it: before the fence for what products take, after the last
//                                        wait for what they give
#pragma once

#include "device.h"

namespace bnb {

constexpr int kGroupThreads = 128;

// Rows of 16-byte vectors that a copy permutes so that those of eight rows lie in different banks: vector i of a row lies where i ^ (address / 128)
// says, by as many low bits as the row has vectors.
enum class Swizzle : int { k32Bytes = 1, k64Bytes = 2, k128Bytes = 3 };

} // namespace bnb

#if defined(__CUDACC__)
#include "platform_cuda_hopper.h"
#elif defined(BNB_CUDA_EMULATION)
#include "platform_host_hopper.h"
#else
#error "hopper.h is for CUDA, or for the emulation of the tests"
#endif

namespace bnb {

// Where product of a warp group finds an operand of 16 columns of 16 bits: rows of 128 bytes as Swizzle::k128Bytes stores them, eight of them in each
// 1024 bytes. The 14 low bits are the address in vectors of 16 bytes, those from bit 32 on the distance of eight rows, the highest two the swizzle.
// Further columns of the same rows are 2 a vector away.
__device__ __forceinline__ uint64_t describe_operand(const void* shared) {
    constexpr uint64_t vectors_of_eight_rows = 1024 / 16, unused_distance = 1, swizzle_128_bytes = 1;
    const uint64_t address = (shared_address(shared) & 0x3ffffu) >> 4;
    return address | unused_distance << 16 | vectors_of_eight_rows << 32 | swizzle_128_bytes << 62;
}

} // namespace bnb
