"""The bundled model, and that its training can be interrupted and repeated."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import diffseg
from diffseg.methods import Settings
from diffseg.metrics import matched_accuracy
from diffseg.tiny import MODEL, report, train
from diffseg.tiny.scenes import REPORT_SEEDS, scene


@pytest.fixture(scope="module")
def pipe():
    pipe = diffseg.DiffSegPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_bundled_model(pipe):
    assert sum(path.stat().st_size for path in MODEL.rglob("*")) <= 8 * 2**20
    with diffseg.record_attention(pipe.unet) as record, torch.no_grad():
        pipe.unet(torch.zeros(1, 3, 64, 64), 300, encoder_hidden_states=torch.zeros(1, 1, 16))
    assert sorted(record.grids, reverse=True) == [(64, 64)] * 5 + [(32, 32)] * 5 + [(16, 16)] * 5 + [(8, 8)]
    assert pipe.config.threshold != diffseg.pipeline.DEFAULT_THRESHOLD


def test_it_segments_scenes(pipe):
    """A few held-out scenes; the table in the README is over 200."""
    accuracies = []
    for seed in REPORT_SEEDS[:8]:
        image, truth = scene(seed)
        accuracies.append(matched_accuracy(pipe(image).labels[0], truth))
    assert np.mean(accuracies) >= 0.8


def test_attention_stored_in_bfloat16_keeps_the_labels(pipe):
    for seed in REPORT_SEEDS[:3]:
        attention, grid = pipe.attention(scene(seed)[0])
        exact, rounded = (
            diffseg.label(diffseg.merge(each, grid=grid, threshold=pipe.config.threshold), (64, 64))
            for each in (attention, attention.bfloat16())
        )
        assert matched_accuracy(rounded[0].numpy(), exact[0].numpy()) >= 0.999


def test_a_network_in_bfloat16_keeps_the_labels(pipe):
    rounded = diffseg.DiffSegPipeline.from_pretrained(MODEL, dtype=torch.bfloat16)
    rounded.set_progress_bar_config(disable=True)
    agreements = []
    for seed in REPORT_SEEDS[:4]:
        image, _ = scene(seed)
        agreements.append(matched_accuracy(rounded(image).labels[0], pipe(image).labels[0]))
    assert np.mean(agreements) >= 0.99


def test_the_report_names_every_method(pipe, monkeypatch):
    small = replace(Settings.of(pipe), processing_resolution=32)  # k-means on the rows of a whole A_f takes long
    monkeypatch.setattr(Settings, "of", lambda _: small)
    lines = list(report.markdown_table(report.report(pipe, 1)))
    assert [line.split("|")[1].strip().split(" (")[0] for line in lines[2:]] == [
        "DiffSeg", "DiffSeg, official rule", "K-Means-C", "K-Means-S", "k-means, colour + position", "one segment"
    ]  # fmt: skip


def test_choosing(pipe, monkeypatch):
    timestep, threshold = pipe.config.timestep, pipe.config.threshold
    monkeypatch.setattr(report, "TIMESTEPS", (timestep,))
    monkeypatch.setattr(report, "THRESHOLDS", (1e-4, threshold, 100.0))
    accuracies = report.choose(pipe, 1)
    assert list(accuracies) == [(timestep, 1e-4), (timestep, threshold), (timestep, 100.0)]
    assert max(accuracies, key=accuracies.get) == (timestep, threshold)


def test_the_choice_is_written_into_the_model_and_changes_nothing_else(monkeypatch, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    before = json.loads((model / "model_index.json").read_text())
    monkeypatch.setattr(report, "TIMESTEPS", (10, 300))
    monkeypatch.setattr(report, "THRESHOLDS", (0.1, 100.0))
    command = f"report --model {model} --choose --scenes 1 --weights proportional"
    monkeypatch.setattr(sys, "argv", command.split())
    report.main()
    after = json.loads((model / "model_index.json").read_text())
    assert after == {**before, "weights": "proportional", "threshold": 0.1, "timestep": 10}
    assert "wrote timestep 10, threshold 0.1, weights proportional" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["report", "--weights", "1,2"])
    with pytest.raises(SystemExit):
        report.main()
    assert "--weights: expected --choose" in capsys.readouterr().err


def trained(output):
    """The network that a training wrote."""
    return diffseg.DiffSegPipeline.from_pretrained(output / "model").unet


def run_training(monkeypatch, output, *options, stop_after=None):
    command = f"train --output {output} --steps 4 --batch-size 2 --scenes 3 --checkpoint-every 2"
    monkeypatch.setattr(sys, "argv", [*command.split(), *options])
    if stop_after is None:
        train.main()
        return
    draw = train.draw_batch
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) > stop_after:
            raise KeyboardInterrupt
        return draw(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "draw_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.main()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Where a training wrote that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        run_training(patch, output)
    return output


def test_training_resumes_to_the_same_weights(whole, monkeypatch, tmp_path):
    run_training(monkeypatch, tmp_path, stop_after=3)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2
    run_training(monkeypatch, tmp_path)
    for (name, one), other in zip(trained(whole).named_parameters(), trained(tmp_path).parameters(), strict=True):
        assert torch.equal(one, other), name


def test_what_training_writes_segments(whole):
    labels = diffseg.DiffSegPipeline.from_pretrained(whole / "model")(np.zeros((64, 64, 3), np.uint8)).labels[0]
    assert labels.shape == (64, 64)


def test_training_leaves_its_schedule_and_goes_on(whole, monkeypatch, tmp_path):
    run_training(monkeypatch, tmp_path, "--stop", "3")
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3
    early = trained(tmp_path).state_dict()
    run_training(monkeypatch, tmp_path)
    expected, found = trained(whole).state_dict(), trained(tmp_path).state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert any(not torch.equal(expected[name], early[name]) for name in expected)


def test_training_keeps_a_share_of_the_initial_weights(whole, monkeypatch, tmp_path):
    options = ["--initial", str(whole / "model"), "--stop", "2"]
    run_training(monkeypatch, tmp_path / "all", *options)
    run_training(monkeypatch, tmp_path / "part", *options, "--keep", "0.75")
    before, after, between = map(trained, (whole, tmp_path / "all", tmp_path / "part"))
    assert "_name_or_path" not in json.loads((tmp_path / "all" / "model" / "unet" / "config.json").read_text())
    for name, weight in between.named_parameters():
        expected = 0.75 * before.get_parameter(name) + 0.25 * after.get_parameter(name)
        torch.testing.assert_close(weight, expected, atol=1e-3, rtol=2e-3)  # all three were rounded to float16
    assert any(not torch.equal(one, other) for one, other in zip(before.parameters(), after.parameters(), strict=True))


def test_training_can_begin_with_sharper_attention(pipe, monkeypatch, tmp_path):
    """The layers that are read, and no others, begin with scores times the factor, also where --keep averages."""
    started = []
    monkeypatch.setattr(train, "average_with", lambda unet, initial, share: started.append(initial))
    options = ["--initial", str(MODEL), "--sharpen", "1.5", "--keep", "0.5"]
    run_training(monkeypatch, tmp_path, *options, stop_after=0)
    run_training(monkeypatch, tmp_path, *options, "--stop", "1")
    picture = torch.randn(1, 3, 64, 64)

    def scores(unet):
        with diffseg.record_attention(unet) as record, torch.no_grad():
            unet(picture, 10, encoder_hidden_states=torch.zeros(1, 1, 16))
        return record.queries[2][0, 0] @ record.keys[2][0, 0].T

    torch.testing.assert_close(scores(started[0]), 1.5 * scores(pipe.unet), rtol=1e-3, atol=1e-3)
    sharpened = [
        name
        for (name, one), other in zip(started[0].named_parameters(), pipe.unet.parameters(), strict=True)
        if not torch.equal(one, other)
    ]
    assert sharpened == [
        f"down_blocks.1.attentions.{layer}.transformer_blocks.0.attn1.to_q.weight" for layer in range(2)
    ]


def test_the_weights_are_of_layers_of_32_on_the_way_down(pipe):
    with diffseg.record_attention(pipe.unet) as record, torch.no_grad():
        pipe.unet(torch.zeros(1, 3, 64, 64), 10, encoder_hidden_states=torch.zeros(1, 1, 16))
    weighed = [layer for layer, weight in enumerate(train.WEIGHTS) if weight]
    assert len(train.WEIGHTS) == len(record.names) == 16
    assert [record.names[layer] for layer in weighed] == [
        f"down_blocks.1.attentions.{layer}.transformer_blocks.0.attn1" for layer in range(2)
    ]
    assert pipe.config.weights == list(train.WEIGHTS)


@pytest.mark.parametrize(
    "options",
    [
        ["--timesteps", "0", "9"],
        ["--timesteps", "9", "9"],
        ["--stop", "0"],
        ["--keep", "0.5"],
        ["--keep", "1"],
        ["--sharpen", "0"],
        ["--sharpen", "2"],
    ],
)
def test_training_refuses_bad_options(monkeypatch, tmp_path, capsys, options):
    with pytest.raises(SystemExit):
        run_training(monkeypatch, tmp_path, *options)
    assert f"{options[0]}: expected" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("uniform", [False, True])
def test_timesteps_are_drawn_where_they_matter(uniform):
    drawn = train.draw_timesteps(20_000, (4, 150), uniform, np.random.default_rng(0)).numpy()
    assert drawn.min() >= 0
    assert drawn.max() <= 999
    assert abs(np.mean((drawn >= 4) & (drawn < 150)) - (0.8 + 0.2 * 0.146)) < 0.02
    usual = drawn[(drawn >= 4) & (drawn < 150)]
    middle = 77 if uniform else np.sqrt(4 * 150)  # half of them on either side
    assert abs(np.mean(usual < middle) - 0.5) < 0.05


def test_training_refuses_another_runs_checkpoint(monkeypatch, tmp_path):
    run_training(monkeypatch, tmp_path, stop_after=2)
    monkeypatch.setattr(sys, "argv", ["train", "--output", str(tmp_path), "--steps", "9"])
    with pytest.raises(SystemExit, match="give the same options to go on, or another --output"):
        train.main()
