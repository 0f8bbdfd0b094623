// Checks every function of the native CPU library against simple models, without Python: driver LIBRARY [OPENMP_LIBRARY] [--set NAME]...
//
// For machines that Python with PyTorch does not run on at a bearable speed (other processors, emulated) and for builds with sanitisers. Each
// instruction set that this machine can run is checked, or those that are named. Buffers end at unmapped pages, so reading or writing behind one ends
// the program.
#include "check_codes.h"
#include "check_optimizers.h"
#include "check_products.h"

namespace driver {

constexpr const char* kSets[] = {"scalar", "neon", "neondot", "avx2", "avx512", "avx512vnni", "avx512bf16"};
constexpr int kBadDTypes[] = {-1, 3, 1 << 30};
constexpr int64_t kMin = INT64_MIN, kMax = INT64_MAX;

// Arguments that cannot be right are refused before anything is read or written.
void check_refusals(const Library& lib) {
    Buffer<float> a(256), scales(4);
    Buffer<uint8_t> out(256);
    const float* none = nullptr;
    const auto refused = [&](int32_t status, const char* what) {
        expect(status != 0 && out.is_untouched() && scales.is_untouched(), "%s is accepted", what);
        expect(lib.status_message(status)[0] != '\0', "%s has no message", what);
    };
    for (const int dtype : kBadDTypes) {
        refused(lib.cpu_quantize_4bit(a.data(), dtype, 64, 64, 2, scales.data(), out.data(), 1), "a dtype that is none, to quantize_4bit");
        refused(lib.cpu_dequantize_4bit(out.data(), a.data(), 64, 64, 2, dtype, out.data(), 1), "a dtype that is none, to dequantize_4bit");
        refused(lib.cpu_int8_linear_backward(a.data(), nullptr, a.data(), out.data(), 1, 1, 1, dtype, 1), "a dtype that is none, to int8");
    }
    for (const int type : {-1, 0, 3})
        refused(lib.cpu_quantize_4bit(a.data(), 0, 64, 64, type, scales.data(), out.data(), 1), "a type that is none");
    for (const int64_t n : {int64_t(-1), kMin, kMax}) {
        refused(lib.cpu_quantize_4bit(a.data(), 0, n, 64, 2, scales.data(), out.data(), 1), "a size out of range, to quantize_4bit");
        refused(lib.cpu_quantize_blockwise(a.data(), a.data(), 0, n, 64, scales.data(), out.data(), 1), "a size out of range, to quantize_blockwise");
        refused(lib.cpu_int8_matmul(nullptr, nullptr, nullptr, n, 4, 4, 1), "a size out of range, to int8_matmul");
        refused(lib.cpu_gemm_4bit(a.data(), out.data(), a.data(), nullptr, none, none, none, out.data(), 4, n, 4, 64, 2, 0, 1),
                "a size out of range");
    }
    const int64_t large = int64_t(1) << 40;
    refused(lib.cpu_gemm_4bit(a.data(), out.data(), a.data(), nullptr, none, none, none, out.data(), 1, large, large, 64, 2, 0, 1), "an overflow");
    refused(lib.cpu_int8_dequantize(nullptr, nullptr, large, large, nullptr, 1), "an overflow of rows times columns");
    for (const int64_t blocksize : {int64_t(0), int64_t(-64), kMin})
        refused(lib.cpu_quantize_4bit(a.data(), 0, 64, blocksize, 2, scales.data(), out.data(), 1), "a blocksize out of range");
    refused(lib.cpu_quantize_4bit(nullptr, 0, 64, 64, 2, scales.data(), out.data(), 1), "no input");
    refused(lib.cpu_quantize_4bit(a.data(), 0, 64, 64, 2, nullptr, out.data(), 1), "no scales");
    refused(lib.cpu_quantize_4bit(a.data(), 0, 64, 64, 2, scales.data(), out.data(), -1), "a negative number of threads");
    refused(lib.cpu_gemm_4bit(a.data(), out.data(), a.data(), out.data(), none, none, none, out.data(), 1, 1, 1, 64, 2, 0, 1), "half a nesting");
    const int64_t beyond = 7;
    refused(lib.cpu_int8_scaled_mm(reinterpret_cast<int8_t*>(a.data()), reinterpret_cast<int8_t*>(a.data()), a.data(), a.data(), a.data(), &beyond, 1,
                                   none, out.data(), 1, 1, 4, 0, 1),
            "an outlier column beyond the last");
    refused(lib.cpu_optimizer_step(nullptr, nullptr, 1), "no optimizer");
    bnb::OptimizerSettings settings{};
    bnb::OptimizerTensors tensors{};
    tensors.count = 1;
    refused(lib.cpu_optimizer_step(&tensors, &settings, 1), "a step that is not counted from 1");
    settings.step = 1;
    refused(lib.cpu_optimizer_step(&tensors, &settings, 1), "a parameter that is nowhere");
}

void check_set(const Library& lib, const char* name) {
    const Count before = count();
    Random random(2026);
    expect(lib.cpu_select_isa(name) == 0 && strcmp(lib.cpu_isa(), name) == 0, "%s cannot be selected", name);
    check_codes(lib, random);
    check_bad_codes(lib);
    check_products(lib, random);
    check_optimizers(lib, random);
    check_refusals(lib);
    printf("%-12s %ld checks passed, %ld failed\n", name, count().passed - before.passed, count().failed - before.failed);
    fflush(stdout);
}

// The names that other projects call.
void check_legacy(const Library& lib) {
    void (*dequantize)(uint8_t*, const float*, void*, long long, long long, long long);
    lib.find(dequantize, "cdequantize_blockwise_cpu_nf4_fp32");
    Random random(7);
    const Shape shape{1, 32, 64};
    Weight4bit w(random, shape, 64, 2, false);
    Buffer<float> out(shape.N * shape.K);
    dequantize(w.packed.data(), w.absmax.data(), out.data(), 64, shape.N, shape.K);
    expect(std::equal(w.dense.begin(), w.dense.end(), out.data()), "cdequantize_blockwise_cpu_nf4_fp32 is wrong");
    dequantize(w.packed.data(), w.absmax.data(), out.data(), 64, -1, kMin);
    expect(std::equal(w.dense.begin(), w.dense.end(), out.data()), "cdequantize_blockwise_cpu_nf4_fp32 takes negative sizes");
}

} // namespace driver

using namespace driver;

int main(int argc, char** argv) {
    std::vector<const char*> paths, named;
    for (int i = 1; i < argc; ++i) {
        if (strcmp(argv[i], "--set") == 0 && i + 1 < argc)
            named.push_back(argv[++i]);
        else
            paths.push_back(argv[i]);
    }
    if (paths.empty() || paths.size() > 2) {
        fprintf(stderr, "usage: driver LIBRARY [OPENMP_LIBRARY] [--set NAME]...\n");
        return 2;
    }
    if (paths.size() == 2 && dlopen(paths[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
        fprintf(stderr, "%s\n", dlerror());
        return 2;
    }
    const Library lib(paths[0]);
    printf("%s, best set %s\n", paths[0], lib.cpu_isa());
    const std::vector<const char*> all(std::begin(kSets), std::end(kSets));
    for (const char* name : named.empty() ? all : named) {
        if (lib.cpu_isa_supported(name))
            check_set(lib, name);
        else
            expect(lib.cpu_select_isa(name) != 0 && named.empty(), "%s is not supported here", name);
    }
    check_legacy(lib);
    const char* openmp = lib.cpu_openmp_library();
    printf("threads: %s\n%ld passed, %ld failed\n", openmp[0] != '\0' ? openmp : "one", count().passed, count().failed);
    return count().failed == 0 && count().passed > 0 ? 0 : 1;
}
