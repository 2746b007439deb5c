"""``diffseg evaluate`` and ``diffseg study`` with the bundled model on small data sets written here."""

import argparse
import csv
import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import diffseg
from diffseg import backends, cli, datasets, evaluate, metrics, runs, study, visualize
from diffseg.methods import TITLES, Settings, count_segments
from diffseg.tiny.scenes import REPORT_SEEDS, scene

QUICK = ["--processing-resolution", "32", "--threshold", "0.8"]
SCENES = 5


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Generated scenes as a ``folder`` data set."""
    root = tmp_path_factory.mktemp("scenes")
    for index, seed in enumerate(REPORT_SEEDS[:SCENES]):
        image, truth = scene(seed)
        for kind, array in (("images", image), ("masks", truth)):
            (root / kind).mkdir(exist_ok=True)
            Image.fromarray(array).save(root / kind / f"scene{index}.png")
    return root


@pytest.fixture(scope="module")
def whole(scenes, tmp_path_factory):
    """A run that nothing disturbed: all methods, three scenes."""
    output = tmp_path_factory.mktemp("whole")
    assert run(scenes, output, "--methods", "all", "--limit", "3") == 0
    return output


def run(root, output, *options, kind="folder"):
    return cli.main(["evaluate", kind, str(root), "-o", str(output), *QUICK, *options])


def results(output):
    return json.loads((output / "results.json").read_text())


def lines(output):
    return [
        json.loads(line)["name"] for path in output.glob("images-*.jsonl") for line in path.read_text().splitlines()
    ]


def test_every_method(whole):
    found = results(whole)
    assert found["images"] == found["settings"]["limit"] == 3
    assert list(found["methods"]) == list(TITLES)
    assert found["methods"]["kmeans-c"]["title"] == f"K-Means-C (k = {found['settings']['clusters']})"
    for figures in found["methods"].values():
        assert 0 < figures["accuracy"] <= 1
        assert 0 < figures["covering"] <= 1
        assert "covering_best" not in figures  # one truth an image
    accuracy = {method: figures["accuracy"] for method, figures in found["methods"].items()}
    assert accuracy["one-segment"] < min(accuracy["diffseg"], accuracy["kmeans-s"])
    assert Image.open(whole / "sheet.png").size[1] > 600  # a row for each of the three
    assert "root" not in found["settings"]


def test_figures_are_those_of_the_pipeline(whole):
    pipe = diffseg.DiffSegPipeline.from_pretrained(diffseg.tiny.MODEL)
    pipe.set_progress_bar_config(disable=True)
    scores = metrics.RegionScores()
    for seed in REPORT_SEEDS[:3]:
        image, truth = scene(seed)
        labels = pipe(image, threshold=0.8, processing_resolution=32).labels[0]
        scores.add([metrics.confusion(labels, truth)])
    stored = results(whole)["methods"]["diffseg"]
    assert scores.figures() == pytest.approx({name: stored[name] for name in scores.figures()}, abs=1e-9)


def test_table_has_every_figure():
    rows = list(evaluate.markdown_table({"DiffSeg": {"accuracy": 0.5, "miou": 0.25}}))
    assert rows == ["| method | pixel accuracy | mIoU |", "| --- | --- | --- |", "| DiffSeg | 0.500 | 0.250 |"]


def test_classes_are_matched_per_image_and_pooled(scenes, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("scene1\nscene0\n")
    assert run(scenes, tmp_path, "--classes", "8", "--image-list", str(names)) == 0
    assert results(tmp_path)["settings"]["image_list"] == "names.txt"
    found = results(tmp_path)["methods"]["diffseg"]
    assert set(found) == {"title", "accuracy_per_image", "miou_per_image", "accuracy_pooled", "miou_pooled"}
    assert found["accuracy_pooled"] <= found["accuracy_per_image"]


def test_an_interrupted_run_does_no_image_twice(scenes, tmp_path, monkeypatch):
    loaded = []
    load = datasets.Dataset.load

    def interrupted(dataset, index):
        if len(loaded) == 2:
            raise KeyboardInterrupt
        loaded.append(index)
        return load(dataset, index)

    with monkeypatch.context() as patch:
        patch.setattr(datasets.Dataset, "load", interrupted)
        assert run(scenes, tmp_path) == 130
    assert lines(tmp_path) == ["scene0", "scene1"]
    assert run(scenes, tmp_path, "--limit", "4") == 0  # another limit is no other setting
    assert lines(tmp_path) == [f"scene{index}" for index in range(4)]
    assert results(tmp_path)["images"] == 4


def test_other_settings_are_refused(scenes, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "copy")
    variant = str(tmp_path / "variant")
    diffseg.DiffSegPipeline.from_pretrained(diffseg.tiny.MODEL).save_pretrained(variant, variant="fp16")
    for options, message in (
        (["--methods", "all", "--threshold", "0.07"], "threshold was 0.8, is 0.07"),
        (["--methods", "diffseg"], 'methods was ["diffseg", '),
        (["--methods", "all", "--seed", "1"], "seed was 0, is 1"),
        (["--methods", "all", "--clusters", "11"], "is 11"),
        (["--methods", "all", "--dtype", "bfloat16"], 'dtype was "float32", is "bfloat16"'),
        (["--methods", "all", "--model", str(diffseg.tiny.MODEL)], 'model was "bundled"'),
        (["--methods", "all", "--model", variant, "--variant", "fp16"], 'variant was null, is "fp16"'),
    ):
        assert run(scenes, tmp_path / "copy", "--limit", "3", *options) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "holds results of other settings" in error
        assert "another --output" in error
    assert results(tmp_path / "copy") == results(whole)


def test_the_model_and_its_dtype_are_told_apart_by_what_they_are(monkeypatch):
    """A folder is one model however it is written, and a dtype that was not given is the one that was chosen."""
    monkeypatch.chdir(Path(diffseg.tiny.MODEL).parent)
    pipe = SimpleNamespace(unet=SimpleNamespace(dtype=torch.float16))
    described = {}
    for model in (None, "CompVis/stable-diffusion-v1-4", Path(diffseg.tiny.MODEL).name, str(diffseg.tiny.MODEL)):
        words = ["folder", "root", *(["--model", model] if model else [])]
        parser = argparse.ArgumentParser()
        evaluate.add_arguments(parser)
        described[model] = evaluate.described_run(parser.parse_args(words), pipe, Settings(threshold=1.0, timestep=1))
    folder = str(Path(diffseg.tiny.MODEL).resolve())
    assert [each["model"] for each in described.values()] == [
        "bundled",
        "CompVis/stable-diffusion-v1-4",
        folder,
        folder,
    ]
    assert {each["dtype"] for each in described.values()} == {"float16"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "diffseg,magic"], "--methods: expected some of diffseg, "),
        (["--limit", "0"], "--limit: expected at least 1, got 0"),
        (["--clusters", "0"], "--clusters: expected at least 1, got 0"),
        (["--timestep", "1000"], "--timestep: expected 0 to 999, got 1000"),
        (["--seed", "-1"], "--seed: expected 0 to 4294967295, got -1"),
        (["--split", "train"], "--split: expected a layout that has splits, got folder and 'train'"),
        (["--device", "tpu"], "--device tpu: "),
        (["--device", "meta"], "--device meta: "),
        (["--image-list", "nowhere.txt"], "nowhere.txt: expected a text file"),
        (["--model", "nowhere/at/all"], "--model nowhere/at/all: no such folder"),
    ],
)
def test_wrong_requests(scenes, tmp_path, capsys, options, message):
    assert run(scenes, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "triton"], "--backend='triton' cannot run merge here: "),
        (["-o", "file/below"], "--output: expected a folder, file is a file"),
    ],
)
def test_what_cannot_run_is_said_before_loading(scenes, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    monkeypatch.setattr(backends, "_TRITON_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(diffseg.DiffSegPipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert run(scenes, "out", *options) == 2
    assert message in capsys.readouterr().err


def test_coco_stuff_from_its_layout(tmp_path, capsys):
    for name in ("000000000139", "000000000724"):
        image = Image.new("RGB", (420, 360), (90, 140, 220))
        image.paste((60, 120, 40), (0, 180, 420, 360))
        labels = np.full((360, 420), 156, np.uint8)  # sky
        labels[180:] = 123  # grass
        labels[:, 200:210] = 255
        for folder, picture, suffix in (
            ("val2017", image, "jpg"),
            ("annotation_val2017", Image.fromarray(labels), "png"),
        ):
            (tmp_path / "coco" / folder).mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / "coco" / folder / f"{name}.{suffix}")
    assert run(tmp_path / "coco", tmp_path / "out", "--methods", "kmeans-s,one-segment", kind="coco-stuff") == 0
    figures = results(tmp_path / "out")["methods"]
    assert figures["kmeans-s"]["accuracy_per_image"] > 0.95
    assert figures["one-segment"]["accuracy_per_image"] == pytest.approx(0.5, abs=0.01)
    assert figures["one-segment"]["miou_per_image"] == pytest.approx(0.25, abs=0.01)  # of the two classes there
    assert "pixel accuracy (matched once, pooled)" in capsys.readouterr().out


@pytest.mark.parametrize(("command", "package"), [("evaluate", "sklearn"), ("study", "matplotlib")])
def test_a_missing_package_is_named_at_the_start(scenes, tmp_path, capsys, monkeypatch, command, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    assert cli.main([command, "folder", str(scenes), "-o", str(tmp_path / "out")]) == 2
    assert f"{package} not installed: pip install -e '.[evaluate]' in a checkout" in capsys.readouterr().err


def test_bad_files_are_listed_before_any_work(scenes, tmp_path, capsys):
    root = tmp_path / "bad"
    shutil.copytree(scenes, root)
    (root / "masks" / "scene4.png").unlink()
    (root / "images" / "scene3.png").write_bytes(b"\x89PNG")
    assert run(root, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "2 of 5 images cannot be used" in error
    assert "scene4.png: missing" in error
    assert "scene3.png: damaged" in error
    assert not (tmp_path / "out").exists()


def test_a_file_damaged_within_is_named_while_segments_are_counted(scenes, tmp_path, capsys):
    root = tmp_path / "damaged"
    shutil.copytree(scenes, root)
    image = root / "images" / "scene1.png"
    content = image.read_bytes()
    image.write_bytes(content[:2000] + bytes(200) + content[2200:])
    assert run(root, tmp_path / "out", "--methods", "kmeans-c") == 2
    assert "scene1.png: damaged (" in capsys.readouterr().err


def test_a_label_outside_the_map_stops_and_keeps_the_rest(scenes, tmp_path, capsys):
    root = tmp_path / "outside"
    shutil.copytree(scenes, root)
    Image.fromarray(np.full((64, 64), 9, np.uint8)).save(root / "masks" / "scene1.png")
    assert run(root, tmp_path / "out", "--classes", "8") == 2
    assert "scene1.png: expected labels of the 8 classes, got 9 (finished images are kept)" in capsys.readouterr().err
    assert lines(tmp_path / "out") == ["scene0"]


@pytest.mark.parametrize("command", ["evaluate", "study"])
def test_a_folder_that_another_run_writes_into(scenes, tmp_path, capsys, command):
    with runs.claimed(runs.processes("cpu"), tmp_path, {}):
        assert cli.main([command, "folder", str(scenes), "-o", str(tmp_path), *QUICK]) == 2
    assert f"{tmp_path}: another run writes into it (process " in capsys.readouterr().err
    assert lines(tmp_path) == []


def test_a_folder_that_is_not_ours(scenes, tmp_path, capsys):
    (tmp_path / "settings.json").write_text("not JSON")
    assert run(scenes, tmp_path) == 2
    assert "settings.json: expected the settings of a run" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert run(scenes, tmp_path / "file") == 2
    assert "--output: expected a folder" in capsys.readouterr().err


def test_best_median_and_worst_are_distinct():
    for count in (1, 2, 3, 4, 9, 20):
        ranked = [(1 - index / count, index) for index in range(count)]
        chosen = [index for group in evaluate._best_median_worst(ranked).values() for _, index in group]
        assert chosen == sorted(set(chosen))
        assert chosen[0] == 0
        assert chosen[-1] == count - 1
        assert len(chosen) == min(count, 9 if count >= 9 else 3)


def test_a_truth_without_labels_counts_as_one_segment():
    assert count_segments([np.full((2, 2), -1)]) == 1
    assert count_segments([np.array([[0, 1], [2, -1]]), np.array([[0, 0], [0, 4]])]) == 2


def test_typical_segments_are_the_mean(scenes):
    dataset = datasets.open_dataset("folder", scenes)
    last = replace(dataset, items=dataset.items[2:])
    regions = [int(scene(seed)[1].max()) + 1 for seed in REPORT_SEEDS[2:SCENES]]
    assert evaluate.typical_segments(last) == round(np.mean(regions)) < max(regions)


def test_the_sheet_begins_with_the_best(scenes, monkeypatch):
    dataset = datasets.open_dataset("folder", scenes).first(3)

    def predict(sample):
        return sample.truths[0] * (sample.name == "scene1")

    samples = [dataset.load(index) for index in range(3)]
    found = {sample.name: evaluate.confusion_entries({"diffseg": predict(sample)}, sample.truths) for sample in samples}
    monkeypatch.setattr(visualize, "sheet", lambda rows, _: [caption for caption, _ in rows])
    captions = evaluate._sheet(dataset, found, "diffseg", predict)
    assert [caption.partition(":")[0] for caption in captions] == ["best", "median", "worst"]
    assert captions[0] == "best: scene1, accuracy 1.000"


def test_aligned_predictions_bear_the_truths_numbers():
    truth = np.array([[3, 3, 3, 1, 1, -1]])
    assert evaluate.aligned(np.array([[0, 0, 2, 1, 1, 1]]), truth).tolist() == [[3, 3, 6, 1, 1, 1]]


def sweep(root, output, *options):
    return cli.main(["study", "folder", str(root), "-o", str(output), "--limit", "2", *QUICK, *options])


def test_study(scenes, tmp_path, monkeypatch):
    passes = []
    record = diffseg.DiffSegPipeline.record

    def counted(pipe, *arguments, **options):
        passes.append(options["timestep"])
        return record(pipe, *arguments, **options)

    monkeypatch.setattr(diffseg.DiffSegPipeline, "record", counted)
    sweeps = ["timestep=200,10", "anchors=4", "anchors=8", "iterations=1", "threshold", "weights", "rule"]
    assert sweep(scenes, tmp_path, *(word for name in sweeps for word in ("--sweep", name))) == 0
    assert sorted(passes) == [10, 10, 200, 200]  # one forward a time step and image serves every other parameter
    rows = list(csv.DictReader((tmp_path / "study.csv").open()))
    values = {}
    for row in rows:
        values.setdefault(row["parameter"], []).append(row["value"])
    assert values == {
        "timestep": ["10", "200"],
        "anchors": ["4", "8", "16"],
        "iterations": ["1", "3"],
        "threshold": ["0.2", "0.4", "0.6", "0.8", "1.0", "1.2", "1.6"],
        "weights": ["proportional", "per_layer", "literal", "own"],
        "rule": ["paper", "official"],
    }
    base = [row for row in rows if row["base"] == "1"]
    assert len(base) == 6
    assert len({row["accuracy"] for row in base}) == 1
    assert float(rows[-3]["accuracy"]) > 0
    segments = [float(row["segments"]) for row in rows if row["parameter"] == "threshold"]
    assert segments == sorted(segments, reverse=True)
    assert segments[0] > segments[-1]
    assert Image.open(tmp_path / "study.png").size[0] > 1000
    passes.clear()
    assert sweep(scenes, tmp_path, *(word for name in sweeps for word in ("--sweep", name))) == 0
    assert passes == []  # all finished
    assert sweep(scenes, tmp_path, "--sweep", "rule") == 2  # other points


def test_study_agrees_with_evaluate(scenes, tmp_path):
    assert run(scenes, tmp_path / "evaluated", "--limit", "2", "--methods", "diffseg,diffseg-official") == 0
    assert sweep(scenes, tmp_path / "studied", "--sweep", "rule=official") == 0
    rows = {row["value"]: row for row in csv.DictReader((tmp_path / "studied" / "study.csv").open())}
    for rule, method in (("paper", "diffseg"), ("official", "diffseg-official")):
        expected = results(tmp_path / "evaluated")["methods"][method]
        assert float(rows[rule]["accuracy"]) == pytest.approx(expected["accuracy"], abs=1e-9)
        assert float(rows[rule]["miou"]) == pytest.approx(expected["miou"], abs=1e-9)


def test_heads(scenes, tmp_path):
    assert sweep(scenes, tmp_path, "--heads") == 0
    rows = list(csv.DictReader((tmp_path / "heads.csv").open()))
    assert [(row["resolution"], row["layers"]) for row in rows] == [("4", "1"), ("8", "5"), ("16", "5"), ("32", "5")]
    assert all(float(row["mean_divergence"]) > 0 for row in rows)
    assert not (tmp_path / "study.csv").exists()


def test_head_divergence_by_hand():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 300, 8, generator=generator)
    maps = (query.double() @ key.double().mT * 0.3).softmax(-1)
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = np.mean(
        [float(((maps[a] - maps[b]) * (maps[a].log() - maps[b].log())).sum(-1).mean()) / 2 for a, b in pairs]
    )
    assert study.head_divergence(query, key, 0.3) == pytest.approx(expected, abs=1e-5)
    assert study.head_divergence(query[:1].expand(2, -1, -1), key[:1].expand(2, -1, -1), 0.3) == pytest.approx(
        0, abs=1e-6
    )
    assert np.isnan(study.head_divergence(query[:1], key[:1], 0.3))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("seed=1", "--sweep: expected one of timestep, "),
        ("anchors=many", "--sweep anchors: expected int values, got 'many'"),
        ("threshold=0", "--sweep threshold: expected positive"),
        ("timestep=1000", "--sweep timestep: expected 0 to 999, got 1000"),
        ("rule=none", "--sweep rule: expected one of"),
    ],
)
def test_wrong_sweeps(scenes, tmp_path, capsys, given, message):
    assert sweep(scenes, tmp_path / "out", "--sweep", given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
