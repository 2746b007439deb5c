// Integer arithmetic of hosts and devices alike.
#pragma once

#include "primitives.cuh"

namespace diffseg::cuda {

template <class T>
DIFFSEG_BOTH constexpr T ceil_div(T value, T unit) {
    return (value + unit - 1) / unit;
}

template <class T>
DIFFSEG_BOTH constexpr T round_up(T value, T unit) {
    return ceil_div(value, unit) * unit;
}

// The row of a tile in shared memory that a thread writes, 16 bytes at a time, as its neighbour does: eight lanes, which
// write at once, take four rows two apart. Where a row's pitch is an odd multiple of 16 bytes their banks are different.
DIFFSEG_BOTH constexpr int row_written(int thread) {
    return thread / 16 * 8 + thread / 2 % 4 * 2 + thread / 8 % 2;
}

}  // namespace diffseg::cuda
