// Sums over a warp's quads and over blocks, in a fixed order, and softmax in powers of two.
#pragma once

#include "primitives.cuh"

namespace diffseg::cuda {

constexpr float kLog2E = 1.4426950408889634f;

// The largest exponent of a row that a thread has seen, and the sum of powers relative to it.
struct Online {
    float largest = -1e30f;  // finite: what lies outside is -infinity, and the difference must not be NaN
    float sum = 0;

    DIFFSEG_DEVICE void merge(float other_largest, float other_sum) {
        const float larger = fmaxf(largest, other_largest);
        sum = sum * exp2_approximate(largest - larger) + other_sum * exp2_approximate(other_largest - larger);
        largest = larger;
    }
};

// Over the four neighbouring lanes that hold a row of a fragment; the same bits in each of them.
DIFFSEG_DEVICE float quad_sum(float value) {
    value += shuffle_xor(value, 1);
    return value + shuffle_xor(value, 2);
}
DIFFSEG_DEVICE float quad_largest(float value) {
    value = fmaxf(value, shuffle_xor(value, 1));
    return fmaxf(value, shuffle_xor(value, 2));
}

DIFFSEG_DEVICE float warp_sum(float value) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

// The same bits in every thread. `scratch` holds a float a warp; it may be used again at once.
template <int kWarps>
DIFFSEG_DEVICE float block_sum(float value, float* scratch) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    sync_block();
    float total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += scratch[warp];
    sync_block();
    return total;
}

}  // namespace diffseg::cuda
