// out_i = sum over sources s of ratio_s m_si / mass(m_si), m_si = the sum over heads of row i, plus upsampled grids.
//
// mass is the sum of the row after bilinear upsampling: a dot product with column weights that are products of one
// weight a line and one a column of cells. A block takes a row: each row of each head is read once, in 16-byte accesses
// that do not depend on each other; the sum over heads and the total stay in shared memory. A sum without sources, which
// is the upsampled grids alone, needs none of it.
//
// Grid: (rows of all sums, batch). At SD 1.4 in float32 aggregate_maps reads 2.9 GB and writes 64 MB; a multiplication
// and two additions an element: bound by memory.

#include "rows.cuh"

#include <algorithm>

#include "launch.cuh"
#include "reductions.cuh"

namespace diffseg::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMostSources = 32;
constexpr int kMostSums = 16;
constexpr int kLongestVector = 8;  // elements of one 16-byte access

struct Segment {  // of the grid: one sum
    void* out;
    int first_block, first_source, end_source;
    int height, width;
    bool normalise;
};

struct Table {
    Segment segments[kMostSums];
    RowSource sources[kMostSources];
    int count;
    Output output;
};
static_assert(sizeof(Table) <= 4096, "every driver takes arguments of this size");

template <Type kType>
constexpr int kVector = kType == Type::float32 ? 4 : 8;

// Adds the elements of a row from `column` on: one 16-byte access where the row allows it.
template <Type kType>
DIFFSEG_DEVICE void add_elements(float (&sum)[kVector<kType>], const void* row, int column, int cells) {
    constexpr int size = kType == Type::float32 ? 4 : 2;
    const unsigned char* source = static_cast<const unsigned char*>(row) + static_cast<int64_t>(column) * size;
    uint4 words = {0, 0, 0, 0};
    if (reinterpret_cast<uintptr_t>(source) % 16 == 0 && column + kVector<kType> <= cells) {
        words = *reinterpret_cast<const uint4*>(source);
    } else if constexpr (kType == Type::float32) {
        const uint32_t* element = reinterpret_cast<const uint32_t*>(source);
        words.x = element[0];
        if (column + 1 < cells) words.y = element[1];
        if (column + 2 < cells) words.z = element[2];
        if (column + 3 < cells) words.w = element[3];
    } else {
        const uint16_t* element = reinterpret_cast<const uint16_t*>(source);
        const auto pair = [&](int first) {
            const uint32_t low = column + first < cells ? element[first] : 0;
            const uint32_t high = column + first + 1 < cells ? element[first + 1] : 0;
            return high << 16 | low;
        };
        words = {pair(0), pair(2), pair(4), pair(6)};
    }
    const uint32_t parts[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < kVector<kType>; ++i) {
        if constexpr (kType == Type::float32)
            sum[i] += from_bits(parts[i]);
        else if constexpr (kType == Type::float16)
            sum[i] += unpack_float16(static_cast<uint16_t>(parts[i / 2] >> (i % 2 * 16)));
        else
            sum[i] += from_bfloat16(static_cast<uint16_t>(parts[i / 2] >> (i % 2 * 16)));
    }
}

// Pieces of shared memory.
struct Shared {
    float *total, *line, *down, *across, *scratch;

    DIFFSEG_DEVICE Shared(int cells, int height, int width) {
        total = reinterpret_cast<float*>(shared_memory());
        line = total + round_up(cells, kLongestVector);
        down = line + round_up(cells, kLongestVector);
        across = down + height;
        scratch = across + width;
    }
    static size_t bytes(Grid grid) {
        return sizeof(float) * (2 * round_up(grid.cells(), kLongestVector) + grid.height + grid.width + kWarps);
    }
};

// Sums the heads of one row into `line`; returns this thread's part of its mass.
template <Type kType>
DIFFSEG_DEVICE float sum_heads(const RowSource& source, int batch, int row, const Segment& segment,
                               const Shared& shared) {
    constexpr int size = kType == Type::float32 ? 4 : 2;
    const int cells = segment.height * segment.width;
    const int64_t first = batch * source.maps.batch + row * source.maps.row;
    const unsigned char* rows = static_cast<const unsigned char*>(source.maps.data) + first * size;
    float mass = 0;
    for (int column = threadIdx.x * kVector<kType>; column < cells; column += kThreads * kVector<kType>) {
        float sum[kVector<kType>] = {};
#pragma unroll 4
        for (int head = 0; head < source.heads; ++head)
            add_elements<kType>(sum, rows + head * source.maps.head * size, column, cells);
        int y = column / segment.width, x = column % segment.width;
#pragma unroll
        for (int i = 0; i < kVector<kType>; ++i) {
            shared.line[column + i] = sum[i];
            if (segment.normalise && column + i < cells) mass = fmaf(sum[i], shared.down[y] * shared.across[x], mass);
            if (++x == segment.width) x = 0, ++y;
        }
    }
    return mass;
}

template <Type kType>
__global__ void __launch_bounds__(kThreads, 2) rows_kernel(const __grid_constant__ Table table) {
    int index = 0;
    while (index + 1 < table.count && static_cast<int>(blockIdx.x) >= table.segments[index + 1].first_block) ++index;
    const Segment& segment = table.segments[index];
    const int row = blockIdx.x - segment.first_block, batch = blockIdx.y;
    const int cells = segment.height * segment.width;
    const Shared shared(cells, segment.height, segment.width);
    if (segment.normalise) {
        for (int y = threadIdx.x; y < segment.height; y += kThreads)
            shared.down[y] = axis_weight(y, segment.height, table.output.height);
        for (int x = threadIdx.x; x < segment.width; x += kThreads)
            shared.across[x] = axis_weight(x, segment.width, table.output.width);
        sync_block();
    }
    const bool summed = segment.first_source < segment.end_source;
    constexpr int stride = kThreads * kVector<kType>;  // a thread keeps its columns throughout: no barrier
    for (int column = threadIdx.x * kVector<kType>; summed && column < cells; column += stride)
        for (int i = 0; i < kVector<kType>; ++i) shared.total[column + i] = 0;
    for (int s = segment.first_source; s < segment.end_source; ++s) {
        const RowSource& source = table.sources[s];
        float factor = sum_heads<kType>(source, batch, row, segment, shared);
        if (segment.normalise) {
            factor = block_sum<kWarps>(factor, shared.scratch);
            factor = source.ratio / (factor < kSmallestProbability ? kSmallestProbability : factor);
        } else {
            factor = source.ratio;
        }
        for (int column = threadIdx.x * kVector<kType>; column < cells; column += stride)
            for (int i = 0; i < kVector<kType>; ++i)
                shared.total[column + i] = fmaf(factor, shared.line[column + i], shared.total[column + i]);
    }
    for (int column = threadIdx.x * kVector<kType>; column < cells; column += stride) {
#pragma unroll
        for (int start = 0; start < kVector<kType>; start += kQuad) {
            Quad quad;
#pragma unroll
            for (int c = 0; c < kQuad; ++c) quad.value[c] = summed ? shared.total[column + start + c] : 0;
            for (int low = 0; low < table.output.count; ++low) {
                const Upsampler upsample(table.output, table.output.lows[low], batch, column + start);
                const Quad more = upsample(upsample.source(row));
#pragma unroll
                for (int c = 0; c < kQuad; ++c) quad.value[c] += more.value[c];
            }
            store(segment.out, table.output, batch, row, column + start, cells, quad);
        }
    }
}

// One launch's table, filled until it is full.
class Batch {
   public:
    explicit Batch(const Output& output) { table_.output = output, table_.count = 0; }

    bool fits(size_t sources) const { return table_.count < kMostSums && sources_ + sources <= kMostSources; }

    // The sources [first, end) of a sum.
    void add(const RowSum& sum, size_t first, size_t end) {
        const int start = static_cast<int>(sources_);
        const bool summed = first < end;
        for (size_t source = first; source < end; ++source) table_.sources[sources_++] = sum.sources[source];
        table_.segments[table_.count++] = {sum.out,         blocks_,        start,        static_cast<int>(sources_),
                                           sum.grid.height, sum.grid.width, sum.normalise && summed};
        blocks_ += sum.grid.cells();
        if (summed) shared_ = std::max(shared_, Shared::bytes(sum.grid));
    }

    void run(Type type, int batch, Stream stream) const {
        if (table_.count == 0) return;
        const auto kernel = type == Type::float32   ? rows_kernel<Type::float32>
                            : type == Type::float16 ? rows_kernel<Type::float16>
                                                    : rows_kernel<Type::bfloat16>;
        launch("rows_kernel", kernel, dim3(blocks_, batch), kThreads, shared_, stream, table_);
    }

   private:
    Table table_;
    size_t sources_ = 0, shared_ = 0;
    int blocks_ = 0;
};

// A sum of more sources than a table holds: in launches of its own, of which the later ones add to what is there.
void sum_many_rows(const RowSum& sum, Type type, Output output, int batch, Stream stream) {
    for (size_t first = 0; first < sum.sources.size(); first += kMostSources) {
        Batch part(output);
        part.add(sum, first, std::min(first + kMostSources, sum.sources.size()));
        part.run(type, batch, stream);
        output.accumulate = true;
        output.count = 0;
    }
}

}  // namespace

void sum_rows(const std::vector<RowSum>& sums, Type type, const Output& output, int batch, Stream stream) {
    Batch current(output);
    for (const RowSum& sum : sums) {
        if (sum.sources.size() > kMostSources) {
            sum_many_rows(sum, type, output, batch, stream);
            continue;
        }
        if (!current.fits(sum.sources.size())) {
            current.run(type, batch, stream);
            current = Batch(output);
        }
        current.add(sum, 0, sum.sources.size());
    }
    current.run(type, batch, stream);
}

namespace {

// The layers of each grid below the output's, and, last, those of the output's.
std::vector<RowSum> sums_of(const std::vector<MapLayer>& layers, const Attention& out, Workspace& workspace) {
    std::vector<RowSum> sums;
    RowSum last = {{}, out.grid, out.data, true};
    for (const MapLayer& layer : layers) {
        RowSum* sum = layer.grid == out.grid ? &last : nullptr;
        for (RowSum& known : sums)
            if (sum == nullptr && known.grid == layer.grid) sum = &known;
        if (sum == nullptr) {
            const size_t cells = layer.grid.cells();
            sums.push_back({{}, layer.grid, workspace.take<float>(out.batch * cells * cells), true});
            sum = &sums.back();
        }
        sum->sources.push_back({layer.maps, layer.heads, layer.ratio});
    }
    sums.push_back(last);
    return sums;
}

}  // namespace

size_t row_bytes(Grid grid) { return Shared::bytes(grid); }

size_t aggregate_maps_workspace(const std::vector<MapLayer>& layers, const Attention& out) {
    Workspace workspace(nullptr);
    sums_of(layers, out, workspace);
    return workspace.used();
}

void aggregate_maps(const std::vector<MapLayer>& layers, Type type, const Attention& out, void* memory,
                    Stream stream) {
    Workspace workspace(memory);
    std::vector<RowSum> sums = sums_of(layers, out, workspace);
    const RowSum last = sums.back();
    sums.pop_back();
    Output output = {};
    output.height = out.grid.height, output.width = out.grid.width;
    sum_rows(sums, type, output, out.batch, stream);
    add_lows(output, sums);
    output.bfloat16 = out.type == Type::bfloat16;
    sum_rows({last}, type, output, out.batch, stream);
}

}  // namespace diffseg::cuda
