"""The benchmark harness: it refuses wrong results, keeps what it measured, and says what it could not do."""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
import platform
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

import diffseg
from diffseg import backends, cli, memory
from diffseg.backends import OPS
from diffseg.bench import cases, ceilings, command, gates, networks, passes, peers, plot, report, run, suite, timing
from diffseg.bench.cases import Unavailable
from diffseg.bench.cost import Ceilings, Layer
from diffseg.bench.published import Published
from diffseg.bench.rows import STAGES, Plan, Row, Settings, rows_of
from diffseg.bench.suite import Suite
from diffseg.bench.timing import Contender, Timed, Timer
from diffseg.loading import UsageError

CPU = torch.device("cpu")
LIMITS = Ceilings(copy=1e10, products={"float32": 1e11, "bfloat16": 1e11}, exponentials=1e9)
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def fixed_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "measure", lambda device: LIMITS)


@pytest.fixture
def timer() -> Timer:
    return Timer(CPU, 0.01)


def bench(*words: str, passes: int = 1) -> int:
    return cli.main(["bench", *words, "--size", "128", "--seconds", "0.005", "--passes", str(passes)])


def contents(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def thin(batch: int = 1) -> cases.Case:
    with Suite(Settings()) as made:
        return made.case(Row("merge", "thin", (128, 128), batch))


def test_a_run_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "out.json"
    assert bench("merge", "label", "--case", "thin", "--json", str(path)) == 0
    printed = capsys.readouterr().out
    for words in ("merge thin 128x128 B=1 (grid 16 x 16)", "times faster", "eager, host walk", "baseline", "MiB"):
        assert words in printed
    found = contents(path)
    assert [row["state"] for row in found["rows"]] == ["measured", "measured"]
    assert found["machine"]["threads"] == torch.get_num_threads()
    subject, *baselines = found["rows"][0]["contenders"]
    assert (subject["name"], subject["role"], subject["checked"]) == ("cpu", "subject", True)
    assert [each["name"] for each in baselines] == ["eager, host walk", "eager, device walk"]
    for each in (subject, *baselines):
        assert [len(samples) for samples in each["samples"]] == [3]
        assert each["cold_seconds"] > 0
        assert each["seconds"]["p20"] <= each["seconds"]["median"] <= each["seconds"]["p80"]
        assert each["floor_share"] == pytest.approx(found["rows"][0]["floor_seconds"] / each["seconds"]["median"])
    assert found["rows"][0]["baseline"] in {each["name"] for each in baselines}


def test_backends_are_listed_and_the_others_say_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    assert bench("label", "--case", "noise", "--json", str(path)) == 0
    printed = capsys.readouterr().out
    assert contents(path)["backends"] == diffseg.explain_backends()
    for name, state in diffseg.explain_backends().items():
        assert f"backend {name}: {state}" in printed
    if not torch.cuda.is_available():
        assert "backend triton: " in printed
        assert "cannot run" in printed


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in ("growth", "capture", "pipeline")])
def test_every_stage_runs(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "FOLDER_IMAGES", 2)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # the usual one: half a minute
    peers.compiled_first_round.cache_clear()
    path = tmp_path / "out.json"
    assert bench(stage, "--case", "thin", "--json", str(path)) == 0
    rows = contents(path)["rows"]
    assert {row["state"] for row in rows} == {"measured"}, [row.get("reason") for row in rows]
    assert all(entry["checked"] or not entry["same_work"] for row in rows for entry in row["contenders"])
    assert all({"subject", "baseline"} <= {entry["role"] for entry in row["contenders"]} for row in rows)


def test_networks(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    assert bench("capture", "pipeline", "--batch", "2", "--json", str(path)) == 0
    capture, pipeline = contents(path)["rows"]
    assert [each["name"] for each in capture["contenders"]] == ["record_attention", "bare forward"]
    names = [each["name"] for each in pipeline["contenders"]]
    assert names[-1] == pipeline["baseline"] == "bare VAE + UNet"
    assert "pipe, cpu" in names
    for each in pipeline["contenders"]:
        assert each["p99_seconds"] >= each["seconds"]["median"]
        assert each["images_per_second"] == pytest.approx(2 / each["seconds"]["median"])


@pytest.fixture
def wrong_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C++ kernels merge wrongly."""
    merge = suite.ops.merge

    def wrong(attention: torch.Tensor, **options: Any) -> diffseg.Proposals:
        found = merge(attention, **options)
        return found._replace(maps=found.maps.flip(1)) if options["backend"] == "cpu" else found

    monkeypatch.setattr(suite.ops, "merge", wrong)


@pytest.mark.usefixtures("wrong_merge")
def test_a_row_without_a_right_backend_fails_and_so_does_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.json"
    assert bench("round1", "label", "--case", "thin", "--backend", "cpu", "--json", str(path)) == 1
    printed = capsys.readouterr().out
    assert "round1 thin 128x128 B=1: FAILED: cpu: image 0: a mean of round 1" in printed
    assert "1 of 2 rows FAILED" in printed
    failed, measured = contents(path)["rows"]
    assert (failed["state"], failed["contenders"]) == ("failed", [])
    assert measured["state"] == "measured"


@pytest.mark.usefixtures("wrong_merge")
def test_a_failing_contender_leaves_its_row_to_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects = Suite._subjects

    def with_another(made: Suite, op: str, dtype: torch.dtype, merge: Any, check: Any) -> list[Contender]:
        other = Contender("another", "subject", lambda given: merge(given, "reference"), check)
        broken = Contender("broken", "subject", lambda given: no_kernels(), check)
        return [*subjects(made, op, dtype, merge, check), broken, other]

    monkeypatch.setattr(Suite, "_subjects", with_another)
    path = tmp_path / "out.json"
    assert bench("round1", "--case", "thin", "--json", str(path)) == 1
    (row,) = contents(path)["rows"]
    assert row["state"] == "measured"
    assert {"another", "eager"} <= {each["name"] for each in row["contenders"]}
    assert not {"cpu", "broken"} & {each["name"] for each in row["contenders"]}
    assert row["failures"]["cpu"].startswith("image 0: a mean of round 1")
    assert row["failures"]["broken"] == "ImportError: not built"
    printed = capsys.readouterr().out
    assert "  cpu: FAILED: image 0: a mean of round 1" in printed
    assert "1 of 1 rows FAILED" in printed


def test_a_run_that_measures_nothing_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["bench", "--case", "golden", "--quick"]) == 2
    assert "--case golden: the golden cases are of images of 512 x 512 (--size 512)" in capsys.readouterr().err
    monkeypatch.setattr(suite.memory, "available", lambda device: 1e6)
    assert bench("merge", "--case", "noise") == 2
    assert "nothing was measured: it needs about 0 GiB, 0 GiB are free" in capsys.readouterr().err


def test_interrupting_keeps_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_row = run.run_row

    def interrupted(made: Suite, row: Row, *rest: Any) -> Any:
        if row.stage == "label":
            raise KeyboardInterrupt
        return run_row(made, row, *rest)

    monkeypatch.setattr(run, "run_row", interrupted)
    path = tmp_path / "out.json"
    assert bench("merge", "label", "--case", "thin", "--json", str(path)) == 130
    assert [row["stage"] for row in contents(path)["rows"]] == ["merge"]
    printed = capsys.readouterr().out
    assert printed.count("merge thin 128x128") == 1
    assert "interrupted after 1 rows" in printed
    assert [each.name for each in tmp_path.iterdir()] == ["out.json"]


class TestPasses:
    def test_every_pass_runs_every_row_in_a_process_of_its_own(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "out.json"
        assert bench("merge", "label", "--case", "noise", "--json", str(path), passes=3) == 0
        found = contents(path)
        assert (found["format"], found["passes"]) == (2, 3)
        for row in found["rows"]:
            assert len(row["elapsed_seconds"]) == 3
            for each in row["contenders"]:
                assert [len(samples) for samples in each["samples"]] == [1, 1, 1]
                faster = each["times_faster"]
                assert faster["low"] <= faster["median"] <= faster["high"]
        printed = capsys.readouterr().out
        assert "3 passes, each in a process of its own" in printed
        subject = found["rows"][0]["contenders"][0]["times_faster"]
        assert f"{report.factor(subject['low'])} to {report.factor(subject['high'])}" in printed

    def test_interrupting_one_keeps_the_passes_before(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add_pass = run.add_pass

        def interrupted(record: dict[str, Any], outcome: passes.Outcome, number: int) -> None:
            if record["stage"] == "label":
                raise KeyboardInterrupt
            add_pass(record, outcome, number)

        monkeypatch.setattr(run, "add_pass", interrupted)
        path = tmp_path / "out.json"
        assert bench("merge", "label", "rounds", "--case", "noise", "--json", str(path), passes=3) == 130
        merge, label, _ = contents(path)["rows"]
        assert [len(row["contenders"][0]["samples"]) for row in (merge, label)] == [2, 1]
        assert merge["contenders"][0]["times_faster"]["low"] is not None
        assert label["contenders"][0]["times_faster"]["low"] is None
        printed = capsys.readouterr().out
        assert [printed.count(f"{stage} noise 128x128") for stage in ("merge", "label")] == [1, 1]
        assert "interrupted after 1 of 3 passes" in printed
        assert not multiprocessing.active_children()

    def test_a_process_that_dies_fails_its_row_only(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        add_pass = run.add_pass
        killed = []

        def killing(record: dict[str, Any], outcome: passes.Outcome, number: int) -> None:
            add_pass(record, outcome, number)
            if not killed:
                killed.extend(multiprocessing.active_children())
                killed[0].kill()
                killed[0].join()

        monkeypatch.setattr(run, "add_pass", killing)
        path = tmp_path / "out.json"
        assert bench("label", "call", "--case", "noise", "--json", str(path), passes=2) == 1
        states = [(row["state"], row.get("reason")) for row in contents(path)["rows"]]
        assert states.count(("failed", "pass 2: its process ended with status -9")) == 1
        assert [state for state, _ in states].count("measured") == len(states) - 1

    def test_one_that_cannot_run_is_missing_and_one_that_errs_fails(
        self, monkeypatch: pytest.MonkeyPatch, timer: Timer
    ) -> None:
        def out_of_memory(row: Row) -> Plan:
            raise RuntimeError("no memory")

        row = Row("label", "noise", (128, 128))
        with Suite(Settings()) as made:
            record = run.run_row(made, row, timer, LIMITS)
            task = passes.Task(0, row, {each["name"]: each["call_seconds"] for each in record["contenders"]})
            outcome = passes.measure(made, timer, task, 1)
            assert outcome.samples.keys() == {"cpu", "eager"}
            run.add_pass(record, outcome, 1)
            monkeypatch.setattr(suite.memory, "available", lambda device: 0.0)
            run.add_pass(record, passes.measure(made, timer, task, 2), 2)
            assert record["notes"][-1].startswith("pass 3 is missing: it needs about 0 GiB")
            assert [len(each["samples"]) for each in record["contenders"]] == [2, 2]
            monkeypatch.setattr(made, "plan", out_of_memory)
            run.add_pass(record, passes.measure(made, timer, task, 3), 3)
        assert (record["state"], record["reason"]) == ("failed", "pass 4: RuntimeError: no memory")

    def test_gates_are_not_asked_again(self, monkeypatch: pytest.MonkeyPatch, timer: Timer) -> None:
        row = Row("merge", "noise", (128, 128))
        monkeypatch.setattr(gates, "divergences", lambda *_: pytest.fail("the oracle was asked"))
        monkeypatch.setattr(suite.gates, "_check_agreement", lambda *_: pytest.fail("a gate was asked"))
        with Suite(Settings()) as made:
            outcome = passes.measure(made, timer, passes.Task(0, row, {"cpu": 1e-3, "eager, host walk": 1e-3}), 1)
        assert outcome.failure is None
        assert outcome.samples.keys() == {"cpu", "eager, host walk"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fly"], "STAGE: expected some of aggregate, maps, "),
        (["merge", "--device", "tpu"], "--device tpu: "),
        (["merge", "--batch", "0"], "--batch: expected at least 1, got 0"),
        (["merge", "--published", "nowhere"], "--published: expected a folder, got nowhere"),
        (["pipeline", "--model", "nowhere"], "--model: expected a folder, got nowhere"),
        (["merge", "--compare", "a", "b"], "--compare: expected no STAGE with it, got 'merge'"),
        (["merge", "--plot", "out.bmp"], "--plot: expected a name that ends in .png or .svg, got out.bmp"),
    ],
)
def test_wrong_requests(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(*words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("size", ["100", "512x", "64", "512x500", "big"])
def test_sizes_are_checked(size: str) -> None:
    with pytest.raises(UsageError, match="--size: expected a multiple of 64"):
        command.parse(f"merge --size {size}")
    assert command.parse("merge --size 512 512x768").sizes == ((512, 512), (512, 768))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it can run")
def test_a_backend_asked_for_by_name_says_why_it_cannot_run() -> None:
    with pytest.raises(UsageError, match="backend='triton' cannot run merge here: "):
        command.parse("merge --backend triton")


@pytest.mark.parametrize(
    ("words", "sides", "anchors"),
    [("", [24, 32, 48], {4, 8, 16}), ("growth", [24, 32, 48, 64, 96], {4, 8, 16, 32})],
)
def test_the_subset_and_growth(words: str, sides: list[int], anchors: set[int]) -> None:
    rows = list(rows_of(command.parse(words)))
    if not words:
        assert {row.stage for row in rows} == set(STAGES) - {"growth", "folder"}
    assert len(set(map(str, rows))) == len(rows)
    for stage in ("aggregate", "merge"):
        assert [row.grid[0] for row in rows if row.stage == stage and "cells" in row.series] == sides
    assert {row.anchors for row in rows if "anchors" in row.series} == anchors
    assert len({row.size for row in rows if "anchors" in row.series}) == 1


def test_sizes_and_batches_multiply() -> None:
    assert len(list(rows_of(command.parse("merge label --size 320 512 --batch 1 4 --case noise")))) == 8


def test_a_row_without_memory_is_skipped(monkeypatch: pytest.MonkeyPatch, timer: Timer) -> None:
    monkeypatch.setattr(suite.memory, "available", lambda device: 1e6)
    with Suite(Settings()) as made:
        record = run.run_row(made, Row("merge", "noise"), timer, LIMITS)
    assert record["state"] == "skipped"
    assert "it needs about 1 GiB" in record["reason"]
    assert "SKIPPED" in report.row(record)


def test_the_faster_walk_is_the_baseline(timer: Timer) -> None:
    with Suite(Settings(stages=("merge",))) as made:
        record = run.run_row(made, Row("merge", "noise", (128, 128)), timer, LIMITS)
    medians = {each["name"]: each["seconds"]["median"] for each in record["contenders"] if each["role"] == "baseline"}
    assert len(medians) == 2
    assert record["baseline"] == min(medians, key=medians.__getitem__)


def test_the_first_call_is_timed_without_what_measures_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(run: Callable[[], Any]) -> int:
        time.sleep(0.2)
        run()
        return 7

    monkeypatch.setattr(timing, "peak_resident", slow)
    timed, result = Timer(CPU, 0.0).first(Contender("a", "subject", lambda given: time.sleep(0.01) or given), 3)
    assert (timed.memory, result) == (7, 3)
    assert 0.01 <= timed.cold < 0.1


class FakeGpu:
    """Two devices with streams, events and captures; as torch's, a capture that fails leaves its stream current."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device, self.stream = torch.device("cuda", 0), "its own"
        self.recorded: list[torch.device] = []
        event = SimpleNamespace(
            record=lambda: self.recorded.append(self.device), synchronize=lambda: None, elapsed_time=lambda other: 20.0
        )
        for name, fake in {
            "device": partial(self.current, "device"),
            "stream": partial(self.current, "stream"),
            "current_stream": lambda device: self.stream,
            "graph": self.graph,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
            "graph_pool_handle": lambda: None,
            "Event": lambda enable_timing: event,
            "synchronize": lambda device=None: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    @contextmanager
    def current(self, name: str, value: Any) -> Iterator[None]:
        before = getattr(self, name)
        setattr(self, name, value)
        try:
            yield
        finally:
            setattr(self, name, before)

    @contextmanager
    def graph(self, graph: Any, pool: Any) -> Iterator[None]:
        before, self.stream = self.stream, "the capture's"
        yield
        self.stream = before


def test_what_cannot_be_recorded_is_timed_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, second = FakeGpu(monkeypatch), torch.device("cuda", 1)
    streams = []

    def waits(_: Any) -> None:
        streams.append(gpu.stream)
        if gpu.stream != "its own":
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    timed = [
        Timed(Contender("waits", "subject", waits, recordable=True), seconds=1.0),
        Timed(Contender("fine", "subject", lambda _: None, recordable=True), seconds=1.0),
    ]
    raced = Timer(second, 0.0).race(timed, [None])
    assert [each.contender.name for each in raced] == ["waits", "fine", "fine, recorded"]
    assert raced[0].contender.note == " (not recorded: operation not permitted when stream is capturing)"
    assert streams == ["the capture's", *["its own"] * 3]
    assert set(gpu.recorded) == {second}


def test_rounds_are_differences() -> None:
    calls: list[str] = []
    whole = Contender("a", "baseline", lambda _: calls.append("whole"), minus=lambda _: calls.append("part"))
    timed, _ = Timer(CPU, 0.0).first(whole, None)
    calls.clear()
    timed.seconds = 1.0
    Timer(CPU, 0.0).race([timed], [None])
    assert calls == ["whole", "part"] * 3
    assert all(abs(sample) < 0.1 for sample in timed.samples)


def raced(seconds: dict[str, float], *, total: float = 0.0, passes: int = 1, number: int = 0) -> list[str]:
    """The calls of a race between contenders that take ``seconds``, they say."""
    calls: list[str] = []
    timed = [
        Timed(Contender(name, "subject", lambda _, name=name: calls.append(name)), seconds=each)
        for name, each in seconds.items()
    ]
    Timer(CPU, total, passes).race(timed, [None], number)
    return calls


def test_rounds_alternate_and_passes_begin_with_another() -> None:
    seconds = {"a": 0.1, "b": 0.1}
    assert "".join(raced(seconds)) == "abbaab"
    assert "".join(raced(seconds, passes=3)) == "ab"
    assert "".join(raced(seconds, passes=3, number=1)) == "ba"


@pytest.mark.parametrize(("seconds", "expected"), [(0.9, 3), (1.1, 2), (5.1, 1)])
def test_long_calls_get_fewer_rounds(seconds: float, expected: int) -> None:
    assert len(raced({"a": seconds})) == expected
    assert len(raced({"a": seconds}, passes=2)) == math.ceil(expected / 2)
    assert len(raced({"a": seconds}, total=20 * seconds)) == 20
    assert len(raced({"a": seconds}, total=20 * seconds, passes=3)) == 7
    assert len(raced({"a": seconds}, total=1e6)) == 24


def test_short_calls_are_repeated_after_calls_that_are_not_timed() -> None:
    assert len(raced({"a": 1e-3}, passes=3)) == 10 + 5
    assert raced({"a": 0.01, "b": 0.48}, passes=3) == ["a"] * (3 + 1) + ["b"]


def test_samples_are_the_seconds_of_one_call() -> None:
    timed = Timed(Contender("a", "subject", lambda _: time.sleep(1e-3)), seconds=1e-3)  # ten calls a sample
    Timer(CPU, 0.0).race([timed], [None])
    assert 1e-3 <= min(timed.samples) < 5e-3


def test_fresh_processes_warm_short_calls_up() -> None:
    calls: list[str] = []
    timed = [
        Timed(Contender(name, "subject", lambda _, name=name: calls.append(name)), seconds=seconds)
        for name, seconds in {"short": 0.3, "long": 2.0}.items()
    ]
    timed.append(Timed(Contender("jit", "peer", lambda _: calls.append("jit"), compiles=True), seconds=2.0))
    Timer(CPU, 0.0).warm_up(timed, [None])
    assert calls == ["short", "jit"]


def test_a_first_call_that_compiles_says_nothing_about_the_next() -> None:
    calls: list[str] = []
    timed = [
        Timed(Contender(name, "peer", lambda _, name=name: calls.append(name), compiles=name == "jit"), cold=3.0)
        for name in ("jit", "long")
    ]
    Timer(CPU, 0.0).size_up(timed, [None])
    assert timed[0].seconds < 0.1
    assert timed[1].seconds == 3.0
    assert set(calls) == {"jit"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_counts_what_was_freed_again() -> None:
    def run_once() -> torch.Tensor:
        torch.ones(16 << 20)  # 64 MiB, freed at once
        return torch.ones(4 << 20)

    found = timing.peak_resident(run_once)
    if found is None:
        pytest.skip("/proc/self/clear_refs cannot be written")
    assert 60 << 20 < found < 90 << 20


def test_inputs_are_rotated_past_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "last_level_cache", lambda device: 4096)
    given = (torch.ones(2, 3, 128).transpose(1, 2), [torch.ones(4)], None)
    copies = cases.rotated(given, CPU)
    assert len(copies) == math.ceil(8192 / (4 * (2 * 3 * 128 + 4)))
    assert copies[1][0].stride() == given[0].stride()
    assert len({each[0].data_ptr() for each in copies}) == len(copies)


class TestGates:
    def test_attention(self) -> None:
        case = thin()
        gate = gates.attention_gate(case)
        good = diffseg.aggregate(case.queries, case.keys, grids=case.grids)
        gate(good)
        with pytest.raises(gates.GateError, match="a row sums to 1 within"):
            gate(good * (1 + 1e-3))
        with pytest.raises(gates.GateError, match="a row sums to 1 within"):
            gate(torch.full_like(good, math.nan))
        with pytest.raises(gates.GateError, match=r"beyond 0\.0001 of the oracle's"):
            gate(good.roll(1, -1))
        with pytest.raises(gates.GateError, match="expected A_f"):
            gate(good[:, :16])
        for row in range(0, 256, 51):  # most of them not among the rows drawn
            wrong = good.clone()
            wrong[0, row] = wrong[0, row].roll(1)
            with pytest.raises(gates.GateError, match="an entry of A_f is"):
                gate(wrong)

    def test_its_oracle_is_the_reference(self) -> None:
        case = thin(batch=2)
        ratios = diffseg.ops.resolve_weights("proportional", case.grids)
        rows = torch.arange(0, 256, 5)
        expected = diffseg.aggregate(
            [query.double() for query in case.queries], [key.double() for key in case.keys], grids=case.grids
        )
        found = gates._oracle_rows(case, None, ratios, 1, rows)
        torch.testing.assert_close(found, expected[1, rows].double(), rtol=1e-6, atol=0)
        found = gates._oracle_rows(case, case.maps, ratios, 1, rows)
        torch.testing.assert_close(found, expected[1, rows].double(), rtol=1e-4, atol=1e-9)

    def test_merge(self) -> None:
        case = thin()
        anchors = diffseg.ops.anchor_indices(case.grid, 8)
        gate = gates.merge_gate(case.attention, case.grid, (64, 64), anchors, [1.0] * 3, "paper")
        good = diffseg.merge(case.attention, anchors=8)
        assert int(good.counts[0]) > 1
        gate(good)
        with pytest.raises(gates.GateError, match=r"of pixels, not 99\.9%"):
            gate(good._replace(counts=torch.ones_like(good.counts)))

    def test_first_round(self) -> None:
        case = thin()
        anchors = diffseg.ops.anchor_indices(case.grid, 8)
        gate = gates.first_round_gate(case.attention, anchors, 1.0)
        good = diffseg.merge(case.attention, anchors=8, iterations=1)
        gate(good)
        with pytest.raises(gates.GateError, match="a mean of round 1 is"):
            gate(good._replace(maps=0.99 * good.maps))

    def test_label(self) -> None:
        proposals = diffseg.merge(thin().attention, anchors=8)
        gate = gates.label_gate(proposals, (64, 64))
        good = diffseg.label(proposals, (64, 64))
        gate(good)
        with pytest.raises(gates.GateError, match="is not the winner"):
            gate((good + 1) % proposals.counts[0])

    def test_agreement_renames_one_to_one(self) -> None:
        expected = torch.tensor([[0, 0, 1, 1, 2, 2, 2, 2]])
        assert gates.agreement(torch.tensor([[5, 5, 3, 3, 0, 0, 0, 0]]), expected) == 1
        assert gates.agreement(torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2]]), expected) == 5 / 8


class TestPeers:
    def test_literal_form_is_the_official_rule(self) -> None:
        case = thin()
        anchors = diffseg.ops.anchor_indices(case.grid, 8)
        labels = peers.literal_from_maps(case, anchors, 3)(case.maps)
        proposals = diffseg.merge(
            diffseg.aggregate_maps(case.maps, grids=case.grids), anchors=8, rule="official", backend="reference"
        )
        assert gates.agreement(labels[0], diffseg.label(proposals, case.size)[0]) > 0.999

    def test_kmeans_gives_labels(self) -> None:
        case = thin()
        labels = peers.kmeans(case.attention, case.grid, 3, case.size)
        assert labels.shape == case.size
        assert set(labels.ravel().tolist()) == {0, 1, 2}


SEGMENTOR = """
    import numpy as np

    class DiffSeg:
        def __init__(self, kl_threshold, refine, num_points):
            assert (len(kl_threshold), refine, num_points) == (3, False, 16)

        def segment(self, w64, w32, w16, w8):
            assert w64.shape[2:] == (4096, 4096) and w8.shape[2:] == (64, 64)
            return np.zeros((len(w64), 512, 512))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Stands in for the published code: its interface and a TensorFlow that is none."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "segmentor.py").write_text(textwrap.dedent(SEGMENTOR))
    (tmp_path / "tensorflow.py").write_text(
        "class config:\n  class threading:\n    set_intra_op_parallelism_threads = staticmethod(int)\n"
    )
    return tmp_path


def small_case() -> cases.Case:
    layers = [Layer((side, side), 1, 8) for side in (64, 32, 16, 8)]
    return cases.structured("thin", layers, (512, 512), 1, CPU, torch.float32)


def test_published_code_runs_in_its_own_process(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(checkout))
    with closing(Published(checkout, None, small_case(), rounds=3, points=16)) as published:
        measured = published()
        assert measured.seconds > 0
        assert measured.labels.shape == (1, 512, 512)
        folder = Path(published._folder.name)
    assert not folder.exists()


def test_published_code_that_does_not_run_says_why(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(checkout))
    checkout.joinpath("tensorflow.py").write_text("raise ImportError('no TensorFlow here')")
    with pytest.raises(RuntimeError, match="the published code did not run: ImportError: no TensorFlow here"):
        Published(checkout, None, small_case(), rounds=3, points=16)
    with pytest.raises(RuntimeError, match=r"found no segmentor\.py in"):
        Published(checkout / "code" / "nothing", None, small_case(), rounds=3, points=16)
    with pytest.raises(ValueError, match="one map each of 64, 32, 16 and 8"):
        Published(checkout, None, thin(), rounds=3, points=16)


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = []
    with Suite(Settings()) as made:
        for row in (
            Row("merge", "noise", (128, 128)),
            Row("merge", "thin", (128, 128), series=("cells",)),
            Row("merge", "thin", (192, 192), series=("cells", "anchors")),
            *(Row("merge", "thin", (192, 192), anchors=side, series=("anchors",)) for side in (4, 8)),
        ):
            rows.append(run.run_row(made, row, Timer(CPU, 0.0), LIMITS))
    rows[0]["contenders"][0]["times_faster"] = {"median": 2.0, "low": 1.5, "high": 3.0}
    rows.append({"state": "failed", "series": [], "name": "x"})
    for name in ("out.png", "out.svg"):
        plot.save(rows, "a machine", tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
    drawn = (tmp_path / "out.svg").read_text()
    for text in ("times faster than the row", "side of the grid", "anchors a side", "a machine"):
        assert text in drawn  # which names each text that it draws as paths


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.5, "1.5 s"), (0.0123, "12.3 ms"), (4.2e-6, "4.2 us"), (None, ""), (0.9996, "1 s"), (1234.0, "1234 s")],
)
def test_times_have_three_digits_and_a_unit(value: float | None, text: str) -> None:
    assert report.seconds(value) == text


@pytest.mark.parametrize(
    ("median", "low", "high", "said"),
    [
        (2.0, 1.5, 3.0, "2 times faster (1.5 to 3)"),
        (0.5, 0.25, 0.8, "2 times slower (1.25 to 4)"),
        (0.5, None, None, "2 times slower"),
    ],
)
def test_a_peer_is_faster_or_slower(median: float, low: float | None, high: float | None, said: str) -> None:
    assert report._comparison({"median": median, "low": low, "high": high}) == said


def no_kernels() -> NoReturn:
    raise ImportError("not built")


def test_ceilings_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(ceilings, "_SECONDS", 0.02)
    found = ceilings.measure(CPU)
    assert 1e8 < found.copy < 1e13
    assert 1e8 < found.products["float32"] < 1e15
    assert 1e7 < found.exponentials < 1e13
    assert not found.overlap
    monkeypatch.setattr(ceilings, "_product", lambda *_: 1.0)
    monkeypatch.setattr(ceilings, "_exponentials", lambda: 2.0)
    assert 1e8 < ceilings.measure(CPU).products["float32"] < 1e15
    assert 1e7 < ceilings.measure(CPU).exponentials < 1e13
    monkeypatch.setattr(ceilings.native, "cpu", no_kernels)
    assert (ceilings.measure(CPU).products["float32"], ceilings.measure(CPU).exponentials) == (1, 2)
    assert ceilings._bytes("32768K\n") == 32 << 20


def script(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(ROOT / "benchmarks" / "device.sh"), *words], capture_output=True, text=True)


@pytest.mark.parametrize("words", [[], ["fly"], ["bench", "more"]])
def test_the_device_script_explains_itself(words: Sequence[str]) -> None:
    done = script(*words)
    assert done.returncode == 2
    assert "usage: benchmarks/device.sh build-test|bench|sanitize|profile" in done.stderr


def test_the_device_script_is_valid() -> None:
    assert subprocess.run(["bash", "-n", str(ROOT / "benchmarks" / "device.sh")]).returncode == 0


PYTHON = """#!/usr/bin/env bash
[[ $* == *"import diffusers"* ]] && { echo "ImportError: no diffusers" >&2; exit 1; }
[[ $* == *" bench "* ]] || exit 0
json=${!#}
echo "${json##*/}" >>"$OUT/calls"
case $json in
    */stage.json) printf '{\n "state": "measured"\n}' >"$json"; exit 1 ;;
    */rounds.json) printf '{\n "state": "failed"\n}' >"$json"; exit 1 ;;
    */calls.json) kill -SEGV $$ ;;
    */batches.json) exit 2 ;;
esac
"""


def test_the_device_script_measures_again_only_what_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python whose first run has a backend that fails, whose second loses a row, and whose third dies."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(python))
    monkeypatch.setenv("OUT", str(tmp_path))
    done = script("bench")
    assert done.returncode == 2
    assert (tmp_path / "calls").read_text().split() == [
        "stage.json", "rounds.json", "rounds-cuda.json", "rounds-triton.json", "calls.json", "calls-cuda.json",
        "calls-triton.json", "batches.json", "sizes.json",
    ]  # fmt: skip
    assert "networks are left out: ImportError: no diffusers" in done.stdout


def program(name: str) -> Any:
    """A script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_longest_launch_of_each_kernel() -> None:
    sums = "void diffseg::(anonymous namespace)::sum_scores_kernel<(diffseg::Type)1, 80>(diffseg::Table)"
    launches = [(sums, 3.0), ("_tiles_kernel", 1.0), ("vectorized_elementwise_kernel", 99.0), (sums, 8.0),
                ("_tiles_kernel", 9.0), (sums, 7.0), ("_tiles_kernel", 2.0)]  # fmt: skip
    found = program("slowest_kernels").longest_launches(launches)
    assert found == [("_tiles_kernel", 1, 9.0), ("sum_scores_kernel", 1, 8.0)]


def test_small_inputs_of_every_op(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What a sanitizer looks at on a GPU, here on the C++ kernels."""
    small = program("small_inputs")
    called = set()
    implementation = backends.implementation
    monkeypatch.setattr(
        backends,
        "implementation",
        lambda name, op, *a, **k: (called.add((name, op)), implementation(name, op, *a, **k))[1],
    )
    monkeypatch.setattr(sys, "argv", ["small_inputs.py", "cpu"])
    small.main()
    assert {op for name, op in called if name == "cpu"} == set(OPS)
    assert capsys.readouterr().out == "cpu: every result is right\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n",
            "AMD EPYC, cpu family 25, model 17",
        ),
        ("processor\t: 0\nBogoMIPS\t: 243.75\n", platform.machine()),
    ],
)
def test_processors_of_one_name_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: str
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    monkeypatch.setattr(ceilings, "_CPUINFO", path)
    ceilings._processor.cache_clear()
    assert ceilings.machine(CPU)["processor"] == expected
    ceilings._processor.cache_clear()


def test_the_pytest_entry_lists_the_same_rows() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q",
         "--rows", "label --case noise --size 128"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert "benchmarks/test_rows.py::test_row[label noise 128x128 B=1-0]" in done.stdout, done.stdout + done.stderr


def test_the_pytest_entry_names_contenders_and_the_machine(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider",
         "--rows", "call", "-k", "merge", "--benchmark-json", str(path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    assert found["machine_info"]["diffseg"]["torch"] == torch.__version__
    by_name = {each["fullname"]: each for each in found["benchmarks"]}
    eager = by_name["call merge 32x32 B=1: eager"]
    assert eager["extra_info"]["role"] == "baseline"
    assert by_name["call merge 32x32 B=1: one torch.add"]["stats"]["iterations"] > eager["stats"]["iterations"] > 1


def test_eager_segment_keeps_the_memory_of_its_map_too() -> None:
    with Suite(Settings()) as made:
        plan = made.plan(Row("segment", "thin", (128, 128)))
    memory.release()
    next(each for each in plan.contenders if each.role == "baseline").run(plan.inputs[0])
    assert [len(each) for each in memory._kept] == [256 * 256]
    memory.release()


def test_unavailable_rows_are_skipped(timer: Timer) -> None:
    with Suite(Settings()) as made:
        record = run.run_row(made, Row("merge", "unheard of", (128, 128)), timer, LIMITS)
        assert (record["state"], record["reason"]) == ("skipped", "there is no case 'unheard of' for merge")
        with pytest.raises(Unavailable):
            made.plan(Row("merge", "unheard of"))
        with pytest.raises(Unavailable, match="of images of 512 x 512"):
            made.plan(Row("merge", "golden", (320, 320)))
