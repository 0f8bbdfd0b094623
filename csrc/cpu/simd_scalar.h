// Plain C++: the set that runs everywhere.
#pragma once

#include <math.h>

namespace bnb {
namespace BNB_ISA {

constexpr int W = 4;

struct F32 {
    float v[W];
};

struct I32 {
    uint32_t v[W];
};

struct Mask {
    bool v[W];
};

struct Table8 {
    float v[8];
};

struct Table16 {
    float v[16];
};

struct Table256 {
    const float* p;
};

// Written out rather than looped over, so that the compiler sees scalars in registers.
// clang-format off
#define BNB_EACH(Result, expression)                                                                                                                 \
    const auto lane = [&]([[maybe_unused]] int i) { return expression; };                                                                            \
    return Result{{lane(0), lane(1), lane(2), lane(3)}}
// clang-format on

BNB_INLINE F32 splat(float x) { BNB_EACH(F32, x); }
BNB_INLINE I32 splat_bits(uint32_t x) { BNB_EACH(I32, x); }

template <typename T> BNB_INLINE F32 load(const T* p) { BNB_EACH(F32, to_float(p[i])); }
template <typename T> BNB_INLINE F32 load_first(const T* p, int n) { BNB_EACH(F32, i < n ? to_float(p[i]) : 0.0f); }

template <typename T> BNB_INLINE void store_first(T* p, F32 a, int n) {
    for (int i = 0; i < n; ++i)
        p[i] = from_float<T>(a.v[i]);
}

template <typename T> BNB_INLINE void store(T* p, F32 a) { store_first(p, a, W); }
template <typename T> BNB_INLINE void stream(T* p, F32 a) { store(p, a); }
BNB_INLINE void finish_streams() {}

BNB_INLINE F32 add(F32 a, F32 b) { BNB_EACH(F32, a.v[i] + b.v[i]); }
BNB_INLINE F32 sub(F32 a, F32 b) { BNB_EACH(F32, a.v[i] - b.v[i]); }
BNB_INLINE F32 mul(F32 a, F32 b) { BNB_EACH(F32, a.v[i] * b.v[i]); }
BNB_INLINE F32 min(F32 a, F32 b) { BNB_EACH(F32, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
BNB_INLINE F32 max(F32 a, F32 b) { BNB_EACH(F32, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
BNB_INLINE F32 mul_add(F32 a, F32 b, F32 c) { BNB_EACH(F32, a.v[i] * b.v[i] + c.v[i]); }
BNB_INLINE F32 fused(F32 a, F32 b, F32 c) { BNB_EACH(F32, fmaf(a.v[i], b.v[i], c.v[i])); }
BNB_INLINE F32 div(F32 a, F32 b) { BNB_EACH(F32, a.v[i] / b.v[i]); }
BNB_INLINE F32 sqrt(F32 a) { BNB_EACH(F32, sqrtf(a.v[i])); }

BNB_INLINE float reduce_add(F32 a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }

BNB_INLINE I32 bits(F32 a) { BNB_EACH(I32, float_bits(a.v[i])); }
BNB_INLINE F32 from_bits(I32 a) { BNB_EACH(F32, float_from_bits(a.v[i])); }
BNB_INLINE I32 magnitude_bits(F32 a) { BNB_EACH(I32, float_bits(a.v[i]) & 0x7fffffffu); }
BNB_INLINE I32 add_bits(I32 a, I32 b) { BNB_EACH(I32, a.v[i] + b.v[i]); }
BNB_INLINE I32 and_bits(I32 a, I32 b) { BNB_EACH(I32, a.v[i] & b.v[i]); }
BNB_INLINE I32 or_bits(I32 a, I32 b) { BNB_EACH(I32, a.v[i] | b.v[i]); }
BNB_INLINE I32 xor_bits(I32 a, I32 b) { BNB_EACH(I32, a.v[i] ^ b.v[i]); }
template <int n> BNB_INLINE I32 shift_left(I32 a) { BNB_EACH(I32, a.v[i] << n); }
template <int n> BNB_INLINE I32 shift_right(I32 a) { BNB_EACH(I32, a.v[i] >> n); }
template <int n> BNB_INLINE I32 shift_right_signed(I32 a) { BNB_EACH(I32, uint32_t(int32_t(a.v[i]) >> n)); }
BNB_INLINE I32 max_bits(I32 a, I32 b) { BNB_EACH(I32, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
BNB_INLINE I32 mul_bits(I32 a, I32 b) { BNB_EACH(I32, a.v[i] * b.v[i]); }
BNB_INLINE I32 lane_numbers() { BNB_EACH(I32, uint32_t(i)); }

BNB_INLINE uint32_t reduce_max_bits(I32 a) {
    uint32_t largest = 0;
    for (int i = 0; i < W; ++i)
        largest = a.v[i] > largest ? a.v[i] : largest;
    return largest;
}

BNB_INLINE F32 to_floats(I32 a) { BNB_EACH(F32, float(int32_t(a.v[i]))); }
BNB_INLINE I32 truncate(F32 a) { BNB_EACH(I32, uint32_t(int32_t(a.v[i]))); }
BNB_INLINE Mask less(F32 a, F32 b) { BNB_EACH(Mask, a.v[i] < b.v[i]); }
BNB_INLINE Mask differ(F32 a, F32 b) { BNB_EACH(Mask, a.v[i] != b.v[i]); }
BNB_INLINE F32 select(Mask m, F32 a, F32 b) { BNB_EACH(F32, m.v[i] ? a.v[i] : b.v[i]); }
BNB_INLINE I32 select(Mask m, I32 a, I32 b) { BNB_EACH(I32, m.v[i] ? a.v[i] : b.v[i]); }
BNB_INLINE I32 drop(I32 a, Mask m) { BNB_EACH(I32, m.v[i] ? 0 : a.v[i]); }
BNB_INLINE I32 twice_plus(I32 a, Mask m) { BNB_EACH(I32, 2 * a.v[i] + m.v[i]); }

BNB_INLINE Table8 load_table8(const float* p) {
    Table8 table;
    memcpy(table.v, p, sizeof table.v);
    return table;
}

BNB_INLINE Table16 load_table16(const float* p) {
    Table16 table;
    memcpy(table.v, p, sizeof table.v);
    return table;
}

BNB_INLINE F32 lookup8(const Table8& table, I32 index) { BNB_EACH(F32, table.v[index.v[i] & 7]); }
BNB_INLINE F32 lookup16(const Table16& table, I32 index) { BNB_EACH(F32, table.v[index.v[i] & 15]); }

BNB_INLINE Table256 load_table256(const float* p) { return {p}; }
BNB_INLINE F32 lookup256(Table256 table, const uint8_t* index) { BNB_EACH(F32, table.p[index[i]]); }

BNB_INLINE void lookup256_pair(Table256 table, const uint8_t* i, F32* out) {
    out[0] = lookup256(table, i);
    out[1] = lookup256(table, i + W);
}

BNB_INLINE void lookup256_four(Table256 table, const uint8_t* i, F32* out) {
    lookup256_pair(table, i, out);
    lookup256_pair(table, i + 2 * W, out + 2);
}

BNB_INLINE F32 gather(const float* p, I32 index) { BNB_EACH(F32, p[int32_t(index.v[i])]); }
BNB_INLINE I32 gather(const uint32_t* p, I32 index) { BNB_EACH(I32, p[int32_t(index.v[i])]); }
BNB_INLINE I32 load_bytes(const uint8_t* p) { BNB_EACH(I32, p[i]); }

BNB_INLINE I32 load_signed_bytes(const int8_t* p) { BNB_EACH(I32, uint32_t(int32_t(p[i]))); }
BNB_INLINE void store_bytes(uint8_t* p, I32 a) {
    for (int i = 0; i < W; ++i)
        p[i] = uint8_t(a.v[i]);
}

BNB_INLINE I32 load_nibbles(const uint8_t* p) { BNB_EACH(I32, (i & 1) ? p[i / 2] & 15u : p[i / 2] >> 4); }

BNB_INLINE void store_nibbles(uint8_t* p, I32 a, I32 b) {
    for (int i = 0; i < W / 2; ++i) {
        p[i] = uint8_t(a.v[2 * i] << 4 | a.v[2 * i + 1]);
        p[W / 2 + i] = uint8_t(b.v[2 * i] << 4 | b.v[2 * i + 1]);
    }
}

BNB_INLINE I32 load_16bit(const uint8_t* p) { BNB_EACH(I32, p[2 * i] | uint32_t(p[2 * i + 1]) << 8); }

BNB_INLINE I32 load_32bit(const uint8_t* p) {
    I32 r;
    memcpy(r.v, p, sizeof r.v);
    return r;
}

BNB_INLINE I32 shift_right_by(I32 a, int n) { BNB_EACH(I32, a.v[i] >> n); }
BNB_INLINE I32 low_nibbles(I32 a) { return a; }

BNB_INLINE Table16 scaled(const Table16& table, float scale) {
    Table16 r;
    for (int i = 0; i < 16; ++i)
        r.v[i] = table.v[i] * scale;
    return r;
}

constexpr int kWords = 2 * W;

struct WordTable {
    uint16_t v[16];
};

template <typename T> BNB_INLINE WordTable narrowed(const Table16& table, const T*) {
    WordTable r;
    for (int i = 0; i < 16; ++i)
        r.v[i] = from_float<T>(table.v[i]).bits;
    return r;
}

template <bool kStreams> BNB_INLINE void put_words(void* p, const WordTable& table, const uint8_t* codes) {
    uint16_t words[kWords];
    for (int i = 0; i < kWords / 2; ++i) {
        words[2 * i] = table.v[codes[i] >> 4];
        words[2 * i + 1] = table.v[codes[i] & 15];
    }
    memcpy(p, words, sizeof words);
}

BNB_INLINE void reduce_add_4(const F32* v, float* out) {
    for (int i = 0; i < 4; ++i)
        out[i] = reduce_add(v[i]);
}

BNB_INLINE void reduce_add_4(const I32* v, uint32_t* out) {
    for (int i = 0; i < 4; ++i)
        out[i] = (v[i].v[0] + v[i].v[2]) + (v[i].v[1] + v[i].v[3]);
}

BNB_INLINE void load_columns(const uint8_t* p, int64_t stride, int rows, int columns, I32* out) {
    for (int i = 0; i < W; ++i) {
        uint32_t row[W] = {};
        memcpy(row, p + (i < rows ? i : rows - 1) * stride, columns * sizeof row[0]);
        for (int j = 0; j < W; ++j)
            out[j].v[i] = row[j];
    }
}

struct DotVector {
    int32_t v[W];
};

using DotSum = I32;
BNB_INLINE DotSum no_dots() { return splat_bits(0); }
BNB_INLINE I32 lanes_of(DotSum sum) { return sum; }

using DotActivation = int8_t;
constexpr int kDotLanes = W;
constexpr uint32_t kDotOffset = 0;

BNB_INLINE DotVector load_dot_weights(const int8_t* p) { BNB_EACH(DotVector, p[i]); }
BNB_INLINE DotVector load_first_dot_weights(const int8_t* p, int n) { BNB_EACH(DotVector, i < n ? p[i] : 0); }
BNB_INLINE DotVector load_dot_activations(const DotActivation* p) { BNB_EACH(DotVector, p[i]); }
BNB_INLINE DotSum dot(DotVector w, DotVector x, DotSum sum) { BNB_EACH(I32, sum.v[i] + uint32_t(w.v[i] * x.v[i])); }
BNB_INLINE I32 sums_of_quads(DotSum sum) { return splat_bits((sum.v[0] + sum.v[2]) + (sum.v[1] + sum.v[3])); }

#undef BNB_EACH

} // namespace BNB_ISA
} // namespace bnb
