// Which set of kernels this process runs.
#pragma once

#include "kernels.h"

namespace bnb {

// The kernels in use: the best set of this machine, or a lower one that the environment variable BNB_CPU_ISA names.
const KernelTable& kernels();

// The set of that name, or null when this machine or this build cannot run it.
const KernelTable* find_kernels(const char* name);

void use_kernels(const KernelTable& table);

} // namespace bnb
