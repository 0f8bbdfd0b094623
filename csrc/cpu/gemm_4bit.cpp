// 4-bit matrix product: out[M, N] = A[M, K] . dequantised(B)[N, K]^T + bias[N].
//
// A, bias and out hold one element type, row by row. B holds N * K codes in flat order, two to a byte, the first in the high nibble; the weight of
// flat element i is level[code] * scale[i / blocksize], in fp32. Sums are fp32, the bias is added in fp32 and the result rounded once. The weight is
// never stored in full: N K / 2 bytes of codes and 4 N K / blocksize of scales are what must come from memory, and for few tokens they bound the
// time.
//
// Two forms: gemm_4bit_dot.h for few tokens, panel.h for many and for odd layouts. Rows of the weight (and, where these are few, tokens)
// are split over threads, K never is, and neither is the order of the sums: the result does not depend on the number of threads.
#include "gemm_4bit_dot.h"
#include "gemm_4bit_rows.h"

namespace bnb {
namespace BNB_ISA {
namespace {

template <typename Arithmetic, int kGranule, typename T> int32_t multiply_dot(const GemmArgs4bit& args) {
    constexpr int64_t kRows = tile_rows(1); // ranges of whole tiles
    const int64_t cost_of_rows = kRows * args.K * (args.M + 3);
    const int64_t grain = ceil_div(kProductsPerThread, cost_of_rows);
    return try_parallel(ceil_div(args.N, kRows), grain, args.threads, [&](int64_t begin, int64_t end) -> int32_t {
        const DotWorker<Arithmetic, kGranule, T> worker(args);
        if (!worker.is_ready())
            return kOutOfMemory;
        worker.pack();
        const int64_t last = smaller(args.N, end * kRows);
        for (int64_t row = begin * kRows; row < last; row += kDotGroup)
            worker.multiply(row, smaller(kDotGroup, last - row));
        return kOk;
    });
}

struct Product {
    template <typename Arithmetic, typename T> static int32_t run(const GemmArgs4bit& args) {
        if (is_aligned(args) && args.M <= kMostDotTokens) {
            constexpr int kWide = Arithmetic::kWideGranule;
            const bool is_wide = args.K % kWide == 0 && args.blocksize % kWide == 0;
            return is_wide ? multiply_dot<Arithmetic, kWide, T>(args) : multiply_dot<Arithmetic, kNarrowGranule, T>(args);
        }
        return multiply_in_panels<Arithmetic, T, WeightRows<Arithmetic>>(args);
    }
};

} // namespace

int32_t gemm_4bit(const GemmArgs4bit& args) { return with_arithmetic<Product>(args); }

} // namespace BNB_ISA
} // namespace bnb
