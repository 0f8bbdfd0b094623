// Element types, their codes in the C interface, and exact conversions between them.
#pragma once

#include "macros.h"

#include <cstdint>
#include <cstring>

namespace bnb {

enum DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
enum QuantType : int32_t { kFP4 = 1, kNF4 = 2 };

struct Half {
    uint16_t bits;
};

struct BFloat16 {
    uint16_t bits;
};

BNB_HD uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

BNB_HD float float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

BNB_HD float to_float(float value) { return value; }

BNB_HD float to_float(BFloat16 value) { return float_from_bits(uint32_t(value.bits) << 16); }

BNB_HD float to_float(Half value) {
    const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
    const uint32_t exponent = (value.bits >> 10) & 31u;
    const uint32_t mantissa = value.bits & 0x3ffu;
    if (exponent == 31) // infinity, or a NaN made quiet as the hardware conversion does
        return float_from_bits(sign | 0x7f800000u | (mantissa ? 0x400000u | (mantissa << 13) : 0u));
    if (exponent == 0) { // zero and denormals: mantissa * 2^-24, exact in fp32
        const float magnitude = float(int32_t(mantissa)) * 5.9604644775390625e-8f;
        return float_from_bits(sign | float_bits(magnitude));
    }
    return float_from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

BNB_HD void round_to(float value, float& result) { result = value; }

BNB_HD void round_to(float value, BFloat16& result) {
    const uint32_t bits = float_bits(value);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    result.bits = uint16_t((is_nan ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

BNB_HD void round_to(float value, Half& result) {
    const uint32_t bits = float_bits(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t rounded;
    if (magnitude > 0x7f800000u) // NaN: quiet, with the leading bits of its payload
        rounded = 0x7e00u | ((magnitude >> 13) & 0x1ffu);
    else if (magnitude >= 0x477ff000u) // from 65520 on: infinity
        rounded = 0x7c00u;
    else if (magnitude < 0x38800000u) // below 2^-14: beside 0.5 the last bit of an fp32 number is 2^-24, the last of a denormal Half
        rounded = float_bits(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
    else
        rounded = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    result.bits = uint16_t(sign | rounded);
}

// Rounds to nearest, ties to even, denormals included; a NaN stays a NaN.
template <typename T> BNB_HD T from_float(float value) {
    T result;
    round_to(value, result);
    return result;
}

} // namespace bnb
