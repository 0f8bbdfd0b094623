// What the checks of the driver stand on: the library under test, buffers that end at an unmapped page, numbers, and the count of what passed.
#pragma once

#include "../../csrc/api/api.h"

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <initializer_list>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

namespace driver {

// ----------------------------------------------------------------------------------------------------------------------------- the library

#define EACH_FUNCTION(X)                                                                                                                             \
    X(status_message)                                                                                                                                \
    X(cpu_quantize_4bit)                                                                                                                             \
    X(cpu_dequantize_4bit)                                                                                                                           \
    X(cpu_quantize_blockwise)                                                                                                                        \
    X(cpu_dequantize_blockwise)                                                                                                                      \
    X(cpu_gemm_4bit)                                                                                                                                 \
    X(cpu_gemm_4bit_backward)                                                                                                                        \
    X(cpu_int8_quantize)                                                                                                                             \
    X(cpu_int8_dequantize)                                                                                                                           \
    X(cpu_int8_matmul)                                                                                                                               \
    X(cpu_int8_mm_dequant)                                                                                                                           \
    X(cpu_int8_scaled_mm)                                                                                                                            \
    X(cpu_int8_linear)                                                                                                                               \
    X(cpu_int8_linear_backward)                                                                                                                      \
    X(cpu_optimizer_step)                                                                                                                            \
    X(cpu_isa)                                                                                                                                       \
    X(cpu_select_isa)                                                                                                                                \
    X(cpu_isa_supported)                                                                                                                             \
    X(cpu_openmp_library)

// Every function of api.h, found in a library by its name.
struct Library {
    void* handle;
#define X(name) decltype(&bnb_##name) name;
    EACH_FUNCTION(X)
#undef X

    explicit Library(const char* path) : handle(dlopen(path, RTLD_NOW | RTLD_LOCAL)) {
        if (handle == nullptr) {
            fprintf(stderr, "%s\n", dlerror());
            exit(2);
        }
#define X(name) find(name, "bnb_" #name);
        EACH_FUNCTION(X)
#undef X
    }

    template <typename Function> void find(Function& function, const char* name) const {
        function = reinterpret_cast<Function>(dlsym(handle, name));
        if (function == nullptr) {
            fprintf(stderr, "the library has no function %s\n", name);
            exit(2);
        }
    }
};

// ------------------------------------------------------------------------------------------------------------------------------- the count

struct Count {
    long passed = 0, failed = 0;
};

inline Count& count() {
    static Count count;
    return count;
}

// Says what failed, the first time a few lines long.
__attribute__((format(printf, 2, 3))) inline void expect(bool holds, const char* format, ...) {
    if (holds) {
        ++count().passed;
        return;
    }
    if (++count().failed > 20)
        return;
    va_list arguments;
    va_start(arguments, format);
    fputs("FAILED: ", stdout);
    vprintf(format, arguments);
    fputs("\n", stdout);
    va_end(arguments);
}

// -------------------------------------------------------------------------------------------------------------------------------- the data

// Elements that end where an unmapped page begins: a read or write behind them ends the program. A page of known bytes lies before them.
template <typename T> class Buffer {
  public:
    explicit Buffer(int64_t n) : count_(n) {
        const size_t page = size_t(sysconf(_SC_PAGESIZE)), body = (size_t(n) * sizeof(T) + page - 1) / page * page;
        mapped_ = 2 * page + body;
        start_ = static_cast<uint8_t*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (start_ == MAP_FAILED || mprotect(start_ + page + body, page, PROT_NONE) != 0) {
            perror("mmap");
            exit(2);
        }
        data_ = reinterpret_cast<T*>(start_ + page + body - size_t(n) * sizeof(T));
        memset(start_, kGuard, size_t(reinterpret_cast<uint8_t*>(data_) - start_));
        memset(static_cast<void*>(data_), kGuard, size_t(n) * sizeof(T));
    }
    Buffer(const Buffer& other) : Buffer(other.count_) { memcpy(static_cast<void*>(data_), other.data_, size_t(count_) * sizeof(T)); }
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { munmap(start_, mapped_); }

    T* data() { return data_; }
    const T* data() const { return data_; }
    int64_t size() const { return count_; }
    T& operator[](int64_t i) { return data_[i]; }
    const T& operator[](int64_t i) const { return data_[i]; }

    bool guard_is_whole() const {
        for (const uint8_t* p = start_; p < reinterpret_cast<const uint8_t*>(data_); ++p)
            if (*p != kGuard)
                return false;
        return true;
    }
    bool is_untouched() const {
        for (int64_t i = 0; i < count_ * int64_t(sizeof(T)); ++i)
            if (reinterpret_cast<const uint8_t*>(data_)[i] != kGuard)
                return false;
        return true;
    }

  private:
    static constexpr uint8_t kGuard = 0xa5;
    uint8_t* start_;
    T* data_;
    size_t mapped_;
    int64_t count_;
};

// A small generator (a 64-bit linear congruence, Knuth's constants), the same on every machine.
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed * 2862933555777941757u + 3037000493u) {}
    uint32_t bits() {
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        return uint32_t(state_ >> 32);
    }
    int64_t below(int64_t n) { return int64_t(bits() % uint64_t(n)); }
    double uniform() { return (double(bits()) + 0.5) / 4294967296.0; } // (0, 1)
    float normal() { return float(std::sqrt(-2.0 * std::log(uniform())) * std::cos(6.283185307179586 * uniform())); }

  private:
    uint64_t state_;
};

} // namespace driver
