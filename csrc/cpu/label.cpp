// label: bilinear upsample of every proposal and argmax, fused; renumber: the labels without gaps.
//
//   value_v(y, x) = sum over the four neighbouring cells of its bilinear weight * map_v  (half-pixel centres)
//   winner(y, x)  = argmax_v value_v(y, x), v < counts; ties go to the lowest v
//
// The pixels between the same four cells form a patch. There value_v lies between the least and the largest of the four
// (and rounding): a proposal whose largest is below the best least of all proposals cannot win. Mostly one proposal is
// left, and the patch is filled; else those left are evaluated.
// One task is the patches between two lines of cells of one image. All its arrays stay in the first-level cache.
// Bytes: reads 8 * w * counts a task, twice, from the second-level cache or beyond; writes 4 * height * width an image.
//
// renumber: one task is kStrip pixels of one image. Which labels occur is found in a first pass, a thread's own bytes
// each; numbers are read from a table in a second. Bytes: 12 a pixel.

#include <math.h>
#include <string.h>

#include "upsample.h"

namespace diffseg::DIFFSEG_ISA {
namespace {

constexpr float kRounding = 1e-6f;  // relative, of an upsampled value
constexpr int64_t kStrip = 1 << 14;

// Runs of pixels with the same lower cell: [cells + 1] first pixels.
void fill_runs(const Tap* taps, int64_t pixels, int64_t cells, int64_t* runs) {
    int64_t pixel = 0;
    for (int64_t cell = 0; cell <= cells; ++cell) {
        while (pixel < pixels && taps[pixel].low < cell) ++pixel;
        runs[cell] = pixel;
    }
}

// Lower and upper bound of a proposal in each patch between the lines `low` and `high` of cells.
void bound_patches(const float* low, const float* high, int64_t width, float* lowest, float* highest) {
    for (int64_t x = 0; x < width; ++x) {
        const float a = low[x], b = high[x];
        lowest[x] = least(a, b);
        highest[x] = most(a, b);
    }
    for (int64_t x = 0; x + 1 < width; ++x) {
        const float lower = lowest[x + 1], upper = highest[x + 1];
        lowest[x] = least(lowest[x], lower);
        highest[x] = most(highest[x], upper);
    }
}

struct Image {
    const float* maps;
    int64_t cells, width;  // of the grid
    const Tap *down, *across;
    int64_t columns;  // pixels
    int32_t* winner;
};

// Winners of the pixels [top, bottom) x [left, right) of one patch among `candidates`.
void contest(const Image& image, int64_t top, int64_t bottom, int64_t left, int64_t right, const int32_t* candidates,
             int64_t count, float* best) {
    const int64_t width = right - left;
    for (int64_t y = top; y < bottom; ++y) {
        const Tap& down = image.down[y];
        int32_t* winner = image.winner + y * image.columns + left;
        for (int64_t x = 0; x < width; ++x) {
            best[x] = -INFINITY;
            winner[x] = 0;
        }
        for (int64_t entry = 0; entry < count; ++entry) {
            const int32_t v = candidates[entry];
            const float* low = image.maps + v * image.cells + down.low * image.width;
            const float* high = image.maps + v * image.cells + down.high * image.width;
            const Tap* across = image.across + left;
            const float rest = 1.0f - down.weight;
            const float first = rest * low[across->low] + down.weight * high[across->low];
            const float second = rest * low[across->high] + down.weight * high[across->high];
            for (int64_t x = 0; x < width; ++x) {
                const float value = (1.0f - across[x].weight) * first + across[x].weight * second;
                const bool better = value > best[x];
                best[x] = better ? value : best[x];
                winner[x] = better ? v : winner[x];
            }
        }
    }
}

void label(const float* maps, const int32_t* counts, int32_t* winner, int64_t batch, int64_t length, Grid grid,
           Grid size, int threads) {
    const int64_t width = grid.width;
    Buffer<Tap> down(size.height), across(size.width);
    Buffer<int64_t> rows(grid.height + 1), columns(width + 1);
    fill_taps(down, grid.height, size.height);
    fill_taps(across, width, size.width);
    fill_runs(down, size.height, grid.height, rows);
    fill_runs(across, size.width, width, columns);
    const int64_t line_size = round_up(3 * width + size.width, kLanes), list_size = width * length;
    Buffer<float> lines(line_size * threads);
    Buffer<int32_t> lists(list_size * threads), lengths(width * threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
    for (int64_t task = 0; task < batch * grid.height; ++task) {
        const int64_t item = task / grid.height, line = task % grid.height, thread = thread_number();
        const int64_t top = rows[line], bottom = rows[line + 1];
        if (top == bottom) continue;
        const Image image = {maps + item * length * grid.cells(), grid.cells(),  width, down, across, size.width,
                             winner + item * size.height * size.width};
        float *floor = lines + thread * line_size, *lowest = floor + width, *highest = lowest + width;
        int32_t *list = lists + thread * list_size, *listed = lengths + thread * width;
        const float *low = image.maps + down[top].low * width, *high = image.maps + down[top].high * width;
        for (int64_t x = 0; x < width; ++x) floor[x] = -INFINITY;
        memset(listed, 0, width * sizeof(int32_t));
        for (int32_t v = 0; v < counts[item]; ++v) {
            bound_patches(low + v * image.cells, high + v * image.cells, width, lowest, highest);
            for (int64_t x = 0; x < width; ++x) floor[x] = most(floor[x], lowest[x]);
        }
        for (int64_t x = 0; x < width; ++x) floor[x] -= kRounding * (floor[x] < 0 ? -floor[x] : floor[x]);
        for (int32_t v = 0; v < counts[item]; ++v) {
            bound_patches(low + v * image.cells, high + v * image.cells, width, lowest, highest);
            for (int64_t x = 0; x < width; ++x)
                if (highest[x] >= floor[x]) list[x * length + listed[x]++] = v;
        }
        for (int64_t x = 0; x < width; ++x) {
            const int64_t left = columns[x], right = columns[x + 1];
            if (left == right) continue;
            const int32_t* candidates = list + x * length;
            if (listed[x] != 1) {
                contest(image, top, bottom, left, right, candidates, listed[x], highest + width);
                continue;
            }
            for (int64_t y = top; y < bottom; ++y)
                for (int64_t pixel = left; pixel < right; ++pixel) image.winner[y * size.width + pixel] = candidates[0];
        }
    }
}

void renumber(int32_t* labels, int32_t* segments, int64_t batch, int64_t pixels, int64_t length, int threads) {
    const int64_t strips = ceil_div(pixels, kStrip), lists = batch * length;
    Buffer<uint8_t> present(lists * threads);
    Buffer<int32_t> numbers(lists);
    memset(present, 0, lists * threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        uint8_t* own = present + thread_number() * lists;
#pragma omp for
        for (int64_t task = 0; task < batch * strips; ++task) {
            const int64_t item = task / strips, first = task % strips * kStrip;
            const int32_t* strip = labels + item * pixels;
            uint8_t* found = own + item * length;
            for (int64_t pixel = first; pixel < least(first + kStrip, pixels); ++pixel) found[strip[pixel]] = 1;
        }
#pragma omp for
        for (int64_t item = 0; item < batch; ++item) {
            int32_t number = 0;
            for (int64_t label = item * length; label < (item + 1) * length; ++label) {
                numbers[label] = number;
                uint8_t found = 0;
                for (int thread = 0; thread < threads; ++thread) found |= present[thread * lists + label];
                number += found;
            }
            segments[item] = number;
        }
#pragma omp for
        for (int64_t task = 0; task < batch * strips; ++task) {
            const int64_t item = task / strips, first = task % strips * kStrip;
            int32_t* strip = labels + item * pixels;
            const int32_t* number = numbers + item * length;
            for (int64_t pixel = first; pixel < least(first + kStrip, pixels); ++pixel) strip[pixel] = number[strip[pixel]];
        }
    }
}

}  // namespace
}  // namespace diffseg::DIFFSEG_ISA
