// What the kernels of the int8 product's gradient share.
#pragma once

#include "device.h"

#include "../common/quantize.h"

namespace bnb {

constexpr int kBackwardWarps = 8;
constexpr int kBackwardThreads = kBackwardWarps * kWarpSize;

// The four codes of a word as floats: a byte of 128 + code behind the exponent of 2^23 is that number, exactly.
__device__ __forceinline__ void floats_of_codes(uint32_t word, float (&values)[4]) {
    const uint32_t biased = word ^ 0x80808080u;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        values[i] = __fsub_rn(float_from_bits(__byte_perm(biased, 0x4b000000u, 0x7440u + unsigned(i))), 8388608.0f + 128.0f);
}

// A weight as dequantisation has it, in fp32.
__device__ __forceinline__ float weight_of(float code, float stat) { return __fmul_rn(__fmul_rn(code, stat), kPerInt8Code); }

} // namespace bnb
