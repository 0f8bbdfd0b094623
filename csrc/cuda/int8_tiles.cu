// The int8 product on tensor cores from sm_80 on; see int8_tiles.h.
//
// kNarrow, up to 16 tokens, is bound by reading the weight once: its stages take all of 512 columns, 24 KB each of which three are on their way, and
// its warps share the columns. kMiddle and kWide read M N (1 / 64 + 1 / 64) K or M N (1 / 128 + 1 / 128) K bytes, from the second-level cache; kWide
// needs more shared memory than small GPUs have.
#include "int8_tiles.h"

namespace bnb {
namespace {

using Narrow = Shape<2, 1, 1, 2, 4, 4>; // 32 x 16
using Middle = Shape<4, 2, 1, 4, 2, 2>; // 64 x 64
using Wide = Shape<4, 2, 2, 8, 2, 3>;   // 128 x 128

} // namespace

int32_t launch_int8_tiles(const Int8ProductArgs& args, Int8Kernel kernel, Stream stream) {
    if (kernel == kInt8Narrow)
        return run<Narrow>(args, stream);
    const int32_t status = kernel == kInt8Wide ? run<Wide>(args, stream) : int32_t(kUnsupported);
    return status == kUnsupported ? run<Middle>(args, stream) : status;
}

} // namespace bnb
