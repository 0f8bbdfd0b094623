#include "threads.h"

#include <atomic>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <link.h>
#elif defined(__APPLE__)
#include <mach-o/dyld.h>
#endif
#if !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#endif

// glibc 2.34 moved these two from libdl to libc under a new version. The old version is on every system, so a wheel that is built on a new one runs on
// an old one.
#if defined(__GLIBC__) && defined(__x86_64__) && defined(__LP64__)
__asm__(".symver dlopen, dlopen@GLIBC_2.2.5");
__asm__(".symver dlsym, dlsym@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver dlopen, dlopen@GLIBC_2.17");
__asm__(".symver dlsym, dlsym@GLIBC_2.17");
#endif

namespace bnb {
namespace {

// The part of an OpenMP runtime that is needed. GNU's libgomp defines GOMP_parallel; the LLVM and Intel runtimes export the same entry for its
// callers.
struct Runtime {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
    int (*thread_num)();
    int (*num_threads)();
    int (*max_threads)();
    int (*in_parallel)();
    char path[4096];
};

std::atomic<bool> forked{false};

#if !defined(_WIN32)

// A child of fork inherits the runtime's memory but none of its threads; handing it work would wait for them for ever. Registered when the library is
// loaded, so that a fork before the first call counts too.
struct ForkGuard {
    ForkGuard() {
        pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
    }
} fork_guard;

bool is_openmp(const char* path) {
    const char* slash = strrchr(path, '/');
    const char* name = slash ? slash + 1 : path;
    return strncmp(name, "libgomp", 7) == 0 || strncmp(name, "libiomp5", 8) == 0 || strncmp(name, "libomp", 6) == 0;
}

// Should several runtimes be mapped, the one that PyTorch ships is the one whose threads are awake.
void consider(Runtime& runtime, const char* path) {
    if (path == nullptr || !is_openmp(path) || strlen(path) >= sizeof runtime.path)
        return;
    if (runtime.path[0] == '\0' || (strstr(path, "torch") != nullptr && strstr(runtime.path, "torch") == nullptr))
        strcpy(runtime.path, path);
}

void find_mapped_runtime(Runtime& runtime) {
#if defined(__linux__)
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* found) {
            consider(*static_cast<Runtime*>(found), info->dlpi_name);
            return 0;
        },
        &runtime);
#elif defined(__APPLE__)
    for (uint32_t i = 0; i < _dyld_image_count(); ++i)
        consider(runtime, _dyld_get_image_name(i));
#else
    (void)runtime;
#endif
}

template <typename Function> bool resolve(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    return function != nullptr;
}

bool load(Runtime& runtime) {
    find_mapped_runtime(runtime);
    if (runtime.path[0] == '\0')
        return false;
    void* library = dlopen(runtime.path, RTLD_NOLOAD | RTLD_LAZY); // never closed: the runtime must outlive our pointers into it
    return library != nullptr && resolve(library, "GOMP_parallel", runtime.parallel) && resolve(library, "omp_get_thread_num", runtime.thread_num) &&
           resolve(library, "omp_get_num_threads", runtime.num_threads) && resolve(library, "omp_get_max_threads", runtime.max_threads) &&
           resolve(library, "omp_in_parallel", runtime.in_parallel);
}

// Only success is remembered: PyTorch may be imported after the first call.
const Runtime* find_runtime() {
    static std::atomic<const Runtime*> found{nullptr};
    if (const Runtime* runtime = found.load(std::memory_order_acquire))
        return runtime;
    Runtime* candidate = new (std::nothrow) Runtime{};
    if (candidate == nullptr)
        return nullptr;
    const Runtime* expected = nullptr;
    if (load(*candidate) && found.compare_exchange_strong(expected, candidate, std::memory_order_acq_rel))
        return candidate;
    delete candidate;
    return found.load(std::memory_order_acquire);
}

#else

const Runtime* find_runtime() { return nullptr; }

#endif

const Runtime* usable_runtime() {
    if (forked.load(std::memory_order_relaxed))
        return nullptr;
    const Runtime* runtime = find_runtime();
    return runtime != nullptr && !runtime->in_parallel() ? runtime : nullptr;
}

struct Work {
    const Runtime* runtime;
    int64_t count;
    RangeFunction function;
    void* context;
};

void run_share(void* pointer) {
    const Work& work = *static_cast<const Work*>(pointer);
    const int64_t thread = work.runtime->thread_num();
    const int64_t team = work.runtime->num_threads(); // the runtime may grant fewer threads than were asked for
    const int64_t share = work.count / team, extra = work.count % team;
    const int64_t begin = thread * share + (thread < extra ? thread : extra);
    const int64_t end = begin + share + (thread < extra ? 1 : 0);
    if (begin < end)
        work.function(work.context, begin, end, int(thread));
}

} // namespace

void parallel_ranges(int64_t count, int64_t grain, int threads, RangeFunction function, void* context) {
    if (count <= 0)
        return;
    const int64_t shares = count / (grain > 1 ? grain : 1);
    const Runtime* runtime = threads == 1 || shares < 2 ? nullptr : usable_runtime();
    const int64_t allowed = runtime == nullptr ? 1 : threads > 0 ? threads : runtime->max_threads();
    const int64_t team = allowed < shares ? allowed : shares;
    if (runtime == nullptr || team < 2) {
        function(context, 0, count, 0);
        return;
    }
    Work work{runtime, count, function, context};
    runtime->parallel(run_share, &work, unsigned(team), 0);
}

void SharedStatus::report(int32_t status) {
    if (status != 0)
        status_.store(status, std::memory_order_relaxed);
}

int32_t SharedStatus::get() const { return status_.load(std::memory_order_relaxed); }

const char* openmp_library() {
    const Runtime* runtime = find_runtime();
    return runtime != nullptr ? runtime->path : "";
}

int default_threads() {
    const Runtime* runtime = usable_runtime();
    return runtime != nullptr ? runtime->max_threads() : 1;
}

} // namespace bnb
