// The kernels that exist once for each instruction set, and the arguments they take.
//
// Kernels trust their arguments: csrc/api checks them. A quantise or dequantise kernel handles the blocks [first, last) on the calling thread, so
// that the caller may split blocks over threads; blocks are independent, hence the bytes do not depend on the split.
#pragma once

#include "../common/types.h"
#include "optimizer.h"

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

struct QuantizeArgsBlockwise {
    const float* midpoints; // 255 decision thresholds, ascending
    const CellTable* cells; // the same thresholds as a lookup table, or null: search the midpoints
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
    const void* A;              // [M, K] of dtype
    const uint8_t* B;           // N * K codes packed in flat order
    const float* absmax;        // scale of flat element i: scale[i / blocksize]
    const uint8_t* absmax_8bit; // null, or nested statistics:
    const float* absmax_code;   // scale[j] = absmax_code[absmax_8bit[j]] * absmax[j / 256] + absmax_offset[0], rounded twice
    const float* absmax_offset;
    const void* bias; // N of dtype, or null
    void* out;        // [M, N] of dtype
    int64_t M, N, K, blocksize;
    QuantType quant_type;
    DType dtype;
    int threads; // the most this call may use
};

// LLM.int8(): quantisation of a matrix along its rows or its columns.
struct Int8QuantizeArgs {
    const void* A; // [rows, columns] of dtype
    int64_t rows, columns;
    DType dtype;
    float limit;         // larger magnitudes are outliers; infinity: there are none
    uint8_t* is_outlier; // truth values of the columns that hold one; null when there are none
    float* stats;        // one for each row (or column): the largest magnitude that is no outlier
    int8_t* codes;       // [rows, columns]
};

struct Int8DequantizeArgs {
    const int8_t* codes; // [rows, columns]
    const float* stats;  // one for each row
    float* out;
    int64_t rows, columns;
};

// out[M, N] = product * row_stats * col_stats / 127^2 + bias
struct Int8ScaleArgs {
    const int32_t* product; // [M, N]
    const float* row_stats;
    const float* col_stats;
    const float* bias; // N, or null
    void* out;         // [M, N] of dtype
    int64_t M, N;
    DType dtype;
};

// A . CB^T of int8 matrices, dequantised, plus A's outlier columns times the dequantised columns of CB, plus the bias.
struct Int8ProductArgs {
    const void* A;          // [M, K] of dtype; may be null where there are codes and no outlier columns
    bool quantises;         // A is to be quantised here
    const int8_t* codes;    // of A otherwise
    const float* row_stats; // beside the codes
    float limit;            // of quantisation, and its mask of outlier columns, as above
    uint8_t* is_outlier;
    const int64_t* outlier_columns; // beside the codes: any number of columns, in any order
    int64_t outliers;
    const int8_t* CB;  // [N, K]
    const float* SCB;  // N, or null: out is the int32 product itself
    const float* bias; // N, or null
    void* out;         // [M, N] of dtype, or of int32
    int64_t M, N, K;
    DType dtype;
    int threads;
};

// out[M, K] = A[M, N] . dequantised(CB)[N, K]
struct Int8BackwardArgs {
    const void* A; // of dtype
    const int8_t* CB;
    const float* SCB;
    const void* bias; // null
    void* out;        // of dtype
    int64_t M, N, K;
    DType dtype;
    int threads;
};

struct KernelTable {
    const char* name;
    void (*quantize_4bit)(const QuantizeArgs4bit& args, int64_t first, int64_t last);
    void (*dequantize_4bit)(const DequantizeArgs4bit& args, int64_t first, int64_t last);
    void (*quantize_blockwise)(const QuantizeArgsBlockwise& args, int64_t first, int64_t last);
    void (*dequantize_blockwise)(const DequantizeArgsBlockwise& args, int64_t first, int64_t last);
    int32_t (*gemm_4bit)(const GemmArgs4bit& args);          // splits its work over threads itself; returns a Status
    int32_t (*gemm_4bit_backward)(const GemmArgs4bit& args); // so does this one; A is [M, N], out is [M, K]
    void (*int8_find_outliers)(const Int8QuantizeArgs& args, int64_t first_column, int64_t last_column); // writes is_outlier
    void (*int8_quantize_rows)(const Int8QuantizeArgs& args, int64_t first, int64_t last);               // reads is_outlier
    void (*int8_quantize_columns)(const Int8QuantizeArgs& args, int64_t first, int64_t last);
    void (*int8_dequantize_rows)(const Int8DequantizeArgs& args, int64_t first, int64_t last);
    void (*int8_scale_rows)(const Int8ScaleArgs& args, int64_t first, int64_t last);
    int32_t (*int8_product)(const Int8ProductArgs& args); // these two split their work over threads themselves
    int32_t (*int8_backward)(const Int8BackwardArgs& args);
    void (*optimizer_step)(const OptimizerArgs& args, const OptimizerTensor& tensor, int64_t first, int64_t last); // blocks of 256
    // Changes nothing; leaves the squares of each chunk.
    void (*optimizer_measure)(const OptimizerArgs& args, const OptimizerTensor& tensor, int64_t first, int64_t last, OptimizerSquares* squares);
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
void int8_find_outliers(const Int8QuantizeArgs& args, int64_t first_column, int64_t last_column);
void int8_quantize_rows(const Int8QuantizeArgs& args, int64_t first, int64_t last);
void int8_quantize_columns(const Int8QuantizeArgs& args, int64_t first, int64_t last);
void int8_dequantize_rows(const Int8DequantizeArgs& args, int64_t first, int64_t last);
void int8_scale_rows(const Int8ScaleArgs& args, int64_t first, int64_t last);
int32_t int8_product(const Int8ProductArgs& args);
int32_t int8_backward(const Int8BackwardArgs& args);
void optimizer_step(const OptimizerArgs& args, const OptimizerTensor& tensor, int64_t first, int64_t last);
void optimizer_measure(const OptimizerArgs& args, const OptimizerTensor& tensor, int64_t first, int64_t last, OptimizerSquares* squares);

extern const KernelTable kernel_table;

} // namespace BNB_ISA
#endif

} // namespace bnb
