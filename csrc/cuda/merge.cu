// Merging: symmetric KL of all pairs as split products, bits, the greedy walk and the means.
//
//   D(p, q) = (H_p + H_q - p.log q - log p.q) / 2 over p' = max(p, 1e-30) and log(p' N)
//
// Each of 4096 p' and log(p' N) is split in two float16 terms (22 bits; what falls below 7e-12 of p' is lost, which D
// does not feel; entries up to 15 are in range), and of the four products of terms the three larger ones are taken on
// tensor cores. These truncate as they accumulate: they sum over 16 cells, float32 additions over the rest. Entropies
// are sums of the same three products of the same terms, so that errors largely cancel between similar maps.
//
// A round is: terms of the list, products, bits, (from round 2) the walk, means. All sums have a fixed order that does
// not depend on the batch. A map with NaN is near everything: it reaches every proposal.

#include <algorithm>

#include "launch.cuh"
#include "reductions.cuh"
#include "rounding.cuh"

namespace diffseg::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr float kScale = 4096.0f;  // of p', so that its low term is in float16's range
constexpr int kPlanes = 4;
enum Plane { kHigh, kLow, kLogHigh, kLogLow };

constexpr int kStep = 16;       // cells in a step of the products
constexpr int kTile = 128;      // elements and maps of a block of products
constexpr int kBlocks = 128;    // products of short lists are cut in parts of the cells to have as many
constexpr int kWordsAtOnce = 4;  // words of bits that the means take in a step: 128 maps

struct Rows {  // maps of one image after the other; strides count elements
    const void* data;
    int64_t batch, row;
};

// Four cells from `column` on of a row, one access where the row allows it; `fill` beyond its end.
template <Type kType>
DIFFSEG_DEVICE float4 load_four(const void* data, int64_t start, int column, int cells, float fill) {
    if constexpr (kType == Type::float32) {
        const float* source = static_cast<const float*>(data) + start + column;
        if (column + 4 <= cells && reinterpret_cast<uintptr_t>(source) % 16 == 0)
            return *reinterpret_cast<const float4*>(source);
        const auto at = [&](int c) { return column + c < cells ? source[c] : fill; };
        return {at(0), at(1), at(2), at(3)};
    } else {
        static_assert(kType == Type::bfloat16);
        const uint16_t* source = static_cast<const uint16_t*>(data) + start + column;
        if (column + 4 <= cells && reinterpret_cast<uintptr_t>(source) % 8 == 0) {
            const uint2 words = *reinterpret_cast<const uint2*>(source);
            return {from_bits(words.x << 16), from_bits(words.x & 0xffff0000u), from_bits(words.y << 16),
                    from_bits(words.y & 0xffff0000u)};
        }
        const auto at = [&](int c) { return column + c < cells ? from_bfloat16(source[c]) : fill; };
        return {at(0), at(1), at(2), at(3)};
    }
}

// The terms of two neighbouring cells, and the sum of their p' log(p' N) as the tensor cores form it for a pair.
struct TermPair {
    uint32_t plane[kPlanes];
    float entropy;
};

DIFFSEG_DEVICE float entropy_of(float p_high, float p_low, float log_high, float log_low) {
    return fmaf(p_high, log_high, fmaf(p_high, log_low, p_low * log_high));
}

DIFFSEG_DEVICE TermPair terms_of(float first, float second, float cells, bool first_inside, bool second_inside) {
    first = first < kSmallestProbability ? kSmallestProbability : first;  // NaN stays NaN
    second = second < kSmallestProbability ? kSmallestProbability : second;
    const Split p = split_float16(first_inside ? first * kScale : 0.0f, second_inside ? second * kScale : 0.0f);
    const Split log = split_float16(first_inside ? log_approximate(first * cells) : 0.0f,
                                    second_inside ? log_approximate(second * cells) : 0.0f);
    const auto low = [](uint32_t pair) { return unpack_float16(static_cast<uint16_t>(pair)); };
    const auto high = [](uint32_t pair) { return unpack_float16(static_cast<uint16_t>(pair >> 16)); };
    return {{p.high, p.low, log.high, log.low},
            entropy_of(low(p.high), low(p.low), low(log.high), low(log.low)) +
                entropy_of(high(p.high), high(p.low), high(log.high), high(log.low))};
}

struct Positions {
    int cell[512];
};

// Writes positions, which travel as an argument (a graph records them), and the counts of the first round.
__global__ void __launch_bounds__(kThreads)
    positions_kernel(const __grid_constant__ Positions positions, int count, int* out, int32_t* counts, int batch,
                     int length) {
    for (int index = threadIdx.x; index < count; index += kThreads) out[index] = positions.cell[index];
    for (int index = threadIdx.x; index < batch; index += kThreads) counts[index] = length;
}

// Whether an element is past the end of its list; lists without counts have none that is.
DIFFSEG_DEVICE bool past_end(const int32_t* counts, int batch, int element) {
    return counts != nullptr && element >= counts[batch];
}

// Terms [4, batch, length, pitch] and entropies [batch, length] of the rows `positions` (null: all), up to `counts`.
//
// Grid: (length, batch). Bytes: 4 N read and 8 N written an element; N logarithms.
template <Type kType>
__global__ void __launch_bounds__(kThreads) terms_kernel(Rows maps, const int* positions, const int32_t* counts,
                                                         int cells, int pitch, uint16_t* terms, float* entropies) {
    const int element = blockIdx.x, batch = blockIdx.y, length = gridDim.x;
    if (past_end(counts, batch, element)) return;
    const int row = positions == nullptr ? element : positions[element];
    const int64_t start = batch * maps.batch + row * maps.row;
    const int64_t plane = static_cast<int64_t>(gridDim.y) * length * pitch;
    uint16_t* target = terms + (static_cast<int64_t>(batch) * length + element) * pitch;
    float entropy = 0;
    for (int column = threadIdx.x * 4; column < pitch; column += kThreads * 4) {
        const float4 value = load_four<kType>(maps.data, start, column, cells, 1.0f);
        const TermPair left = terms_of(value.x, value.y, cells, column < cells, column + 1 < cells);
        const TermPair right = terms_of(value.z, value.w, cells, column + 2 < cells, column + 3 < cells);
        entropy += left.entropy + right.entropy;
#pragma unroll
        for (int p = 0; p < kPlanes; ++p)
            *reinterpret_cast<uint2*>(target + p * plane + column) = {left.plane[p], right.plane[p]};
    }
    entropy = block_sum<kWarps>(entropy, reinterpret_cast<float*>(shared_memory()));
    if (threadIdx.x == 0) entropies[batch * length + element] = entropy;
}

// Terms of 128 elements and 128 maps over 16 cells in shared memory: [2][4 planes][128 rows] of 32 bytes and 16 more,
// which put the eight rows of a matrix in different banks.
constexpr int kTermPitch = 2 * kStep + 16;
constexpr int kPlaneBytes = kTile * kTermPitch;
constexpr int kSideBytes = kPlanes * kPlaneBytes;
constexpr int kStageBytes = 2 * kSideBytes;

struct Products {
    const uint16_t* terms;  // [4, batch, length, pitch]
    Rows maps;
    const int32_t* counts;  // null: lists end at `length` and `rows`
    float* products;        // [parts, batch, length, rows]
    float* map_entropies;   // [parts, batch, rows]
    int length, rows, cells, pitch, part;
};

// Starts copying the terms of the tile's elements: two threads a row.
DIFFSEG_DEVICE void copy_terms(unsigned char* side, const Products& in, int batch, int first, int cell) {
    const int line = row_written(threadIdx.x), half = threadIdx.x % 2;
    const bool inside = first + line < in.length;
    const int64_t plane = static_cast<int64_t>(gridDim.z) * in.length * in.pitch;
    const uint16_t* source =
        in.terms + (static_cast<int64_t>(batch) * in.length + (inside ? first + line : 0)) * in.pitch + cell + 8 * half;
#pragma unroll
    for (int p = 0; p < kPlanes; ++p)
        copy_16(side + p * kPlaneBytes + line * kTermPitch + 16 * half, source + p * plane, inside);
    commit_copies();
}

// Eight cells of a map, on their way from memory.
struct Fetched {
    float4 left, right;
};

template <Type kType>
DIFFSEG_DEVICE Fetched fetch_maps(const Products& in, int batch, int first, int cell) {
    const int row = first + row_written(threadIdx.x), column = cell + 8 * (threadIdx.x % 2);
    if (row >= in.rows) return {{1, 1, 1, 1}, {1, 1, 1, 1}};
    const int64_t start = batch * in.maps.batch + row * in.maps.row;
    return {load_four<kType>(in.maps.data, start, column, in.cells, 1.0f),
            load_four<kType>(in.maps.data, start, column + 4, in.cells, 1.0f)};
}

// Stores the terms of fetched cells; returns their share of the map's entropy.
DIFFSEG_DEVICE float store_terms(unsigned char* side, const Fetched& value, int cell, int cells) {
    const int column = cell + 8 * (threadIdx.x % 2);
    const auto pair = [&](float first, float second, int c) {
        return terms_of(first, second, cells, column + c < cells, column + c + 1 < cells);
    };
    const TermPair pairs[4] = {pair(value.left.x, value.left.y, 0), pair(value.left.z, value.left.w, 2),
                               pair(value.right.x, value.right.y, 4), pair(value.right.z, value.right.w, 6)};
    unsigned char* target = side + row_written(threadIdx.x) * kTermPitch + threadIdx.x % 2 * 16;
#pragma unroll
    for (int p = 0; p < kPlanes; ++p)
        *reinterpret_cast<uint4*>(target + p * kPlaneBytes) = {pairs[0].plane[p], pairs[1].plane[p], pairs[2].plane[p],
                                                               pairs[3].plane[p]};
    return (pairs[0].entropy + pairs[1].entropy) + (pairs[2].entropy + pairs[3].entropy);
}

// total += p.log f + log p.f over the stage's 16 cells: a warp's 32 elements x 64 maps.
DIFFSEG_DEVICE void multiply_terms(const unsigned char* stage, float (&total)[2][8][4]) {
    const int lane = threadIdx.x % 32;
    const unsigned char* a_row = stage + (threadIdx.x / 64 * 32 + lane % 16) * kTermPitch + lane / 16 * 16;
    const unsigned char* b_row = stage + kSideBytes +
                                 (threadIdx.x / 32 % 2 * 64 + lane / 16 * 8 + lane % 8) * kTermPitch + lane / 8 % 2 * 16;
    uint32_t a[kPlanes][2][4];
#pragma unroll
    for (int p = 0; p < kPlanes; ++p)
#pragma unroll
        for (int i = 0; i < 2; ++i) load_matrices(a[p][i], a_row + p * kPlaneBytes + i * 16 * kTermPitch);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        uint32_t b[kPlanes][4];
#pragma unroll
        for (int p = 0; p < kPlanes; ++p) load_matrices(b[p], b_row + p * kPlaneBytes + j * 8 * kTermPitch);
        float sum[2][2][4] = {};
        constexpr Plane order[6][2] = {{kLow, kLogHigh}, {kHigh, kLogLow}, {kLogLow, kHigh},
                                       {kLogHigh, kLow}, {kHigh, kLogHigh}, {kLogHigh, kHigh}};  // the small ones first
#pragma unroll
        for (int product = 0; product < 6; ++product)
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int n = 0; n < 2; ++n)
                    multiply_float16(sum[i][n], a[order[product][0]][i], b[order[product][1]][2 * n],
                                     b[order[product][1]][2 * n + 1]);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int c = 0; c < 4; ++c) total[i][j + n][c] += sum[i][n][c];
    }
}

DIFFSEG_DEVICE void store_products(const Products& in, int64_t slab, int element, int map,
                                   const float (&total)[2][8][4]) {
    float* out = in.products + slab * in.length * in.rows;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int p = element + threadIdx.x / 64 * 32 + i * 16 + c / 2 * 8 + threadIdx.x % 32 / 4;
                const int f = map + threadIdx.x / 32 % 2 * 64 + j * 8 + threadIdx.x % 4 * 2 + c % 2;
                if (p < in.length && f < in.rows) out[static_cast<int64_t>(p) * in.rows + f] = total[i][j][c];
            }
}

// p.log f + log p.f of all elements p and maps f, and the entropies of f, over the cells of one part; tiles past the end
// of a list are left as they are.
//
// Grid: (tiles of length x rows, parts, batch); the tiles of one block of maps are neighbours, so that it is read from
// memory once. At SD 1.4 (256 elements, 4096 maps): reads A_f (64 MB) and the terms, writes 2 x 4 MB; 6 products of 8.6
// GFLOP in float16; 34 M logarithms (17 M distinct ones). Terms of elements are copied asynchronously a step ahead, and
// maps fetched to registers two steps ahead. Their terms for the next step half of the warps compute before this step's
// products and half after them: a scheduler has one warp of each half, and so both kinds of work at any time.
template <Type kType>
__global__ void __launch_bounds__(kThreads, 1) products_kernel(const __grid_constant__ Products in) {
    const int tiles = ceil_div(in.length, kTile);
    const int element = blockIdx.x % tiles * kTile, map = blockIdx.x / tiles * kTile, batch = blockIdx.z;
    if (past_end(in.counts, batch, element) || past_end(in.counts, batch, map)) return;
    const int first = blockIdx.y * in.part, end = first + in.part < in.cells ? first + in.part : in.cells;
    unsigned char* stages = shared_memory();
    float total[2][8][4] = {};
    copy_terms(stages, in, batch, element, first);
    float entropy = store_terms(stages + kSideBytes, fetch_maps<kType>(in, batch, map, first), first, in.cells);
    Fetched fetched = fetch_maps<kType>(in, batch, map, first + kStep);
    const bool terms_first = threadIdx.x < kThreads / 2;
    for (int cell = first, stage = 0; cell < end; cell += kStep, stage ^= 1) {
        unsigned char *current = stages + stage * kStageBytes, *next = stages + (stage ^ 1) * kStageBytes;
        const bool more = cell + kStep < end;
        wait_for_copies();
        sync_block();  // the stage is complete, and the other one has been read by all
        if (more) copy_terms(next, in, batch, element, cell + kStep);
#pragma unroll 1
        for (int turn = 0; turn < 2; ++turn) {
            if ((turn == 0) != terms_first) {
                multiply_terms(current, total);
            } else if (more) {
                entropy += store_terms(next + kSideBytes, fetched, cell + kStep, in.cells);
                fetched = fetch_maps<kType>(in, batch, map, cell + 2 * kStep);
            }
        }
    }
    const int64_t slab = static_cast<int64_t>(blockIdx.y) * gridDim.z + batch;
    store_products(in, slab, element, map, total);
    entropy += shuffle_xor(entropy, 1);
    const int row = map + row_written(threadIdx.x);
    if (element == 0 && threadIdx.x % 2 == 0 && row < in.rows) in.map_entropies[slab * in.rows + row] = entropy;
}

struct Bits {
    const float *products, *entropies, *map_entropies;
    const int* positions;   // of the elements among the maps; null: the lists are the same
    const int32_t* counts;  // null: lists end at `length` and `rows`
    uint32_t* near;         // [batch, length, words]
    int length, rows, words, parts;
    float threshold;
};

// Whether D < threshold, or D is NaN, or it is the element itself: a bit a map, none past the counts.
//
// Grid: (256 maps, length, batch). Bytes: 4 parts length rows read, an eighth of length rows written.
__global__ void __launch_bounds__(kThreads) bits_kernel(const __grid_constant__ Bits in) {
    const int f = blockIdx.x * kThreads + threadIdx.x, element = blockIdx.y, batch = blockIdx.z;
    const bool listed = f < in.rows && !past_end(in.counts, batch, f) && !past_end(in.counts, batch, element);
    float cross = 0, entropy = 0;
    for (int part = 0; listed && part < in.parts; ++part) {
        const int64_t slab = static_cast<int64_t>(part) * gridDim.z + batch;
        cross += in.products[(slab * in.length + element) * in.rows + f];
        entropy += in.map_entropies[slab * in.rows + f];
    }
    const int own = in.positions == nullptr ? element : in.positions[element];
    const float distance = (in.entropies[batch * in.length + element] + entropy - cross) * (0.5f / kScale);
    const uint32_t word = ballot(listed && (!(distance >= in.threshold) || f == own));
    const int index = f / 32;
    if (threadIdx.x % 32 == 0 && index < in.words)
        in.near[(static_cast<int64_t>(batch) * in.length + element) * in.words + index] = word;
}

// The greedy walk: an element that no earlier head is near becomes a head; its group is what it is near, with
// `exclusive` only what no earlier head took. Groups [batch, length, words], as many as `merged` says.
//
// Grid: (batch). One warp holds the taken elements, 32 in a lane's word (hence at most 1024), and steps from head to
// head: two shuffles and a row of bits each. Rows of bits lie in shared memory where they fit.
__global__ void __launch_bounds__(kThreads)
    walk_kernel(const uint32_t* near, const int32_t* counts, int length, int words, bool exclusive, bool in_shared,
                uint32_t* groups, int32_t* merged) {
    const int batch = blockIdx.x, lane = threadIdx.x;
    const uint32_t* rows = near + static_cast<int64_t>(batch) * length * words;
    groups += static_cast<int64_t>(batch) * length * words;
    if (in_shared) {
        uint32_t* copy = reinterpret_cast<uint32_t*>(shared_memory());
        for (int index = threadIdx.x; index < length * words; index += kThreads) copy[index] = rows[index];
        rows = copy;
    }
    sync_block();
    if (threadIdx.x >= 32) return;
    const int count = counts[batch];
    uint32_t taken = 0;
    int found = 0;
    for (int start = 0; start < count; start += 32) {
        const uint32_t listed = count - start >= 32 ? ~0u : (1u << (count - start)) - 1;
        for (uint32_t left = listed & ~broadcast(taken, start / 32); left != 0;
             left = listed & ~broadcast(taken, start / 32)) {
            const uint32_t bits = lane < words ? rows[(start + lowest_bit(left)) * words + lane] : 0;
            if (lane < words) groups[found * words + lane] = exclusive ? bits & ~taken : bits;
            taken |= bits;
            ++found;
        }
    }
    if (lane == 0) merged[batch] = found;
}

struct Means {
    Rows maps;
    const uint32_t* groups;  // [batch, length, words]: a row of bits a group
    const int32_t* counts;   // of the groups; null: `length`
    const int32_t* listed;   // of the maps; null: `rows`
    float* means;            // [batch, length, cells], zeros past the counts
    int length, rows, cells, words;
};

// A step of the means: 128 maps x 32 cells in two bfloat16 terms in shared memory, [2][128 rows] of 64 bytes and 16
// more, which put the eight rows of a matrix in different banks. Of 32 maps, those of bits b and b + 16 of a word lie
// beside each other: one shift and one mask make both of them a fragment's operand.
constexpr int kMeanRows = 32 * kWordsAtOnce, kMeanCells = 32, kMeanGroups = 256;
constexpr int kMeanPitch = 2 * kMeanCells + 16;
constexpr int kMeanPlane = kMeanRows * kMeanPitch;
constexpr int kMeanStage = 2 * kMeanPlane;

struct FetchedStep {  // four rows, 32 apart, four cells each; and the bits of the thread's four groups
    float4 maps[4];
    uint4 bits[4];
};

template <Type kType>
DIFFSEG_DEVICE FetchedStep fetch_step(const Means& in, int batch, int group, int cell, int row, int count) {
    FetchedStep step;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const int f = row + k * 32 + threadIdx.x / 8, column = cell + threadIdx.x % 8 * 4;
        step.maps[k] = float4{0, 0, 0, 0};
        if (f < in.rows)
            step.maps[k] =
                load_four<kType>(in.maps.data, batch * in.maps.batch + f * in.maps.row, column, in.cells, 0.0f);
        const int g = group + threadIdx.x / 32 * 32 + k * 8 + threadIdx.x % 32 / 4;
        step.bits[k] = uint4{0, 0, 0, 0};
        if (g < count)
            step.bits[k] = *reinterpret_cast<const uint4*>(
                in.groups + (static_cast<int64_t>(batch) * in.length + g) * in.words + row / 32);
    }
    return step;
}

// The row of a map among 32: b and b + 16 of lane b % 4 in rows 2 (b % 4) and the next of matrix b / 4.
DIFFSEG_DEVICE int paired_row(int map) { return map / 4 % 4 * 8 + map % 4 * 2 + map / 16; }

DIFFSEG_DEVICE void store_step(unsigned char* stage, const FetchedStep& step) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const Split left = split_bfloat16(step.maps[k].x, step.maps[k].y);
        const Split right = split_bfloat16(step.maps[k].z, step.maps[k].w);
        unsigned char* target = stage + (k * 32 + paired_row(threadIdx.x / 8)) * kMeanPitch + threadIdx.x % 8 * 8;
        *reinterpret_cast<uint2*>(target) = {left.high, right.high};
        *reinterpret_cast<uint2*>(target + kMeanPlane) = {left.low, right.low};
    }
}

// Bits 4 i and 4 i + 16 as bfloat16 twos, which are one bit each.
DIFFSEG_DEVICE uint32_t bits_as_twos(uint32_t word, int i) { return word << (14 - 4 * i) & 0x40004000u; }

// sum += 2 bits x maps over 32 maps: a warp's 32 groups x 32 cells. `words`: of groups 0, 8, 16, 24 beyond lane / 4.
DIFFSEG_DEVICE void multiply_bits(const unsigned char* rows, const uint32_t (&words)[4], float (&sum)[2][4][4]) {
    const int lane = threadIdx.x % 32;
    rows += lane % 16 * kMeanPitch + lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < 32; k += 16) {
        uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int r = 0; r < 4; ++r) a[i][r] = bits_as_twos(words[2 * i + r % 2] >> lane % 4, k / 8 + r / 2);
#pragma unroll
        for (int plane = 1; plane >= 0; --plane)
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                uint32_t b[4];
                load_matrices_transposed(b, rows + plane * kMeanPlane + k * kMeanPitch + j * 16);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    multiply_bfloat16(sum[i][j], a[i], b[0], b[1]);
                    multiply_bfloat16(sum[i][j + 1], a[i], b[2], b[3]);
                }
            }
    }
}

// Means over groups: bits [length, rows] times maps [rows, cells] in two bfloat16 terms, which keep float32's range,
// over the number of bits. A warp skips 32 maps of which none is in its 32 groups.
//
// Grid: (tiles of 256 groups x 32 cells, batch). At SD 1.4, round 1: reads A_f (64 MB) once and the bits (128 KB a
// block, from the second-level cache), writes 4 MB; 2 products of 8.6 GFLOP in bfloat16 times the density of the bits.
template <Type kType>
__global__ void __launch_bounds__(kThreads, 1) means_kernel(const __grid_constant__ Means in) {
    const int tiles = ceil_div(in.length, kMeanGroups);
    const int group = blockIdx.x % tiles * kMeanGroups, cell = blockIdx.x / tiles * kMeanCells, batch = blockIdx.y;
    const int count = in.counts == nullptr ? in.length : in.counts[batch];
    const int rows = in.listed == nullptr ? in.rows : in.listed[batch];
    unsigned char* stages = shared_memory();
    float total[2][4][4] = {};
    int sizes[4] = {};
    int stage = 0;
    FetchedStep step = fetch_step<kType>(in, batch, group, cell, 0, count);
    for (int row = 0; row < rows; row += kMeanRows, stage ^= 1) {
        unsigned char* current = stages + stage * kMeanStage;
        store_step(current, step);
        uint32_t words[kWordsAtOnce][4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            words[0][k] = step.bits[k].x, words[1][k] = step.bits[k].y;
            words[2][k] = step.bits[k].z, words[3][k] = step.bits[k].w;
        }
        sync_block();  // the stage is complete, and the other one has been read by all
        if (row + kMeanRows < rows) step = fetch_step<kType>(in, batch, group, cell, row + kMeanRows, count);
        float sum[2][4][4] = {};
#pragma unroll
        for (int w = 0; w < kWordsAtOnce; ++w) {
#pragma unroll
            for (int k = 0; k < 4; ++k) sizes[k] += count_bits(words[w][k]);
            if (ballot((words[w][0] | words[w][1] | words[w][2] | words[w][3]) != 0) != 0)
                multiply_bits(current + w * 32 * kMeanPitch, words[w], sum);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int c = 0; c < 4; ++c) total[i][j][c] += sum[i][j][c];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int g = group + threadIdx.x / 32 * 32 + i * 16 + c / 2 * 8 + threadIdx.x % 32 / 4;
                const int column = cell + j * 8 + threadIdx.x % 4 * 2 + c % 2;
                const int size = sizes[2 * i + c / 2];
                if (g < in.length && column < in.cells)
                    in.means[(static_cast<int64_t>(batch) * in.length + g) * in.cells + column] =
                        total[i][j][c] / static_cast<float>(size > 0 ? 2 * size : 2);
            }
}

int words_of(int rows) { return round_up(ceil_div(rows, 32), kWordsAtOnce); }

// How the cells are cut for the products of `length` elements and `rows` maps.
struct Parts {
    int cells, count;

    Parts(int length, int rows, int all_cells) {
        const int tiles = ceil_div(length, kTile) * ceil_div(rows, kTile);
        cells = round_up(ceil_div(all_cells, std::max(1, kBlocks / tiles)), kStep);
        count = ceil_div(all_cells, cells);
    }
};

// The op: what is launched, and the workspace it needs.
class Merging {
   public:
    Merging(int batch, int cells, const MergeOptions& options, Workspace& workspace)
        : batch_(batch), cells_(cells), length_(static_cast<int>(options.anchors.size())), options_(options) {
        const size_t elements = size_t(batch) * length_;
        size_t products = 0, entropies = 0;
        for (int rows : {cells, length_}) {
            const size_t parts = Parts(length_, rows, cells).count;
            products = std::max(products, parts * elements * rows);
            entropies = std::max(entropies, parts * batch * rows);
        }
        positions_ = workspace.take<int>(length_);
        terms_ = workspace.take<uint16_t>(kPlanes * elements * pitch());
        entropies_ = workspace.take<float>(elements);
        products_ = workspace.take<float>(products);
        map_entropies_ = workspace.take<float>(entropies);
        near_ = workspace.take<uint32_t>(elements * words_of(cells));
        groups_ = workspace.take<uint32_t>(elements * words_of(length_));
        spare_maps_ = workspace.take<float>(options.thresholds.size() > 1 ? elements * cells : 0);
        spare_counts_ = workspace.take<int32_t>(batch);
    }

    void run(const View& attention, Type type, float* maps, int32_t* counts, Stream stream) const {
        const size_t rounds = options_.thresholds.size();
        const auto last = [&](size_t round) { return (rounds - 1 - round) % 2 == 0; };  // lists alternate to end in maps
        float* list = last(0) ? maps : spare_maps_;
        int32_t* listed = last(0) ? counts : spare_counts_;
        write_positions(listed, stream);
        const Rows rows = {attention.data, attention.batch, attention.row};
        fill_bits(rows, type, cells_, positions_, nullptr, options_.thresholds[0], stream);
        fill_means(rows, type, cells_, near_, nullptr, nullptr, list, stream);
        for (size_t round = 1; round < rounds; ++round) {
            const Rows elements = {list, int64_t(length_) * cells_, cells_};
            float* next = last(round) ? maps : spare_maps_;
            int32_t* merged = last(round) ? counts : spare_counts_;
            fill_bits(elements, Type::float32, length_, nullptr, listed, options_.thresholds[round], stream);
            walk(listed, merged, stream);
            fill_means(elements, Type::float32, length_, groups_, merged, listed, next, stream);
            list = next, listed = merged;
        }
    }

   private:
    int pitch() const { return round_up(cells_, kStep); }

    void write_positions(int32_t* counts, Stream stream) const {
        Positions some;
        constexpr int kMost = sizeof(some.cell) / sizeof(int);
        for (int first = 0; first < length_; first += kMost) {
            const int count = std::min(kMost, length_ - first);
            std::copy_n(options_.anchors.begin() + first, count, some.cell);
            launch("positions_kernel", positions_kernel, dim3(1), kThreads, 0, stream, some, count, positions_ + first,
                   counts, batch_, length_);
        }
    }

    void fill_bits(const Rows& maps, Type type, int rows, const int* positions, const int32_t* counts, float threshold,
                   Stream stream) const {
        const bool full = type == Type::float32;
        launch("terms_kernel", full ? terms_kernel<Type::float32> : terms_kernel<Type::bfloat16>, dim3(length_, batch_),
               kThreads, kWarps * sizeof(float), stream, maps, positions, counts, cells_, pitch(), terms_, entropies_);
        const Parts parts(length_, rows, cells_);
        const Products in = {terms_, maps, counts, products_, map_entropies_, length_, rows, cells_, pitch(), parts.cells};
        launch("products_kernel", full ? products_kernel<Type::float32> : products_kernel<Type::bfloat16>,
               dim3(ceil_div(length_, kTile) * ceil_div(rows, kTile), parts.count, batch_), kThreads, 2 * kStageBytes,
               stream, in);
        const Bits bits = {products_, entropies_, map_entropies_, positions,   counts,   near_,
                           length_,   rows,       words_of(rows), parts.count, threshold};
        launch("bits_kernel", bits_kernel, dim3(ceil_div(bits.words * 32, kThreads), length_, batch_), kThreads, 0,
               stream, bits);
    }

    void walk(const int32_t* counts, int32_t* merged, Stream stream) const {
        constexpr size_t kMostShared = 96 << 10;
        const int words = words_of(length_);
        const size_t bytes = sizeof(uint32_t) * length_ * words;
        const bool in_shared = bytes <= kMostShared;
        launch("walk_kernel", walk_kernel, dim3(batch_), kThreads, in_shared ? bytes : 0, stream, near_, counts, length_,
               words, options_.exclusive, in_shared, groups_, merged);
    }

    void fill_means(const Rows& maps, Type type, int rows, const uint32_t* groups, const int32_t* counts,
                    const int32_t* listed, float* means, Stream stream) const {
        const Means in = {maps, groups, counts, listed, means, length_, rows, cells_, words_of(rows)};
        launch("means_kernel", type == Type::float32 ? means_kernel<Type::float32> : means_kernel<Type::bfloat16>,
               dim3(ceil_div(length_, kMeanGroups) * ceil_div(cells_, kMeanCells), batch_), kThreads, 2 * kMeanStage,
               stream, in);
    }

    int batch_, cells_, length_;
    const MergeOptions& options_;
    int* positions_;
    uint16_t* terms_;
    float *entropies_, *products_, *map_entropies_;
    uint32_t *near_, *groups_;
    float* spare_maps_;
    int32_t* spare_counts_;
};

}  // namespace

size_t merge_workspace(int batch, int cells, const MergeOptions& options) {
    Workspace workspace(nullptr);
    Merging(batch, cells, options, workspace);
    return workspace.used();
}

void merge(const View& attention, Type type, int batch, int cells, const MergeOptions& options, float* maps,
           int32_t* counts, void* memory, Stream stream) {
    Workspace workspace(memory);
    Merging(batch, cells, options, workspace).run(attention, type, maps, counts, stream);
}

}  // namespace diffseg::cuda
