"""The pipeline on small random checkpoints of the real layouts."""

import copy
import json
import logging
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models import modeling_utils
from PIL import Image
from pipelines import THRESHOLD, load, modules_run, picture, quiet

import diffseg
from diffseg import images, memory, ops, testing
from diffseg.pipeline import DiffSegPipeline


@pytest.fixture(scope="module")
def pipe(checkpoint):
    return load(checkpoint)


@pytest.fixture
def pixel_pipe():
    unet = testing.tiny_unet("sd1", in_channels=3, out_channels=3, sample_size=32)
    return quiet(DiffSegPipeline(unet, threshold=THRESHOLD))


def test_the_steps_by_hand(pipe):
    image = picture()
    pixels = images.to_tensor(image)[None] * 2 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        tokens = pipe.tokenizer("", padding="max_length", max_length=77, return_tensors="pt").input_ids
        context = pipe.text_encoder(tokens)[0]
        with diffseg.record_attention(pipe.unet) as record:
            pipe.unet(latents, 300, encoder_hidden_states=context)
        expected = diffseg.segment(record.queries, record.keys, (128, 128), scales=record.scales, threshold=THRESHOLD)
    output = pipe(image)
    assert (output.labels[0] == expected[0].numpy()).mean() >= 0.999
    assert output.num_segments == [int(expected.max()) + 1]
    assert output.num_segments[0] > 1
    assert output.labels[0].dtype == np.int32


@pytest.mark.parametrize("layout", ["sd1", "sd2"])
def test_from_pretrained_and_from_pipe_agree(layout, tmp_path, caplog):
    directory = testing.tiny_pipeline(layout, tmp_path / "checkpoint")
    with caplog.at_level(logging.WARNING):
        loaded = quiet(DiffSegPipeline.from_pretrained(directory, threshold=THRESHOLD))
        parent = StableDiffusionPipeline.from_pretrained(directory)
        shared = quiet(DiffSegPipeline.from_pipe(parent, threshold=THRESHOLD))
    assert not [record for record in caplog.records if "DiffSegPipeline" in record.getMessage()]
    assert shared.unet is parent.unet
    assert np.array_equal(loaded(picture()).labels[0], shared(picture()).labels[0])


@pytest.mark.parametrize(("version", "side"), [("0.6.0", 64), ("0.8.0.dev0", 64), ("0.9.0", 32), ("0.42.1", 32)])
def test_old_fine_tunes_are_processed_at_the_size_that_they_were_trained_at(checkpoint, tmp_path, version, side):
    """Their files say 32; diffusers' own pipeline corrects those of the same versions."""
    folder = shutil.copytree(checkpoint, tmp_path / "old")
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sample_size": 32, "_diffusers_version": version}))
    loaded = DiffSegPipeline.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        parent = StableDiffusionPipeline.from_pretrained(folder)
    assert parent.unet.config.sample_size == side
    assert loaded.processed_size((100, 100)) == (side * loaded.vae_scale_factor, side * loaded.vae_scale_factor)


def test_from_pipe_leaves_the_dtypes(checkpoint):
    parent = StableDiffusionPipeline.from_pretrained(checkpoint, dtype=torch.bfloat16)
    parent.vae.to(torch.float32)
    shared = quiet(DiffSegPipeline.from_pipe(parent))
    assert (shared.vae.dtype, shared.unet.dtype, shared.text_encoder.dtype) == (torch.float32, *[torch.bfloat16] * 2)
    assert shared(picture()).labels[0].shape == (128, 128)
    assert DiffSegPipeline.from_pipe(parent, dtype=torch.float32).unet.dtype == torch.float32
    with pytest.warns(FutureWarning, match="torch_dtype"):
        assert DiffSegPipeline.from_pipe(parent, torch_dtype=torch.bfloat16).vae.dtype == torch.bfloat16


def test_from_pipe_warns_of_no_cast(checkpoint, monkeypatch):
    parent = StableDiffusionPipeline.from_pretrained(checkpoint)
    warned = []
    monkeypatch.setattr(modeling_utils.logger, "warning", lambda *arguments, **_: warned.append(arguments))
    shared = DiffSegPipeline.from_pipe(parent)
    assert warned == []
    assert shared.to(dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_the_pass_ends_after_the_last_layer_that_has_a_share(pipe):
    image = picture()
    record = pipe.record(image)
    weights = [0.0, 0.0, 1.0, 0.5] + [0.0] * 12
    expected = record.aggregate(weights=weights)
    blocks = [pipe.unet.down_blocks[1], pipe.unet.down_blocks[2], pipe.unet.mid_block, pipe.unet.conv_out]
    with modules_run() as ran:
        attention, grid = pipe.attention(image, weights=weights)
        assert [block in ran for block in blocks] == [True, False, False, False]
        ran.clear()
        labels = pipe(image, weights=weights).labels[0]
        assert [block in ran for block in blocks] == [True, False, False, False]
        ran.clear()
        pipe(image)
        assert [block in ran for block in blocks] == [True, True, True, False]
    assert grid == record.output_grid == (16, 16)
    assert torch.equal(attention, expected)
    proposals = diffseg.merge(expected, grid=grid, threshold=THRESHOLD)
    assert np.array_equal(labels, ops.numbered_labels(proposals, labels.shape)[0][0].numpy())


def test_pickled_weights_only_when_asked_for(checkpoint, tmp_path):
    parent = StableDiffusionPipeline.from_pretrained(checkpoint)
    parent.save_pretrained(tmp_path, safe_serialization=False)
    torch.save(parent.text_encoder.state_dict(), tmp_path / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        DiffSegPipeline.from_pretrained(tmp_path)
    assert DiffSegPipeline.from_pretrained(tmp_path, use_safetensors=False).unet is not None


def cached(checkpoint, folder, index, absent):
    """A checkpoint in a cache, as a repository's that has files ``absent`` besides; what loads it from there."""
    commit = "0" * 40
    repository = folder / "models--owner--name"
    snapshot = repository / "snapshots" / commit
    shutil.copytree(checkpoint, snapshot)
    (snapshot / "model_index.json").write_text(json.dumps(index))
    on_the_hub = {str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()} | set(absent)
    for path in absent:
        (snapshot / path).unlink(missing_ok=True)
    tree = {"format_version": 1, "files": {path: {"size": 1, "blob_id": "x"} for path in on_the_hub}}
    for name, content in (("refs/main", commit), (f"trees/{commit}.json", json.dumps(tree))):
        (repository / name).parent.mkdir()
        (repository / name).write_text(content)
    return {"pretrained_model_name_or_path": "owner/name", "cache_dir": folder, "local_files_only": True}


def test_what_is_not_needed_is_neither_downloaded_nor_missed(checkpoint, tmp_path):
    """In a cache without it, of a repository that has it as a pickle alone."""
    index = json.loads((checkpoint / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    where = cached(checkpoint, tmp_path, index, ["safety_checker/pytorch_model.bin"])
    assert DiffSegPipeline.from_pretrained(**where).text_encoder is not None


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("transformer", "a checkpoint with a UNet, .* got one of a StableDiffusion3Pipeline"),
        ("unet", "a UNet conditioned on text alone, .* got one with addition_embed_type='text_time'"),
    ],
)
def test_what_is_not_served_is_not_downloaded(network, expected, checkpoint, tmp_path):
    index = json.loads((checkpoint / "model_index.json").read_text())
    index |= {network: index.pop("unet"), "_class_name": "StableDiffusion3Pipeline"}
    where = cached(checkpoint, tmp_path, index, [f"{network}/diffusion_pytorch_model.safetensors"])
    config = next(tmp_path.rglob("unet/config.json"))
    config.write_text(json.dumps({**json.loads(config.read_text()), "addition_embed_type": "text_time"}))
    with pytest.raises(ValueError, match=f"expected {expected}"):
        DiffSegPipeline.from_pretrained(**where)


def test_a_checkpoint_without_a_unet_is_refused_before_it_is_loaded(checkpoint, tmp_path):
    index = json.loads((checkpoint / "model_index.json").read_text())
    del index["unet"]
    index["_class_name"] = "FluxPipeline"
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"expected a checkpoint with a UNet, .* got one of a FluxPipeline"):
        DiffSegPipeline.from_pretrained(tmp_path)


def test_a_path_that_leads_nowhere(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.*is neither a valid local path nor a valid repo id"):
        DiffSegPipeline.from_pretrained(tmp_path / "nowhere")


def test_a_checkpoint_without_its_tokenizers_files(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "tokenizer")
    with pytest.raises((OSError, ValueError), match="tokenizer"):
        DiffSegPipeline.from_pretrained(tmp_path)


def test_a_checkpoint_carries_its_options(pixel_pipe, tmp_path):
    image = picture(32, 32)
    weights = [1.0, 0.5] + [0.0] * (len(pixel_pipe.record(image).grids) - 2)
    pixel_pipe.register_to_config(threshold=0.015, timestep=200, weights=weights)
    pixel_pipe.save_pretrained(tmp_path)
    loaded = quiet(DiffSegPipeline.from_pretrained(tmp_path))
    assert (loaded.config.threshold, loaded.config.timestep, loaded.config.weights) == (0.015, 200, weights)
    assert loaded.like().config.weights == weights
    given = pixel_pipe(image, threshold=0.015, timestep=200, weights=weights).labels[0]
    assert np.array_equal(loaded(image).labels[0], given)
    attention, _ = loaded.attention(image)
    torch.testing.assert_close(attention, pixel_pipe.attention(image, timestep=200, weights=weights)[0])
    assert not torch.allclose(attention, loaded.attention(image, weights="proportional")[0], rtol=1e-2)
    assert loaded(image).num_segments != loaded(image, threshold=100.0).num_segments == [1]


def test_default_threshold_is_the_papers(checkpoint):
    assert DiffSegPipeline.from_pretrained(checkpoint).config.threshold == 1.0


def test_a_list_in_order_as_one_by_one(pixel_pipe):
    given = [picture(32, 48, 1), picture(40, 20, 2), picture(32, 48, 3), picture(32, 48, 4), picture(7, 9, 5)]
    alone = [pixel_pipe(each).labels[0] for each in given]
    for batch_size in (1, 2, 8):
        together = pixel_pipe(given, batch_size=batch_size)
        assert [each.shape for each in together.labels] == [each.shape[:2] for each in given]
        for one, other in zip(alone, together.labels, strict=True):
            assert (one == other).mean() >= 0.999


def test_twice_the_same(pixel_pipe):
    image = picture(32, 48)
    assert np.array_equal(pixel_pipe(image).labels[0], pixel_pipe(image).labels[0])


@pytest.mark.parametrize(
    ("size", "resolution", "processed"),
    [
        ((128, 128), None, (128, 128)),
        ((100, 200), None, (64, 128)),
        ((200, 100), None, (128, 64)),
        ((100, 2000), None, (64, 128)),
        ((1, 1), None, (128, 128)),
        ((300, 200), 170, (192, 128)),
        ((300, 200), 10, (64, 64)),
        ((300, 200), (64, 192), (64, 192)),
        ((300, 200), np.array([64, 192]), (64, 192)),
    ],
)
def test_processing_resolution(pipe, size, resolution, processed):
    options = {"processing_resolution": resolution}
    assert pipe(picture(*size), **options).labels[0].shape == size
    assert pipe(picture(*size), **options, match_input_resolution=False).labels[0].shape == processed


def test_the_attention_it_merges(pipe):
    attention, grid = pipe.attention(picture(100, 200))
    assert grid == (8, 16)
    assert attention.shape == (1, 128, 128)
    assert torch.allclose(attention.sum(-1), torch.ones(1, 128), atol=1e-5)


def test_every_kind_of_image(pixel_pipe, tmp_path):
    array = picture(32, 32)
    Image.fromarray(array).save(tmp_path / "image.png")
    same = [
        array,
        array / 255,
        Image.fromarray(array),
        tmp_path / "image.png",
        str(tmp_path / "image.png"),
        torch.from_numpy(array).permute(2, 0, 1),
        torch.from_numpy(array).permute(2, 0, 1)[None],
        array[None],
    ]
    expected = pixel_pipe(array).labels[0]
    for image in same:
        output = pixel_pipe(image)
        assert len(output.labels) == 1
        assert np.array_equal(output.labels[0], expected)


def test_record_gives_what_attention_is_made_of(pixel_pipe):
    image = picture(32, 48)
    record = pixel_pipe.record(image, timestep=100)
    attention, grid = pixel_pipe.attention(image, timestep=100, weights="literal")
    assert max(record.grids) == grid
    remade = diffseg.aggregate(record.queries, record.keys, grids=record.grids, scales=record.scales, weights="literal")
    torch.testing.assert_close(remade, attention)
    other = pixel_pipe.record(image, timestep=900)
    assert not torch.equal(other.queries[0], record.queries[0])
    assert max(pixel_pipe.record(image, processing_resolution=96).grids) == (64, 96)


def test_output_types(pixel_pipe):
    image = picture(32, 48)
    array = pixel_pipe(image).labels[0]
    tensor = pixel_pipe(image, output_type="pt").labels[0]
    assert tensor.dtype == torch.int32
    assert np.array_equal(tensor.numpy(), array)
    assert np.array_equal(np.asarray(pixel_pipe(image, output_type="pil").labels[0]), array)
    labels, num_segments, timings = pixel_pipe(image, return_dict=False)
    assert np.array_equal(labels[0], array)
    assert num_segments == [array.max() + 1]
    assert timings == {}


def test_labels_have_no_gaps(pixel_pipe):
    for threshold in (0.003, 0.01, 0.02):
        output = pixel_pipe(picture(48, 48), threshold=threshold)
        assert np.array_equal(np.unique(output.labels[0]), np.arange(output.num_segments[0]))


def test_refine_rule_and_weights_reach_the_ops(pixel_pipe, monkeypatch):
    seen = {}
    for name in ("aggregate", "merge", "refine", "label"):
        original = getattr(diffseg.ops, name)

        def spy(*arguments, _name=name, _original=original, **options):
            seen[_name] = options
            return _original(*arguments, **options)

        monkeypatch.setattr(diffseg.ops, name, spy)
    pixel_pipe(
        picture(32, 32), threshold=[0.1, 0.2], iterations=2, rule="official", weights="per_layer", anchors=7,
        refine=True, backend="reference",
    )  # fmt: skip
    assert seen["aggregate"]["weights"] == "per_layer"
    assert {name: options["backend"] for name, options in seen.items() if name != "refine"} == dict.fromkeys(
        ("aggregate", "merge", "label"), "reference"
    )
    merge = seen["merge"]
    assert (merge["threshold"], merge["iterations"], merge["rule"], merge["anchors"]) == ((0.1, 0.2), 2, "official", 7)
    assert "refine" in seen


def test_timings_name_every_stage(pipe):
    timings = pipe(picture(), refine=True, time_stages=True).timings
    assert list(timings) == ["preprocess", "encode", "unet", "aggregate", "merge", "refine", "label"]
    assert min(timings.values()) > 0


def test_the_empty_prompt_is_encoded_once(checkpoint, monkeypatch):
    pipe = quiet(DiffSegPipeline.from_pretrained(checkpoint))
    calls = []
    handle = pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    pipe([picture(), picture(seed=1)])
    pipe(picture())
    handle.remove()
    assert len(calls) == 1


def test_the_empty_prompt_is_encoded_anew_by_another_text_encoder(checkpoint):
    pipe = DiffSegPipeline.from_pretrained(checkpoint, dtype=torch.bfloat16)
    rounded = pipe._context(1)
    pipe.to(torch.float32)
    expected = pipe._context(1)
    assert expected.dtype == torch.float32
    torch.testing.assert_close(expected, rounded.float(), atol=0.1, rtol=0)
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)
    *_, last = (module for name, module in pipe.text_encoder.named_modules() if name.endswith("final_layer_norm"))
    with torch.no_grad():
        last.bias += 1
        torch.testing.assert_close(pipe._context(1), expected + 1)
    pipe.text_encoder = None  # to free its memory
    torch.testing.assert_close(pipe._context(1), expected + 1)


def test_progress_bar(pixel_pipe, capsys):
    pixel_pipe.set_progress_bar_config(desc="segmenting")
    pixel_pipe([picture(32, 32), picture(32, 32)])
    shown = capsys.readouterr().err
    assert "segmenting: 100%" in shown
    assert "2/2" in shown
    pixel_pipe.set_progress_bar_config(disable=True)
    pixel_pipe(picture(32, 32))
    assert capsys.readouterr().err == ""


def test_overflow_is_reported_with_what_to_do(pixel_pipe):
    with torch.no_grad():
        pixel_pipe.unet.conv_in.weight.fill_(1e38)
    with pytest.raises(ValueError, match=r"expected finite attention, found NaN or infinity.*bfloat16"):
        pixel_pipe(picture(32, 32))


COMPONENTS = {
    "no UNet": (lambda p: {"unet": p.vae}, TypeError, "unet: expected a UNet2DConditionModel, got AutoencoderKL"),
    "SDXL": (lambda p: {"unet": testing.tiny_unet("sdxl")}, ValueError, "addition_embed_type='text_time'"),
    "IP-Adapter": (
        lambda p: {"unet": testing.tiny_unet("sd1", encoder_hid_dim=8, encoder_hid_dim_type="image_proj")},
        ValueError,
        "got one with encoder_hid_dim_type='image_proj'",
    ),
    "inpainting": (
        lambda p: {
            "unet": testing.tiny_unet("sd1", in_channels=9),
            "vae": p.vae,
            "text_encoder": p.text_encoder,
            "tokenizer": p.tokenizer,
        },
        ValueError,
        "unet: expected 4 input channels, the latents of the vae, got 9",
    ),
    "latents without a VAE": (lambda p: {"unet": p.unet}, ValueError, "unet: expected 3 input channels, RGB, got 4"),
    "no text encoder": (
        lambda p: {"unet": p.unet, "vae": p.vae, "tokenizer": p.tokenizer},
        ValueError,
        "text_encoder: expected all of vae, text_encoder, tokenizer (latent diffusion) or none",
    ),
}


@pytest.mark.parametrize("name", COMPONENTS)
def test_wrong_components(pipe, name):
    components, error, message = COMPONENTS[name]
    with pytest.raises(error, match=re.escape(message)):
        DiffSegPipeline(**components(pipe))


BAD_CALLS = {
    "no image": ([], {}, ValueError, "image: expected at least one image, got an empty list"),
    "second image empty": ([picture(), np.zeros((0, 4, 3))], {}, ValueError, "image[1]: expected"),
    "not an image": (3.5, {}, TypeError, "image: expected a path, a PIL image"),
    "floats to 255": (picture() * 1.0, {}, ValueError, "image: expected floats in [0, 1]"),
    "threshold 0": (picture(), {"threshold": 0.0}, ValueError, "threshold: expected positive numbers, got 0.0"),
    "threshold NaN": (picture(), {"threshold": float("nan")}, ValueError, "threshold: expected finite"),
    "two thresholds": (picture(), {"threshold": [1, 2]}, ValueError, "threshold: expected one number, or 3"),
    "no anchors": (picture(), {"anchors": 0}, ValueError, "anchors: expected at least 1, got 0"),
    "anchors not an int": (picture(), {"anchors": 2.5}, TypeError, "anchors: expected an int, got float 2.5"),
    "no iterations": (picture(), {"iterations": 0}, ValueError, "iterations: expected at least 1, got 0"),
    "rule": (picture(), {"rule": "both"}, ValueError, "rule: expected one of ('paper', 'official'), got 'both'"),
    "weights": (picture(), {"weights": "equal"}, ValueError, "weights: expected one of"),
    "two weights": (picture(), {"weights": [1.0, 0.5]}, ValueError, "weights: expected 16 items, one a layer, got 2"),
    "no weight": (picture(), {"weights": [0.0] * 16}, ValueError, "weights: expected no negative share and a positive"),
    "backend": (picture(), {"backend": "numpy"}, ValueError, "backend: expected one of 'auto'"),
    "batch size": (picture(), {"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
    "output type": (picture(), {"output_type": "latent"}, ValueError, "output_type: expected 'np', 'pt' or 'pil'"),
    "timestep": (picture(), {"timestep": -1}, ValueError, "timestep: expected 0 to 999, got -1"),
    "timestep past the schedule": (picture(), {"timestep": 5000}, ValueError, "timestep: expected 0 to 999, got 5000"),
    "timestep not an int": (picture(), {"timestep": "x"}, TypeError, "timestep: expected an int, got str 'x'"),
    "refine": (picture(), {"refine": "no"}, TypeError, "refine: expected a bool, got str 'no'"),
    "semantic": (picture(), {"semantic": 1}, TypeError, "semantic: expected a bool, got int 1"),
    "resolution": (picture(), {"processing_resolution": 0}, ValueError, "processing_resolution: expected at least 1"),
    "resolution of three": (picture(), {"processing_resolution": (1, 2, 3)}, TypeError, "processing_resolution: exp"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused_before_any_work(pipe, name, monkeypatch):
    image, options, error, message = BAD_CALLS[name]
    monkeypatch.setattr(pipe.unet, "forward", lambda *_, **__: pytest.fail("the UNet ran"))
    monkeypatch.setattr(pipe.vae, "encode", lambda *_, **__: pytest.fail("the VAE ran"))
    with pytest.raises(error, match=re.escape(message)):
        pipe(image, **options)


@pytest.mark.parametrize("timestep", [-1, 1000, "x"])
@pytest.mark.parametrize("method", ["attention", "record"])
def test_attention_and_record_check_the_timestep(pixel_pipe, method, timestep, monkeypatch):
    monkeypatch.setattr(pixel_pipe.unet, "forward", lambda *_, **__: pytest.fail("the UNet ran"))
    with pytest.raises((ValueError, TypeError), match="timestep: expected"):
        getattr(pixel_pipe, method)(picture(32, 32), timestep=timestep)


def test_attention_checks_weights_and_backend(pixel_pipe, monkeypatch):
    monkeypatch.setattr(pixel_pipe.unet, "forward", lambda *_, **__: pytest.fail("the UNet ran"))
    with pytest.raises(ValueError, match="weights: expected one of"):
        pixel_pipe.attention(picture(32, 32), weights="equal")
    with pytest.raises(ValueError, match="backend: expected one of"):
        pixel_pipe.attention(picture(32, 32), backend="numpy")


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (2, 3)])
def test_small_images(pixel_pipe, size):
    output = pixel_pipe(picture(*size))
    assert output.labels[0].shape == size


def test_a_size_whose_attention_does_not_fit_is_refused_before_the_network_runs(pipe, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 2**30)
    with modules_run() as ran:
        for run in (pipe, pipe.attention, pipe.record):
            with pytest.raises(ValueError, match="at 1024 x 1536 A_f has 24576 x 24576 entries, 2 GiB, and 1 GiB of"):
                run(picture(), processing_resolution=(1024, 1536))
    assert ran == []


def test_only_several_images_have_a_progress_bar(checkpoint, capsys):
    pipe = DiffSegPipeline.from_pretrained(checkpoint)
    capsys.readouterr()
    pipe(picture())
    assert capsys.readouterr().err == ""
    pipe([picture(), picture()])
    assert "2/2" in capsys.readouterr().err
