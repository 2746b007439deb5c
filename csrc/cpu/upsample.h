// Bilinear upsampling with half-pixel centres and clamped edges, as taps along one axis.
#pragma once

#include "simd.h"

namespace diffseg::DIFFSEG_ISA {

struct Tap {
    int64_t low, high;  // neighbouring cells
    float weight;       // of high; low has the rest
};

inline Tap tap(int64_t pixel, int64_t cells, int64_t pixels) {
    const float scale = static_cast<float>(cells) / static_cast<float>(pixels);
    const float position = most(0.0f, (static_cast<float>(pixel) + 0.5f) * scale - 0.5f);
    const int64_t low = least(static_cast<int64_t>(position), cells - 1);
    return {low, least(low + 1, cells - 1), position - static_cast<float>(low)};
}

inline void fill_taps(Tap* taps, int64_t cells, int64_t pixels) {
    for (int64_t pixel = 0; pixel < pixels; ++pixel) taps[pixel] = tap(pixel, cells, pixels);
}

}  // namespace diffseg::DIFFSEG_ISA
