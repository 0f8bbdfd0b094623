// Devices: which is current, what it can do, what went wrong.
#include "device.h"

#include <cstdio>

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

struct AllDevices {
    DeviceProperties properties[kMostDevices] = {};

    AllDevices() {
        const int count = count_devices();
        for (int device = 0; device < count && device < kMostDevices; ++device)
            properties[device] = ask_device(device);
    }
};

} // namespace

const DeviceProperties& device_properties() {
    static AllDevices all;
    if (kIsEmulated) // tests change what it is
        all = AllDevices();
    int device = 0;
    get_device(device);
    return all.properties[device < kMostDevices ? device : 0];
}

} // namespace bnb
