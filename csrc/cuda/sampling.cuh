// Bilinear sampling with half-pixel centres and clamped edges (align_corners=False), along one axis and of maps.
#pragma once

#include "arithmetic.cuh"

namespace diffseg::cuda {

struct Tap {
    int first, second;  // neighbouring cells
    float weight;       // of the second; the first has the rest
};

// What position `position` of `large` reads among `small` cells.
DIFFSEG_BOTH Tap tap(int position, int small, int large) {
    const float scale = static_cast<float>(small) / static_cast<float>(large);
    const float source = fmaxf((static_cast<float>(position) + 0.5f) * scale - 0.5f, 0.0f);
    const int first = static_cast<int>(source) < small - 1 ? static_cast<int>(source) : small - 1;
    return {first, first + 1 < small ? first + 1 : first, source - static_cast<float>(first)};
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
        weight += (at.first == cell ? 1.0f - at.weight : 0.0f) + (at.second == cell ? at.weight : 0.0f);
    }
    return weight;
}

// The four cells of a small map that a cell of the large one reads.
struct Taps {
    int cells[4];
    float weights[4];
};

DIFFSEG_BOTH Taps taps(int row, int column, int small_height, int small_width, int height, int width) {
    const Tap down = tap(row, small_height, height), across = tap(column, small_width, width);
    return {{down.first * small_width + across.first, down.first * small_width + across.second,
             down.second * small_width + across.first, down.second * small_width + across.second},
            {(1.0f - down.weight) * (1.0f - across.weight), (1.0f - down.weight) * across.weight,
             down.weight * (1.0f - across.weight), down.weight * across.weight}};
}

DIFFSEG_DEVICE float sample(const float* map, const Taps& at) {
    return fmaf(at.weights[0], map[at.cells[0]], at.weights[1] * map[at.cells[1]]) +
           fmaf(at.weights[2], map[at.cells[2]], at.weights[3] * map[at.cells[3]]);
}

}  // namespace diffseg::cuda
