"""What every test runs under: uninitialised memory is poisoned, two threads, structured random inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

# Read when OpenMP is loaded, so set before torch is: threads that wait sleep instead of spinning. On a busy machine
# tests of many small steps take several times as long with spinning ones.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# For interpreters that tests start: as -P, which Python 3.10 lacks, it keeps kernels/ from hiding installed packages.
os.environ.setdefault("PYTHONSAFEPATH", "1")

import pytest
import torch
from torch import Tensor

pytest.register_assert_rewrite("contract")

try:
    from diffseg import _cpu
except ImportError:  # its tests are skipped
    _cpu = None

THREADS = 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def poison() -> Iterator[None]:
    """Fills what torch leaves uninitialised: NaN, the largest integer, True.

    Deterministic mode would do so too, but it also picks other algorithms than those that users run.
    """
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (Tensor, "new_empty"),
            (Tensor, "new_empty_strided"),
        ):
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(allocate)
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.dtype == torch.bool:
            value: float | bool = True
        elif tensor.is_floating_point() or tensor.is_complex():
            value = float("nan")
        else:
            value = torch.iinfo(tensor.dtype).max
        with torch.no_grad():
            return tensor.fill_(value)

    return poisoned


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Each test starts and ends with two threads, so that a race can show and none leaves its count behind."""
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(params=_cpu.available_isas() if _cpu else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine in turn, for the C++ kernels."""
    previous = _cpu.isa()
    _cpu.use_isa(request.param)
    yield request.param
    _cpu.use_isa(previous)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole random checkpoint of Stable Diffusion 1's layout; tests leave it as it is."""
    from diffseg.testing import tiny_pipeline

    return tiny_pipeline("sd1", tmp_path_factory.mktemp("sd1"))


class Layers(NamedTuple):
    """Queries and keys of some self-attention layers, as :func:`diffseg.aggregate` takes them."""

    queries: list[Tensor]
    keys: list[Tensor]
    grids: list[tuple[int, int]]

    def maps(self) -> list[Tensor]:
        """softmax(Q K^T d ** -0.5) of each layer, [B, heads, n, n]."""
        return [
            (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
            for query, key in zip(self.queries, self.keys, strict=True)
        ]


@pytest.fixture(scope="session")
def layers() -> Callable[..., Layers]:
    return make_layers


@pytest.fixture(scope="session")
def attention() -> Callable[..., Tensor]:
    return make_attention


def make_layers(
    grids: Sequence[tuple[int, int]],
    *,
    batch: int = 1,
    heads: int = 2,
    dim: int = 8,
    regions: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Layers:
    """Layers that look at one scene: cells of a region attend to each other, more so where they are near."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(batch, regions, 2, generator=generator, dtype=torch.float64)
    queries, keys = [], []
    for rows, columns in grids:
        points = _cell_centres(rows, columns).expand(batch, -1, -1)
        region = torch.cdist(points, centres).argmin(-1)
        features = 1.3 * torch.randn(batch, heads, regions, dim, generator=generator, dtype=torch.float64)
        index = region[:, None, :, None].expand(-1, heads, -1, dim)
        shared = features.gather(2, index) + points[:, None] @ torch.randn(2, dim, generator=generator).double()
        for made in (queries, keys):
            noise = torch.randn(shared.shape, generator=generator, dtype=torch.float64)
            made.append((shared + 0.2 * noise).to(dtype))
    return Layers(queries, keys, list(grids))


def make_attention(
    grid: tuple[int, int], *, batch: int = 1, regions: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """One structured map a cell, [B, N, N], rows sum to 1; several segments at thresholds near 1."""
    layer = make_layers([grid], batch=batch, heads=1, regions=regions, seed=seed)
    return layer.maps()[0].squeeze(1).to(dtype)


def _cell_centres(rows: int, columns: int) -> Tensor:
    y = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    x = (torch.arange(columns, dtype=torch.float64) + 0.5) / columns
    return torch.cartesian_prod(y, x)
