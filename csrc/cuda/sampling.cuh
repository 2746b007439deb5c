// Bilinear sampling with half-pixel centres and clamped edges (align_corners=False), along one axis and of maps.
#pragma once

#include "arithmetic.cuh"

namespace diffseg::cuda {

struct Tap {
    int first, second;  // neighbouring cells
    float near, far;    // their weights
};

// What position `position` of `large` reads among `small` cells: (position + 1/2) small / large - 1/2, in integers up to
// the last division, since where a weight is 0 or nearly so its rounding error would weigh a large neighbour.
DIFFSEG_BOTH Tap tap(int position, int small, int large) {
    const int unit = 2 * large;
    const int shifted = (2 * position + 1) * small - large;
    const int source = shifted < 0 ? 0 : shifted;
    const int first = source / unit < small - 1 ? source / unit : small - 1;
    const int rest = source - first * unit;
    return {first, first + 1 < small ? first + 1 : first, static_cast<float>(unit - rest) / static_cast<float>(unit),
            static_cast<float>(rest) / static_cast<float>(unit)};
}

// What `cell` adds to the sum over all positions: the column weight by which a row's mass after upsampling is known.
DIFFSEG_BOTH float axis_weight(int cell, int small, int large) {
    int position = (2 * cell - 1) * large / (2 * small) - 1;
    int end = (2 * cell + 3) * large / (2 * small) + 2;
    position = position < 0 || cell == 0 ? 0 : position;
    end = end > large || cell == small - 1 ? large : end;
    float weight = 0;
    for (; position < end; ++position) {
        const Tap at = tap(position, small, large);
        weight += (at.first == cell ? at.near : 0.0f) + (at.second == cell ? at.far : 0.0f);
    }
    return weight;
}

// The four cells of a small map that a cell of the large one reads.
struct Taps {
    int cells[4];
    float weights[4];
};

DIFFSEG_BOTH Taps taps(const Tap& down, const Tap& across, int small_width) {
    return {{down.first * small_width + across.first, down.first * small_width + across.second,
             down.second * small_width + across.first, down.second * small_width + across.second},
            {down.near * across.near, down.near * across.far, down.far * across.near, down.far * across.far}};
}

DIFFSEG_BOTH Taps taps(int row, int column, int small_height, int small_width, int height, int width) {
    return taps(tap(row, small_height, height), tap(column, small_width, width), small_width);
}

DIFFSEG_DEVICE float sample(const float* map, const Taps& at) {
    return fmaf(at.weights[0], map[at.cells[0]], at.weights[1] * map[at.cells[1]]) +
           fmaf(at.weights[2], map[at.cells[2]], at.weights[3] * map[at.cells[3]]);
}

}  // namespace diffseg::cuda
