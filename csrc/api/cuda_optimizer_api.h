// The C interface to optimizers and paged memory on the GPU; see cuda_api.h for what all its functions share.
#pragma once

#include "../common/macros.h"
#include "../common/optimizer.h"

#include <cstdint>

// Steps the parameters in as few launches as their table takes. The structures and the arrays in `tensors` are on the host and may change once the
// call has returned; what the arrays point to, the qmaps and update_norms are on the device. That qmaps are ascending is not checked: others give
// states without meaning. With a limit on the norm the workspace, 8-byte aligned memory of the device, must have bnb_cuda_optimizer_workspace()
// bytes.
BNB_API int32_t bnb_cuda_optimizer_step(const bnb::OptimizerTensors* tensors, const bnb::OptimizerSettings* settings, void* workspace,
                                        int64_t workspace_bytes, int32_t device, void* stream);
BNB_API int64_t bnb_cuda_optimizer_workspace(const bnb::OptimizerTensors* tensors);

// Starts moving managed memory to the GPU `to`, or to the host if it is negative. Does nothing where pages cannot move on their own.
BNB_API int32_t bnb_cuda_prefetch_managed(void* p, int64_t bytes, int32_t to, int32_t device, void* stream);

// Gives back what cget_managed_ptr returned.
BNB_API int32_t bnb_cuda_free_managed(void* p);
