#include "dispatch.h"

#include "cpu_features.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace bnb {

// BNB_CPU_SETS lists the sets of this build, lowest first, as X(scalar) X(avx2) ...
#define X(name)                                                                                                                                      \
    namespace name {                                                                                                                                 \
    extern const KernelTable kernel_table;                                                                                                           \
    }
BNB_CPU_SETS
#undef X

namespace {

struct Set {
    const KernelTable* table;
    bool (*supported)();
};

#define X(name) Set{&name::kernel_table, cpu_runs_##name},
const Set sets[] = {BNB_CPU_SETS};
#undef X

const int set_count = int(sizeof sets / sizeof sets[0]);

// Sets are ordered: a limit names the highest that may be used. An unknown name limits nothing.
int highest_allowed(const char* limit) {
    for (int i = 0; limit != nullptr && i < set_count; ++i)
        if (strcmp(sets[i].table->name, limit) == 0)
            return i;
    return set_count - 1;
}

const KernelTable* best_kernels() {
    for (int i = highest_allowed(getenv("BNB_CPU_ISA")); i > 0; --i)
        if (sets[i].supported())
            return sets[i].table;
    return sets[0].table;
}

std::atomic<const KernelTable*>& current() {
    static std::atomic<const KernelTable*> table{best_kernels()};
    return table;
}

} // namespace

const KernelTable& kernels() { return *current().load(std::memory_order_acquire); }

const KernelTable* find_kernels(const char* name) {
    for (const Set& set : sets)
        if (name != nullptr && strcmp(set.table->name, name) == 0)
            return set.supported() ? set.table : nullptr;
    return nullptr;
}

void use_kernels(const KernelTable& table) { current().store(&table, std::memory_order_release); }

} // namespace bnb
