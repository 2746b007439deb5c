"""Runs that are killed and continued, and runs of two processes."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from diffseg import datasets, runs

IMAGES = 24

SCRIPT = """
import sys, time
from pathlib import Path
from diffseg import datasets, runs

root, folder, pause = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
state = runs.processes("cpu")
try:
    runs.on_main(state, lambda: datasets.open_dataset("folder", root / "nowhere"))
except runs.UsageError as error:
    (root / f"error-{state.process_index}").write_text(str(error))
dataset = runs.on_main(state, lambda: datasets.open_dataset("folder", root))

def work(sample):
    time.sleep(pause)
    return {"sum": int(sample.image.sum())}

with runs.claimed(state, folder, {"one": 1}):
    runs.process_dataset(state, dataset, folder, work, lambda result: "")
state.destroy_process_group()
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for index in range(IMAGES):
        for kind, shape in (("images", (4, 5, 3)), ("masks", (4, 5))):
            (root / kind).mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 9, shape, dtype=np.uint8)).save(root / kind / f"{index:02}.png")
    (root / "script.py").write_text(SCRIPT)
    return root


@pytest.fixture
def dataset(root):
    return datasets.open_dataset("folder", root)


def work(sample):
    return {"sum": int(sample.image.sum())}


def go(dataset, folder, work=work, watch=lambda result: ""):
    state = runs.processes("cpu")
    with runs.claimed(state, folder, {"one": 1}):
        return runs.process_dataset(state, dataset, folder, work, watch)


def names(folder):
    return [
        json.loads(line)["name"] for path in folder.glob("images-*.jsonl") for line in path.read_text().splitlines()
    ]


def test_results_in_the_data_sets_order(dataset, tmp_path):
    seen = []
    found = go(dataset, tmp_path, watch=lambda result: seen.append(result) or "")
    assert found == {item.name: work(dataset.load(index)) for index, item in enumerate(dataset.items)}
    assert list(found) == [f"{index:02}" for index in range(IMAGES)]
    assert seen == list(found.values())


def test_a_killed_run_loses_no_finished_image(root, dataset, tmp_path):
    process = subprocess.Popen([sys.executable, root / "script.py", root, tmp_path, "0.1"], stderr=subprocess.DEVNULL)
    file = tmp_path / "images-00000.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (file.exists() and file.read_bytes().count(b"\n") >= 3):
        time.sleep(0.01)
    with pytest.raises(runs.UsageError, match=rf"another run writes into it \(process {process.pid} on .*\): wait"):
        go(dataset, tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = names(tmp_path)
    assert 3 <= len(kept) < IMAGES
    redone = []

    def counting(sample):
        redone.append(sample.name)
        return work(sample)

    found = go(dataset, tmp_path, counting)
    assert kept + redone == list(found)
    assert found == go(dataset, tmp_path / "whole")


def test_a_line_cut_short_is_done_again(dataset, tmp_path):
    whole = go(dataset, tmp_path)
    file = tmp_path / "images-00000.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:5]) + lines[5][:-3])
    (tmp_path / "images-00001.jsonl").write_bytes(lines[6] + b'{"name":"07"')  # of a process that is not there now
    redone = []

    def counting(sample):
        redone.append(sample.name)
        return work(sample)

    assert go(dataset, tmp_path, counting) == whole
    assert redone == ["05", *(f"{index:02}" for index in range(7, IMAGES))]


def test_two_processes_share_the_images(root, dataset, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, root / "script.py", root, tmp_path, "0"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    parts = [
        [json.loads(line)["name"] for line in path.read_text().splitlines()]
        for path in sorted(tmp_path.glob("images-*.jsonl"))
    ]
    assert parts == [[f"{index:02}" for index in range(first, IMAGES, 2)] for first in (0, 1)]
    assert runs.finished(tmp_path) == go(dataset, tmp_path / "alone")
    errors = [(root / f"error-{process}").read_text() for process in (0, 1)]
    assert "nowhere: expected a data set's folder, of layout folder" in errors[0]
    assert errors[0] == errors[1]


def test_a_sample_that_cannot_be_read_is_named(root, tmp_path, dataset):
    broken = datasets.open_dataset("folder", root, classes=3)
    with pytest.raises(runs.UsageError, match=r"masks/00.png: expected labels of the 3 classes, .* are kept"):
        go(broken, tmp_path)
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(dataset.items[0].image.read_bytes()[:60])
    item = dataset.items[0]._replace(image=truncated)
    damaged = datasets.Dataset("folder", (item,), dataset.format, None, None)
    with pytest.raises(runs.UsageError, match=r"truncated.png or .*00.png: damaged"):
        go(damaged, tmp_path)


def test_settings_claim_a_folder(tmp_path):
    runs.claim(tmp_path / "new", {"a": 1, "b": ("x", 2.5)})
    runs.claim(tmp_path / "new", {"b": ["x", 2.5], "a": 1})
    (tmp_path / "new" / "images-00000.jsonl").write_text('{"name": "00", "result": {}}\n')
    with pytest.raises(
        runs.UsageError, match=r'new holds results of other settings: a was 1, is 2; c was null, is "d"'
    ):
        runs.claim(tmp_path / "new", {"a": 2, "b": ["x", 2.5], "c": "d"})


def test_a_folder_without_results_takes_other_settings(tmp_path):
    for settings in ({"a": 1}, {"a": 2}):
        runs.claim(tmp_path, settings)
        (tmp_path / "images-00000.jsonl").touch()
        assert json.loads((tmp_path / "settings.json").read_text()) == settings


def test_a_folder_is_one_runs_at_a_time(tmp_path):
    state = runs.processes("cpu")

    def claimed(folder):
        return runs.claimed(state, folder, {"a": 1})

    def interrupted():
        with claimed(tmp_path / "one"), claimed(tmp_path / "other"):
            for _ in range(2):
                with pytest.raises(runs.UsageError, match=f"one: another run writes .* {os.getpid()} on "):
                    claimed(tmp_path / "one").__enter__()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    with claimed(tmp_path / "one"):
        assert [path.name for path in sorted((tmp_path / "one").iterdir())] == [".lock", "settings.json"]


def test_where_files_cannot_be_locked_runs_go_on(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runs.fcntl, "flock", refuse)
    with runs.claimed(runs.processes("cpu"), tmp_path, {"a": 1}):
        assert (tmp_path / "settings.json").exists()


def test_a_folder_that_cannot_be_locked_since_nothing_can_be_written(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(runs.Path, "open", refuse)
    with (
        pytest.raises(runs.UsageError, match=r"--output: .*Permission denied"),
        runs.claimed(runs.processes("cpu"), tmp_path, {"a": 1}),
    ):
        pass


def test_an_output_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(runs.UsageError, match=r"--output: expected a folder, .*file is a file"):
        runs.claim(tmp_path / "file" / "below", {})


def test_an_output_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(runs.Path, "write_text", refuse)
    with pytest.raises(runs.UsageError, match=r"--output: .*Permission denied"):
        runs.claim(tmp_path / "new", {})


def test_the_first_error_of_writing_is_the_one_that_comes(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    for folder, error in (("file", "Not a directory"), ("loop", "symbolic links")):
        with pytest.raises(OSError, match=error) as raised:
            runs.write_text(tmp_path / folder / "out.json", "text")
        assert raised.value.__context__ is None


def test_a_file_that_cannot_be_replaced_leaves_nothing_behind(tmp_path):
    (tmp_path / "out.json").mkdir()
    with pytest.raises(OSError, match="directory"):
        runs.write_text(tmp_path / "out.json", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "images-00000.jsonl").write_text('{"name":"a","result":{}}\nrubbish\n')
    with pytest.raises(runs.UsageError, match=r"images-00000.jsonl: line 2: expected a result"):
        runs.finished(tmp_path)
