// What the processor and the operating system allow, one predicate for each set of kernels.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#elif defined(_M_X64)
#include <immintrin.h>
#include <intrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace bnb {

inline bool cpu_runs_scalar() { return true; }

#if defined(__aarch64__) || defined(_M_ARM64)

inline bool cpu_runs_neon() { return true; }

#if defined(__linux__)
inline bool cpu_runs_neondot() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
#elif defined(__APPLE__)
inline bool cpu_runs_neondot() { return true; } // every 64-bit ARM processor of a Mac
#else
inline bool cpu_runs_neondot() { return false; }
#endif

inline bool cpu_has_avx512f() { return false; }
inline bool cpu_has_avx512bf16() { return false; }

#elif defined(__x86_64__) && defined(__GNUC__)

// Not every compiler's built-in knows the half-precision conversions.
inline bool cpu_has_f16c() {
    unsigned eax, ebx, ecx = 0, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && ((ecx >> 29) & 1);
}

// The built-in also asks whether the system saves the wide registers.
inline bool cpu_runs_avx2() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpu_has_f16c();
}

inline bool cpu_has_avx512f() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f");
}

inline bool cpu_runs_avx512() {
    return cpu_runs_avx2() && cpu_has_avx512f() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}

inline bool cpu_runs_avx512vnni() { return cpu_runs_avx512() && __builtin_cpu_supports("avx512vnni"); }

inline bool cpu_has_avx512bf16() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16");
}

// These kernels use VBMI as well, which all but one of the processors with BF16 have. That one, Cooper Lake, runs avx512vnni.
inline bool cpu_runs_avx512bf16() { return cpu_runs_avx512vnni() && cpu_has_avx512bf16() && __builtin_cpu_supports("avx512vbmi"); }

#elif defined(_M_X64)

inline bool cpuid_bit(int leaf, int subleaf, int reg, int bit) {
    int highest[4], info[4];
    __cpuid(highest, 0);
    if (leaf > highest[0])
        return false;
    __cpuidex(info, leaf, subleaf);
    return (info[reg] >> bit) & 1;
}

inline bool system_saves(unsigned long long registers) { // bits of XCR0
    return cpuid_bit(1, 0, 2, 27) && (_xgetbv(0) & registers) == registers;
}

inline bool cpu_runs_avx2() { return system_saves(0x06) && cpuid_bit(7, 0, 1, 5) && cpuid_bit(1, 0, 2, 12) && cpuid_bit(1, 0, 2, 29); }

inline bool cpu_has_avx512f() { return system_saves(0xe6) && cpuid_bit(7, 0, 1, 16); }

inline bool cpu_runs_avx512() {
    return cpu_runs_avx2() && cpu_has_avx512f() && cpuid_bit(7, 0, 1, 30) && cpuid_bit(7, 0, 1, 17) && cpuid_bit(7, 0, 1, 31);
}

inline bool cpu_has_avx512bf16() { return system_saves(0xe6) && cpuid_bit(7, 1, 0, 5); }
inline bool cpu_runs_avx512vnni() { return cpu_runs_avx512() && cpuid_bit(7, 0, 2, 11); }
inline bool cpu_runs_avx512bf16() { return cpu_runs_avx512vnni() && cpu_has_avx512bf16() && cpuid_bit(7, 0, 2, 1); } // and VBMI

#else

inline bool cpu_has_avx512f() { return false; }
inline bool cpu_has_avx512bf16() { return false; }

#endif

} // namespace bnb
