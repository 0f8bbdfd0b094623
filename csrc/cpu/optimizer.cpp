// One step of an optimizer over the blocks of a parameter.
//
// Every byte of gradient, parameter and moments is read once and, save the gradient, written once; what is in between stays in registers and, for
// codes and 16-bit elements, in the first cache. With a limit on the norm of the update the blocks are gone through twice, first without writing.
#include "kernels.h"
#include "optimizer_block.h"

#include "../common/optimizer_algorithms.h"

namespace bnb {
namespace BNB_ISA {
namespace {

// Sums of squares in an order that does not depend on the instruction set: element i goes to sum i % 8, in double precision, where squares of floats
// are exact.
struct SumOfSquares {
    double lanes[8] = {};

    void add(const float* x, int64_t count) {
        int64_t i = 0;
        for (; i + 8 <= count; i += 8)
            for (int lane = 0; lane < 8; ++lane)
                lanes[lane] += double(x[i + lane]) * double(x[i + lane]);
        for (; i < count; ++i)
            lanes[i % 8] += double(x[i]) * double(x[i]);
    }

    double total() const { return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7])); }
};

// Moves the elements of a block.
template <typename Algorithm> struct Stepper {
    static constexpr int kMoments = Algorithm::kMoments;

    Movement<Algorithm> movement;
    F32 scale;
    bool skips_zeros;

    Stepper(const OptimizerScalars& s, float scale) : movement(s), scale(splat(scale)), skips_zeros(s.skips_zeros) {}

    inline void load_moments(const Block& block, int64_t i, F32* moments) const {
        for (int k = 0; k < kMoments; ++k)
            moments[k] = load(block.moments[k] + i);
    }

    // Leaves the bits of the largest magnitudes of the moments in `largest`.
    void step(const Block& block, uint32_t* largest) const {
        I32 most[kMoments];
        for (int k = 0; k < kMoments; ++k)
            most[k] = splat_bits(0);
        for (int64_t i = 0; i < block.count; i += W) {
            F32 moments[kMoments];
            load_moments(block, i, moments);
            const F32 value = load(block.p + i);
            const F32 update = movement.direction(load(block.g + i), value, moments);
            store(block.p + i, movement.moved(value, update, scale));
            for (int k = 0; k < kMoments; ++k) {
                store(block.moments[k] + i, moments[k]);
                most[k] = max_bits(most[k], magnitude_bits(moments[k]));
            }
        }
        for (int k = 0; k < kMoments; ++k)
            largest[k] = reduce_max_bits(most[k]);
    }

    // Leaves elements alone whose gradient is zero. False: all of them.
    bool step_touched(const Block& block) const {
        I32 any = splat_bits(0);
        for (int64_t i = 0; i < block.count; i += W) {
            F32 moments[kMoments];
            load_moments(block, i, moments);
            const F32 raw = load(block.g + i), value = load(block.p + i);
            const Mask touched = differ(raw, splat(0.0f));
            const F32 update = movement.direction(raw, value, moments);
            store(block.p + i, select(touched, movement.moved(value, update, scale), value));
            for (int k = 0; k < kMoments; ++k)
                store(block.moments[k] + i, select(touched, moments[k], load(block.moments[k] + i)));
            any = select(touched, splat_bits(1), any);
        }
        return reduce_max_bits(any) != 0;
    }

    void measure(const Block& block, float* updates) const {
        for (int64_t i = 0; i < block.count; i += W) {
            F32 moments[kMoments];
            load_moments(block, i, moments);
            const F32 raw = load(block.g + i), zero = splat(0.0f);
            const F32 update = movement.direction(raw, load(block.p + i), moments);
            store(updates + i, skips_zeros ? select(differ(raw, zero), update, zero) : update);
        }
    }
};

// Steps a block. False: it is left as it was.
template <typename Algorithm> BNB_INLINE bool step_block(const Stepper<Algorithm>& stepper, const Block& block, uint32_t* largest) {
    if (stepper.skips_zeros)
        return stepper.step_touched(block);
    stepper.step(block, largest);
    return true;
}

// Two blocks are stepped before the codes of the first are looked for: those wait for the largest of all its elements and its inverse, and a processor
// that has nothing else to do waits with them. With more than two, the memory would be left waiting.
template <typename Algorithm> void step_blocks(const OptimizerArgs& args, const OptimizerTensor& tensor, int64_t first, int64_t last) {
    constexpr int kTogether = 2;
    const Stepper<Algorithm> stepper(args.scalars, tensor.scale);
    const Tables tables(args);
    Workspace works[kTogether];
    for (int64_t index = first; index < last; index += kTogether) {
        const int count = int(last - index < kTogether ? last - index : kTogether);
        Block blocks[kTogether];
        MomentScale scales[kTogether][kMostMoments];
        bool is_stepped[kTogether];
        for (int i = 0; i < count; ++i) {
            const Block block = load_block(args, tables, tensor, index + i, works[i]);
            uint32_t largest[Algorithm::kMoments];
            is_stepped[i] = step_block(stepper, block, largest);
            blocks[i] = block;
            if (!is_stepped[i])
                continue;
            store_parameter(args, tensor, block, works[i]);
            const bool knows_largest = !stepper.skips_zeros && block.count == kBlock; // lanes beyond the end do not count
            if (args.in_8bit)
                measure_moments(args, block, knows_largest ? largest : nullptr, scales[i]);
            else
                store_floats(args, tensor, block, works[i]);
        }
        for (int i = 0; args.in_8bit && i < count; ++i)
            if (is_stepped[i])
                store_codes(args, tensor, index + i, blocks[i], scales[i]);
    }
}

template <typename Algorithm>
void measure_blocks(const OptimizerArgs& args, const OptimizerTensor& tensor, int64_t first, int64_t last, OptimizerSquares* squares) {
    const Stepper<Algorithm> stepper(args.scalars, 1.0f);
    const Tables tables(args);
    Workspace work;
    for (int64_t index = first; index < last; ++squares) {
        SumOfSquares update, p;
        for (const int64_t end = last - index < kBlocksPerChunk ? last : index + kBlocksPerChunk; index < end; ++index) {
            const Block block = load_block(args, tables, tensor, index, work);
            stepper.measure(block, work.update);
            update.add(work.update, block.count);
            p.add(block.p, block.count);
        }
        *squares = {update.total(), p.total()};
    }
}

} // namespace

void optimizer_step(const OptimizerArgs& args, const OptimizerTensor& tensor, int64_t first, int64_t last) {
    with_algorithm(args.variant, [&](auto* algorithm) { step_blocks<std::remove_pointer_t<decltype(algorithm)>>(args, tensor, first, last); });
}

void optimizer_measure(const OptimizerArgs& args, const OptimizerTensor& tensor, int64_t first, int64_t last, OptimizerSquares* squares) {
    with_algorithm(args.variant,
                   [&](auto* algorithm) { measure_blocks<std::remove_pointer_t<decltype(algorithm)>>(args, tensor, first, last, squares); });
}

} // namespace BNB_ISA
} // namespace bnb
