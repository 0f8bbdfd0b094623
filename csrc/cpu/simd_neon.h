// NEON on 64-bit ARM, where it is part of the baseline: four lanes, tables looked up byte by byte.
#pragma once

#include <arm_neon.h>

namespace bnb {
namespace BNB_ISA {

constexpr int W = 4;

struct F32 {
    float32x4_t v;
};

struct I32 {
    uint32x4_t v;
};

struct Mask {
    uint32x4_t v; // all bits of a lane set or clear
};

struct Table8 {
    uint8x16x2_t v;
};

struct Table16 {
    uint8x16x4_t v;
};

struct Table256 {
    const float* p;
};

BNB_INLINE F32 splat(float x) { return {vdupq_n_f32(x)}; }
BNB_INLINE I32 splat_bits(uint32_t x) { return {vdupq_n_u32(x)}; }

BNB_INLINE F32 widen(const Half*, uint16x4_t h) { return {vcvt_f32_f16(vreinterpret_f16_u16(h))}; }
BNB_INLINE F32 widen(const BFloat16*, uint16x4_t h) { return {vreinterpretq_f32_u32(vshll_n_u16(h, 16))}; }
BNB_INLINE uint16x4_t narrow(const Half*, F32 a) { return vreinterpret_u16_f16(vcvt_f16_f32(a.v)); }

BNB_INLINE uint16x4_t narrow(const BFloat16*, F32 a) {
    const uint32x4_t x = vreinterpretq_u32_f32(a.v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(x, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(x, vdupq_n_u32(0x7fff)), odd);
    const uint32x4_t number = vceqq_f32(a.v, a.v);
    return vshrn_n_u32(vbslq_u32(number, rounded, vorrq_u32(x, vdupq_n_u32(0x400000))), 16);
}

BNB_INLINE F32 load(const float* p) { return {vld1q_f32(p)}; }
BNB_INLINE void store(float* p, F32 a) { vst1q_f32(p, a.v); }
template <typename T> BNB_INLINE F32 load(const T* p) { return widen(p, vld1_u16(&p->bits)); }
template <typename T> BNB_INLINE void store(T* p, F32 a) { vst1_u16(&p->bits, narrow(p, a)); }
template <typename T> BNB_INLINE void stream(T* p, F32 a) { store(p, a); }
BNB_INLINE void finish_streams() {}

template <typename T> BNB_INLINE F32 load_first(const T* p, int n) {
    T copy[W] = {};
    for (int i = 0; i < n; ++i)
        copy[i] = p[i];
    return load(copy);
}

template <typename T> BNB_INLINE void store_first(T* p, F32 a, int n) {
    T copy[W];
    store(copy, a);
    for (int i = 0; i < n; ++i)
        p[i] = copy[i];
}

BNB_INLINE F32 add(F32 a, F32 b) { return {vaddq_f32(a.v, b.v)}; }
BNB_INLINE F32 sub(F32 a, F32 b) { return {vsubq_f32(a.v, b.v)}; }
BNB_INLINE F32 mul(F32 a, F32 b) { return {vmulq_f32(a.v, b.v)}; }
BNB_INLINE F32 min(F32 a, F32 b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
BNB_INLINE F32 max(F32 a, F32 b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
BNB_INLINE F32 mul_add(F32 a, F32 b, F32 c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
BNB_INLINE F32 fused(F32 a, F32 b, F32 c) { return mul_add(a, b, c); }
BNB_INLINE F32 div(F32 a, F32 b) { return {vdivq_f32(a.v, b.v)}; }
BNB_INLINE F32 sqrt(F32 a) { return {vsqrtq_f32(a.v)}; }
BNB_INLINE float reduce_add(F32 a) { return vaddvq_f32(a.v); }

BNB_INLINE I32 bits(F32 a) { return {vreinterpretq_u32_f32(a.v)}; }
BNB_INLINE F32 from_bits(I32 a) { return {vreinterpretq_f32_u32(a.v)}; }
BNB_INLINE I32 add_bits(I32 a, I32 b) { return {vaddq_u32(a.v, b.v)}; }
BNB_INLINE I32 and_bits(I32 a, I32 b) { return {vandq_u32(a.v, b.v)}; }
BNB_INLINE I32 or_bits(I32 a, I32 b) { return {vorrq_u32(a.v, b.v)}; }
BNB_INLINE I32 xor_bits(I32 a, I32 b) { return {veorq_u32(a.v, b.v)}; }
template <int n> BNB_INLINE I32 shift_left(I32 a) { return {vshlq_n_u32(a.v, n)}; }
template <int n> BNB_INLINE I32 shift_right(I32 a) { return {vshrq_n_u32(a.v, n)}; }
template <int n> BNB_INLINE I32 shift_right_signed(I32 a) { return {vreinterpretq_u32_s32(vshrq_n_s32(vreinterpretq_s32_u32(a.v), n))}; }
BNB_INLINE I32 magnitude_bits(F32 a) { return and_bits(bits(a), splat_bits(0x7fffffffu)); }
BNB_INLINE I32 max_bits(I32 a, I32 b) { return {vmaxq_u32(a.v, b.v)}; }
BNB_INLINE I32 mul_bits(I32 a, I32 b) { return {vmulq_u32(a.v, b.v)}; }

BNB_INLINE I32 lane_numbers() {
    const uint32_t lanes[W] = {0, 1, 2, 3};
    return {vld1q_u32(lanes)};
}

BNB_INLINE uint32_t reduce_max_bits(I32 a) { return vmaxvq_u32(a.v); }

BNB_INLINE F32 to_floats(I32 a) { return {vcvtq_f32_s32(vreinterpretq_s32_u32(a.v))}; }
BNB_INLINE I32 truncate(F32 a) { return {vreinterpretq_u32_s32(vcvtq_s32_f32(a.v))}; }
BNB_INLINE Mask less(F32 a, F32 b) { return {vcltq_f32(a.v, b.v)}; }
BNB_INLINE Mask differ(F32 a, F32 b) { return {vmvnq_u32(vceqq_f32(a.v, b.v))}; }
BNB_INLINE F32 select(Mask m, F32 a, F32 b) { return {vbslq_f32(m.v, a.v, b.v)}; }
BNB_INLINE I32 select(Mask m, I32 a, I32 b) { return {vbslq_u32(m.v, a.v, b.v)}; }

BNB_INLINE I32 drop(I32 a, Mask m) { return {vbicq_u32(a.v, m.v)}; }

// A true lane is -1.
BNB_INLINE I32 twice_plus(I32 a, Mask m) { return {vsubq_u32(vaddq_u32(a.v, a.v), m.v)}; }

BNB_INLINE Table8 load_table8(const float* p) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(p);
    return {{{vld1q_u8(bytes), vld1q_u8(bytes + 16)}}};
}

BNB_INLINE Table16 load_table16(const float* p) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(p);
    return {{{vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)}}};
}

// Lane index i becomes the four byte indices 4 i .. 4 i + 3.
BNB_INLINE uint8x16_t byte_indices(uint32x4_t index) {
    return vreinterpretq_u8_u32(vmlaq_u32(vdupq_n_u32(0x03020100u), index, vdupq_n_u32(0x04040404u)));
}

BNB_INLINE F32 lookup8(Table8 table, I32 index) { return {vreinterpretq_f32_u8(vqtbl2q_u8(table.v, byte_indices(index.v)))}; }
BNB_INLINE F32 lookup16(Table16 table, I32 index) { return {vreinterpretq_f32_u8(vqtbl4q_u8(table.v, byte_indices(index.v)))}; }

BNB_INLINE Table256 load_table256(const float* p) { return {p}; }

BNB_INLINE F32 lookup256(Table256 table, const uint8_t* i) {
    const float lanes[W] = {table.p[i[0]], table.p[i[1]], table.p[i[2]], table.p[i[3]]};
    return {vld1q_f32(lanes)};
}

BNB_INLINE void lookup256_pair(Table256 table, const uint8_t* i, F32* out) {
    out[0] = lookup256(table, i);
    out[1] = lookup256(table, i + W);
}

BNB_INLINE void lookup256_four(Table256 table, const uint8_t* i, F32* out) {
    lookup256_pair(table, i, out);
    lookup256_pair(table, i + 2 * W, out + 2);
}

BNB_INLINE I32 gather(const uint32_t* p, I32 index) {
    const int32x4_t i = vreinterpretq_s32_u32(index.v);
    const uint32_t lanes[W] = {p[vgetq_lane_s32(i, 0)], p[vgetq_lane_s32(i, 1)], p[vgetq_lane_s32(i, 2)], p[vgetq_lane_s32(i, 3)]};
    return {vld1q_u32(lanes)};
}

BNB_INLINE F32 gather(const float* p, I32 index) {
    const int32x4_t i = vreinterpretq_s32_u32(index.v);
    const float lanes[W] = {p[vgetq_lane_s32(i, 0)], p[vgetq_lane_s32(i, 1)], p[vgetq_lane_s32(i, 2)], p[vgetq_lane_s32(i, 3)]};
    return {vld1q_f32(lanes)};
}

BNB_INLINE I32 load_bytes(const uint8_t* p) {
    const uint32_t lanes[W] = {p[0], p[1], p[2], p[3]};
    return {vld1q_u32(lanes)};
}

BNB_INLINE I32 load_signed_bytes(const int8_t* p) {
    const int32_t lanes[W] = {p[0], p[1], p[2], p[3]};
    return {vreinterpretq_u32_s32(vld1q_s32(lanes))};
}
BNB_INLINE void store_bytes(uint8_t* p, I32 a) {
    const uint16x4_t words = vmovn_u32(a.v);
    const uint8x8_t bytes = vmovn_u16(vcombine_u16(words, words));
    const uint32_t four = vget_lane_u32(vreinterpret_u32_u8(bytes), 0);
    memcpy(p, &four, sizeof four);
}

// Unlike elsewhere the bits above the fourth are clear: a byte index beyond the table would read as zero.
BNB_INLINE I32 load_nibbles(const uint8_t* p) {
    const uint32_t lanes[W] = {uint32_t(p[0]) >> 4, p[0] & 15u, uint32_t(p[1]) >> 4, p[1] & 15u};
    return {vld1q_u32(lanes)};
}

BNB_INLINE void store_nibbles(uint8_t* p, I32 a, I32 b) {
    const uint16x8_t words = vcombine_u16(vmovn_u32(a.v), vmovn_u32(b.v));
    const uint16x8_t even = vuzp1q_u16(words, words), odd = vuzp2q_u16(words, words);
    const uint8x8_t bytes = vmovn_u16(vorrq_u16(vshlq_n_u16(even, 4), odd));
    const uint32_t four = vget_lane_u32(vreinterpret_u32_u8(bytes), 0);
    memcpy(p, &four, sizeof four);
}

BNB_INLINE I32 load_16bit(const uint8_t* p) { return {vmovl_u16(vreinterpret_u16_u8(vld1_u8(p)))}; }
BNB_INLINE I32 load_32bit(const uint8_t* p) { return {vreinterpretq_u32_u8(vld1q_u8(p))}; }
BNB_INLINE I32 shift_right_by(I32 a, int n) { return {vshlq_u32(a.v, vdupq_n_s32(-n))}; }
BNB_INLINE I32 low_nibbles(I32 a) { return {vandq_u32(a.v, vdupq_n_u32(15))}; }

BNB_INLINE Table16 scaled(Table16 table, float scale) {
    for (int i = 0; i < 4; ++i)
        table.v.val[i] = vreinterpretq_u8_f32(vmulq_n_f32(vreinterpretq_f32_u8(table.v.val[i]), scale));
    return table;
}

constexpr int kWords = 8 * W;

struct WordTable {
    uint8x16x2_t bytes; // the lower ones of the entries, the upper ones
};

template <typename T> BNB_INLINE WordTable narrowed(const Table16& table, const T*) {
    T entries[16];
    for (int i = 0; i < 4; ++i)
        store(entries + 4 * i, {vreinterpretq_f32_u8(table.v.val[i])});
    return {vld2q_u8(reinterpret_cast<const uint8_t*>(entries))};
}

template <bool kStreams> BNB_INLINE void put_words(void* p, const WordTable& table, const uint8_t* codes) {
    const uint8x16_t bytes = vld1q_u8(codes), even = vshrq_n_u8(bytes, 4), odd = vandq_u8(bytes, vdupq_n_u8(15));
    const uint8x16_t index[2] = {vzip1q_u8(even, odd), vzip2q_u8(even, odd)};
    for (int i = 0; i < 2; ++i)
        vst2q_u8(static_cast<uint8_t*>(p) + 32 * i, {{vqtbl1q_u8(table.bytes.val[0], index[i]), vqtbl1q_u8(table.bytes.val[1], index[i])}});
}

BNB_INLINE void reduce_add_4(const F32* v, float* out) { vst1q_f32(out, vpaddq_f32(vpaddq_f32(v[0].v, v[1].v), vpaddq_f32(v[2].v, v[3].v))); }

BNB_INLINE void reduce_add_4(const I32* v, uint32_t* out) { vst1q_u32(out, vpaddq_u32(vpaddq_u32(v[0].v, v[1].v), vpaddq_u32(v[2].v, v[3].v))); }

BNB_INLINE void load_columns(const uint8_t* p, int64_t stride, int rows, int columns, I32* out) {
    uint32x4_t a[4];
    for (int i = 0; i < 4; ++i) {
        uint32_t row[W] = {};
        memcpy(row, p + (i < rows ? i : rows - 1) * stride, columns * sizeof row[0]);
        a[i] = vld1q_u32(row);
    }
    const uint32x4_t even01 = vtrn1q_u32(a[0], a[1]), odd01 = vtrn2q_u32(a[0], a[1]);
    const uint32x4_t even23 = vtrn1q_u32(a[2], a[3]), odd23 = vtrn2q_u32(a[2], a[3]);
    out[0].v = vcombine_u32(vget_low_u32(even01), vget_low_u32(even23));
    out[1].v = vcombine_u32(vget_low_u32(odd01), vget_low_u32(odd23));
    out[2].v = vcombine_u32(vget_high_u32(even01), vget_high_u32(even23));
    out[3].v = vcombine_u32(vget_high_u32(odd01), vget_high_u32(odd23));
}

struct DotVector {
    int8x16_t v;
};

struct DotSum {
    int32x4_t v;
};

BNB_INLINE DotSum no_dots() { return {vdupq_n_s32(0)}; }
BNB_INLINE I32 lanes_of(DotSum sum) { return {vreinterpretq_u32_s32(sum.v)}; }

using DotActivation = int8_t;
constexpr int kDotLanes = 16;
constexpr uint32_t kDotOffset = 0;

BNB_INLINE DotVector load_dot_weights(const int8_t* p) { return {vld1q_s8(p)}; }

BNB_INLINE DotVector load_first_dot_weights(const int8_t* p, int n) {
    int8_t copy[kDotLanes] = {};
    for (int i = 0; i < n; ++i)
        copy[i] = p[i];
    return load_dot_weights(copy);
}

BNB_INLINE DotVector load_dot_activations(const DotActivation* p) { return {vld1q_s8(p)}; }

BNB_INLINE DotSum dot(DotVector w, DotVector x, DotSum sum) {
#if defined(__ARM_FEATURE_DOTPROD)
    return {vdotq_s32(sum.v, w.v, x.v)};
#else
    const int16x8_t low = vmull_s8(vget_low_s8(w.v), vget_low_s8(x.v)), high = vmull_high_s8(w.v, x.v);
    return {vaddq_s32(sum.v, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)))};
#endif
}

BNB_INLINE I32 sums_of_quads(DotSum sum) { return lanes_of(sum); }

} // namespace BNB_ISA
} // namespace bnb
