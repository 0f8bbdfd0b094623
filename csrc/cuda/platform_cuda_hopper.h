// The vocabulary of hopper.h on NVIDIA GPUs: PTX of sm_90a.
#pragma once

#include <cuda.h> // types of tensor maps only: the library is not linked to the driver's

namespace bnb {

// ------------------------------------------------------------------------------------------------------------------------- barriers
__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;\n" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier, bool wanted = true) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %1, 0;\n@p mbarrier.arrive.shared::cta.b64 _, [%0];\n}\n" ::"r"(shared_address(barrier)),
                 "r"(uint32_t(wanted))
                 : "memory");
}

__device__ __forceinline__ void barrier_arrive_expecting(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
    uint32_t has_ended;
    do { // each attempt sleeps for a while
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
                     : "=r"(has_ended)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
    } while (!has_ended);
}

// --------------------------------------------------------------------------------------------------------------------------- copies
struct TensorMap {
    CUtensorMap map;
};

__device__ __forceinline__ void copy_tile(void* shared, const TensorMap& map, int x, int y, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];\n" ::"r"(shared_address(shared)),
        "l"(&map.map), "r"(x), "r"(y), "r"(shared_address(barrier))
        : "memory");
}

// The driver's function is looked up at run time. kUnsupported: there is none, or it does not take this matrix.
inline int32_t make_tensor_map(TensorMap& result, const void* matrix, int bytes_of_element, int64_t columns, int64_t rows, int box_columns,
                               int box_rows, Swizzle swizzle) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
        const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
        const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
        return check_device(error) == kOk && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
    }();
    if (encode == nullptr)
        return kUnsupported;
    const CUtensorMapDataType type = bytes_of_element == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
    const CUtensorMapSwizzle pattern = swizzle == Swizzle::k32Bytes   ? CU_TENSOR_MAP_SWIZZLE_32B
                                       : swizzle == Swizzle::k64Bytes ? CU_TENSOR_MAP_SWIZZLE_64B
                                                                      : CU_TENSOR_MAP_SWIZZLE_128B;
    const cuuint64_t size[] = {cuuint64_t(columns), cuuint64_t(rows)}, pitch[] = {cuuint64_t(columns) * cuuint64_t(bytes_of_element)};
    const cuuint32_t box[] = {cuuint32_t(box_columns), cuuint32_t(box_rows)}, steps[] = {1, 1};
    const CUresult status = encode(&result.map, type, 2, const_cast<void*>(matrix), size, pitch, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, pattern,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return status == CUDA_SUCCESS ? int32_t(kOk) : int32_t(kUnsupported);
}

// ----------------------------------------------------------------------------------------------------------------------- registers
template <int count> __device__ __forceinline__ void keep_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(count)); }
template <int count> __device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(count)); }

// ------------------------------------------------------------------------------------------------------------------------ products
__device__ __forceinline__ void group_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int groups_left> __device__ __forceinline__ void group_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(groups_left) : "memory");
}

__device__ __forceinline__ void settle(float& value) { asm volatile("" : "+f"(value)::"memory"); }
__device__ __forceinline__ void settle(uint32_t& value) { asm volatile("" : "+r"(value)::"memory"); }
template <typename Value, int count> __device__ __forceinline__ void settle(Value (&registers)[count]) {
#pragma unroll
    for (int i = 0; i < count; ++i)
        settle(registers[i]);
}

// Names of the registers of d, and the registers themselves.
#define BNB_NAMES_32                                                                                                                                 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, "             \
    "%28, %29, %30, %31"
#define BNB_NAMES_64                                                                                                                                 \
    BNB_NAMES_32                                                                                                                                     \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, "           \
    "%58, %59, %60, %61, %62, %63"
#define BNB_NAMES_128                                                                                                                                \
    BNB_NAMES_64                                                                                                                                     \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, "           \
    "%90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, "               \
    "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define BNB_SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define BNB_SUMS_16(i) BNB_SUMS_4(i), BNB_SUMS_4(i + 4), BNB_SUMS_4(i + 8), BNB_SUMS_4(i + 12)
#define BNB_SUMS_32(i) BNB_SUMS_16(i), BNB_SUMS_16(i + 16)
#define BNB_SUMS_64(i) BNB_SUMS_32(i), BNB_SUMS_32(i + 32)
#define BNB_SUMS_128(i) BNB_SUMS_64(i), BNB_SUMS_64(i + 64)

template <typename T, int count> struct GroupProduct;

// One instruction: its width, the name of its type, the number of registers of d, and the names of a's and of b.
#define BNB_GROUP_PRODUCT(T, type, width, count, a0, a1, a2, a3, b_name)                                                                             \
    template <> struct GroupProduct<T, count> {                                                                                                      \
        static __device__ __forceinline__ void run(float (&d)[count], const uint32_t (&a)[4], uint64_t b) {                                          \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #width "k16.f32." #type "." #type " {" BNB_NAMES_##count                                \
                         "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b_name ", 1, 1, 1, 0;\n"                                                            \
                         : BNB_SUMS_##count(0)                                                                                                       \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                                      \
        }                                                                                                                                            \
    }

BNB_GROUP_PRODUCT(Half, f16, 64, 32, "%32", "%33", "%34", "%35", "%36");
BNB_GROUP_PRODUCT(Half, f16, 128, 64, "%64", "%65", "%66", "%67", "%68");
BNB_GROUP_PRODUCT(Half, f16, 256, 128, "%128", "%129", "%130", "%131", "%132");
BNB_GROUP_PRODUCT(BFloat16, bf16, 64, 32, "%32", "%33", "%34", "%35", "%36");
BNB_GROUP_PRODUCT(BFloat16, bf16, 128, 64, "%64", "%65", "%66", "%67", "%68");
BNB_GROUP_PRODUCT(BFloat16, bf16, 256, 128, "%128", "%129", "%130", "%131", "%132");

#undef BNB_NAMES_32
#undef BNB_NAMES_64
#undef BNB_NAMES_128
#undef BNB_SUMS_4
#undef BNB_SUMS_16
#undef BNB_SUMS_32
#undef BNB_SUMS_64
#undef BNB_SUMS_128
#undef BNB_GROUP_PRODUCT

template <typename T, int count> __device__ __forceinline__ void group_multiply(float (&d)[count], const uint32_t (&a)[4], uint64_t b) {
    GroupProduct<T, count>::run(d, a, b);
}

} // namespace bnb
