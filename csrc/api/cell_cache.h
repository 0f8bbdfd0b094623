// 8-bit codes as the kernels want them: midpoints, and for work that is worth it a lookup table.
#pragma once

#include "../common/quantize.h"
#include "../cpu/cells.h"

#include <cstdlib>
#include <cstring>

namespace bnb {

// Below this many elements a binary search beats building the cell table (about 10 microseconds).
constexpr int64_t kElementsWorthCells = 16384;

inline bool is_ascending(const float* code) {
    for (int i = 0; i < 255; ++i)
        if (!(code[i] <= code[i + 1]))
            return false;
    return true;
}

inline void find_midpoints(const float* code, float* midpoints) {
    for (int i = 0; i < 255; ++i)
        midpoints[i] = midpoint(code[i], code[i + 1]);
}

// The cell table of the code used last, recognised by its contents: callers may change a code in place. Kept by a thread from call to call.
class CellCache {
  public:
    CellCache() = default;
    CellCache(const CellCache&) = delete;
    CellCache& operator=(const CellCache&) = delete;
    ~CellCache() { free(table_); }

    // Null: the code has no table, or there is no memory for it, or n elements are not worth it.
    const CellTable* find(const float* midpoints, int64_t n) {
        if (known_ && memcmp(midpoints_, midpoints, sizeof midpoints_) == 0)
            return usable_ ? table_ : nullptr;
        if (n < kElementsWorthCells)
            return nullptr;
        if (table_ == nullptr)
            table_ = static_cast<CellTable*>(malloc(sizeof(CellTable)));
        if (table_ == nullptr)
            return nullptr;
        memcpy(midpoints_, midpoints, sizeof midpoints_);
        known_ = true;
        usable_ = build_cells(midpoints, *table_);
        return usable_ ? table_ : nullptr;
    }

  private:
    CellTable* table_ = nullptr;
    float midpoints_[255];
    bool known_ = false, usable_ = false;
};

} // namespace bnb
