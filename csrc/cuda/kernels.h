// The CUDA kernels as functions of raw pointers, sizes and a stream. Each launches on the caller's stream and current
// device, waits for nothing and allocates nothing: scratch memory is the caller's, of the size that the function of the
// same name with _workspace gives. They throw std::runtime_error, naming the kernel, where a launch fails.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace diffseg::cuda {

enum class Type { float32, float16, bfloat16 };

struct Grid {
    int height, width;
    int cells() const { return height * width; }
    bool operator==(const Grid& other) const { return height == other.height && width == other.width; }
};

// [batch, heads, rows, columns]; strides count elements, that of the columns is 1.
struct View {
    const void* data;
    int64_t batch, head, row;
};

// Attention of a layer. Rows of queries and keys start at multiples of 16 bytes, and `depth` channels, a multiple of 16
// bytes, are theirs to read (zeros beyond the head's own).
struct Layer {
    View queries, keys;
    const float* logsumexps;  // [batch, heads, n], or null: computed
    int heads, depth;
    Grid grid;
    float scale;  // of the scores
    float ratio;  // R_k
};

// Words of a text, as shares of its tokens.
struct Words {
    const float* shares;  // [batch, count, tokens]
    int count, tokens;
};

struct MapLayer {
    View maps;
    int heads;
    Grid grid;
    float ratio;
};

struct Attention {  // A_f [batch, N, N], contiguous
    void* data;
    Type type;  // float32 or bfloat16
    Grid grid;
    int batch;
};

struct MergeOptions {
    std::vector<int> anchors;       // flat cells, at most kMostAnchors
    std::vector<float> thresholds;  // one a round
    bool exclusive;                 // a group holds only elements not yet taken: the rule "paper"
};

constexpr int kMostAnchors = 1024;

// Probabilities and divisors are clamped from below to this, as in the reference, so that zeros stay finite.
constexpr float kSmallestProbability = 1e-30f;
constexpr float kSmallestNorm = 1e-15f;  // of what is smaller, float32 loses the squares

struct Stream {
    uintptr_t handle;
};

size_t aggregate_workspace(const std::vector<Layer>& layers, Type type, const Attention& out);
void aggregate(const std::vector<Layer>& layers, Type type, const Attention& out, void* workspace, Stream stream);

// Bytes of shared memory that the sum of a grid's maps takes: a block holds a row.
size_t row_bytes(Grid grid);

size_t aggregate_maps_workspace(const std::vector<MapLayer>& layers, const Attention& out);
void aggregate_maps(const std::vector<MapLayer>& layers, Type type, const Attention& out, void* workspace,
                    Stream stream);

// attention [batch, N, N] (its head stride is not used), float32 or bfloat16; maps [batch, anchors, N]; counts [batch].
size_t merge_workspace(int batch, int cells, const MergeOptions& options);
void merge(const View& attention, Type type, int batch, int cells, const MergeOptions& options, float* maps,
           int32_t* counts, void* workspace, Stream stream);

// maps [batch, length, N] (strides as of heads: its row stride is not used); winner [batch, size.height, size.width].
void label(const View& maps, const int32_t* counts, int32_t* winner, int batch, Grid grid, Grid size, Stream stream);

// labels [batch, pixels], below `length`, are numbered 0..S-1 in place; segments [batch]: S; present [batch, length]: zeros.
void renumber(int32_t* labels, int32_t* present, int32_t* segments, int batch, int pixels, int length, Stream stream);

// Cross-attention: keys [batch, heads, words.tokens, d], and neither log-sum-exps nor ratios; maps [batch, words.count,
// size.height, size.width].
size_t aggregate_cross_workspace(const std::vector<Layer>& layers, const Words& words, int batch, Grid size);
void aggregate_cross(const std::vector<Layer>& layers, Type type, const Words& words, int batch, Grid size, float* maps,
                     void* workspace, Stream stream);

// maps [batch, words, N], labels [batch, size.height, size.width]; scores [batch, masks, words].
size_t score_masks_workspace(int batch, int words, Grid size, int masks);
void score_masks(const float* maps, const int32_t* labels, float* scores, int batch, int words, Grid grid, Grid size,
                 int masks, void* workspace, Stream stream);

}  // namespace diffseg::cuda
