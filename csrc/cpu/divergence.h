// Which maps are nearer to each other than a threshold, by symmetric KL divergence.
//
//   D(v, f) = 1/2 (H_v + H_f - p_v.l_f - l_v.p_f),   p = max(A, 1e-30), l = log(p N), H = p.l
//
// Bounds that decide most pairs at 1/8 of the work. Split p and l of a block of 4 x 4 cells into its mean and a rest,
// p = P/16 + r and l = L + s, P the block's sum, L its mean logarithm. The rests sum to zero in a block, so that
//   p_v.l_f = sum over blocks of P_v L_f + r_v.s_f,   |r_v.s_f| <= sum over blocks of |r_v| |s_f|   (Cauchy-Schwarz),
// which is D, exact but for a band: |D - 1/2 (H_v + H_f - P_v.L_f - L_v.P_f)| <= 1/2 (|r_v|.|s_f| + |s_v|.|r_f|), two
// pairs of products over N / 16 blocks. A pair whose band (and the margin of rounding) does not hold tau is decided.
// The band 1/2 (|r_v| |s_f| + |s_v| |r_f|) of the norms over all blocks is wider, but saves most pairs one of the two.
// A sample of rows says whether the bounds pay; on noise they do not, and are left out.
// Pairs left open are summed over chunks of the columns. Each chunk's part of D is >= 0, so that a pair whose sum has
// reached tau is dropped. Where the processor multiplies bfloat16, at twice the rate, p and l are rounded to it first,
// p = p' + dp and l = l' + dl. That changes D by up to
//   1/2 (|dp_v| |l_f| + |p'_v| |dl_f| + |dl_v| |p_f| + |l'_v| |dp_f|),
// another band; pairs whose band holds tau are left to sums in float.
//
// Work split: one task is a block of rows f against all maps of a set, in round 1 the anchors. A tile of kLefts x
// kRights pairs sums both products in vectors along the columns, so that rows and anchors are gathered by pointer and
// never repacked.
// Bytes: A_f is read once (4 N^2); the set's p and l, 8 P N, once a block of rows, from the last-level cache.
// Workspace: 8 P N for p and l (12 with bfloat16), and per 4 x 4 block and match a few MB.
#pragma once

#include <math.h>
#include <string.h>

#include "simd.h"

namespace diffseg::DIFFSEG_ISA {
namespace {

#if defined(__AVX512BF16__)
constexpr bool kHalves = true;
#else
constexpr bool kHalves = false;
#endif

constexpr float kMargin = 1e-4f;        // of rounding, on D
constexpr float kSquareMargin = 2e-6f;  // of rounding, on a block's sum of squares, relative
constexpr float kHalfMargin = 0.01f;    // of a bfloat16 band, relative: |p'| <= |p| (1 + 2^-8), and of rounding
constexpr int64_t kSide = 4;            // cells, of a block
constexpr int64_t kRowsOfTask = 48;
constexpr int64_t kSampledRows = 24;
constexpr float kWorthwhile = 0.25f;              // share of decided pairs from which the bounds pay
constexpr int32_t kLeastScreened = 32;            // open maps of a group from which bfloat16 pays
constexpr int64_t kChunk = kHalves ? 512 : 256;   // columns
constexpr int64_t kChunksToDrop = 1024 / kChunk;  // after which pairs are dropped

enum State : uint8_t { kFar, kNear, kOpen };

// Norms of a map's p and l, and of what rounding them to bfloat16 takes from them; or the squares of these norms.
struct Norms {
    float p, l, lost_p, lost_l;
    Norms roots() const { return {sqrtf(p), sqrtf(l), sqrtf(lost_p), sqrtf(lost_l)}; }
};

// Maps [*, N] of one image in any dtype.
struct Rows {
    View view;
    int64_t item, cells;
    const float* row(int64_t index, float* line) const { return part(index, 0, cells, line); }
    const float* part(int64_t index, int64_t first, int64_t length, float* line) const {
        return floats(view, item * view.batch + index * view.row + first, length, line);
    }
};

// p and l of `length` values, zeros up to a multiple of kLanes; returns p.l.
float terms(const float* from, int64_t length, int64_t cells, float* p, float* l) {
    const float factor = static_cast<float>(cells);
    Vec entropy = {};
    for (int64_t j = 0; j < length; j += kLanes) {
        float tail[kLanes] = {};
        const int64_t listed = length - j;
        if (listed < kLanes) memcpy(tail, from + j, listed * sizeof(float));
        const Vec probability = larger(splat(kSmallestProbability), load(listed < kLanes ? tail : from + j));
        const Vec logarithm = log(probability * factor);
        store(p + j, probability);
        store(l + j, logarithm);
        for (int64_t lane = listed; lane < kLanes; ++lane) p[j + lane] = l[j + lane] = 0.0f;
        entropy += load(p + j) * load(l + j);
    }
    return sum(entropy);
}

#if defined(__AVX512BF16__)
// to[j] = from[j], rounded; zeros up to a multiple of 2 * kLanes. Adds the squares of `from` and of what was lost.
void halve(const float* from, int64_t length, Bfloat16* to, float& squares, float& lost_squares) {
    Vec whole = {}, lost = {};
    for (int64_t j = 0; j < length; j += 2 * kLanes) {
        const Vec values[2] = {load(from + j), j + kLanes < length ? load(from + j + kLanes) : Vec{}};
        const __m512bh halves = _mm512_cvtne2ps_pbh(values[1], values[0]);
        memcpy(to + j, &halves, sizeof halves);
        for (int part = 0; part < 2; ++part) {
            const Vec rest = values[part] - lanes(to + j + part * kLanes);
            whole += values[part] * values[part];
            lost += rest * rest;
        }
    }
    squares += sum(whole);
    lost_squares += sum(lost);
}

void halve(const float* p, const float* l, int64_t length, Bfloat16* to, Norms& squares) {
    halve(p, length, to, squares.p, squares.lost_p);
    halve(l, length, to + kChunk, squares.l, squares.lost_l);
}

inline Vec add_products(Vec sums, Vec left, Vec right, Bfloat16) {
    return _mm512_dpbf16_ps(sums, (__m512bh)left, (__m512bh)right);
}
#endif

inline Vec add_products(Vec sums, Vec left, Vec right, float) { return sums + left * right; }

bool all_finite(const float* from, int64_t length) {
    return total(
               length, [=](int64_t j) { return load(from + j) - load(from + j); },
               [=](int64_t j) { return from[j] - from[j]; }) == 0;
}

// What the bounds need of a map: P, L, |r| and |s| of each block, [4, blocks], and |r| and |s| of all.
class Summaries {
public:
    explicit Summaries(Grid grid)
        : blocks(round_up(ceil_div(grid.height, kSide) * ceil_div(grid.width, kSide), kLanes)),
          grid_(grid),
          columns_(ceil_div(grid.width, kSide)) {}

    int64_t size() const { return 4 * blocks + kLanes; }
    int64_t scratch() const { return 2 * round_up(grid_.cells(), kLanes) + 4 * grid_.width; }

    // Returns the entropy H of the map.
    float summarise(const float* map, float* scratch, float* out) const {
        const int64_t cells = grid_.cells(), width = grid_.width;
        float *p = scratch, *l = p + round_up(cells, kLanes), *sums = l + round_up(cells, kLanes);
        const float entropy = terms(map, cells, cells, p, l);
        float* const norms = out + 4 * blocks;
        memset(out, 0, size() * sizeof(float));
        for (int64_t top = 0; top < grid_.height; top += kSide) {
            const int64_t bottom = least(top + kSide, grid_.height);
            memset(sums, 0, 4 * width * sizeof(float));
            for (int64_t y = top; y < bottom; ++y) add_line(p + y * width, l + y * width, width, sums);
            finish_line(sums, bottom - top, out);
            out += columns_;
        }
        norms[0] = norm(norms - 2 * blocks);
        norms[1] = norm(norms - blocks);
        return entropy;
    }

    const int64_t blocks;

private:
    // Adds p, l and their squares to the sums of their columns, [4, width].
    static void add_line(const float* p, const float* l, int64_t width, float* sums) {
        int64_t x = 0;
        for (; x + kLanes <= width; x += kLanes) {
            const Vec probability = load(p + x), logarithm = load(l + x);
            const Vec terms[4] = {probability, logarithm, probability * probability, logarithm * logarithm};
            for (int kind = 0; kind < 4; ++kind)
                store(sums + kind * width + x, load(sums + kind * width + x) + terms[kind]);
        }
        for (; x < width; ++x) {
            const float terms[4] = {p[x], l[x], p[x] * p[x], l[x] * l[x]};
            for (int kind = 0; kind < 4; ++kind) sums[kind * width + x] += terms[kind];
        }
    }

    // A line of blocks from the sums of their columns: whole blocks, then what is left at the right edge.
    void finish_line(const float* sums, int64_t height, float* out) const {
        const int64_t width = grid_.width, whole = width / kSide, rest = width % kSide;
        const float size = static_cast<float>(kSide * height);
        for (int kind = 0; kind < 4; ++kind) {
            const float* __restrict from = sums + kind * width;
            float* __restrict to = out + kind * blocks;
            for (int64_t block = 0; block < whole; ++block) {
                const float* columns = from + block * kSide;
                to[block] = columns[0] + columns[1] + (columns[2] + columns[3]);
            }
            if (rest == 0) continue;
            to[whole] = 0.0f;
            for (int64_t x = whole * kSide; x < width; ++x) to[whole] += from[x];
        }
        finish_blocks(out, whole, size);
        if (rest > 0) finish_blocks(out + whole, 1, static_cast<float>(rest * height));
    }

    // From sums of p, l, p^2 and l^2 over blocks of `size` cells to P, L, |r| and |s|.
    void finish_blocks(float* sums, int64_t count, float size) const {
        float *__restrict p = sums, *__restrict l = sums + blocks;
        float *__restrict r = sums + 2 * blocks, *__restrict s = sums + 3 * blocks;
        for (int64_t block = 0; block < count; ++block) {
            r[block] = deviation(r[block], p[block], size);
            s[block] = deviation(s[block], l[block], size);
            l[block] /= size;
        }
    }

    float norm(const float* from) const {
        Vec squares = {};
        for (int64_t block = 0; block < blocks; block += kLanes) squares += load(from + block) * load(from + block);
        return __builtin_sqrtf(sum(squares));
    }

    static float deviation(float squares, float sum, float size) {
        return __builtin_sqrtf(most(0.0f, squares - sum * sum / size) + kSquareMargin * squares);
    }

    const Grid grid_;
    const int64_t columns_;
};

// The maps that others are compared with: the anchors, later the list.
struct MapSet {
    MapSet(int64_t capacity, Grid grid)
        : cells(grid.cells()),
          chunks(ceil_div(cells, kChunk)),
          summaries(grid),
          fine_(capacity * chunks * 2 * kChunk),
          halves_(kHalves ? capacity * chunks * 2 * kChunk : 0),
          parts_(capacity * chunks),
          coarse_(capacity * summaries.size()),
          entropies(capacity),
          norms(kHalves ? capacity : 0) {}

    void fill(const Rows& rows, const int64_t* indices, int64_t count, int threads) {
        length = count;
        const int64_t scratch_size = summaries.scratch() + round_up(cells, kLanes);
        Buffer<float> scratch(scratch_size * threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
        for (int64_t v = 0; v < count; ++v) {
            float* line = scratch + thread_number() * scratch_size;
            float* work = line + round_up(cells, kLanes);
            const float* map = rows.row(indices == nullptr ? v : indices[v], line);
            entropies[v] = summaries.summarise(map, work, coarse_ + v * summaries.size());
            Norms squares = {};
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                const int64_t at = chunk * length + v;
                float *p = fine_ + at * 2 * kChunk, *l = p + kChunk;
                parts_[at] = terms(map + chunk * kChunk, columns(chunk), cells, p, l);
#if defined(__AVX512BF16__)
                halve(p, l, columns(chunk), halves_ + at * 2 * kChunk, squares);
#endif
            }
            if (kHalves) norms[v] = squares.roots();
        }
    }

    int64_t columns(int64_t chunk) const { return least(kChunk, cells - chunk * kChunk); }
    // p and l of a chunk, kChunk apart.
    template <class T>
    const T* fine(int64_t chunk, int64_t v) const {
        const int64_t offset = (chunk * length + v) * 2 * kChunk;
        if constexpr (sizeof(T) == sizeof(float))
            return fine_ + offset;
        else
            return halves_ + offset;
    }
    float part(int64_t chunk, int64_t v) const { return parts_[chunk * length + v]; }
    const float* coarse(int64_t v) const { return coarse_ + v * summaries.size(); }

    const int64_t cells, chunks;
    const Summaries summaries;
    int64_t length = 0;

private:
    Buffer<float> fine_;
    Buffer<Bfloat16> halves_;
    Buffer<float> parts_, coarse_;

public:
    Buffer<float> entropies;
    Buffer<Norms> norms;
};

// out[i][j] = left_i.x . right_j.y + left_i.y . right_j.x, where y lies `gap` behind x. Fetches what the next call reads
// on its right, `ahead`, into the first-level cache.
template <class T>
void cross_products(const T* const* lefts, const T* const* rights, const T* const* ahead, int64_t gap, int64_t length,
                    float (&out)[kLefts][kRights]) {
    Vec tile[kLefts][kRights] = {};
    for (int64_t k = 0; k < length; k += static_cast<int64_t>(sizeof(Vec) / sizeof(T))) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 4
            for (int j = 0; j < kRights; ++j) __builtin_prefetch(ahead[j] + k + half * gap);
            Vec right[kRights];
#pragma GCC unroll 4
            for (int j = 0; j < kRights; ++j) right[j] = load(rights[j] + k + (half == 0 ? 0 : gap));
#pragma GCC unroll 6
            for (int i = 0; i < kLefts; ++i) {
                const Vec left = load(lefts[i] + k + (half == 0 ? gap : 0));
#pragma GCC unroll 4
                for (int j = 0; j < kRights; ++j) tile[i][j] = add_products(tile[i][j], left, right[j], T{});
            }
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < kLefts; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kRights; ++j) out[i][j] = sum(tile[i][j]);
}

// A block of rows against a set: states and sums of D are [rows, set.length].
class Comparison {
public:
    static int64_t floats_needed(const MapSet& set) {
        return kRowsOfTask * (set.summaries.size() + set.length + 1) + set.summaries.scratch() +
               round_up(set.cells, kLanes) + kLefts * 3 * kChunk + 64;
    }
    static int64_t ints_needed(const MapSet& set) { return kRowsOfTask / kLefts * (set.length + 2); }

    Comparison(const Rows& rows, const MapSet& set, int64_t first, int64_t stride, int64_t count, float threshold,
               float* memory, int32_t* lists, uint8_t* states)
        : rows_(rows), set_(set), first_(first), stride_(stride), count_(count), threshold_(threshold),
          states_(states) {
        coarse_ = memory;
        sums_ = coarse_ + kRowsOfTask * set.summaries.size();
        entropies_ = sums_ + kRowsOfTask * set.length;
        line_ = entropies_ + kRowsOfTask;
        scratch_ = line_ + round_up(set.cells, kLanes);
        fine_ = scratch_ + set.summaries.scratch();
        halves_ = reinterpret_cast<Bfloat16*>(fine_ + kLefts * 2 * kChunk);
        lists_ = lists;
        lengths_ = lists + kRowsOfTask / kLefts * set.length;
        open_rows_ = lengths_ + kRowsOfTask / kLefts;
    }

    // Summarises the rows; false where one has NaN or infinity.
    bool summarise() {
        for (int64_t row = 0; row < count_; ++row) {
            const float* map = rows_.row(index(row), line_);
            if (!all_finite(map, set_.cells)) return false;
            entropies_[row] = set_.summaries.summarise(map, scratch_, coarse_ + row * set_.summaries.size());
        }
        return true;
    }

    bool all_rows_finite() {
        for (int64_t row = 0; row < count_; ++row)
            if (!all_finite(rows_.row(index(row), line_), set_.cells)) return false;
        return true;
    }

    void open_all() { memset(states_, kOpen, count_ * set_.length); }

    // Calls visit(row, v, estimate, band) for all pairs; needs summarise(). Where enough(estimate, band) holds for all
    // pairs of a tile with bands of the whole maps' norms, which are wider, those of the blocks are not computed.
    template <class Enough, class Visit>
    void visit_bounds(Enough enough, Visit visit) const {
        const int64_t blocks = set_.summaries.blocks;
        bool all = false;  // of the last tile: the next one's blocks are fetched accordingly
        constexpr int64_t kResident = 16 * kRights;  // maps of the set that stay in the second-level cache
        for (int64_t start = 0; start < set_.length; start += kResident)
            for (int64_t row = 0; row < count_; row += kLefts)
                for (int64_t v = start; v < least(start + kResident, set_.length); v += kRights) {
                    const float *lefts[2][kLefts], *rights[2][kRights], *ahead[kRights];
                    for (int i = 0; i < kLefts; ++i) {
                        lefts[0][i] = coarse_ + least(row + i, count_ - 1) * set_.summaries.size();
                        lefts[1][i] = lefts[0][i] + 2 * blocks;
                    }
                    for (int j = 0; j < kRights; ++j) {
                        rights[0][j] = set_.coarse(least(v + j, set_.length - 1));
                        rights[1][j] = rights[0][j] + 2 * blocks;
                        ahead[j] = set_.coarse(least(v + kRights + j, set_.length - 1));
                    }
                    float means[kLefts][kRights], rests[kLefts][kRights];
                    cross_products(lefts[0], rights[0], all ? ahead : rights[1], blocks, blocks, means);
                    all = true;
                    for (int i = 0; i < kLefts; ++i)
                        for (int j = 0; j < kRights; ++j) {
                            const float *left = lefts[1][i] + 2 * blocks, *right = rights[1][j] + 2 * blocks;
                            const int64_t at = least(row + i, count_ - 1), other = least(v + j, set_.length - 1);
                            means[i][j] = (entropies_[at] + set_.entropies[other] - means[i][j]) / 2;
                            rests[i][j] = (left[0] * right[1] + left[1] * right[0]) * (1.0f + kSquareMargin);
                            all &= enough(means[i][j], rests[i][j] / 2);
                        }
                    if (!all) cross_products(lefts[1], rights[1], ahead, blocks, blocks, rests);
                    for (int i = 0; i < kLefts && row + i < count_; ++i)
                        for (int j = 0; j < kRights && v + j < set_.length; ++j)
                            visit(row + i, v + j, means[i][j], rests[i][j] / 2);
                }
    }

    // States of all pairs by the bounds; returns how many are decided.
    int64_t decide() {
        int64_t decided = 0;
        const auto enough = [&](float estimate, float band) { return bounded(estimate, band) != kOpen; };
        visit_bounds(enough, [&](int64_t row, int64_t v, float estimate, float band) {
            const State state = bounded(estimate, band);
            states_[row * set_.length + v] = state;
            decided += state != kOpen;
        });
        return decided;
    }

    // Settles open pairs by sums over T, of groups open towards `least_open` maps or more; halves leave pairs open.
    // `value` is D, within `band`, of those that were not dropped.
    template <class T>
    void settle(int32_t least_open = 0) {
        memset(sums_, 0, count_ * set_.length * sizeof(float));
        for (Norms& squares : squares_) squares = {};
        for (int64_t group = 0; group * kLefts < count_; ++group) {
            list_open(group, set_.length, [](int64_t v) { return static_cast<int32_t>(v); });
            if (lengths_[group] < least_open) lengths_[group] = 0;
        }
        for (int64_t chunk = 0; chunk < set_.chunks; ++chunk)
            for (int64_t group = 0; group * kLefts < count_; ++group) {
                if (lengths_[group] == 0) continue;
                add_chunk<T>(group, chunk);
                if ((chunk + 1) % kChunksToDrop == 0) drop_far<T>(group);
            }
        for (int64_t group = 0; group * kLefts < count_; ++group) finish<T>(group);
    }

    float value(int64_t row, int64_t v) const { return sums_[row * set_.length + v]; }

    // How far sums over T of the columns so far may lie from D's.
    template <class T>
    float band(int64_t row, int64_t v) const {
        if constexpr (sizeof(T) == sizeof(float)) return 0;
        const Norms &left = norms_[row], &right = set_.norms[v];
        return (left.lost_p * right.l + left.p * right.lost_l + left.lost_l * right.p + left.l * right.lost_p) *
               (1.0f + kHalfMargin) / 2;
    }

private:
    int64_t index(int64_t row) const { return first_ + row * stride_; }
    int64_t rows_of(int64_t group) const { return least<int64_t>(kLefts, count_ - group * kLefts); }

    State bounded(float estimate, float band) const {
        if (estimate - band >= threshold_ + kMargin) return kFar;
        return estimate + band < threshold_ - kMargin ? kNear : kOpen;
    }

    // Lists those of `count` maps towards which the group is open, and which of its rows are, a bit each.
    template <class Map>
    void list_open(int64_t group, int64_t count, Map map) {
        int32_t *list = lists_ + group * set_.length, length = 0, rows = 0;
        for (int64_t entry = 0; entry < count; ++entry) {
            const int32_t v = map(entry);
            int32_t open = 0;
            for (int64_t i = 0; i < rows_of(group); ++i)
                open |= (states_[(group * kLefts + i) * set_.length + v] == kOpen) << i;
            if (open != 0) list[length++] = v;
            rows |= open;
        }
        lengths_[group] = length;
        open_rows_[group] = rows;
    }

    template <class T>
    void drop_far(int64_t group) {
        const int32_t* list = lists_ + group * set_.length;
        for (int64_t row = group * kLefts; row < group * kLefts + rows_of(group); ++row)
            for (int32_t entry = 0; entry < lengths_[group]; ++entry) {
                const int64_t v = list[entry];
                uint8_t& state = states_[row * set_.length + v];
                if (state != kOpen || value(row, v) < threshold_ + kMargin) continue;
                if (value(row, v) - band<T>(row, v) >= threshold_ + kMargin) state = kFar;
            }
        list_open(group, lengths_[group], [=](int64_t entry) { return list[entry]; });
    }

    template <class T>
    void finish(int64_t group) {
        for (int64_t row = group * kLefts; row < group * kLefts + rows_of(group); ++row)
            for (int32_t entry = 0; entry < lengths_[group]; ++entry) {
                const int64_t v = lists_[group * set_.length + entry];
                uint8_t& state = states_[row * set_.length + v];
                if (state != kOpen) continue;
                if constexpr (sizeof(T) == sizeof(float))
                    state = value(row, v) < threshold_ ? kNear : kFar;
                else
                    state = bounded(value(row, v), band<T>(row, v));
            }
    }

    // p and l of a chunk of a row as T, in the place of its number `i` in the group; returns p.l.
    float load_terms(int64_t row, int64_t i, int64_t chunk, const float** out) {
        const int64_t columns = set_.columns(chunk);
        float* to = fine_ + i * 2 * kChunk;
        *out = to;
        return terms(rows_.part(index(row), chunk * kChunk, columns, line_), columns, set_.cells, to, to + kChunk);
    }

#if defined(__AVX512BF16__)
    float load_terms(int64_t row, int64_t i, int64_t chunk, const Bfloat16** out) {
        const float* fine;
        const float part = load_terms(row, 0, chunk, &fine);
        Bfloat16* to = halves_ + i * 2 * kChunk;
        *out = to;
        halve(fine, fine + kChunk, set_.columns(chunk), to, squares_[row]);
        norms_[row] = squares_[row].roots();
        return part;
    }
#endif

    template <class T>
    void add_chunk(int64_t group, int64_t chunk) {
        const int32_t* list = lists_ + group * set_.length;
        const T* lefts[kLefts];
        float parts[kLefts];
        for (int64_t i = 0; i < kLefts; ++i)
            if (open_rows_[group] >> i & 1) parts[i] = load_terms(group * kLefts + i, i, chunk, &lefts[i]);
        const int64_t some = __builtin_ctz(open_rows_[group]);
        for (int64_t i = 0; i < kLefts; ++i)
            if (!(open_rows_[group] >> i & 1)) lefts[i] = lefts[some], parts[i] = parts[some];
        const int32_t length = lengths_[group];
        for (int32_t entry = 0; entry < length; entry += kRights) {
            const T *rights[kRights], *ahead[kRights];
            const int64_t width = least<int64_t>(kRights, length - entry);
            for (int j = 0; j < kRights; ++j) {
                rights[j] = set_.fine<T>(chunk, list[least(entry + j, length - 1)]);
                ahead[j] = set_.fine<T>(chunk, list[least(entry + kRights + j, length - 1)]);
            }
            float products[kLefts][kRights];
            cross_products(lefts, rights, ahead, kChunk, round_up(set_.columns(chunk), kLanes), products);
            for (int64_t i = 0; i < rows_of(group); ++i)
                for (int64_t j = 0; j < width; ++j) {
                    const int64_t v = list[entry + j];
                    sums_[(group * kLefts + i) * set_.length + v] +=
                        most(0.0f, (parts[i] + set_.part(chunk, v) - products[i][j]) / 2);
                }
        }
    }

    const Rows& rows_;
    const MapSet& set_;
    const int64_t first_, stride_, count_;
    const float threshold_;
    float *coarse_, *sums_, *entropies_, *line_, *scratch_, *fine_;
    Bfloat16* halves_;
    int32_t *lists_, *lengths_, *open_rows_;
    uint8_t* states_;
    Norms squares_[kRowsOfTask], norms_[kRowsOfTask];
};

// near[f, v] = kNear where D(v, f) < threshold, else kFar: [count, set.length]. False where a row is not finite.
bool compare(const Rows& rows, int64_t count, const MapSet& set, float threshold, uint8_t* near, int threads) {
    const int64_t size = Comparison::floats_needed(set), list_size = Comparison::ints_needed(set);
    Buffer<float> memory(size * threads);
    Buffer<int32_t> lists(list_size * threads);
    const int64_t sampled = least(kSampledRows, count);
    Comparison sample(rows, set, 0, count / sampled, sampled, threshold, memory, lists, near);
    if (!sample.summarise()) return false;
    const bool bounded = static_cast<float>(sample.decide()) >= kWorthwhile * static_cast<float>(sampled * set.length);
    bool finite = true;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic) reduction(&& : finite)
    for (int64_t first = 0; first < count; first += kRowsOfTask) {
        const int64_t thread = thread_number();
        Comparison comparison(rows, set, first, 1, least(kRowsOfTask, count - first), threshold, memory + thread * size,
                              lists + thread * list_size, near + first * set.length);
        if (bounded ? !comparison.summarise() : !comparison.all_rows_finite()) {
            finite = false;
            continue;
        }
        bounded ? static_cast<void>(comparison.decide()) : comparison.open_all();
#if defined(__AVX512BF16__)
        comparison.settle<Bfloat16>(kLeastScreened);
#endif
        comparison.settle<float>();
    }
    return finite;
}

void divergences(const float* maps, int64_t length, Grid grid, float* out) {
    const int64_t cells = grid.cells();
    const Rows rows = {{maps, Type::float32, 0, 0, cells, 1}, 0, cells};
    MapSet set(length, grid);
    set.fill(rows, nullptr, length, 1);
    Buffer<float> memory(Comparison::floats_needed(set));
    Buffer<int32_t> lists(Comparison::ints_needed(set));
    Buffer<uint8_t> states(kRowsOfTask * length);
    for (int64_t first = 0; first < length; first += kRowsOfTask) {
        const int64_t count = least(kRowsOfTask, length - first);
        Comparison comparison(rows, set, first, 1, count, INFINITY, memory, lists, states);
        comparison.summarise();
        float* to = out + first * length * 3;
        const auto never = [](float, float) { return false; };
        comparison.visit_bounds(never, [=](int64_t row, int64_t v, float estimate, float band) {
            to[(row * length + v) * 3] = estimate - band;
            to[(row * length + v) * 3 + 1] = estimate + band;
        });
#if defined(__AVX512BF16__)
        comparison.open_all();
        comparison.settle<Bfloat16>();
        for (int64_t row = 0; row < count; ++row)
            for (int64_t v = 0; v < length; ++v) {
                const float value = comparison.value(row, v), band = comparison.band<Bfloat16>(row, v);
                float* bounds = to + (row * length + v) * 3;
                bounds[0] = most(bounds[0], value - band);
                bounds[1] = least(bounds[1], value + band);
            }
#endif
        comparison.open_all();
        comparison.settle<float>();
        for (int64_t row = 0; row < count; ++row)
            for (int64_t v = 0; v < length; ++v) to[(row * length + v) * 3 + 2] = comparison.value(row, v);
    }
}

}  // namespace
}  // namespace diffseg::DIFFSEG_ISA
