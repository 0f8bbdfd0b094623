// Which kernel of the int8 product and of its gradient runs. Few tokens are bound by reading the weight; for more of them the
// largest tile that still gives most multiprocessors work reads the least.
#include "device.h"

namespace bnb {
namespace {

// By tensor cores, if the device and this build have them.
[[maybe_unused]] bool has_capability(int32_t least) { return device_properties().capability >= least; }

int32_t launch_tiles([[maybe_unused]] const Int8ProductArgs& args, [[maybe_unused]] Int8Kernel kernel, [[maybe_unused]] Stream stream) {
#if defined(BNB_HAS_MMA80)
    if (has_capability(80))
        return launch_int8_tiles(args, kernel, stream);
#endif
#if defined(BNB_HAS_MMA75)
    if (has_capability(75))
        return launch_int8_tiles_75(args, stream);
#endif
    return kUnsupported;
}

int32_t launch_backward_tiles([[maybe_unused]] const Int8BackwardArgs& args, [[maybe_unused]] Stream stream) {
#if defined(BNB_HAS_TENSOR)
    return launch_int8_backward_tiles(args, stream);
#else
    return kUnsupported;
#endif
}

constexpr int64_t kMostTokensOfRows = 4;
constexpr int64_t kMostTokensOfNarrow = 16;
constexpr int64_t kWideTile = 128;

Int8Kernel choose(const Int8ProductArgs& args) {
    if (args.M <= kMostTokensOfRows)
        return kInt8Rows;
    if (args.M <= kMostTokensOfNarrow)
        return kInt8Narrow;
    const int64_t wide_tiles = divide_up(args.M, kWideTile) * divide_up(args.N, kWideTile);
    return 3 * wide_tiles >= 2 * device_properties().multiprocessors ? kInt8Wide : kInt8Middle;
}

} // namespace

int32_t launch_int8_product(const Int8ProductArgs& args, Int8Kernel kernel, Stream stream) {
    if (args.M == 0 || args.N == 0)
        return kOk;
    const Int8Kernel chosen = kernel == kInt8Auto ? choose(args) : kernel;
    if (chosen == kInt8Rows)
        return launch_int8_rows(args, stream);
    const int32_t status = launch_tiles(args, chosen, stream);
    return status == kUnsupported && kernel == kInt8Auto ? launch_int8_rows(args, stream) : status;
}

int32_t launch_int8_backward(const Int8BackwardArgs& args, Int8BackwardKernel kernel, Stream stream) {
    if (args.M == 0 || args.K == 0)
        return kOk;
    if (kernel == kInt8BackwardSimple)
        return launch_int8_backward_simple(args, stream);
    const int32_t status = launch_backward_tiles(args, stream);
    return status == kUnsupported && kernel == kInt8BackwardAuto ? launch_int8_backward_simple(args, stream) : status;
}

} // namespace bnb
