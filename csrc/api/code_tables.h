// 8-bit codes as the kernels want them: midpoints, and for work that is worth it tables made from them.
#pragma once

#include "../common/quantize.h"
#include "../cpu/cells.h"
#include "../cpu/lines.h"

#include <cstdlib>
#include <cstring>

namespace bnb {

// Below this many elements a binary search beats building a table (cells: about 10 microseconds).
constexpr int64_t kElementsWorthTable = 16384;

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

// A table made from the code used last, recognised by its contents: callers may change a code in place. Kept by a thread from call to call.
template <typename Table, bool (*build)(const float* midpoints, Table& table)> class TableCache {
  public:
    TableCache() = default;
    TableCache(const TableCache&) = delete;
    TableCache& operator=(const TableCache&) = delete;
    ~TableCache() { free(table_); }

    // Null: the code has no such table, or there is no memory for it, or n elements are not worth it.
    const Table* find(const float* midpoints, int64_t n) {
        if (known_ && memcmp(midpoints_, midpoints, sizeof midpoints_) == 0)
            return usable_ ? table_ : nullptr;
        if (n < kElementsWorthTable)
            return nullptr;
        if (table_ == nullptr)
            table_ = static_cast<Table*>(malloc(sizeof(Table)));
        if (table_ == nullptr)
            return nullptr;
        memcpy(midpoints_, midpoints, sizeof midpoints_);
        known_ = true;
        usable_ = build(midpoints, *table_);
        return usable_ ? table_ : nullptr;
    }

  private:
    Table* table_ = nullptr;
    float midpoints_[255];
    bool known_ = false, usable_ = false;
};

using CellCache = TableCache<CellTable, build_cells>;
using LineCache = TableCache<LineTable, build_lines>;

} // namespace bnb
