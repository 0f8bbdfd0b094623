// What every matrix product needs: rows of the result written once, tokens dealt out to tiles, work to threads, and the choice of the arithmetic.
#pragma once

#include "../common/status.h"
#include "arithmetic.h"
#include "kernels.h"
#include "scratch.h"
#include "threads.h"

#include <type_traits>

#if defined(__clang__)
#define BNB_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define BNB_UNROLL _Pragma("GCC unroll 16")
#else
#define BNB_UNROLL
#endif

namespace bnb {
namespace BNB_ISA {

BNB_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
BNB_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// out[i] = sums[i] + bias[i] in fp32, rounded once. `bias` may be null; sums are readable up to a multiple of W.
template <typename T> static void write_row(T* out, const float* sums, const T* bias, int64_t count) {
    int64_t i = 0;
    for (; i + W <= count; i += W) {
        const F32 sum = load(sums + i);
        store(out + i, bias != nullptr ? add(sum, load(bias + i)) : sum);
    }
    if (i < count) {
        const int rest = int(count - i);
        const F32 sum = load(sums + i);
        store_first(out + i, bias != nullptr ? add(sum, load_first(bias + i, rest)) : sum, rest);
    }
}

// Tokens are dealt out evenly to as few tiles as will hold them.
struct TokenTiles {
    int64_t count, base, extra;
    BNB_INLINE TokenTiles of(int64_t tokens, int64_t most) {
        const int64_t count = ceil_div(tokens, most);
        return {count, tokens / count, tokens % count};
    }
    int64_t begin(int64_t tile) const { return tile * base + smaller(tile, extra); }
    int64_t size(int64_t tile) const { return base + (tile < extra ? 1 : 0); }
};

// Waking and joining a thread costs about as long as this many products.
constexpr int64_t kProductsPerThread = int64_t(1) << 19;

// Calls function(begin, end) -> Status on ranges of [0, count).
template <typename Function> static int32_t try_parallel(int64_t count, int64_t grain, int threads, const Function& function) {
    SharedStatus status;
    parallel_for(count, grain, threads, [&](int64_t begin, int64_t end, int) { status.report(function(begin, end)); });
    return status.get();
}

// Calls Product::run<Arithmetic, T>(args) with the arithmetic that this set has for the element type.
template <typename Product, typename Args> static int32_t with_arithmetic(const Args& args) {
    switch (args.dtype) {
    case kFloat32:
        return Product::template run<FloatArithmetic, float>(args);
    case kFloat16:
        return Product::template run<FloatArithmetic, Half>(args);
    default:
#if defined(BNB_HAS_BFLOAT16_ARITHMETIC)
        return Product::template run<BFloat16Arithmetic, BFloat16>(args);
#else
        return Product::template run<FloatArithmetic, BFloat16>(args);
#endif
    }
}

} // namespace BNB_ISA
} // namespace bnb
