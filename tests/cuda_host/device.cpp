// The host in the place of a device: csrc/cuda/device.h.

#include "device.h"

namespace diffseg::cuda {

DeviceGuard::DeviceGuard(int device) : previous_(device) {}
DeviceGuard::~DeviceGuard() = default;

int driver_version() { return 0; }
int runtime_version() { return 0; }
int shared_memory_of(int) { return 99 << 10; }
std::string obstacle(int) { return "the host is no GPU"; }

}  // namespace diffseg::cuda
