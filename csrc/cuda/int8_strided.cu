// Products of int8 matrices that lie in memory in any way, for callers of the legacy interface: a thread an entry, the sum as it comes. Not fast; the
// product with K along both operands is in int8_rows.cu and int8_tiles.cu.
#include "device.h"

#include "../common/quantize.h"

namespace bnb {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ int8_t saturated(float value) {
    const float clamped = value > 127.0f ? 127.0f : value > -128.0f ? value : -128.0f; // a NaN is the smallest
    return int8_t(float_bits(__fadd_rn(clamped, kRoundingShift)) & 0xffu);
}

__global__ void __launch_bounds__(kThreads) multiply_strided(Int8StridedArgs args) {
    const int64_t entries = args.rows * args.columns;
    for (int64_t entry = global_thread(); entry < entries * args.batches; entry += global_threads()) {
        const int64_t batch = entry / entries, i = entry % entries % args.rows, j = entry % entries / args.rows;
        const int8_t* a = args.a + batch * args.a_batch + i * args.a_row;
        const int8_t* b = args.b + batch * args.b_batch + j * args.b_column;
        uint32_t sum = 0;
        for (int64_t k = 0; k < args.depth; ++k)
            sum += uint32_t(int32_t(a[k * args.a_column]) * int32_t(b[k * args.b_row]));
        const int64_t place = batch * args.out_batch + i * args.out_row + j * args.out_column;
        const float value = __int2float_rn(int32_t(sum));
        if (args.is_int8)
            static_cast<int8_t*>(args.out)[place] = saturated(args.row_scale != nullptr ? __fmul_rn(value, args.row_scale[i]) : value);
        else
            static_cast<uint32_t*>(args.out)[place] = sum;
    }
}

} // namespace

int32_t launch_int8_strided(const Int8StridedArgs& args, Stream stream) {
    const int64_t entries = args.rows * args.columns * args.batches;
    if (entries == 0)
        return kOk;
    constexpr int64_t kMostBlocks = 1 << 22; // AMD's launch fewer than 2^32 threads
    const int64_t blocks = divide_up(entries, kThreads);
    return launch(multiply_strided, unsigned(blocks < kMostBlocks ? blocks : kMostBlocks), kThreads, 0, stream, args);
}

} // namespace bnb
