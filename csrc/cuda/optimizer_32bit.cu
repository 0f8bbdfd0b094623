// Optimizer steps with moments in fp32.
#include "optimizer_launch.h"

int32_t bnb::launch_optimizer_step_32bit(const OptimizerLaunch& job, Stream stream) { return gpu::launch_optimizer<false>(job, stream); }
