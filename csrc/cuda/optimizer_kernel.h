// One step of an optimizer for many parameters in one launch.
//
// A warp steps blocks of 256 elements, the blocks that share a scale where moments have 8 bits: a lane holds two runs of four elements, so that every
// access of a warp is to consecutive bytes whatever the element's size, and nothing but the largest moments has to be exchanged between lanes. Every
// byte of gradient, parameter and moments is read once and, save the gradient, written once: for Adam with 16-bit parameters 10 bytes an element with
// codes and 22 with floats.
//
// Work is dealt out in units of eight blocks of one parameter, numbered over all parameters of the launch, to the warps of a grid that just fills the
// device. What a parameter is stands in a table among the kernel's own arguments; which parameter a unit belongs to is found by bisection.
//
// Adam with codes takes 93 instructions an element (sm_90), of which an H200 issues as many as 84 % of its memory's rate asks for: expect 70 to 75 %.
// With floats memory decides: expect 85 %.
//
// With a limit on the norm of the update the same kernel runs before, without writing: it leaves sums of squares for each unit, which a block for
// each parameter adds up in an order that depends on nothing but the parameter's size.
#pragma once

#include "optimizer_codes.h"

#include "../common/optimizer_algorithms.h"
#include "../common/optimizer_rounding.h"

namespace bnb {
namespace BNB_ISA {

constexpr int kBlock = int(kOptimizerBlocksize);
constexpr int kPerLane = kBlock / kWarpSize;
constexpr int kRuns = kPerLane / 4; // of four elements
constexpr int kBlocksPerUnit = int(kOptimizerUnit / kOptimizerBlocksize);

template <int kMoments, bool in_8bit> struct States;

template <int kMoments> struct States<kMoments, false> {
    float* moments[kMoments];
};

template <int kMoments> struct States<kMoments, true> {
    uint8_t* moments[kMoments];
    float* absmax[kMoments];
};

// One parameter.
template <int kMoments, bool in_8bit> struct Entry {
    void* p;
    const void* g;
    States<kMoments, in_8bit> states;
    int64_t n, first_unit;
    DType g_dtype;
    uint32_t seed;
};

struct StepArgs {
    OptimizerScalars scalars;
    OptimizerLimit limit;
    DType dtype;
    uint32_t step;
    bool rounds_randomly;
    int32_t count; // of parameters
    int64_t units;
    OptimizerSquares* squares; // one a unit; null: there is no limit
    float *scales, *norms;     // one a parameter
    CodeTables codes;
};

template <int kMoments, bool in_8bit> struct StepTable {
    static constexpr int kRoom = (kParameterBytes - int(sizeof(StepArgs))) / int(sizeof(Entry<kMoments, in_8bit>));

    StepArgs args;
    Entry<kMoments, in_8bit> entries[kRoom];
};
static_assert(sizeof(StepTable<1, false>) <= kParameterBytes && sizeof(StepTable<3, true>) <= kParameterBytes, "a kernel takes its table");

// Which elements of a parameter a lane works on. `quick`: of what follows, everything that depends on it is compiled for a block that is whole.
template <bool quick> struct Place {
    int64_t begin, own; // of the block, and of the lane's first run in it
    int count;          // of the block's elements
    bool is_whole;      // all 256 are there and can be moved four at a time

    __device__ __forceinline__ Place(int64_t begin, int count, bool is_whole)
        : begin(begin), own(begin + 4 * lane_index()), count(count), is_whole(quick || is_whole) {}
    __device__ __forceinline__ int index(int i) const { return i / 4 * 4 * kWarpSize + 4 * lane_index() + i % 4; }
    __device__ __forceinline__ bool has(int i) const { return is_whole || index(i) < count; }
};

// Four elements of `size` bytes in `size` words, as they lie in memory. They stay packed until all loads of a block are under way.
template <int size> using Run = Vector<uint32_t, size>;

template <int size, bool quick> __device__ __forceinline__ Run<size> read_run(const void* tensor, const Place<quick>& place, int run) {
    using Element = typename WordOfSize<size>::Type;
    const Element* four = static_cast<const Element*>(tensor) + place.own + run * 4 * kWarpSize;
    if (place.is_whole)
        return load_vector<size>(reinterpret_cast<const uint32_t*>(four));
    Run<size> words{};
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (place.has(4 * run + i))
            words.value[i * size / 4] |= uint32_t(four[i]) << 8 * size * i % 32;
    return words;
}

template <int size, bool quick>
__device__ __forceinline__ void write_run(void* tensor, const Place<quick>& place, int run, const Run<size>& words) {
    using Element = typename WordOfSize<size>::Type;
    Element* four = static_cast<Element*>(tensor) + place.own + run * 4 * kWarpSize;
    if (place.is_whole)
        return store_vector(reinterpret_cast<uint32_t*>(four), words);
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (place.has(4 * run + i))
            four[i] = Element(words.value[i * size / 4] >> 8 * size * i % 32);
}

// A lane's part of a block, of any element type.
struct RawBlock {
    uint32_t word[kPerLane]; // of 16 bits: two elements in each, in the first half

    template <int size, bool quick> __device__ __forceinline__ void read_runs(const void* tensor, const Place<quick>& place) {
#pragma unroll
        for (int run = 0; run < kRuns; ++run) {
            const Run<size> words = read_run<size>(tensor, place, run);
#pragma unroll
            for (int i = 0; i < size; ++i)
                word[run * size + i] = words.value[i];
        }
    }

    template <bool quick> __device__ __forceinline__ void read(const void* tensor, DType dtype, const Place<quick>& place) {
        if (dtype == kFloat32)
            read_runs<4>(tensor, place);
        else
            read_runs<2>(tensor, place);
    }

    template <typename T> __device__ __forceinline__ void widen_halves(float (&x)[kPerLane]) const {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i)
            x[i] = widen(T{uint16_t(word[i / 2] >> 16 * (i % 2))});
    }

    __device__ __forceinline__ void widen_to(float (&x)[kPerLane], DType dtype) const {
        if (dtype == kBFloat16)
            return widen_halves<BFloat16>(x);
        if (dtype == kFloat16)
            return widen_halves<Half>(x);
#pragma unroll
        for (int i = 0; i < kPerLane; ++i)
            x[i] = float_from_bits(word[i]);
    }
};

template <bool quick> __device__ __forceinline__ void write_floats(void* tensor, const Place<quick>& place, const float (&x)[kPerLane]) {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
        Run<4> words;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            words.value[i] = float_bits(x[4 * run + i]);
        write_run<4>(tensor, place, run, words);
    }
}

template <typename T, bool quick>
__device__ __forceinline__ void write_halves(void* tensor, const Place<quick>& place, float (&x)[kPerLane], const StepArgs& args, uint32_t seed) {
    if (args.rounds_randomly) {
        const RandomBits random(seed, args.step);
#pragma unroll
        for (int i = 0; i < kPerLane; ++i)
            x[i] = round_finite_randomly(static_cast<T*>(nullptr), x[i], random.of(place.begin + place.index(i)));
    }
#pragma unroll
    for (int run = 0; run < kRuns; ++run)
        write_run<2>(tensor, place, run, Run<2>{{narrow_pair<T>(x[4 * run], x[4 * run + 1]), narrow_pair<T>(x[4 * run + 2], x[4 * run + 3])}});
}

template <bool quick>
__device__ __forceinline__ void write_parameter(void* p, const Place<quick>& place, float (&x)[kPerLane], const StepArgs& args, uint32_t seed) {
    if (args.dtype == kBFloat16)
        write_halves<BFloat16>(p, place, x, args, seed);
    else if (args.dtype == kFloat16)
        write_halves<Half>(p, place, x, args, seed);
    else
        write_floats(p, place, x);
}

// Elements behind the end of the tensor count as zeros.
template <int kMoments, bool quick> __device__ __forceinline__ void clear_rest(const Place<quick>& place, float (&m)[kPerLane][kMoments]) {
    if (place.is_whole)
        return;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
#pragma unroll
        for (int k = 0; k < kMoments; ++k)
            m[i][k] = place.has(i) ? m[i][k] : 0.0f;
}

// ----------------------------------------------------------------------------------------------------------------------------- moments
// The moments of a block: read raw, widened, and written after the step.
template <int kMoments, bool in_8bit> struct BlockOfMoments;

template <int kMoments> struct BlockOfMoments<kMoments, false> {
    Run<4> raw[kMoments][kRuns];

    template <bool quick> __device__ __forceinline__ void read(const States<kMoments, false>& states, const Place<quick>& place) {
#pragma unroll
        for (int k = 0; k < kMoments; ++k)
#pragma unroll
            for (int run = 0; run < kRuns; ++run)
                raw[k][run] = read_run<4>(states.moments[k], place, run);
    }

    template <bool quick> __device__ __forceinline__ void widen_to(float (&m)[kPerLane][kMoments], const CodeTables&, const Place<quick>&) const {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i)
#pragma unroll
            for (int k = 0; k < kMoments; ++k)
                m[i][k] = float_from_bits(raw[k][i / 4].value[i % 4]);
    }

    template <bool quick>
    __device__ __forceinline__ static void write(const States<kMoments, false>& states, const CodeTables&, const Place<quick>& place,
                                                 float (&m)[kPerLane][kMoments]) {
#pragma unroll
        for (int k = 0; k < kMoments; ++k) {
            float x[kPerLane];
#pragma unroll
            for (int i = 0; i < kPerLane; ++i)
                x[i] = m[i][k];
            write_floats(states.moments[k], place, x);
        }
    }
};

template <int kMoments> struct BlockOfMoments<kMoments, true> {
    Run<1> raw[kMoments][kRuns];
    float absmax[kMoments];

    template <bool quick> __device__ __forceinline__ void read(const States<kMoments, true>& states, const Place<quick>& place) {
#pragma unroll
        for (int k = 0; k < kMoments; ++k) {
            absmax[k] = states.absmax[k][place.begin / kBlock];
#pragma unroll
            for (int run = 0; run < kRuns; ++run)
                raw[k][run] = read_run<1>(states.moments[k], place, run);
        }
    }

    template <bool quick>
    __device__ __forceinline__ void widen_to(float (&m)[kPerLane][kMoments], const CodeTables& tables, const Place<quick>& place) const {
#pragma unroll
        for (int k = 0; k < kMoments; ++k) {
            const CodeTable table(tables, tables.of_moment[k]);
#pragma unroll
            for (int i = 0; i < kPerLane; ++i)
                m[i][k] = decode(tables, table, raw[k][i / 4].value[0], i % 4) * absmax[k];
        }
        clear_rest(place, m);
    }

    // The bits of the largest magnitude of each moment. Returns whether all are finite.
    __device__ __forceinline__ static bool measure(const float (&m)[kPerLane][kMoments], uint32_t (&largest)[kMoments]) {
        bool is_finite = true;
#pragma unroll
        for (int k = 0; k < kMoments; ++k) {
            uint32_t own = 0;
#pragma unroll
            for (int i = 0; i < kPerLane; ++i)
                own = max_bits(own, magnitude_bits(m[i][k]));
            largest[k] = warp_max(own);
            is_finite = is_finite && largest[k] < kInfinityBits;
        }
        return is_finite;
    }

    // Codes cannot say NaN, and an infinite scale would spoil the other elements of the block: an element with a moment that is NaN or infinite
    // starts anew with all of its moments.
    __device__ __forceinline__ static void reset_spoilt(float (&m)[kPerLane][kMoments]) {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            bool is_finite = true;
#pragma unroll
            for (int k = 0; k < kMoments; ++k)
                is_finite = is_finite && magnitude_bits(m[i][k]) < kInfinityBits;
#pragma unroll
            for (int k = 0; k < kMoments; ++k)
                m[i][k] = is_finite ? m[i][k] : 0.0f;
        }
    }

    template <bool quick>
    __device__ __forceinline__ static void write(const States<kMoments, true>& states, const CodeTables& tables, const Place<quick>& place,
                                                 float (&m)[kPerLane][kMoments]) {
        uint32_t largest[kMoments];
        if (!measure(m, largest)) {
            reset_spoilt(m);
            measure(m, largest);
        }
#pragma unroll
        for (int k = 0; k < kMoments; ++k) {
            const CodeTable table(tables, tables.of_moment[k]);
            const CodeTraits traits = *table.traits;
            const float absmax = float_from_bits(largest[k]), inverse = inverse_absmax(absmax);
            const bool has_cells = traits.has_cells && float_bits(inverse) < kInfinityBits; // infinite: next to denormals
#pragma unroll
            for (int run = 0; run < kRuns; ++run) {
                const auto by_cell = [&](int i) { return encode_by_cell(table, m[4 * run + i][k], inverse); };
                const auto by_search = [&](int i) { return encode_by_search(table, traits.negatives, m[4 * run + i][k], inverse); };
                write_run<1>(states.moments[k], place, run, Run<1>{{has_cells ? encode_four(by_cell) : encode_four(by_search)}});
            }
            if (lane_index() == 0)
                states.absmax[k][place.begin / kBlock] = absmax;
        }
    }
};

// ------------------------------------------------------------------------------------------------------------------------------ a block
// Returns whether there is anything to write: skipping zeros leaves elements alone whose gradient is zero.
template <bool skips_zeros, typename Algorithm>
__device__ __forceinline__ bool step_elements(const Movement<Algorithm>& movement, float scale, const float (&g)[kPerLane], float (&p)[kPerLane],
                                              float (&m)[kPerLane][Algorithm::kMoments]) {
    bool any = false;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        float moments[Algorithm::kMoments];
#pragma unroll
        for (int k = 0; k < Algorithm::kMoments; ++k)
            moments[k] = m[i][k];
        const float moved = movement.moved(p[i], movement.direction(g[i], p[i], moments), scale);
        const bool is_touched = !skips_zeros || g[i] != 0.0f;
        any = any || is_touched;
        p[i] = is_touched ? moved : p[i];
#pragma unroll
        for (int k = 0; k < Algorithm::kMoments; ++k)
            m[i][k] = is_touched ? moments[k] : m[i][k];
    }
    return !skips_zeros || __any_sync(kWholeWarp, any);
}

template <typename Algorithm, bool quick>
__device__ __forceinline__ void add_squares(const Movement<Algorithm>& movement, bool skips_zeros, const Place<quick>& place,
                                            const float (&g)[kPerLane], const float (&p)[kPerLane], float (&m)[kPerLane][Algorithm::kMoments],
                                            OptimizerSquares& sum) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        const double update = movement.direction(g[i], p[i], m[i]), value = p[i];
        if (!place.has(i))
            continue;
        sum.p += value * value;
        if (!skips_zeros || g[i] != 0.0f)
            sum.update += update * update;
    }
}

// Steps a block, or adds up its squares. `quick`: it is whole, and no element is skipped.
template <bool quick, typename Algorithm, bool in_8bit, bool measures>
__device__ __forceinline__ void step_block(const StepArgs& args, const Movement<Algorithm>& movement,
                                           const Entry<Algorithm::kMoments, in_8bit>& entry, const Place<quick>& place, float scale,
                                           OptimizerSquares& sum) {
    constexpr int kMoments = Algorithm::kMoments;
    const bool skips_zeros = !quick && args.scalars.skips_zeros;
    RawBlock raw_g, raw_p;
    BlockOfMoments<kMoments, in_8bit> raw_moments;
    raw_g.read(entry.g, entry.g_dtype, place);
    raw_p.read(entry.p, args.dtype, place);
    raw_moments.read(entry.states, place);
    float g[kPerLane], p[kPerLane], m[kPerLane][kMoments];
    raw_g.widen_to(g, entry.g_dtype);
    raw_p.widen_to(p, args.dtype);
    raw_moments.widen_to(m, args.codes, place);
    if constexpr (measures) {
        add_squares(movement, skips_zeros, place, g, p, m, sum);
    } else {
        if (!skips_zeros)
            step_elements<false>(movement, scale, g, p, m);
        else if (!step_elements<true>(movement, scale, g, p, m))
            return;
        write_parameter(entry.p, place, p, args, entry.seed);
        clear_rest(place, m); // what was computed from zeros must not count as a moment
        BlockOfMoments<kMoments, in_8bit>::write(entry.states, args.codes, place, m);
    }
}

// ------------------------------------------------------------------------------------------------------------------------------ kernels
// The last entry that begins at or before the unit; empty parameters begin where the next one does.
template <typename Table> __device__ __forceinline__ int entry_of(const Table& table, int64_t unit) {
    int first = 0, behind = table.args.count;
    while (behind - first > 1) {
        const int middle = (first + behind) / 2;
        if (table.entries[middle].first_unit <= unit)
            first = middle;
        else
            behind = middle;
    }
    return first;
}

BNB_HD bool is_aligned_for_four(const void* p, int size) { return uintptr_t(p) % unsigned(4 * size) == 0; }

template <int kMoments, bool in_8bit> __device__ __forceinline__ bool can_move_four(const Entry<kMoments, in_8bit>& entry, DType dtype) {
    bool can = is_aligned_for_four(entry.p, dtype == kFloat32 ? 4 : 2) && is_aligned_for_four(entry.g, entry.g_dtype == kFloat32 ? 4 : 2);
#pragma unroll
    for (int k = 0; k < kMoments; ++k)
        can = can && is_aligned_for_four(entry.states.moments[k], in_8bit ? 1 : 4);
    return can;
}

// As many threads as leave each the registers it needs.
template <int kMoments, bool in_8bit> constexpr int kThreads = !in_8bit ? 128 : kMoments == 1 ? 768 : kMoments == 2 ? 640 : 512;
template <int kMoments, bool in_8bit> constexpr int kBlocksPerMultiprocessor = in_8bit ? 1 : kMoments < 3 ? 5 : 4;

namespace {

template <typename Algorithm, bool in_8bit, bool measures>
__global__ void __launch_bounds__((kThreads<Algorithm::kMoments, in_8bit>), (kBlocksPerMultiprocessor<Algorithm::kMoments, in_8bit>))
    step_kernel(const __grid_constant__ StepTable<Algorithm::kMoments, in_8bit> table) {
    constexpr int kMoments = Algorithm::kMoments;
    const StepArgs& args = table.args;
    if constexpr (in_8bit)
        build_tables(args.codes);
    const Movement<Algorithm> movement(args.scalars);
    const int64_t stride = int64_t(gridDim.x) * (int(blockDim.x) / kWarpSize);
    for (int64_t unit = int64_t(warp_index()) * gridDim.x + blockIdx.x; unit < args.units; unit += stride) {
        const int number = entry_of(table, unit);
        const Entry<kMoments, in_8bit>& entry = table.entries[number];
        const bool moves_four = can_move_four(entry, args.dtype);
        const float scale = args.squares == nullptr || measures ? 1.0f : args.scales[number];
        OptimizerSquares sum{0.0, 0.0};
        const int64_t begin = (unit - entry.first_unit) * kOptimizerUnit;
#pragma unroll 1
        for (int64_t start = begin; start < begin + kOptimizerUnit && start < entry.n; start += kBlock) {
            const int count = entry.n - start < kBlock ? int(entry.n - start) : kBlock;
            // By a vote, so that the answer stays in one predicate: the compiler would work it out anew for every access.
            const bool is_whole = __all_sync(kWholeWarp, moves_four && count == kBlock);
            if (is_whole && !args.scalars.skips_zeros)
                step_block<true, Algorithm, in_8bit, measures>(args, movement, entry, Place<true>(start, count, true), scale, sum);
            else
                step_block<false, Algorithm, in_8bit, measures>(args, movement, entry, Place<false>(start, count, is_whole), scale, sum);
        }
        if constexpr (measures) {
            sum = {warp_sum(sum.update), warp_sum(sum.p)};
            if (lane_index() == 0)
                args.squares[unit] = sum;
        }
    }
}

constexpr int kLimitThreads = 256;

struct SquaresOfWarps {
    OptimizerSquares squares[kLimitThreads / kWarpSize];
};

// How much of an update the limit on its norm leaves. One block a parameter.
template <int kMoments, bool in_8bit> __global__ void limit_kernel(const __grid_constant__ StepTable<kMoments, in_8bit> table) {
    const StepArgs& args = table.args;
    const Entry<kMoments, in_8bit>& entry = table.entries[blockIdx.x];
    const int64_t units = optimizer_units(entry.n);
    OptimizerSquares sum{0.0, 0.0};
    for (int64_t unit = int64_t(threadIdx.x); unit < units; unit += kLimitThreads) {
        const OptimizerSquares squares = args.squares[entry.first_unit + unit];
        sum = {sum.update + squares.update, sum.p + squares.p};
    }
    SquaresOfWarps& warps = shared_variable<SquaresOfWarps>();
    sum = {warp_sum(sum.update), warp_sum(sum.p)};
    if (lane_index() == 0)
        warps.squares[warp_index()] = sum;
    __syncthreads();
    if (threadIdx.x != 0)
        return;
    sum = {0.0, 0.0};
    for (const OptimizerSquares& squares : warps.squares)
        sum = {sum.update + squares.update, sum.p + squares.p};
    const OptimizerLimited limited = limit_update(args.limit, sum);
    args.norms[blockIdx.x] = limited.norm;
    args.scales[blockIdx.x] = limited.scale;
}

} // namespace
} // namespace BNB_ISA
} // namespace bnb
