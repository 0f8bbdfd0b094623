// What the functions of the library promise, one element at a time, in double precision where the promise is not about bits.
//
// The tables of codes are the library's own: the Python tests hold those against tables written down a second time.
#pragma once

#include "support.h"

#include "../../csrc/common/tables.h"

#include <algorithm>

namespace driver {

constexpr int kDTypes[] = {0, 1, 2}; // float32, float16, bfloat16
constexpr const char* kDTypeNames[] = {"float32", "float16", "bfloat16"};
constexpr int kQuantTypes[] = {1, 2}; // FP4, NF4

inline int64_t blocks_of(int64_t n, int64_t blocksize) { return (n + blocksize - 1) / blocksize; }
inline int bytes_of(int dtype) { return dtype == 0 ? 4 : 2; }

// ---------------------------------------------------------------------------------------------------------------------------- floating point

inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// A 16-bit number with `mantissa` bits behind the point, exponents down to `lowest`.
inline double rounded(double x, int mantissa, int lowest, double largest) {
    if (x == 0.0 || !std::isfinite(x))
        return x;
    const int exponent = std::max(std::ilogb(x), lowest);
    const double value = std::ldexp(std::nearbyint(std::ldexp(x, mantissa - exponent)), exponent - mantissa);
    return std::fabs(value) > largest ? std::copysign(INFINITY, x) : value;
}

inline uint16_t half_of(float x) {
    if (std::isnan(x))
        return 0x7e00;
    const double value = rounded(double(x), 10, -14, 65504.0);
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isinf(value))
        return sign | 0x7c00;
    const double magnitude = std::fabs(value);
    if (magnitude < std::ldexp(1.0, -14))
        return uint16_t(sign | uint16_t(std::ldexp(magnitude, 24)));
    const int exponent = std::ilogb(magnitude);
    return uint16_t(sign | ((exponent + 15) << 10) | (uint16_t(std::ldexp(magnitude, 10 - exponent)) & 0x3ff));
}

inline float float_of_half(uint16_t bits) {
    const int exponent = (bits >> 10) & 31, mantissa = bits & 0x3ff;
    double magnitude = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    if (exponent == 31)
        magnitude = mantissa != 0 ? NAN : INFINITY;
    return float(bits & 0x8000 ? -magnitude : magnitude);
}

inline uint16_t bfloat16_of(float x) {
    return std::isnan(x) ? 0x7fc0 : uint16_t(bits_of(float(rounded(double(x), 7, -126, 3.3895313892515355e38))) >> 16);
}

inline float read(const void* data, int dtype, int64_t i) {
    if (dtype == 0)
        return static_cast<const float*>(data)[i];
    const uint16_t bits = static_cast<const uint16_t*>(data)[i];
    return dtype == 1 ? float_of_half(bits) : float_of(uint32_t(bits) << 16);
}

inline void write(void* data, int dtype, int64_t i, float x) {
    if (dtype == 0)
        static_cast<float*>(data)[i] = x;
    else
        static_cast<uint16_t*>(data)[i] = dtype == 1 ? half_of(x) : bfloat16_of(x);
}

// x as an element of that dtype has it.
inline float as_dtype(float x, int dtype) {
    uint32_t room = 0;
    write(&room, dtype, 0, x);
    return read(&room, dtype, 0);
}

inline bool same(float a, float b) { return bits_of(a) == bits_of(b) || (std::isnan(a) && std::isnan(b)); }

// Half a unit in the last place of y, as a share of it.
inline double rounding_of(int dtype) { return dtype == 0 ? 6e-8 : dtype == 1 ? 4.9e-4 : 3.92e-3; }

// Elements of any dtype.
struct Elements {
    Buffer<uint8_t> bytes;
    int dtype;
    int64_t n;

    Elements(int64_t n, int dtype) : bytes(n * bytes_of(dtype)), dtype(dtype), n(n) {}
    void* data() { return bytes.data(); }
    const void* data() const { return bytes.data(); }
    float operator[](int64_t i) const { return read(bytes.data(), dtype, i); }
    void set(int64_t i, float x) { write(bytes.data(), dtype, i, x); }
};

enum Kind { kNormal, kZeros, kDenormal, kHuge, kSteps, kSpecial, kKinds };

inline float draw(Random& random, Kind kind) {
    const float x = random.normal();
    switch (kind) {
    case kZeros:
        return random.below(3) ? 0.0f : -0.0f;
    case kDenormal:
        return x * 1e-40f;
    case kHuge:
        return x * 3e4f;
    case kSteps: // many ties
        return std::nearbyint(x * 3.0f) / 4.0f;
    case kSpecial:
        return random.below(50) ? x : random.below(2) ? NAN : INFINITY;
    default:
        return x;
    }
}

inline Elements elements(Random& random, int64_t n, int dtype, Kind kind = kNormal) {
    Elements values(n, dtype);
    for (int64_t i = 0; i < n; ++i)
        values.set(i, draw(random, kind));
    return values;
}

// -------------------------------------------------------------------------------------------------------------------------------- block codes

// The largest magnitude of a block; NaN if one is in it.
inline float absmax_of(const Elements& x, int64_t begin, int64_t end) {
    float largest = 0.0f;
    for (int64_t i = begin; i < end; ++i)
        largest = std::isnan(x[i]) || std::isnan(largest) ? NAN : std::max(largest, std::fabs(x[i]));
    return largest;
}

// What is coded: x over the largest magnitude.
inline float scaled(float x, float absmax) {
    const float inverse = absmax == 0.0f ? 0.0f : 1.0f / absmax;
    if (x == 0.0f && std::isinf(inverse))
        return 0.0f;
    const float v = x * inverse;
    return v > 1.0f ? 1.0f : v < -1.0f ? -1.0f : v;
}

inline int code_4bit(float v, int quant_type) {
    int code = 0;
    if (quant_type == 2) {
        for (const float threshold : bnb::kNF4Thresholds.value)
            code += !(v <= threshold);
        return code;
    }
    for (const float threshold : bnb::kFP4Thresholds.value)
        code += !(std::fabs(v) <= threshold);
    return bnb::kFP4CodeOfRank.value[code] + (v < 0.0f && code > 0 ? 8 : 0);
}

inline float level_4bit(int code, int quant_type) { return (quant_type == 2 ? bnb::kNF4Levels : bnb::kFP4Levels).value[code]; }
inline int zero_code(int quant_type) { return quant_type == 2 ? bnb::kNF4ZeroCode : bnb::kFP4ZeroCode; }
inline int nibble(const uint8_t* packed, int64_t i) { return i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4; }

inline int code_8bit(float v, const float* table) {
    int code = 0;
    for (int i = 0; i < 255; ++i)
        code += !(v <= (table[i] + table[i + 1]) * 0.5f);
    return code;
}

// Ascending values in [-1, 1] that are dense near zero, as those of dynamic codes are; from 0 on without a sign.
inline std::vector<float> code_table(bool has_sign) {
    std::vector<float> table(256);
    for (int i = 0; i < 256; ++i) {
        const double t = has_sign ? (i - 127) / 128.0 : i / 255.0;
        table[size_t(i)] = float(std::copysign(std::pow(std::fabs(t), 3.0), t));
    }
    return table;
}

// ------------------------------------------------------------------------------------------------------------------------------ 8-bit matrices

inline int8_t code_int8(float x, float stat) {
    const float v = x * (127.0f / stat);
    return std::isnan(v) ? int8_t(0) : int8_t(std::nearbyint(std::min(127.0f, std::max(-127.0f, v))));
}

// -------------------------------------------------------------------------------------------------------------------------------- optimizers

// Moves the moments of one element and returns the direction in which the parameter goes, without the learning rate. Every formula is that of the
// paper or of torch.optim; `factor` is what the direction is still multiplied by.
inline double direction_of(const bnb::OptimizerSettings& s, double g, double* m, double& factor) {
    const auto average = [](double mean, double value, double beta) { return beta * mean + (1.0 - beta) * value; };
    factor = 1.0;
    switch (s.algorithm) {
    case bnb::kAdam: {
        m[0] = average(m[0], g, s.beta1);
        m[1] = average(m[1], g * g, s.beta2);
        if (s.amsgrad)
            m[2] = std::max(m[2], m[1]);
        factor = s.root_correction / s.mean_correction;
        return m[0] / (std::sqrt(s.amsgrad ? m[2] : m[1]) + s.root_correction * s.eps);
    }
    case bnb::kAdEMAMix:
        m[0] = average(m[0], g, s.beta1);
        m[1] = average(m[1], g, s.beta3);
        m[2] = average(m[2], g * g, s.beta2);
        return (m[0] / s.mean_correction + s.alpha * m[1]) / (std::sqrt(m[2]) / s.root_correction + s.eps);
    case bnb::kMomentum:
        m[0] = s.step == 1 ? g : s.beta1 * m[0] + (1.0 - s.beta2) * g;
        return s.nesterov ? g + s.beta1 * m[0] : m[0];
    case bnb::kLion: {
        const double mixed = average(m[0], g, s.beta1);
        m[0] = average(m[0], g, s.beta2);
        return mixed > 0.0 ? 1.0 : mixed < 0.0 ? -1.0 : 0.0;
    }
    case bnb::kRMSprop: {
        const bool has_momentum = s.beta2 > 0.0;
        m[0] = average(m[0], g * g, s.beta1);
        double variance = m[0];
        if (s.centered) {
            double& mean = m[1 + has_momentum];
            mean = average(mean, g, s.beta1);
            variance = std::max(0.0, variance - mean * mean);
        }
        const double update = g / (std::sqrt(variance) + s.eps);
        return has_momentum ? m[1] = s.beta2 * m[1] + update : update;
    }
    default: // Adagrad
        m[0] += g * g;
        return g / (std::sqrt(m[0]) + s.eps);
    }
}

} // namespace driver
