"""The CUDA backend where there is no GPU: what it says, and what the build decides."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import diffseg
from diffseg import backends, native

ROOT = Path(__file__).parent.parent


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A module as the build makes it, for CUDA 13.0, on a driver for 13.2."""
    module = SimpleNamespace(
        driver_version=lambda: 13020, runtime_version=lambda: 13000, targets="80;90+PTX",
        row_bytes=lambda grid: 8 * grid[0] * grid[1], shared_memory_of=lambda device: 99 << 10,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "diffseg._cuda", module)  # type: ignore[arg-type]
    monkeypatch.setattr(diffseg, "_cuda", module, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    native.cuda.cache_clear()
    yield module
    native.cuda.cache_clear()


def test_tensors_of_the_cpu_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"backend='cuda' cannot run aggregate_maps here: expected tensors on cuda, got cpu"
    ):
        diffseg.aggregate_maps([torch.rand(1, 4, 4)], backend="cuda")


def test_a_missing_build_says_how_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffseg._cuda", None)  # type: ignore[arg-type]
    monkeypatch.delattr(diffseg, "_cuda", raising=False)
    native.cuda.cache_clear()
    assert "DIFFSEG_CUDA=1 pip install ." in diffseg.explain_backends()["cuda"]


def test_an_old_driver_is_named(built: SimpleNamespace) -> None:
    assert backends.BACKENDS["cuda"].unavailable() is None
    native.cuda.cache_clear()
    built.driver_version = lambda: 12040
    assert "the driver serves CUDA 12.4, the kernels were built with CUDA 13.0" in diffseg.explain_backends()["cuda"]
    built.driver_version = lambda: 0
    assert "no NVIDIA driver is installed" in diffseg.explain_backends()["cuda"]


def test_a_gpu_without_code_is_named(built: SimpleNamespace) -> None:
    built.obstacle = lambda device: "no kernel image is available"
    with pytest.raises(
        ValueError, match=r"built for 80;90\+PTX, which cuda:1 cannot run: no kernel image is available"
    ):
        backends.BACKENDS["cuda"].can_run("label", torch.device("cuda:1"), torch.float32, raise_error=True)


def test_each_gpu_is_probed_once_and_as_the_current_one(
    built: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    current, probed = [0], []

    @contextmanager
    def device(index: int) -> Iterator[None]:
        before, current[0] = current[0], index
        yield
        current[0] = before

    def obstacle(index: int) -> str:
        assert current[0] == index
        probed.append(index)
        return "no kernel image is available" if index == 1 else ""

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    built.obstacle = obstacle
    kernels = native.cuda()
    for _ in range(2):
        assert kernels.obstacle(torch.device("cuda")) is None
        assert kernels.obstacle(torch.device("cuda:0")) is None
    assert current == [0]
    current[0] = 1  # "cuda" is another device now
    assert "which cuda:1 cannot run" in kernels.obstacle(torch.device("cuda"))
    assert "which cuda:1 cannot run" in kernels.obstacle(torch.device("cuda:1"))
    assert probed == [0, 1]


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({"anchors": 1025}, r"expected at most 1024 anchors \(32 a side\), got 1025"),
        ({"storage": torch.float64}, r"got dtype=torch\.float64"),
        ({"lower_grids": [(1, side) for side in range(17)]}, "expected at most 16 grids below the output's, got 17"),
        (
            {"summed_grids": [(3, 3), (128, 128), (64, 64)]},
            r"a row of maps on a grid of \(128, 128\) takes 131072 bytes of shared memory, of which a block has 101376",
        ),
        ({"images": 65536}, "expected at most 65535 images, times layers where these are summed, got 65536"),
    ],
)
def test_what_is_beyond_the_kernels_is_refused(built: SimpleNamespace, request_: dict[str, Any], expected: str) -> None:
    built.obstacle = lambda device: ""
    with pytest.raises(ValueError, match=expected):
        backends.BACKENDS["cuda"].can_run("merge", torch.device("cuda:0"), torch.float32, raise_error=True, **request_)


def test_ops_say_how_much_they_are_asked_for(layers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any backend begins: what is beyond a GPU's kernels would else fail in the middle."""
    asked = {}
    implementation = backends.implementation

    def noting(backend: str, op: str, *rest: Any, **request: Any) -> Any:
        asked[op] = request
        return implementation(backend, op, *rest, **request)

    monkeypatch.setattr(backends, "implementation", noting)
    scene = layers([(4, 4), (2, 2), (2, 2), (4, 4)], batch=3)
    diffseg.segment(scene.queries, scene.keys, (8, 8), weights=[1, 1, 1, 0], anchors=2)
    diffseg.aggregate_maps(scene.maps(), weights=[1, 1, 1, 0])
    maps = diffseg.aggregate_cross(scene.queries, scene.keys[1:2] * 4, tokens=[[0]])
    diffseg.score_masks(maps, torch.zeros(3, 8, 8, dtype=torch.int32))
    assert {op: request.pop("images") for op, request in asked.items()} == dict.fromkeys(backends.OPS, 3) | {
        "aggregate": 9
    }
    assert asked["aggregate"]["summed_grids"] == [(2, 2)]
    assert asked["aggregate_maps"]["summed_grids"] == [(4, 4), (2, 2), (2, 2)]
    assert asked["aggregate"]["lower_grids"] == asked["aggregate_maps"]["lower_grids"] == [(2, 2)]


@pytest.mark.parametrize("name", backends.BACKENDS)
def test_every_backend_has_every_op(name: str) -> None:
    assert set(backends.BACKENDS[name].dtypes) == set(backends.OPS)


def test_what_it_says_it_runs_is_there(built: SimpleNamespace) -> None:
    built.obstacle = lambda device: ""
    most = {"anchors": 1024, "lower_grids": [(1, side) for side in range(16)], "tokens": 1000}
    for op, dtypes in backends.BACKENDS["cuda"].dtypes.items():
        assert callable(getattr(native.cuda(), op))
        for dtype in dtypes:
            assert backends.BACKENDS["cuda"].can_run(op, torch.device("cuda:0"), dtype, raise_error=True, **most)


def test_it_is_chosen_by_name_only() -> None:
    assert not backends.BACKENDS["cuda"].automatic
    assert list(backends.BACKENDS) == ["cpu", "cuda", "triton", "reference"]


@pytest.mark.skipif(
    importlib.util.find_spec("diffseg._cuda") is None, reason="diffseg._cuda is not built: DIFFSEG_CUDA=1 pip install ."
)
def test_the_build_imports_without_a_gpu() -> None:
    """And without a driver: a failed launch is an exception that names what failed."""
    code = (
        "from diffseg import _cuda\n"
        "assert _cuda.runtime_version() >= 11000\n"
        "if _cuda.driver_version() == 0:\n"
        "    try: _cuda.label(_cuda.View(0, (0, 0, 0)), 0, 0, 1, (1, 1), (1, 1), _cuda.Queue(0, 0))\n"
        "    except RuntimeError as error: print(error)\n"
        "    else: raise SystemExit('nothing was said')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


class TestBuild:
    @pytest.fixture
    def setup(self, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        """setup.py with nvcc and a GPU of capability 9.0 there, without building."""
        setuptools = pytest.importorskip("setuptools")
        monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
        monkeypatch.chdir(ROOT)
        for name in ("DIFFSEG_CUDA", "DIFFSEG_CUDA_ARCHS"):
            monkeypatch.delenv(name, raising=False)
        spec = importlib.util.spec_from_file_location("diffseg_setup", ROOT / "setup.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(module, "find_nvcc", lambda: "nvcc")
        monkeypatch.setattr(module, "toolkit_of", lambda nvcc: Path("/toolkit"))
        monkeypatch.setattr(module, "visible_capabilities", lambda: ["90"])
        known = SimpleNamespace(stdout="sm_80\nsm_90\n")
        monkeypatch.setattr(module.subprocess, "run", lambda *command, **options: known)
        return module

    def codes(self, setup: ModuleType) -> list[str]:
        """What nvcc is asked to generate."""
        extensions = setup.cuda_extensions()
        return [flag for each in extensions for flag in each.nvcc_flags if flag.startswith("-gencode")]

    def test_where_a_gpu_is_visible_it_is_built_for_it(
        self, setup: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.codes(setup) == ["-gencode=arch=compute_90,code=[sm_90]"]
        monkeypatch.setattr(setup, "visible_capabilities", lambda: ["75", "80", "130"])  # too old, known, unknown
        assert self.codes(setup) == [
            "-gencode=arch=compute_80,code=[sm_80]", "-gencode=arch=compute_90,code=[sm_90,compute_90]",
        ]  # fmt: skip

    @pytest.mark.parametrize("missing", ["gpu", "nvcc"])
    def test_elsewhere_it_is_left_out(self, setup: ModuleType, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
        if missing == "gpu":
            monkeypatch.setattr(setup, "visible_capabilities", lambda: [])
        else:
            monkeypatch.setattr(setup, "find_nvcc", lambda: None)
        assert setup.cuda_extensions() == []

    def test_asked_for_it_is_built_wherever_nvcc_is(self, setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(setup, "visible_capabilities", lambda: [])
        monkeypatch.setenv("DIFFSEG_CUDA", "1")
        assert self.codes(setup) == [
            "-gencode=arch=compute_80,code=[sm_80]", "-gencode=arch=compute_90,code=[sm_90,compute_90]",
        ]  # fmt: skip
        monkeypatch.setattr(setup, "find_nvcc", lambda: None)
        with pytest.raises(SystemExit, match="nvcc is neither on PATH nor below CUDA_HOME"):
            setup.cuda_extensions()

    def test_refused_it_is_not(self, setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DIFFSEG_CUDA", "0")
        assert setup.cuda_extensions() == []
        monkeypatch.setenv("DIFFSEG_CUDA", "yes")
        with pytest.raises(SystemExit, match="DIFFSEG_CUDA: expected 0, 1 or nothing, got 'yes'"):
            setup.cuda_extensions()

    def test_the_targets_can_be_chosen(self, setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DIFFSEG_CUDA_ARCHS", "90a;120+PTX")
        assert self.codes(setup) == [
            "-gencode=arch=compute_90a,code=[sm_90a]", "-gencode=arch=compute_120,code=[sm_120,compute_120]",
        ]  # fmt: skip
