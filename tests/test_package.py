"""The installed package: what an import costs and pulls in, and the names that users rely on."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import diffseg

ROOT = Path(__file__).parent.parent
SIGNATURES = {
    "aggregate": "queries keys *grids=None scales=None logsumexps=None weights='proportional' dtype=torch.float32 "
    "backend='auto' out=None grid=None",
    "aggregate_maps": "maps *grids=None weights='proportional' dtype=torch.float32 backend='auto' out=None grid=None",
    "merge": "attention *grid=None anchors=16 iterations=3 threshold=1.0 rule='paper' backend='auto'",
    "refine": "attention proposals *max_iterations=300",
    "label": "proposals size *backend='auto'",
    "segment": "queries keys size *grids=None scales=None logsumexps=None weights='proportional' anchors=16 "
    "iterations=3 threshold=1.0 rule='paper' refine=False backend='auto' grid=None",
}


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_pulls_in_nothing_heavy() -> None:
    code = "import sys, diffseg; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = run(code)
    assert "'torch'" in loaded
    for heavy in ("diffusers", "transformers", "triton", "sklearn", "scipy", "PIL", "accelerate"):
        assert f"'{heavy}'" not in loaded


def test_the_pipeline_asks_for_no_torchvision() -> None:
    """transformers warns of image processors without it, which diffusers' own pipelines import."""
    command = [sys.executable, "-c", "import diffseg.pipeline"]
    assert "torchvision" not in subprocess.run(command, capture_output=True, text=True, check=True).stderr


def test_import_costs_little_beyond_torch() -> None:
    code = "import time, torch; start = time.process_time(); import diffseg; print(time.process_time() - start)"
    assert min(float(run(code)) for _ in range(2)) < 0.25


@pytest.mark.parametrize("name", diffseg.__all__)
def test_public_names(name: str) -> None:
    assert getattr(diffseg, name) is not None
    assert name in dir(diffseg)


def test_names_of_the_interface() -> None:
    names = (
        "aggregate aggregate_maps merge refine label segment record_attention DiffSegPipeline DiffSegOutput Proposals "
        "available_backends explain_backends compat AttentionRecord warmup aggregate_cross score_masks"
    )
    assert set(diffseg.__all__) == set(names.split())
    assert diffseg.Proposals._fields == ("maps", "counts", "grid")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        diffseg.nonsense  # noqa: B018


def test_names_behind_the_lazy_modules() -> None:
    assert callable(diffseg.DiffSegPipeline.from_pretrained)
    assert list(inspect.signature(diffseg.compat.DiffSeg).parameters)[:3] == ["kl_threshold", "refine", "num_points"]
    segment = list(inspect.signature(diffseg.compat.DiffSeg.segment).parameters)
    assert segment == ["self", "weight_64", "weight_32", "weight_16", "weight_8", "weight_ratio"]
    assert list(inspect.signature(diffseg.record_attention).parameters) == ["unet", "cross"]
    for name in ("queries", "keys", "grids", "scales", "logsumexps", "names"):
        assert hasattr(diffseg.AttentionRecord, name)


@pytest.mark.parametrize("op", SIGNATURES)
def test_signatures(op: str) -> None:
    words = []
    for parameter in inspect.signature(getattr(diffseg, op)).parameters.values():
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        words.append(parameter.name + default)
        if parameter.kind is parameter.KEYWORD_ONLY and not any(word.startswith("*") for word in words):
            words[-1] = "*" + words[-1]
    assert " ".join(words) == SIGNATURES[op]


def test_kernels_are_a_subpackage() -> None:
    assert importlib.import_module("diffseg.kernels").__name__ == "diffseg.kernels"


def test_a_source_distribution_has_what_builds_and_tests_it(tmp_path: Path) -> None:
    """Also where no nvcc is at hand, and so no CUDA extension that names its files."""
    pytest.importorskip("pybind11")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"DIFFSEG_CUDA": "0"}, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        listed = {name.partition("/")[2] for name in opened.getnames()}
    folders = ("benchmarks", "csrc", "diffseg", "kernels", "tests")
    suffixes = (".cpp", ".cu", ".cuh", ".h", ".npz", ".py", ".safetensors")
    present = {path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes}
    assert len(present) > 100
    needed = {path.relative_to(ROOT).as_posix() for path in present} | {"LICENSE", "Makefile", "pyproject.toml"}
    assert not needed - listed


def test_version() -> None:
    assert diffseg.__version__ == importlib.metadata.version("diffseg")


def test_backends_are_listed_in_order_of_preference() -> None:
    names = diffseg.available_backends("cpu")
    assert names[0] == "cpu"
    assert "reference" in names
    assert diffseg.available_backends(torch.device("meta")) == ["reference"]
    explained = diffseg.explain_backends()
    assert set(names) <= set(explained)
    assert (
        "aggregate, aggregate_maps, merge, label, renumber, aggregate_cross, score_masks on any"
        in explained["reference"]
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_openmp_runtime_in_the_process() -> None:
    code = """
import re, torch, diffseg
proposals = diffseg.Proposals(torch.rand(1, 3, 16), torch.tensor([3], dtype=torch.int32), (4, 4))
diffseg.label(proposals, (64, 64), backend="cpu")
print(*sorted(set(re.findall(r"/\\S*/lib[gi]?omp5?[-.]\\S*", open("/proc/self/maps").read()))))
"""
    assert len(run(code).split()) == 1


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.int32, 2**31 - 1), (torch.uint8, 255), (torch.bool, 1)],
    ids=str,
)
def test_tests_run_on_poisoned_memory(dtype: torch.dtype, value: int | None) -> None:
    like = torch.zeros(3, dtype=dtype)
    for tensor in (torch.empty(3, dtype=dtype), torch.empty_like(like), like.new_empty(3)):
        assert (tensor.isnan() if value is None else tensor == value).all()
