// Launches, each of them checked, and the bump allocator of the caller's workspace.
#pragma once

#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "arithmetic.cuh"
#include "kernels.h"

namespace diffseg::cuda {

#ifdef __CUDACC__
inline void check(cudaError_t error, const std::string& what) {
    if (error != cudaSuccess)
        throw std::runtime_error(what + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, Stream stream,
            const std::common_type_t<Parameters>&... arguments) {
    constexpr size_t kSharedWithoutAsking = 48 << 10;
    static std::mutex asking;  // what is asked for is the kernel's: another thread's launch may need more or less
    std::unique_lock<std::mutex> lock(asking, std::defer_lock);
    if (shared > kSharedWithoutAsking) {
        lock.lock();
        const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
        check(cudaFuncSetAttribute(kernel, attribute, static_cast<int>(shared)),
              std::string(name) + ": asking for " + std::to_string(shared) + " bytes of shared memory");
    }
    kernel<<<grid, threads, shared, reinterpret_cast<cudaStream_t>(stream.handle)>>>(arguments...);
    check(cudaGetLastError(), name);
}
#endif

// Hands out pieces of the workspace. Without memory it only measures: the same code sizes and fills.
class Workspace {
   public:
    explicit Workspace(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}

    template <class T>
    T* take(size_t count) {
        T* piece = reinterpret_cast<T*>(memory_ + used_);
        used_ += round_up(count * sizeof(T), size_t{256});
        return piece;
    }
    size_t used() const { return used_; }

   private:
    unsigned char* memory_;
    size_t used_ = 0;
};

}  // namespace diffseg::cuda
