"""``diffseg bench --compare``: two runs agree where their bounds overlap; what cannot be compared is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffseg import cli
from diffseg.bench import run
from diffseg.bench.cost import Ceilings
from diffseg.bench.rows import Row

LIMITS = Ceilings(copy=1e10)
ROW = Row("merge", "noise")
ONES = [[1.0, 1.0]] * 3
NEAR, FAR = ([[factor, 1.05 * factor], [1.1 * factor] * 2, [factor] * 2] for factor in (2.0, 4.0))


def measured(row: Row, *samples: list[list[float]]) -> dict[str, Any]:
    """A row as a run would have measured it, of times of a subject and a baseline, or a peer too."""
    roles = {"cpu": "subject", "eager": "baseline", "sdpa": "peer"}
    record = {
        "name": str(row), "stage": row.stage, "case": row.case, "grid": row.grid, "batch": 1, "series": [],
        "notes": [], "floor_seconds": None, "state": "measured",
        "contenders": [
            {"name": name, "role": role, "same_work": True, "note": "", "cold_seconds": 1.0, "memory_bytes": 0,
             "samples": each}
            for (name, role), each in zip(roles.items(), samples, strict=False)
        ],
    }  # fmt: skip
    run.summarise(record)
    return record


def file_of(path: Path, *rows: dict[str, Any], **changed: Any) -> str:
    journal = run.Journal(None, [], torch.device("cpu"), LIMITS, passes=3)
    journal.contents["rows"] += rows
    machine = {**journal.contents["machine"], **changed.pop("machine", {})}
    path.write_text(json.dumps({**journal.contents, **changed, "machine": machine}))
    return str(path)


def compared(*files: str) -> int:
    return cli.main(["bench", "--compare", *files])


def test_a_row_says_how_many_times_faster() -> None:
    record = measured(ROW, ONES, [[2.0, 2.0]] * 3, [[5.0, 5.0]] * 3)
    assert record["baseline"] == "eager"
    assert [each["times_faster"]["median"] for each in record["contenders"]] == pytest.approx([2, 1, 0.4])
    assert [each["images_per_second"] for each in record["contenders"]] == [1, 0.5, 0.2]
    ((subject, peer, faster),) = (each.values() for each in record["against_peers"])
    assert (subject, peer, faster["median"]) == ("cpu", "sdpa", pytest.approx(5))


def test_runs_that_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = [[1.02 * each for each in one] for one in NEAR]
    files = [
        file_of(tmp_path / name, measured(ROW, ONES, slow, slow))
        for name, slow in (("a.json", NEAR), ("b.json", other))
    ]
    assert compared(*files) == 0
    printed = capsys.readouterr().out
    assert [printed.count(words) for words in ("merge noise 512x512", "cpu / sdpa", "yes", " NO")] == [3, 1, 3, 0]
    assert "3 of 3 ratios agree (their bounds overlap)" in printed
    assert "3 of 3 lie within each other's bounds" in printed


def test_runs_that_do_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [[measured(Row("label", "noise"), ONES, NEAR), measured(ROW, ONES, slow)] for slow in (NEAR, FAR)]
    files = [file_of(tmp_path / f"{number}.json", *each) for number, each in enumerate(rows)]
    assert compared(*files) == 1
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in printed if "512x512" in line] == ["yes", "NO"]
    assert "1 of 2 ratios agree (their bounds overlap)" in printed


def test_rows_of_one_run_alone_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = measured(ROW, ONES, NEAR)
    alone = measured(Row("label", "noise"), ONES, NEAR)
    failed = {"name": "maps", "state": "failed", "contenders": []}
    first = file_of(tmp_path / "a.json", row, alone, failed)
    second = file_of(tmp_path / "b.json", row, measured(Row("round1", "noise"), ONES[:1], NEAR[:1]))
    assert compared(first, second) == 0
    assert f"only in {first}: label noise 512x512 B=1: cpu\n" in capsys.readouterr().out
    assert compared(file_of(tmp_path / "c.json", alone), second) == 2
    assert "have no ratio in common" in capsys.readouterr().err


def test_what_was_lost_in_noise_disagrees_with_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = measured(ROW, ONES, [[-1.0, -1.0], *NEAR[1:]])
    files = [file_of(tmp_path / name, row) for name, row in (("a", lost), ("b", measured(ROW, ONES, NEAR)))]
    assert compared(*files) == 0
    printed = capsys.readouterr().out
    assert "lost in noise" in printed
    assert "0 of 1 lie within each other's bounds" in printed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": 1}, "expected a run of format 2, got 1: measure it again"),
        ({"passes": 1}, "expected a run of two passes or more, got one: it has no bounds"),
        ({"device": "cuda"}, "were measured on two machines: device cpu and cuda"),
        ({"machine": {"processor": "Abacus"}}, "were measured on two machines: processor "),
        ({"machine": {"threads": 77}}, "were measured on two machines: threads "),
        ({"machine": {"isa": "abacus"}}, "were measured on two machines: isa "),
        ({"machine": {"gpu": "A"}}, "were measured on two machines: gpu "),
    ],
)
def test_files_that_cannot_be_compared(
    changed: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = measured(ROW, ONES, NEAR)
    assert compared(file_of(tmp_path / "a", row), file_of(tmp_path / "b", row, **changed)) == 2
    assert message in capsys.readouterr().err


def test_files_that_are_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = file_of(tmp_path / "a", measured(ROW, ONES, NEAR))
    bad = tmp_path / "b"
    assert compared(good, str(bad)) == 2
    bad.write_text("text")
    assert compared(good, str(bad)) == 2
    bad.write_text("[1]")
    assert compared(good, str(bad)) == 2
    missing, text, other = capsys.readouterr().err.splitlines()
    assert missing.endswith("b: No such file or directory")
    assert "b: expected JSON: " in text
    assert other.endswith("b: expected what diffseg bench --json writes")


def test_versions_that_differ_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = measured(ROW, ONES, NEAR)
    files = file_of(tmp_path / "a", row), file_of(tmp_path / "b", row, machine={"torch": "0.1"})
    assert compared(*files) == 0
    assert f"note: torch {torch.__version__} and 0.1" in capsys.readouterr().out
