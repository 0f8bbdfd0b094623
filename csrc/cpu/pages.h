// Memory advice for large outputs.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bnb {

// A fresh large buffer has no pages yet, and a fault for each 4 KiB costs several times what writing the data does. Where the system grants huge
// pages on request, asking for them on the aligned interior makes that one fault for each 2 MiB. Only advice: errors do not matter.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t huge = uintptr_t(2) << 20;
    if (bytes < int64_t(2 * huge))
        return;
    const uintptr_t start = reinterpret_cast<uintptr_t>(data);
    const uintptr_t begin = (start + huge - 1) & ~(huge - 1);
    const uintptr_t end = (start + uintptr_t(bytes)) & ~(huge - 1);
    if (begin < end)
        madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data;
    (void)bytes;
#endif
}

} // namespace bnb
