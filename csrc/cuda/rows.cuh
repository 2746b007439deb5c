// Sums of rows of maps: what aggregate_maps is, and how aggregate combines the partial sums of a grid.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "output.cuh"

namespace diffseg::cuda {

// Maps [batch, heads, n, n] that enter a sum as ratio * (sum over heads), each row normalised first if asked.
struct RowSource {
    View maps;
    int heads;
    float ratio;
};

// out [batch, n, n] = the sum of the sources, maps over `grid`; with `normalise`, each of their rows counts as divided
// by its sum after upsampling to the output grid.
struct RowSum {
    std::vector<RowSource> sources;
    Grid grid;
    void* out;
    bool normalise;
};

// All sums in as few launches as the tables allow; `output` says how they are stored and what is added to each.
void sum_rows(const std::vector<RowSum>& sums, Type type, const Output& output, int batch, Stream stream);

// Has `output` add the sums of the low-resolution grids.
inline void add_lows(Output& output, const std::vector<RowSum>& sums) {
    if (sums.size() > kMostLows)
        throw std::invalid_argument("grids: expected at most " + std::to_string(kMostLows) +
                                    " distinct ones below the output's, got " + std::to_string(sums.size()));
    for (const RowSum& sum : sums)
        output.lows[output.count++] = {static_cast<const float*>(sum.out), sum.grid.height, sum.grid.width};
}

}  // namespace diffseg::cuda
