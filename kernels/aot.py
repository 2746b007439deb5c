"""Ahead-of-time compilation without a GPU: every kernel's configuration for every target, and what it costs.

    python -m diffseg.kernels.aot [--target sm_90 ...] [--network "SD 1.4 at 512" ...] [--dtype float16 ...]

The ops run on meta tensors, their launches are recorded, and each distinct one is compiled as a call on that GPU would
compile it. The table gives registers, shared memory and spills as the assembler reports them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffseg import ops
from diffseg.reference import Grid

from . import aggregate, cross, label, launch, merge


class Target(NamedTuple):
    """A GPU to compile for, and the table of configurations that serves it."""

    gpu: GPUTarget
    generation: str
    shared_limit: int  # bytes a program may use

    def recording(self) -> AbstractContextManager[list[launch.Launch]]:
        """Lists the launches inside, with the configurations of this GPU."""
        return launch.recording(self.generation, hip=self.gpu.backend == "hip")


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), "sm_80", 163 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), "sm_90", 227 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), "sm_100", 227 * 1024),
    "sm_89": Target(GPUTarget("cuda", 89, 32), launch.OTHER, 99 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), launch.OTHER, 64 * 1024),
}


class Network(NamedTuple):
    """Self-attention layers of a network at one image size: (number, grid, heads, width) of the layers of each grid."""

    layers: tuple[tuple[int, Grid, int, int], ...]
    size: Grid

    def grids(self) -> list[Grid]:
        """Of each layer."""
        return [grid for number, grid, _, _ in self.layers for _ in range(number)]

    def projections(self, dtype: torch.dtype, tokens: int | None = None) -> list[Tensor]:
        """[1, heads, n, d] of each layer, heads beside each other in a row of channels; n: its cells, or ``tokens``."""
        return [
            torch.empty(1, tokens or grid[0] * grid[1], heads, width, dtype=dtype, device="meta").transpose(1, 2)
            for number, grid, heads, width in self.layers
            for _ in range(number)
        ]


NETWORKS = {
    "SD 1.4 at 512": Network(
        ((5, (64, 64), 8, 40), (5, (32, 32), 8, 80), (5, (16, 16), 8, 160), (1, (8, 8), 8, 160)), (512, 512)
    ),
    "SD 2.1 at 768": Network(
        ((5, (96, 96), 5, 64), (5, (48, 48), 10, 64), (5, (24, 24), 20, 64), (1, (12, 12), 20, 64)), (768, 768)
    ),
    "SDXL at 1024": Network(((10, (64, 64), 10, 64), (60, (32, 32), 20, 64)), (1024, 1024)),
}


_TOKENS = 77  # of CLIP's text


class Compiled(NamedTuple):
    """A kernel compiled for a target, and its resources; None where the target's tools do not tell."""

    name: str
    tile: dict[str, Any]  # the compile-time arguments that say how large
    config: launch.Config
    registers: int | None
    spilled: int | None  # bytes of stack a thread: registers that did not fit
    shared: int
    assembly: str

    @property
    def stores(self) -> bool:
        """False where the compiler ran out of tensor memory: it leaves a kernel that does nothing."""
        return re.search(r"st\.global|(global|buffer)_store", self.assembly) is not None


def record(
    network: Network, dtype: torch.dtype, logsumexps: bool, target: Target, *, anchors: int = 16
) -> list[launch.Launch]:
    """The launches of the whole stage, queries and keys to labels, on one image."""
    queries, grids = network.projections(dtype), network.grids()
    rows = [torch.empty(query.shape[:3], device="meta") for query in queries] if logsumexps else None
    scales = [query.shape[3] ** -0.5 for query in queries]
    output = ops.output_grid(grids)
    positions = ops.anchor_indices(output, anchors)
    attention = _attention(output)
    with target.recording() as launches:
        aggregate.aggregate(queries, queries, grids, scales, rows, [1 / len(grids)] * len(grids), output, attention)
        maps, counts = merge.merge(attention, output, positions, [1.0, 1.0], "paper")
        label.renumber(label.label(maps, counts, output, network.size), len(positions))
    return launches


def record_maps(network: Network, dtype: torch.dtype, target: Target) -> list[launch.Launch]:
    """The launches of ``aggregate_maps`` on one image, with and without a layer on the output grid."""
    grids = network.grids()
    maps = [
        torch.empty(1, heads, grid[0] * grid[1], grid[0] * grid[1], dtype=dtype, device="meta")
        for number, grid, heads, _ in network.layers
        for _ in range(number)
    ]
    output = ops.output_grid(grids)
    low = [layer for layer, grid in enumerate(grids) if grid != output]
    with target.recording() as launches:
        for layers in (range(len(grids)), low):
            aggregate.aggregate_maps(
                [maps[layer] for layer in layers], [grids[layer] for layer in layers], [1 / len(layers)] * len(layers),
                output, _attention(output),
            )  # fmt: skip
    return launches


def _attention(grid: Grid) -> Tensor:
    cells = grid[0] * grid[1]
    return torch.empty(1, cells, cells, device="meta")


def record_cross(network: Network, dtype: torch.dtype, target: Target) -> list[launch.Launch]:
    """The launches that name the masks of one image: ``aggregate_cross`` of five words, and ``score_masks``."""
    queries, keys = network.projections(dtype), network.projections(dtype, _TOKENS)
    shares = torch.empty(1, 5, _TOKENS, device="meta")
    labels = torch.empty(1, *network.size, dtype=torch.int32, device="meta")
    scales = [query.shape[3] ** -0.5 for query in queries]
    with target.recording() as launches:
        maps = cross.aggregate_cross(queries, keys, network.grids(), scales, shares, network.size)
        cross.score_masks(maps, labels, 256)
    return launches


def compile_launches(launches: Sequence[launch.Launch], target: Target) -> Iterator[Compiled]:
    """Compiles each distinct launch once."""
    seen = set()
    for kernel, arguments, config in launches:
        source, signature = _source(kernel, arguments)
        key = (kernel.__name__, signature, config.num_warps, config.num_stages)
        if key in seen:
            continue
        seen.add(key)
        compiled = triton.compile(source, target=target.gpu, options=config.options())
        registers, spilled = _resources(compiled, target)
        tile = {name: arguments[name] for name in _SIZES if name in arguments}
        assembly = compiled.asm["amdgcn" if target.gpu.backend == "hip" else "ptx"]
        yield Compiled(kernel.__name__, tile, config, registers, spilled, compiled.metadata.shared, assembly)


_SIZES = (
    "BLOCK", "BLOCK_M", "BLOCK_N", "BLOCK_P", "BLOCK_F", "WIDTH", "HEAD", "TAIL", "GRIDS", "LAYERS", "LENGTH",
    "TOKENS",
)  # fmt: skip
_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int8: "*i8", torch.int32: "*i32",
    torch.int64: "*i64",
}  # fmt: skip


def _source(kernel: Any, arguments: dict[str, Any]) -> tuple[ASTSource, str]:
    """What Triton would specialise on: types, None and 1 as constants, multiples of 16."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        value, name = arguments[parameter.name], parameter.name
        aligned, specialised = False, not parameter.do_not_specialize
        if isinstance(value, Tensor):
            signature[name], aligned = _POINTERS[value.dtype], True
        elif parameter.is_constexpr or value is None or (value == 1 and type(value) is int and specialised):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            wide = "int64" in str(parameter.annotation) or abs(value) >= 2**31
            signature[name], aligned = "i64" if wide else "i32", specialised and value % 16 == 0
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    text = " ".join(f"{name}:{kind}" for name, kind in signature.items()) + f" {constants} {sorted(attributes)}"
    return ASTSource(kernel, signature, constants, attributes), text


@cache
def _cuobjdump() -> str | None:
    """The copy that Triton ships."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(tool) if tool.exists() else None


def _resources(compiled: Any, target: Target) -> tuple[int | None, int | None]:
    """Registers and spilled bytes of a thread."""
    if target.gpu.backend == "hip":
        text = compiled.asm["amdgcn"]
        return _number(r"\.vgpr_count:\s*(\d+)", text), _number(r"\.private_segment_fixed_size:\s*(\d+)", text)
    tool = _cuobjdump()
    if tool is None:
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text)


def _number(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    return None if found is None else int(found[1])


def report(targets: Sequence[str], networks: Sequence[str], dtypes: Sequence[torch.dtype]) -> list[str]:
    """Prints the table; returns what is wrong: spills, or more shared memory than the target has."""
    wrong = []
    print(f"{'target':8}{'kernel':24}{'tile':44}{'warps':>6}{'stages':>7}{'registers':>10}{'spilled':>8}{'shared':>8}")
    for name in targets:
        target = TARGETS[name]
        launches = []
        for network in networks:
            for dtype in dtypes:
                launches += record(NETWORKS[network], dtype, True, target)
                launches += record(NETWORKS[network], dtype, False, target, anchors=32)
                launches += record_maps(NETWORKS[network], dtype, target)
                launches += record_cross(NETWORKS[network], dtype, target)
        for each in compile_launches(launches, target):
            tile = " ".join(f"{key.removeprefix('BLOCK_')}={value}" for key, value in each.tile.items())
            line = f"{name:8}{each.name:24}{tile:44}{each.config.num_warps:6}{each.config.num_stages:7}"
            print(f"{line}{each.registers!s:>10}{each.spilled!s:>8}{each.shared:8}")
            if each.spilled or each.shared > target.shared_limit:
                wrong.append(f"{name} {each.name} {tile}: {each.spilled} bytes spilled, {each.shared} bytes shared")
            if not each.stores:
                wrong.append(f"{name} {each.name} {tile}: stores nothing")
    return wrong


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument(
        "--dtype", nargs="+", choices=["float16", "bfloat16", "float32"], default=["float16", "float32"]
    )
    arguments = parser.parse_args()
    wrong = report(arguments.target, arguments.network, [getattr(torch, name) for name in arguments.dtype])
    if wrong:
        raise SystemExit(
            "\n".join(["", "no configuration may spill, exceed the shared memory or store nothing:", *wrong])
        )


if __name__ == "__main__":
    main()
