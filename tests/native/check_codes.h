// Checks of block-wise quantisation: every byte and every scale is as the model says.
#pragma once

#include "models.h"

namespace driver {

inline void check_4bit_case(const Library& lib, Random& random, int64_t n, int64_t blocksize, int quant_type, int dtype, Kind kind) {
    const Elements x = elements(random, n, dtype, kind);
    Buffer<float> absmax(blocks_of(n, blocksize));
    Buffer<uint8_t> packed((n + 1) / 2);
    const int32_t status = lib.cpu_quantize_4bit(x.data(), dtype, n, blocksize, quant_type, absmax.data(), packed.data(), 0);
    long wrong = status != 0 || !packed.guard_is_whole() || !absmax.guard_is_whole();
    for (int64_t begin = 0; begin < n; begin += blocksize) {
        const int64_t end = std::min(n, begin + blocksize);
        const float largest = absmax_of(x, begin, end);
        wrong += !same(absmax[begin / blocksize], largest);
        for (int64_t i = begin; i < end; ++i)
            wrong += nibble(packed.data(), i) != code_4bit(scaled(x[i], largest), quant_type);
    }
    wrong += n % 2 != 0 && nibble(packed.data(), n) != zero_code(quant_type);
    expect(wrong == 0, "quantize_4bit: %ld wrong, n %ld, blocksize %ld, type %d, %s, kind %d", wrong, long(n), long(blocksize), quant_type,
           kDTypeNames[dtype], kind);

    Elements back(n, dtype);
    wrong = lib.cpu_dequantize_4bit(packed.data(), absmax.data(), n, blocksize, quant_type, dtype, back.data(), 0) != 0;
    for (int64_t i = 0; i < n; ++i)
        wrong += !same(back[i], as_dtype(level_4bit(nibble(packed.data(), i), quant_type) * absmax[i / blocksize], dtype));
    expect(wrong == 0 && back.bytes.guard_is_whole(), "dequantize_4bit: %ld wrong, n %ld, blocksize %ld, type %d, %s, kind %d", wrong, long(n),
           long(blocksize), quant_type, kDTypeNames[dtype], kind);
}

inline void check_8bit_case(const Library& lib, Random& random, int64_t n, int64_t blocksize, int dtype, Kind kind) {
    const std::vector<float> table = code_table(random.below(2) != 0);
    const Elements x = elements(random, n, dtype, kind);
    Buffer<float> absmax(blocks_of(n, blocksize));
    Buffer<uint8_t> codes(n);
    long wrong = lib.cpu_quantize_blockwise(table.data(), x.data(), dtype, n, blocksize, absmax.data(), codes.data(), 0) != 0;
    wrong += !codes.guard_is_whole() || !absmax.guard_is_whole();
    for (int64_t begin = 0; begin < n; begin += blocksize) {
        const int64_t end = std::min(n, begin + blocksize);
        const float largest = absmax_of(x, begin, end);
        wrong += !same(absmax[begin / blocksize], largest);
        for (int64_t i = begin; i < end; ++i)
            wrong += codes[i] != code_8bit(scaled(x[i], largest), table.data());
    }
    expect(wrong == 0, "quantize_blockwise: %ld wrong, n %ld, blocksize %ld, %s, kind %d", wrong, long(n), long(blocksize), kDTypeNames[dtype], kind);

    Elements back(n, dtype);
    wrong = lib.cpu_dequantize_blockwise(table.data(), codes.data(), absmax.data(), n, blocksize, dtype, back.data(), 0) != 0;
    for (int64_t i = 0; i < n; ++i)
        wrong += !same(back[i], as_dtype(table[codes[i]] * absmax[i / blocksize], dtype));
    expect(wrong == 0 && back.bytes.guard_is_whole(), "dequantize_blockwise: %ld wrong, n %ld, blocksize %ld, %s, kind %d", wrong, long(n),
           long(blocksize), kDTypeNames[dtype], kind);
}

inline void check_codes(const Library& lib, Random& random) {
    const int64_t blocksizes[] = {32, 64, 128, 256, 512, 1024, 2048, 4096, 1, 7, 63, 1000};
    const int64_t sizes[] = {0, 1, 2, 15, 31, 33, 64, 65, 255, 257, 1000, 4097, 5003};
    for (const int64_t n : sizes)
        for (const int dtype : kDTypes)
            for (int kind = 0; kind < kKinds; ++kind) {
                const int64_t blocksize = blocksizes[random.below(12)];
                for (const int quant_type : kQuantTypes)
                    check_4bit_case(lib, random, n, blocksize, quant_type, dtype, Kind(kind));
                check_8bit_case(lib, random, n, blocksize, dtype, Kind(kind));
            }
    for (const int dtype : kDTypes) { // enough for several threads and for tables made from the codes
        check_4bit_case(lib, random, 150001, 64, 2, dtype, kNormal);
        check_8bit_case(lib, random, 150001, 256, dtype, kNormal);
    }
}

inline void check_bad_codes(const Library& lib) {
    const float nan = NAN;
    for (const float bad : {nan, -5.0f}) {
        std::vector<float> table = code_table(true);
        table[100] = bad;
        Buffer<float> x(10), absmax(1);
        Buffer<uint8_t> codes(10);
        const int32_t status = lib.cpu_quantize_blockwise(table.data(), x.data(), 0, 10, 64, absmax.data(), codes.data(), 1);
        expect(status != 0 && codes.is_untouched() && absmax.is_untouched(), "quantize_blockwise takes a table that is not ascending");
    }
}

} // namespace driver
