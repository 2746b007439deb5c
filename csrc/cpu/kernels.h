// The CPU kernels: plain functions of pointers and sizes. All arrays are contiguous, row by row.
#pragma once

#include <cstdint>

namespace diffseg {

// winner[b, y, x] = the index v < counts[b] whose map, upsampled bilinearly from h x w to height x width, is largest.
//   maps   float [batch, length, h * w]
//   counts int32 [batch]
//   winner int32 [batch, height, width]
void label(const float* maps, const int32_t* counts, int32_t* winner, int64_t batch, int64_t length, int64_t h,
           int64_t w, int64_t height, int64_t width, int threads);

}  // namespace diffseg
