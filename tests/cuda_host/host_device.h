// Runs the CUDA kernels on a host, block by block, so that a machine without a GPU tests the very source that a GPU runs.
//
// Compiled by a host compiler, csrc/cuda/primitives.cuh includes this in place of the hardware. Each thread of a block
// is a fiber. It runs until it needs the others: at a barrier it waits for the block, at a shuffle, ballot, matrix load
// or matrix product for the 32 lanes of its warp, whose fragments are then exchanged as the PTX manual lays them out.
//
// What goes wrong loudly: shared memory that is read before it is written (it starts as NaN) or beyond its end (an
// unmapped page follows); an asynchronous copy that is read before it was waited for (the target is NaN from the copy's
// start, and filled only as its thread waits); misaligned copies and matrix rows; lanes of a warp, or threads of a block,
// that do not meet; copies that nobody waits for.
// What does not: races between warps show only where they change a result under one of the two orders in which fibers
// run (diffseg_host_reverse); there is no weak memory order, no timing, and no limit on registers. Matrix products are exact and
// truncated once an instruction. exp2 is the host's, and a logarithm as wrong as PTX allows. Accesses to global memory
// are checked where this is compiled with the address sanitizer.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#include "kernels.h"

#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define DIFFSEG_DEVICE inline
#define DIFFSEG_BOTH inline

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(16) int4 {
    int32_t x, y, z, w;
};

namespace diffseg::cuda {

namespace host {

// Runs `thread` in every thread of every block; std::runtime_error, naming the kernel, where it goes wrong.
void run(const char* kernel, dim3 grid, int threads, size_t shared, const std::function<void()>& thread);

// Waits until all lanes of the warp have come to the same operation with what each gives; `exchange` sees all 32.
void meet(const char* operation, void* given, void (*exchange)(void* const* all));

// For tests, through ctypes.
extern "C" {
void diffseg_host_reverse(bool reversed);  // last warps and lanes first
void diffseg_host_record(bool recording);  // launches are listed, and not run
const char* diffseg_host_launches();       // since recording began, a line each: name, grid, threads, shared memory
}

}  // namespace host

extern dim3 threadIdx, blockIdx, gridDim;

unsigned char* shared_memory();
void sync_block();
float shuffle_xor(float value, int mask);
uint32_t broadcast(uint32_t value, int lane);
uint32_t ballot(bool bit);

inline int count_bits(uint32_t word) { return __builtin_popcount(word); }
inline int lowest_bit(uint32_t word) { return __builtin_ctz(word); }
inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

float exp2_approximate(float x);
float log_approximate(float x);
uint32_t pack_float16(float low, float high);
uint32_t pack_bfloat16(float low, float high);
float unpack_float16(uint16_t bits);

void load_matrices(uint32_t (&out)[4], const void* row);
void load_matrices_transposed(uint32_t (&out)[4], const void* row);
void multiply_float16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void multiply_bfloat16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void multiply_tf32(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

void copy_16(void* target, const void* source, bool inside);
void commit_copies();
void wait_for_copies();

template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, Stream,
            const std::common_type_t<Parameters>&... arguments) {
    host::run(name, grid, threads, shared, [&] { kernel(arguments...); });
}

}  // namespace diffseg::cuda
