#include "scratch.h"

#include <new>

namespace bnb {
namespace {

constexpr std::align_val_t kBlockAlignment{Scratch::kAlignment};
constexpr size_t kMostKept = size_t(2) << 20; // enough for a panel and its sums; larger blocks go back at once

void release(char* block) { ::operator delete(block, kBlockAlignment); }

struct KeptBlock {
    char* block = nullptr;
    size_t size = 0;
    ~KeptBlock() { release(block); }
};

thread_local KeptBlock kept;

} // namespace

Scratch::Scratch(size_t bytes) : block_(kept.block), size_(kept.size), used_(0) {
    kept.block = nullptr;
    kept.size = 0;
    if (size_ >= bytes)
        return;
    release(block_);
    block_ = static_cast<char*>(::operator new(bytes, kBlockAlignment, std::nothrow));
    size_ = block_ != nullptr ? bytes : 0;
}

Scratch::~Scratch() {
    if (size_ > kMostKept || size_ < kept.size) {
        release(block_);
        return;
    }
    release(kept.block);
    kept.block = block_;
    kept.size = size_;
}

void* Scratch::take(size_t bytes) {
    const size_t needed = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (block_ == nullptr || needed > size_ - used_)
        return nullptr;
    char* piece = block_ + used_;
    used_ += needed;
    return piece;
}

} // namespace bnb
