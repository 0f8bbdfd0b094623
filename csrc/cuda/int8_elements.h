// Elements whose type is known at run time only, for what is done once an entry of a result.
#pragma once

#include "device.h"

namespace bnb {

__device__ __forceinline__ float load_float(const void* from, DType dtype, int64_t index) {
    switch (dtype) {
    case kFloat16:
        return widen(static_cast<const Half*>(from)[index]);
    case kBFloat16:
        return widen(static_cast<const BFloat16*>(from)[index]);
    default:
        return static_cast<const float*>(from)[index];
    }
}

__device__ __forceinline__ void store_result(void* out, DType dtype, int64_t index, float value) {
    switch (dtype) {
    case kFloat16:
        static_cast<Half*>(out)[index] = narrow<Half>(value);
        break;
    case kBFloat16:
        static_cast<BFloat16*>(out)[index] = narrow<BFloat16>(value);
        break;
    default:
        static_cast<float*>(out)[index] = value;
    }
}

} // namespace bnb
