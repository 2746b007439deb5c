// diffseg._cpu: the entry points, called by diffseg/native.py alone, which has checked what they point to.
//
// OpenMP's threads do not survive a fork, and libgomp waits for them forever: in a forked process these kernels run on
// one thread. Torch's own operators hang there until torch.set_num_threads(1) has been called, and with them the ops that
// call some: aggregate, aggregate_cross and segment.

#include <pthread.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace py = pybind11;

namespace {

using diffseg::Grid;
using diffseg::Kernels;
using diffseg::Layer;
using diffseg::Type;
using diffseg::View;
using Pair = std::array<int64_t, 2>;

constexpr const char* kInstructionSets[] = {"avx512bf16", "avx512", "avx2", "portable"};  // in order of preference

const Kernels* table;
std::string table_name;
bool forked = false;

std::vector<std::string> available() {
    std::vector<std::string> names;
    for (const char* name : kInstructionSets)
        if (diffseg::kernels(name) != nullptr) names.emplace_back(name);
    if (names[0] == "avx512bf16" && !diffseg::bfloat16_first()) std::swap(names[0], names[1]);
    return names;
}

void use(const std::string& name) {
    const Kernels* chosen = diffseg::kernels(name.c_str());
    if (chosen == nullptr) {
        std::string names;
        for (const std::string& each : available()) names += (names.empty() ? "" : ", ") + each;
        throw py::value_error("DIFFSEG_CPU_ISA: expected one of " + names + " on this machine, got '" + name + "'");
    }
    table = chosen;
    table_name = name;
}

int allowed(int threads) { return forked ? 1 : threads; }

Type type_named(const std::string& name) {
    if (name == "float32") return Type::float32;
    if (name == "bfloat16") return Type::bfloat16;
    if (name == "float16") return Type::float16;
    throw py::value_error("dtype: expected float32, bfloat16 or float16, got " + name);
}

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Grid grid_of(Pair pair) { return {pair[0], pair[1]}; }

View make_view(uintptr_t data, const std::string& dtype, const std::array<int64_t, 4>& strides) {
    return {pointer<const void>(data), type_named(dtype), strides[0], strides[1], strides[2], strides[3]};
}

Layer make_layer(const View& queries, const View& keys, uintptr_t logsumexps, int64_t heads, int64_t depth, Pair grid,
                 float scale, float ratio, int64_t number) {
    return {queries, keys, pointer<const float>(logsumexps), heads, depth, grid_of(grid), scale, ratio, number};
}

Layer make_map_layer(const View& maps, int64_t heads, Pair grid, float ratio, int64_t number) {
    return {maps, {}, nullptr, heads, 0, grid_of(grid), 0, ratio, number};
}

// The layer or image that has NaN or infinity, if there is one.
std::optional<int64_t> bad(int64_t found) { return found == diffseg::kFinite ? std::nullopt : std::optional(found); }

template <auto kKernel>  // &Kernels::aggregate, or &Kernels::aggregate_maps
std::optional<int64_t> aggregate(const std::vector<Layer>& layers, Pair grid, int64_t batch, uintptr_t out,
                                 int threads) {
    return bad((table->*kKernel)(layers.data(), static_cast<int64_t>(layers.size()), grid_of(grid), batch,
                                 pointer<float>(out), allowed(threads)));
}

std::optional<int64_t> merge(const View& attention, Pair grid, int64_t batch, const std::vector<int64_t>& anchors,
                             const std::vector<float>& thresholds, bool exclusive, uintptr_t maps, uintptr_t counts,
                             int threads) {
    const diffseg::MergeOptions options = {anchors.data(), static_cast<int64_t>(anchors.size()), thresholds.data(),
                                           static_cast<int64_t>(thresholds.size()), exclusive};
    return bad(table->merge(attention, grid_of(grid), batch, options, pointer<float>(maps),
                            pointer<int32_t>(counts), allowed(threads)));
}

void label(uintptr_t maps, uintptr_t counts, uintptr_t winner, int64_t batch, int64_t length, Pair grid, Pair size,
           int threads) {
    table->label(pointer<const float>(maps), pointer<const int32_t>(counts), pointer<int32_t>(winner), batch, length,
                 grid_of(grid), grid_of(size), allowed(threads));
}

void renumber(uintptr_t labels, uintptr_t segments, int64_t batch, int64_t pixels, int64_t length, int threads) {
    table->renumber(pointer<int32_t>(labels), pointer<int32_t>(segments), batch, pixels, length, allowed(threads));
}

std::optional<int64_t> aggregate_cross(const std::vector<Layer>& layers, int64_t batch, uintptr_t shares, int64_t words,
                                       int64_t tokens, Pair size, uintptr_t out, int threads) {
    return bad(table->aggregate_cross(layers.data(), static_cast<int64_t>(layers.size()), batch,
                                      {pointer<const float>(shares), words, tokens}, grid_of(size),
                                      pointer<float>(out), allowed(threads)));
}

void score_masks(uintptr_t maps, uintptr_t labels, uintptr_t out, int64_t batch, int64_t words, Pair grid, Pair size,
                 int64_t masks, int threads) {
    table->score_masks(pointer<const float>(maps), pointer<const int32_t>(labels), batch, words, grid_of(grid),
                       grid_of(size), masks, pointer<float>(out), allowed(threads));
}

void divergences(uintptr_t maps, int64_t length, Pair grid, uintptr_t out) {
    table->divergences(pointer<const float>(maps), length, grid_of(grid), pointer<float>(out));
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "C++ kernels of diffseg for CPUs: raw pointers, sizes and a thread count.";
    use(available().front());
    pthread_atfork(nullptr, nullptr, [] { forked = true; });

    module.def("available_isas", &available, "Instruction sets that this machine has, the preferred one first.");
    module.def("isa", [] { return table_name; }, "The instruction set in use.");
    module.def("use_isa", &use, py::arg("name"), "Forces an instruction set; ValueError where this machine lacks it.");

    py::class_<View>(module, "View", "A tensor [batch, heads, rows, columns]; strides count elements.")
        .def(py::init(&make_view), py::arg("data"), py::arg("dtype"), py::arg("strides"));
    py::class_<Layer>(module, "Layer")
        .def(py::init(&make_layer), py::kw_only(), py::arg("queries"), py::arg("keys"), py::arg("logsumexps"),
             py::arg("heads"), py::arg("depth"), py::arg("grid"), py::arg("scale"), py::arg("ratio"), py::arg("number"))
        .def(py::init(&make_map_layer), py::kw_only(), py::arg("maps"), py::arg("heads"), py::arg("grid"),
             py::arg("ratio"), py::arg("number"));

    const py::call_guard<py::gil_scoped_release> release;
    module.def("aggregate", &aggregate<&Kernels::aggregate>, release);
    module.def("aggregate_maps", &aggregate<&Kernels::aggregate_maps>, release);
    module.def("merge", &merge, release);
    module.def("label", &label, release);
    module.def("renumber", &renumber, release);
    module.def("aggregate_cross", &aggregate_cross, release);
    module.def("score_masks", &score_masks, release);
    module.def("divergences", &divergences, release);
    module.def("multiply_adds", [](int64_t rounds) { return table->multiply_adds(rounds); }, release);
    module.def("exponentials", [](int64_t rounds) { return table->exponentials(rounds); }, release);
}
