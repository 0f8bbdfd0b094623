// The memory of the stand-in devices, closed by default, and page-locked memory of the host.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <sys/mman.h>
#include <unordered_map>

#include <c10/core/Allocator.h>

namespace standin {

constexpr c10::DeviceIndex kDevices = 2;
constexpr size_t kDeviceBytes = size_t{8} << 30;
constexpr size_t kArenaBytes = size_t{64} << 30; // of addresses: what was freed is handed out again only for requests of about its size
constexpr size_t kGranule = 512;                 // as the allocator of PyTorch rounds

inline thread_local c10::DeviceIndex current_device = 0;

class Arena {
  public:
    static Arena& instance() {
        static Arena* arena = new Arena; // outlives every tensor
        return *arena;
    }

    void open() {
        const std::lock_guard lock(mutex_);
        if (open_++ == 0)
            protect(PROT_READ | PROT_WRITE);
    }

    void close() {
        const std::lock_guard lock(mutex_);
        if (--open_ == 0)
            protect(PROT_NONE);
    }

    void* take(size_t bytes, c10::DeviceIndex device) {
        const size_t size = std::max(kGranule, (bytes + kGranule - 1) / kGranule * kGranule);
        const std::lock_guard lock(mutex_);
        TORCH_CHECK_WITH(OutOfMemoryError, used_[device] + size <= kDeviceBytes, "CUDA out of memory. Tried to allocate ", bytes,
                         " bytes on the stand-in GPU ", static_cast<int>(device), ", of whose ", kDeviceBytes, " bytes ", used_[device],
                         " are in use");
        char* place = nullptr;
        const auto fit = free_.lower_bound(size);
        if (fit != free_.end() && fit->first <= 2 * size) {
            place = fit->second;
            blocks_[place] = {fit->first, device};
            free_.erase(fit);
        } else {
            TORCH_CHECK_WITH(OutOfMemoryError, next_ + size <= kArenaBytes, "CUDA out of memory: the stand-in GPU has used up its addresses");
            place = base_ + next_;
            next_ += size;
            blocks_[place] = {size, device};
        }
        used_[device] += blocks_[place].size;
        peak_[device] = std::max(peak_[device], used_[device]);
        return place;
    }

    void give_back(void* place) {
        const std::lock_guard lock(mutex_);
        const auto found = blocks_.find(static_cast<char*>(place));
        const Block block = found->second;
        used_[block.device] -= block.size;
        blocks_.erase(found);
        free_.emplace(block.size, static_cast<char*>(place));
        const uintptr_t first = (reinterpret_cast<uintptr_t>(place) + kPage - 1) / kPage * kPage;
        const uintptr_t last = (reinterpret_cast<uintptr_t>(place) + block.size) / kPage * kPage;
        if (last > first + kKeep)
            madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
    }

    size_t used(int device) const { return used_[device]; }
    size_t peak(int device) const { return peak_[device]; }
    void reset_peak(int device) { peak_[device] = used_[device]; }

  private:
    static constexpr uintptr_t kPage = 4096, kKeep = 1 << 20; // smaller blocks stay with the process

    struct Block {
        size_t size;
        c10::DeviceIndex device;
    };

    Arena() {
        void* memory = mmap(nullptr, kArenaBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        TORCH_CHECK(memory != MAP_FAILED, "no addresses for the stand-in GPU");
        base_ = static_cast<char*>(memory);
    }

    void protect(int access) {
        // In whole pages of the page table: what was never touched costs nothing.
        TORCH_CHECK(mprotect(base_, kArenaBytes, access) == 0, "cannot open the memory of the stand-in GPU");
    }

    std::mutex mutex_;
    char* base_ = nullptr;
    size_t next_ = 0, used_[kDevices] = {}, peak_[kDevices] = {};
    int open_ = 0;
    std::multimap<size_t, char*> free_;
    std::unordered_map<char*, Block> blocks_;
};

struct Gate {
    Gate() { Arena::instance().open(); }
    ~Gate() { Arena::instance().close(); }
    Gate(const Gate&) = delete;
};

inline void give_back(void* place) {
    if (place != nullptr)
        Arena::instance().give_back(place);
}

// Memory of the current device, under the name of either device type: the CPU's is for CPU kernels that enlarge a result.
struct ArenaAllocator final : c10::Allocator {
    explicit ArenaAllocator(c10::DeviceType label) : label(label) {}

    c10::DataPtr allocate(size_t bytes) override {
        const c10::Device device(label, label == c10::kCUDA ? current_device : c10::DeviceIndex{-1});
        if (bytes == 0)
            return {nullptr, nullptr, &give_back, device};
        void* place = Arena::instance().take(bytes, current_device);
        const Gate gate;
        std::memset(place, 0xFF, std::min<size_t>(bytes, 1 << 20)); // uninitialised memory holds anything; NaN is what shows
        return {place, place, &give_back, device};
    }

    void copy_data(void* to, const void* from, size_t bytes) const override {
        const Gate gate;
        std::memcpy(to, from, bytes);
    }

    c10::DeviceType label;
};

inline ArenaAllocator device_memory(c10::kCUDA), host_view_memory(c10::kCPU);

// Page-locked memory is ordinary memory that is known by its address.
struct PinnedAllocator final : c10::Allocator {
    c10::DataPtr allocate(size_t bytes) override {
        void* place = bytes != 0 ? std::malloc(bytes) : nullptr;
        const std::lock_guard lock(mutex());
        if (place != nullptr)
            ranges()[static_cast<const char*>(place)] = bytes;
        return {place, place, &release, c10::Device(c10::kCPU)};
    }

    static void release(void* place) {
        const std::lock_guard lock(mutex());
        ranges().erase(static_cast<const char*>(place));
        std::free(place);
    }

    static bool has(const void* place) {
        const std::lock_guard lock(mutex());
        auto after = ranges().upper_bound(static_cast<const char*>(place));
        return after != ranges().begin() && static_cast<const char*>(place) < std::prev(after)->first + std::prev(after)->second;
    }

    void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  private:
    static std::mutex& mutex() {
        static auto* mutex = new std::mutex;
        return *mutex;
    }
    static std::map<const char*, size_t>& ranges() {
        static auto* ranges = new std::map<const char*, size_t>;
        return *ranges;
    }
};

inline PinnedAllocator pinned_memory;

} // namespace standin
