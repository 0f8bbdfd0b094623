// What all kernels of 4-bit products share: levels and scales.
#pragma once

#include "block_scales.h"
#include "device.h"

#include "../common/quantize.h"

namespace bnb {

inline const Levels16& levels_of_type(QuantType quant_type) { return quant_type == kNF4 ? kNF4Levels : kFP4Levels; }

// `builtin`: the levels of the quantisation type, a kernel parameter.
__device__ __forceinline__ float level_of_code(const GemmArgs4bit& args, const Levels16& builtin, int code) {
    return args.levels == nullptr ? builtin.value[code] : __ldg(args.levels + code);
}

__device__ __forceinline__ float any_scale_of_block(const BlockScales& scales, int64_t block) {
    return scales.absmax_8bit == nullptr ? scale_of_block<false>(scales, block) : scale_of_block<true>(scales, block);
}

} // namespace bnb
