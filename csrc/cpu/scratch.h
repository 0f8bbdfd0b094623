// Working memory for the length of a kernel call.
#pragma once

#include <cstddef>

namespace bnb {

// A block of memory handed out in aligned pieces. Each thread keeps one block of moderate size for its next call, since fresh pages cost more than
// the work of a small product. Not inline: the kernels that use it are compiled for many instruction sets and must share one copy.
class Scratch {
  public:
    explicit Scratch(size_t bytes);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    // The next piece, aligned to 64 bytes; null when memory was short. Every piece needs up to kAlignment bytes on top of its size.
    void* take(size_t bytes);

    static constexpr size_t kAlignment = 64;

  private:
    char* block_;
    size_t size_, used_;
};

} // namespace bnb
