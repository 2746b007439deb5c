// aggregate_cross and score_masks: where an image attends to each word of a text, and how well a word fits each mask.
//
//   T_k   = mean over heads of softmax(Q_k K_k^T scale_k), [n_k, tokens]
//   words = normalise(sum_k upsample(shares T_k^T)); normalise: divide by the L2 norm over the pixels
//   score = mean of the upsampled map of a word over the pixels of a mask
//
//   words_kernel      a block takes 64 rows of a layer through all heads: of T_k only the words' sums leave it
//   upsample_kernel   a line of a word: layers of one grid are summed as it is interpolated; and the sum of its squares
//   normalise_kernel  adds the squares of a word up and scales its map
//   mask_sums_kernel  a band of pixels: sums over each mask
//   scores_kernel     adds the bands up and divides by the number of pixels
//
// Scores are products on tensor cores, as in aggregate.cu. A warp holds 16 rows x 80 tokens of them in registers, and as
// many sums over heads: CLIP's 77 tokens are one tile, whose softmax needs nothing else. A longer text takes two passes
// through tiles of 80: the first leaves the largest score and the mass of each row and head in memory.
//
// At SD 1.4 and 512 x 512: 1.8 GFLOP (2.1 with the padded widths), 17 M exp2; Q (23 MB) is read once, K (49 to 197 KB a
// layer) by each of 421 blocks from the second-level cache, 28 MB in all; 0.1 MB a word written, upsampled to 1 MB, which
// is scaled in that cache. score_masks reads maps (1 MB a word) and labels (1 MB) once, the labels again for each 256
// masks and each 8 words more. All sums have a fixed order that does not depend on the batch.

#include <algorithm>
#include <cmath>

#include "launch.cuh"
#include "reductions.cuh"
#include "rounding.cuh"
#include "sampling.cuh"

namespace diffseg::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 16 * kWarps;  // of a block
constexpr int kTokens = 80;         // of a tile
constexpr int kChunk = 128;         // bytes of a row that are in shared memory at once
constexpr int kGranules = kChunk / 16;
constexpr int kPitch = kChunk + 16;  // an odd multiple of 16 bytes: the eight rows of a matrix lie in different banks
constexpr int kStageBytes = (kRows + kTokens) * kPitch;
constexpr int kMostLayers = 32;

struct Entry {  // a layer; strides and depth count 16 bytes
    const uint4 *queries, *keys;
    int query_batch, query_head, query_row, key_batch, key_head, key_row;
    int heads, depth, cells, first_block;
    float scale;   // of the exponent of 2
    float* sums;   // [batch, words, cells]
    Online* seen;  // [batch, heads, cells], of texts longer than a tile
};

struct Table {
    Entry layers[kMostLayers];
    int count;
    Words words;
};
static_assert(sizeof(Table) <= 4096, "every driver takes arguments of this size");

using Scores = float[kTokens / 8][4];  // [16 rows][8 tokens] fragments of a warp's 16 x 80

// A thread's row of fragment elements 2 r and 2 r + 1, in the block; and its token of element `c` of fragment `j`.
DIFFSEG_DEVICE int fragment_row(int r) { return threadIdx.x / 32 * 16 + r * 8 + threadIdx.x % 32 / 4; }
DIFFSEG_DEVICE int fragment_token(int j, int c) { return j * 8 + threadIdx.x % 4 * 2 + c % 2; }

// Starts copying a chunk of `kLines` rows from `first` on; zeros beyond `end` rows and `depth` x 16 bytes.
template <int kLines>
DIFFSEG_DEVICE void copy_rows(unsigned char* target, const uint4* rows, int stride, int first, int end, int chunk,
                              int depth) {
    static_assert(kLines * kGranules % kThreads == 0);
#pragma unroll
    for (int i = 0; i < kLines * kGranules / kThreads; ++i) {
        const int line = (i * kThreads + threadIdx.x) / kGranules, place = threadIdx.x % kGranules;
        const int granule = chunk * kGranules + place;
        if (granule >= round_up(depth, 2)) continue;  // is not multiplied
        const bool inside = first + line < end && granule < depth;
        const uint4* source = rows + static_cast<int64_t>(first + line) * stride + granule;
        copy_16(target + line * kPitch + place * 16, inside ? source : rows, inside);
    }
}

// A place in the sequence of passes, tiles of tokens, heads and chunks.
struct Cursor {
    int pass, tile, head, chunk;

    DIFFSEG_DEVICE void advance(int tiles, const Entry& layer) {
        if (++chunk < ceil_div(layer.depth, kGranules)) return;
        chunk = 0;
        if (++head < layer.heads) return;
        head = 0;
        if (++tile < tiles) return;
        tile = 0;
        ++pass;
    }
};

DIFFSEG_DEVICE void copy_chunk(unsigned char* stage, const Entry& layer, const Cursor& at, int batch, int row,
                               int tokens) {
    const uint4* queries = layer.queries + static_cast<int64_t>(batch) * layer.query_batch +
                           static_cast<int64_t>(at.head) * layer.query_head;
    const uint4* keys =
        layer.keys + static_cast<int64_t>(batch) * layer.key_batch + static_cast<int64_t>(at.head) * layer.key_head;
    copy_rows<kRows>(stage, queries, layer.query_row, row, layer.cells, at.chunk, layer.depth);
    copy_rows<kTokens>(stage + kRows * kPitch, keys, layer.key_row, at.tile * kTokens, tokens, at.chunk, layer.depth);
    commit_copies();
}

// scores += Q K^T over `granules` x 16 bytes of channels: 8 channels of 16 bits, or 4 of 32, a granule.
template <Type kType>
DIFFSEG_DEVICE void multiply_chunk(const unsigned char* stage, int granules, Scores& scores) {
    const int lane = threadIdx.x % 32;
    const unsigned char* a_row = stage + (threadIdx.x / 32 * 16 + lane % 16) * kPitch + lane / 16 * 16;
    const unsigned char* b_row = stage + (kRows + lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 16;
    for (int step = 0; step < granules; step += 2, a_row += 32, b_row += 32) {
        uint32_t a[4], high[4], low[4], b[4];
        load_matrices(a, a_row);
        if constexpr (kType == Type::float32) split_tf32(a, high, low);
#pragma unroll
        for (int j = 0; j < kTokens / 8; j += 2) {
            load_matrices(b, b_row + j * 8 * kPitch);
            if constexpr (kType == Type::float32) {
                uint32_t b_high[4], b_low[4];
                split_tf32(b, b_high, b_low);
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    multiply_tf32(scores[j + n], low, b_high[2 * n], b_high[2 * n + 1]);
                    multiply_tf32(scores[j + n], high, b_low[2 * n], b_low[2 * n + 1]);
                    multiply_tf32(scores[j + n], high, b_high[2 * n], b_high[2 * n + 1]);
                }
            } else {
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    if constexpr (kType == Type::float16)
                        multiply_float16(scores[j + n], a, b[2 * n], b[2 * n + 1]);
                    else
                        multiply_bfloat16(scores[j + n], a, b[2 * n], b[2 * n + 1]);
                }
            }
        }
    }
}

DIFFSEG_DEVICE void clear(Scores& scores) {
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) scores[j][c] = 0;
}

// Makes scores exponents of 2, -infinity beyond `listed` tokens.
DIFFSEG_DEVICE void scale_scores(Scores& scores, float scale, int listed) {
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) scores[j][c] = fragment_token(j, c) < listed ? scores[j][c] * scale : -INFINITY;
}

DIFFSEG_DEVICE float row_largest(const Scores& exponents, int r) {
    float largest = Online().largest;
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) largest = fmaxf(largest, fmaxf(exponents[j][2 * r], exponents[j][2 * r + 1]));
    return quad_largest(largest);
}

// Makes a row's exponents powers relative to `largest`; returns their sum.
DIFFSEG_DEVICE float raise_row(Scores& exponents, int r, float largest) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j)
#pragma unroll
        for (int c = 2 * r; c < 2 * r + 2; ++c) sum += exponents[j][c] = exp2_approximate(exponents[j][c] - largest);
    return quad_sum(sum);
}

// The first pass of a long text: takes a tile's exponents into account in what is known of each row.
DIFFSEG_DEVICE void remember(Online* seen, int row, int cells, bool first, Scores& exponents) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int index = row + fragment_row(r);
        const float largest = row_largest(exponents, r), sum = raise_row(exponents, r, largest);
        if (threadIdx.x % 4 != 0 || index >= cells) continue;
        Online all = first ? Online() : seen[index];
        all.merge(largest, sum);
        seen[index] = all;
    }
}

// total += softmax / heads, of a tile's exponents; without `seen` the tile is the whole text.
DIFFSEG_DEVICE void add_softmax(Scores& total, Scores& exponents, const Online* seen, int row, int cells, int heads) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int index = row + fragment_row(r);
        Online all;
        if (seen != nullptr) {
            all = seen[index < cells ? index : cells - 1];
            raise_row(exponents, r, all.largest);
        } else {
            all.sum = raise_row(exponents, r, row_largest(exponents, r));
        }
        const float share = 1.0f / (static_cast<float>(heads) * all.sum);
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j)
#pragma unroll
            for (int c = 2 * r; c < 2 * r + 2; ++c) total[j][c] = fmaf(exponents[j][c], share, total[j][c]);
    }
}

// sums [words, cells]: what the tile adds to each word, stored for the first tile.
DIFFSEG_DEVICE void add_words(const Words& words, float* sums, int batch, int row, int cells, int tile,
                              const Scores& total) {
    const float* shares = words.shares + static_cast<int64_t>(batch) * words.count * words.tokens + tile * kTokens;
    const int listed = words.tokens - tile * kTokens;
    for (int word = 0; word < words.count; ++word, shares += words.tokens, sums += cells) {
        float value[2] = {};
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j)
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int token = fragment_token(j, c);
                const float share = token < listed ? shares[token] : 0.0f;
                value[0] = fmaf(total[j][c], share, value[0]);
                value[1] = fmaf(total[j][2 + c], share, value[1]);
            }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            value[r] = quad_sum(value[r]);
            const int index = row + fragment_row(r);
            if (threadIdx.x % 4 == 0 && index < cells) sums[index] = tile == 0 ? value[r] : sums[index] + value[r];
        }
    }
}

// Grid: (64 rows of all layers, batch).
template <Type kType>
__global__ void __launch_bounds__(kThreads) words_kernel(const __grid_constant__ Table table) {
    int index = 0;
    while (index + 1 < table.count && static_cast<int>(blockIdx.x) >= table.layers[index + 1].first_block) ++index;
    const Entry& layer = table.layers[index];
    const Words& words = table.words;
    const int row = (blockIdx.x - layer.first_block) * kRows, batch = blockIdx.y;
    const int tiles = ceil_div(words.tokens, kTokens), passes = tiles > 1 ? 2 : 1;
    float* sums = layer.sums + static_cast<int64_t>(batch) * words.count * layer.cells;
    unsigned char* stages = shared_memory();
    Scores total;
    clear(total);
    Cursor now = {}, ahead = now;
    int stage = 0;
    copy_chunk(stages, layer, ahead, batch, row, words.tokens);
    ahead.advance(tiles, layer);
    while (now.pass < passes) {
        const Cursor at = now;
        Scores scores;
        clear(scores);
        do {
            wait_for_copies();
            sync_block();  // the chunk is there for all, and the other stage has been read by all
            if (ahead.pass < passes) {
                copy_chunk(stages + (stage ^ 1) * kStageBytes, layer, ahead, batch, row, words.tokens);
                ahead.advance(tiles, layer);
            }
            const int left = layer.depth - now.chunk * kGranules;
            multiply_chunk<kType>(stages + stage * kStageBytes, left < kGranules ? left : kGranules, scores);
            stage ^= 1;
            now.advance(tiles, layer);
        } while (now.chunk != 0);
        scale_scores(scores, layer.scale, words.tokens - at.tile * kTokens);
        Online* seen = nullptr;
        if (passes > 1) seen = layer.seen + (static_cast<int64_t>(batch) * layer.heads + at.head) * layer.cells;
        if (at.pass + 1 < passes) {
            remember(seen, row, layer.cells, at.tile == 0, scores);
            continue;
        }
        add_softmax(total, scores, seen, row, layer.cells, layer.heads);
        if (at.head + 1 < layer.heads) continue;
        add_words(words, sums, batch, row, layer.cells, at.tile, total);
        clear(total);
    }
}

constexpr int kMostLevels = 64;
constexpr int kPixels = 4;  // of a thread
constexpr int kPiece = kPixels * kThreads;

struct Level {  // the layers of one grid
    const float* sums;  // [layers, batch, words, height, width]
    int layers, height, width;
};

struct Levels {
    Level levels[kMostLevels];
    int count;
    bool accumulate;  // add to what is there
    Grid size;
    float *maps, *squares;
};

// Grid: (pieces of 512 pixels of all lines, words, batch).
__global__ void __launch_bounds__(kThreads) upsample_kernel(const __grid_constant__ Levels in) {
    const int pieces = ceil_div(in.size.width, kPiece), y = blockIdx.x / pieces;
    const int first = blockIdx.x % pieces * kPiece + threadIdx.x;
    const int64_t plane = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
    const int64_t planes = static_cast<int64_t>(gridDim.z) * gridDim.y;
    float* target = in.maps + (plane * in.size.height + y) * in.size.width;
    float* scratch = reinterpret_cast<float*>(shared_memory());
    float* line = scratch + kWarps;
    float total[kPixels] = {};
    for (int l = 0; l < in.count; ++l) {
        const Level& level = in.levels[l];
        const Tap down = tap(y, level.height, in.size.height);
        sync_block();  // the line before has been read
        for (int x = threadIdx.x; x < level.width; x += kThreads) {
            float value = 0;
            for (int layer = 0; layer < level.layers; ++layer) {
                const float* map = level.sums + (layer * planes + plane) * level.height * level.width + x;
                value += down.near * map[down.first * level.width] + down.far * map[down.second * level.width];
            }
            line[x] = value;
        }
        sync_block();
#pragma unroll
        for (int i = 0; i < kPixels; ++i) {
            const int x = first + i * kThreads;
            if (x >= in.size.width) break;
            const Tap across = tap(x, level.width, in.size.width);
            total[i] += across.near * line[across.first] + across.far * line[across.second];
        }
    }
    float square = 0;
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
        const int x = first + i * kThreads;
        if (x >= in.size.width) break;
        if (in.accumulate) total[i] += target[x];
        target[x] = total[i];
        square = fmaf(total[i], total[i], square);
    }
    square = block_sum<kWarps>(square, scratch);
    if (threadIdx.x == 0) in.squares[plane * gridDim.x + blockIdx.x] = square;
}

// Grid: (512 pixels, words, batch).
__global__ void __launch_bounds__(kThreads)
    normalise_kernel(float* maps, const float* squares, int parts, int pixels) {
    const int64_t plane = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
    float square = 0;
    for (int part = threadIdx.x; part < parts; part += kThreads) square += squares[plane * parts + part];
    const float norm = sqrtf(block_sum<kWarps>(square, reinterpret_cast<float*>(shared_memory())));
    const float factor = 1.0f / (norm < kSmallestNorm ? kSmallestNorm : norm);  // NaN stays NaN
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
        const int pixel = blockIdx.x * kPiece + i * kThreads + threadIdx.x;
        if (pixel < pixels) maps[plane * pixels + pixel] *= factor;
    }
}

// The op: what is launched for given layers, and the workspace it needs.
class CrossAggregation {
   public:
    CrossAggregation(const std::vector<Layer>& layers, const Words& words, int batch, Grid size, Workspace& workspace)
        : layers_(layers), words_(words), batch_(batch), size_(size), sums_(layers.size()), seen_(layers.size()) {
        for (const Layer& layer : layers) {
            const auto same = [&](const Level& level) {
                return level.height == layer.grid.height && level.width == layer.grid.width;
            };
            if (std::none_of(levels_.begin(), levels_.end(), same)) add_level(layer.grid, workspace);
        }
        if (words.tokens > kTokens)
            for (size_t layer = 0; layer < layers.size(); ++layer)
                seen_[layer] = workspace.take<Online>(size_t(batch) * layers[layer].heads * layers[layer].grid.cells());
        squares_ = workspace.take<float>(size_t(batch) * words.count * blocks_of_lines());
    }

    void run(Type type, float* maps, Stream stream) const {
        for (size_t first = 0; first < layers_.size(); first += kMostLayers)
            sum_words(type, first, std::min(first + kMostLayers, layers_.size()), stream);
        for (size_t first = 0; first < levels_.size(); first += kMostLevels)
            upsample(first, std::min(first + kMostLevels, levels_.size()), maps, stream);
        const int pixels = size_.cells();
        launch("normalise_kernel", normalise_kernel, dim3(ceil_div(pixels, kPiece), words_.count, batch_), kThreads,
               kWarps * sizeof(float), stream, maps, squares_, blocks_of_lines(), pixels);
    }

   private:
    int blocks_of_lines() const { return ceil_div(size_.width, kPiece) * size_.height; }

    void add_level(Grid grid, Workspace& workspace) {
        std::vector<size_t> members;
        for (size_t layer = 0; layer < layers_.size(); ++layer)
            if (layers_[layer].grid == grid) members.push_back(layer);
        const size_t size = size_t(batch_) * words_.count * grid.cells();
        float* sums = workspace.take<float>(members.size() * size);
        for (size_t index = 0; index < members.size(); ++index) sums_[members[index]] = sums + index * size;
        levels_.push_back({sums, static_cast<int>(members.size()), grid.height, grid.width});
    }

    Entry entry(size_t index, Type type, int first_block) const {
        const Layer& layer = layers_[index];
        const int unit = type == Type::float32 ? 4 : 8;  // elements in 16 bytes
        const View &q = layer.queries, &k = layer.keys;
        return {static_cast<const uint4*>(q.data), static_cast<const uint4*>(k.data),
                static_cast<int>(q.batch / unit), static_cast<int>(q.head / unit), static_cast<int>(q.row / unit),
                static_cast<int>(k.batch / unit), static_cast<int>(k.head / unit), static_cast<int>(k.row / unit),
                layer.heads, layer.depth / unit, layer.grid.cells(), first_block,
                layer.scale * kLog2E, sums_[index], seen_[index]};
    }

    void sum_words(Type type, size_t first, size_t end, Stream stream) const {
        Table table = {};
        table.words = words_;
        int blocks = 0;
        for (size_t layer = first; layer < end; ++layer) {
            table.layers[table.count++] = entry(layer, type, blocks);
            blocks += ceil_div(layers_[layer].grid.cells(), kRows);
        }
        const auto kernel = type == Type::float32   ? words_kernel<Type::float32>
                            : type == Type::float16 ? words_kernel<Type::float16>
                                                    : words_kernel<Type::bfloat16>;
        launch("words_kernel", kernel, dim3(blocks, batch_), kThreads, 2 * kStageBytes, stream, table);
    }

    void upsample(size_t first, size_t end, float* maps, Stream stream) const {
        Levels in = {};
        in.size = size_, in.maps = maps, in.squares = squares_;
        in.accumulate = first > 0;
        int width = 0;
        for (size_t level = first; level < end; ++level) {
            in.levels[in.count++] = levels_[level];
            width = std::max(width, levels_[level].width);
        }
        launch("upsample_kernel", upsample_kernel, dim3(blocks_of_lines(), words_.count, batch_), kThreads,
               (kWarps + width) * sizeof(float), stream, in);
    }

    const std::vector<Layer>& layers_;
    const Words& words_;
    int batch_;
    Grid size_;
    std::vector<float*> sums_;   // of each layer, those of one grid after the other
    std::vector<Online*> seen_;  // of each layer
    std::vector<Level> levels_;
    float* squares_;  // [batch, words, blocks of lines]
};

constexpr int kMasks = 256;  // of a block
constexpr int kWords = 8;    // of a block
constexpr int kBandPixels = 2048;
constexpr int kBandBytes = 4 << 20;  // of the partial sums of an image's bands, about, at most

struct Masks {
    const float* maps;      // [batch, words, grid]
    const int32_t* labels;  // [batch, size]
    float* sums;            // [batch, bands, masks, words]
    int32_t* pixels;        // [batch, bands, masks]
    Grid grid, size;
    int words, masks, bands, band;  // `band`: pixels of one
};

// What the warps of a block have found, in shared memory: sums [warps, masks, kWords] and pixels [warps, masks].
struct Found {
    int masks;
    float* sums;
    int32_t* pixels;

    DIFFSEG_DEVICE explicit Found(int masks) : masks(masks) {
        sums = reinterpret_cast<float*>(shared_memory());
        pixels = reinterpret_cast<int32_t*>(sums + kWarps * masks * kWords);
    }
    static size_t bytes(int masks) { return kWarps * masks * (kWords * sizeof(float) + sizeof(int32_t)); }

    DIFFSEG_DEVICE void clear() {
        for (int index = threadIdx.x; index < kWarps * masks * kWords; index += kThreads) sums[index] = 0;
        for (int index = threadIdx.x; index < kWarps * masks; index += kThreads) pixels[index] = 0;
    }

    // Adds the values of a warp's pixels to the masks of those that are `listed`, one mask after the other.
    DIFFSEG_DEVICE void add(const float (&value)[kWords], int words, int mask, bool listed) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        for (uint32_t left = ballot(listed); left != 0;) {
            const int next = static_cast<int>(broadcast(mask, lowest_bit(left)));
            const bool member = listed && mask == next;
            const uint32_t members = ballot(member);
            float sum = 0;
#pragma unroll
            for (int w = 0; w < kWords; ++w) {
                if (w >= words) break;
                const float total = warp_sum(member ? value[w] : 0.0f);
                if (lane == w) sum = total;
            }
            if (lane < words) sums[(warp * masks + next) * kWords + lane] += sum;
            if (lane == 0) pixels[warp * masks + next] += count_bits(members);
            left &= ~members;
        }
    }

    DIFFSEG_DEVICE float sum(int mask, int word) const {
        float total = 0;
        for (int warp = 0; warp < kWarps; ++warp) total += sums[(warp * masks + mask) * kWords + word];
        return total;
    }
    DIFFSEG_DEVICE int32_t members(int mask) const {
        int32_t total = 0;
        for (int warp = 0; warp < kWarps; ++warp) total += pixels[warp * masks + mask];
        return total;
    }
};

// The first of the masks, or words, that a block takes, and how many.
struct Range {
    int first, count;

    DIFFSEG_DEVICE Range(int block, int size, int all)
        : first(block * size), count(all - first < size ? all - first : size) {}
};

// Grid: (bands, blocks of masks x blocks of words, batch).
__global__ void __launch_bounds__(kThreads) mask_sums_kernel(const __grid_constant__ Masks in) {
    const int blocks = ceil_div(in.masks, kMasks), batch = blockIdx.z;
    const Range masks(blockIdx.y % blocks, kMasks, in.masks), words(blockIdx.y / blocks, kWords, in.words);
    const Range pixels(blockIdx.x, in.band, in.size.height * in.size.width);
    const int cells = in.grid.height * in.grid.width;
    const float* maps = in.maps + (static_cast<int64_t>(batch) * in.words + words.first) * cells;
    const int32_t* labels = in.labels + static_cast<int64_t>(batch) * in.size.height * in.size.width + pixels.first;
    Found found(masks.count);
    found.clear();
    sync_block();
    for (int start = threadIdx.x / 32 * 32; start < pixels.count; start += kThreads) {
        const int index = start + threadIdx.x % 32, pixel = pixels.first + index;
        const bool inside = index < pixels.count;
        const int32_t label = inside ? labels[index] : -1;
        const bool listed = label >= masks.first && label - masks.first < masks.count;
        float value[kWords] = {};
        if (listed) {
            const Taps at = taps(pixel / in.size.width, pixel % in.size.width, in.grid.height, in.grid.width,
                                 in.size.height, in.size.width);
#pragma unroll
            for (int w = 0; w < kWords; ++w)
                if (w < words.count) value[w] = sample(maps + static_cast<int64_t>(w) * cells, at);
        }
        found.add(value, words.count, listed ? label - masks.first : 0, listed);
    }
    sync_block();
    const int64_t line = (static_cast<int64_t>(batch) * in.bands + blockIdx.x) * in.masks + masks.first;
    for (int index = threadIdx.x; index < masks.count * words.count; index += kThreads) {
        const int mask = index / words.count, word = index % words.count;
        in.sums[(line + mask) * in.words + words.first + word] = found.sum(mask, word);
    }
    if (words.first > 0) return;
    for (int mask = threadIdx.x; mask < masks.count; mask += kThreads) in.pixels[line + mask] = found.members(mask);
}

// Grid: (128 scores, batch).
__global__ void __launch_bounds__(kThreads) scores_kernel(const __grid_constant__ Masks in, float* scores) {
    const int index = blockIdx.x * kThreads + threadIdx.x, batch = blockIdx.y;
    const int64_t count = static_cast<int64_t>(in.masks) * in.words;
    if (index >= count) return;
    float sum = 0;
    int32_t pixels = 0;
    for (int band = 0; band < in.bands; ++band) {
        const int64_t part = static_cast<int64_t>(batch) * in.bands + band;
        sum += in.sums[part * count + index];
        pixels += in.pixels[part * in.masks + index / in.words];
    }
    scores[batch * count + index] = sum / static_cast<float>(pixels > 0 ? pixels : 1);
}

// `in`, its pixels cut in bands whose sums lie in the workspace.
Masks in_bands(Masks in, int batch, Workspace& workspace) {
    const int all = in.size.cells();
    const int64_t bytes = in.masks * (in.words + int64_t{1}) * sizeof(float);
    const int most = static_cast<int>(std::max<int64_t>(1, kBandBytes / bytes));
    in.band = round_up(ceil_div(all, std::min(most, ceil_div(all, kBandPixels))), 32);
    in.bands = ceil_div(all, in.band);
    const size_t lines = size_t(batch) * in.bands * in.masks;
    in.sums = workspace.take<float>(lines * in.words);
    in.pixels = workspace.take<int32_t>(lines);
    return in;
}

}  // namespace

size_t aggregate_cross_workspace(const std::vector<Layer>& layers, const Words& words, int batch, Grid size) {
    Workspace workspace(nullptr);
    CrossAggregation(layers, words, batch, size, workspace);
    return workspace.used();
}

void aggregate_cross(const std::vector<Layer>& layers, Type type, const Words& words, int batch, Grid size, float* maps,
                     void* memory, Stream stream) {
    Workspace workspace(memory);
    CrossAggregation(layers, words, batch, size, workspace).run(type, maps, stream);
}

size_t score_masks_workspace(int batch, int words, Grid size, int masks) {
    Workspace workspace(nullptr);
    in_bands({nullptr, nullptr, nullptr, nullptr, {}, size, words, masks}, batch, workspace);
    return workspace.used();
}

void score_masks(const float* maps, const int32_t* labels, float* scores, int batch, int words, Grid grid, Grid size,
                 int masks, void* memory, Stream stream) {
    Workspace workspace(memory);
    const Masks in = in_bands({maps, labels, nullptr, nullptr, grid, size, words, masks}, batch, workspace);
    launch("mask_sums_kernel", mask_sums_kernel,
           dim3(in.bands, ceil_div(masks, kMasks) * ceil_div(words, kWords), batch), kThreads,
           Found::bytes(std::min(masks, kMasks)), stream, in);
    launch("scores_kernel", scores_kernel, dim3(ceil_div(int64_t{masks} * words, int64_t{kThreads}), batch), kThreads, 0,
           stream, in, scores);
}

}  // namespace diffseg::cuda
