// See device.h.

#include "device.h"

#include "launch.cuh"

namespace diffseg::cuda {

DeviceGuard::DeviceGuard(int device) : previous_(device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
}

DeviceGuard::~DeviceGuard() { cudaSetDevice(previous_); }

int driver_version() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int runtime_version() {
    int version = 0;
    check(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
    return version;
}

int shared_memory_of(int device) {
    int bytes = 0;
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
    return bytes;
}

namespace {

__global__ void probe_kernel() {}

}  // namespace

std::string obstacle(int device) {
    int previous = device;
    cudaError_t error = cudaGetDevice(&previous);
    if (error == cudaSuccess) error = cudaSetDevice(device);
    cudaFuncAttributes attributes;
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe_kernel);
    cudaSetDevice(previous);
    cudaGetLastError();  // what was found here is not to be reported by the next launch
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace diffseg::cuda
