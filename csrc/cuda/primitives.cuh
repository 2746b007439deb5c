// What the kernels ask of the hardware, each in a function. Nothing else in the kernels is specific to a GPU: compiled
// by a host compiler, the same source runs on the emulation in host_device.h (tests/cuda_host), which replaces this.
#pragma once

#ifndef __CUDACC__
#include "host_device.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

#define DIFFSEG_DEVICE __device__ __forceinline__
#define DIFFSEG_BOTH __host__ __device__ __forceinline__

namespace diffseg::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// The block's dynamic shared memory.
DIFFSEG_DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
}

DIFFSEG_DEVICE void sync_block() { __syncthreads(); }
DIFFSEG_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(kAllLanes, value, mask); }
DIFFSEG_DEVICE uint32_t broadcast(uint32_t value, int lane) { return __shfl_sync(kAllLanes, value, lane); }
DIFFSEG_DEVICE uint32_t ballot(bool bit) { return __ballot_sync(kAllLanes, bit); }

DIFFSEG_DEVICE int count_bits(uint32_t word) { return __popc(word); }
DIFFSEG_DEVICE int lowest_bit(uint32_t word) { return __ffs(word) - 1; }  // of a word that is not 0
DIFFSEG_DEVICE uint32_t to_bits(float value) { return __float_as_uint(value); }
DIFFSEG_DEVICE float from_bits(uint32_t bits) { return __uint_as_float(bits); }

// 2 ** x, within 2 ulp.
DIFFSEG_DEVICE float exp2_approximate(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// The natural logarithm of a positive normal x, within 2 ** -22 of log2(x), or of 1 where that is less than 1.
DIFFSEG_DEVICE float log_approximate(float x) {
    float result;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result * 0.6931471805599453f;
}

// Two floats rounded to float16, or bfloat16, the first in the low half.
DIFFSEG_DEVICE uint32_t pack_float16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
DIFFSEG_DEVICE uint32_t pack_bfloat16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
DIFFSEG_DEVICE float unpack_float16(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

DIFFSEG_DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8 x 8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8 and receives of each
// matrix the two elements 2 (l % 4) of row l / 4; transposed, of column l / 4.
DIFFSEG_DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}
DIFFSEG_DEVICE void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// sum += a b on tensor cores: 16 x 8 x 16 for 16-bit operands, 16 x 8 x 8 for tf32 (whose low 13 bits are not read).
#define DIFFSEG_MULTIPLY(NAME, INSTRUCTION)                                                                      \
    DIFFSEG_DEVICE void NAME(float(&sum)[4], const uint32_t(&a)[4], uint32_t b0, uint32_t b1) {                  \
        asm("mma.sync.aligned." INSTRUCTION " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"   \
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                             \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                     \
    }
DIFFSEG_MULTIPLY(multiply_float16, "m16n8k16.row.col.f32.f16.f16.f32")
DIFFSEG_MULTIPLY(multiply_bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
DIFFSEG_MULTIPLY(multiply_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef DIFFSEG_MULTIPLY

// Asynchronous copy of 16 bytes into shared memory, or of zeros where not `inside`: `source` is not read then, wherever
// it points. What a thread has started up to a commit_copies() is one group; wait_for_copies() returns when all of its
// groups are there.
DIFFSEG_DEVICE void copy_16(void* target, const void* source, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(target)), "l"(source), "r"(inside ? 16 : 0)
                 : "memory");
}
DIFFSEG_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
DIFFSEG_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

}  // namespace diffseg::cuda

#endif
