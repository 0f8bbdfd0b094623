// AVX2 with FMA and F16C: eight lanes, a 16-entry table in two registers.
#pragma once

#include <immintrin.h>

namespace bnb {
namespace BNB_ISA {

constexpr int W = 8;

struct F32 {
    __m256 v;
};

struct I32 {
    __m256i v;
};

struct Mask {
    __m256 v; // all bits of a lane set or clear
};

struct Table8 {
    __m256 v;
};

struct Table16 {
    __m256 low, high;
};

struct Table256 {
    const float* p;
};

BNB_INLINE __m256i first_lanes(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }

BNB_INLINE F32 splat(float x) { return {_mm256_set1_ps(x)}; }
BNB_INLINE I32 splat_bits(uint32_t x) { return {_mm256_set1_epi32(int(x))}; }

BNB_INLINE F32 widen(const Half*, __m128i h) { return {_mm256_cvtph_ps(h)}; }
BNB_INLINE F32 widen(const BFloat16*, __m128i h) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))}; }
BNB_INLINE __m128i narrow(const Half*, F32 a) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

BNB_INLINE __m128i narrow(const BFloat16*, F32 a) {
    const __m256i x = _mm256_castps_si256(a.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(x, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(x, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
    const __m256i kept = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
}

BNB_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
BNB_INLINE F32 load_first(const float* p, int n) { return {_mm256_maskload_ps(p, first_lanes(n))}; }
BNB_INLINE void store(float* p, F32 a) { _mm256_storeu_ps(p, a.v); }
BNB_INLINE void stream(float* p, F32 a) { _mm256_stream_ps(p, a.v); }
BNB_INLINE void finish_streams() { _mm_sfence(); }
BNB_INLINE void store_first(float* p, F32 a, int n) { _mm256_maskstore_ps(p, first_lanes(n), a.v); }

template <typename T> BNB_INLINE F32 load(const T* p) { return widen(p, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

template <typename T> BNB_INLINE F32 load_first(const T* p, int n) {
    alignas(16) T copy[W] = {};
    for (int i = 0; i < n; ++i)
        copy[i] = p[i];
    return load(copy);
}

template <typename T> BNB_INLINE void store(T* p, F32 a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(p, a)); }
template <typename T> BNB_INLINE void stream(T* p, F32 a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(p, a)); }

template <typename T> BNB_INLINE void store_first(T* p, F32 a, int n) {
    alignas(16) T copy[W];
    store(copy, a);
    for (int i = 0; i < n; ++i)
        p[i] = copy[i];
}

BNB_INLINE F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
BNB_INLINE F32 sub(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
BNB_INLINE F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
BNB_INLINE F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
BNB_INLINE F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
BNB_INLINE F32 mul_add(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
BNB_INLINE F32 fused(F32 a, F32 b, F32 c) { return mul_add(a, b, c); }
BNB_INLINE F32 div(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
BNB_INLINE F32 sqrt(F32 a) { return {_mm256_sqrt_ps(a.v)}; }

BNB_INLINE float reduce_add(F32 a) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

BNB_INLINE I32 bits(F32 a) { return {_mm256_castps_si256(a.v)}; }
BNB_INLINE F32 from_bits(I32 a) { return {_mm256_castsi256_ps(a.v)}; }
BNB_INLINE I32 add_bits(I32 a, I32 b) { return {_mm256_add_epi32(a.v, b.v)}; }
BNB_INLINE I32 and_bits(I32 a, I32 b) { return {_mm256_and_si256(a.v, b.v)}; }
BNB_INLINE I32 or_bits(I32 a, I32 b) { return {_mm256_or_si256(a.v, b.v)}; }
BNB_INLINE I32 xor_bits(I32 a, I32 b) { return {_mm256_xor_si256(a.v, b.v)}; }
template <int n> BNB_INLINE I32 shift_left(I32 a) { return {_mm256_slli_epi32(a.v, n)}; }
template <int n> BNB_INLINE I32 shift_right(I32 a) { return {_mm256_srli_epi32(a.v, n)}; }
template <int n> BNB_INLINE I32 shift_right_signed(I32 a) { return {_mm256_srai_epi32(a.v, n)}; }
BNB_INLINE I32 magnitude_bits(F32 a) { return and_bits(bits(a), splat_bits(0x7fffffffu)); }
BNB_INLINE I32 max_bits(I32 a, I32 b) { return {_mm256_max_epu32(a.v, b.v)}; }
BNB_INLINE I32 mul_bits(I32 a, I32 b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
BNB_INLINE I32 lane_numbers() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)}; }

BNB_INLINE uint32_t reduce_max_bits(I32 a) {
    __m128i largest = _mm_max_epu32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
    largest = _mm_max_epu32(largest, _mm_unpackhi_epi64(largest, largest));
    return uint32_t(_mm_cvtsi128_si32(_mm_max_epu32(largest, _mm_srli_epi64(largest, 32))));
}

BNB_INLINE F32 to_floats(I32 a) { return {_mm256_cvtepi32_ps(a.v)}; }
BNB_INLINE I32 truncate(F32 a) { return {_mm256_cvttps_epi32(a.v)}; }
BNB_INLINE Mask less(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
BNB_INLINE Mask differ(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_NEQ_UQ)}; }
BNB_INLINE F32 select(Mask m, F32 a, F32 b) { return {_mm256_blendv_ps(b.v, a.v, m.v)}; }
BNB_INLINE I32 select(Mask m, I32 a, I32 b) { return bits(select(m, from_bits(a), from_bits(b))); }

BNB_INLINE I32 drop(I32 a, Mask m) { return {_mm256_andnot_si256(_mm256_castps_si256(m.v), a.v)}; }

// A true lane is -1.
BNB_INLINE I32 twice_plus(I32 a, Mask m) { return {_mm256_sub_epi32(_mm256_add_epi32(a.v, a.v), _mm256_castps_si256(m.v))}; }

BNB_INLINE Table8 load_table8(const float* p) { return {_mm256_loadu_ps(p)}; }
BNB_INLINE Table16 load_table16(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
BNB_INLINE F32 lookup8(Table8 table, I32 index) { return {_mm256_permutevar8x32_ps(table.v, index.v)}; }

// The permutation uses the low three bits of an index; the fourth, moved to the sign, chooses the half.
BNB_INLINE F32 lookup16(Table16 table, I32 index) {
    const __m256 low = _mm256_permutevar8x32_ps(table.low, index.v);
    const __m256 high = _mm256_permutevar8x32_ps(table.high, index.v);
    return {_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index.v, 28)))};
}

BNB_INLINE Table256 load_table256(const float* p) { return {p}; }

// Eight plain loads: faster than the gather instruction, whose indices would first have to be widened.
BNB_INLINE F32 lookup256(Table256 table, const uint8_t* i) {
    const float* p = table.p;
    return {_mm256_setr_ps(p[i[0]], p[i[1]], p[i[2]], p[i[3]], p[i[4]], p[i[5]], p[i[6]], p[i[7]])};
}

BNB_INLINE F32 gather(const float* p, I32 index) { return {_mm256_i32gather_ps(p, index.v, 4)}; }
BNB_INLINE void lookup256_pair(Table256 table, const uint8_t* i, F32* out) {
    out[0] = lookup256(table, i);
    out[1] = lookup256(table, i + W);
}

BNB_INLINE void lookup256_four(Table256 table, const uint8_t* i, F32* out) {
    lookup256_pair(table, i, out);
    lookup256_pair(table, i + 2 * W, out + 2);
}

BNB_INLINE I32 gather(const uint32_t* p, I32 index) { return {_mm256_i32gather_epi32(reinterpret_cast<const int*>(p), index.v, 4)}; }

BNB_INLINE I32 load_bytes(const uint8_t* p) { return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))}; }

BNB_INLINE I32 load_signed_bytes(const int8_t* p) { return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))}; }
BNB_INLINE void store_bytes(uint8_t* p, I32 a) {
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}

// Each byte is spread over a pair of lanes; the even lane shifts its high nibble down.
BNB_INLINE I32 load_nibbles(const uint8_t* p) {
    int32_t packed;
    memcpy(&packed, p, sizeof packed);
    const __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(packed));
    const __m256i pairs = _mm256_or_si256(bytes, _mm256_slli_epi64(bytes, 32));
    return {_mm256_srlv_epi32(pairs, _mm256_set1_epi64x(4))};
}

// packs interleaves the 128-bit halves of a and b; multiply-add forms 16 * even + odd; the unpack at the end restores the order.
BNB_INLINE void store_nibbles(uint8_t* p, I32 a, I32 b) {
    const __m256i words = _mm256_packs_epi32(a.v, b.v);
    const __m256i pairs = _mm256_madd_epi16(words, _mm256_set1_epi32(0x00010010));
    const __m256i bytes = _mm256_shuffle_epi8(pairs, _mm256_set1_epi64x(0x0c0804000c080400));
    const __m128i ordered = _mm_unpacklo_epi16(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), ordered);
}

BNB_INLINE I32 load_16bit(const uint8_t* p) { return {_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
BNB_INLINE I32 load_32bit(const uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
BNB_INLINE I32 shift_right_by(I32 a, int n) { return {_mm256_srl_epi32(a.v, _mm_cvtsi32_si128(n))}; }
BNB_INLINE I32 low_nibbles(I32 a) { return a; }

BNB_INLINE Table16 scaled(Table16 table, float scale) {
    const __m256 s = _mm256_set1_ps(scale);
    return {_mm256_mul_ps(table.low, s), _mm256_mul_ps(table.high, s)};
}

constexpr int kWords = 4 * W;

struct WordTable {
    __m256i low, high; // the bytes of the entries, the same in both halves
};

template <typename T> BNB_INLINE WordTable narrowed(Table16 table, const T* type) {
    const __m128i first = narrow(type, {table.low}), second = narrow(type, {table.high}), low_byte = _mm_set1_epi16(0xff);
    const __m128i low = _mm_packus_epi16(_mm_and_si128(first, low_byte), _mm_and_si128(second, low_byte));
    const __m128i high = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
    return {_mm256_broadcastsi128_si256(low), _mm256_broadcastsi128_si256(high)};
}

// Codes are put in the order in which the unpacking of their bytes, half by half, brings them into line.
template <bool kStreams> BNB_INLINE void put_words(void* p, const WordTable& table, const uint8_t* codes) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)), nibble = _mm_set1_epi8(15);
    const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble), odd = _mm_and_si128(bytes, nibble);
    const __m128i first = _mm_unpacklo_epi8(even, odd), second = _mm_unpackhi_epi8(even, odd);
    const __m256i index = _mm256_set_m128i(_mm_unpackhi_epi64(first, second), _mm_unpacklo_epi64(first, second));
    const __m256i low = _mm256_shuffle_epi8(table.low, index), high = _mm256_shuffle_epi8(table.high, index);
    const __m256i words[2] = {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
    for (int i = 0; i < 2; ++i) {
        if (kStreams)
            _mm256_stream_si256(static_cast<__m256i*>(p) + i, words[i]);
        else
            _mm256_storeu_si256(static_cast<__m256i*>(p) + i, words[i]);
    }
}

BNB_INLINE void reduce_add_4(const F32* v, float* out) {
    const __m256 two = _mm256_hadd_ps(_mm256_hadd_ps(v[0].v, v[1].v), _mm256_hadd_ps(v[2].v, v[3].v));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1)));
}

BNB_INLINE void reduce_add_4(const I32* v, uint32_t* out) {
    const __m256i two = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0].v, v[1].v), _mm256_hadd_epi32(v[2].v, v[3].v));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_add_epi32(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1)));
}

BNB_INLINE void load_columns(const uint8_t* p, int64_t stride, int rows, int columns, I32* out) {
    const __m256i wanted = first_lanes(columns);
    __m256i a[8], b[8];
    for (int i = 0; i < 8; ++i)
        a[i] = _mm256_maskload_epi32(reinterpret_cast<const int*>(p + (i < rows ? i : rows - 1) * stride), wanted);
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) { // afterwards half q of a[i + j] holds column 4 q + j of rows i .. i + 3
        a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int j = 0; j < 4; ++j) {
        out[j].v = _mm256_permute2x128_si256(a[j], a[4 + j], 0x20);
        out[4 + j].v = _mm256_permute2x128_si256(a[j], a[4 + j], 0x31);
    }
}

// Products of 16 bits: those of bytes would saturate.
struct DotVector {
    __m256i v;
};

// Of 32-bit elements for GCC: see simd_avx512.h.
#if defined(__GNUC__)
typedef int Words __attribute__((vector_size(32)));
#else
using Words = __m256i;
#endif

struct DotSum {
    Words v;
};

BNB_INLINE DotSum no_dots() { return {Words{}}; }
BNB_INLINE I32 lanes_of(DotSum sum) { return {(__m256i)sum.v}; }

using DotActivation = int16_t;
constexpr int kDotLanes = 16;
constexpr uint32_t kDotOffset = 0;

BNB_INLINE DotVector load_dot_weights(const int8_t* p) { return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }

BNB_INLINE DotVector load_first_dot_weights(const int8_t* p, int n) {
    int8_t copy[kDotLanes] = {};
    for (int i = 0; i < n; ++i)
        copy[i] = p[i];
    return load_dot_weights(copy);
}

BNB_INLINE DotVector load_dot_activations(const DotActivation* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
BNB_INLINE DotSum dot(DotVector w, DotVector x, DotSum sum) { return {(Words)_mm256_add_epi32((__m256i)sum.v, _mm256_madd_epi16(w.v, x.v))}; }
BNB_INLINE I32 sums_of_quads(DotSum sum) {
    const __m256i v = (__m256i)sum.v;
    return {_mm256_add_epi32(v, _mm256_shuffle_epi32(v, 0xb1))};
}

} // namespace BNB_ISA
} // namespace bnb
