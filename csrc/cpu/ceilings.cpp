// What one thread can do at most, for benchmarks: chains of steps on values that stay in registers.

#include "simd.h"

namespace diffseg::DIFFSEG_ISA {
namespace {

// Takes `rounds` steps on kChains vectors, which hide each other's latency; returns the number of values.
template <int kChains, class Step>
double repeat(int64_t rounds, Step step) {
    Vec chains[kChains];
    for (int chain = 0; chain < kChains; ++chain) chains[chain] = splat(1.0f / static_cast<float>(chain + 1));
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 16
        for (int chain = 0; chain < kChains; ++chain) chains[chain] = step(chains[chain]);
    }
    Vec last = {};
    for (int chain = 0; chain < kChains; ++chain) last += chains[chain];
    volatile float kept = sum(last);  // or no step would be taken
    static_cast<void>(kept);
    return static_cast<double>(rounds) * kChains * kLanes;
}

double multiply_adds(int64_t rounds) {
    return repeat<12>(rounds, [](Vec value) { return value * 0.999f + 0.001f; });
}

double exponentials(int64_t rounds) {
    return repeat<8>(rounds, [](Vec value) { return exp2(value - 1.0f); });
}

}  // namespace
}  // namespace diffseg::DIFFSEG_ISA
