// Optimizer steps with moments in 8 bits.
#include "optimizer_launch.h"

int32_t bnb::launch_optimizer_step_8bit(const OptimizerLaunch& job, Stream stream) { return gpu::launch_optimizer<true>(job, stream); }
