// LLM.int8(): the gradient of the product with respect to its input, out[M, K] = A[M, N] . dequantised(CB)[N, K].
//
// A weight is fl(fl(code * SCB) / 127) in fp32, rounded to the type of the gradient where that is what is multiplied: as dequantisation and a dense
// product would have it, but a panel of the weight at a time, in cache. Scaling the gradient instead would spare a multiplication a weight, but its
// rounding would be shared by all columns and, for gradients with a mean, show.
//
// Bytes: N K of codes once for every few hundred tokens.
#include "../common/quantize.h"
#include "panel.h"

namespace bnb {
namespace BNB_ISA {
namespace {

template <typename Arithmetic> class Int8Columns {
  public:
    using Args = Int8BackwardArgs;

    static int64_t lanes(const Args& args) { return args.K; }
    static int64_t depth(const Args& args) { return args.N; }

    Int8Columns(const Args& args, int64_t) : args_(args) {}

    size_t scratch_bytes() const { return 0; }
    bool take(Scratch&) { return true; }

    void open(int64_t first, int64_t count) { first_ = first, count_ = count; }

    void fill(int64_t begin, int64_t end, typename Arithmetic::Cell* cells) const {
        const int64_t width = ceil_div(count_, W) * W;
        for (int64_t row = begin; row < end; row += 2, cells += 2 / Arithmetic::kDepth * width) {
            const int64_t odd = row + 1 < end ? row + 1 : row;
            const int8_t* even_codes = args_.CB + row * args_.K + first_;
            const int8_t* odd_codes = args_.CB + odd * args_.K + first_;
            prefetch(even_codes + kPrefetchRows * args_.K);
            prefetch(odd_codes + kPrefetchRows * args_.K);
            const F32 even_scale = splat(args_.SCB[row]), odd_scale = splat(odd != row ? args_.SCB[odd] : 0.0f);
            for (int64_t lane = 0; lane < count_; lane += W)
                Arithmetic::store_pair(weights_at(even_codes, lane, even_scale), weights_at(odd_codes, lane, odd_scale), cells + lane, width);
        }
    }

  private:
    F32 weights_at(const int8_t* codes, int64_t lane, F32 scale) const {
        int8_t last[W] = {};
        const int8_t* p = codes + lane;
        if (lane + W > count_)
            p = static_cast<int8_t*>(memcpy(last, p, size_t(count_ - lane)));
        return mul(mul(to_floats(load_signed_bytes(p)), scale), splat(kPerInt8Code));
    }

    const Args& args_;
    int64_t first_ = 0, count_ = 0;
};

struct Int8Backward {
    template <typename Arithmetic, typename T> static int32_t run(const Int8BackwardArgs& args) {
        return multiply_in_panels<Arithmetic, T, Int8Columns<Arithmetic>>(args);
    }
};

} // namespace

int32_t int8_backward(const Int8BackwardArgs& args) { return with_arithmetic<Int8Backward>(args); }

} // namespace BNB_ISA
} // namespace bnb
