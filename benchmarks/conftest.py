"""``pytest benchmarks/``: the rows of ``diffseg bench``, timed by pytest-benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from diffseg.bench import ceilings, command
from diffseg.bench.rows import rows_of
from diffseg.bench.suite import Suite
from diffseg.loading import UsageError


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rows", default="", metavar="OPTIONS", help="which, as options of diffseg bench (default: its subset)"
    )


@pytest.fixture(scope="session")
def suite(pytestconfig: pytest.Config) -> Iterator[Suite]:
    with Suite(command.parse(pytestconfig.getoption("rows"))) as made:
        yield made


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["diffseg"] = ceilings.machine(command.parse(config.getoption("rows")).device)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        try:
            settings = command.parse(metafunc.config.getoption("rows"))
        except UsageError as error:
            raise pytest.UsageError(f"--rows: {error}") from error
        rows = list(dict.fromkeys(rows_of(settings)))
        metafunc.parametrize("row", rows, ids=str, scope="module")
