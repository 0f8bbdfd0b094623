// The int8 product on the tensor cores of sm_75, whose blocks have 64 KB of shared memory and no asynchronous copies; see int8_tiles.h.
#include "int8_tiles.h"

namespace bnb {
namespace {

using Small = Shape<2, 1, 1, 2, 4, 2>; // 32 x 16

} // namespace

int32_t launch_int8_tiles_75(const Int8ProductArgs& args, Stream stream) { return run<Small>(args, stream); }

} // namespace bnb
