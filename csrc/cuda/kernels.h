// The launchers of all kernels, as the C interface calls them. Plain C++: nothing of CUDA is needed to include it.
//
// A launcher trusts its arguments, which the interface has checked, puts the work on `stream` of the current device and returns a Status. Pointers are
// to device memory unless said otherwise, and need the alignment of their elements only.
#pragma once

#include "../common/optimizer.h"
#include "../common/types.h"

#include <cstddef>

namespace bnb {

using Stream = void*; // cudaStream_t or hipStream_t

// ------------------------------------------------------------------------------------------------------------------------- the device
constexpr int32_t kCurrentDevice = -1;

// Makes `device` current for the thread until the end of the scope. `status()` is not kOk if there is no such device.
class DeviceGuard {
  public:
    explicit DeviceGuard(int32_t device);
    ~DeviceGuard();
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;
    int32_t status() const { return status_; }

  private:
    int32_t before_ = -1; // -1: nothing to restore
    int32_t status_;
};

// Of the current device. They are asked once for each device and remembered.
struct DeviceProperties {
    int32_t capability; // 10 * major + minor; that of the code which runs there, if the library has none with the device's instructions
    int32_t multiprocessors;
    int32_t shared_memory_limit; // bytes a block can have
};
const DeviceProperties& device_properties();

// The release of the runtime: 1000 * major + 10 * minor.
int32_t runtime_version();

// Remembers what went wrong for last_device_error(), on this thread, and returns kDeviceError.
int32_t report_device_error(const char* message);
const char* last_device_error();

// ------------------------------------------------------------------------------------------------------- 4-bit and 8-bit blocks (quantize, dequantize)
// The absmax of 4-bit blocks: floats, or (nested) 8-bit codes whose own blocks of 256 have a float each, around an offset.
struct BlockScales {
    const float* absmax;        // [blocks], nested: [ceil(blocks / 256)]
    const uint8_t* absmax_8bit; // [blocks], or null
    const float* absmax_code;   // [256]
    const float* absmax_offset; // [1]
};

struct QuantizeArgs4bit {
    const void* input;
    float* absmax;
    uint8_t* output;
    int64_t n, blocksize;
    QuantType quant_type;
    DType dtype;
};
int32_t launch_quantize_4bit(const QuantizeArgs4bit& args, Stream stream);

// code: 256 ascending floats. Any others give codes without meaning.
struct QuantizeArgsBlockwise {
    const float* code;
    const void* input;
    float* absmax;
    uint8_t* output;
    int64_t n, blocksize;
    DType dtype;
};
int32_t launch_quantize_blockwise(const QuantizeArgsBlockwise& args, Stream stream);

struct DequantizeArgs4bit {
    const uint8_t* input;
    BlockScales scales;
    void* output;
    int64_t n, blocksize;
    QuantType quant_type;
    DType dtype;
};
int32_t launch_dequantize_4bit(const DequantizeArgs4bit& args, Stream stream);

struct DequantizeArgsBlockwise {
    const float* code;
    const uint8_t* input;
    const float* absmax;
    void* output;
    int64_t n, blocksize;
    DType dtype;
};
int32_t launch_dequantize_blockwise(const DequantizeArgsBlockwise& args, Stream stream);

// -------------------------------------------------------------------------------------------------------------------- 4-bit products (gemm_4bit_*)
// out[M, N] = A[M, K] . W[N, K]^T + bias, W being the dequantised weight; for the backward product out[M, K] = A[M, N] . W[N, K].
struct GemmArgs4bit {
    const void* A;
    const uint8_t* B;
    BlockScales scales;
    const float* levels; // of the 16 codes, or null: those of quant_type
    const void* bias;    // or null
    void* out;
    int64_t M, N, K, blocksize;
    QuantType quant_type;
    DType dtype;
};

// Which kernel computes a product, and how it cuts it up. Measured tables decide that, in Python.
enum GemmKernel : int32_t { kGemmSimple = 0, kGemmSkinny = 1, kGemmTiled = 2, kGemmWarpgroup = 3 };

struct GemmPlan {
    int32_t kernel; // backward: tiled or warpgroup
    // skinny: rows of the weight that a warp takes, 8, 16 or 32. Else tokens that a block takes; tiled: 16, 32, 64, not backward also 128;
    // warpgroup: 64, 128, 256
    int32_t tile;
    int32_t splits; // but simple, skinny: parts of the sum that are computed apart and added up by a second kernel
    float* partial; // [splits, M, columns of out] if there is more than one
};

// Serves everything. The others return kUnsupported, before they do anything, for what they cannot do.
int32_t launch_gemm_4bit_simple(const GemmArgs4bit& args, Stream stream);
int32_t launch_gemm_4bit_skinny(const GemmArgs4bit& args, const GemmPlan& plan, Stream stream);
int32_t launch_gemm_4bit_tiled(const GemmArgs4bit& args, const GemmPlan& plan, Stream stream);
int32_t launch_gemm_4bit_warpgroup(const GemmArgs4bit& args, const GemmPlan& plan, Stream stream);
int32_t launch_gemm_4bit_backward(const GemmArgs4bit& args, const GemmPlan& plan, Stream stream);
int32_t launch_gemm_4bit_warpgroup_backward(const GemmArgs4bit& args, const GemmPlan& plan, Stream stream);

// --------------------------------------------------------------------------------------------------------------------- optimizers, fills, paging
// Elements that a warp steps one block after the other. With a limit on the norm each unit of a parameter leaves its squares.
constexpr int64_t kOptimizerUnit = 2048;

BNB_HD int64_t optimizer_units(int64_t n) { return n / kOptimizerUnit + (n % kOptimizerUnit != 0); }

struct OptimizerLaunch {
    const OptimizerTensors* tensors; // its arrays are on the host, what they point to and update_norms on the device
    OptimizerVariant variant;
    OptimizerScalars scalars;
    OptimizerLimit limit;
    DType dtype;
    uint32_t step;
    const float* qmaps[kMostMoments];
    OptimizerSquares* squares; // with a limit: room for one a unit of all parameters, and
    float* scales;             // for one a parameter. Else null
};
int32_t launch_optimizer_step_8bit(const OptimizerLaunch& job, Stream stream);
int32_t launch_optimizer_step_32bit(const OptimizerLaunch& job, Stream stream);

// a[i] = value; a[i] = i; a[i] *= b[i]; for n > 0 elements
enum class Elementwise { kFill, kCount, kMultiply };
int32_t launch_elementwise(Elementwise operation, float* a, const float* b, float value, int64_t n, Stream stream);
int32_t launch_fill_bytes(uint8_t* a, uint8_t value, int64_t n, Stream stream);

// Memory that the host and the current device both reach. Null: there is none left, or no such memory.
void* allocate_managed(size_t bytes);
int32_t free_managed(void* p);
// Starts moving it to a device, or to the host if `device` is negative. Does nothing where pages cannot move on their own.
int32_t prefetch_managed(void* p, size_t bytes, int32_t device, Stream stream);

// Memory of the current device, in the order of the stream. Null: there is none left.
void* allocate_in_order(size_t bytes, Stream stream);
int32_t free_in_order(void* p, Stream stream);

// ----------------------------------------------------------------------------------------------------------------------------- int8 (int8_*)
// LLM.int8(). Matrices lie row by row; strides are elements from row to row. What codes and classes mean stands in common/quantize.h.

// The columns of the activations that hold an outlier. Kernels find them and kernels use them: the host need not know how many there are.
struct Int8Outliers {
    uint8_t* mask;  // [columns] truth values; null: no column is special
    int64_t* list;  // [columns]: their indices, ascending
    int64_t* count; // [1]: how many; null: there is to be no list
};

struct Int8QuantizeArgs {
    const void* A; // [rows, columns] of dtype
    DType dtype;
    int64_t rows, columns;
    float limit; // larger magnitudes are outliers; infinity: there are none
    Int8Outliers outliers;
    int32_t classes; // of columns with a statistic of their own: 1 or kInt8Classes
    float* stats;    // [rows, classes]: the largest magnitude that is no outlier
    int8_t* codes;   // 0 in outlier columns, or without a mask for outliers
    int64_t codes_stride;
};

// Statistics and codes by one kernel, for rows that do not depend on each other: none has outliers, or there is one, or there is no mask.
int32_t launch_int8_quantize(const Int8QuantizeArgs& args, Stream stream);

// The same in two steps: statistics and the mask of all rows; then codes of any of them and, if there is one, the list.
int32_t launch_int8_statistics(const Int8QuantizeArgs& args, Stream stream);
int32_t launch_int8_codes(const Int8QuantizeArgs& args, Stream stream);

// Statistics [columns] and codes along the columns. Codes are 0 for outliers.
int32_t launch_int8_quantize_columns(const Int8QuantizeArgs& args, Stream stream);

struct Int8DequantizeArgs {
    const int8_t* codes;
    int64_t codes_stride;
    const float* stats; // [rows]
    void* out;          // [rows, columns] of dtype
    DType dtype;
    int64_t rows, columns;
};
int32_t launch_int8_dequantize(const Int8DequantizeArgs& args, Stream stream);

// out[M, N] of dtype = product * row_stats * col_stats / 127^2 + bias
struct Int8ScaleArgs {
    const int32_t* product;
    const float* row_stats;
    const float* col_stats;
    const void* bias; // [N] of bias_dtype, or null
    DType bias_dtype;
    void* out;
    DType dtype;
    int64_t M, N;
};
int32_t launch_int8_mm_dequant(const Int8ScaleArgs& args, Stream stream);

// out[M, N] = x . w^T, modulo 2^32; or with statistics in floating point, plus the product of the outlier columns, plus the bias.
struct Int8ProductArgs {
    const int8_t* x; // [M, K] codes of the activations
    int64_t x_stride;
    const int8_t* w; // [N, K] codes of the weight
    int64_t w_stride;
    int64_t M, N, K;
    const float* x_stats; // [M, classes]; null: out is the sums themselves
    int32_t classes;
    const float* w_stats; // [N]
    const void* bias;     // [N] of bias_dtype, or null
    DType bias_dtype;
    const void* A;                  // [M, K] of dtype, as the codes were made from
    const int64_t* outlier_columns; // null: none. Columns that A has not are passed over
    const int64_t* outlier_count;   // on the device; null: `outliers`
    int64_t outliers;
    void* out;
    int64_t out_stride;
    DType dtype;
};

// Kernels of the product, for tests and tuning; kInt8Auto chooses.
enum Int8Kernel : int32_t { kInt8Auto = 0, kInt8Rows = 1, kInt8Narrow = 2, kInt8Middle = 3, kInt8Wide = 4 };
int32_t launch_int8_product(const Int8ProductArgs& args, Int8Kernel kernel, Stream stream);

int32_t launch_int8_rows(const Int8ProductArgs& args, Stream stream);                     // any device
int32_t launch_int8_tiles(const Int8ProductArgs& args, Int8Kernel kernel, Stream stream); // sm_80 and later; what does not fit is a smaller tile's
int32_t launch_int8_tiles_75(const Int8ProductArgs& args, Stream stream);

// A legacy product of any strides: out[i, j] = sum_k a[i, k] b[k, j] for every matrix of a batch, as int32, or scaled, rounded and saturated to int8.
struct Int8StridedArgs {
    const int8_t* a;
    const int8_t* b;
    int64_t a_row, a_column, b_row, b_column; // strides, in elements
    int64_t a_batch, b_batch, out_batch;
    int64_t rows, columns, depth, batches;
    void* out;
    int64_t out_row, out_column;
    bool is_int8;
    const float* row_scale; // [rows], or null; for int8
};
int32_t launch_int8_strided(const Int8StridedArgs& args, Stream stream);

// out[M, K] = A[M, N] . dequantised(CB)[N, K], all of dtype.
struct Int8BackwardArgs {
    const void* A;
    const int8_t* CB;
    const float* SCB;
    void* out;
    DType dtype;
    int64_t M, N, K;
};
enum Int8BackwardKernel : int32_t { kInt8BackwardAuto = 0, kInt8BackwardSimple = 1, kInt8BackwardTiles = 2 };
int32_t launch_int8_backward(const Int8BackwardArgs& args, Int8BackwardKernel kernel, Stream stream);
int32_t launch_int8_backward_simple(const Int8BackwardArgs& args, Stream stream); // any device
int32_t launch_int8_backward_tiles(const Int8BackwardArgs& args, Stream stream);  // tensor cores; kUnsupported where it cannot run

} // namespace bnb
