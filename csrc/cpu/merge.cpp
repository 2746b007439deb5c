// merge: proposals by symmetric KL divergence D (divergence.h).
//
//   round 1:       proposal v = mean of the maps f with D(v, f) < tau_1
//   later rounds:  the same D within the list, a greedy walk over the matches, and the mean of each group
//
// Mean of round 1: one task is a strip of kWide columns, packed (4 N kWide bytes, second-level cache). kTall proposals
// at a time are a product of 0/1 weights and rows; rows that belong to the same of these proposals are summed once,
// before it. Each proposal's sum runs over the rows in an order that depends on the matches alone, not on threads.
// Bytes: A_f is read a second time (4 N^2).
// Workspace: 4 P N for a second list, and per match and strip a few MB.

#include <string.h>

#include "divergence.h"

namespace diffseg::DIFFSEG_ISA {
namespace {

// The rows of each group of kTall proposals, ordered by which of them they belong to ("pattern", a bit each).
class Membership {
public:
    Membership(const uint8_t* near, int64_t rows, int64_t length, int threads)
        : rows_(rows),
          groups(ceil_div(length, kTall)),
          order_(groups * rows),
          starts_(groups * (rows + 1)),
          distinct_(groups),
          weights_(groups * rows * kTall),
          counts_(groups * kTall) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
        for (int64_t group = 0; group < groups; ++group)
            sort(near + group * kTall, length, least<int64_t>(kTall, length - group * kTall), group);
    }

    int64_t distinct(int64_t group) const { return distinct_[group]; }
    const int32_t* order(int64_t group) const { return order_ + group * rows_; }
    const int32_t* starts(int64_t group) const { return starts_ + group * (rows_ + 1); }
    const float* weights(int64_t group) const { return weights_ + group * rows_ * kTall; }
    int32_t count(int64_t v) const { return counts_[v]; }

private:
    static int pattern(const uint8_t* near, int64_t width) {
        int bits = 0;
        for (int64_t i = 0; i < width; ++i) bits |= (near[i] == kNear) << i;
        return bits;
    }

    // Counting sort; rows of no proposal are left out.
    void sort(const uint8_t* near, int64_t stride, int64_t width, int64_t group) {
        constexpr int kPatterns = 1 << kTall;
        int32_t place[kPatterns] = {};
        for (int64_t row = 0; row < rows_; ++row) ++place[pattern(near + row * stride, width)];
        int32_t *starts = starts_ + group * (rows_ + 1), *counts = counts_ + group * kTall;
        float* weights = weights_ + group * rows_ * kTall;
        int32_t distinct = 0, at = 0;
        for (int i = 0; i < kTall; ++i) counts[i] = 0;
        place[0] = 0;
        for (int bits = 1; bits < kPatterns; ++bits) {
            const int32_t size = place[bits];
            place[bits] = at;
            if (size == 0) continue;
            starts[distinct] = at;
            for (int i = 0; i < kTall; ++i) {
                weights[distinct * kTall + i] = static_cast<float>(bits >> i & 1);
                counts[i] += (bits >> i & 1) * size;
            }
            ++distinct;
            at += size;
        }
        starts[distinct] = at;
        distinct_[group] = distinct;
        int32_t* order = order_ + group * rows_;
        for (int64_t row = 0; row < rows_; ++row)
            if (const int bits = pattern(near + row * stride, width)) order[place[bits]++] = static_cast<int32_t>(row);
    }

    const int64_t rows_;

public:
    const int64_t groups;

private:
    Buffer<int32_t> order_, starts_, distinct_;
    Buffer<float> weights_;
    Buffer<int32_t> counts_;
};

// Columns [first, first + kWide) of all rows, zeros past the last column.
void pack_strip(const Rows& rows, int64_t count, int64_t first, float* strip) {
    const int64_t width = least<int64_t>(kWide, rows.cells - first);
    for (int64_t row = 0; row < count; ++row) {
        float* to = strip + row * kWide;
        const float* from = rows.part(row, first, width, to);
        if (from != to) memcpy(to, from, width * sizeof(float));
        for (int64_t j = width; j < kWide; ++j) to[j] = 0.0f;
    }
}

// Each pattern's row, or the sum of its rows, as pointers.
void sum_patterns(const float* strip, const int32_t* order, const int32_t* starts, int64_t distinct, float* sums,
                  const float** patterns) {
    for (int64_t k = 0; k < distinct; ++k) {
        const float* row = strip + order[starts[k]] * kWide;
        patterns[k] = row;
        if (starts[k + 1] - starts[k] == 1) continue;
        Vec first = load(row), second = load(row + kLanes);
        for (int32_t at = starts[k] + 1; at < starts[k + 1]; ++at) {
            row = strip + order[at] * kWide;
            first += load(row);
            second += load(row + kLanes);
        }
        store(sums, first);
        store(sums + kLanes, second);
        patterns[k] = sums;
        sums += kWide;
    }
}

// to[v] = mean of the rows near v: [length, N]
void average(const Rows& rows, const uint8_t* near, int64_t count, int64_t length, float* to, int threads) {
    const Membership members(near, count, length, threads);
    const int64_t cells = rows.cells, strip_size = count * kWide, sums_size = (count / 2 + 1) * kWide;
    Buffer<float> strips(strip_size * threads), sums(sums_size * threads);
    Buffer<const float*> patterns(count * threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
    for (int64_t first = 0; first < cells; first += kWide) {
        const int64_t thread = thread_number(), width = least<int64_t>(kWide, cells - first);
        float* strip = strips + thread * strip_size;
        const float** right = patterns + thread * count;
        pack_strip(rows, count, first, strip);
        for (int64_t group = 0; group < members.groups; ++group) {
            const int64_t distinct = members.distinct(group);
            sum_patterns(strip, members.order(group), members.starts(group), distinct, sums + thread * sums_size,
                         right);
            Vec tile[kTall][2];
            multiply(tile, kZeros, members.weights(group), distinct, [=](int64_t k) { return right[k]; });
            for (int64_t i = 0; i < least<int64_t>(kTall, length - group * kTall); ++i) {
                const int64_t v = group * kTall + i;
                float line[kWide];
                const Vec size = splat(static_cast<float>(members.count(v)));
                store(line, tile[i][0] / size);
                store(line + kLanes, tile[i][1] / size);
                memcpy(to + v * cells + first, line, width * sizeof(float));
            }
        }
    }
}

// The greedy walk; returns the number of groups. Group g holds members[starts[g]] to members[starts[g + 1] - 1].
int64_t walk(const uint8_t* near, int64_t length, bool exclusive, uint8_t* taken, int32_t* members, int64_t* starts) {
    int64_t groups = 0, at = 0;
    memset(taken, 0, length);
    for (int64_t head = 0; head < length; ++head) {
        if (taken[head]) continue;
        starts[groups++] = at;
        for (int64_t v = 0; v < length; ++v) {
            if (near[head * length + v] != kNear) continue;
            if (!exclusive || !taken[v]) members[at++] = static_cast<int32_t>(v);
            taken[v] = 1;
        }
    }
    starts[groups] = at;
    return groups;
}

// to[g] = mean of the maps in group g.
void average_groups(const float* maps, int64_t cells, const int32_t* members, const int64_t* starts, int64_t groups,
                    float* to, int threads) {
    constexpr int64_t kPart = 1024;
    const int64_t parts = ceil_div(cells, kPart);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
    for (int64_t task = 0; task < groups * parts; ++task) {
        const int64_t group = task / parts, first = task % parts * kPart, width = least(kPart, cells - first);
        float* line = to + group * cells + first;
        memset(line, 0, width * sizeof(float));
        for (int64_t at = starts[group]; at < starts[group + 1]; ++at) {
            const float* map = maps + members[at] * cells + first;
            for (int64_t j = 0; j < width; ++j) line[j] += map[j];
        }
        const float size = static_cast<float>(starts[group + 1] - starts[group]);
        for (int64_t j = 0; j < width; ++j) line[j] /= size;
    }
}

// One of the rounds 2..N: maps [length, N] -> to; returns the new length.
int64_t later_round(const float* maps, int64_t length, MapSet& set, float threshold, bool exclusive, uint8_t* near,
                    float* to, int threads) {
    const int64_t cells = set.cells;
    const Rows rows = {{maps, Type::float32, 0, 0, cells, 1}, 0, cells};
    set.fill(rows, nullptr, length, threads);
    compare(rows, length, set, threshold, near, threads);
    for (int64_t v = 0; v < length; ++v) near[v * length + v] = kNear;
    Buffer<int32_t> members(length * length);
    Buffer<int64_t> starts(length + 1);
    Buffer<uint8_t> taken(length);
    const int64_t groups = walk(near, length, exclusive, taken, members, starts);
    average_groups(maps, cells, members, starts, groups, to, threads);
    return groups;
}

int64_t merge(const View& attention, Grid grid, int64_t batch, const MergeOptions& options, float* maps,
              int32_t* counts, int threads) {
    const int64_t cells = grid.cells(), length = options.length;
    MapSet set(length, grid);
    Buffer<uint8_t> near(most(cells, length) * length);
    Buffer<float> other(options.rounds > 1 ? length * cells : 0);
    for (int64_t item = 0; item < batch; ++item) {
        const Rows rows = {attention, item, cells};
        float *list = maps + item * length * cells, *spare = other;
        set.fill(rows, options.anchors, length, threads);
        if (!compare(rows, cells, set, options.thresholds[0], near, threads)) return item;
        for (int64_t v = 0; v < length; ++v) near[options.anchors[v] * length + v] = kNear;
        average(rows, near, cells, length, list, threads);
        int64_t count = length;
        for (int64_t round = 1; round < options.rounds; ++round) {
            count = later_round(list, count, set, options.thresholds[round], options.exclusive, near, spare, threads);
            float* swapped = list;
            list = spare;
            spare = swapped;
        }
        float* result = maps + item * length * cells;
        if (list != result) memcpy(result, list, count * cells * sizeof(float));
        memset(result + count * cells, 0, (length - count) * cells * sizeof(float));
        counts[item] = static_cast<int32_t>(count);
    }
    return kFinite;
}

}  // namespace
}  // namespace diffseg::DIFFSEG_ISA
