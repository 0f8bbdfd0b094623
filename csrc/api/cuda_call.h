// What the C functions for the GPU share.
#pragma once

#include "../cuda/kernels.h"

#include "../common/status.h"

namespace bnb {

inline bool is_quant_type(int32_t type) { return type == kFP4 || type == kNF4; }

// Calls a launcher with `device` current.
template <typename Args> int32_t on_device(int32_t device, int32_t (*launcher)(const Args&, Stream), const Args& args, void* stream) {
    const DeviceGuard guard(device);
    return guard.status() == kOk ? launcher(args, stream) : guard.status();
}

} // namespace bnb
