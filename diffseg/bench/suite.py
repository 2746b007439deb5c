"""Makes rows ready to run: the inputs, contenders and gates of each stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache, partial
from typing import Any

import torch

from .. import memory, ops
from ..backends import BACKENDS
from . import cases, cost, gates, networks, peers
from .cases import Case, Unavailable
from .ceilings import last_level_cache
from .cost import Work
from .rows import NETWORK_STAGES, Plan, Row, Settings
from .timing import Contender

ITERATIONS = 3
MANY_ITERATIONS = 9  # where nothing merges, later rounds are as long as the second: eight of them outweigh the noise


class Suite:
    """Plans rows under ``settings``. Use it as a context: it may hold other processes."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = settings.device
        self._cases: dict[tuple[Any, ...], Case] = {}
        self._held = ExitStack()

    def __enter__(self) -> Suite:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def plan(self, row: Row) -> Plan:
        """Makes the row's inputs and contenders, which may take longer than timing them. Raises Unavailable."""
        needed, free = memory_needed(row), memory.available(self.device)
        if needed > free:
            raise Unavailable(f"it needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free")
        if row.stage in NETWORK_STAGES:
            return networks.plan(row, self.settings)
        plan: Plan = getattr(self, f"_{row.stage}")(row)
        plan.notes += [f"{each.name}: {each.unavailable}" for each in plan.contenders if each.unavailable]
        plan.contenders = [each for each in plan.contenders if not each.unavailable]
        return plan

    def case(self, row: Row) -> Case:
        key = (row.case, row.size, row.batch)
        if key not in self._cases:
            self._cases.clear()  # one at a time: A_f of a large image is gigabytes
            self._cases[key] = self._made(row)
        return self._cases[key]

    def _made(self, row: Row) -> Case:
        dtype = self.settings.dtype
        if row.case == "golden":
            return cases.golden(row.size, row.batch, self.device, dtype)
        if row.case == "bundled":
            return cases.bundled(row.size, row.batch, self.device)
        if row.case == "sd14":
            return cases.sd14(row.size, row.batch, self.device, dtype)
        if row.case == "thin":
            layers = [
                cost.Layer((cases.side_of(row.size[0], layer), cases.side_of(row.size[1], layer)), 2, 40)
                for layer in cost.SD14[::5]
            ]
            return cases.structured("thin", layers, row.size, row.batch, self.device, dtype)
        raise Unavailable(f"there is no case {row.case!r} for {row.stage}")

    def backends(self, op: str, dtype: torch.dtype) -> list[str]:
        """The backends to time: all that can run but the reference, which is the baseline."""
        names = self.settings.backends or tuple(BACKENDS)
        return [name for name in names if name != "reference" and BACKENDS[name].can_run(op, self.device, dtype)]

    def _subjects(self, op: str, dtype: torch.dtype, run: Callable[[Any, str], Any], check: Any) -> list[Contender]:
        return [
            Contender(name, "subject", partial(_with, run, name), check, recordable=True)
            for name in self.backends(op, dtype)
        ]

    def _with_reference(
        self, op: str, dtype: torch.dtype, run: Callable[[Any, str], Any], check: Any
    ) -> list[Contender]:
        """The backends that can run ``op``, and the reference as their baseline."""
        baseline = Contender("eager", "baseline", partial(_with, run, "reference"), check)
        return [*self._subjects(op, dtype, run, check), baseline]

    def _eager(
        self, run: Callable[[Any, str], Any], check: Any, minus: Any = None, *, all_walks: bool = False
    ) -> list[Contender]:
        """The eager baselines, one a walk; on a CPU the host's alone, which is the faster, unless all are asked for."""
        return [
            Contender(
                f"eager, {walk} walk",
                "baseline",
                partial(_with, run, walk),
                check,
                minus=None if minus is None else partial(_with, minus, walk),
            )
            for walk in (peers.WALKS if all_walks or self.device.type == "cuda" else peers.WALKS[:1])
        ]

    def _precision(self, dtype: torch.dtype) -> str:
        """In which the contract allows matrix products on this device."""
        return "bfloat16" if self.device.type == "cuda" and dtype != torch.float32 else "float32"

    def _aggregate(self, row: Row) -> Plan:
        case = self.case(row)
        check = gates.attention_gate(case)
        dtype = case.queries[0].dtype

        def run(given: Any, backend: str) -> Any:
            return case.aggregate(given, backend=backend)

        contenders = self._with_reference("aggregate", dtype, run, check)
        contenders.append(
            Contender(
                "sdpa", "peer", lambda given: peers.sdpa(given[0], given[1], case.scales), note="other work: no A_f"
            )
        )
        inputs = cases.rotated((case.queries, case.keys, case.logsumexps), self.device)
        return Plan(inputs, contenders, lambda: self._aggregate_work(case), self._precision(dtype))

    def _aggregate_work(self, case: Case) -> Work:
        return cost.aggregate(
            case.layers, element=case.queries[0].element_size(), logsumexps=case.logsumexps is not None,
            passes=None if self.device.type == "cuda" else 1, batch=case.batch, grid=case.grid,
        )  # fmt: skip

    def _maps(self, row: Row) -> Plan:
        case = self.case(row)
        check = gates.attention_gate(case, case.maps)
        out = torch.empty(row.batch, row.cells, row.cells, device=self.device)

        def run(maps: Any, backend: str) -> Any:
            return case.aggregate_maps(maps, backend=backend, out=out)

        contenders = self._with_reference("aggregate_maps", torch.float32, run, check)
        moved = sum(maps.nbytes for maps in case.maps) + out.nbytes
        if moved > 4 * last_level_cache(self.device):
            copy = peers.copy_of(moved, self.device)
            contenders.append(Contender("copy", "peer", lambda maps: copy(), note="other work: as many bytes moved"))
        inputs = cases.rotated(case.maps, self.device)
        return Plan(inputs, contenders, lambda: cost.aggregate_maps(case.layers, batch=row.batch, grid=case.grid))

    def _attention(self, row: Row) -> tuple[torch.Tensor, float]:
        """A_f and the threshold of a row that merges."""
        if row.case == "noise":
            return cases.noise(row.grid, row.batch, self.device)
        case = self.case(row)
        return case.attention, case.threshold

    def _merging(self, row: Row, iterations: int) -> Any:
        """A_f, threshold, anchors, and two ways to merge: by (A_f, backend) and eagerly by (A_f, walk) -> Proposals."""
        attention, threshold = self._attention(row)
        anchors = ops.anchor_indices(row.grid, row.anchors)
        thresholds = [threshold] * iterations

        def by_backend(given: torch.Tensor, backend: str) -> ops.Proposals:
            return ops.merge(
                given, grid=row.grid, anchors=row.anchors, iterations=iterations, threshold=threshold, backend=backend
            )  # fmt: skip

        def eagerly(given: torch.Tensor, walk: str) -> ops.Proposals:
            return peers.eager_merge(given, row.grid, anchors, thresholds, "paper", walk)

        return attention, threshold, anchors, by_backend, eagerly

    def _round1(self, row: Row) -> Plan:
        attention, threshold, anchors, by_backend, eagerly = self._merging(row, 1)
        check = gates.first_round_gate(attention, anchors, threshold)
        contenders = self._subjects("merge", attention.dtype, by_backend, check)
        contenders.append(Contender("eager", "baseline", lambda given: eagerly(given, "host"), check))
        if not self.settings.subset:
            contenders += self._first_round_peers(row, anchors, threshold, check)
        density = cache(lambda: gates.density(attention, anchors, threshold))
        return Plan(
            cases.rotated(attention, self.device), contenders,
            lambda: self._first_round_work(row, density()), self._merge_precision(),
            [lambda: f"{density():.0%} of pairs match"],
        )  # fmt: skip

    def _first_round_peers(self, row: Row, anchors: Sequence[int], threshold: float, check: Any) -> list[Contender]:
        index = torch.tensor(anchors, device=self.device)
        counts = torch.full((row.batch,), len(anchors), dtype=torch.int32, device=self.device)

        def proposals(maps: torch.Tensor) -> ops.Proposals:
            return ops.Proposals(maps, counts, row.grid)

        return [
            Contender(
                "torch.compile", "peer", lambda given: proposals(peers.compiled_first_round()(given, index, threshold)),
                check, compiles=True, unavailable=peers.compiler_missing(),
            ),
            Contender(
                "literal broadcast form", "peer",
                lambda given: proposals(
                    torch.stack([peers.literal_first_round(each, anchors, threshold) for each in given])
                ),
                check,
            ),
        ]  # fmt: skip

    def _first_round_work(self, row: Row, density: float) -> Work:
        return cost.first_round(row.cells, row.anchors**2, density=density, products=self._products(), batch=row.batch)

    def _products(self) -> int:
        return cost.SPLIT_PRODUCTS if self.device.type == "cuda" else 1

    def _merge_precision(self) -> str:
        return "bfloat16" if self.device.type == "cuda" else "float32"

    def _rounds(self, row: Row) -> Plan:
        iterations = MANY_ITERATIONS if row.case == "noise" else ITERATIONS
        attention, threshold, anchors, by_backend, eagerly = self._merging(row, iterations)
        *_, first_by_backend, first_eagerly = self._merging(row, 1)
        check = gates.merge_gate(attention, row.grid, row.size, anchors, [threshold] * iterations, "paper")
        contenders = self._subjects("merge", attention.dtype, by_backend, check)
        for each in contenders:
            each.recordable = False  # a graph's two times are not taken in one sample
            each.minus = partial(_with, first_by_backend, each.name)
        contenders += self._eager(eagerly, check, minus=first_eagerly)
        notes: list[str | Callable[[], str]] = [f"the difference of {iterations} rounds and one, sample by sample"]
        return Plan(
            cases.rotated(attention, self.device), contenders, lambda: self._later_work(row, iterations - 1),
            self._merge_precision(), notes,
        )  # fmt: skip

    def _later_work(self, row: Row, rounds: int) -> Work:
        return cost.later_rounds(row.cells, row.anchors**2, rounds, products=self._products(), batch=row.batch)

    def _merge_work(self, row: Row, density: float) -> Work:
        return self._first_round_work(row, density) + self._later_work(row, ITERATIONS - 1)

    def _merge(self, row: Row) -> Plan:
        attention, threshold, anchors, by_backend, eagerly = self._merging(row, ITERATIONS)
        check = gates.merge_gate(attention, row.grid, row.size, anchors, [threshold] * ITERATIONS, "paper")
        contenders = self._subjects("merge", attention.dtype, by_backend, check)
        contenders += self._eager(eagerly, check, all_walks=not (self.settings.subset or row.series))
        density = cache(lambda: gates.density(attention, anchors, threshold))
        return Plan(
            cases.rotated(attention, self.device), contenders, lambda: self._merge_work(row, density()),
            self._merge_precision(), [lambda: f"{density():.0%} of pairs match in round 1"],
        )  # fmt: skip

    def _label(self, row: Row) -> Plan:
        attention, *_, by_backend, _ = self._merging(row, ITERATIONS)
        proposals = by_backend(attention, "auto")
        check = gates.label_gate(proposals, row.size)

        def run(given: ops.Proposals, backend: str) -> torch.Tensor:
            return ops.label(given, row.size, backend=backend)

        contenders = self._with_reference("label", torch.float32, run, check)
        count = float(proposals.counts.float().mean())
        return Plan(
            cases.rotated(proposals, self.device), contenders,
            lambda: cost.label(row.cells, count, row.size, batch=row.batch), "float32", [f"{count:.0f} proposals"],
        )  # fmt: skip

    def _segment(self, row: Row) -> Plan:
        case = self.case(row)
        anchors = ops.anchor_indices(row.grid, row.anchors)
        thresholds = [case.threshold] * ITERATIONS

        def run(given: Any, backend: str) -> Any:
            queries, keys, rows = given
            return ops.segment(
                queries, keys, case.size, grids=case.grids, scales=case.scales, logsumexps=rows, weights=case.weights,
                grid=case.grid, threshold=case.threshold, backend=backend,
            )  # fmt: skip

        def eagerly(given: Any, walk: str) -> Any:
            with memory.attention_memory(given[0][0], row.grid) as out:  # kept for the next call, as segment's is
                attention = case.aggregate(given, backend="reference", out=out)
                proposals = peers.eager_merge(attention, row.grid, anchors, thresholds, "paper", walk)
            return peers.eager_labels(proposals, case.size)

        expected = cache(lambda: eagerly((case.queries, case.keys, case.logsumexps), "host"))
        check = gates.labels_gate(expected)
        dtype = case.queries[0].dtype
        contenders = self._subjects("aggregate", dtype, run, check) + self._eager(eagerly, check)
        on_cpu = self.device.type == "cpu"  # beside a GPU's contenders its seconds would leave them one round
        if on_cpu and not self.settings.subset and peers.kmeans_missing() is None:
            clusters = int(expected()[0].max()) + 1
            attention = case.attention
            contenders.append(
                Contender(
                    "k-means on A_f", "peer", lambda _: peers.kmeans(attention, row.grid, clusters, case.size),
                    note=f"other work: scikit-learn, k = {clusters}, from A_f, first image",
                )
            )  # fmt: skip
        inputs = cases.rotated((case.queries, case.keys, case.logsumexps), self.device)
        return Plan(inputs, contenders, lambda: self._stage_work(row, case, expected()), self._merge_precision())

    def _stage_work(self, row: Row, case: Case, labels: torch.Tensor) -> Work:
        anchors = ops.anchor_indices(row.grid, row.anchors)
        return (
            self._aggregate_work(case)
            + self._merge_work(row, gates.density(case.attention, anchors, case.threshold))
            + cost.label(row.cells, float(labels.max()) + 1, case.size, batch=row.batch)
        )

    def _published(self, row: Row) -> Plan:
        case = self.case(row)
        anchors = ops.anchor_indices(row.grid, row.anchors)
        thresholds = [case.threshold] * ITERATIONS

        def run(maps: Any, backend: str) -> Any:
            attention = case.aggregate_maps(maps, backend=backend)
            proposals = ops.merge(
                attention, grid=row.grid, anchors=row.anchors, threshold=case.threshold, rule="official",
                backend=backend,
            )  # fmt: skip
            return ops.label(proposals, case.size, backend=backend)

        def eagerly(maps: Any, walk: str) -> Any:
            attention = case.aggregate_maps(maps, backend="reference")
            proposals = peers.eager_merge(attention, row.grid, anchors, thresholds, "official", walk)
            return ops.label(proposals, case.size, backend="reference")

        check = gates.labels_gate(lambda: eagerly([maps.double() for maps in case.maps], "host"))
        contenders = self._subjects("aggregate_maps", torch.float32, run, check)
        contenders += self._eager(eagerly, check)
        if not self.settings.subset:
            contenders.append(
                Contender(
                    "literal broadcast form", "peer", peers.literal_from_maps(case, anchors, ITERATIONS), check,
                    note="the published code's steps in torch",
                )
            )  # fmt: skip
        notes: list[str | Callable[[], str]] = []
        if self.settings.published is None:
            notes.append("the published code itself: give its checkout with --published")
        else:
            contenders.append(self._published_contender(case, row, check))
        return Plan(cases.rotated(case.maps, self.device), contenders, notes=notes)

    def _published_contender(self, case: Case, row: Row, check: Any) -> Contender:
        from .published import Published

        name = "published code (TensorFlow)"
        assert self.settings.published is not None
        try:
            process = Published(
                self.settings.published, self.settings.published_python, case, rounds=ITERATIONS, points=row.anchors
            )
        except (RuntimeError, ValueError, OSError) as error:
            return Contender(name, "peer", lambda _: None, unavailable=str(error))
        self._held.callback(process.close)
        return Contender(
            name, "peer", process, lambda measured: check(measured.labels), elsewhere=True,
            note="its own process and clock; its first round is in float16",
        )  # fmt: skip

    def _call(self, row: Row) -> Plan:
        layers = [cost.Layer(row.grid, 1, 8), cost.Layer((2, 2), 1, 8)]
        case = cases.structured("tiny", layers, row.size, row.batch, self.device, self.settings.dtype, given=False)
        attention = case.attention
        proposals = ops.merge(attention, anchors=2, backend="reference")
        text, labels = [key[:, :, :4] for key in case.keys], ops.label(proposals, row.size, backend="reference")
        shares = torch.eye(2, 4, device=self.device)[None]

        def words(given: Any, name: str) -> torch.Tensor:
            return ops.aggregate_cross(*given, tokens=shares, size=row.size, backend=name)

        def maps() -> torch.Tensor:
            return words([[each.double() for each in tensors] for tensors in (case.queries, text)], "reference")

        def renumbered(given: torch.Tensor, name: str) -> torch.Tensor:
            numbered = given.clone()  # the op writes into its argument
            torch.ops.diffseg.renumber(numbered, proposals.maps.shape[1], name)
            return numbered

        op: dict[str, tuple[Any, Callable[[Any, str], Any], Any]] = {
            "aggregate": (
                (case.queries, case.keys),
                lambda given, name: ops.aggregate(*given, backend=name),
                gates.attention_gate(case),
            ),
            "aggregate_maps": (
                case.maps,
                lambda given, name: ops.aggregate_maps(given, backend=name),
                gates.attention_gate(case, case.maps),
            ),
            "merge": (
                attention,
                lambda given, name: ops.merge(given, anchors=2, backend=name),
                gates.merge_gate(
                    attention, row.grid, row.size, ops.anchor_indices(row.grid, 2), [1.0] * ITERATIONS, "paper"
                ),
            ),
            "label": (
                proposals,
                lambda given, name: ops.label(given, row.size, backend=name),
                gates.label_gate(proposals, row.size),
            ),
            "renumber": (labels, renumbered, gates.entries_gate(lambda: renumbered(labels, "reference"))),
            "aggregate_cross": ((case.queries, text), words, gates.entries_gate(maps)),
            "score_masks": (
                maps().float(),
                lambda given, name: ops.score_masks(given, labels, masks=4, backend=name),
                gates.entries_gate(lambda: ops.score_masks(maps(), labels, masks=4, backend="reference")),
            ),
        }
        given, run, check = op[row.case]
        dtype = labels.dtype if row.case == "renumber" else attention.dtype
        contenders = self._with_reference(row.case, dtype, run, check)
        addend = torch.zeros(16, device=self.device)
        contenders.append(
            Contender("one torch.add", "peer", lambda _: addend + 1, note="other work: a torch call's cost")
        )
        return Plan([given], contenders)


def _with(run: Callable[[Any, str], Any], way: str, given: Any) -> Any:
    return run(given, way)


def memory_needed(row: Row) -> float:
    """About how many bytes a row takes: A_f of the batch three times, the gate's of two images, the float64 oracle's of
    one."""
    if row.stage in ("call", *NETWORK_STAGES):
        return 0.0
    heads = {"golden": 2, "bundled": 10, "sd14": 40}.get(row.case, 2)
    maps = {"maps": 3, "published": 2}.get(row.stage, 0) * heads * row.batch  # and what a copy of as many takes
    return float(row.cells**2) * (4 * (3 * row.batch + 2 + maps) + 40)
