#include "emulation.h"
#include "../common/macros.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <sys/mman.h>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// Where a whole device is emulated (tests/standin), its memory is closed to all but its kernels.
extern "C" {
__attribute__((weak)) void standin_open();
__attribute__((weak)) void standin_close();
}

namespace bnb {
namespace emulation {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kMostThreads = 1024;
constexpr size_t kStaticSharedLimit = 48 * 1024;
constexpr size_t kMostSharedBytes = 256 * 1024;
constexpr size_t kGap = 256; // between variables in shared memory; must stay as it was filled
constexpr int kPoison = 0xff;

enum class State { kReady, kAtBarrier, kInWarp, kInGroup, kWaiting, kEnded };

struct Copy {
    void* to;
    const void* from;
    int bytes, bytes_of_source;
};

// ------------------------------------------------------------------------------------------------------------------------- switching stacks
#if defined(__x86_64__)
struct Context {
    void* stack_pointer;
};

// Saves the registers that a call preserves, and the place to return to, on this stack; takes those of another.
extern "C" void bnb_emulation_switch(void** save, void* load);
asm(R"(
    .text
    .type bnb_emulation_switch, @function
    .hidden bnb_emulation_switch
    .globl bnb_emulation_switch
bnb_emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size bnb_emulation_switch, . - bnb_emulation_switch
)");

void switch_context(Context& save, Context& load) { bnb_emulation_switch(&save.stack_pointer, load.stack_pointer); }

void prepare_context(Context& context, char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStackBytes) - 1; // an entered function expects its stack 8 bytes off a multiple of 16
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i)
        *--top = nullptr;
    context.stack_pointer = top;
}
#else
struct Context {
    ucontext_t registers;
};

void switch_context(Context& save, Context& load) { swapcontext(&save.registers, &load.registers); }

void prepare_context(Context& context, char* stack, void (*entry)()) {
    getcontext(&context.registers);
    context.registers.uc_stack.ss_sp = stack;
    context.registers.uc_stack.ss_size = kStackBytes;
    makecontext(&context.registers, entry, 0);
}
#endif

// ---------------------------------------------------------------------------------------------------------------------------- the machine
struct Thread {
    Place place;
    Context context;
    State state;
    int barrier_line;
    int votes; // of the barrier it passed last
    uint32_t mask;
    WarpFunction function;
    GroupFunction group_function;
    Part part;
    bool (*is_true)(const void*); // what it waits for
    const void* object;
    const char* what;
    std::vector<Copy> open_copies;
    std::vector<std::vector<Copy>> groups;
};

struct Machine {
    std::mutex lock;
    int capability = 90;
    int built_for = 0; // 0: the capability
    bool reversed = false;

    const std::function<void()>* body = nullptr;
    Context scheduler;
    Thread* running = nullptr;
    Thread threads[kMostThreads];
    char* stacks = nullptr;
    int count = 0, at_barrier = 0, votes = 0;

    unsigned char* shared = nullptr;
    size_t shared_used = 0, dynamic_bytes = 0;
    unsigned char* dynamic = nullptr;
    uint64_t block_number = 0;
    std::vector<std::pair<unsigned char*, unsigned char*>> gaps;

    std::deque<std::function<void()>> later;
};

Machine machine;
void (*at_start)() = nullptr; // of a block, and at its end
void (*at_end)() = nullptr;

void* reserve(size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        fail("no memory for the emulation");
    return memory;
}

void pause(State state) {
    Thread& thread = *machine.running;
    thread.state = state;
    switch_context(thread.context, machine.scheduler);
}

void run_thread() {
    (*machine.body)();
    for (;;)
        pause(State::kEnded);
}

void explain_deadlock() {
    int ended = 0, in_warp = 0, in_group = 0, waiting = 0;
    const Thread *barrier = nullptr, *warp = nullptr, *waits = nullptr;
    for (int i = 0; i < machine.count; ++i) {
        const Thread& thread = machine.threads[i];
        ended += thread.state == State::kEnded;
        in_warp += thread.state == State::kInWarp;
        in_group += thread.state == State::kInGroup;
        waiting += thread.state == State::kWaiting;
        waits = thread.state == State::kWaiting ? &thread : waits;
        barrier = thread.state == State::kAtBarrier ? &thread : barrier;
        warp = thread.state == State::kInWarp ? &thread : warp;
    }
    fail("threads wait for others that never come: of %d, %d are at a barrier (line %d), %d in warp operations (mask %#x), %d have ended, %d are "
         "in operations of warp groups, %d wait for %s",
         machine.count, machine.at_barrier, barrier ? barrier->barrier_line : 0, in_warp, warp ? warp->mask : 0u, ended, in_group, waiting,
         waits ? waits->what : "nothing");
}

// ------------------------------------------------------------------------------------------------------------------------- shared memory
unsigned char* put_gap(unsigned char* end) {
    machine.gaps.emplace_back(end, end + kGap);
    return end + kGap;
}

unsigned char* align_up(unsigned char* address, size_t alignment) {
    return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(address) + alignment - 1) / alignment * alignment);
}

void start_shared_memory() {
    memset(machine.shared, kPoison, machine.dynamic_bytes + kMostSharedBytes);
    machine.gaps.clear();
    machine.shared_used = 0;
    machine.dynamic = align_up(put_gap(machine.shared), 1024);
    put_gap(machine.dynamic + machine.dynamic_bytes);
    ++machine.block_number;
}

void check_shared_memory() {
    for (const auto& gap : machine.gaps)
        for (const unsigned char* byte = gap.first; byte < gap.second; ++byte)
            if (*byte != kPoison)
                fail("wrote outside a variable in shared memory");
}

void run_block(uint3 block, dim3 grid, dim3 size) {
    start_shared_memory();
    if (at_start != nullptr)
        at_start();
    machine.at_barrier = machine.votes = 0;
    for (int i = 0; i < machine.count; ++i) {
        Thread& thread = machine.threads[i];
        const unsigned int n = unsigned(i);
        thread.place = Place{{n % size.x, n / size.x % size.y, n / (size.x * size.y)}, block, size, grid, i % kWarpSize};
        thread.state = State::kReady;
        thread.open_copies.clear();
        thread.groups.clear();
        prepare_context(thread.context, machine.stacks + size_t(i) * kStackBytes, run_thread);
    }
    for (int live = machine.count; live > 0;) {
        bool moved = false;
        for (int i = 0; i < machine.count; ++i) {
            Thread& thread = machine.threads[machine.reversed ? machine.count - 1 - i : i];
            if (thread.state == State::kWaiting && thread.is_true(thread.object))
                thread.state = State::kReady;
            if (thread.state != State::kReady)
                continue;
            moved = true;
            machine.running = &thread;
            switch_context(machine.scheduler, thread.context);
            live -= thread.state == State::kEnded;
        }
        if (!moved && machine.later.empty())
            explain_deadlock();
        if (!moved) {
            machine.later.front()();
            machine.later.pop_front();
        }
    }
    if (!machine.later.empty())
        fail("a block has ended while memory was still at work for it");
    if (at_end != nullptr)
        at_end();
    check_shared_memory();
}

} // namespace

const Place& here() { return machine.running->place; }

int capability() { return machine.capability; }

int architecture() { return machine.built_for == 0 ? machine.capability : machine.built_for; }

int shared_memory_limit() {
    switch (machine.capability) {
    case 75:
        return 64 * 1024;
    case 80:
        return 163 * 1024;
    case 86:
    case 89:
    case 120:
        return 99 * 1024;
    default:
        return 227 * 1024;
    }
}

bool launch(dim3 grid, dim3 block, size_t dynamic_shared_bytes, const std::function<void()>& thread) {
    const std::lock_guard<std::mutex> guard(machine.lock);
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    const bool is_grid = grid.x > 0 && grid.x < (1u << 31) && grid.y > 0 && grid.y < 65536 && grid.z > 0 && grid.z < 65536;
    if (!is_grid || threads == 0 || threads > kMostThreads || block.z > 64 || dynamic_shared_bytes > size_t(shared_memory_limit()))
        return false;
    if (machine.stacks == nullptr) {
        machine.stacks = static_cast<char*>(reserve(kStackBytes * kMostThreads));
        machine.shared = static_cast<unsigned char*>(reserve(2 * kMostSharedBytes));
    }
    machine.body = &thread;
    machine.count = int(threads);
    machine.dynamic_bytes = dynamic_shared_bytes;
    if (standin_open != nullptr)
        standin_open();
    for (unsigned int z = 0; z < grid.z; ++z)
        for (unsigned int y = 0; y < grid.y; ++y)
            for (unsigned int x = 0; x < grid.x; ++x)
                run_block({x, y, z}, grid, block);
    if (standin_close != nullptr)
        standin_close();
    machine.running = nullptr;
    return true;
}

int block_barrier(int line, bool vote) {
    Thread& thread = *machine.running;
    thread.barrier_line = line;
    machine.votes += vote;
    if (++machine.at_barrier < machine.count) {
        pause(State::kAtBarrier);
        return thread.votes;
    }
    const int votes = machine.votes;
    machine.at_barrier = machine.votes = 0;
    for (int i = 0; i < machine.count; ++i) {
        Thread& other = machine.threads[i];
        if (other.barrier_line != line)
            fail("threads of a block wait at different barriers: lines %d and %d", line, other.barrier_line);
        other.votes = votes;
        other.state = State::kReady;
    }
    return votes;
}

void warp_operation(uint32_t mask, WarpFunction function, const void* in, void* out) {
    Thread& thread = *machine.running;
    Thread* warp = &thread - thread.place.lane;
    if ((mask >> thread.place.lane & 1) == 0)
        fail("lane %d takes part in a warp operation whose mask %#x leaves it out", thread.place.lane, mask);
    thread.mask = mask;
    thread.function = function;
    thread.part = {in, out};
    Part parts[kWarpSize] = {};
    for (int lane = 0; lane < kWarpSize; ++lane) {
        if ((mask >> lane & 1) == 0)
            continue;
        const Thread& other = warp[lane];
        if (&other >= machine.threads + machine.count)
            fail("the mask %#x of a warp operation names threads that the block does not have", mask);
        // A lane in another operation may still come: lanes that have taken different branches wait for each other one by one.
        const bool is_here = other.state == State::kInWarp && other.mask == mask && other.function == function;
        if (&other != &thread && !is_here)
            return pause(State::kInWarp);
        parts[lane] = other.part;
    }
    function(parts, mask);
    for (int lane = 0; lane < kWarpSize; ++lane)
        if (mask >> lane & 1)
            warp[lane].state = State::kReady;
}

void group_operation(int first, int count, GroupFunction function, const void* in, void* out) {
    Thread& thread = *machine.running;
    Thread* group = machine.threads + first;
    if (&thread < group || &thread >= group + count || first + count > machine.count)
        fail("an operation of threads %d to %d, of %d in the block", first, first + count - 1, machine.count);
    thread.group_function = function;
    thread.part = {in, out};
    std::vector<Part> parts;
    for (int i = 0; i < count; ++i) {
        const bool is_here = group[i].state == State::kInGroup && group[i].group_function == function;
        if (&group[i] != &thread && !is_here)
            return pause(State::kInGroup);
        parts.push_back(group[i].part);
    }
    function(parts.data(), count);
    for (int i = 0; i < count; ++i)
        group[i].state = State::kReady;
}

void wait_until(bool (*is_true)(const void*), const void* object, const char* what) {
    Thread& thread = *machine.running;
    thread.is_true = is_true;
    thread.object = object;
    thread.what = what;
    while (!is_true(object))
        pause(State::kWaiting);
}

void give_way() { pause(State::kReady); }

void do_later(std::function<void()> work) {
    if (machine.reversed)
        work();
    else
        machine.later.push_back(std::move(work));
}

void watch_blocks(void (*start)(), void (*end)()) {
    at_start = start;
    at_end = end;
}

void* shared_storage(SharedSlot& slot, size_t bytes, size_t alignment) {
    if (slot.block_number != machine.block_number) {
        machine.shared_used += bytes;
        if (machine.shared_used > kStaticSharedLimit)
            fail("%zu bytes of static shared memory; a kernel can have %zu", machine.shared_used, kStaticSharedLimit);
        unsigned char* address = align_up(machine.gaps.back().second, alignment);
        put_gap(address + bytes);
        slot = {machine.block_number, address};
    }
    return slot.address;
}

void* dynamic_shared_storage() { return machine.dynamic; }
size_t dynamic_shared_bytes() { return machine.dynamic_bytes; }

void copy_async(void* to, const void* from, int bytes, int bytes_of_source) {
    if (reinterpret_cast<uintptr_t>(to) % unsigned(bytes) != 0 || (bytes_of_source && reinterpret_cast<uintptr_t>(from) % unsigned(bytes) != 0))
        fail("asynchronous copy of %d bytes: an address is not aligned to that", bytes);
    machine.running->open_copies.push_back({to, from, bytes, bytes_of_source});
}

void commit_group() {
    Thread& thread = *machine.running;
    thread.groups.push_back(std::move(thread.open_copies));
    thread.open_copies.clear();
}

void wait_group(int groups_left) {
    auto& groups = machine.running->groups;
    while (groups.size() > size_t(groups_left)) {
        for (const Copy& copy : groups.front()) {
            memset(copy.to, 0, size_t(copy.bytes));
            memcpy(copy.to, copy.from, size_t(copy.bytes_of_source));
        }
        groups.erase(groups.begin());
    }
}

void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("CUDA emulation: ", stderr);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    if (machine.running != nullptr) {
        const Place& place = machine.running->place;
        fprintf(stderr, "; in thread (%u, %u, %u) of block (%u, %u, %u)", place.thread.x, place.thread.y, place.thread.z, place.block.x,
                place.block.y, place.block.z);
    }
    fputs("\n", stderr);
    abort();
}

} // namespace emulation
} // namespace bnb

// For tests: which device to be, what the library is to have been built for (0: for that device), and in which order threads run.
BNB_API void bnb_emulation_set_capability(int32_t capability) { bnb::emulation::machine.capability = capability; }
BNB_API void bnb_emulation_set_built_for(int32_t capability) { bnb::emulation::machine.built_for = capability; }
BNB_API void bnb_emulation_set_reversed(int32_t reversed) { bnb::emulation::machine.reversed = reversed != 0; }
