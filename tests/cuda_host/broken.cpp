// Kernels that are wrong in one way each: the emulation is to say so. Each function returns its complaint, or "".

#include <string>

#include "host_device.h"

namespace diffseg::cuda {
namespace {

constexpr int kThreads = 64;

const char* complaint(void (*kernel)(float*), float* out) {
    static std::string message;
    message.clear();
    try {
        launch("broken_kernel", kernel, dim3(1), kThreads, kThreads * sizeof(float), Stream{0}, out);
    } catch (const std::exception& error) {
        message = error.what();
    }
    return message.c_str();
}

float* shared_floats() { return reinterpret_cast<float*>(shared_memory()); }

void reads_what_was_not_written(float* out) { out[threadIdx.x] = shared_floats()[threadIdx.x]; }

void reads_before_the_barrier(float* out) {
    shared_floats()[threadIdx.x] = 1;
    out[threadIdx.x] = shared_floats()[kThreads - 1 - threadIdx.x];
}

void reads_a_copy_before_it_arrives(float* out) {
    alignas(16) static float source[4] = {1, 2, 3, 4};
    if (threadIdx.x == 0) {
        copy_16(shared_memory(), source, true);
        commit_copies();
    }
    sync_block();
    if (threadIdx.x == 0) out[0] = shared_floats()[1], wait_for_copies(), out[1] = shared_floats()[1];
}

void waits_for_no_copy(float* out) { copy_16(shared_memory() + threadIdx.x / 16 * 16, out, false); }

void copies_to_no_multiple_of_16(float* out) { copy_16(shared_memory() + 4, out, false); }

void shuffles_in_half_a_warp(float* out) {
    if (threadIdx.x % 32 < 16) out[0] = shuffle_xor(1, 1);
}

void does_two_things_at_once(float* out) {
    if (threadIdx.x % 2 == 0)
        out[0] = shuffle_xor(1, 1);
    else
        ballot(true);
}

}  // namespace

extern "C" {
const char* read_unwritten(float* out) { return complaint(reads_what_was_not_written, out); }
const char* read_early(float* out) { return complaint(reads_before_the_barrier, out); }
const char* read_copy(float* out) { return complaint(reads_a_copy_before_it_arrives, out); }
const char* copy_unwaited(float* out) { return complaint(waits_for_no_copy, out); }
const char* copy_misaligned(float* out) { return complaint(copies_to_no_multiple_of_16, out); }
const char* shuffle_half(float* out) { return complaint(shuffles_in_half_a_warp, out); }
const char* diverge(float* out) { return complaint(does_two_things_at_once, out); }
}

}  // namespace diffseg::cuda
