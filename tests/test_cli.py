"""The command line, called as the entry point calls it, with the bundled model."""

import io
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffseg
from diffseg import cli, native, segment_command, semantics
from diffseg.bench import ceilings
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
    assert "bundled demonstration model, trained on generated scenes, in float32 on cpu" in captured.err
    assert "--model CompVis/stable-diffusion-v1-4" in captured.err


@pytest.fixture
def no_work(monkeypatch):
    """Fails where a model is loaded."""
    monkeypatch.setattr(diffseg.DiffSegPipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))


@pytest.mark.parametrize("given", ["in", "in/*", "in/*.png"])
def test_results_beside_the_images_are_no_inputs(folder, capsys, no_work, given):
    for seed in range(3):
        for kind in ("labels", "overlay"):
            Image.new("P", (64, 64)).save(f"in/scene{seed}_{kind}.png")
    assert cli.main(["segment", given, "-o", "in"]) == 0
    assert "3 of 3 images have outputs in in and are skipped" in capsys.readouterr().err
    assert len(list((folder / "in").iterdir())) == 9


def test_results_of_an_earlier_run_are_no_inputs_of_a_later_one(folder):
    for output in ("in", "segments"):
        assert cli.main(["segment", "in", "-o", output]) == 0
    assert len(list((folder / "in").iterdir())) == 9
    assert len(outputs(folder)) == 6


def test_results_elsewhere_are_images(folder):
    for kind in ("labels", "overlay"):
        Image.new("RGB", (64, 64)).save(f"in/scene0_{kind}.png")
    assert cli.main(["segment", "in"]) == 0
    assert len(outputs(folder)) == 10


@pytest.mark.parametrize("given", [["in"], ["in/scene0.png", "in/scene0_labels.png"]])
@pytest.mark.parametrize("output", ["in", "in/../in", "link"])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_an_input_is_never_overwritten(folder, capsys, no_work, given, output, force):
    (folder / "link").symlink_to("in")
    Image.new("RGB", (8, 8)).save("in/scene0_labels.png")
    content = Path("in/scene0_labels.png").read_bytes()
    assert cli.main(["segment", *given, "-o", output, *force]) == 2
    error = capsys.readouterr().err
    assert f"--output: in/scene0.png would be written to {output}/scene0_labels.png, which is an input too" in error
    assert Path("in/scene0_labels.png").read_bytes() == content


@pytest.mark.parametrize("given", [["in"], ["in/*.png"], ["in/scene2.png", "in/scene0.png", "in/scene1.png", "in"]])
def test_several_images(folder, capsys, given):
    assert cli.main(["segment", *given]) == 0
    assert outputs(folder) == [f"scene{i}_{kind}.png" for i in range(3) for kind in ("labels", "overlay")]
    shown = capsys.readouterr().err
    assert shown.count("/3 [") == 2  # of a log: at the start and at the end
    assert "3/3" in shown


def test_a_terminal_shows_each_image(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main(["segment", "in"]) == 0
    shown = capsys.readouterr().err
    assert all(f"{count}/3 [" in shown for count in range(4))


@pytest.mark.parametrize("given", ["in", "in/*"])
def test_hidden_files_are_no_images(folder, given):
    Path("in/._scene0.png").write_text("what macOS leaves on other file systems")
    files = segment_command._expand([given], Path("segments"))
    assert [path.name for path in files] == ["scene0.png", "scene1.png", "scene2.png"]


def test_names_that_the_output_cannot_spell_are_escaped(folder, monkeypatch):
    Path("in/scene0.png").rename("in/sc\u00e8ne.png")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    assert cli.main(["segment", "in/sc\u00e8ne.png"]) == 0
    assert written.getvalue().startswith(b"segments/sc\\xe8ne_overlay.png  ")


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


def test_results_of_other_settings_are_refused(folder, capsys):
    assert cli.main(["segment", "in/scene0.png"]) == 0
    before = (folder / "segments" / "scene0_labels.png").read_bytes()
    for options, changed in (
        (["--labels", "sky"], 'labels was null, is "sky"; semantic was false, is true'),
        (["--threshold", "0.5"], "threshold was null, is 0.5"),
    ):
        assert cli.main(["segment", "in", *options]) == 2
        assert f"diffseg: segments/scene0_labels.png is of other settings: {changed}." in capsys.readouterr().err
    assert (folder / "segments" / "scene0_labels.png").read_bytes() == before
    assert len(outputs(folder)) == 2
    assert cli.main(["segment", "in", "--threshold", "0.5", "--force"]) == 0
    assert cli.main(["segment", "in", "--threshold", "0.5"]) == 0


def test_what_a_killed_run_left_is_finished(folder):
    assert cli.main(["segment", "in"]) == 0
    expected = (folder / "segments" / "scene1_overlay.png").read_bytes()
    (folder / "segments" / "scene1_overlay.png").unlink()
    assert cli.main(["segment", "in"]) == 0
    assert (folder / "segments" / "scene1_overlay.png").read_bytes() == expected


def test_names_of_labels_that_are_replaced_go(folder):
    (folder / "segments").mkdir()
    (folder / "segments" / "scene0_segments.json").write_text("{}")
    assert cli.main(["segment", "in/scene0.png", "--force"]) == 0
    assert outputs(folder) == ["scene0_labels.png", "scene0_overlay.png"]


def test_a_run_that_is_terminated_leaves_nothing_half_written(folder):
    process = subprocess.Popen(
        [sys.executable, "-m", "diffseg.cli", "segment", "in"], stderr=subprocess.PIPE, text=True
    )
    while not (folder / "segments").exists() and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode in (130, 0, -signal.SIGTERM), error  # the latter two: it was done
    assert not [name for name in outputs(folder) if name.startswith(".")]


def test_an_unreadable_image_does_not_stop_the_others(folder, capsys):
    (folder / "in" / "scene1.png").write_text("no image")
    assert cli.main(["segment", "in"]) == 1
    captured = capsys.readouterr()
    said = [line for line in captured.err.splitlines() if "scene1.png" in line]
    assert said == ["in/scene1.png: expected a readable image, got a file of no known image format"]
    assert "1 of 3 images failed" in captured.err
    assert outputs(folder) == [f"scene{i}_{kind}.png" for i in (0, 2) for kind in ("labels", "overlay")]


def test_options_change_the_result(folder):
    def labels(*options):
        assert cli.main(["segment", "in/scene0.png", "--force", *options]) == 0
        return np.asarray(Image.open("segments/scene0_labels.png"))

    assert labels("--threshold", "50").max() == 0
    few = labels("--anchors", "1", "--threshold", "0.001", "--iterations", "1")
    assert few.max() == 0
    many = labels(
        "--threshold", "0.001", "--rule", "official", "--refine", "--backend", "reference", "--resolution", "32"
    )  # fmt: skip
    assert many.max() > 10
    assert labels("--resolution", "32", "--dtype", "bfloat16", "--device", "cpu").shape == (64, 64)
    whole = labels("--threshold", "0.01")
    assert not np.array_equal(labels("--threshold", "0.01", "--weights", "literal"), whole)
    assert not np.array_equal(labels("--threshold", "0.01", "--timestep", "900"), whole)


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
        (["in/scene0.png", "in/missing.png", "in"], "diffseg: in/missing.png: no such file"),
        (["empty"], "empty: expected a folder with images"),
        ([""], "IMAGE: expected a path, got an empty one"),
        (["in/scene0.png", "twin/scene0.png"], "would both write scene0_labels.png"),
        (["in", "-o", "in/scene0.png"], "--output: expected a folder, in/scene0.png is a file"),
        (["in", "-o", "in/scene0.png/below"], "--output: expected a folder, in/scene0.png is a file"),
        (["in", "--model", "nowhere/to/be/found"], "--model nowhere/to/be/found: no such folder"),
        (["in", "--model", "./nowhere"], "--model ./nowhere: no such folder"),
        (["in", "--labels", "sky", "--captioner", "/nowhere"], "--captioner /nowhere: no such folder"),
        (["in", "--device", "tpu"], "--device tpu: "),
        (["in", "--device", "meta"], "--device meta: "),
        (["in", "--device", "cpu", "--backend", "cuda"], "--backend='cuda' cannot run merge here: "),
    ],
)
def test_wrong_requests(folder, capsys, no_work, arguments, message):
    (folder / "empty").mkdir()
    (folder / "twin").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "twin" / "scene0.png")
    assert cli.main(["segment", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert outputs(folder) == []


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model_index.json", "[]", "TypeError: "),
        ("model_index.json", "{}", "KeyError: "),
        ("text_encoder/model.safetensors", "version https://git-lfs.github.com/spec/v1", "SafetensorError: "),
    ],
)
def test_a_checkpoint_that_cannot_be_loaded(folder, checkpoint, capsys, file, content, message):
    checkpoint = shutil.copytree(checkpoint, folder / "checkpoint")
    (checkpoint / file).write_text(content)
    assert cli.main(["segment", "in", "--model", str(checkpoint)]) == 2
    assert f"diffseg: --model {checkpoint}: {message}" in capsys.readouterr().err


def test_a_variant_of_the_files(folder, checkpoint, capsys):
    diffseg.DiffSegPipeline.from_pretrained(checkpoint).save_pretrained("half", variant="fp16")
    command = ["segment", "in/scene0.png", "--model"]
    assert cli.main([*command, "half"]) == 2
    assert "--model half: OSError: " in capsys.readouterr().err
    assert cli.main([*command, "half", "--variant", "fp16"]) == 0
    assert cli.main([*command, str(checkpoint), "-o", "whole"]) == 0
    found, expected = (Path(output, "scene0_labels.png") for output in ("segments", "whole"))
    assert np.array_equal(Image.open(found), Image.open(expected))
    assert cli.main(["segment", "in", "--variant", "fp16", "-o", "bundled"]) == 2
    assert "--variant: expected --model with it" in capsys.readouterr().err


def test_an_output_folder_that_is_read_only(folder, capsys, no_work, monkeypatch):
    def refuse(*, dir):
        raise PermissionError(13, "Permission denied", f"{dir}/x")

    (folder / "segments").mkdir()
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    said = "no file can be written into segments (Permission denied)\n"
    for output in ("segments", "segments/below"):
        assert cli.main(["segment", "in", "-o", output]) == 2
        assert capsys.readouterr().err == f"diffseg: --output: {said}"
    monkeypatch.setattr(ceilings, "measure", lambda *_: pytest.fail("measured"))
    for option in ("--json", "--plot"):
        assert cli.main(["bench", "merge", option, "segments/a.svg"]) == 2
        assert capsys.readouterr().err == f"diffseg: {option}: {said}"


def test_a_device_that_torch_was_not_built_for(folder, capsys, no_work, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch, "zeros", refuse)
    assert cli.main(["segment", "in", "--device", "cuda"]) == 2
    assert "--device cuda: Torch not compiled with CUDA enabled" in capsys.readouterr().err


def test_the_captioners_error_ends_the_run(folder, checkpoint, capsys, monkeypatch):
    tries = []

    def refuse(name, *_):
        tries.append(name)
        raise OSError("no connection")

    monkeypatch.setattr(semantics, "ModelCaptioner", refuse)
    monkeypatch.setattr(semantics, "tagger", lambda: None)
    model = ["--model", str(checkpoint), "--dtype", "float32", "--device", "cpu"]
    assert cli.main(["segment", "in", "--semantic", "--captioner", "owner/name", *model]) == 2
    error = capsys.readouterr().err
    assert f"using {checkpoint} in float32 on cpu" in error
    assert error.splitlines()[-1] == "diffseg: --captioner owner/name: no connection"
    assert tries == ["owner/name"]
    assert outputs(folder) == []


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "diffseg: interrupted\n"),
        (OSError(28, "No space left on device"), 1, "diffseg: [Errno 28] No space left on device\n"),
    ],
)
def test_errors_that_end_a_command(capsys, monkeypatch, raised, status, said):
    def run(options):
        raise raised

    monkeypatch.setattr(cli, "_info", run)
    assert cli.main(["info"]) == status
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seconds", "-1"], "--seconds: expected a positive number, got -1.0"),
        (["--seconds", "0"], "--seconds: expected a positive number, got 0.0"),
        (["--seconds", "nan"], "--seconds: expected a positive number, got nan"),
        (["--device", "meta"], "--device meta: "),
        (["--json", "in/scene0.png/a.json"], "--json: expected a folder, in/scene0.png is a file"),
        (["--json", "in"], "--json: expected a file that can be written, got in"),
        (["--plot", "in/scene0.png/a.svg"], "--plot: expected a folder, in/scene0.png is a file"),
    ],
)
def test_wrong_benchmarks_measure_nothing(folder, capsys, monkeypatch, words, message):
    monkeypatch.setattr(ceilings, "measure", lambda *_: pytest.fail("measured"))
    assert cli.main(["bench", "merge", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "kind", "values"),
    [
        ("--threshold", "float", ["-1", "0", "nan", "inf", "x"]),
        ("--anchors", "int", ["0", "1.5"]),
        ("--iterations", "int", ["0"]),
        ("--processing-resolution", "int", ["0"]),
        ("--batch-size", "int", ["x", "0", "1.5"]),
    ],
)
def test_numbers_that_no_model_takes(capsys, option, kind, values):
    for command in ["segment", "a.png"], ["evaluate", "folder", "."]:
        for value in values if (option, command[0]) != ("--batch-size", "evaluate") else []:
            with pytest.raises(SystemExit):
                cli.main([*command, f"{option}={value}"])
            error = capsys.readouterr().err
            assert f"argument {option}" in error
            assert f": expected a positive {kind}, got '{value}'" in error


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["segment"],
        ["segment", "a.png", "--rule", "both"],
        ["bench", "--case", "noise", "foo"],
        ["bench", "--backend", "magic"],
        ["paint"],
    ],
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: diffseg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--timestep=1000", "diffseg: --timestep: expected 0 to 999, got 1000"),
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


def test_info_names_the_instruction_set(isa, capsys):
    assert cli.main(["info"]) == 0
    assert f"instruction set of the C++ kernels: {isa} (here: " in capsys.readouterr().out


def test_an_instruction_set_that_this_machine_lacks(capsys, monkeypatch):
    pytest.importorskip("diffseg._cpu")
    monkeypatch.setenv("DIFFSEG_CPU_ISA", "foo")
    native.cpu.cache_clear()
    assert cli.main(["info"]) == 2
    assert capsys.readouterr().err.startswith("diffseg: DIFFSEG_CPU_ISA: expected one of ")


def test_the_installed_command():
    run = subprocess.run([sys.executable, "-m", "diffseg.cli", "--version"], capture_output=True, text=True)
    assert run.returncode == 0
    assert run.stdout.startswith("diffseg ")
