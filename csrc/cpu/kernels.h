// The CPU kernels: plain functions of pointers and sizes, one table of them for each instruction set.
#pragma once

#include <cstdint>

namespace diffseg {

enum class Type { float32, bfloat16, float16 };

// A tensor [batch, heads, rows, columns]; strides count elements.
struct View {
    const void* data;
    Type type;
    int64_t batch, head, row, column;
};

struct Grid {
    int64_t height, width;
    int64_t cells() const { return height * width; }
};

// Self-attention of one layer, as queries and keys, or as maps (then only `queries` is set, with column stride 1).
struct Layer {
    View queries, keys;
    const float* logsumexps;  // [batch, heads, n], or null
    int64_t heads, depth;
    Grid grid;
    float scale;  // of the scores
    float ratio;  // R_k
    int64_t number;  // in the caller's order
};

struct MergeOptions {
    const int64_t* anchors;  // [length]
    int64_t length;
    const float* thresholds;  // [rounds]
    int64_t rounds;
    bool exclusive;  // a group holds only elements not yet taken: the rule "paper"
};

// Words of a text, as shares of its tokens.
struct Words {
    const float* shares;  // [batch, count, tokens]
    int64_t count, tokens;
};

constexpr int64_t kFinite = INT64_MAX;  // beyond the number of any layer or image: the least of several is what is bad

// Probabilities and divisors are clamped from below to this, as in the reference, so that zeros stay finite.
constexpr float kSmallestProbability = 1e-30f;
constexpr float kSmallestNorm = 1e-15f;  // of what is smaller, float32 loses the squares

struct Kernels {
    // out [batch, N, N] over `grid`. Layers are sorted by grid, and none exceeds it. Returns kFinite, or the least
    // number of a layer whose attention has NaN or infinity.
    int64_t (*aggregate)(const Layer* layers, int64_t count, Grid grid, int64_t batch, float* out, int threads);
    int64_t (*aggregate_maps)(const Layer* layers, int64_t count, Grid grid, int64_t batch, float* out, int threads);
    // attention [batch, N, N] with column stride 1 (its head stride is not used); maps [batch, length, N]; counts
    // [batch]. Returns kFinite, or the first image whose attention has NaN or infinity.
    int64_t (*merge)(const View& attention, Grid grid, int64_t batch, const MergeOptions& options, float* maps,
                     int32_t* counts, int threads);
    // maps [batch, length, N]; winner [batch, size.height, size.width].
    void (*label)(const float* maps, const int32_t* counts, int32_t* winner, int64_t batch, int64_t length, Grid grid,
                  Grid size, int threads);
    // labels [batch, pixels], below `length`, are numbered 0..S-1 in place; segments [batch]: S.
    void (*renumber)(int32_t* labels, int32_t* segments, int64_t batch, int64_t pixels, int64_t length, int threads);
    // Cross-attention: layers as for aggregate, with keys [batch, heads, words.tokens, depth]; out [batch, words.count,
    // size.height, size.width]. Returns kFinite, or the least number of a layer whose attention has NaN or infinity.
    int64_t (*aggregate_cross)(const Layer* layers, int64_t count, int64_t batch, const Words& words, Grid size,
                               float* out, int threads);
    // maps [batch, words, N]; labels [batch, size.height, size.width]; out [batch, masks, words].
    void (*score_masks)(const float* maps, const int32_t* labels, int64_t batch, int64_t words, Grid grid, Grid size,
                        int64_t masks, float* out, int threads);
    // out[v, f] = [lower bound, upper bound, value] of D between maps v and f, for tests: maps [length, N].
    void (*divergences)(const float* maps, int64_t length, Grid grid, float* out);
    // For benchmarks: rounds of multiply-adds and of exponentials in one thread's registers; return how many.
    double (*multiply_adds)(int64_t rounds);
    double (*exponentials)(int64_t rounds);
};

// The table for an instruction set, "avx512bf16", "avx512", "avx2" or "portable"; null where it is unknown or this
// machine lacks it.
const Kernels* kernels(const char* isa);

// Whether "avx512bf16" comes before "avx512": on AMD's processors, where it was measured to be faster.
bool bfloat16_first();

namespace avx512bf16 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace portable {
extern const Kernels table;
}

}  // namespace diffseg
