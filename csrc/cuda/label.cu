// label: bilinear upsample of the proposals and argmax in one pass; [P, H, W] never exists. renumber: labels without gaps.
//
//   winner(y, x) = argmax over v < count of the bilinear interpolation of map v at (y, x); ties go to the lowest v
//
// A thread takes four neighbouring pixels of a line: their taps are found once, the count is read on the device, and
// the winners are stored in 16 bytes.
//
// Grid: (1024 pixels, batch). At SD 1.4: 4 H W count reads from the first-level cache (a map is 16 KB), 4 H W bytes
// written.

#include "launch.cuh"
#include "sampling.cuh"

namespace diffseg::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPixels = 4;

struct Labels {
    View maps;  // proposals in the place of heads
    const int32_t* counts;
    int32_t* winner;
    Grid grid, size;
};

__global__ void __launch_bounds__(kThreads) label_kernel(const __grid_constant__ Labels in) {
    const int columns = ceil_div(in.size.width, kPixels), batch = blockIdx.y;
    const int index = blockIdx.x * kThreads + threadIdx.x, y = index / columns, x = index % columns * kPixels;
    if (y >= in.size.height) return;
    const Tap down = tap(y, in.grid.height, in.size.height);
    Tap across[kPixels];
    float best[kPixels];
    int32_t winner[kPixels];
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
        const int column = x + i < in.size.width ? x + i : in.size.width - 1;
        across[i] = tap(column, in.grid.width, in.size.width);
        best[i] = -INFINITY;
        winner[i] = 0;
    }
    const float* map = static_cast<const float*>(in.maps.data) + batch * in.maps.batch;
    const int count = in.counts[batch];
    for (int v = 0; v < count; ++v, map += in.maps.head) {
        const float *top = map + down.first * in.grid.width, *bottom = map + down.second * in.grid.width;
#pragma unroll
        for (int i = 0; i < kPixels; ++i) {
            const Tap& at = across[i];
            const float upper = at.near * top[at.first] + at.far * top[at.second];
            const float lower = at.near * bottom[at.first] + at.far * bottom[at.second];
            const float value = down.near * upper + down.far * lower;
            if (value > best[i]) best[i] = value, winner[i] = v;
        }
    }
    int32_t* target = in.winner + (static_cast<int64_t>(batch) * in.size.height + y) * in.size.width + x;
    if (in.size.width % kPixels == 0) {
        *reinterpret_cast<int4*>(target) = {winner[0], winner[1], winner[2], winner[3]};
        return;
    }
#pragma unroll
    for (int i = 0; i < kPixels; ++i)
        if (x + i < in.size.width) target[i] = winner[i];
}

constexpr int kStrip = 8 * kThreads;  // pixels of a block

struct Numbering {
    int32_t *labels, *present, *segments;  // [batch, pixels], [batch, length], [batch]
    int pixels, length;
};

// Marks the labels that occur in `present`, which holds zeros.
//
// Grid: (strips of pixels, batch). A block marks in shared memory first: what a strip holds is few labels. Bytes: 4 a
// pixel read.
__global__ void __launch_bounds__(kThreads) present_kernel(const Numbering in) {
    const int64_t batch = blockIdx.y;
    const int32_t* labels = in.labels + batch * in.pixels;
    int32_t* found = reinterpret_cast<int32_t*>(shared_memory());
    for (int label = threadIdx.x; label < in.length; label += kThreads) found[label] = 0;
    sync_block();
    const int first = blockIdx.x * kStrip, last = in.pixels - first < kStrip ? in.pixels : first + kStrip;
    for (int pixel = first + threadIdx.x; pixel < last; pixel += kThreads) found[labels[pixel]] = 1;
    sync_block();
    for (int label = threadIdx.x; label < in.length; label += kThreads)
        if (found[label] != 0) in.present[batch * in.length + label] = 1;
}

// The number of a label is how many smaller ones occur.
//
// Grid: (strips of pixels, batch). Each block counts anew, over 32 labels a word. Bytes: 4 a pixel read and written, and
// `present` a block, from the second-level cache.
__global__ void __launch_bounds__(kThreads) numbers_kernel(const Numbering in) {
    const int64_t batch = blockIdx.y;
    const int words = ceil_div(in.length, 32);
    uint32_t* bits = reinterpret_cast<uint32_t*>(shared_memory());
    int32_t* numbers = reinterpret_cast<int32_t*>(bits + words);
    const int32_t* present = in.present + batch * in.length;
    for (int label = threadIdx.x; label < words * 32; label += kThreads)
        bits[label / 32] = ballot(label < in.length && present[label] != 0);
    sync_block();
    for (int label = threadIdx.x; label <= in.length; label += kThreads) {
        int number = 0;
        for (int word = 0; word < label / 32; ++word) number += count_bits(bits[word]);
        if (label % 32 != 0) number += count_bits(bits[label / 32] & ((1u << label % 32) - 1));
        if (label < in.length) numbers[label] = number;
        else if (blockIdx.x == 0) in.segments[batch] = number;
    }
    sync_block();
    int32_t* labels = in.labels + batch * in.pixels;
    const int first = blockIdx.x * kStrip, last = in.pixels - first < kStrip ? in.pixels : first + kStrip;
    for (int pixel = first + threadIdx.x; pixel < last; pixel += kThreads) labels[pixel] = numbers[labels[pixel]];
}

}  // namespace

void label(const View& maps, const int32_t* counts, int32_t* winner, int batch, Grid grid, Grid size, Stream stream) {
    const Labels in = {maps, counts, winner, grid, size};
    const int threads = ceil_div(size.width, kPixels) * size.height;
    launch("label_kernel", label_kernel, dim3(ceil_div(threads, kThreads), batch), kThreads, 0, stream, in);
}

void renumber(int32_t* labels, int32_t* present, int32_t* segments, int batch, int pixels, int length, Stream stream) {
    const Numbering in = {labels, present, segments, pixels, length};
    const dim3 grid(ceil_div(pixels, kStrip), batch);
    launch("present_kernel", present_kernel, grid, kThreads, length * sizeof(int32_t), stream, in);
    const size_t table = (ceil_div(length, 32) + length) * sizeof(int32_t);
    launch("numbers_kernel", numbers_kernel, grid, kThreads, table, stream, in);
}

}  // namespace diffseg::cuda
