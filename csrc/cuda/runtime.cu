// Devices: which is current, what it can do, what went wrong.
#include "device.h"

#include <atomic>
#include <cstdio>
#include <mutex>

namespace bnb {
namespace {

constexpr int kMostDevices = 64;

thread_local char last_error[256] = "";

} // namespace

int32_t report_device_error(const char* message) {
    snprintf(last_error, sizeof last_error, "%s", message);
    return kDeviceError;
}

const char* last_device_error() { return last_error; }

int32_t runtime_version() { return kRuntimeVersion; }

DeviceGuard::DeviceGuard(int32_t device) {
    int current = 0;
    status_ = get_device(current);
    if (status_ != kOk || device == current || device == kCurrentDevice)
        return;
    status_ = set_device(device);
    if (status_ == kOk)
        before_ = current;
}

DeviceGuard::~DeviceGuard() {
    if (before_ >= 0)
        set_device(before_);
}

namespace {

__global__ void any_kernel() {}

// Capabilities with the same instructions have the same number.
int32_t generation(int32_t capability) { return capability < 80 ? capability : capability / 10 * 10; }

// A library of older code only, which the driver translates for the device, has the kernels that this code was compiled with.
DeviceProperties ask(int device) {
    DeviceProperties properties = ask_device(device);
    const int32_t architecture = architecture_of(reinterpret_cast<const void*>(any_kernel));
    if (generation(architecture) < generation(properties.capability))
        properties.capability = architecture;
    return properties;
}

struct Device {
    std::atomic<bool> is_known{false};
    DeviceProperties properties;
};

} // namespace

const DeviceProperties& device_properties() {
    static Device devices[kMostDevices];
    static std::mutex asking;
    int current = 0;
    get_device(current);
    Device& device = devices[current < kMostDevices ? current : 0];
    if (kIsEmulated || !device.is_known.load(std::memory_order_acquire)) { // tests change what an emulated one is
        const std::lock_guard<std::mutex> one_asks(asking);
        if (kIsEmulated || !device.is_known.load(std::memory_order_relaxed)) {
            device.properties = ask(current);
            device.is_known.store(true, std::memory_order_release);
        }
    }
    return device.properties;
}

} // namespace bnb
