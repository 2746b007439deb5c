// aggregate: A_f[(I, J)] = sum_k R_k normalise(upsample(M_k))[(I h_k // h, J w_k // w)], from queries and keys or maps.
//
//   M_k       = sum over heads of softmax(Q_k K_k^T scale_k); the mean's factor drops out in the normalisation
//   normalise = divide by the sum of the upsampled map: the dot product of M_k's row with fixed column weights, each
//               cell's share of the upsampled grid, so that the row need not be upsampled to know it
//
// Layers of one grid are summed before they are upsampled. The grids below the output's come first; their sums are kept
// widened along x ([n_k, h_k, w]), and a row of A_f starts as the blend of these down y, computed where it is needed;
// where no layer is on the output's grid, that is all of A_f.
//
// Work split, from queries and keys: one task is a block of rows of one layer whose exponentials E and sum M, [rows, n]
// each, stay in the second-level cache. For each head the keys stream past in panels of kWide columns, packed once a
// layer and image; a tile of kTall x kWide scores leaves the registers as exp2(score - reference). The reference is
// each row's largest score in the first panel. Floating point loses nothing by it unless the row's true maximum lies
// 2^60 above, which is detected, and then the pass is repeated with the true maximum. E / sum(E) of one head is added
// to M while the next head's tiles pass by. With log-sum-exps there is no E: the tiles are added to M at once.
// Work split, from maps: one task is a row of one grid; the heads of all its layers are summed in first-level cache.
//
// Bytes a full-size layer, from queries and keys: Q and K once, packed K once a block from the last-level cache, A_f
// read and written once (4 N^2 each; only written by the first layer). From maps: every map once, A_f written once.
// Workspace: packed keys of one layer, E and M of a block (3/4 MiB) a thread, and the sums of the lower grids.

#include <math.h>
#include <string.h>

#include "upsample.h"

namespace diffseg::DIFFSEG_ISA {
namespace {

constexpr float kHeadroom = 60.0f;  // how far, in powers of two, scores may exceed their reference
constexpr int64_t kBlockBytes = 768 << 10;
constexpr int64_t kMostRows = 96;

// to[j] += factor * from[j].
void add_scaled(float* to, float factor, const float* from, int64_t length) {
    int64_t j = 0;
    for (; j + kLanes <= length; j += kLanes) store(to + j, load(to + j) + factor * load(from + j));
    for (; j < length; ++j) to[j] += factor * from[j];
}

// The layers of one grid.
struct Level {
    Grid grid;
    int64_t first, last;  // layers [first, last); empty where none is on the output grid
    float* wide;          // [n, grid.height, width of the output]; null for the output grid itself
    Tap *down, *across;   // taps of the output's rows and columns
    float* share;         // [n rounded up to kWide] each cell's weight in the sum of an upsampled map
};

// All levels and what they own.
class Levels {
public:
    Levels(const Layer* layers, int64_t count, Grid output)
        : grid(output),
          levels_(count + 1),
          taps_(count * (grid.height + grid.width)),
          share_(share_size(layers, count)),
          wide_(wide_size(layers, count, grid)) {
        Tap* taps = taps_;
        float *share = share_, *wide = wide_;
        for (int64_t layer = 0; layer < count; ++layer) {
            if (starts(layers, layer)) {
                Level& level = levels_[used_++];
                level = {layers[layer].grid, layer, layer, wide, taps, taps + grid.height, share};
                taps += grid.height + grid.width;
                share += round_up(level.grid.cells(), kWide);
                wide += level.grid.cells() * level.grid.height * grid.width;
                fill_taps(level.down, level.grid.height, grid.height);
                fill_taps(level.across, level.grid.width, grid.width);
                fill_share(level);
            }
            levels_[used_ - 1].last = layer + 1;
        }
        if (layers[count - 1].grid.cells() < grid.cells())
            levels_[used_++] = {grid, count, count, nullptr, nullptr, nullptr, nullptr};
        levels_[used_ - 1].wide = nullptr;
    }

    Level* begin() { return levels_; }
    Level* end() { return levels_ + used_; }

    // out [N] = row `cell` of the blend of all lower levels.
    void start_row(int64_t cell, float* out) const {
        const int64_t y = cell / grid.width, x = cell % grid.width;
        if (levels_[0].wide == nullptr) memset(out, 0, grid.cells() * sizeof(float));
        for (const Level* level = levels_; level->wide != nullptr; ++level) {
            const int64_t row = y * level->grid.height / grid.height * level->grid.width +
                                x * level->grid.width / grid.width;
            const float* map = level->wide + row * level->grid.height * grid.width;
            for (int64_t line = 0; line < grid.height; ++line) {
                const Tap& tap = level->down[line];
                const float *low = map + tap.low * grid.width, *high = map + tap.high * grid.width;
                const float rest = 1.0f - tap.weight, weight = tap.weight;
                float* to = out + line * grid.width;
                int64_t j = 0;
                const bool first = level == levels_;
                for (; j + kLanes <= grid.width; j += kLanes)
                    store(to + j, (first ? Vec{} : load(to + j)) + rest * load(low + j) + weight * load(high + j));
                for (; j < grid.width; ++j) to[j] = (first ? 0.0f : to[j]) + rest * low[j] + weight * high[j];
            }
        }
    }

    // Widens a finished row [n] of a lower level along x.
    void widen_row(const Level& level, int64_t row, const float* map) const {
        float* to = level.wide + row * level.grid.height * grid.width;
        for (int64_t y = 0; y < level.grid.height; ++y) {
            const float* line = map + y * level.grid.width;
            for (int64_t x = 0; x < grid.width; ++x) {
                const Tap& tap = level.across[x];
                *to++ = (1.0f - tap.weight) * line[tap.low] + tap.weight * line[tap.high];
            }
        }
    }

    const Grid grid;

private:
    static bool starts(const Layer* layers, int64_t layer) {
        return layer == 0 || layers[layer].grid.height != layers[layer - 1].grid.height ||
               layers[layer].grid.width != layers[layer - 1].grid.width;
    }

    static int64_t share_size(const Layer* layers, int64_t count) {
        int64_t size = 0;
        for (int64_t layer = 0; layer < count; ++layer)
            if (starts(layers, layer)) size += round_up(layers[layer].grid.cells(), kWide);
        return size;
    }

    static int64_t wide_size(const Layer* layers, int64_t count, Grid out) {
        int64_t size = 0;
        for (int64_t layer = 0; layer < count; ++layer)
            if (starts(layers, layer) && layers[layer].grid.cells() < out.cells())
                size += layers[layer].grid.cells() * layers[layer].grid.height * out.width;
        return size;
    }

    // The share of a cell is the product of its shares along y and x.
    void fill_share(const Level& level) const {
        const int64_t width = level.grid.width;
        memset(level.share, 0, round_up(level.grid.cells(), kWide) * sizeof(float));
        for (int64_t y = 0; y < grid.height; ++y)
            for (int64_t x = 0; x < grid.width; ++x) {
                const Tap &down = level.down[y], &across = level.across[x];
                level.share[down.low * width + across.low] += (1 - down.weight) * (1 - across.weight);
                level.share[down.low * width + across.high] += (1 - down.weight) * across.weight;
                level.share[down.high * width + across.low] += down.weight * (1 - across.weight);
                level.share[down.high * width + across.high] += down.weight * across.weight;
            }
    }

    int64_t used_ = 0;
    Buffer<Level> levels_;
    Buffer<Tap> taps_;
    Buffer<float> share_, wide_;
};

// One layer of one image, its keys packed: what the tasks share.
struct Scores {
    const Layer& layer;
    int64_t item, cells, panels, rows;  // `rows` of a block
    const float* keys;                  // [heads, panels, depth, kWide]
    float padding[kWide];               // 0 for the cells of the last panel, -inf beyond them

    Scores(const Layer& from, int64_t item, const float* keys)
        : layer(from), item(item), cells(from.grid.cells()), panels(panel_count(from)), rows(block_rows(from)),
          keys(keys) {
        const int64_t listed = cells - (panels - 1) * kWide;
        for (int64_t j = 0; j < kWide; ++j) padding[j] = j < listed ? 0.0f : -INFINITY;
    }

    static int64_t panel_count(const Layer& layer) { return ceil_div(layer.grid.cells(), kWide); }

    static int64_t block_rows(const Layer& layer) {
        const int64_t row_bytes = 2 * panel_count(layer) * kWide * sizeof(float);
        const int64_t rows = most<int64_t>(kBlockBytes / row_bytes / kTall, 1) * kTall;
        return least(rows, least(kMostRows / kTall * kTall, round_up(layer.grid.cells(), kTall)));
    }

    static int64_t packed_keys(const Layer& layer) { return layer.heads * panel_count(layer) * layer.depth * kWide; }
};

// A block of rows of one layer. E and M are stored by panels, [panels, rows, kWide], so that a tile is contiguous.
class Block {
public:
    static int64_t floats_needed(const Layer& layer) {
        const int64_t rows = Scores::block_rows(layer), columns = Scores::panel_count(layer) * kWide;
        return rows * (2 * columns + layer.depth + 2 + 2 * kLanes) + 64;
    }

    Block(const Scores& scores, int64_t first, float* memory)
        : scores_(scores), first_(first), size_(scores.rows * scores.panels * kWide) {
        exponentials_ = memory;
        sums_ = exponentials_ + size_;
        top_ = sums_ + size_;
        total_ = top_ + scores.rows * kLanes;
        reference_ = total_ + scores.rows * kLanes;
        factor_ = reference_ + scores.rows;
        queries_ = factor_ + scores.rows;
    }

    // M = sum over heads of the softmax.
    void run() {
        memset(sums_, 0, size_ * sizeof(float));
        const Layer& layer = scores_.layer;
        for (int64_t head = 0; head < layer.heads; ++head) {
            for (int64_t row = 0; row < scores_.rows; row += kTall)
                pack(layer.queries, scores_.item, head, first_ + row, scores_.cells, kTall, layer.depth,
                     layer.scale * kLog2E, queries_ + row * layer.depth);
            const float* keys = scores_.keys + head * scores_.panels * layer.depth * kWide;
            if (layer.logsumexps != nullptr) {
                refer_to_logsumexps(head);
                pass<Mode::kAdd>(keys);
            } else {
                refer_to_first_panel(keys);
                head == 0 ? pass<Mode::kStore>(keys) : pass<Mode::kFoldAndStore>(keys);
                if (outgrown()) pass<Mode::kStore>(keys);
                for (int64_t row = 0; row < scores_.rows; ++row) factor_[row] = 1.0f / sum(load(total_ + row * kLanes));
            }
        }
        if (layer.logsumexps == nullptr)
            for (int64_t tile = 0; tile < size_ / kWide; ++tile) fold(tile * kWide, factor_[tile % scores_.rows]);
    }

    int64_t rows() const { return least(scores_.rows, scores_.cells - first_); }

    // The sum of row `row` of M, upsampled.
    float mass(int64_t row, const float* share) const {
        Vec total = {};
        for (int64_t panel = 0; panel < scores_.panels; ++panel) {
            const float* from = sums_ + (panel * scores_.rows + row) * kWide;
            total += load(from) * load(share + panel * kWide);
            total += load(from + kLanes) * load(share + panel * kWide + kLanes);
        }
        return sum(total);
    }

    // to [n] += factor * row `row` of M
    void add_to(float* to, int64_t row, float factor) const {
        for (int64_t panel = 0; panel < scores_.panels; ++panel, to += kWide) {
            const float* from = sums_ + (panel * scores_.rows + row) * kWide;
            add_scaled(to, factor, from, least<int64_t>(kWide, scores_.cells - panel * kWide));
        }
    }

private:
    enum class Mode { kStore, kFoldAndStore, kAdd };

    void refer_to_logsumexps(int64_t head) {
        const Layer& layer = scores_.layer;
        const float* from = layer.logsumexps + (scores_.item * layer.heads + head) * scores_.cells;
        for (int64_t row = 0; row < scores_.rows; ++row) {
            const float value = from[least(first_ + row, scores_.cells - 1)];
            reference_[row] = finite(value) ? value * kLog2E : NAN;
        }
    }

    void refer_to_first_panel(const float* keys) {
        for (int64_t row = 0; row < scores_.rows; row += kTall) {
            Vec tile[kTall][2];
            score(tile, row, 0, keys);
            for (int i = 0; i < kTall; ++i)
                reference_[row + i] = most(-1e30f, maximum(larger(tile[i][0], tile[i][1])));
        }
    }

    // Whether a row's scores outgrew its reference; then the reference becomes their maximum.
    bool outgrown() {
        bool any = false;
        for (int64_t row = 0; row < scores_.rows; ++row) {
            const float top = maximum(load(top_ + row * kLanes));
            if (top > reference_[row] + kHeadroom) {
                reference_[row] = top;
                any = true;
            }
        }
        return any;
    }

    void fold(int64_t offset, float factor) {
        store(sums_ + offset, load(sums_ + offset) + load(exponentials_ + offset) * factor);
        store(sums_ + offset + kLanes, load(sums_ + offset + kLanes) + load(exponentials_ + offset + kLanes) * factor);
    }

    inline __attribute__((always_inline)) void score(Vec (&tile)[kTall][2], int64_t row, int64_t panel,
                                                     const float* keys) const {
        const int64_t depth = scores_.layer.depth;
        const float* right = keys + panel * depth * kWide;
        multiply(tile, panel + 1 == scores_.panels ? scores_.padding : kZeros, queries_ + row * depth, depth,
                 [=](int64_t k) { return right + k * kWide; });
    }

    // One pass of the keys: the tiles' exponentials are stored to E or added to M.
    template <Mode mode>
    void pass(const float* keys) {
        for (int64_t row = 0; row < scores_.rows; ++row) {
            store(top_ + row * kLanes, splat(-INFINITY));
            store(total_ + row * kLanes, Vec{});
        }
        for (int64_t panel = 0; panel < scores_.panels; ++panel) {
            for (int64_t row = 0; row < scores_.rows; row += kTall) {
                Vec tile[kTall][2];
                score(tile, row, panel, keys);
#pragma GCC unroll 12
                for (int i = 0; i < kTall; ++i) {
                    const int64_t lane = (row + i) * kLanes, offset = (panel * scores_.rows + row + i) * kWide;
                    const Vec reference = splat(reference_[row + i]);
                    const Vec first = exp2(tile[i][0] - reference), second = exp2(tile[i][1] - reference);
                    if constexpr (mode == Mode::kAdd) {
                        store(sums_ + offset, load(sums_ + offset) + first);
                        store(sums_ + offset + kLanes, load(sums_ + offset + kLanes) + second);
                    } else {
                        if constexpr (mode == Mode::kFoldAndStore) fold(offset, factor_[row + i]);
                        store(top_ + lane, larger(larger(tile[i][0], tile[i][1]), load(top_ + lane)));
                        store(total_ + lane, load(total_ + lane) + (first + second));
                        store(exponentials_ + offset, first);
                        store(exponentials_ + offset + kLanes, second);
                    }
                }
            }
        }
    }

    const Scores& scores_;
    const int64_t first_, size_;
    float *exponentials_, *sums_, *top_, *total_, *reference_, *factor_, *queries_;
};

int64_t largest(const Layer* layers, int64_t count, int64_t (*size)(const Layer&)) {
    int64_t result = 0;
    for (int64_t layer = 0; layer < count; ++layer) result = most(result, size(layers[layer]));
    return result;
}

// Memory that tasks share: the packed keys of a layer, and a block a thread.
struct Scratch {
    Buffer<float> keys;
    int64_t block_size;
    Buffer<float> blocks;

    Scratch(const Layer* layers, int64_t count, int threads)
        : keys(largest(layers, count, Scores::packed_keys)),
          block_size(largest(layers, count, Block::floats_needed)),
          blocks(block_size * threads) {}
};

// Adds R_k normalise(M_k) of one image's layer to `target` [n, n], or, with the level's first layer, begins it: from
// the lower levels at the top, else from zeros. Returns the layer's number if a row is not finite, else kFinite.
int64_t add_layer(const Levels& levels, const Level& level, const Layer& layer, bool begin, int64_t item, float* target,
                  Scratch& scratch, int threads) {
    const Scores scores(layer, item, scratch.keys);
    int64_t bad = kFinite;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* memory = scratch.blocks + thread_number() * scratch.block_size;
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < layer.heads * scores.panels; ++panel)
            pack(layer.keys, item, panel / scores.panels, panel % scores.panels * kWide, scores.cells, kWide,
                 layer.depth, 1.0f, scratch.keys + panel * layer.depth * kWide);
#pragma omp for schedule(dynamic) reduction(min : bad)
        for (int64_t first = 0; first < scores.cells; first += scores.rows) {
            Block block(scores, first, memory);
            block.run();
            for (int64_t row = 0; row < block.rows(); ++row) {
                float* to = target + (first + row) * scores.cells;
                const float mass = block.mass(row, level.share);
                if (!finite(mass)) bad = layer.number;
                if (begin && level.wide == nullptr) levels.start_row(first + row, to);
                if (begin && level.wide != nullptr) memset(to, 0, scores.cells * sizeof(float));
                block.add_to(to, row, layer.ratio / most(mass, kSmallestProbability));
            }
        }
    }
    return bad;
}

int64_t aggregate(const Layer* layers, int64_t count, Grid grid, int64_t batch, float* out, int threads) {
    Levels levels(layers, count, grid);
    Scratch scratch(layers, count, threads);
    int64_t lower = 1;
    for (const Level& level : levels)
        if (level.wide != nullptr) lower = level.grid.cells();
    Buffer<float> compact(lower * lower);
    int64_t bad = kFinite;

    for (int64_t item = 0; item < batch; ++item) {
        for (const Level& level : levels) {
            const bool is_top = level.wide == nullptr;
            const int64_t rows = level.grid.cells();
            float* target = is_top ? out + item * rows * rows : static_cast<float*>(compact);
            for (int64_t index = level.first; index < level.last; ++index)
                bad = least(bad, add_layer(levels, level, layers[index], index == level.first, item, target, scratch,
                                           threads));
            if (is_top && level.first < level.last) continue;  // its rows are finished
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
            for (int64_t row = 0; row < rows; ++row) {
                if (is_top)
                    levels.start_row(row, target + row * rows);
                else
                    levels.widen_row(level, row, compact + row * rows);
            }
        }
    }
    return bad;
}

// to[j] (+)= sum over kHeads maps, `next` apart, of from[j]: streams of their own, each fetched ahead, since what two
// cores read is bounded by how much of memory's latency they cover.
template <int kHeads, class T>
void add_heads(const T* from, int64_t next, int64_t length, bool first, float* to) {
    constexpr int64_t kLine = 64 / sizeof(T), kAhead = 32 * kLine;
    int64_t j = 0;
    for (; j + kLine <= length; j += kLine) {
#pragma GCC unroll 8
        for (int head = 0; head < kHeads; ++head) __builtin_prefetch(from + head * next + j + kAhead);
#pragma GCC unroll 8
        for (int64_t i = j; i < j + kLine; i += kLanes) {
            Vec sum = first ? Vec{} : load(to + i);
#pragma GCC unroll 8
            for (int head = 0; head < kHeads; ++head) sum += lanes(from + head * next + i);
            store(to + i, sum);
        }
    }
    for (; j < length; ++j) {
        float sum = first ? 0.0f : to[j];
        for (int head = 0; head < kHeads; ++head) sum += widen(from[head * next + j]);
        to[j] = sum;
    }
}

template <int kValue>
struct Count {
    static constexpr int value = kValue;
};

// to [n] = sum over heads of row `row` of the layer's maps; returns its mass.
float sum_heads(const Layer& layer, int64_t item, int64_t row, const float* share, float* __restrict to) {
    const View& maps = layer.queries;
    const int64_t cells = layer.grid.cells();
    typed(maps, item * maps.batch + row * maps.row, [&](const auto* from) {
        int64_t head = 0;
        const auto add = [&](auto heads) {
            for (; head + heads.value <= layer.heads; head += heads.value)
                add_heads<heads.value>(from + head * maps.head, maps.head, cells, head == 0, to);
        };
        add(Count<8>{});
        add(Count<4>{});
        add(Count<2>{});
        add(Count<1>{});
    });
    return total(
        cells, [=](int64_t j) { return load(to + j) * load(share + j); }, [=](int64_t j) { return to[j] * share[j]; });
}

int64_t aggregate_maps(const Layer* layers, int64_t count, Grid grid, int64_t batch, float* out, int threads) {
    Levels levels(layers, count, grid);
    const int64_t cells = levels.grid.cells();
    Buffer<float> lines(2 * cells * threads);
    int64_t bad = kFinite;
    for (int64_t item = 0; item < batch; ++item) {
        for (const Level& level : levels) {
            const bool is_top = level.wide == nullptr;
            const int64_t size = level.grid.cells();
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic, 16) reduction(min : bad)
            for (int64_t row = 0; row < size; ++row) {
                float* line = lines + 2 * cells * thread_number();
                float* to = is_top ? out + (item * cells + row) * cells : line + cells;
                if (is_top)
                    levels.start_row(row, to);
                else
                    memset(to, 0, size * sizeof(float));
                for (int64_t index = level.first; index < level.last; ++index) {
                    const float mass = sum_heads(layers[index], item, row, level.share, line);
                    if (!finite(mass)) bad = least(bad, layers[index].number);
                    const float factor = layers[index].ratio / most(mass, kSmallestProbability);
                    add_scaled(to, factor, line, size);
                }
                if (!is_top) levels.widen_row(level, row, to);
            }
        }
    }
    return bad;
}

}  // namespace
}  // namespace diffseg::DIFFSEG_ISA
