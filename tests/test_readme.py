"""The READMEs mean what they say: each "Equivalent to" is run against its op, and figures are those of results/."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import diffseg
from diffseg import evaluate
from diffseg.bench import compare, report

README = (Path(__file__).parents[1] / "README.md").read_text()


def equivalent(op: str) -> str:
    """The code that stands after "Equivalent to" in the section of an op: a fenced block, or inline."""
    section = re.search(rf"^### {op}$(.*?)(?=^##|\Z)", README, re.M | re.S)[1]
    given = section.partition("Equivalent to")[2]
    fenced = re.match(r"[^\n]*\n\n```python\n(.*?)```", given, re.S)
    return fenced[1] if fenced else re.search(r"`(.*?)`", given, re.S)[1]


def smooth_attention() -> torch.Tensor:
    """Rows that come in a few kinds, [64, 64]."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(4, 64, generator=generator) * 2
    noise = torch.randn(64, 64, generator=generator) * 0.3
    return torch.softmax(kinds.repeat_interleave(16, 0) + noise, -1)


def test_aggregate():
    generator = torch.Generator().manual_seed(0)
    queries, keys = ([torch.randn(2, n, 6, generator=generator) for n in (64, 16, 16)] for _ in range(2))
    names = {"queries": queries, "keys": keys, "ratios": [8 / 12, 2 / 12, 2 / 12], "h": 8, "w": 8}
    exec(equivalent("aggregate"), {"torch": torch, "F": F, "math": math, **names}, names)
    found = diffseg.aggregate([query[None] for query in queries], [key[None] for key in keys])[0]
    torch.testing.assert_close(found, names["total"].view(64, 64), rtol=1e-4, atol=1e-7)


def test_merge():
    attention = smooth_attention()
    cells = [0, 9, 20, 33, 40, 63]
    names = {"torch": torch, "attention": attention, "anchor_cells": cells, "threshold": 0.3, "iterations": 3}
    exec(equivalent("merge"), names)
    found = diffseg.merge(attention[None], anchors=cells, threshold=0.3)
    expected = torch.stack(names["proposals"])
    assert 1 < len(expected) < len(cells)
    assert found.counts.tolist() == [len(expected)]
    torch.testing.assert_close(found.maps[0, : len(expected)], expected, rtol=1e-4, atol=1e-7)


def test_label():
    proposals = diffseg.merge(smooth_attention()[None], anchors=4, threshold=0.3)
    names = {
        "F": F, "maps": proposals.maps[0], "count": int(proposals.counts), "grid": proposals.grid, "size": (24, 20),
    }  # fmt: skip
    assert torch.equal(eval(equivalent("label"), names).int(), diffseg.label(proposals, (24, 20)))


RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
MEASURED = {  # rows of the README's tables: which of those of this name, the file of results, and the row there
    ("queries and keys to labels", 0): ("-sd14-ops", "segment sd14"),
    ("`aggregate`, from queries and keys", 0): ("-sd14-ops", "aggregate sd14"),
    ("`aggregate_maps`, from attention maps", 0): ("-sd14-ops", "maps sd14"),
    ("queries and keys to labels", 1): ("", "segment bundled"),
    ("`merge`", 0): ("", "merge bundled"),
    ("`merge`, uniform noise", 0): ("", "merge noise"),
    ("`label`", 0): ("", "label bundled"),
}


def results(suffix: str) -> dict:
    """A committed run."""
    (path,) = RESULTS.glob(f"cpu-*-????-??-??{suffix}.json")
    return json.loads(path.read_text())


def measured(suffix: str, name: str) -> tuple[dict, dict]:
    """The C++ kernels and their baseline in a row of the committed results."""
    (row,) = (row for row in results(suffix)["rows"] if row["name"].startswith(f"{name} "))
    by_name = {each["name"]: each for each in row["contenders"]}
    subject = by_name.get("cpu") or next(each for each in row["contenders"] if each["role"] == "subject")
    return subject, by_name[row["baseline"]]


@pytest.mark.parametrize(("stage", "index"), MEASURED)
def test_tables_are_those_of_the_results(stage, index):
    subject, baseline = measured(*MEASURED[stage, index])
    line = [line for line in README.splitlines() if line.startswith(f"| {stage} |")][index]
    found = [cell.strip() for cell in line.strip("|").split("|")][1:]
    faster = subject["times_faster"]
    expected = [report.seconds(each["seconds"]["median"]) for each in (subject, baseline)]
    expected += [report.factor(faster["median"]), report.bounds(faster)]
    expected += [report.amount(each["memory_bytes"]) for each in (subject, baseline)]
    assert found == expected[: len(found)]
    assert len(found) >= 4


def against(suffix, name, peer):
    """A peer in a row of the committed results, and how many times faster than it the C++ kernels are there."""
    (row,) = (row for row in results(suffix)["rows"] if row["name"].startswith(f"{name} "))
    found = next(each for each in row["contenders"] if each["name"] == peer)
    return found, next(each["times_faster"] for each in row["against_peers"] if each["peer"] == peer)


def contender(suffix, name):
    """Of :func:`measured`, and what segmentation adds in per cent, with its bounds."""
    subject, baseline = measured(suffix, name)
    faster = subject["times_faster"]
    return subject, baseline, [100 * (1 / faster[each] - 1) for each in ("median", "high", "low")]


@pytest.mark.parametrize(("dtype", "suffix"), [("bfloat16", "-sd14-bfloat16"), ("float32", "-sd14")])
def test_what_segmentation_adds_is_as_measured(dtype, suffix):
    subject, baseline, (adds, low, high) = contender(suffix, "pipeline sd14")
    bare, whole = (f"{each['seconds']['median']:.1f} s" for each in (baseline, subject))
    assert f"| {dtype} | {bare} | {whole} | {adds:.0f} % | {low:.0f} to {high:.0f} % |" in README


def test_figures_in_the_text_are_as_measured():
    text = " ".join(README.split())
    subject, baseline, _ = contender("", "pipeline bundled")
    faster = subject["times_faster"]
    assert f"takes {report.seconds(subject['seconds']['median'])}, less than" in text
    assert f"alone, {report.seconds(baseline['seconds']['median'])} ({report.factor(faster['median'])} times, " in text
    assert f"{report.bounds(faster)}): the pass ends" in text
    subject, baseline, _ = contender("-folder", "folder bundled")
    low, median, high = (f"{subject['times_faster'][each]:.1f}" for each in ("low", "median", "high"))
    assert f"it is {median} times ({low} to {high}) as fast as a loop" in text
    held, loop = (report.amount(each["memory_bytes"]) for each in (subject, baseline))
    assert f"holds {held} in place of {loop.removesuffix(' MiB')} (" in text
    for name, peer, said in (
        ("aggregate sd14", "sdpa", "`aggregate` is {median:.1f} times ({low:.1f} to {high:.1f}) as fast as"),
        ("maps sd14", "copy", "bytes takes {median:.2f} times ({low:.2f} to {high:.2f}) as long"),
    ):
        assert said.format(**against("-sd14-ops", name, peer)[1]) in text
    ceilings = results("-sd14-ops")["ceilings"]
    limits = (f"{value / 1e9:.0f} G" for value in (ceilings["products"]["float32"], ceilings["exponentials"]))
    assert "at most {}FLOP/s and {} exponentials/s in registers".format(*limits) in text
    shares = [measured("-sd14-ops", name)[0]["floor_share"] for name in ("aggregate sd14", "maps sd14")]
    assert f"`aggregate` uses {shares[0]:.0%}; `aggregate_maps` uses {shares[1]:.0%}" in text.replace(" %", "%")


def test_the_published_code_is_as_measured():
    subject, baseline = measured("-published", "published golden")
    published, faster = against("-published", "published golden", "published code (TensorFlow)")
    times = [report.seconds(each["seconds"]["median"]) for each in (subject, baseline, published)]
    memory = [report.amount(each["memory_bytes"]) for each in (subject, baseline, published)]
    assert f"| C++ kernels | {times[0]} | {memory[0]} | |" in README
    for name, row, ratio in (("plain torch", 1, subject["times_faster"]), ("published code", 2, faster)):
        said = f"| {name} | {times[row]} | {memory[row]} | {report.factor(ratio['median'])} ({report.bounds(ratio)}) |"
        assert said in README


def test_the_bounds_hold_as_much_of_a_second_run_as_is_said():
    first, second = (dict(compare._ratios(results(suffix))) for suffix in ("", "-second"))
    pairs = [compare.Pair(*key, first[key], second[key]) for key in first]
    held = [
        one["low"] <= other["median"] <= one["high"]
        for pair in pairs
        for one, other in ((pair.first, pair.second), (pair.second, pair.first))
    ]
    share = f"{100 * sum(held) / len(held):.0f}"
    text = " ".join((RESULTS.parent / "README.md").read_text().split())
    assert f"agree in all {sum(pair.agree for pair in pairs)} ratios; {sum(pair.within for pair in pairs)} lie" in text
    assert f"of the {len(held)} that either run holds against the other's bounds {sum(held)} lie" in text
    assert f"lie within, {share} in 100" in text
    assert f"between two committed runs, {share} % of the figures fell within." in " ".join(README.split())


def test_the_evaluation_is_that_of_the_results():
    methods = json.loads((RESULTS / "bsds500-val-bundled-model.json").read_text())["methods"].values()
    figures = {each["title"]: {name: each[name] for name in each if name != "title"} for each in methods}
    assert "\n".join(evaluate.markdown_table(figures)) in README


@pytest.mark.parametrize(("stage", "series"), [("aggregate", "cells"), ("merge", "cells"), ("merge", "anchors")])
def test_growth_is_as_measured(stage, series):
    rows = [row for row in results("-growth")["rows"] if row["stage"] == stage and series in row["series"]]
    rows.sort(key=lambda row: (row["grid"], row["anchors"]))
    text = (RESULTS.parent / "README.md").read_text().partition("Growth, milliseconds")[2]
    lines = text.split("\n\n")[1 if series == "cells" else 2].splitlines()
    for contender, role in (("C++", "subject"), ("eager", "baseline")):
        (said,) = (line.split("|")[2:-1] for line in lines if line.startswith(f"| `{stage}`, {contender} |"))
        seconds = [min(each["seconds"]["median"] for each in row["contenders"] if each["role"] == role) for row in rows]
        assert list(map(float, said)) == pytest.approx([1000 * each for each in seconds], rel=0.05)
