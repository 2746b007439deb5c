"""The command line, called as the entry point calls it, with the bundled model."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from diffseg import cli
from diffseg.tiny import scenes


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of three scenes, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for seed in range(3):
        Image.fromarray(scenes.scene(seed)[0]).save(tmp_path / "in" / f"scene{seed}.png")
    return tmp_path


def outputs(folder):
    return sorted(path.name for path in folder.glob("segments/*"))


def test_one_image(folder, capsys):
    assert cli.main(["segment", "in/scene0.png", "-o", "here/there"]) == 0
    labels = np.asarray(Image.open("here/there/scene0_labels.png"))
    overlay = Image.open("here/there/scene0_overlay.png")
    assert labels.shape == (64, 64)
    assert overlay.size == (64, 64)
    captured = capsys.readouterr()
    assert captured.out.split() == ["here/there/scene0_overlay.png", str(labels.max() + 1), "segments"]
    assert "bundled demonstration model" in captured.err
    assert "--model CompVis/stable-diffusion-v1-4" in captured.err


@pytest.mark.parametrize("given", [["in"], ["in/*.png"], ["in/scene2.png", "in/scene0.png", "in/scene1.png", "in"]])
def test_several_images(folder, capsys, given):
    assert cli.main(["segment", *given]) == 0
    assert outputs(folder) == [f"scene{i}_{kind}.png" for i in range(3) for kind in ("labels", "overlay")]
    assert "3/3" in capsys.readouterr().err


def test_existing_outputs_are_kept(folder, capsys):
    (folder / "segments").mkdir()
    for kind in ("labels", "overlay"):
        (folder / "segments" / f"scene1_{kind}.png").write_text("precious")
    assert cli.main(["segment", "in"]) == 0
    assert (folder / "segments" / "scene1_labels.png").read_text() == "precious"
    assert "1 of 3 images have outputs in segments and are skipped (--force overwrites)" in capsys.readouterr().err
    assert outputs(folder) == [f"scene{i}_{kind}.png" for i in range(3) for kind in ("labels", "overlay")]
    assert cli.main(["segment", "in/scene1.png", "--force"]) == 0
    assert Image.open("segments/scene1_labels.png").size == (64, 64)


def test_incomplete_outputs_are_reported(folder, capsys):
    (folder / "segments").mkdir()
    (folder / "segments" / "scene1_labels.png").write_text("precious")
    assert cli.main(["segment", "in"]) == 1
    message = (
        "diffseg: in/scene1.png: incomplete: segments/scene1_labels.png exists, segments/scene1_overlay.png is missing "
        "(--force redoes it)"
    )
    assert message in capsys.readouterr().err.splitlines()
    assert (folder / "segments" / "scene1_labels.png").read_text() == "precious"
    assert outputs(folder) == [
        "scene0_labels.png", "scene0_overlay.png", "scene1_labels.png", "scene2_labels.png", "scene2_overlay.png"
    ]  # fmt: skip
    assert cli.main(["segment", "in"]) == 1
    assert cli.main(["segment", "in/scene1.png", "--force"]) == 0
    assert cli.main(["segment", "in"]) == 0


def test_names_asked_for_after_a_plain_run(folder, capsys):
    assert cli.main(["segment", "in/scene0.png"]) == 0
    assert cli.main(["segment", "in/scene0.png", "--labels", "sky"]) == 1
    assert (
        "segments/scene0_labels.png and segments/scene0_overlay.png exist, segments/scene0_segments.json is missing"
    ) in capsys.readouterr().err


def test_an_unreadable_image_does_not_stop_the_others(folder, capsys):
    (folder / "in" / "scene1.png").write_text("no image")
    assert cli.main(["segment", "in", "in/missing.png"]) == 1
    captured = capsys.readouterr()
    assert "in/scene1.png: expected a readable image" in captured.err
    assert "in/missing.png" in captured.err
    assert "2 of 4 images failed" in captured.err
    assert outputs(folder) == [f"scene{i}_{kind}.png" for i in (0, 2) for kind in ("labels", "overlay")]


def test_options_change_the_result(folder):
    def labels(*options):
        assert cli.main(["segment", "in/scene0.png", "--force", *options]) == 0
        return np.asarray(Image.open("segments/scene0_labels.png"))

    assert labels("--threshold", "50").max() == 0
    few = labels("--anchors", "1", "--threshold", "0.001", "--iterations", "1")
    assert few.max() == 0
    many = labels("--threshold", "0.001", "--rule", "official", "--refine", "--backend", "reference")
    assert many.max() > 10
    assert labels("--resolution", "32", "--dtype", "bfloat16", "--device", "cpu").shape == (64, 64)


def test_time_prints_stages(folder, capsys):
    assert cli.main(["segment", "in/scene0.png", "--time"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[1:]] == [
        "preprocess", "encode", "unet", "aggregate", "merge", "label"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing/*.png"], "nothing/*.png: no file matches"),
        (["empty"], "empty: expected a folder with images"),
        (["in/scene0.png", "twin/scene0.png"], "would both write scene0_labels.png"),
        (["in", "-o", "in/scene0.png"], "--output: expected a folder, in/scene0.png is a file"),
        (["in", "--model", "nowhere/to/be/found"], "--model nowhere/to/be/found:"),
    ],
)
def test_wrong_requests(folder, capsys, arguments, message):
    (folder / "empty").mkdir()
    (folder / "twin").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "twin" / "scene0.png")
    assert cli.main(["segment", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert outputs(folder) == []


@pytest.mark.parametrize("arguments", [[], ["segment"], ["segment", "a.png", "--rule", "both"], ["paint"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: diffseg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--threshold=-1", "diffseg: --threshold: expected positive"),
        ("--anchors=0", "diffseg: --anchors: expected at least 1, got 0"),
        ("--iterations=0", "diffseg: --iterations: expected at least 1, got 0"),
        ("--resolution=0", "diffseg: --resolution: expected at least 1, got 0"),
        ("--keep-masks", "diffseg: --keep-masks: expected --semantic, --caption or --labels with it"),
        ("--captioner=blip", "diffseg: --captioner: expected --semantic, --caption or --labels with it"),
    ],
)
def test_wrong_options_are_named_once(folder, capsys, option, message):
    assert cli.main(["segment", "in", option]) == 2
    assert capsys.readouterr().err.count(message) == 1
    assert outputs(folder) == []


def test_info(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    for word in ("diffseg", "torch", "cpu", "reference", "C++ kernels"):
        assert word in printed


def test_the_installed_command():
    run = subprocess.run([sys.executable, "-P", "-m", "diffseg.cli", "--version"], capture_output=True, text=True)
    assert run.returncode == 0
    assert run.stdout.startswith("diffseg ")
