// A_f[i, j] = sum over layers k, heads of share_k exp(scale_k q_i.k_j - logsumexp_i), share_k = R_k / heads_k.
//
// In base 2 this is one fused multiply-add and one exp2 a score: the share stands in the exponent. Scores are products
// on tensor cores: 16-bit heads in one product, float32 heads in three of tf32 terms (high high, high low, low high).
//
//   logsumexp_kernel   where no log-sum-exps are given: a block takes 128 rows of a head through all its keys
//   sum_scores_kernel  a block takes a 128 x 128 tile through all layers and heads; the tile is stored once
//   sum_chunks_kernel  the same, where all layers of a launch are of 16 bits and their heads of one chunk
//
// Layers below the output grid are summed first, at their own resolution, in parts of some layers each so that small
// grids fill the GPU; rows_kernel (rows.cu) adds the parts in order, and normalises rows where upsampling does not
// multiply all sums alike. The sum of the output grid's layers adds them, upsampled, as it stores; where there is no
// such layer, rows_kernel stores them. Of size n x n there are only these sums.
//
// In the kernels above Q and K pass through shared memory in chunks of at most 160 bytes a row, copied asynchronously
// one chunk ahead. Scores of several chunks are finished only with the last: two warps share 32 rows, and a warp holds
// 32 x 64 scores and as many sums in registers, so that a multiprocessor holds one block. Scores of one chunk are
// finished at once: a warp holds 16 x 128 sums and the scores of 16 columns, whose exponentials run beside the next
// products. Where the chunk is of 96 bytes (up to 48 channels) that takes 128 registers a thread: two blocks share a
// multiprocessor that has 138 KB of shared memory, one computes while the other waits or stores. The price: all eight
// warps of a block read K's chunk, not four, 27 matrix loads a warp and head in place of 18. Scores of float32 take the
// first way also where the chunk is one: beside their three products and the sums of these, exponentials are few.
// Log-sum-exps need no sums: with the steps of the products in a loop that is not unrolled, two blocks of the first way.
//
// At SD 1.4, the 64 x 64 layers: 54 GFLOP (64 with the padded width), 0.67 G exp2, 64 MB written; Q and K (26 MB) stay
// in the second-level cache, from which a tile reads 24 KB a head in sectors of 32 bytes, 1.0 GB in all. For a tile and
// head a multiprocessor takes 1024 cycles for exponentials, 1056 to write (192) and read shared memory, 800 to issue
// instructions. To store a tile of 40 heads, which upsamples three grids, takes some 11000 to issue and 4300 of shared
// memory besides. Without log-sum-exps the products and the exponentials twice: 1088 cycles for exponentials and 1230 to
// issue instructions.

#include <algorithm>
#include <cmath>

#include "launch.cuh"
#include "reductions.cuh"
#include "rows.cuh"

namespace diffseg::cuda {
namespace {

constexpr int kTile = 128;  // rows and columns of a block
constexpr int kThreads = 256;
constexpr int kWarpRows = 32, kWarpColumns = 64;
constexpr int kMostLayers = 32;
constexpr int kMostSegments = 16;
constexpr int kPartBytes = 16 << 20;    // of an image's partial sums of one grid, at most: no matter the batch
constexpr int kBlocksWanted = 2 * 132;  // of the low-resolution sums
// Widths of a chunk: a layer takes as many equal ones of them as hold its channels with the least padding.
constexpr int kChunks[] = {96, 128, 160};
constexpr int kWidths = 3;
constexpr float kLn2 = 0.6931471805599453f;

struct Entry {  // a layer; strides and depth count 16 bytes
    const uint4 *queries, *keys;
    float* logsumexps;  // [batch, heads, cells]
    int query_batch, query_head, query_row, key_batch, key_head, key_row;
    int heads, depth, cells;
    float scale, offset;  // of the exponent of 2
};

struct Segment {  // of the grid: the tiles of one sum of layers
    void* out;
    int first_block, first_layer, end_layer, cells;
};

struct Table {
    Entry layers[kMostLayers];
    Segment segments[kMostSegments];
    int count;  // of the segments
    int batch;
    Output output;
};
static_assert(sizeof(Table) <= 4096, "every driver takes arguments of this size");

// A warp's part of a tile in fragments of 16 rows and 8 columns: 32 x 64, or 16 x 128.
template <int kFragments>  // along the rows
using Sums = float[kFragments][16 / kFragments][4];
using Scores = Sums<2>;

// Row of fragment element `c` of rows `i`, and its column in fragment `j`, in the block's tile.
template <int kFragments>
DIFFSEG_DEVICE int fragment_row(int i, int c) {
    return (threadIdx.x / 32 / kFragments * kFragments + i) * 16 + c / 2 * 8 + threadIdx.x % 32 / 4;
}
template <int kFragments>
DIFFSEG_DEVICE int fragment_column(int j, int c) {
    return (threadIdx.x / 32 % kFragments * (16 / kFragments) + j) * 8 + threadIdx.x % 4 * 2 + c % 2;
}

// A chunk of 128 rows of Q and of K in shared memory. The rows' pitch is an odd multiple of 16 bytes: the eight rows of
// a matrix lie in different banks.
template <int kChunk>
struct Stage {
    static constexpr int kPitch = kChunk + 16;
    static constexpr int kBytes = 2 * kTile * kPitch;
};

// Starts copying `kChunk` bytes of 128 rows; zeros beyond `cells` rows and `depth` x 16 bytes. Two threads take a row,
// and 32 bytes of it at a time, one sector of the second-level cache. Where a row starts in the middle of a sector, as
// every other head of 40 channels does, they take its last 16 bytes and its first 16, then whole sectors.
template <int kChunk>
DIFFSEG_DEVICE void copy_rows(unsigned char* target, const uint4* rows, int stride, int first, int cells, int granule,
                              int depth) {
    const int line = row_written(threadIdx.x), row = first + line;
    const uint4* source = rows + static_cast<int64_t>(row) * stride + granule;
    const int place = static_cast<int>(threadIdx.x % 2) - static_cast<int>(reinterpret_cast<uintptr_t>(source) / 16 % 2);
    target += line * Stage<kChunk>::kPitch;
    if (row >= cells) depth = 0;
#pragma unroll
    for (int i = 0; i < kChunk / 16; i += 2) {
        const int at = i == 0 && place < 0 ? kChunk / 16 - 1 : place + i;
        copy_16(target + 16 * at, source + at, granule + at < depth);
    }
}

template <int kChunk>
DIFFSEG_DEVICE void copy_chunk(unsigned char* stage, const Entry& layer, int batch, int head, int row, int column,
                               int chunk) {
    const int granule = chunk * (kChunk / 16);
    const uint4* queries = layer.queries + static_cast<int64_t>(batch) * layer.query_batch +
                           static_cast<int64_t>(head) * layer.query_head;
    const uint4* keys =
        layer.keys + static_cast<int64_t>(batch) * layer.key_batch + static_cast<int64_t>(head) * layer.key_head;
    copy_rows<kChunk>(stage, queries, layer.query_row, row, layer.cells, granule, layer.depth);
    copy_rows<kChunk>(stage + kTile * Stage<kChunk>::kPitch, keys, layer.key_row, column, layer.cells, granule,
                      layer.depth);
    commit_copies();
}

template <int kChunk>
DIFFSEG_DEVICE int chunks_of(const Entry& layer) {
    return ceil_div(layer.depth, kChunk / 16);
}

// sum += a b for operands of 16 bits: 16 channels.
template <Type kType>
DIFFSEG_DEVICE void multiply_16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    static_assert(kType != Type::float32);
    if constexpr (kType == Type::float16)
        multiply_float16(sum, a, b0, b1);
    else
        multiply_bfloat16(sum, a, b0, b1);
}

// scores += Q K^T over 32 bytes of channels: fragments of rows i, j.
template <Type kType>
DIFFSEG_DEVICE void multiply_step(Scores& scores, const uint32_t (&a)[2][4], const uint32_t (&b)[4], int j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        multiply_16<kType>(scores[i][j], a[i], b[0], b[1]);
        multiply_16<kType>(scores[i][j + 1], a[i], b[2], b[3]);
    }
}

// Of float32. The tensor cores cut off what they add to: each step is summed from zero, and added in float32.
DIFFSEG_DEVICE void multiply_step_tf32(Scores& scores, const uint32_t (&high)[2][4], const uint32_t (&low)[2][4],
                                       const uint32_t (&b)[4], int j) {
    uint32_t b_high[4], b_low[4];
    split_tf32(b, b_high, b_low);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            float sum[4] = {};
            multiply_tf32(sum, low[i], b_high[2 * n], b_high[2 * n + 1]);
            multiply_tf32(sum, high[i], b_low[2 * n], b_low[2 * n + 1]);
            multiply_tf32(sum, high[i], b_high[2 * n], b_high[2 * n + 1]);
#pragma unroll
            for (int c = 0; c < 4; ++c) scores[i][j + n][c] += sum[c];
        }
    }
}

// scores += Q K^T over a chunk. A matrix row of 16 bytes is 8 channels of 16 bits or 4 of 32: the fragments of both
// products are loaded alike. Of `kUnroll` steps the loads run beside the products.
template <Type kType, int kChunk, int kUnroll>
DIFFSEG_DEVICE void multiply_chunk(const unsigned char* stage, Scores& scores) {
    constexpr int kPitch = Stage<kChunk>::kPitch;
    const int lane = threadIdx.x % 32;
    const unsigned char* a_row = stage + (threadIdx.x / 64 * kWarpRows + lane % 16) * kPitch + lane / 16 * 16;
    const unsigned char* b_row = stage +
                                 (kTile + threadIdx.x / 32 % 2 * kWarpColumns + lane / 16 * 8 + lane % 8) * kPitch +
                                 lane / 8 % 2 * 16;
#pragma unroll kUnroll
    for (int k = 0; k < kChunk; k += 32) {
        uint32_t a[2][4], low[2][4], b[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            load_matrices(a[i], a_row + i * 16 * kPitch + k);
            if constexpr (kType == Type::float32) {
                const uint32_t value[4] = {a[i][0], a[i][1], a[i][2], a[i][3]};
                split_tf32(value, a[i], low[i]);
            }
        }
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            load_matrices(b, b_row + j * 8 * kPitch + k);
            if constexpr (kType == Type::float32)
                multiply_step_tf32(scores, a, low, b, j);
            else
                multiply_step<kType>(scores, a, b, j);
        }
    }
}

template <int kFragments>
DIFFSEG_DEVICE void clear(Sums<kFragments>& sums) {
#pragma unroll
    for (int i = 0; i < kFragments; ++i)
#pragma unroll
        for (int j = 0; j < 16 / kFragments; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) sums[i][j][c] = 0;
}

// What a block sums: 128 x 128 of a segment, of one image.
struct Tile {
    const Segment& segment;
    int row, column, batch;
};

DIFFSEG_DEVICE Tile find_tile(const Table& table) {
    int index = 0;
    while (index + 1 < table.count && static_cast<int>(blockIdx.x) >= table.segments[index + 1].first_block) ++index;
    const Segment& segment = table.segments[index];
    const int tile = blockIdx.x - segment.first_block, tiles = ceil_div(segment.cells, kTile);
    return {segment, tile / tiles * kTile, tile % tiles * kTile, static_cast<int>(blockIdx.y)};
}

// A place in the sequence of layers, heads and chunks.
struct Cursor {
    int layer, head, chunk;

    template <int kChunk, bool kOneChunk>
    DIFFSEG_DEVICE void advance(const Table& table) {
        if (!kOneChunk && ++chunk < chunks_of<kChunk>(table.layers[layer])) return;
        chunk = 0;
        if (++head < table.layers[layer].heads) return;
        head = 0;
        ++layer;
    }
};

// The log-sum-exps of a thread's rows: halves of 16-row fragments.
template <int kHalves>
DIFFSEG_DEVICE void load_logsumexps(const Entry& layer, int batch, int head, int row, float (&logsumexps)[kHalves]) {
    const float* rows = layer.logsumexps + (static_cast<int64_t>(batch) * layer.heads + head) * layer.cells;
#pragma unroll
    for (int r = 0; r < kHalves; ++r) {
        const int index = row + fragment_row<kHalves / 2>(r / 2, r % 2 * 2);
        logsumexps[r] = index < layer.cells ? rows[index] : 0.0f;
    }
}

// The constant part of the exponents of a row.
DIFFSEG_DEVICE float row_offset(const Entry& layer, float logsumexp) { return fmaf(logsumexp, -kLog2E, layer.offset); }

DIFFSEG_DEVICE void add_exponentials(Scores& total, const Scores& scores, const Entry& layer,
                                     const float (&logsumexps)[4]) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const float offset = row_offset(layer, logsumexps[r]);
#pragma unroll
        for (int n = 0; n < 16; ++n) {
            const int i = r / 2, j = n / 2, c = r % 2 * 2 + n % 2;
            total[i][j][c] += exp2_approximate(fmaf(scores[i][j][c], layer.scale, offset));
        }
    }
}

// total += the shares of heads of one chunk. Q's fragments stay in registers, and 16 columns are taken at a time: their
// exponentials run beside the next ones' products.
template <Type kType, int kChunk>
DIFFSEG_DEVICE void add_shares(Sums<1>& total, const unsigned char* stage, float scale, const float (&offsets)[2]) {
    constexpr int kPitch = Stage<kChunk>::kPitch, kSteps = kChunk / 32;
    const int lane = threadIdx.x % 32;
    const unsigned char* a_row = stage + (threadIdx.x / 32 * 16 + lane % 16) * kPitch + lane / 16 * 16;
    const unsigned char* b_row = stage + (kTile + lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 16;
    uint32_t a[kSteps][4], b[4];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) load_matrices(a[k], a_row + k * 32);
#pragma unroll
    for (int j = 0; j < 16; j += 2) {
        float scores[2][4] = {};
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            load_matrices(b, b_row + j * 8 * kPitch + k * 32);
#pragma unroll
            for (int n = 0; n < 2; ++n) multiply_16<kType>(scores[n], a[k], b[2 * n], b[2 * n + 1]);
        }
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int c = 0; c < 4; ++c)
                total[0][j + n][c] += exp2_approximate(fmaf(scores[n][c], scale, offsets[c / 2]));
    }
}

// A tile of sums in shared memory, so that rows are stored whole. Pitch: 8 banks beyond a multiple of 32, for pairs.
constexpr int kSumPitch = kTile + 8;
constexpr int kSumBytes = kTile * kSumPitch * static_cast<int>(sizeof(float));
constexpr int kRowsOfWarp = kTile / (kThreads / 32);

template <int kFragments>
DIFFSEG_DEVICE void store_fragments(const Sums<kFragments>& total, float* sums) {
#pragma unroll
    for (int i = 0; i < kFragments; ++i)
#pragma unroll
        for (int j = 0; j < 16 / kFragments; ++j)
#pragma unroll
            for (int c = 0; c < 4; c += 2) {
                float* pair = sums + fragment_row<kFragments>(i, c) * kSumPitch + fragment_column<kFragments>(j, c);
                *reinterpret_cast<float2*>(pair) = {total[i][j][c], total[i][j][c + 1]};
            }
}

DIFFSEG_DEVICE Quad load_quad(const float* source) {
    const float4 value = *reinterpret_cast<const float4*>(source);
    return {{value.x, value.y, value.z, value.w}};
}

// Adds a low-resolution sum to four columns of a warp's 16 rows. Neighbouring rows mostly read the same low row: it is
// upsampled once for them.
DIFFSEG_DEVICE void add_low(float* sums, const Output& output, const Low& low, int batch, int row, int column,
                            int cells) {
    const Upsampler upsample(output, low, batch, column);
    const uint32_t mine = upsample.source(row + threadIdx.x % kRowsOfWarp);  // it divides: a lane does so for one row
    int source = -1;
    Quad more = {};
    for (int r = 0; r < kRowsOfWarp && row + r < cells; ++r) {
        const int next = static_cast<int>(broadcast(mine, r));
        if (next != source) more = upsample(next);
        source = next;
        float* target = sums + r * kSumPitch;
        const Quad quad = load_quad(target);
        *reinterpret_cast<float4*>(target) = {quad.value[0] + more.value[0], quad.value[1] + more.value[1],
                                              quad.value[2] + more.value[2], quad.value[3] + more.value[3]};
    }
}

// Stores a block's sums; a thread takes four columns of 16 rows.
template <int kFragments>
DIFFSEG_DEVICE void store_tile(const Table& table, const Tile& tile, const Sums<kFragments>& total) {
    float* sums = reinterpret_cast<float*>(shared_memory());
    sync_block();  // the last chunk has been read
    store_fragments(total, sums);
    sync_block();
    const int first = threadIdx.x / 32 * kRowsOfWarp, quad = threadIdx.x % 32 * kQuad;
    const int row = tile.row + first, column = tile.column + quad, cells = tile.segment.cells;
    sums += first * kSumPitch + quad;
    for (int low = 0; low < table.output.count; ++low)
        add_low(sums, table.output, table.output.lows[low], tile.batch, row, column, cells);
    for (int r = 0; r < kRowsOfWarp && row + r < cells; ++r)
        store(tile.segment.out, table.output, tile.batch, row + r, column, cells, load_quad(sums + r * kSumPitch));
}

// Calls take(chunk in shared memory, its cursor) for each chunk of a tile's layers and heads, in order.
template <int kChunk, bool kOneChunk, class Take>
DIFFSEG_DEVICE void for_each_chunk(const Table& table, const Tile& tile, Take take) {
    unsigned char* stages = shared_memory();
    const auto copy = [&](int stage, const Cursor& at) {
        copy_chunk<kChunk>(stages + stage * Stage<kChunk>::kBytes, table.layers[at.layer], tile.batch, at.head,
                           tile.row, tile.column, at.chunk);
    };
    Cursor next = {tile.segment.first_layer, 0, 0};
    copy(0, next);
    for (int stage = 0; next.layer < tile.segment.end_layer; stage ^= 1) {
        const Cursor at = next;
        next.advance<kChunk, kOneChunk>(table);
        wait_for_copies();
        sync_block();  // the chunk is there for all, and the other stage has been read by all
        if (next.layer < tile.segment.end_layer) copy(stage ^ 1, next);
        take(stages + stage * Stage<kChunk>::kBytes, at);
    }
}

// Grid: (tiles of all segments, batch).
template <Type kType, int kChunk>
__global__ void __launch_bounds__(kThreads, 1) sum_scores_kernel(const __grid_constant__ Table table) {
    const Tile tile = find_tile(table);
    Scores total, scores;
    clear(total);
    float logsumexps[4];
    for_each_chunk<kChunk, false>(table, tile, [&](const unsigned char* stage, const Cursor& at) {
        const Entry& layer = table.layers[at.layer];
        if (at.chunk == 0) {
            clear(scores);
            load_logsumexps(layer, tile.batch, at.head, tile.row, logsumexps);
        }
        constexpr int kUnroll = kType == Type::float32 ? 1 : kChunk / 32;  // more of float32 spills
        multiply_chunk<kType, kChunk, kUnroll>(stage, scores);
        if (at.chunk == chunks_of<kChunk>(layer) - 1) add_exponentials(total, scores, layer, logsumexps);
    });
    store_tile(table, tile, total);
}

// Grid: (tiles of all segments, batch).
template <Type kType, int kChunk>
__global__ void __launch_bounds__(kThreads, kChunk == kChunks[0] ? 2 : 1)
    sum_chunks_kernel(const __grid_constant__ Table table) {
    const Tile tile = find_tile(table);
    Sums<1> total;
    clear(total);
    float ahead[2];  // log-sum-exps of the next head
    const auto look_ahead = [&](const Cursor& next) {
        if (next.layer < tile.segment.end_layer)
            load_logsumexps(table.layers[next.layer], tile.batch, next.head, tile.row, ahead);
    };
    look_ahead({tile.segment.first_layer, 0, 0});
    for_each_chunk<kChunk, true>(table, tile, [&](const unsigned char* stage, const Cursor& at) {
        const Entry& layer = table.layers[at.layer];
        const float offsets[2] = {row_offset(layer, ahead[0]), row_offset(layer, ahead[1])};
        Cursor next = at;
        next.advance<kChunk, true>(table);
        look_ahead(next);
        add_shares<kType, kChunk>(total, stage, layer.scale, offsets);
    });
    store_tile(table, tile, total);
}

// Takes a tile's scores of a thread's row `r` into account; unless all are, those of columns before `cells`.
template <bool kAll>
DIFFSEG_DEVICE void add_scores(Online& online, const Scores& scores, int r, float scale, int column, int cells) {
    float exponent[16];
    float larger = online.largest;
#pragma unroll
    for (int n = 0; n < 16; ++n) {
        const bool inside = kAll || column + fragment_column<2>(n / 2, n % 2) < cells;
        exponent[n] = inside ? scores[r / 2][n / 2][r % 2 * 2 + n % 2] * scale : -INFINITY;
        larger = fmaxf(larger, exponent[n]);
    }
    float sum = online.sum * exp2_approximate(online.largest - larger);
#pragma unroll
    for (int n = 0; n < 16; ++n) sum += exp2_approximate(exponent[n] - larger);
    online = {larger, sum};
}

// Merges what the four lanes and the two warps of a row have seen, and stores log-sum-exps.
DIFFSEG_DEVICE void store_logsumexps(Online (&online)[4], float* target, int row, int cells) {
    float* largest = reinterpret_cast<float*>(shared_memory());  // [128] of the second warp of each row
    float* sums = largest + kTile;
    const bool second = threadIdx.x / 32 % 2 == 1, leader = threadIdx.x % 4 == 0;
    sync_block();  // the last chunk has been read
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int mask = 1; mask < 4; mask *= 2)
            online[r].merge(shuffle_xor(online[r].largest, mask), shuffle_xor(online[r].sum, mask));
        const int line = fragment_row<2>(r / 2, r % 2 * 2);
        if (second && leader) largest[line] = online[r].largest, sums[line] = online[r].sum;
    }
    sync_block();
    if (second || !leader) return;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const int line = fragment_row<2>(r / 2, r % 2 * 2);
        online[r].merge(largest[line], sums[line]);
        if (row + line < cells) target[row + line] = (online[r].largest + log2f(online[r].sum)) * kLn2;
    }
}

// Grid: (128 rows, heads, layers x batch); the dimensions are those of the largest layer.
template <Type kType, int kChunk>
__global__ void __launch_bounds__(kThreads, 2) logsumexp_kernel(const __grid_constant__ Table table) {
    const Entry& layer = table.layers[blockIdx.z / table.batch];
    const int row = blockIdx.x * kTile, head = blockIdx.y, batch = blockIdx.z % table.batch;
    if (row >= layer.cells || head >= layer.heads) return;
    unsigned char* stages = shared_memory();
    const int chunks = chunks_of<kChunk>(layer);
    Online online[4];
    Scores scores;
    copy_chunk<kChunk>(stages, layer, batch, head, row, 0, 0);
    int stage = 0;
    for (int column = 0; column < layer.cells; column += kTile) {
        clear(scores);
        for (int chunk = 1; chunk <= chunks; ++chunk, stage ^= 1) {
            wait_for_copies();
            sync_block();  // the chunk is there for all, and the other stage has been read by all
            const bool last = chunk == chunks;
            if (!last || column + kTile < layer.cells)
                copy_chunk<kChunk>(stages + (stage ^ 1) * Stage<kChunk>::kBytes, layer, batch, head, row,
                                   last ? column + kTile : column, last ? 0 : chunk);
            multiply_chunk<kType, kChunk, 1>(stages + stage * Stage<kChunk>::kBytes, scores);
        }
        if (column + kTile <= layer.cells) {
#pragma unroll
            for (int r = 0; r < 4; ++r) add_scores<true>(online[r], scores, r, layer.scale, column, layer.cells);
        } else {
#pragma unroll
            for (int r = 0; r < 4; ++r) add_scores<false>(online[r], scores, r, layer.scale, column, layer.cells);
        }
    }
    store_logsumexps(online, layer.logsumexps + (static_cast<int64_t>(batch) * layer.heads + head) * layer.cells, row,
                     layer.cells);
}

using Kernel = void (*)(Table);

int width_index(const Layer& layer, int element_size) {
    const int bytes = layer.depth * element_size;
    const int count = ceil_div(bytes, kChunks[kWidths - 1]);
    int index = 0;
    while (kChunks[index] * count < bytes) ++index;
    return index;
}

template <Type kType>
Kernel sum_scores_of(int width) {
    constexpr Kernel kernels[] = {sum_scores_kernel<kType, kChunks[0]>, sum_scores_kernel<kType, kChunks[1]>,
                                  sum_scores_kernel<kType, kChunks[2]>};
    return kernels[width];
}

template <Type kType>
Kernel sum_chunks_of(int width) {
    constexpr Kernel kernels[] = {sum_chunks_kernel<kType, kChunks[0]>, sum_chunks_kernel<kType, kChunks[1]>,
                                  sum_chunks_kernel<kType, kChunks[2]>};
    return kernels[width];
}

template <Type kType>
Kernel logsumexp_of(int width) {
    constexpr Kernel kernels[] = {logsumexp_kernel<kType, kChunks[0]>, logsumexp_kernel<kType, kChunks[1]>,
                                  logsumexp_kernel<kType, kChunks[2]>};
    return kernels[width];
}

size_t stage_bytes(int width) { return 2 * size_t{2} * kTile * (kChunks[width] + 16); }

struct Part {  // of the layers of a low-resolution grid: those of one width, summed by one segment
    std::vector<int> layers;
    int width;
    float* out;
};

struct LowGrid {
    Grid grid;
    bool alike;  // upsampling multiplies the sums of all rows by N / n
    std::vector<Part> parts;
    float* sums;
};

bool divides(Grid grid, Grid output) { return output.height % grid.height == 0 && output.width % grid.width == 0; }

// The op: what is launched for given layers, and the workspace it needs.
class Aggregation {
   public:
    Aggregation(const std::vector<Layer>& layers, Type type, const Attention& out, Workspace& workspace)
        : layers_(layers), type_(type), out_(out) {
        for (const Layer& layer : layers) {
            widths_.push_back(width_index(layer, type == Type::float32 ? 4 : 2));
            const size_t rows = size_t(out.batch) * layer.heads * layer.grid.cells();
            logsumexps_.push_back(layer.logsumexps != nullptr ? const_cast<float*>(layer.logsumexps)
                                                              : workspace.take<float>(rows));
        }
        find_lows();
        for (LowGrid& low : lows_) allocate(low, workspace);
    }

    void run(Stream stream) const {
        fill_logsumexps(stream);
        sum_lows(stream);
        sum_output(combine_lows(stream), stream);
    }

   private:
    size_t square(Grid grid) const { return size_t(out_.batch) * grid.cells() * grid.cells(); }

    void find_lows() {
        for (const Layer& layer : layers_) {
            const auto same = [&](const LowGrid& low) { return low.grid == layer.grid; };
            if (!(layer.grid == out_.grid) && std::none_of(lows_.begin(), lows_.end(), same))
                lows_.push_back({layer.grid, divides(layer.grid, out_.grid), {}, nullptr});
        }
        for (LowGrid& low : lows_)
            for (int width = 0; width < kWidths; ++width) add_parts(low, width);
    }

    // Layers in a part: few enough that one image's blocks fill a GPU, unless the parts would take too much memory; one
    // where each layer's rows have a mass of their own. An image is summed alike in every batch.
    int layers_in_part(const LowGrid& low, int count) const {
        if (!low.alike) return 1;
        const int tiles = ceil_div(low.grid.cells(), kTile);
        const int wanted = ceil_div(kBlocksWanted, tiles * tiles);
        const size_t image = size_t(low.grid.cells()) * low.grid.cells() * sizeof(float);
        const int most = std::max<int>(1, kPartBytes / image);
        return std::min(kMostLayers, ceil_div(count, std::min(wanted, most)));
    }

    void add_parts(LowGrid& low, int width) const {
        std::vector<int> members;
        for (size_t layer = 0; layer < layers_.size(); ++layer)
            if (layers_[layer].grid == low.grid && widths_[layer] == width) members.push_back(static_cast<int>(layer));
        if (members.empty()) return;
        const size_t size = layers_in_part(low, static_cast<int>(members.size()));
        for (size_t first = 0; first < members.size(); first += size) {
            const size_t end = std::min(first + size, members.size());
            low.parts.push_back({{members.begin() + first, members.begin() + end}, width, nullptr});
        }
    }

    void allocate(LowGrid& low, Workspace& workspace) const {
        low.sums = workspace.take<float>(square(low.grid));
        const bool single = low.alike && low.parts.size() == 1;
        for (Part& part : low.parts) part.out = single ? low.sums : workspace.take<float>(square(low.grid));
    }

    Entry entry(int index) const {
        const Layer& layer = layers_[index];
        const int unit = type_ == Type::float32 ? 4 : 8;  // elements in 16 bytes
        const bool low = !(layer.grid == out_.grid), alike = divides(layer.grid, out_.grid);
        double share = 1.0 / layer.heads;
        if (!low || alike) share *= layer.ratio;
        if (low && alike) share *= double(layer.grid.cells()) / out_.grid.cells();
        const View &q = layer.queries, &k = layer.keys;
        return {static_cast<const uint4*>(q.data), static_cast<const uint4*>(k.data), logsumexps_[index],
                static_cast<int>(q.batch / unit), static_cast<int>(q.head / unit), static_cast<int>(q.row / unit),
                static_cast<int>(k.batch / unit), static_cast<int>(k.head / unit), static_cast<int>(k.row / unit),
                layer.heads, layer.depth / unit, layer.grid.cells(),
                layer.scale * kLog2E, static_cast<float>(std::log2(share))};
    }

    Table empty_table() const {
        Table table = {};
        table.batch = out_.batch;
        table.output.height = out_.grid.height, table.output.width = out_.grid.width;
        return table;
    }

    void fill_logsumexps(Stream stream) const {
        for (int width = 0; width < kWidths; ++width) {
            Table table = empty_table();
            int count = 0, blocks = 0, heads = 0;
            const auto flush = [&] {
                const Kernel kernel = type_ == Type::float32   ? logsumexp_of<Type::float32>(width)
                                      : type_ == Type::float16 ? logsumexp_of<Type::float16>(width)
                                                               : logsumexp_of<Type::bfloat16>(width);
                if (count > 0)
                    launch("logsumexp_kernel", kernel, dim3(blocks, heads, count * out_.batch), kThreads,
                           stage_bytes(width), stream, table);
                count = blocks = heads = 0;
            };
            for (size_t layer = 0; layer < layers_.size(); ++layer) {
                if (widths_[layer] != width || layers_[layer].logsumexps != nullptr) continue;
                table.layers[count++] = entry(static_cast<int>(layer));
                blocks = std::max(blocks, ceil_div(layers_[layer].grid.cells(), kTile));
                heads = std::max(heads, layers_[layer].heads);
                if (count == kMostLayers) flush();
            }
            flush();
        }
    }

    void launch_sums(const Table& table, int blocks, int width, Stream stream) const {
        if (table.count == 0) return;
        const dim3 grid(blocks, out_.batch);
        const size_t shared = std::max<size_t>(stage_bytes(width), kSumBytes);
        const Entry* end = table.layers + table.segments[table.count - 1].end_layer;
        const auto one_chunk = [&](const Entry& layer) { return 16 * layer.depth <= kChunks[width]; };
        if (type_ != Type::float32 && std::all_of(table.layers, end, one_chunk)) {
            const Kernel kernel = type_ == Type::float16 ? sum_chunks_of<Type::float16>(width)
                                                         : sum_chunks_of<Type::bfloat16>(width);
            launch("sum_chunks_kernel", kernel, grid, kThreads, shared, stream, table);
            return;
        }
        const Kernel kernel = type_ == Type::float32   ? sum_scores_of<Type::float32>(width)
                              : type_ == Type::float16 ? sum_scores_of<Type::float16>(width)
                                                       : sum_scores_of<Type::bfloat16>(width);
        launch("sum_scores_kernel", kernel, grid, kThreads, shared, stream, table);
    }

    // Appends a segment for `layers`, from `used` on in the table; returns its blocks.
    int add_segment(Table& table, int& used, int blocks, const std::vector<int>& layers, Grid grid, void* out) const {
        const int first = used;
        for (int layer : layers) table.layers[used++] = entry(layer);
        table.segments[table.count++] = {out, blocks, first, used, grid.cells()};
        const int tiles = ceil_div(grid.cells(), kTile);
        return tiles * tiles;
    }

    void sum_lows(Stream stream) const {
        for (int width = 0; width < kWidths; ++width) {
            Table table = empty_table();
            int used = 0, blocks = 0;
            for (const LowGrid& low : lows_) {
                for (const Part& part : low.parts) {
                    if (part.width != width) continue;
                    if (table.count == kMostSegments || used + part.layers.size() > kMostLayers) {
                        launch_sums(table, blocks, width, stream);
                        table.count = used = blocks = 0;
                    }
                    blocks += add_segment(table, used, blocks, part.layers, low.grid, part.out);
                }
            }
            launch_sums(table, blocks, width, stream);
        }
    }

    // Adds the parts of each grid; returns what the output's tiles are to add.
    Output combine_lows(Stream stream) const {
        Output output = empty_table().output;
        std::vector<RowSum> parts, sums;
        for (const LowGrid& low : lows_) {
            RowSum sum = {{}, low.grid, low.sums, !low.alike};
            sums.push_back(sum);
            if (low.parts.front().out == low.sums) continue;
            const int64_t cells = low.grid.cells();
            for (const Part& part : low.parts)
                sum.sources.push_back({{part.out, cells * cells, 0, cells},
                                       1,
                                       low.alike ? 1.0f : layers_[part.layers.front()].ratio});
            parts.push_back(sum);
        }
        sum_rows(parts, Type::float32, output, out_.batch, stream);
        add_lows(output, sums);
        output.bfloat16 = out_.type == Type::bfloat16;
        return output;
    }

    void sum_output(Output output, Stream stream) const {
        const bool only_lows = std::none_of(layers_.begin(), layers_.end(),
                                            [&](const Layer& layer) { return layer.grid == out_.grid; });
        if (only_lows) sum_rows({{{}, out_.grid, out_.data, false}}, Type::float32, output, out_.batch, stream);
        for (int width = 0; width < kWidths; ++width) {
            std::vector<int> members;
            for (size_t layer = 0; layer <= layers_.size(); ++layer) {
                const bool last = layer == layers_.size();
                if (!last && layers_[layer].grid == out_.grid && widths_[layer] == width)
                    members.push_back(static_cast<int>(layer));
                if (members.empty() || (!last && members.size() < kMostLayers)) continue;
                Table table = empty_table();
                table.output = output;
                int used = 0;
                const int blocks = add_segment(table, used, 0, members, out_.grid, out_.data);
                launch_sums(table, blocks, width, stream);
                output.accumulate = true;  // what does not fit in one launch is added to the first's
                output.count = 0;
                members.clear();
            }
        }
    }

    const std::vector<Layer>& layers_;
    Type type_;
    Attention out_;
    std::vector<int> widths_;
    std::vector<float*> logsumexps_;
    std::vector<LowGrid> lows_;
};

}  // namespace

size_t aggregate_workspace(const std::vector<Layer>& layers, Type type, const Attention& out) {
    Workspace workspace(nullptr);
    Aggregation(layers, type, out, workspace);
    return workspace.used();
}

void aggregate(const std::vector<Layer>& layers, Type type, const Attention& out, void* memory, Stream stream) {
    Workspace workspace(memory);
    Aggregation(layers, type, out, workspace).run(stream);
}

}  // namespace diffseg::cuda
