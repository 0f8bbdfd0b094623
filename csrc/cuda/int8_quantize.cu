// LLM.int8() outside its product: statistics, codes and outlier columns of activations, and the ways back to floating point.
//
// Rows are quantised by a block each, which reads its row twice: once for the largest magnitudes, once, from a cache, for the codes. With bfloat16
// that moves 3 bytes an element and costs about 20 instructions for 8 elements and pass, so memory is the bound. A thread takes 8 neighbours at a
// turn, which are two groups of four; with a block of a multiple of 8 threads the groups of a thread are of the same two classes at every turn.
//
// A column is an outlier's if any row has one there, so that codes have to wait for the statistics of all rows: two kernels then, and the host waits
// for neither. The second has one block more, which lists the columns for the product.
#include "int8_elements.h"

#include "../common/quantize.h"

namespace bnb {
namespace {

constexpr int kStep = 8;
constexpr int kMostThreads = 1024;
constexpr int kMostWarps = kMostThreads / kWarpSize;
constexpr int64_t kMostBlocks = 1 << 20;

unsigned grid_for(int64_t blocks) { return unsigned(blocks < kMostBlocks ? blocks : kMostBlocks); }

// Long rows are read by more threads, because few of them can be under way at once.
int threads_for(int64_t columns) { return columns >= 8192 ? kMostThreads : 256; }

struct Elements {
    float value[kStep];
};

// Elements from `first` on; zeros beyond `count`.
template <typename T> __device__ __forceinline__ Elements load_elements(const T* x, int64_t first, int64_t count, bool is_vector) {
    Elements e;
    if (is_vector && first + kStep <= count) {
#pragma unroll
        for (int i = 0; i < kStep; i += kPerVector<T>) {
            const auto part = load_vector<kPerVector<T>>(x + first + i);
#pragma unroll
            for (int j = 0; j < kPerVector<T>; ++j)
                e.value[i + j] = widen(part.value[j]);
        }
        return e;
    }
#pragma unroll
    for (int i = 0; i < kStep; ++i)
        e.value[i] = first + i < count ? widen(x[first + i]) : 0.0f;
    return e;
}

template <typename T> __device__ __forceinline__ bool reads_vectors(const T* x) {
    return reinterpret_cast<uintptr_t>(x) % (sizeof(T) * kPerVector<T>) == 0;
}

// ----------------------------------------------------------------------------------------------------------------------------------- statistics
struct RowMaxima {
    uint32_t of_warp[kMostWarps][kInt8Classes];
    uint32_t of_class[kInt8Classes];
};

// The statistics of a row from the largest magnitudes that each thread found in its two classes; the same for all classes if there is only one.
__device__ __forceinline__ void combine_maxima(RowMaxima& shared, uint32_t (&largest)[2], bool has_classes) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int distance = kInt8Classes / 2; distance < kWarpSize; distance *= 2)
            largest[half] = max(largest[half], __shfl_xor_sync(kWholeWarp, largest[half], distance));
        if (lane_index() < kInt8Classes / 2)
            shared.of_warp[warp_index()][2 * lane_index() + half] = largest[half];
    }
    __syncthreads();
    if (warp_index() == 0) {
        const int c = lane_index() % kInt8Classes;
        uint32_t most = 0;
        for (int warp = 0; warp < int(blockDim.x) / kWarpSize; ++warp)
            most = max(most, shared.of_warp[warp][c]);
        if (!has_classes)
#pragma unroll
            for (int distance = kInt8Classes / 2; distance > 0; distance /= 2)
                most = max(most, __shfl_xor_sync(kWholeWarp, most, distance));
        if (lane_index() < kInt8Classes)
            shared.of_class[c] = most;
    }
    __syncthreads();
}

// What is done with the columns of outliers that are found.
enum class Marks { kNone, kSet, kWriteAll };

// The largest magnitudes of this thread's two classes.
template <typename T>
__device__ __forceinline__ void find_largest(const T* x, int64_t columns, float limit, Marks marks, uint8_t* mask, uint32_t (&largest)[2]) {
    const bool is_vector = reads_vectors(x);
    for (int64_t first = int64_t(threadIdx.x) * kStep; first < columns; first += int64_t(blockDim.x) * kStep) {
        const Elements e = load_elements(x, first, columns, is_vector);
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
            const bool is_outlier = magnitude(e.value[i]) > limit;
            largest[i / 4] = max(largest[i / 4], is_outlier ? 0u : magnitude_bits(e.value[i]));
            if (marks == Marks::kWriteAll ? first + i < columns : marks == Marks::kSet && is_outlier)
                mask[first + i] = is_outlier;
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------- codes
template <typename T>
__device__ __forceinline__ void write_codes(const T* x, int64_t columns, float limit, const uint8_t* mask, const float (&inverse)[2], int8_t* codes) {
    const bool is_vector = reads_vectors(x), writes_vectors = reinterpret_cast<uintptr_t>(codes) % kStep == 0;
    for (int64_t first = int64_t(threadIdx.x) * kStep; first < columns; first += int64_t(blockDim.x) * kStep) {
        const Elements e = load_elements(x, first, columns, is_vector);
        Vector<int8_t, kStep> code;
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
            const bool is_outlier = mask != nullptr ? first + i < columns && mask[first + i] != 0 : magnitude(e.value[i]) > limit;
            code.value[i] = is_outlier ? int8_t(0) : int8_code(e.value[i], inverse[i / 4]);
        }
        if (writes_vectors && first + kStep <= columns)
            store_vector(codes + first, code);
        else
#pragma unroll
            for (int i = 0; i < kStep; ++i)
                if (first + i < columns)
                    codes[first + i] = code.value[i];
    }
}

// ----------------------------------------------------------------------------------------------------------------------- the list of outlier columns
constexpr int kMaskStep = 16;

struct ListCounts {
    int of_warp[kMostWarps];
    int total;
};

// The indices of true bytes in ascending order, by one block: every thread counts its own, and those before it say where they go.
__device__ __forceinline__ void list_columns(const uint8_t* mask, int64_t columns, int64_t* list, int64_t* count) {
    ListCounts& counts = shared_variable<ListCounts>();
    const bool is_vector = reinterpret_cast<uintptr_t>(mask) % kMaskStep == 0;
    int64_t before = 0;
    for (int64_t start = 0; start < columns; start += int64_t(blockDim.x) * kMaskStep) {
        const int64_t first = start + int64_t(threadIdx.x) * kMaskStep;
        Vector<uint8_t, kMaskStep> bytes = {};
        if (is_vector && first + kMaskStep <= columns)
            bytes = load_vector<kMaskStep>(mask + first);
        else
#pragma unroll
            for (int i = 0; i < kMaskStep; ++i)
                bytes.value[i] = first + i < columns ? mask[first + i] : uint8_t(0);
        int own = 0;
#pragma unroll
        for (int i = 0; i < kMaskStep; ++i)
            own += bytes.value[i] != 0;
        int through = own; // of the lanes up to and with this one
#pragma unroll
        for (int distance = 1; distance < kWarpSize; distance *= 2) {
            const int lower = __shfl_up_sync(kWholeWarp, through, distance);
            through += lane_index() >= distance ? lower : 0;
        }
        if (lane_index() == kWarpSize - 1)
            counts.of_warp[warp_index()] = through;
        __syncthreads();
        int64_t place = before + through - own;
        for (int warp = 0; warp < int(blockDim.x) / kWarpSize; ++warp) {
            place += warp < warp_index() ? counts.of_warp[warp] : 0;
            before += counts.of_warp[warp];
        }
        if (own > 0)
#pragma unroll
            for (int i = 0; i < kMaskStep; ++i)
                if (bytes.value[i] != 0)
                    list[place++] = first + i;
        __syncthreads();
    }
    if (threadIdx.x == 0)
        *count = before;
}

// -------------------------------------------------------------------------------------------------------------------------------------- kernels
enum class Pass { kStatistics, kCodes, kBoth };

template <typename T> __global__ void __launch_bounds__(kMostThreads) quantize_rows(Int8QuantizeArgs args, Pass pass) {
    const bool has_classes = args.classes > 1;
    const bool lists = args.outliers.count != nullptr && pass != Pass::kStatistics;
    if (lists && pass == Pass::kCodes && blockIdx.x + 1 == gridDim.x) { // the block more
        list_columns(args.outliers.mask, args.columns, args.outliers.list, args.outliers.count);
        return;
    }
    RowMaxima& maxima = shared_variable<RowMaxima>();
    const int64_t step = int64_t(gridDim.x) - (lists && pass == Pass::kCodes ? 1 : 0);
    const int own_class[2] = {2 * int(threadIdx.x) % kInt8Classes, 2 * int(threadIdx.x) % kInt8Classes + 1};
    for (int64_t row = blockIdx.x; row < args.rows; row += step) {
        const T* x = static_cast<const T*>(args.A) + row * args.columns;
        float* stats = args.stats + row * args.classes;
        float own_stats[2];
        if (pass == Pass::kCodes) {
            own_stats[0] = stats[has_classes ? own_class[0] : 0];
            own_stats[1] = stats[has_classes ? own_class[1] : 0];
        } else {
            const Marks marks = args.outliers.mask == nullptr ? Marks::kNone : pass == Pass::kBoth ? Marks::kWriteAll : Marks::kSet;
            uint32_t largest[2] = {0, 0};
            find_largest(x, args.columns, args.limit, marks, args.outliers.mask, largest);
            combine_maxima(maxima, largest, has_classes);
            if (int(threadIdx.x) < args.classes)
                stats[threadIdx.x] = absmax_from_bits(maxima.of_class[threadIdx.x]);
            own_stats[0] = absmax_from_bits(maxima.of_class[own_class[0]]);
            own_stats[1] = absmax_from_bits(maxima.of_class[own_class[1]]);
        }
        if (pass != Pass::kStatistics) {
            const float inverse[2] = {__fdiv_rn(kInt8Max, own_stats[0]), __fdiv_rn(kInt8Max, own_stats[1])};
            // In one pass the mask is this row's own: its elements say the same without a barrier.
            write_codes(x, args.columns, args.limit, pass == Pass::kCodes ? args.outliers.mask : nullptr, inverse,
                        args.codes + row * args.codes_stride);
        }
        __syncthreads(); // the maxima are of this row until here
    }
    if (lists && pass == Pass::kBoth && blockIdx.x == 0)
        list_columns(args.outliers.mask, args.columns, args.outliers.list, args.outliers.count);
}

constexpr int kClearThreads = 256;

__global__ void __launch_bounds__(kClearThreads) clear_bytes(uint8_t* bytes, int64_t count) {
    for (int64_t i = global_thread(); i < count; i += global_threads())
        bytes[i] = 0;
}

constexpr int kColumnWarps = 8; // share the rows of the columns, of which every lane has one

struct ColumnMaxima {
    uint32_t of_warp[kColumnWarps][kWarpSize];
};

template <typename T> __global__ void __launch_bounds__(kColumnWarps* kWarpSize) quantize_columns(Int8QuantizeArgs args) {
    ColumnMaxima& maxima = shared_variable<ColumnMaxima>();
    for (int64_t first = int64_t(blockIdx.x) * kWarpSize; first < args.columns; first += int64_t(gridDim.x) * kWarpSize) {
        const int64_t column = first + lane_index();
        const bool is_column = column < args.columns;
        const T* x = static_cast<const T*>(args.A) + column;
        uint32_t largest = 0;
        for (int64_t row = warp_index(); row < args.rows && is_column; row += kColumnWarps) {
            const float value = widen(x[row * args.columns]);
            largest = max(largest, magnitude(value) > args.limit ? 0u : magnitude_bits(value));
        }
        maxima.of_warp[warp_index()][lane_index()] = largest;
        __syncthreads();
        for (int warp = 0; warp < kColumnWarps; ++warp)
            largest = max(largest, maxima.of_warp[warp][lane_index()]);
        const float stat = absmax_from_bits(largest), inverse = __fdiv_rn(kInt8Max, stat);
        if (is_column && warp_index() == 0)
            args.stats[column] = stat;
        for (int64_t row = warp_index(); row < args.rows && is_column; row += kColumnWarps) {
            const float value = widen(x[row * args.columns]);
            args.codes[row * args.codes_stride + column] = magnitude(value) > args.limit ? int8_t(0) : int8_code(value, inverse);
        }
        __syncthreads();
    }
}

// -------------------------------------------------------------------------------------------------------------------------- the ways back
constexpr int kBackThreads = 256;
constexpr int kBackStep = 4;

template <typename T> __device__ __forceinline__ void store_step(T* out, const float (&values)[kBackStep], int64_t left, bool is_vector) {
    Vector<T, kBackStep> result;
#pragma unroll
    for (int i = 0; i < kBackStep; ++i)
        result.value[i] = narrow<T>(values[i]);
    if (is_vector && left >= kBackStep)
        store_vector(out, result);
    else
#pragma unroll
        for (int i = 0; i < kBackStep; ++i)
            if (i < left)
                out[i] = result.value[i];
}

template <typename T> __device__ __forceinline__ bool is_step_aligned(const T* p) {
    return reinterpret_cast<uintptr_t>(p) % (sizeof(T) * kBackStep) == 0;
}

// Elements from p on, `left` of which exist.
template <typename T> __device__ __forceinline__ Vector<T, kBackStep> load_step(const T* p, int64_t left, bool is_vector) {
    if (is_vector && left >= kBackStep)
        return load_vector<kBackStep>(p);
    Vector<T, kBackStep> values = {};
#pragma unroll
    for (int i = 0; i < kBackStep; ++i)
        if (i < left)
            values.value[i] = p[i];
    return values;
}

template <typename T> __global__ void __launch_bounds__(kBackThreads) dequantize_rows(Int8DequantizeArgs args) {
    for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
        const int8_t* codes = args.codes + row * args.codes_stride;
        T* out = static_cast<T*>(args.out) + row * args.columns;
        const float stat = args.stats[row];
        const bool reads_vectors = is_step_aligned(codes), writes_vectors = is_step_aligned(out);
        for (int64_t first = int64_t(threadIdx.x) * kBackStep; first < args.columns; first += kBackThreads * kBackStep) {
            const auto code = load_step(codes + first, args.columns - first, reads_vectors);
            float values[kBackStep];
#pragma unroll
            for (int i = 0; i < kBackStep; ++i)
                values[i] = __fmul_rn(__fmul_rn(float(code.value[i]), stat), kPerInt8Code);
            store_step(out + first, values, args.columns - first, writes_vectors);
        }
    }
}

template <typename T> __global__ void __launch_bounds__(kBackThreads) scale_rows(Int8ScaleArgs args) {
    for (int64_t row = blockIdx.x; row < args.M; row += gridDim.x) {
        const int32_t* product = args.product + row * args.N;
        T* out = static_cast<T*>(args.out) + row * args.N;
        const float stat = args.row_stats[row];
        const bool reads_vectors = is_step_aligned(product), writes_vectors = is_step_aligned(out);
        for (int64_t first = int64_t(threadIdx.x) * kBackStep; first < args.N; first += kBackThreads * kBackStep) {
            const auto sums = load_step(product + first, args.N - first, reads_vectors);
            float values[kBackStep] = {};
#pragma unroll
            for (int i = 0; i < kBackStep; ++i) {
                if (first + i >= args.N)
                    continue;
                const float scale = __fmul_rn(stat, args.col_stats[first + i]);
                values[i] = __fmul_rn(__fmul_rn(__int2float_rn(sums.value[i]), scale), kPerInt8Product);
                if (args.bias != nullptr)
                    values[i] = __fadd_rn(values[i], load_float(args.bias, args.bias_dtype, first + i));
            }
            store_step(out + first, values, args.N - first, writes_vectors);
        }
    }
}

int32_t quantize(const Int8QuantizeArgs& args, Pass pass, Stream stream) {
    return with_element_type(args.dtype, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        const bool lists = args.outliers.count != nullptr;
        unsigned blocks = grid_for(args.rows);
        if (lists && (pass == Pass::kCodes || (pass == Pass::kBoth && blocks == 0)))
            ++blocks;
        return blocks == 0 ? int32_t(kOk) : launch(quantize_rows<T>, blocks, threads_for(args.columns), 0, stream, args, pass);
    });
}

} // namespace

int32_t launch_int8_quantize(const Int8QuantizeArgs& args, Stream stream) { return quantize(args, Pass::kBoth, stream); }

int32_t launch_int8_statistics(const Int8QuantizeArgs& args, Stream stream) {
    if (args.outliers.mask != nullptr && args.columns > 0) {
        const unsigned blocks = grid_for(divide_up(args.columns, 4 * kClearThreads));
        const int32_t status = launch(clear_bytes, blocks, kClearThreads, 0, stream, args.outliers.mask, args.columns);
        if (status != kOk)
            return status;
    }
    return quantize(args, Pass::kStatistics, stream);
}

int32_t launch_int8_codes(const Int8QuantizeArgs& args, Stream stream) { return quantize(args, Pass::kCodes, stream); }

int32_t launch_int8_quantize_columns(const Int8QuantizeArgs& args, Stream stream) {
    if (args.columns == 0)
        return kOk;
    return with_element_type(args.dtype, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        return launch(quantize_columns<T>, grid_for(divide_up(args.columns, kWarpSize)), kColumnWarps * kWarpSize, 0, stream, args);
    });
}

int32_t launch_int8_dequantize(const Int8DequantizeArgs& args, Stream stream) {
    if (args.rows == 0 || args.columns == 0)
        return kOk;
    return with_element_type(args.dtype, [&](auto* element) {
        return launch(dequantize_rows<std::remove_pointer_t<decltype(element)>>, grid_for(args.rows), kBackThreads, 0, stream, args);
    });
}

int32_t launch_int8_mm_dequant(const Int8ScaleArgs& args, Stream stream) {
    if (args.M == 0 || args.N == 0)
        return kOk;
    return with_element_type(args.dtype, [&](auto* element) {
        return launch(scale_rows<std::remove_pointer_t<decltype(element)>>, grid_for(args.M), kBackThreads, 0, stream, args);
    });
}

} // namespace bnb
