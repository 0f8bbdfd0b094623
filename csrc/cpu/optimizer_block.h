// The 256 elements that share a scale, as floats: where they come from and where they go.
//
// Floats of a whole block are stepped where they lie. Everything else (16-bit elements, codes, the end of a tensor) passes through a workspace of a
// few KiB that stays in the first cache. A block in the workspace is filled up with zeros to whole vectors.
#pragma once

#include "blocks.h"
#include "find_code.h"
#include "optimizer.h"

#include "../common/optimizer_rounding.h"

namespace bnb {
namespace BNB_ISA {

constexpr int kBlock = int(kOptimizerBlocksize);
static_assert(kBlock % W == 0, "a block holds whole vectors");

struct Workspace {
    alignas(64) float g[kBlock], p[kBlock], moments[kMostMoments][kBlock], update[kBlock];
};

BNB_INLINE void fill_up(float* x, int64_t count) {
    for (int64_t i = count; i % W != 0; ++i)
        x[i] = 0.0f;
}

template <typename T> BNB_INLINE const float* as_floats(const T* x, int64_t count, float* copy) {
    if (std::is_same<T, float>::value && count == kBlock)
        return reinterpret_cast<const float*>(x);
    int64_t i = 0;
    for (; i + W <= count; i += W)
        store(copy + i, load(x + i));
    if (i < count)
        store(copy + i, load_first(x + i, int(count - i)));
    return copy;
}

template <typename T, typename Round> BNB_INLINE void put_floats(const float* x, int64_t count, T* out, const Round& round) {
    int64_t i = 0;
    for (; i + W <= count; i += W)
        store(out + i, round(load(x + i), i));
    if (i < count)
        store_first(out + i, round(load(x + i), i), int(count - i));
}

// The values of the codes, ready for lookups.
struct Tables {
    Table256 of[kMostMoments];

    explicit Tables(const OptimizerArgs& args) {
        for (int k = 0; args.in_8bit && k < args.moments; ++k)
            of[k] = load_table256(args.codes[k].values);
    }
};

static void read_codes(const Table256& table, const float* table_values, const uint8_t* codes, float absmax, int64_t count, float* out) {
    const F32 scale = splat(absmax);
    int64_t i = 0;
    for (; i + 4 * W <= count; i += 4 * W) {
        F32 values[4];
        lookup256_four(table, codes + i, values);
        for (int k = 0; k < 4; ++k)
            store(out + i + k * W, mul(values[k], scale));
    }
    for (; i < count; ++i)
        out[i] = table_values[codes[i]] * absmax;
    fill_up(out, count);
}

// Finds codes that keep the sign of x, see keep_sign. v is x divided by the largest magnitude, and may lie a rounding error beyond 1.
template <typename Finder> struct KeepingSign {
    Finder finder;
    I32 minus_negatives;
    bool has_negatives;

    KeepingSign(const Finder& finder, uint32_t negatives)
        : finder(finder), minus_negatives(splat_bits(0u - negatives)), has_negatives(negatives != 0) {}

    inline I32 code(F32 v, F32 x) const {
        const I32 found = finder.code(min(max(v, splat(-1.0f)), splat(1.0f)));
        if (!has_negatives)
            return found;
        const F32 zero = splat(0.0f);
        const I32 is_below = shift_right<31>(add_bits(found, minus_negatives));
        const I32 move_down = select(less(x, zero), add_bits(is_below, splat_bits(~0u)), splat_bits(0));
        return add_bits(found, select(less(zero, x), is_below, move_down));
    }
};

// The scale of a moment's block, and its inverse.
struct MomentScale {
    float absmax, inverse;
};

template <typename Finder>
static void write_codes(const MomentCode& code, const Finder finder, const float* x, int64_t count, const MomentScale& of_block, uint8_t* out) {
    const float inverse = of_block.inverse;
    const F32 scale = splat(inverse);
    int64_t i = 0;
    if (is_ordinary(of_block.absmax, inverse)) {
        for (; i + W <= count; i += W) {
            const F32 value = load(x + i);
            store_bytes(out + i, finder.code(mul(value, scale), value));
        }
    }
    for (; i < count; ++i)
        out[i] = uint8_t(keep_sign(blockwise_code(code.midpoints, normalise(x[i], inverse)), x[i], int(code.negatives)));
}

#if defined(BNB_HAS_LINE_LOOKUP)
template <bool kSigned> static void write_codes_by_lines(const MomentCode& code, const float* x, int64_t count, float inverse, uint8_t* out) {
    const ByLines<kSigned> lines(*code.lines);
    const KeepingSign<ByCell> cells(ByCell(*code.cells), code.negatives);
    const F32 scale = splat(inverse);
    for (int64_t group = 0; group < count; group += lines.kTogether * W) {
        if (lines.write_codes(x + group, scale, out + group))
            continue;
        for (int64_t i = group; i < group + lines.kTogether * W; i += W) {
            const F32 value = load(x + i);
            store_bytes(out + i, cells.code(mul(value, scale), value));
        }
    }
}
#endif

static void write_moment(const MomentCode& code, const float* x, int64_t count, const MomentScale& scale, uint8_t* out) {
    if (code.cells == nullptr)
        return write_codes(code, KeepingSign<BySearch>(BySearch(code.midpoints), code.negatives), x, count, scale, out);
    const KeepingSign<ByCell> by_cell(ByCell(*code.cells), code.negatives);
#if defined(BNB_HAS_LINE_LOOKUP)
    if (code.lines != nullptr && count % (ByLines<true>::kTogether * W) == 0 && is_ordinary(scale.absmax, scale.inverse))
        return (code.negatives != 0 ? write_codes_by_lines<true> : write_codes_by_lines<false>)(code, x, count, scale.inverse, out);
#endif
    write_codes(code, by_cell, x, count, scale, out);
}

// Codes cannot say NaN, and an infinite scale would spoil the other elements of the block: an element with a moment that is NaN or infinite starts
// anew with all of its moments.
static void reset_spoilt(const OptimizerArgs& args, int64_t count, float* const* moments) {
    for (int64_t i = 0; i < count; ++i) {
        bool is_finite = true;
        for (int k = 0; k < args.moments; ++k)
            is_finite = is_finite && float_bits(magnitude(moments[k][i])) < kInfinityBits;
        for (int k = 0; !is_finite && k < args.moments; ++k)
            moments[k][i] = 0.0f;
    }
}

struct Block {
    int64_t begin, count;
    const float* g;
    float* p;
    float* moments[kMostMoments];
};

BNB_INLINE Block load_block(const OptimizerArgs& args, const Tables& tables, const OptimizerTensor& tensor, int64_t index, Workspace& work) {
    const Range range = elements_of_block(index, kBlock, tensor.n);
    Block block{range.begin, range.end - range.begin, nullptr, nullptr, {}};
    with_element_type(tensor.g_dtype, [&](auto* element) {
        block.g = as_floats(static_cast<const std::remove_pointer_t<decltype(element)>*>(tensor.g) + block.begin, block.count, work.g);
    });
    with_element_type(args.dtype, [&](auto* element) {
        block.p = const_cast<float*>(as_floats(static_cast<decltype(element)>(tensor.p) + block.begin, block.count, work.p));
    });
    for (int k = 0; k < args.moments; ++k) {
        if (args.in_8bit) {
            block.moments[k] = work.moments[k];
            const uint8_t* codes = static_cast<const uint8_t*>(tensor.moments[k]) + block.begin;
            read_codes(tables.of[k], args.codes[k].values, codes, tensor.absmax[k][index], block.count, work.moments[k]);
        } else {
            const float* moment = static_cast<const float*>(tensor.moments[k]) + block.begin;
            block.moments[k] = const_cast<float*>(as_floats(moment, block.count, work.moments[k]));
        }
    }
    return block;
}

BNB_INLINE void store_parameter(const OptimizerArgs& args, const OptimizerTensor& tensor, const Block& block, const Workspace& work) {
    if (block.p != work.p)
        return;
    with_element_type(args.dtype, [&](auto* element) {
        auto* out = static_cast<decltype(element)>(tensor.p) + block.begin;
        if (!tensor.rounds_randomly)
            return put_floats(work.p, block.count, out, [](F32 v, int64_t) { return v; });
        const RandomBits random(tensor.seed, args.step);
        put_floats(work.p, block.count, out, [&](F32 v, int64_t i) { return round_finite_randomly(element, v, random.of(block.begin + i)); });
    });
}

// The scales of a block's moments. `largest` are the bits of their largest magnitudes where they are known, or null.
static void measure_moments(const OptimizerArgs& args, const Block& block, const uint32_t* largest, MomentScale* scales) {
    const auto measure = [&](const uint32_t* known) {
        bool is_finite = true;
        for (int k = 0; k < args.moments; ++k) {
            const float absmax = known != nullptr ? absmax_from_bits(known[k]) : block_absmax(block.moments[k], block.count);
            scales[k] = {absmax, inverse_absmax(absmax)};
            is_finite = is_finite && float_bits(absmax) < kInfinityBits;
        }
        return is_finite;
    };
    if (!measure(largest)) {
        reset_spoilt(args, block.count, block.moments);
        measure(nullptr);
    }
}

static void store_codes(const OptimizerArgs& args, const OptimizerTensor& tensor, int64_t index, const Block& block, const MomentScale* scales) {
    for (int k = 0; k < args.moments; ++k) {
        tensor.absmax[k][index] = scales[k].absmax;
        write_moment(args.codes[k], block.moments[k], block.count, scales[k], static_cast<uint8_t*>(tensor.moments[k]) + block.begin);
    }
}

static void store_floats(const OptimizerArgs& args, const OptimizerTensor& tensor, const Block& block, const Workspace& work) {
    for (int k = 0; k < args.moments; ++k)
        if (block.moments[k] == work.moments[k])
            put_floats(work.moments[k], block.count, static_cast<float*>(tensor.moments[k]) + block.begin, [](F32 v, int64_t) { return v; });
}

} // namespace BNB_ISA
} // namespace bnb
