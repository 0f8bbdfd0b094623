// 4-bit products: argument checks, and which launcher computes what.
#include "arguments.h"
#include "cuda_api.h"
#include "cuda_call.h"

#include "../common/status.h"

namespace bnb {
namespace {

constexpr int32_t kUsualSkinnyTile = 16;
constexpr int32_t kLargestTile = 128, kLargestBackwardTile = 64; // of the tiled kernels

struct GemmCall {
    GemmArgs4bit args;
    GemmPlan plan;
};

// `width` is the width of the result, `depth` the length of its sums. kOk and `is_empty` for results without elements.
int32_t check_product(const GemmArgs4bit& args, const GemmPlan& plan, int64_t width, int64_t depth, int64_t partial_count, bool& is_empty) {
    is_empty = args.M == 0 || width == 0;
    const bool are_sizes = is_count(args.M) && is_count(args.N) && is_count(args.K) && args.blocksize > 0;
    if (!is_dtype(args.dtype) || !is_quant_type(args.quant_type) || !are_sizes)
        return kBadArgument;
    if (is_empty)
        return kOk;
    const int64_t widest = depth > width ? depth : width;
    if ((depth != 0 && width > kMostElements / depth) || args.M > kMostElements / widest)
        return kBadArgument;
    const bool has_nested = args.scales.absmax_8bit == nullptr || (args.scales.absmax_code != nullptr && args.scales.absmax_offset != nullptr);
    const bool has_operands = args.A != nullptr && args.B != nullptr && args.scales.absmax != nullptr;
    if (args.out == nullptr || (depth != 0 && !has_operands) || !has_nested)
        return kBadArgument;
    if (plan.splits < 1 || (plan.splits > 1 && (plan.partial == nullptr || partial_count / plan.splits / args.M < width)))
        return kBadArgument;
    return kOk;
}

[[maybe_unused]] GemmPlan with_tile_up_to(GemmPlan plan, int32_t largest) {
    plan.tile = plan.tile < largest ? plan.tile : largest;
    return plan;
}

// What the kernel of the plan cannot do the next simpler one does.
int32_t launch_forward(const GemmCall& call, Stream stream) {
    int32_t status = kUnsupported;
    if (call.plan.kernel == kGemmSimple || call.args.K == 0)
        return launch_gemm_4bit_simple(call.args, stream);
#if defined(BNB_HAS_SM90)
    if (call.plan.kernel == kGemmWarpgroup)
        status = launch_gemm_4bit_warpgroup(call.args, call.plan, stream);
#endif
#if defined(BNB_HAS_MMA80)
    if (status == kUnsupported && (call.plan.kernel == kGemmTiled || call.plan.kernel == kGemmWarpgroup))
        status = launch_gemm_4bit_tiled(call.args, with_tile_up_to(call.plan, kLargestTile), stream);
#endif
#if defined(BNB_HAS_TENSOR)
    const GemmPlan skinny{kGemmSkinny, call.plan.kernel == kGemmSkinny ? call.plan.tile : kUsualSkinnyTile, 1, nullptr};
    if (status == kUnsupported)
        status = launch_gemm_4bit_skinny(call.args, skinny, stream);
#endif
    return status == kUnsupported ? launch_gemm_4bit_simple(call.args, stream) : status;
}

int32_t launch_backward(const GemmCall& call, Stream stream) {
    int32_t status = kUnsupported;
#if defined(BNB_HAS_SM90)
    if (call.plan.kernel == kGemmWarpgroup)
        status = launch_gemm_4bit_warpgroup_backward(call.args, call.plan, stream);
#endif
#if defined(BNB_HAS_MMA80)
    if (status == kUnsupported)
        status = launch_gemm_4bit_backward(call.args, with_tile_up_to(call.plan, kLargestBackwardTile), stream);
#endif
    (void)call, (void)stream;
    return status;
}

} // namespace
} // namespace bnb

using namespace bnb;

int32_t bnb_cuda_gemm_4bit(const void* A, const uint8_t* B, const float* absmax, const uint8_t* absmax_8bit, const float* absmax_code,
                           const float* absmax_offset, const float* levels, const void* bias, void* out, int64_t M, int64_t N, int64_t K,
                           int64_t blocksize, int32_t quant_type, int32_t dtype, int32_t kernel, int32_t tile, int32_t splits, float* partial,
                           int64_t partial_count, int32_t device, void* stream) {
    const BlockScales scales{absmax, absmax_8bit, absmax_code, absmax_offset};
    const GemmCall call{{A, B, scales, levels, bias, out, M, N, K, blocksize, QuantType(quant_type), DType(dtype)}, {kernel, tile, splits, partial}};
    bool is_empty;
    const int32_t status = check_product(call.args, call.plan, N, K, partial_count, is_empty);
    return status != kOk || is_empty ? status : on_device(device, launch_forward, call, stream);
}

int32_t bnb_cuda_gemm_4bit_backward(const void* A, const uint8_t* B, const float* absmax, const uint8_t* absmax_8bit, const float* absmax_code,
                                    const float* absmax_offset, void* out, int64_t M, int64_t N, int64_t K, int64_t blocksize, int32_t quant_type,
                                    int32_t dtype, int32_t kernel, int32_t tile, int32_t splits, float* partial, int64_t partial_count,
                                    int32_t device, void* stream) {
    const BlockScales scales{absmax, absmax_8bit, absmax_code, absmax_offset};
    const GemmCall call{{A, B, scales, nullptr, nullptr, out, M, N, K, blocksize, QuantType(quant_type), DType(dtype)},
                        {kernel, tile, splits, partial}};
    bool is_empty;
    const int32_t status = check_product(call.args, call.plan, K, N, partial_count, is_empty);
    return status != kOk || is_empty ? status : on_device(device, launch_backward, call, stream);
}
