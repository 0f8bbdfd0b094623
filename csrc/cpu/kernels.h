// The kernels that exist once for each instruction set, and the arguments they take.
//
// Kernels trust their arguments: csrc/api checks them. A quantise or dequantise kernel handles the blocks [first, last) on the calling thread, so
// that the caller may split blocks over threads; blocks are independent, hence the bytes do not depend on the split.
#pragma once

#include "../common/types.h"

namespace bnb {

struct QuantizeArgs4bit {
    const void* input; // n elements of dtype
    float* absmax;     // one for each block
    uint8_t* output;   // (n + 1) / 2 bytes, first element in the high nibble
    int64_t n, blocksize;
    DType dtype;
    QuantType quant_type;
};

struct DequantizeArgs4bit {
    const uint8_t* input;
    const float* absmax;
    void* output; // n elements of dtype
    int64_t n, blocksize;
    DType dtype;
    QuantType quant_type;
};

struct CellTable;

struct QuantizeArgsBlockwise {
    const float* midpoints;  // 255 decision thresholds, ascending
    const CellTable* cells;  // the same thresholds as a lookup table, or null: search the midpoints
    const void* input;
    float* absmax;
    uint8_t* output;
    int64_t n, blocksize;
    DType dtype;
};

struct DequantizeArgsBlockwise {
    const float* code; // 256 values
    const uint8_t* input;
    const float* absmax;
    void* output;
    int64_t n, blocksize;
    DType dtype;
};

// out[M, N] = A[M, K] . dequantised(B)[N, K]^T + bias
struct GemmArgs4bit {
    const void* A;             // [M, K] of dtype
    const uint8_t* B;          // N * K codes packed in flat order
    const float* absmax;       // scale of flat element i: scale[i / blocksize]
    const uint8_t* absmax_8bit;   // null, or nested statistics:
    const float* absmax_code;     // scale[j] = absmax_code[absmax_8bit[j]] * absmax[j / 256] + absmax_offset[0], rounded twice
    const float* absmax_offset;
    const void* bias;          // N of dtype, or null
    void* out;                 // [M, N] of dtype
    int64_t M, N, K, blocksize;
    QuantType quant_type;
    DType dtype;
    int threads; // the most this call may use
};

struct KernelTable {
    const char* name;
    void (*quantize_4bit)(const QuantizeArgs4bit& args, int64_t first, int64_t last);
    void (*dequantize_4bit)(const DequantizeArgs4bit& args, int64_t first, int64_t last);
    void (*quantize_blockwise)(const QuantizeArgsBlockwise& args, int64_t first, int64_t last);
    void (*dequantize_blockwise)(const DequantizeArgsBlockwise& args, int64_t first, int64_t last);
    int32_t (*gemm_4bit)(const GemmArgs4bit& args); // splits its work over threads itself; returns a Status
    int32_t (*gemm_4bit_backward)(const GemmArgs4bit& args); // so does this one; A is [M, N], out is [M, K]
};

// Every kernel source is compiled with -DBNB_ISA=<name of the set> and lives in the namespace of that name.
#ifdef BNB_ISA
namespace BNB_ISA {

void quantize_4bit(const QuantizeArgs4bit& args, int64_t first, int64_t last);
void dequantize_4bit(const DequantizeArgs4bit& args, int64_t first, int64_t last);
void quantize_blockwise(const QuantizeArgsBlockwise& args, int64_t first, int64_t last);
void dequantize_blockwise(const DequantizeArgsBlockwise& args, int64_t first, int64_t last);
int32_t gemm_4bit(const GemmArgs4bit& args);
int32_t gemm_4bit_backward(const GemmArgs4bit& args);

extern const KernelTable kernel_table;

} // namespace BNB_ISA
#endif

} // namespace bnb
