// Gradient of the 4-bit product with respect to its input: out[M, K] = A[M, N] . dequantised(B)[N, K].
//
// Operands, accuracy and threads as in gemm_4bit.cpp; the sum runs over the rows of the weight. The arguments keep their names: N and K are the
// weight's, A and out have each other's width, and there is no bias.
#include "gemm_4bit_columns.h"

namespace bnb {
namespace BNB_ISA {
namespace {

struct BackwardProduct {
    template <typename Arithmetic, typename T> static int32_t run(const GemmArgs4bit& args) {
        return multiply_in_panels<Arithmetic, T, WeightColumns<Arithmetic>>(args);
    }
};

} // namespace

int32_t gemm_4bit_backward(const GemmArgs4bit& args) { return with_arithmetic<BackwardProduct>(args); }

} // namespace BNB_ISA
} // namespace bnb
