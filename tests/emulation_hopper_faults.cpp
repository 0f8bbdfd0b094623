// One product of a warp group that is right, and the same wrong in the ways that the emulation must notice. The first argument names one.
#include "../csrc/cuda/hopper.h"

#include <cstdio>
#include <cstdlib>
#include <string>

using namespace bnb;

namespace {

constexpr int kTokens = 64, kColumns = 64;
std::string fault;
bool is(const char* name) { return fault == name; }

// d[64, tokens] = a[64, 16] . x[tokens, columns 16..31]^T with a[r, k] = r + k, computed by 128 threads.
__global__ void multiply(const TensorMap map, float* result) {
    uint64_t& barrier = shared_variable<uint64_t>();
    unsigned char* tile = dynamic_shared_memory();
    if (threadIdx.x == 0) {
        if (!is("no_barrier"))
            barrier_init(&barrier, is("too_few_arrivals") ? 3 : 2);
        if (!is("no_barrier_fence"))
            fence_barrier_init();
        barrier_arrive_expecting(&barrier, kTokens * 128 + (is("other_bytes") ? 16 : 0));
        copy_tile(tile + (is("misaligned_tile") ? 64 : 0), map, 0, 0, &barrier);
        barrier_arrive(&barrier);
        if (is("too_many_arrivals"))
            barrier_arrive(&barrier), barrier_arrive(&barrier), barrier_arrive(&barrier);
    }
    __syncthreads();
    if (!is("no_wait_for_copy"))
        barrier_wait(&barrier, 0);
    const int own = int(threadIdx.x), row = own / 32 * 16 + own % 32 / 4, column = own % 4 * 2;
    uint32_t a[4];
    float d[kTokens / 2] = {};
    uint64_t operand = describe_operand(tile) + 2;
    if (is("other_stride"))
        operand ^= uint64_t(1) << 32;
    if (is("other_bits"))
        operand |= uint64_t(1) << 46;
    if (is("operand_outside"))
        operand += kTokens * 128 / 16;
    for (int repeat = 0; repeat < (is("no_second_fence") ? 2 : 1); ++repeat) {
        for (int i = 0; i < 4; ++i) {
            const int first = row + i % 2 * 8 + column + i / 2 * 8 + repeat;
            a[i] = narrow_pair<Half>(float(first), float(first + 1));
        }
        if (repeat == 0 && !is("no_fence"))
            group_fence();
        if (!is("some_threads") || own < 96)
            group_multiply<Half>(d, a, is("different_operands") && own == 5 ? operand + 2 : operand);
        if (!is("no_commit"))
            group_commit();
        if (is("touched_registers"))
            a[0] = 0;
        if (is("touched_sums"))
            d[3] = 0;
        if (is("touched_memory") && own == 7)
            tile[40 * 128 + 32] ^= 1;
        if (!is("no_wait"))
            group_wait<0>();
    }
    for (int i = 0; i < kTokens / 2; ++i)
        result[(row + i / 2 % 2 * 8) * kTokens + i / 4 * 8 + column + i % 2] = d[i];
}

} // namespace

int main(int, char** arguments) {
    fault = arguments[1];
    static Half x[kTokens][kColumns];
    static float result[64][kTokens], expected[64][kTokens];
    for (int token = 0; token < kTokens; ++token)
        for (int column = 0; column < kColumns; ++column)
            x[token][column] = from_float<Half>(float((token * 5 + column * 3) % 17 - 8));
    for (int row = 0; row < 64; ++row)
        for (int token = 0; token < kTokens; ++token)
            for (int k = 0; k < 16; ++k)
                expected[row][token] += float(row + k) * to_float(x[token][16 + k]);
    TensorMap map;
    if (make_tensor_map(map, x, 2, kColumns, kTokens, kColumns, kTokens, is("narrow_swizzle") ? Swizzle::k64Bytes : Swizzle::k128Bytes) != kOk)
        return 5;
    if (launch(multiply, dim3(1), dim3(128), kTokens * 128, nullptr, map, &result[0][0]) != kOk)
        return 6;
    int wrong = 0;
    for (int row = 0; row < 64; ++row)
        for (int token = 0; token < kTokens; ++token)
            wrong += !(result[row][token] == expected[row][token]);
    printf("%d\n", wrong);
    return 0;
}
