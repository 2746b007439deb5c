// diffseg._cpu: the entry points, called by diffseg/native.py alone, which has checked what they point to.

#include <pybind11/pybind11.h>

#include "kernels.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "C++ kernels of diffseg for CPUs: raw pointers, sizes and a thread count.";
    module.def(
        "label",
        [](uintptr_t maps, uintptr_t counts, uintptr_t winner, int64_t batch, int64_t length, int64_t h, int64_t w,
           int64_t height, int64_t width, int threads) {
            diffseg::label(pointer<const float>(maps), pointer<const int32_t>(counts), pointer<int32_t>(winner), batch,
                           length, h, w, height, width, threads);
        },
        py::arg("maps"), py::arg("counts"), py::arg("winner"), py::arg("batch"), py::arg("length"), py::arg("h"),
        py::arg("w"), py::arg("height"), py::arg("width"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}
