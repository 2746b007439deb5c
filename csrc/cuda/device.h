// The device and the runtime, for module.cpp.
#pragma once

#include <string>

namespace diffseg::cuda {

// Makes a device current, and the previous one again. std::runtime_error where there is none.
class DeviceGuard {
   public:
    explicit DeviceGuard(int device);
    ~DeviceGuard();
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

   private:
    int previous_;
};

int driver_version();   // of CUDA that the driver serves, 1000 major + 10 minor; 0 without a driver
int runtime_version();  // with which the kernels were built

// Bytes of shared memory that a block of a device can have.
int shared_memory_of(int device);

// Why the kernels cannot run on a device; empty where they can.
std::string obstacle(int device);

}  // namespace diffseg::cuda
