// What the kernels that write A_f share: low-resolution sums, upsampled as a tile is stored, and the store itself.
#pragma once

#include "kernels.h"
#include "rounding.cuh"
#include "sampling.cuh"

namespace diffseg::cuda {

constexpr int kMostLows = 16;
constexpr int kQuad = 4;  // neighbouring columns of one thread

// The sum of the layers of a grid below the output's: [batch, n, n].
struct Low {
    const float* sums;
    int height, width;
};

// Where a kernel stores, and what it adds as it does.
struct Output {
    int height, width;  // of the output grid, to which the lows are upsampled
    int count;          // of the lows
    Low lows[kMostLows];
    bool bfloat16;
    bool accumulate;  // add to what is there
};

struct Quad {
    float value[kQuad];
};

// Row `row` and columns from `column` of a low-resolution sum, upsampled; the taps of the columns are found once.
class Upsampler {
   public:
    DIFFSEG_DEVICE Upsampler(const Output& output, const Low& low, int batch, int column)
        : height_(output.height), width_(output.width), low_(low) {
        const int cells = height_ * width_;
        const int64_t small = low.height * low.width;
        sums_ = low.sums + batch * small * small;
        int last = -1;
        Tap down = {};
#pragma unroll
        for (int c = 0; c < kQuad; ++c) {
            const int clamped = column + c < cells ? column + c : cells - 1, line = clamped / width_;
            if (line != last) down = tap(line, low.height, height_), last = line;
            taps_[c] = taps(down, tap(clamped - line * width_, low.width, width_), low.width);
        }
    }

    // The row of the sums that serves row `row` of the output grid.
    DIFFSEG_DEVICE int source(int row) const {
        return row / width_ * low_.height / height_ * low_.width + row % width_ * low_.width / width_;
    }

    DIFFSEG_DEVICE Quad operator()(int source) const {
        const float* map = sums_ + static_cast<int64_t>(source) * (low_.height * low_.width);
        Quad quad;
#pragma unroll
        for (int c = 0; c < kQuad; ++c) quad.value[c] = sample(map, taps_[c]);
        return quad;
    }

   private:
    int height_, width_;
    const Low& low_;
    const float* sums_;
    Taps taps_[kQuad];
};

DIFFSEG_DEVICE void store_float(float* row, int column, int cells, Quad quad, bool accumulate) {
    float* target = row + column;
    if (cells % kQuad == 0) {
        float4 value = {quad.value[0], quad.value[1], quad.value[2], quad.value[3]};
        if (accumulate) {
            const float4 old = *reinterpret_cast<const float4*>(target);
            value = {value.x + old.x, value.y + old.y, value.z + old.z, value.w + old.w};
        }
        *reinterpret_cast<float4*>(target) = value;
        return;
    }
#pragma unroll
    for (int c = 0; c < kQuad; ++c)
        if (column + c < cells) target[c] = accumulate ? target[c] + quad.value[c] : quad.value[c];
}

DIFFSEG_DEVICE void store_bfloat16(uint16_t* row, int column, int cells, Quad quad, bool accumulate) {
#pragma unroll
    for (int c = 0; c < kQuad; ++c)
        if (accumulate && column + c < cells) quad.value[c] += from_bfloat16(row[column + c]);
    const uint2 packed = {pack_bfloat16(quad.value[0], quad.value[1]), pack_bfloat16(quad.value[2], quad.value[3])};
    if (cells % kQuad == 0) {
        *reinterpret_cast<uint2*>(row + column) = packed;
        return;
    }
#pragma unroll
    for (int c = 0; c < kQuad; ++c)
        if (column + c < cells) row[column + c] = static_cast<uint16_t>((c < 2 ? packed.x : packed.y) >> (c % 2 * 16));
}

// Columns from `column`, a multiple of 4, of row `row` of out [batch, cells, cells].
DIFFSEG_DEVICE void store(void* out, const Output& output, int batch, int row, int column, int cells, Quad quad) {
    if (column >= cells) return;
    const int64_t start = (static_cast<int64_t>(batch) * cells + row) * cells;
    if (output.bfloat16)
        store_bfloat16(static_cast<uint16_t*>(out) + start, column, cells, quad, output.accumulate);
    else
        store_float(static_cast<float*>(out) + start, column, cells, quad, output.accumulate);
}

}  // namespace diffseg::cuda
