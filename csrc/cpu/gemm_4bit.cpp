// 4-bit matrix product: out[M, N] = A[M, K] . dequantised(B)[N, K]^T + bias[N].
//
// A, bias and out hold one element type, row by row. B holds N * K codes in flat order, two to a byte, the first in the high nibble; the weight of flat
// element i is level[code] * scale[i / blocksize], in fp32. Sums are fp32, the bias is added in fp32 and the result rounded once. The weight is never
// stored in full: N K / 2 bytes of codes and 4 N K / blocksize of scales are what must come from memory, and for few tokens they bound the time.
//
// Two forms: gemm_4bit_dot.h for few tokens, gemm_4bit_panel.h for many and for odd layouts. Rows of the weight (and, where these are few, tokens) are
// split over threads, K never is, and neither is the order of the sums: the result does not depend on the number of threads.
#include "gemm_4bit_dot.h"
#include "gemm_4bit_panel.h"
#include "threads.h"

namespace bnb {
namespace BNB_ISA {
namespace {

// Waking and joining a thread costs about as long as this many products.
constexpr int64_t kProductsPerThread = int64_t(1) << 20;

// Calls function(begin, end) -> Status on ranges of [0, count).
template <typename Function> int32_t try_parallel(int64_t count, int64_t grain, int threads, const Function& function) {
    SharedStatus status;
    parallel_for(count, grain, threads, [&](int64_t begin, int64_t end, int) { status.report(function(begin, end)); });
    return status.get();
}

template <typename Arithmetic, int kGranule, typename T> int32_t multiply_dot(const GemmArgs4bit& args) {
    constexpr int64_t kRows = tile_rows(1); // ranges of whole tiles
    const int64_t cost_of_rows = kRows * args.K * (args.M + 3);
    return try_parallel(ceil_div(args.N, kRows), ceil_div(kProductsPerThread, cost_of_rows), args.threads, [&](int64_t begin, int64_t end) {
        return dot_rows_of_thread<Arithmetic, kGranule, T>(args, begin * kRows, smaller(args.N, end * kRows));
    });
}

// All panels against the tokens of `a`. The work is a line of tiles, panel after panel; a thread takes a stretch of it, so that few panels and many tokens
// divide as well as many panels and few tokens.
template <typename Arithmetic, typename T> int32_t multiply_panels(const GemmArgs4bit& args, const PanelActivations<Arithmetic>& a) {
    constexpr int64_t kMostTiles = kMostPanelTokens / kPanelTokens;
    constexpr int64_t kTilesWorthAPanel = 8; // dequantising a panel costs some tiles' work: a smaller share of one is not worth a thread
    const TokenTiles tiles = TokenTiles::of(a.tokens, kPanelTokens);
    const int64_t panels = ceil_div(args.N, kPanelRows);
    const int64_t cost_of_tile = (args.K + 1) * kPanelRows * ceil_div(a.tokens, tiles.count);
    const int64_t grain = ceil_div(kProductsPerThread, cost_of_tile);
    const int64_t least = smaller(tiles.count, kTilesWorthAPanel);
    return try_parallel(panels * tiles.count, grain > least ? grain : least, args.threads, [&](int64_t begin, int64_t end) -> int32_t {
        const PanelWorker<Arithmetic, T> worker(args);
        if (!worker.is_ready())
            return kOutOfMemory;
        while (begin < end) {
            const int64_t first = begin % tiles.count;
            const int64_t count = smaller(smaller(tiles.count - first, end - begin), kMostTiles);
            worker.multiply(a, tiles, first, first + count, begin / tiles.count);
            begin += count;
        }
        return kOk;
    });
}

// Activations that a panel cannot read where they are (another type; pairs cut by an odd K) are converted a few hundred tokens at a time.
template <typename Arithmetic, typename T> int32_t multiply_converted(const GemmArgs4bit& args) {
    using Activation = typename Arithmetic::Activation;
    constexpr int64_t kMostConverted = 4 << 20; // bytes
    const int64_t stride = ceil_div(args.K, Arithmetic::kDepth) * Arithmetic::kDepth;
    const int64_t row_bytes = (stride > 0 ? stride : 1) * int64_t(sizeof(Activation));
    const int64_t fitting = kMostConverted / row_bytes;
    const int64_t chunk = smaller(args.M, fitting > 8 * kPanelTokens ? fitting : 8 * kPanelTokens);
    Scratch scratch(size_t(chunk * row_bytes) + Scratch::kAlignment);
    auto* converted = static_cast<Activation*>(scratch.take(size_t(chunk * row_bytes)));
    if (converted == nullptr)
        return kOutOfMemory;
    for (int64_t first = 0; first < args.M; first += chunk) {
        const int64_t tokens = smaller(chunk, args.M - first);
        parallel_for(tokens, ceil_div(kProductsPerThread, args.K + 1), args.threads, [&](int64_t begin, int64_t end, int) {
            for (int64_t token = begin; token < end; ++token) {
                const T* from = static_cast<const T*>(args.A) + (first + token) * args.K;
                Activation* to = converted + token * stride;
                for (int64_t k = 0; k < args.K; ++k)
                    to[k] = Arithmetic::activation(from[k]);
                for (int64_t k = args.K; k < stride; ++k)
                    to[k] = Activation{};
            }
        });
        const int32_t status = multiply_panels<Arithmetic, T>(args, {converted, stride, first, tokens});
        if (status != kOk)
            return status;
    }
    return kOk;
}

template <typename Arithmetic, typename T> int32_t multiply(const GemmArgs4bit& args) {
    if (is_aligned(args) && args.M <= kMostDotTokens) {
        constexpr int kWide = Arithmetic::kWideGranule;
        const bool is_wide = args.K % kWide == 0 && args.blocksize % kWide == 0;
        return is_wide ? multiply_dot<Arithmetic, kWide, T>(args) : multiply_dot<Arithmetic, kNarrowGranule, T>(args);
    }
    if constexpr (std::is_same<T, typename Arithmetic::Activation>::value)
        if (args.K % Arithmetic::kDepth == 0)
            return multiply_panels<Arithmetic, T>(args, {static_cast<const T*>(args.A), args.K, 0, args.M});
    return multiply_converted<Arithmetic, T>(args);
}

} // namespace

int32_t gemm_4bit(const GemmArgs4bit& args) {
    switch (args.dtype) {
    case kFloat32:
        return multiply<FloatArithmetic, float>(args);
    case kFloat16:
        return multiply<FloatArithmetic, Half>(args);
    default:
#if defined(BNB_HAS_BFLOAT16_ARITHMETIC)
        return multiply<BFloat16Arithmetic, BFloat16>(args);
#else
        return multiply<FloatArithmetic, BFloat16>(args);
#endif
    }
}

} // namespace BNB_ISA
} // namespace bnb
