// label: bilinear upsample of the proposals and argmax in one pass; [P, H, W] never exists.
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

}  // namespace

void label(const View& maps, const int32_t* counts, int32_t* winner, int batch, Grid grid, Grid size, Stream stream) {
    const Labels in = {maps, counts, winner, grid, size};
    const int threads = ceil_div(size.width, kPixels) * size.height;
    launch("label_kernel", label_kernel, dim3(ceil_div(threads, kThreads), batch), kThreads, 0, stream, in);
}

}  // namespace diffseg::cuda
