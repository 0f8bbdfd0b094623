// AVX-512 F, BW, DQ, VL: sixteen lanes, a 16-entry table in one register.
#pragma once

#include <immintrin.h>

namespace bnb {
namespace BNB_ISA {

constexpr int W = 16;

struct F32 {
    __m512 v;
};

struct I32 {
    __m512i v;
};

struct Mask {
    __mmask16 v;
};

struct Table8 {
    __m512 v;
};

struct Table16 {
    __m512 v;
};

#define BNB_HAS_LINE_LOOKUP // and what else codes by lines need, see find_code.h

// 32 floats, or the first 16 of them.
template <bool kAll> struct LineLookup {
    __m512 low, high;

    BNB_MEMBER explicit LineLookup(const float* p) : low(_mm512_loadu_ps(p)), high(kAll ? _mm512_loadu_ps(p + 16) : low) {}
    BNB_MEMBER F32 of(I32 index) const { return {kAll ? _mm512_permutex2var_ps(low, index.v, high) : _mm512_permutexvar_ps(index.v, low)}; }
};

#if defined(__AVX512VBMI__)
struct Table256 {
    __m512i bytes[4][4]; // the lowest bytes of the entries, ..., the highest
};
#else
struct Table256 {
    __m512i low[8], high[8]; // the lower and the upper 16 bits of the entries
};
#endif

BNB_INLINE __mmask16 first_lanes(int n) { return __mmask16((1u << n) - 1); }

BNB_INLINE F32 splat(float x) { return {_mm512_set1_ps(x)}; }
BNB_INLINE I32 splat_bits(uint32_t x) { return {_mm512_set1_epi32(int(x))}; }

BNB_INLINE F32 widen_half(__m256i h) { return {_mm512_cvtph_ps(h)}; }
BNB_INLINE F32 widen_bfloat16(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }
BNB_INLINE __m256i narrow_half(F32 a) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// Integer rounding: the bfloat16 instruction of AVX512_BF16 would flush denormals.
BNB_INLINE __m256i narrow_bfloat16(F32 a) {
    const __m512i x = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(rounded, nan, x, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}

BNB_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
BNB_INLINE F32 load(const Half* p) { return widen_half(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
BNB_INLINE F32 load(const BFloat16* p) { return widen_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
BNB_INLINE F32 load_first(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
BNB_INLINE F32 load_first(const Half* p, int n) { return widen_half(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
BNB_INLINE F32 load_first(const BFloat16* p, int n) { return widen_bfloat16(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }

BNB_INLINE void store(float* p, F32 a) { _mm512_storeu_ps(p, a.v); }
BNB_INLINE void store(Half* p, F32 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_half(a)); }
BNB_INLINE void store(BFloat16* p, F32 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bfloat16(a)); }
BNB_INLINE void stream(float* p, F32 a) { _mm512_stream_ps(p, a.v); }
BNB_INLINE void stream(Half* p, F32 a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_half(a)); }
BNB_INLINE void stream(BFloat16* p, F32 a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_bfloat16(a)); }
BNB_INLINE void finish_streams() { _mm_sfence(); }
BNB_INLINE void store_first(float* p, F32 a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }
BNB_INLINE void store_first(Half* p, F32 a, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_half(a)); }
BNB_INLINE void store_first(BFloat16* p, F32 a, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_bfloat16(a)); }

BNB_INLINE F32 add(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
BNB_INLINE F32 sub(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
BNB_INLINE F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
BNB_INLINE F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
BNB_INLINE F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
BNB_INLINE F32 mul_add(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
BNB_INLINE F32 fused(F32 a, F32 b, F32 c) { return mul_add(a, b, c); }
BNB_INLINE F32 div(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
BNB_INLINE F32 sqrt(F32 a) { return {_mm512_sqrt_ps(a.v)}; }
BNB_INLINE float reduce_add(F32 a) { return _mm512_reduce_add_ps(a.v); }

BNB_INLINE I32 bits(F32 a) { return {_mm512_castps_si512(a.v)}; }
BNB_INLINE F32 from_bits(I32 a) { return {_mm512_castsi512_ps(a.v)}; }
BNB_INLINE I32 add_bits(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
BNB_INLINE I32 and_bits(I32 a, I32 b) { return {_mm512_and_si512(a.v, b.v)}; }
BNB_INLINE I32 or_bits(I32 a, I32 b) { return {_mm512_or_si512(a.v, b.v)}; }
BNB_INLINE I32 xor_bits(I32 a, I32 b) { return {_mm512_xor_si512(a.v, b.v)}; }
template <int n> BNB_INLINE I32 shift_left(I32 a) { return {_mm512_slli_epi32(a.v, n)}; }
template <int n> BNB_INLINE I32 shift_right(I32 a) { return {_mm512_srli_epi32(a.v, n)}; }
template <int n> BNB_INLINE I32 shift_right_signed(I32 a) { return {_mm512_srai_epi32(a.v, n)}; }
BNB_INLINE I32 magnitude_bits(F32 a) { return and_bits(bits(a), splat_bits(0x7fffffffu)); }
BNB_INLINE I32 max_bits(I32 a, I32 b) { return {_mm512_max_epu32(a.v, b.v)}; }
BNB_INLINE uint32_t reduce_max_bits(I32 a) { return _mm512_reduce_max_epu32(a.v); }
BNB_INLINE I32 mul_bits(I32 a, I32 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
BNB_INLINE I32 lane_numbers() { return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }

BNB_INLINE F32 to_floats(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
BNB_INLINE I32 truncate(F32 a) { return {_mm512_cvttps_epi32(a.v)}; }
BNB_INLINE Mask less(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
BNB_INLINE Mask differ(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ)}; }
BNB_INLINE F32 select(Mask m, F32 a, F32 b) { return {_mm512_mask_mov_ps(b.v, m.v, a.v)}; }
BNB_INLINE I32 select(Mask m, I32 a, I32 b) { return {_mm512_mask_mov_epi32(b.v, m.v, a.v)}; }

BNB_INLINE I32 add_where(Mask m, I32 a, I32 b) { return {_mm512_mask_add_epi32(a.v, m.v, a.v, b.v)}; }
BNB_INLINE I32 drop(I32 a, Mask m) { return {_mm512_maskz_mov_epi32(__mmask16(~m.v), a.v)}; }

BNB_INLINE I32 twice_plus(I32 a, Mask m) {
    const __m512i twice = _mm512_add_epi32(a.v, a.v);
    return {_mm512_mask_sub_epi32(twice, m.v, twice, _mm512_set1_epi32(-1))};
}

BNB_INLINE Table8 load_table8(const float* p) { return {_mm512_castps256_ps512(_mm256_loadu_ps(p))}; }
BNB_INLINE Table16 load_table16(const float* p) { return {_mm512_loadu_ps(p)}; }
BNB_INLINE F32 lookup8(Table8 table, I32 index) { return {_mm512_permutexvar_ps(index.v, table.v)}; }
BNB_INLINE F32 lookup16(Table16 table, I32 index) { return {_mm512_permutexvar_ps(index.v, table.v)}; }

#if defined(__AVX512VBMI__)
BNB_INLINE Table256 load_table256(const float* p) {
    Table256 table;
    for (int part = 0; part < 4; ++part)
        for (int byte = 0; byte < 4; ++byte) {
            __m128i quarters[4];
            for (int i = 0; i < 4; ++i)
                quarters[i] = _mm512_cvtepi32_epi8(_mm512_srl_epi32(_mm512_loadu_si512(p + 64 * part + 16 * i), _mm_cvtsi32_si128(8 * byte)));
            const __m256i lower = _mm256_inserti128_si256(_mm256_castsi128_si256(quarters[0]), quarters[1], 1);
            const __m256i upper = _mm256_inserti128_si256(_mm256_castsi128_si256(quarters[2]), quarters[3], 1);
            table.bytes[byte][part] = _mm512_inserti64x4(_mm512_castsi256_si512(lower), upper, 1);
        }
    return table;
}

// The bytes of the floats are looked up apart, 64 at a time: a permutation looks up the low seven bits of the index in two registers, a blend chooses
// between two results. Codes are put in the order in which the bytes meet again.
BNB_INLINE void lookup256(const Table256& table, __m512i codes, F32* out) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i index = _mm512_permutexvar_epi32(order, codes);
    const __mmask64 bit7 = _mm512_movepi8_mask(index);
    __m512i bytes[4];
    for (int i = 0; i < 4; ++i) {
        const __m512i* part = table.bytes[i];
        bytes[i] = _mm512_mask_mov_epi8(_mm512_permutex2var_epi8(part[0], index, part[1]), bit7, _mm512_permutex2var_epi8(part[2], index, part[3]));
    }
    const __m512i low[2] = {_mm512_unpacklo_epi8(bytes[0], bytes[1]), _mm512_unpackhi_epi8(bytes[0], bytes[1])};
    const __m512i high[2] = {_mm512_unpacklo_epi8(bytes[2], bytes[3]), _mm512_unpackhi_epi8(bytes[2], bytes[3])};
    for (int i = 0; i < 2; ++i) {
        out[2 * i].v = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low[i], high[i]));
        out[2 * i + 1].v = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low[i], high[i]));
    }
}

BNB_INLINE void lookup256_pair(const Table256& table, const uint8_t* p, F32* out) {
    F32 four[4];
    lookup256(table, _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), four);
    out[0] = four[0], out[1] = four[1];
}

BNB_INLINE void lookup256_four(const Table256& table, const uint8_t* p, F32* out) { lookup256(table, _mm512_loadu_si512(p), out); }
#else
BNB_INLINE Table256 load_table256(const float* p) {
    const __m512i even = _mm512_setr_epi32(0x00020000, 0x00060004, 0x000a0008, 0x000e000c, 0x00120010, 0x00160014, 0x001a0018, 0x001e001c, 0x00220020,
                                           0x00260024, 0x002a0028, 0x002e002c, 0x00320030, 0x00360034, 0x003a0038, 0x003e003c);
    const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    Table256 table;
    for (int i = 0; i < 8; ++i) {
        const __m512i first = _mm512_loadu_si512(p + 32 * i), second = _mm512_loadu_si512(p + 32 * i + 16);
        table.low[i] = _mm512_permutex2var_epi16(first, even, second);
        table.high[i] = _mm512_permutex2var_epi16(first, odd, second);
    }
    return table;
}

// 32 words out of 256: a permutation looks up the low six bits of the index in two registers, blends choose among the four results.
BNB_INLINE __m512i lookup_words(const __m512i* words, __m512i index, __mmask32 bit6, __mmask32 bit7) {
    const __m512i a = _mm512_permutex2var_epi16(words[0], index, words[1]), b = _mm512_permutex2var_epi16(words[2], index, words[3]);
    const __m512i c = _mm512_permutex2var_epi16(words[4], index, words[5]), d = _mm512_permutex2var_epi16(words[6], index, words[7]);
    return _mm512_mask_mov_epi16(_mm512_mask_mov_epi16(a, bit6, b), bit7, _mm512_mask_mov_epi16(c, bit6, d));
}

// The halves of the floats are looked up apart, 32 at a time. The table fills half of the registers; this is about a quarter of the time of a gather.
// Codes are put in the order in which the halves meet again.
BNB_INLINE void lookup256_pair(const Table256& table, const uint8_t* p, F32* out) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i codes = _mm256_permutevar8x32_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), order);
    const __m512i index = _mm512_cvtepu8_epi16(codes);
    const __mmask32 bit6 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64)), bit7 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(128));
    const __m512i low = lookup_words(table.low, index, bit6, bit7), high = lookup_words(table.high, index, bit6, bit7);
    out[0].v = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low, high));
    out[1].v = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low, high));
}

BNB_INLINE void lookup256_four(const Table256& table, const uint8_t* p, F32* out) {
    lookup256_pair(table, p, out);
    lookup256_pair(table, p + 2 * W, out + 2);
}
#endif

BNB_INLINE F32 gather(const float* p, I32 index) { return {_mm512_i32gather_ps(index.v, p, 4)}; }
BNB_INLINE I32 gather(const uint32_t* p, I32 index) { return {_mm512_i32gather_epi32(index.v, p, 4)}; }

BNB_INLINE I32 load_bytes(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
BNB_INLINE I32 load_signed_bytes(const int8_t* p) { return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
BNB_INLINE void store_bytes(uint8_t* p, I32 a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v)); }

BNB_INLINE bool any_low_word_below(uint32_t limit, const I32* four) {
    const __m512i least = _mm512_min_epu16(_mm512_min_epu16(four[0].v, four[1].v), _mm512_min_epu16(four[2].v, four[3].v));
    return _mm512_mask_cmplt_epu16_mask(0x55555555u, least, _mm512_set1_epi16(short(limit))) != 0;
}

// The upper words of four vectors as bytes. Those that may be negative (kSigned) are turned over bit by bit where they are: -1 is 0, -2 is 1.
template <bool kSigned> BNB_INLINE void store_high_words(uint8_t* p, const I32* four) {
    const __m512i odd = _mm512_setr_epi32(0x00030001, 0x00070005, 0x000b0009, 0x000f000d, 0x00130011, 0x00170015, 0x001b0019, 0x001f001d, 0x00230021,
                                          0x00270025, 0x002b0029, 0x002f002d, 0x00330031, 0x00370035, 0x003b0039, 0x003f003d);
    const __m512i in_order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    __m512i words[2];
    for (int i = 0; i < 2; ++i) {
        words[i] = _mm512_permutex2var_epi16(four[2 * i].v, odd, four[2 * i + 1].v);
        if (kSigned)
            words[i] = _mm512_max_epi16(words[i], _mm512_ternarylogic_epi32(words[i], words[i], words[i], 0x55));
    }
    _mm512_storeu_si512(p, _mm512_permutexvar_epi64(in_order, _mm512_packus_epi16(words[0], words[1])));
}

// Each byte is spread over a pair of lanes; the even lane shifts its high nibble down.
BNB_INLINE I32 load_nibbles(const uint8_t* p) {
    const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m512i pairs = _mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 32));
    return {_mm512_srlv_epi32(pairs, _mm512_set1_epi64(4))};
}

BNB_INLINE __m128i pair_nibbles(I32 a) { return _mm512_cvtepi64_epi8(_mm512_or_si512(_mm512_slli_epi64(a.v, 4), _mm512_srli_epi64(a.v, 32))); }

BNB_INLINE void store_nibbles(uint8_t* p, I32 a, I32 b) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_unpacklo_epi64(pair_nibbles(a), pair_nibbles(b)));
}

BNB_INLINE I32 load_16bit(const uint8_t* p) { return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
BNB_INLINE I32 load_32bit(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
BNB_INLINE I32 shift_right_by(I32 a, int n) { return {_mm512_srl_epi32(a.v, _mm_cvtsi32_si128(n))}; }
BNB_INLINE I32 low_nibbles(I32 a) { return a; }
BNB_INLINE Table16 scaled(Table16 table, float scale) { return {_mm512_mul_ps(table.v, _mm512_set1_ps(scale))}; }

// Word indices from 16 bytes: the high nibble in the lower word, the low one in the upper word. Bits above the fifth do not count, the fifth may be
// anything.
BNB_INLINE I32 load_nibble_words(const uint8_t* p) {
    const I32 bytes = load_bytes(p);
    return or_bits(shift_right<4>(bytes), shift_left<16>(bytes));
}

constexpr int kWords = 2 * W;

struct WordTable {
    __m512i v; // the entries twice, for either fifth bit
};

BNB_INLINE WordTable narrowed(Table16 table, const Half*) { return {_mm512_broadcast_i64x4(narrow_half({table.v}))}; }
BNB_INLINE WordTable narrowed(Table16 table, const BFloat16*) { return {_mm512_broadcast_i64x4(narrow_bfloat16({table.v}))}; }

template <bool kStreams> BNB_INLINE void put_words(void* p, WordTable table, const uint8_t* codes) {
    const __m512i words = _mm512_permutexvar_epi16(load_nibble_words(codes).v, table.v);
    if (kStreams)
        _mm512_stream_si512(static_cast<__m512i*>(p), words);
    else
        _mm512_storeu_si512(p, words);
}

// A transposition of four lanes by four, and additions that make one vector of four and then one part of four.
BNB_INLINE void reduce_add_4(const F32* v, float* out) {
    const auto halve = [](__m512 a, __m512 b) { return _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b))); };
    const __m512d a = halve(v[0].v, v[1].v), b = halve(v[2].v, v[3].v);
    const __m512 parts = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(parts), _mm512_extractf32x8_ps(parts, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1)));
}

BNB_INLINE void reduce_add_4(const I32* v, uint32_t* out) {
    const auto halve = [](__m512i a, __m512i b) { return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)); };
    const __m512i a = halve(v[0].v, v[1].v), b = halve(v[2].v, v[3].v);
    const __m512i parts = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    const __m256i two = _mm256_add_epi32(_mm512_castsi512_si256(parts), _mm512_extracti32x8_epi32(parts, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_add_epi32(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1)));
}

BNB_INLINE void load_columns(const uint8_t* p, int64_t stride, int rows, int columns, I32* out) {
    const __mmask16 wanted = first_lanes(columns);
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i)
        a[i] = _mm512_maskz_loadu_epi32(wanted, p + (i < rows ? i : rows - 1) * stride);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) { // afterwards part q of a[i + j] holds column 4 q + j of rows i .. i + 3
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int j = 0; j < 4; ++j) {
        const __m512i upper02 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), upper13 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
        const __m512i lower02 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88), lower13 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        out[j].v = _mm512_shuffle_i32x4(upper02, lower02, 0x88);
        out[8 + j].v = _mm512_shuffle_i32x4(upper02, lower02, 0xdd);
        out[4 + j].v = _mm512_shuffle_i32x4(upper13, lower13, 0x88);
        out[12 + j].v = _mm512_shuffle_i32x4(upper13, lower13, 0xdd);
    }
}

struct DotVector {
    __m512i v;
};

// Of 32-bit elements for GCC, which otherwise keeps every accumulator of a loop twice, as the instructions' type and as __m512i, and runs out of
// registers.
#if defined(__GNUC__)
typedef int Words __attribute__((vector_size(64)));
#else
using Words = __m512i;
#endif

struct DotSum {
    Words v;
};

BNB_INLINE DotSum no_dots() { return {Words{}}; }
BNB_INLINE I32 lanes_of(DotSum sum) { return {(__m512i)sum.v}; }

#if defined(__AVX512VNNI__)
// The instruction multiplies unsigned by signed bytes: weights become unsigned by 128 added.
using DotActivation = int8_t;
constexpr int kDotLanes = 64;
constexpr uint32_t kDotOffset = 128;

BNB_INLINE DotVector above_zero(__m512i weights) { return {_mm512_xor_si512(weights, _mm512_set1_epi8(-128))}; }
BNB_INLINE DotVector load_dot_weights(const int8_t* p) { return above_zero(_mm512_loadu_si512(p)); }
BNB_INLINE DotVector load_first_dot_weights(const int8_t* p, int n) { return above_zero(_mm512_maskz_loadu_epi8((uint64_t(1) << n) - 1, p)); }
BNB_INLINE DotVector load_dot_activations(const DotActivation* p) { return {_mm512_loadu_si512(p)}; }
BNB_INLINE DotSum dot(DotVector w, DotVector x, DotSum sum) { return {(Words)_mm512_dpbusd_epi32((__m512i)sum.v, w.v, x.v)}; }
BNB_INLINE I32 sums_of_quads(DotSum sum) { return lanes_of(sum); }
#else
// Products of 16 bits: those of bytes would saturate.
using DotActivation = int16_t;
constexpr int kDotLanes = 32;
constexpr uint32_t kDotOffset = 0;

BNB_INLINE DotVector load_dot_weights(const int8_t* p) { return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
BNB_INLINE DotVector load_first_dot_weights(const int8_t* p, int n) { return {_mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8((1u << n) - 1, p))}; }
BNB_INLINE DotVector load_dot_activations(const DotActivation* p) { return {_mm512_loadu_si512(p)}; }
BNB_INLINE DotSum dot(DotVector w, DotVector x, DotSum sum) { return {(Words)_mm512_add_epi32((__m512i)sum.v, _mm512_madd_epi16(w.v, x.v))}; }
BNB_INLINE I32 sums_of_quads(DotSum sum) {
    const __m512i v = (__m512i)sum.v;
    return {_mm512_add_epi32(v, _mm512_shuffle_epi32(v, _MM_PERM_CDAB))};
}
#endif

} // namespace BNB_ISA
} // namespace bnb
