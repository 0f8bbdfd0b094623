// CUDA's execution model on the CPU, for tests: kernels run unchanged, so that their results, their bounds and their barriers can be checked where
// there is no GPU.
//
// Blocks run one after another. Every thread of a block is a fiber that runs until it must wait: at a barrier of the block, or in an operation of its
// warp. What hardware leaves undefined stops the process with a message: threads of a block at different barriers, lanes of a warp that wait for ones
// that take no part, a thread that has ended while others wait for it, shared memory beyond its size. Shared memory starts as NaN, and the order of the threads
// can be reversed, so that a missing barrier shows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

struct uint3 {
    unsigned int x, y, z;
};

struct dim3 {
    unsigned int x, y, z;
    constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};

namespace bnb {
namespace emulation {

constexpr int kWarpSize = 32;

// What kernels read of where they run. One launch at a time: `launch` holds a lock.
struct Place {
    uint3 thread;
    uint3 block;
    dim3 block_size, grid_size;
    int lane;
};
const Place& here();

// The emulated device, by compute capability (75, 80, 86, 90, ...): what shared memory it has, what the dispatch of kernels sees.
int capability();
int architecture(); // that the library was built for, as if there were one
int shared_memory_limit();

// Runs `thread` for every thread of every block. Returns false if the device could not: too many threads, too much shared memory.
bool launch(dim3 grid, dim3 block, size_t dynamic_shared_bytes, const std::function<void()>& thread);

// Waits for all threads of the block; `line` tells barriers apart. Returns how many threads came with a true `vote`.
int block_barrier(int line, bool vote = false);

// One lane's part of an operation of its warp: what it brings and where its result goes.
struct Part {
    const void* in;
    void* out;
};

// Computes the results of all lanes of `mask` from what they brought; parts of other lanes are null.
using WarpFunction = void (*)(const Part (&parts)[kWarpSize], uint32_t mask);

// Waits until all lanes of `mask` are in the same operation, which is then done once for all.
void warp_operation(uint32_t mask, WarpFunction function, const void* in, void* out);

// Waits until `count` threads of the block, from number `first` on, are in the same operation, which is then done once for all.
using GroupFunction = void (*)(const Part* parts, int count);
void group_operation(int first, int count, GroupFunction function, const void* in, void* out);

// Waits until `is_true` says so of `object`; `what` is for the message if it never will.
void wait_until(bool (*is_true)(const void* object), const void* object, const char* what);

// Lets all other threads run first.
void give_way();

// What memory does on its own. It is done as late as can be, when all threads wait; with reversed threads at once.
void do_later(std::function<void()> work);

// Called before the threads of a block start, and when all have ended.
void watch_blocks(void (*start)(), void (*end)());

// Storage of the block: the same address for all its threads. `slot` is static in the caller and stands for one variable.
struct SharedSlot {
    uint64_t block_number;
    void* address;
};
void* shared_storage(SharedSlot& slot, size_t bytes, size_t alignment);
void* dynamic_shared_storage();
size_t dynamic_shared_bytes();

// Asynchronous copies of the running thread: nothing moves before the group has been waited for.
void copy_async(void* to, const void* from, int bytes, int bytes_of_source);
void commit_group();
void wait_group(int groups_left);

[[noreturn]] void fail(const char* format, ...);

} // namespace emulation
} // namespace bnb
