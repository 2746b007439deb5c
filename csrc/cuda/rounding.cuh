// 16-bit floating point: single values, and pairs split in two terms.
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

}  // namespace diffseg::cuda
