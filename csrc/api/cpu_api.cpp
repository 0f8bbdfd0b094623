// Argument checks, the split over threads, and the call into the kernels.
#include "api.h"
#include "arguments.h"
#include "code_tables.h"

#include "../common/status.h"
#include "../cpu/dispatch.h"
#include "../cpu/pages.h"
#include "../cpu/threads.h"

namespace bnb {
namespace {

bool is_quant_type(int32_t type) { return type == kFP4 || type == kNF4; }

int64_t element_size(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

bool are_sizes(int64_t n, int64_t blocksize) { return is_count(n) && blocksize > 0; }

// Splits the blocks over threads. `granule` blocks stay together.
template <typename Args> void run_blocks(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t granule, int32_t threads) {
    const int64_t blocks = ceil_divide(args.n, args.blocksize);
    const int64_t grain = ceil_divide(kElementsPerThread, args.blocksize < kElementsPerThread ? args.blocksize * granule : kElementsPerThread);
    parallel_for(ceil_divide(blocks, granule), grain, threads, [&](int64_t begin, int64_t end, int) {
        const int64_t last = end * granule;
        kernel(args, begin * granule, last < blocks ? last : blocks);
    });
}

// Checks the arguments of a 4-bit product and computes it. `width` is the width of its result, `depth` the length of its sums.
int32_t run_product(int32_t (*kernel)(const GemmArgs4bit&), int64_t width, int64_t depth, GemmArgs4bit args) {
    if (!is_dtype(args.dtype) || !is_quant_type(args.quant_type) || !is_count(args.M) || !is_count(args.N) || !are_sizes(args.K, args.blocksize) ||
        args.threads < 0)
        return kBadArgument;
    if (args.M == 0 || width == 0)
        return kOk;
    const int64_t widest = depth > width ? depth : width;
    if ((depth != 0 && width > kMostElements / depth) || args.M > kMostElements / widest)
        return kBadArgument;
    const bool has_operands = args.A != nullptr && args.B != nullptr && args.absmax != nullptr;
    const bool has_nested = args.absmax_code != nullptr && args.absmax_offset != nullptr;
    if (args.out == nullptr || (depth != 0 && !has_operands) || (args.absmax_8bit != nullptr && !has_nested))
        return kBadArgument;
    if (args.threads == 0)
        args.threads = default_threads();
    return kernel(args);
}

} // namespace
} // namespace bnb

using namespace bnb;

const char* bnb_status_message(int32_t status) { return status_message(status); }

int32_t bnb_cpu_quantize_4bit(const void* A, int32_t dtype, int64_t n, int64_t blocksize, int32_t quant_type, float* absmax, uint8_t* out,
                              int32_t threads) {
    if (!is_dtype(dtype) || !is_quant_type(quant_type) || !are_sizes(n, blocksize) || threads < 0)
        return kBadArgument;
    if (n == 0)
        return kOk;
    if (A == nullptr || absmax == nullptr || out == nullptr)
        return kBadArgument;
    advise_huge_pages(out, ceil_divide(n, 2));
    const QuantizeArgs4bit args{A, absmax, out, n, blocksize, DType(dtype), QuantType(quant_type)};
    run_blocks(kernels().quantize_4bit, args, blocksize % 2 == 0 ? 1 : 2, threads); // two odd blocks: threads must not share a byte
    return kOk;
}

int32_t bnb_cpu_dequantize_4bit(const uint8_t* A, const float* absmax, int64_t n, int64_t blocksize, int32_t quant_type, int32_t dtype, void* out,
                                int32_t threads) {
    if (!is_dtype(dtype) || !is_quant_type(quant_type) || !are_sizes(n, blocksize) || threads < 0)
        return kBadArgument;
    if (n == 0)
        return kOk;
    if (A == nullptr || absmax == nullptr || out == nullptr)
        return kBadArgument;
    advise_huge_pages(out, n * element_size(dtype));
    const DequantizeArgs4bit args{A, absmax, out, n, blocksize, DType(dtype), QuantType(quant_type)};
    run_blocks(kernels().dequantize_4bit, args, 1, threads);
    return kOk;
}

int32_t bnb_cpu_quantize_blockwise(const float* code, const void* A, int32_t dtype, int64_t n, int64_t blocksize, float* absmax, uint8_t* out,
                                   int32_t threads) {
    static thread_local CellCache cache;
    if (!is_dtype(dtype) || !are_sizes(n, blocksize) || threads < 0)
        return kBadArgument;
    if (n == 0)
        return kOk;
    if (code == nullptr || A == nullptr || absmax == nullptr || out == nullptr)
        return kBadArgument;
    if (!is_ascending(code))
        return kBadCode;
    float midpoints[255];
    find_midpoints(code, midpoints);
    advise_huge_pages(out, n);
    const QuantizeArgsBlockwise args{midpoints, cache.find(midpoints, n), A, absmax, out, n, blocksize, DType(dtype)};
    run_blocks(kernels().quantize_blockwise, args, 1, threads);
    return kOk;
}

int32_t bnb_cpu_dequantize_blockwise(const float* code, const uint8_t* A, const float* absmax, int64_t n, int64_t blocksize, int32_t dtype, void* out,
                                     int32_t threads) {
    if (!is_dtype(dtype) || !are_sizes(n, blocksize) || threads < 0)
        return kBadArgument;
    if (n == 0)
        return kOk;
    if (code == nullptr || A == nullptr || absmax == nullptr || out == nullptr)
        return kBadArgument;
    advise_huge_pages(out, n * element_size(dtype));
    const DequantizeArgsBlockwise args{code, A, absmax, out, n, blocksize, DType(dtype)};
    run_blocks(kernels().dequantize_blockwise, args, 1, threads);
    return kOk;
}

int32_t bnb_cpu_gemm_4bit(const void* A, const uint8_t* B, const float* absmax, const uint8_t* absmax_8bit, const float* absmax_code,
                          const float* absmax_offset, const void* bias, void* out, int64_t M, int64_t N, int64_t K, int64_t blocksize,
                          int32_t quant_type, int32_t dtype, int32_t threads) {
    return run_product(kernels().gemm_4bit, N, K,
                       GemmArgs4bit{A, B, absmax, absmax_8bit, absmax_code, absmax_offset, bias, out, M, N, K, blocksize, QuantType(quant_type),
                                    DType(dtype), threads});
}

int32_t bnb_cpu_gemm_4bit_backward(const void* A, const uint8_t* B, const float* absmax, const uint8_t* absmax_8bit, const float* absmax_code,
                                   const float* absmax_offset, void* out, int64_t M, int64_t N, int64_t K, int64_t blocksize, int32_t quant_type,
                                   int32_t dtype, int32_t threads) {
    return run_product(kernels().gemm_4bit_backward, K, N,
                       GemmArgs4bit{A, B, absmax, absmax_8bit, absmax_code, absmax_offset, nullptr, out, M, N, K, blocksize, QuantType(quant_type),
                                    DType(dtype), threads});
}

const char* bnb_cpu_isa(void) { return kernels().name; }

int32_t bnb_cpu_select_isa(const char* name) {
    const KernelTable* table = find_kernels(name);
    if (table == nullptr)
        return kUnsupported;
    use_kernels(*table);
    return kOk;
}

int32_t bnb_cpu_isa_supported(const char* name) { return find_kernels(name) != nullptr; }

const char* bnb_cpu_openmp_library(void) { return openmp_library(); }
