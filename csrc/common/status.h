// What a native function reports. Python turns a status into an exception; nothing is printed or thrown here.
#pragma once

#include <cstdint>

namespace bnb {

enum Status : int32_t {
    kOk = 0,
    kBadArgument = 1, // a null pointer, a negative size, an unknown dtype or quantisation type
    kUnsupported = 2, // this machine or this build cannot do it
    kOutOfMemory = 3,
    kBadCode = 4,     // the 256 values of an 8-bit code are not ascending
    kDeviceError = 5, // the GPU's driver refused; last_device_error() has its words
};

static inline const char* status_message(int32_t status) {
    switch (status) {
    case kOk:
        return "ok";
    case kBadArgument:
        return "bad argument: a null pointer, a size out of range, or an unknown dtype or quantisation type";
    case kUnsupported:
        return "not supported by this machine or this build of the library";
    case kOutOfMemory:
        return "out of memory";
    case kBadCode:
        return "the 8-bit code must hold 256 values in ascending order, without NaN";
    case kDeviceError:
        return "the device reported an error";
    default:
        return "unknown status";
    }
}

} // namespace bnb
