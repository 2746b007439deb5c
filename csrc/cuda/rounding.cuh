// Narrow floating point: single values, and values split in two terms.
#pragma once

#include "primitives.cuh"

namespace diffseg::cuda {

DIFFSEG_DEVICE float from_bfloat16(uint16_t bits) { return from_bits(static_cast<uint32_t>(bits) << 16); }

// Two values, each as a rounded one and what rounding lost; the first in the low halves.
struct Split {
    uint32_t high, low;
};

DIFFSEG_DEVICE Split split_float16(float first, float second) {
    const uint32_t high = pack_float16(first, second);
    return {high, pack_float16(first - unpack_float16(static_cast<uint16_t>(high)),
                               second - unpack_float16(static_cast<uint16_t>(high >> 16)))};
}

DIFFSEG_DEVICE Split split_bfloat16(float first, float second) {
    const uint32_t high = pack_bfloat16(first, second);
    return {high, pack_bfloat16(first - from_bits(high << 16), second - from_bits(high & 0xffff0000u))};
}

// The nearest tf32 to each of four float32, and what is left, as tf32 too.
DIFFSEG_DEVICE void split_tf32(const uint32_t (&value)[4], uint32_t (&high)[4], uint32_t (&low)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        high[i] = (value[i] + 0x1000u) & 0xffffe000u;
        low[i] = to_bits(from_bits(value[i]) - from_bits(high[i]));
    }
}

}  // namespace diffseg::cuda
