// Threads borrowed from the OpenMP runtime that PyTorch has already loaded.
//
// The library links against no OpenMP: a second runtime in the process means a second pool of threads fighting for the same cores. The runtime is
// found among the mapped libraries at the first call that can use it. Without one, after a fork, or inside a parallel region, work runs on the
// calling thread.
#pragma once

#include "../common/macros.h"

#include <atomic>
#include <cstdint>

namespace bnb {

using RangeFunction = void (*)(void* context, int64_t begin, int64_t end, int thread);

// Calls function on contiguous, disjoint ranges that cover [0, count). At most `threads` run at a time (0: the runtime's default), and each gets at
// least `grain` of the count: work below two grains wakes nobody. `thread` is in [0, threads).
void parallel_ranges(int64_t count, int64_t grain, int threads, RangeFunction function, void* context);

// Path of the OpenMP runtime in use, or "".
const char* openmp_library();

// How many threads a caller that passes 0 would get.
int default_threads();

// A status that several threads may report to: the last failure stays. Not inline, because kernels of all instruction sets share it.
class SharedStatus {
  public:
    void report(int32_t status);
    int32_t get() const;

  private:
    std::atomic<int32_t> status_{0};
};

template <typename Function> BNB_HD void parallel_for(int64_t count, int64_t grain, int threads, const Function& function) {
    struct Call {
        static void run(void* context, int64_t begin, int64_t end, int thread) { (*static_cast<const Function*>(context))(begin, end, thread); }
    };
    parallel_ranges(count, grain, threads, &Call::run, const_cast<Function*>(&function));
}

} // namespace bnb
