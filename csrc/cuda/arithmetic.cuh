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

}  // namespace diffseg::cuda
