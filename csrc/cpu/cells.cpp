#include "cells.h"

namespace bnb {

bool build_cells(const float* midpoints, CellTable& table) {
    int32_t next_cell = kLowestCell;
    const auto fill_until = [&](int32_t cell, uint32_t count) {
        for (; next_cell < cell && next_cell <= kHighestCell; ++next_cell)
            table.entry[next_cell - kLowestCell] = count << 16;
    };
    for (uint32_t count = 0; count < 255; ++count) {
        const int32_t key = ordered_bits(midpoints[count] + 0.0f);
        const int32_t cell = key >> 16;
        if (cell < kLowestCell || cell > kHighestCell) { // outside [-1, 1]: below everything or above everything
            fill_until(cell, count);
            continue;
        }
        if (cell < next_cell)
            return false;
        fill_until(cell, count);
        table.entry[cell - kLowestCell] = count << 16 | (0xffffu - (uint32_t(key) & 0xffffu));
        next_cell = cell + 1;
    }
    fill_until(kHighestCell + 1, 255);
    return true;
}

} // namespace bnb
