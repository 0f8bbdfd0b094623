// Compiler differences, in one place.
#pragma once

// BNB_HD: a function for the host and, under CUDA or HIP, the device. It is `static` on purpose: the CPU kernels are compiled once for each
// instruction set, and a shared (weak) copy built with AVX-512 could otherwise be linked into the code that runs on every machine.
#if defined(__CUDACC__) || defined(__HIPCC__)
#define BNB_HD static __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define BNB_HD static __forceinline
#else
#define BNB_HD static inline __attribute__((always_inline))
#endif

// BNB_MEMBER: the same for members of a class, which are inlined by the compiler's judgement on the host.
#if defined(__CUDACC__) || defined(__HIPCC__)
#define BNB_MEMBER __host__ __device__ __forceinline__
#else
#define BNB_MEMBER inline
#endif

// BNB_API: a C function that the library exports; everything else is hidden.
#if defined(_WIN32)
#define BNB_API extern "C" __declspec(dllexport)
#else
#define BNB_API extern "C" __attribute__((visibility("default")))
#endif
