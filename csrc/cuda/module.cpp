// The entry points of the CUDA kernels, called by diffseg/native.py alone, which has checked what they point to.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "device.h"
#include "kernels.h"

namespace py = pybind11;

namespace {

using namespace diffseg::cuda;
using Pair = std::array<int, 2>;

Type type_named(const std::string& name) {
    if (name == "float32") return Type::float32;
    if (name == "float16") return Type::float16;
    if (name == "bfloat16") return Type::bfloat16;
    throw py::value_error("dtype: expected float32, float16 or bfloat16, got " + name);
}

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Grid grid_of(Pair pair) { return {pair[0], pair[1]}; }

View make_view(uintptr_t data, std::array<int64_t, 3> strides) {
    return {pointer<const void>(data), strides[0], strides[1], strides[2]};
}

Layer make_layer(const View& queries, const View& keys, uintptr_t logsumexps, int heads, int depth, Pair grid,
                 float scale, float ratio) {
    return {queries, keys, pointer<const float>(logsumexps), heads, depth, grid_of(grid), scale, ratio};
}

MapLayer make_map_layer(const View& maps, int heads, Pair grid, float ratio) {
    return {maps, heads, grid_of(grid), ratio};
}

Attention make_attention(uintptr_t data, const std::string& dtype, Pair grid, int batch) {
    return {pointer<void>(data), type_named(dtype), grid_of(grid), batch};
}

MergeOptions make_merge_options(const std::vector<int>& anchors, const std::vector<float>& thresholds, bool exclusive) {
    if (anchors.empty() || anchors.size() > kMostAnchors)
        throw py::value_error("anchors: expected 1 to " + std::to_string(kMostAnchors) + ", got " +
                              std::to_string(anchors.size()));
    return {anchors, thresholds, exclusive};
}

Words make_words(uintptr_t shares, int count, int tokens) { return {pointer<const float>(shares), count, tokens}; }

// Where to run: a device and a stream of it.
struct Queue {
    int device;
    uintptr_t stream;
};

void run_aggregate(const std::vector<Layer>& layers, const std::string& dtype, const Attention& out,
                   uintptr_t workspace, const Queue& queue) {
    const DeviceGuard guard(queue.device);
    aggregate(layers, type_named(dtype), out, pointer<void>(workspace), {queue.stream});
}

void run_aggregate_maps(const std::vector<MapLayer>& layers, const std::string& dtype, const Attention& out,
                        uintptr_t workspace, const Queue& queue) {
    const DeviceGuard guard(queue.device);
    aggregate_maps(layers, type_named(dtype), out, pointer<void>(workspace), {queue.stream});
}

void run_merge(const View& attention, const std::string& dtype, int batch, int cells, const MergeOptions& options,
               uintptr_t maps, uintptr_t counts, uintptr_t workspace, const Queue& queue) {
    const DeviceGuard guard(queue.device);
    merge(attention, type_named(dtype), batch, cells, options, pointer<float>(maps), pointer<int32_t>(counts),
          pointer<void>(workspace), {queue.stream});
}

void run_label(const View& maps, uintptr_t counts, uintptr_t winner, int batch, Pair grid, Pair size,
               const Queue& queue) {
    const DeviceGuard guard(queue.device);
    label(maps, pointer<const int32_t>(counts), pointer<int32_t>(winner), batch, grid_of(grid), grid_of(size),
          {queue.stream});
}

void run_renumber(uintptr_t labels, uintptr_t present, uintptr_t segments, int batch, int pixels, int length,
                  const Queue& queue) {
    const DeviceGuard guard(queue.device);
    renumber(pointer<int32_t>(labels), pointer<int32_t>(present), pointer<int32_t>(segments), batch, pixels, length,
             {queue.stream});
}

void run_aggregate_cross(const std::vector<Layer>& layers, const std::string& dtype, const Words& words, int batch,
                         Pair size, uintptr_t maps, uintptr_t workspace, const Queue& queue) {
    const DeviceGuard guard(queue.device);
    aggregate_cross(layers, type_named(dtype), words, batch, grid_of(size), pointer<float>(maps),
                    pointer<void>(workspace), {queue.stream});
}

void run_score_masks(uintptr_t maps, uintptr_t labels, uintptr_t scores, int batch, int words, Pair grid, Pair size,
                     int masks, uintptr_t workspace, const Queue& queue) {
    const DeviceGuard guard(queue.device);
    score_masks(pointer<const float>(maps), pointer<const int32_t>(labels), pointer<float>(scores), batch, words,
                grid_of(grid), grid_of(size), masks, pointer<void>(workspace), {queue.stream});
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "CUDA kernels of diffseg: raw pointers, sizes and a stream.";
    module.attr("targets") = DIFFSEG_CUDA_TARGETS;
    module.def("driver_version", &driver_version, "CUDA version that the driver serves; 0 without a driver.");
    module.def("runtime_version", &runtime_version, "CUDA version with which the kernels were built.");
    module.def("shared_memory_of", &shared_memory_of, py::arg("device"),
               "Bytes of shared memory that a block of a device can have.");
    module.def("row_bytes", [](Pair grid) { return row_bytes(grid_of(grid)); }, py::arg("grid"),
               "Bytes of it that the sum of a grid's maps takes.");
    module.def("obstacle", &obstacle, py::arg("device"), "Why a device cannot run the kernels; empty where it can.");

    py::class_<View>(module, "View", py::module_local(),
                     "A tensor [batch, heads, rows, columns]; strides of the first three, in elements.")
        .def(py::init(&make_view), py::arg("data"), py::arg("strides"));
    py::class_<Layer>(module, "Layer", py::module_local())
        .def(py::init(&make_layer), py::kw_only(), py::arg("queries"), py::arg("keys"), py::arg("logsumexps"),
             py::arg("heads"), py::arg("depth"), py::arg("grid"), py::arg("scale"), py::arg("ratio"));
    py::class_<MapLayer>(module, "MapLayer", py::module_local())
        .def(py::init(&make_map_layer), py::kw_only(), py::arg("maps"), py::arg("heads"), py::arg("grid"),
             py::arg("ratio"));
    py::class_<Attention>(module, "Attention", py::module_local(), "A_f [batch, N, N], contiguous.")
        .def(py::init(&make_attention), py::kw_only(), py::arg("data"), py::arg("dtype"), py::arg("grid"),
             py::arg("batch"));
    py::class_<MergeOptions>(module, "MergeOptions", py::module_local())
        .def(py::init(&make_merge_options), py::kw_only(), py::arg("anchors"), py::arg("thresholds"),
             py::arg("exclusive"));
    py::class_<Words>(module, "Words", py::module_local(), "Shares of the tokens of a text [batch, count, tokens].")
        .def(py::init(&make_words), py::kw_only(), py::arg("shares"), py::arg("count"), py::arg("tokens"));
    py::class_<Queue>(module, "Queue", py::module_local())
        .def(py::init([](int device, uintptr_t stream) { return Queue{device, stream}; }), py::arg("device"),
             py::arg("stream"));

    module.def("aggregate_workspace", [](const std::vector<Layer>& layers, const std::string& dtype,
                                         const Attention& out) {
        return aggregate_workspace(layers, type_named(dtype), out);
    });
    module.def("aggregate_maps_workspace", &aggregate_maps_workspace);
    module.def("merge_workspace", &merge_workspace);
    module.def("aggregate_cross_workspace", [](const std::vector<Layer>& layers, const Words& words, int batch,
                                               Pair size) {
        return aggregate_cross_workspace(layers, words, batch, grid_of(size));
    });
    module.def("score_masks_workspace", [](int batch, int words, Pair size, int masks) {
        return score_masks_workspace(batch, words, grid_of(size), masks);
    });
    const py::call_guard<py::gil_scoped_release> release;
    module.def("aggregate", &run_aggregate, release);
    module.def("aggregate_maps", &run_aggregate_maps, release);
    module.def("merge", &run_merge, release);
    module.def("label", &run_label, release);
    module.def("renumber", &run_renumber, release);
    module.def("aggregate_cross", &run_aggregate_cross, release);
    module.def("score_masks", &run_score_masks, release);
}
