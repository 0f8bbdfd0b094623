// 4-bit matrix product: out[M, N] = A[M, K] . dequantised(B)[N, K]^T + bias. Plain form.
#include "blocks.h"
#include "kernels.h"
#include "threads.h"

namespace bnb {
namespace BNB_ISA {
namespace {

float scale_of_block(const GemmArgs4bit& args, int64_t block) {
    if (args.absmax_8bit == nullptr)
        return args.absmax[block];
    return args.absmax_code[args.absmax_8bit[block]] * args.absmax[block >> 8] + args.absmax_offset[0];
}

template <typename T> float output_element(const GemmArgs4bit& args, int64_t m, int64_t n) {
    const float* levels = (args.quant_type == kNF4 ? kNF4Levels : kFP4Levels).value;
    const T* row = static_cast<const T*>(args.A) + m * args.K;
    float sum = 0.0f;
    for (int64_t k = 0; k < args.K; ++k) {
        const int64_t i = n * args.K + k;
        sum += to_float(row[k]) * (levels[get_nibble(args.B, i)] * scale_of_block(args, i / args.blocksize));
    }
    return args.bias != nullptr ? sum + to_float(static_cast<const T*>(args.bias)[n]) : sum;
}

} // namespace

int32_t gemm_4bit(const GemmArgs4bit& args) {
    parallel_for(args.N, 65536 / (args.K * args.M + 1) + 1, args.threads, [&](int64_t begin, int64_t end, int) {
        with_element_type(args.dtype, [&](auto* element) {
            using T = std::remove_pointer_t<decltype(element)>;
            for (int64_t m = 0; m < args.M; ++m)
                for (int64_t n = begin; n < end; ++n)
                    static_cast<T*>(args.out)[m * args.N + n] = from_float<T>(output_element<T>(args, m, n));
        });
    });
    return 0;
}

} // namespace BNB_ISA
} // namespace bnb
