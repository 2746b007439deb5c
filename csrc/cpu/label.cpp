// label: bilinear upsample of every proposal and argmax, fused.
//
//   value_v(y, x) = sum over the four neighbouring cells of their bilinear weight * map_v   (half-pixel centres, clamped)
//   winner(y, x)  = argmax_v value_v(y, x), v < counts; ties go to the lowest v
//
// One task is one output row. It interpolates each proposal down its two source rows into a line of w floats, then across
// into the row, keeping the best value and its index: both stay in the first-level cache.
// Bytes: reads 8 * w * counts per output row, from the second-level cache or beyond; writes 4 * height * width an image.
// The upsampled maps, 4 * counts * height * width, are never stored.

#include "kernels.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace diffseg {
namespace {

struct Tap {
    int64_t low, high;  // neighbouring cells
    float weight;       // of high; low has the rest
};

std::vector<Tap> taps(int64_t cells, int64_t pixels) {
    std::vector<Tap> result(pixels);
    const float scale = static_cast<float>(cells) / static_cast<float>(pixels);
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
        const float position = std::max(0.0f, (static_cast<float>(pixel) + 0.5f) * scale - 0.5f);
        const int64_t low = std::min(static_cast<int64_t>(position), cells - 1);
        result[pixel] = {low, std::min(low + 1, cells - 1), position - static_cast<float>(low)};
    }
    return result;
}

}  // namespace

void label(const float* maps, const int32_t* counts, int32_t* winner, int64_t batch, int64_t length, int64_t h,
           int64_t w, int64_t height, int64_t width, int threads) {
    const std::vector<Tap> down = taps(h, height), across = taps(w, width);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> line(w), best(width);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < batch * height; ++row) {
            const int64_t item = row / height;
            const Tap& tap = down[row % height];
            int32_t* index = winner + row * width;
            std::fill(best.begin(), best.end(), -std::numeric_limits<float>::infinity());
            std::fill(index, index + width, 0);
            for (int32_t proposal = 0; proposal < counts[item]; ++proposal) {
                const float* map = maps + (item * length + proposal) * h * w;
                const float *low = map + tap.low * w, *high = map + tap.high * w;
                for (int64_t column = 0; column < w; ++column)
                    line[column] = (1.0f - tap.weight) * low[column] + tap.weight * high[column];
                for (int64_t x = 0; x < width; ++x) {
                    const Tap& side = across[x];
                    const float value = (1.0f - side.weight) * line[side.low] + side.weight * line[side.high];
                    const bool better = value > best[x];
                    best[x] = better ? value : best[x];
                    index[x] = better ? proposal : index[x];
                }
            }
        }
    }
}

}  // namespace diffseg
