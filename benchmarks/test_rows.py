"""Every contender of every row, checked and then timed by pytest-benchmark in rounds of its own.

``diffseg bench`` interleaves the contenders of a row, so its ratios hold on a busy machine; use this for
pytest-benchmark's histograms, storage and comparison of runs.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from diffseg.bench import run
from diffseg.bench.cases import Unavailable
from diffseg.bench.rows import Plan, Row
from diffseg.bench.suite import Suite
from diffseg.bench.timing import SHORTEST_SAMPLE, Timer

ROUNDS = 5
MOST_CONTENDERS = 8  # of a row: tests are made before a row's contenders are known


@pytest.fixture(scope="module")
def plan(suite: Suite, row: Row) -> Plan:
    try:
        with torch.no_grad():
            made = suite.plan(row)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert len(made.contenders) <= MOST_CONTENDERS, "contenders would be left out: raise MOST_CONTENDERS"
    return made


@pytest.mark.parametrize("position", range(MOST_CONTENDERS))
def test_row(benchmark: Any, suite: Suite, row: Row, plan: Plan, position: int) -> None:
    if position >= len(plan.contenders):
        pytest.skip("the row has fewer contenders")
    contender = plan.contenders[position]
    if contender.elsewhere or contender.minus is not None:
        pytest.skip("timed by diffseg bench only")
    with torch.no_grad():
        timer = Timer(suite.device, 0.0)
        timed = run.checked(contender, plan.inputs[0], timer)
        timer.size_up([timed], plan.inputs)
        benchmark.group = str(row)
        benchmark.name = contender.name
        benchmark.fullname = f"{row}: {contender.name}"  # by which runs are compared: positions differ by machine
        benchmark.extra_info.update(
            role=contender.role, checked=contender.check is not None, first_seconds=timed.cold,
            memory_bytes=timed.memory,
        )  # fmt: skip
        inputs = itertools.cycle(plan.inputs)

        def call() -> None:
            contender.run(next(inputs))
            if suite.device.type == "cuda":
                torch.cuda.synchronize(suite.device)

        calls = max(1, math.ceil(SHORTEST_SAMPLE / max(timed.seconds, 1e-7)))
        benchmark.pedantic(call, rounds=ROUNDS, iterations=calls, warmup_rounds=1)
