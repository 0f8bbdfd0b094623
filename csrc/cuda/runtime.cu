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

#if defined(BNB_CUDA_EMULATION)

int32_t runtime_version() { return 0; }

DeviceGuard::DeviceGuard(int32_t device) : status_(device == 0 || device == kCurrentDevice ? int32_t(kOk) : report_device_error("the emulation has one device, number 0")) {}

DeviceGuard::~DeviceGuard() {}

const DeviceProperties& device_properties() {
    static DeviceProperties properties;
    properties = {emulation::capability(), 4, emulation::shared_memory_limit()};
    return properties;
}

#else

int32_t runtime_version() { return CUDART_VERSION; }

DeviceGuard::DeviceGuard(int32_t device) {
    int current = 0;
    status_ = check_device(cudaGetDevice(&current));
    if (status_ != kOk || device == current || device == kCurrentDevice)
        return;
    status_ = check_device(cudaSetDevice(device));
    if (status_ == kOk)
        before_ = current;
}

DeviceGuard::~DeviceGuard() {
    if (before_ >= 0)
        cudaSetDevice(before_);
}

namespace {

DeviceProperties ask_device(int device) {
    const auto attribute = [&](cudaDeviceAttr which) {
        int value = 0;
        check_device(cudaDeviceGetAttribute(&value, which, device));
        return value;
    };
    return {10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
            attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

struct AllDevices {
    DeviceProperties properties[kMostDevices] = {};

    AllDevices() {
        int count = 0;
        check_device(cudaGetDeviceCount(&count));
        for (int device = 0; device < count && device < kMostDevices; ++device)
            properties[device] = ask_device(device);
    }
};

} // namespace

const DeviceProperties& device_properties() {
    static const AllDevices all;
    int device = 0;
    cudaGetDevice(&device);
    return all.properties[device < kMostDevices ? device : 0];
}

#endif

} // namespace bnb
