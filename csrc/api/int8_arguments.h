// What the checks of arguments of LLM.int8() share, on the CPU and on the GPU.
#pragma once

#include "arguments.h"

#include <cfloat>
#include <cmath>

namespace bnb {

inline bool is_matrix(int64_t rows, int64_t columns) {
    return is_count(rows) && is_count(columns) && (columns == 0 || rows <= kMostElements / columns);
}

inline bool are_matrices(int64_t M, int64_t N, int64_t K) { return is_matrix(M, K) && is_matrix(N, K) && is_matrix(M, N); }

// A null pointer is no error where there is nothing to point at.
inline bool holds(const void* p, int64_t count) { return p != nullptr || count == 0; }

// The largest magnitude that is no outlier.
inline float limit_of(double threshold) {
    if (!(threshold > 0.0))
        return INFINITY;
    return nextafterf(threshold > double(FLT_MAX) ? INFINITY : float(threshold), -INFINITY);
}

inline bool is_threshold(double threshold, const uint8_t* is_outlier, int64_t columns) {
    return threshold >= 0.0 && (threshold == 0.0 ? is_outlier == nullptr : holds(is_outlier, columns));
}

} // namespace bnb
