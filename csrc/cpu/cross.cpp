// aggregate_cross and score_masks: where an image attends to each word of a text, and how well a word fits each mask.
//
//   T_k   = mean over heads of softmax(Q_k K_k^T scale_k), [n_k, tokens]
//   words = normalise(sum_k upsample(shares T_k^T)); normalise: divide by the L2 norm over the pixels
//   score = mean of the upsampled map of a word over the pixels of a mask
//
// Work split of aggregate_cross: one task is kTall rows of one layer; their scores of all tokens and the sum over heads
// stay in the first-level cache, and of T_k only the words' sums are written. Layers of one grid are summed before they
// are upsampled, by tasks of one line of one word. Of score_masks: one task is a band of lines; the bands do not depend
// on the number of threads, and their sums are added in order.
// Bytes: Q once, packed keys of a layer (at most 0.5 MB at SD 1.4) once a task from the second-level cache, 4 n W a
// grid, the output twice; score_masks reads the labels and the maps once a word.

#include <math.h>
#include <string.h>

#include "upsample.h"

namespace diffseg::DIFFSEG_ISA {
namespace {

// One layer of one image, its keys packed.
struct Text {
    const Layer& layer;
    const Words& words;
    int64_t item, panels;
    float* keys;           // [heads, panels, depth, kWide]
    float padding[kWide];  // 0 for the tokens of the last panel, -inf beyond them

    Text(const Layer& from, const Words& words, int64_t item, float* keys)
        : layer(from), words(words), item(item), panels(panel_count(words)), keys(keys) {
        const int64_t listed = words.tokens - (panels - 1) * kWide;
        for (int64_t j = 0; j < kWide; ++j) padding[j] = j < listed ? 0.0f : -INFINITY;
    }

    static int64_t panel_count(const Words& words) { return ceil_div(words.tokens, kWide); }

    static int64_t packed_keys(const Layer& layer, const Words& words) {
        return layer.heads * panel_count(words) * layer.depth * kWide;
    }

    static int64_t scratch(const Layer& layer, const Words& words) {
        return kTall * (layer.depth + 2 * panel_count(words) * kWide);
    }

    void pack_panel(int64_t panel) const {
        pack(layer.keys, item, panel / panels, panel % panels * kWide, words.tokens, kWide, layer.depth, 1.0f,
             keys + panel * layer.depth * kWide);
    }

    const float* shares(int64_t word) const { return words.shares + (item * words.count + word) * words.tokens; }
};

// sums [columns] += factor * softmax of the scores, in powers of two
void add_softmax(float* scores, int64_t columns, float factor, float* sums) {
    Vec top = splat(-INFINITY), mass = {};
    for (int64_t j = 0; j < columns; j += kLanes) top = larger(load(scores + j), top);
    const Vec reference = splat(maximum(top));
    for (int64_t j = 0; j < columns; j += kLanes) {
        const Vec value = exp2(load(scores + j) - reference);
        store(scores + j, value);
        mass += value;
    }
    const Vec share = splat(factor / sum(mass));
    for (int64_t j = 0; j < columns; j += kLanes) store(sums + j, load(sums + j) + load(scores + j) * share);
}

// Rows [first, first + kTall) of a layer: to[word, row] += shares T^T. Returns whether all of it is finite.
bool attend(const Text& text, int64_t first, float* memory, float* to) {
    const Layer& layer = text.layer;
    const int64_t cells = layer.grid.cells(), columns = text.panels * kWide;
    float *queries = memory, *scores = queries + kTall * layer.depth, *sums = scores + kTall * columns;
    memset(sums, 0, kTall * columns * sizeof(float));
    for (int64_t head = 0; head < layer.heads; ++head) {
        pack(layer.queries, text.item, head, first, cells, kTall, layer.depth, layer.scale * kLog2E, queries);
        for (int64_t panel = 0; panel < text.panels; ++panel) {
            const float* right = text.keys + (head * text.panels + panel) * layer.depth * kWide;
            Vec tile[kTall][2];
            multiply(tile, panel + 1 == text.panels ? text.padding : kZeros, queries, layer.depth,
                     [=](int64_t k) { return right + k * kWide; });
            for (int64_t i = 0; i < kTall; ++i) {
                store(scores + i * columns + panel * kWide, tile[i][0]);
                store(scores + i * columns + panel * kWide + kLanes, tile[i][1]);
            }
        }
        for (int64_t i = 0; i < kTall; ++i)
            add_softmax(scores + i * columns, columns, 1.0f / static_cast<float>(layer.heads), sums + i * columns);
    }
    bool all_finite = true;
    for (int64_t row = 0; row < least<int64_t>(kTall, cells - first); ++row) {
        const float* from = sums + row * columns;
        for (int64_t word = 0; word < text.words.count; ++word) {
            const float* share = text.shares(word);
            const float value = total(
                text.words.tokens, [=](int64_t j) { return load(from + j) * load(share + j); },
                [=](int64_t j) { return from[j] * share[j]; });
            all_finite &= finite(value);
            to[word * cells + first + row] += value;
        }
    }
    return all_finite;
}

// The layers of one grid.
struct WordLevel {
    Grid grid;
    int64_t first, last;  // layers [first, last)
    float* sums;          // [words, n]
    Tap *down, *across;   // taps of the output's rows and columns
};

// Line `y` of a word, from all grids; returns the sum of its squares.
float upsample_line(const WordLevel* levels, int64_t count, int64_t word, int64_t y, int64_t width, float* to) {
    memset(to, 0, width * sizeof(float));
    for (const WordLevel* level = levels; level < levels + count; ++level) {
        const Tap& down = level->down[y];
        const float* map = level->sums + word * level->grid.cells();
        const float *low = map + down.low * level->grid.width, *high = map + down.high * level->grid.width;
        const float rest = 1.0f - down.weight;
        for (int64_t x = 0; x < width; ++x) {
            const Tap& across = level->across[x];
            to[x] += (1.0f - across.weight) * (rest * low[across.low] + down.weight * high[across.low]) +
                     across.weight * (rest * low[across.high] + down.weight * high[across.high]);
        }
    }
    return total(
        width, [=](int64_t x) { return load(to + x) * load(to + x); }, [=](int64_t x) { return to[x] * to[x]; });
}

int64_t aggregate_cross(const Layer* layers, int64_t count, int64_t batch, const Words& words, Grid size, float* out,
                        int threads) {
    int64_t cells = 0, packed = 0, scratch = 0;
    for (int64_t index = 0; index < count; ++index) {
        cells += layers[index].grid.cells();
        packed = most(packed, Text::packed_keys(layers[index], words));
        scratch = most(scratch, Text::scratch(layers[index], words));
    }
    Buffer<WordLevel> levels(count);
    Buffer<Tap> taps(count * (size.height + size.width));
    Buffer<float> sums(cells * words.count), keys(packed), memory(scratch * threads), squares(words.count * size.height);
    int64_t level_count = 0, used = 0;
    for (int64_t index = 0; index < count; ++index) {
        const Grid grid = layers[index].grid, previous = layers[most<int64_t>(index - 1, 0)].grid;
        if (index == 0 || grid.height != previous.height || grid.width != previous.width) {
            Tap* down = taps + level_count * (size.height + size.width);
            fill_taps(down, grid.height, size.height);
            fill_taps(down + size.height, grid.width, size.width);
            levels[level_count++] = {grid, index, index, sums + used, down, down + size.height};
            used += grid.cells() * words.count;
        }
        levels[level_count - 1].last = index + 1;
    }
    int64_t bad = kFinite;
    for (int64_t item = 0; item < batch; ++item) {
        memset(sums, 0, used * sizeof(float));
        for (const WordLevel* level = levels; level < levels + level_count; ++level) {
            for (int64_t index = level->first; index < level->last; ++index) {
                const Text text(layers[index], words, item, keys);
#pragma omp parallel num_threads(threads) if (threads > 1)
                {
#pragma omp for schedule(static)
                    for (int64_t panel = 0; panel < text.layer.heads * text.panels; ++panel) text.pack_panel(panel);
#pragma omp for schedule(dynamic, 4) reduction(min : bad)
                    for (int64_t first = 0; first < level->grid.cells(); first += kTall)
                        if (!attend(text, first, memory + thread_number() * scratch, level->sums))
                            bad = least(bad, text.layer.number);
                }
            }
        }
        float* maps = out + item * words.count * size.cells();
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
#pragma omp for schedule(static)
            for (int64_t line = 0; line < words.count * size.height; ++line)
                squares[line] = upsample_line(levels, level_count, line / size.height, line % size.height, size.width,
                                              maps + line * size.width);
#pragma omp for schedule(static)
            for (int64_t word = 0; word < words.count; ++word) {
                double square = 0;
                for (int64_t y = 0; y < size.height; ++y) square += squares[word * size.height + y];
                const float factor = 1.0f / most(static_cast<float>(sqrt(square)), kSmallestNorm);
                for (int64_t pixel = 0; pixel < size.cells(); ++pixel) maps[word * size.cells() + pixel] *= factor;
            }
        }
    }
    return bad;
}

// sums[mask, word] += each pixel of one line of labels; `line` holds the word's map between the cells of that line.
void add_line(const float* line, const Tap* across, const int32_t* labels, int64_t width, int64_t masks, int64_t words,
              double* sums) {
    for (int64_t x = 0; x < width;) {
        const int32_t mask = labels[x];
        double run = 0;
        for (; x < width && labels[x] == mask; ++x)
            run += (1.0f - across[x].weight) * line[across[x].low] + across[x].weight * line[across[x].high];
        if (mask >= 0 && mask < masks) sums[mask * words] += run;
    }
}

void score_masks(const float* maps, const int32_t* labels, int64_t batch, int64_t words, Grid grid, Grid size,
                 int64_t masks, float* out, int threads) {
    constexpr int64_t kMostBands = 64;
    Buffer<Tap> down(size.height), across(size.width);
    fill_taps(down, grid.height, size.height);
    fill_taps(across, grid.width, size.width);
    const int64_t rows = ceil_div(size.height, kMostBands), bands = ceil_div(size.height, rows);
    Buffer<double> sums(bands * masks * words);
    Buffer<int64_t> pixels(bands * masks);
    Buffer<float> lines(threads * grid.width);
    for (int64_t item = 0; item < batch; ++item) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
        for (int64_t band = 0; band < bands; ++band) {
            float* line = lines + thread_number() * grid.width;
            double* band_sums = sums + band * masks * words;
            int64_t* band_pixels = pixels + band * masks;
            memset(band_sums, 0, masks * words * sizeof(double));
            memset(band_pixels, 0, masks * sizeof(int64_t));
            for (int64_t y = band * rows; y < least(size.height, (band + 1) * rows); ++y) {
                const int32_t* row = labels + (item * size.height + y) * size.width;
                for (int64_t x = 0; x < size.width; ++x)
                    if (row[x] >= 0 && row[x] < masks) ++band_pixels[row[x]];
                const float rest = 1.0f - down[y].weight, weight = down[y].weight;
                for (int64_t word = 0; word < words; ++word) {
                    const float* map = maps + (item * words + word) * grid.cells();
                    const float *low = map + down[y].low * grid.width, *high = map + down[y].high * grid.width;
                    for (int64_t x = 0; x < grid.width; ++x) line[x] = rest * low[x] + weight * high[x];
                    add_line(line, across, row, size.width, masks, words, band_sums + word);
                }
            }
        }
        for (int64_t mask = 0; mask < masks; ++mask) {
            int64_t members = 0;
            for (int64_t band = 0; band < bands; ++band) members += pixels[band * masks + mask];
            for (int64_t word = 0; word < words; ++word) {
                double value = 0;
                for (int64_t band = 0; band < bands; ++band) value += sums[(band * masks + mask) * words + word];
                out[(item * masks + mask) * words + word] =
                    static_cast<float>(value / static_cast<double>(most<int64_t>(members, 1)));
            }
        }
    }
}

}  // namespace
}  // namespace diffseg::DIFFSEG_ISA
