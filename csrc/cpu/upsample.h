// Bilinear upsampling with half-pixel centres and clamped edges, as taps along one axis.
#pragma once

#include "simd.h"

namespace diffseg::DIFFSEG_ISA {

struct Tap {
    int64_t low, high;  // neighbouring cells
    float weight;       // of high; low has the rest
};

// (pixel + 1/2) cells / pixels - 1/2 in units of 1 / (2 pixels), whole numbers up to the last division: where a weight is
// 0 or nearly so, its rounding error would weigh a large neighbour.
inline Tap tap(int64_t pixel, int64_t cells, int64_t pixels) {
    const int64_t unit = 2 * pixels;
    const int64_t position = most<int64_t>(0, (2 * pixel + 1) * cells - pixels);
    const int64_t low = least(position / unit, cells - 1);
    return {low, least(low + 1, cells - 1), static_cast<float>(position - low * unit) / static_cast<float>(unit)};
}

inline void fill_taps(Tap* taps, int64_t cells, int64_t pixels) {
    for (int64_t pixel = 0; pixel < pixels; ++pixel) taps[pixel] = tap(pixel, cells, pixels);
}

}  // namespace diffseg::DIFFSEG_ISA
