// What the checks of arguments share.
#pragma once

#include "../common/types.h"

namespace bnb {

// A thread should get at least this many elements: about 15 microseconds of work, some times what it costs to wake it.
constexpr int64_t kElementsPerThread = 32768;

inline bool is_dtype(int32_t dtype) { return dtype == kFloat32 || dtype == kFloat16 || dtype == kBFloat16; }

// Largest element count whose size in bytes, and any sum of two counts, stays within 64 bits.
constexpr int64_t kMostElements = int64_t(1) << 60;

inline bool is_count(int64_t n) { return n >= 0 && n <= kMostElements; }

inline int64_t ceil_divide(int64_t a, int64_t b) { return a / b + (a % b != 0); }

} // namespace bnb
