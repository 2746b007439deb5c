"""Names for masks: words, tokens and segments by hand, then the pipeline on small random checkpoints."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import THRESHOLD, load, modules_run, picture
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    GitConfig,
    GitForCausalLM,
    GPT2Config,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

import diffseg
from diffseg import cli, images, record_attention, semantics, testing, visualize
from diffseg.pipeline import DiffSegPipeline
from diffseg.semantics import Prompt


@pytest.fixture(scope="module")
def pipe(checkpoint: Path) -> DiffSegPipeline:
    return load(checkpoint)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a man riding a wave on a surfboard", "man wave surfboard"),
        ("two giraffes standing next to each other in a field", "giraffes field"),
        ("a woman sitting on a bench reading a book", "woman bench book"),
        ("a skier is skiing down a snowy slope", "skier slope"),
        ("a tennis player swings his racket at the ball", "tennis player racket ball"),
        ("A Dog, and the dog's bone.", "dog bone"),
        ("a man ' s t-shirt and a woman\u2019s hat", "man t-shirt woman hat"),
        ("running quickly", ""),
        ("", ""),
    ],
)
def test_nouns(caption: str, expected: str) -> None:
    found = semantics.nouns(caption)
    assert list(found) == expected.split()
    for noun, spans in found.items():
        assert all(caption[start:end].lower() == noun for start, end in spans)


def test_a_noun_that_stands_twice_is_one_name() -> None:
    assert semantics.nouns("a dog on a dog") == {"dog": [(2, 5), (11, 14)]}


def test_without_the_tagger_the_error_says_what_to_do(pipe: DiffSegPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the captioner runs."""
    monkeypatch.setitem(sys.modules, "HanTa.HanoverTagger", None)
    semantics.tagger.cache_clear()
    with pytest.raises(ImportError, match=r"pip install -e '\.\[semantic\]' in a checkout, or pass labels="):
        pipe(picture(), semantic=True, captioner=lambda pictures: pytest.fail("ran"))


def test_labels_as_a_prompt() -> None:
    prompt = semantics.listed(["traffic light", "car"])
    assert prompt == Prompt("traffic light, car", {"traffic light": [(0, 13)], "car": [(15, 18)]})


def test_labels_in_a_caption() -> None:
    prompt = semantics.captioned("A Traffic  light, a carton and a car", ["car", "traffic light"])
    assert prompt.names == {"car": [(33, 36)], "traffic light": [(2, 16)]}
    with pytest.raises(ValueError, match="labels: expected words of the caption 'a cat', got 'dog', 'bus'"):
        semantics.captioned("a cat", ["dog", "cat", "bus"])


class SlowTokenizer:
    """The same tokenizer, without offsets."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.is_fast = tokenizer, False
        self.model_max_length = tokenizer.model_max_length

    def __call__(self, *args: Any, **options: Any) -> Any:
        assert "return_offsets_mapping" not in options
        return self._tokenizer(*args, **options)


@pytest.mark.parametrize("slow", [False, True], ids=["offsets", "prefixes"])
def test_every_piece_of_a_word_is_its_token(pipe: DiffSegPipeline, slow: bool) -> None:
    """The tiny tokenizer spells: a word has as many pieces as letters."""
    tokenizer = SlowTokenizer(pipe.tokenizer) if slow else pipe.tokenizer
    prompt = semantics.captioned("a cat,  a Big bus  and the cat's hat", ["cat", "big bus", "hat"])
    encoded = semantics.encode(tokenizer, prompt)
    assert encoded.ids.shape == (1, 77)
    pieces = pipe.tokenizer.convert_ids_to_tokens(encoded.ids[0])
    spelled = {
        name: "".join(pieces[index] for index in indices).replace("</w>", " ").split()
        for name, indices in encoded.names.items()
    }
    assert spelled == {"cat": ["cat", "cat"], "big bus": ["big", "bus"], "hat": ["hat"]}
    assert encoded.names["cat"][:3] == [2, 3, 4]  # after the start and "a": not "word index + 1"
    shares = semantics.token_shares([encoded.names, {"hat": [9]}], 77, torch.device("cpu"))
    assert shares.shape == (2, 3, 77)
    torch.testing.assert_close(shares.sum(-1), torch.tensor([[1.0, 1, 1], [1, 0, 0]]))
    assert shares[0, 1].nonzero().flatten().tolist() == encoded.names["big bus"]
    assert set(shares[0, 1].tolist()) == {0.0, float(torch.tensor(1 / 6))}


@pytest.mark.parametrize("slow", [False, True], ids=["offsets", "prefixes"])
def test_words_beyond_the_prompt_are_left_out_with_a_warning(pipe: DiffSegPipeline, slow: bool) -> None:
    tokenizer = SlowTokenizer(pipe.tokenizer) if slow else pipe.tokenizer
    names = ["x" * 70, "abcde", "fgh", "xyz"]  # 70 + comma + 4 of abcde fit between the ends of 77 tokens
    with pytest.warns(UserWarning, match="abcde, fgh, xyz: left out, the prompt is longer than 77 tokens"):
        encoded = semantics.encode(tokenizer, semantics.listed(names))
    assert list(encoded.names) == [names[0]]
    assert encoded.names[names[0]] == list(range(1, 71))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        repeated = semantics.encode(tokenizer, semantics.captioned("dog " * 30, ["dog"]))
    assert repeated.names["dog"] == list(range(1, 76))  # the 25 that fit


def test_segments_by_hand() -> None:
    labels = torch.tensor([[0, 0, 1], [2, 2, 1], [2, 2, 3]], dtype=torch.int32)
    scores = torch.tensor([[0.5, 0.25], [0.0, 1.0], [2.0, 1.0], [0.0, 4.0]])
    segmentation, infos = semantics.named_segments(labels, scores, ["cat", "bus"], {"bus": 0, "cat": 1}, fuse=True)
    assert segmentation.tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 1]]
    assert segmentation.dtype == torch.int32
    assert infos == [
        {"id": 0, "label_id": 1, "label": "cat", "score": (2 * 0.5 + 4 * 2.0) / 6, "was_fused": True},
        {"id": 1, "label_id": 0, "label": "bus", "score": (2 * 1.0 + 1 * 4.0) / 3, "was_fused": True},
    ]
    segmentation, infos = semantics.named_segments(labels, scores, ["cat", "bus"], {"bus": 0, "cat": 1}, fuse=False)
    assert torch.equal(segmentation, labels)
    assert [info["label"] for info in infos] == ["cat", "bus", "cat", "bus"]
    assert [info["score"] for info in infos] == [0.5, 1.0, 2.0, 4.0]
    assert not any(info["was_fused"] for info in infos)
    segmentation, infos = semantics.named_segments(labels, torch.empty(4, 0), [], {}, fuse=True)
    assert torch.equal(segmentation, labels)
    assert infos[3] == {"id": 3, "label_id": None, "label": None, "score": None, "was_fused": False}


def test_the_score_of_fused_masks_is_that_of_their_union() -> None:
    maps = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    maps[:, 0] += 1
    labels = torch.arange(8, dtype=torch.int32).repeat_interleave(2).clamp(max=5).expand(1, 9, 16).contiguous()
    scores = diffseg.score_masks(maps, labels)[0]
    _, (info,) = semantics.named_segments(labels[0], scores, ["a", "b"], {"a": 0, "b": 1}, fuse=True)
    whole = diffseg.score_masks(maps, torch.zeros_like(labels))[0, 0, 0]
    assert info["score"] == pytest.approx(float(whole), rel=1e-5)


def painted(attended: dict[int, Any], size: int = 8, tokens: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [1, 1, n, tokens] and keys by which the cells of each region attend to its token, all else to token 0."""
    weights = torch.zeros(size, size, tokens)
    weights[..., 0] = 2.0
    for token, (rows, columns, strength) in attended.items():
        weights[rows, columns, token] = strength
    return weights.view(1, 1, size * size, tokens), torch.eye(tokens).view(1, 1, tokens, tokens)


LEFT, RIGHT, ALL = slice(0, 4), slice(4, 8), slice(0, 8)


def answer(attended: dict[int, Any], tokens: list[list[int]]) -> list[int]:
    """The winning word in the left and in the right half."""
    queries, keys = painted(attended)
    maps = diffseg.aggregate_cross([queries], [keys], tokens=tokens, scales=[1.0], size=(64, 64))
    labels = torch.zeros(1, 64, 64, dtype=torch.int32)
    labels[..., 32:] = 1
    return diffseg.score_masks(maps, labels)[0].argmax(-1).tolist()


def test_where_the_right_answer_is_known() -> None:
    attended = {3: (ALL, LEFT, 5.0), 7: (ALL, RIGHT, 5.0)}
    assert answer(attended, [[3], [7]]) == [0, 1]
    assert answer(attended, [[7], [3]]) == [1, 0]


def test_a_word_that_is_attended_to_more_everywhere_does_not_win_everywhere() -> None:
    """What the norm is for: token 3 gets more than token 7 even on the right."""
    queries, keys = painted({3: (ALL, ALL, 5.0), 7: (ALL, RIGHT, 2.5)})
    tokens = (queries[0, 0] @ keys[0, 0].T).softmax(-1).view(8, 8, -1)
    assert bool((tokens[..., 3] > tokens[..., 7]).all())
    assert answer({3: (ALL, ALL, 5.0), 7: (ALL, RIGHT, 2.5)}, [[3], [7]]) == [0, 1]


def test_a_word_of_two_pieces_is_not_its_first_piece() -> None:
    """The first piece looks left, the second more so right: the first alone turns the answer round."""
    attended = {3: (ALL, LEFT, 3.0), 4: (ALL, RIGHT, 5.0), 7: (ALL, LEFT, 1.5)}
    assert answer(attended, [[3, 4], [7]]) == [1, 0]
    assert answer(attended, [[3], [7]]) == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_names_change_no_mask(checkpoint: Path, dtype: torch.dtype) -> None:
    pipe = load(checkpoint, dtype=dtype)
    given = [picture(128, 96, 1), picture(64, 128, 2)]
    plain = pipe(given)
    assert plain.semantics is None
    assert plain.captions is None
    named = pipe(given, semantic=True, caption=["a cat on a bus", "a man"], fuse=False)
    for before, after, found in zip(plain.labels, named.labels, named.semantics, strict=True):
        assert np.array_equal(before, after)
        assert np.array_equal(before, found["segmentation"])
    assert named.num_segments == plain.num_segments
    assert named.captions == ["a cat on a bus", "a man"]
    assert {info["label"] for info in named.semantics[1]["segments_info"]} == {"man"}
    assert all(np.array_equal(*pair) for pair in zip(plain.labels, pipe(given).labels, strict=True))


def test_the_second_pass_by_hand(pipe: DiffSegPipeline) -> None:
    image = picture()
    output = pipe(image, semantic=True, labels=["cat", "big bus"], fuse=False)
    with torch.no_grad():
        latents = pipe.vae.encode(images.to_tensor(image)[None] * 2 - 1).latent_dist.mean
        tokens = pipe.tokenizer("cat, big bus", padding="max_length", max_length=77, return_tensors="pt").input_ids
        context = pipe.text_encoder(tokens)[0]
        with record_attention(pipe.unet, cross=True) as record:
            pipe.unet(latents * pipe.vae.config.scaling_factor, 300, encoder_hidden_states=context)
    assert len(record.names) == 16
    words = [[1, 2, 3], [5, 6, 7, 8, 9, 10]]  # the start, c a t, a comma, b i g b u s
    total = 0
    for query, key, grid, scale in zip(record.queries, record.keys, record.grids, record.scales, strict=True):
        maps = (query[0].double() @ key[0].double().mT * scale).softmax(-1).mean(0)
        maps = torch.stack([maps[:, word].mean(-1) for word in words]).view(1, 2, *grid)
        total = total + torch.nn.functional.interpolate(maps, (128, 128), mode="bilinear")[0]
    total = total / total.square().mean((1, 2), keepdim=True).sqrt()
    infos = output.semantics[0]["segments_info"]
    assert len(infos) == output.num_segments[0] > 1
    for mask, info in enumerate(infos):
        scores = total[:, torch.from_numpy(output.labels[0]) == mask].mean(1)
        assert info["id"] == mask
        assert info["score"] == pytest.approx(float(scores.max()), rel=1e-4)
        if abs(scores[0] / scores[1] - 1) > 1e-3:
            assert info["label"] == ["cat", "big bus"][info["label_id"]] == ["cat", "big bus"][int(scores.argmax())]


def test_an_image_is_encoded_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the second pass ends where the last cross-attention has been seen. What was recorded is encoded again."""
    pipe = load(checkpoint)
    given = [picture(128, 128, seed) for seed in range(3)]
    options = {"semantic": True, "labels": ["cat", "bus"], "batch_size": 2}
    encoded = []
    encode = pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda pixels: encoded.append(len(pixels)) or encode(pixels))
    with modules_run() as ran:
        once = pipe(given, **options)
    assert encoded == [2, 1]
    assert pipe.unet.mid_block in ran
    assert pipe.unet.conv_out not in ran
    pipe.warmup(2, 128, 128)
    encoded.clear()
    again = pipe(given, **options)
    assert encoded == [2, 1, 2]
    for found, expected in zip(again.semantics, once.semantics, strict=True):
        for info, same in zip(found["segments_info"], expected["segments_info"], strict=True):
            assert info == {**same, "score": pytest.approx(same["score"], rel=1e-4)}


def test_masks_of_one_name_are_one_segment(pipe: DiffSegPipeline) -> None:
    apart = pipe(picture(), semantic=True, labels=["cat", "bus"], fuse=False).semantics[0]
    fused = pipe(picture(), semantic=True, labels=["cat", "bus"]).semantics[0]
    assert len(fused["segments_info"]) == len({info["label"] for info in apart["segments_info"]})
    for info in fused["segments_info"]:
        members = [each["id"] for each in apart["segments_info"] if each["label"] == info["label"]]
        assert info["was_fused"] == (len(members) > 1)
        assert np.array_equal(fused["segmentation"] == info["id"], np.isin(apart["segmentation"], members))


def test_several_images_as_one_by_one(pipe: DiffSegPipeline) -> None:
    """Of several sizes, with numbers of names that differ, one without any."""
    given = [picture(128, 96, 1), picture(96, 128, 2), picture(128, 96, 3), picture(128, 96, 4)]
    captions = ["a cat on a bus", "a tree", "running quickly", "a man with a dog and a bird"]
    names = ["cat", "bus", "tree", "man", "dog", "bird"]
    alone = [pipe(image, semantic=True, caption=text) for image, text in zip(given, captions, strict=True)]
    for batch_size in (1, 3):
        together = pipe(given, semantic=True, caption=captions, batch_size=batch_size)
        for one, found in zip(alone, together.semantics, strict=True):
            assert (one.semantics[0]["segmentation"] == found["segmentation"]).mean() >= 0.99
        for info in (info for each in together.semantics for info in each["segments_info"]):
            assert info["label"] is None or info["label"] == names[info["label_id"]]
    unnamed = together.semantics[2]
    assert np.array_equal(unnamed["segmentation"], together.labels[2])
    assert {info["label"] for info in unnamed["segments_info"]} == {None}


def test_captions_at_another_size_and_type(pipe: DiffSegPipeline) -> None:
    image = picture(64, 64)
    for output_type, kind in (("np", np.ndarray), ("pt", torch.Tensor), ("pil", Image.Image)):
        output = pipe(image, semantic=True, labels=["cat", "dog"], output_type=output_type)
        assert isinstance(output.semantics[0]["segmentation"], kind)
        assert np.asarray(output.semantics[0]["segmentation"]).shape == (64, 64)
    small = pipe(image, semantic=True, labels=["cat"], match_input_resolution=False, processing_resolution=128)
    assert small.semantics[0]["segmentation"].shape == (128, 128)
    assert small.semantics[0]["segments_info"][0]["label"] == "cat"
    assert len(pipe(image, return_dict=False)) == 3
    assert len(pipe(image, semantic=True, labels=["cat"], return_dict=False)) == 5


def test_a_function_writes_the_captions(pipe: DiffSegPipeline) -> None:
    seen: list[Any] = []

    def write(pictures: list[Any]) -> list[str]:
        seen.extend(pictures)
        return [f"a cat number {len(seen)}" for _ in pictures]

    output = pipe([picture(64, 128), picture()], semantic=True, captioner=write)
    assert [each.size for each in seen] == [(128, 64), (128, 128)]
    assert output.captions == ["a cat number 1", "a cat number 2"]
    for returned, said in (([], r"list \[\]"), ("ab", "str 'ab'"), (None, "NoneType"), (["a", None], "list")):
        with pytest.raises(ValueError, match=f"captioner: expected 2 texts from it, got {said}"):
            pipe([picture()] * 2, semantic=True, captioner=lambda pictures, it=returned: it, batch_size=2)


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def save_processors(folder: Path) -> None:
    """A tokenizer of a few words and an image processor."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "cat", "'", "s"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    BlipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BLIP that always says "dog"."""
    folder = tmp_path_factory.mktemp("blip")
    config = BlipConfig(
        text_config={**SMALL, **SPECIAL, "vocab_size": 8, "encoder_hidden_size": 32, "sep_token_id": 3},
        vision_config={**SMALL, "image_size": 32, "patch_size": 8},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BlipForConditionalGeneration(config)
    model.text_decoder.cls.predictions.bias.data[6] = 100.0
    model.save_pretrained(folder)
    save_processors(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blip_writes_the_captions(checkpoint: Path, blip: Path, dtype: torch.dtype) -> None:
    pipe = load(checkpoint, dtype=dtype)
    output = pipe([picture(), picture(64, 96)], semantic=True, captioner=str(blip), time_stages=True)
    assert {word for caption in output.captions for word in caption.split()} == {"dog"}
    assert [info["label"] for info in output.semantics[1]["segments_info"]] == ["dog"]
    assert output.timings["caption"] > 0
    assert output.timings["semantic"] > 0
    kept = pipe._captioner
    assert kept.model.dtype == dtype
    pipe(picture(), semantic=True, captioner=str(blip))
    assert pipe._captioner is kept


def git() -> Any:
    return GitForCausalLM(
        GitConfig(vision_config={**SMALL, "image_size": 32, "patch_size": 8}, vocab_size=8, **SMALL, **SPECIAL)
    )


def vision_encoder_decoder() -> Any:
    decoder = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=8, **SPECIAL)
    encoder = ViTConfig(**SMALL, image_size=32, patch_size=8)
    model = VisionEncoderDecoderModel(VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder))
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.pad_token_id = SPECIAL["bos_token_id"], SPECIAL["pad_token_id"]
    return model


@pytest.mark.parametrize("build", [git, vision_encoder_decoder])
def test_other_image_to_text_models(build: Any, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    save_processors(tmp_path)
    captioner = semantics.ModelCaptioner(str(tmp_path), torch.device("cpu"), torch.float32)
    captions = captioner([Image.fromarray(picture()), Image.fromarray(picture(64, 96))])
    assert len(captions) == 2
    assert {word for caption in captions for word in caption.split()} <= {"a", "dog", "cat"}
    captioner.model.generate = lambda **_: torch.tensor([[2, 6, 8, 9, 7, 3]])
    assert captioner([Image.fromarray(picture())]) == ["dog's cat"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"semantic": False, "caption": "a cat"}, ValueError, "caption: expected semantic=True with it"),
        ({"semantic": False, "labels": ["cat"]}, ValueError, "labels: expected semantic=True with it"),
        ({"caption": 3}, TypeError, "caption: expected texts, got int 3"),
        ({"caption": ["a", None]}, TypeError, "caption: expected texts, got NoneType"),
        ({"caption": b"a cat"}, TypeError, "caption: expected texts, got bytes"),
        ({"caption": ["a", "b"]}, ValueError, "caption: expected one text, or 1, one an image, got 2"),
        ({"labels": "cat"}, TypeError, "labels: expected texts, got str 'cat'"),
        ({"labels": []}, ValueError, "labels: expected at least one word"),
        ({"labels": ["cat", " "]}, ValueError, "labels: expected at least one word, and none empty"),
        (
            {"labels": ["dog"], "caption": "a cat"},
            ValueError,
            "labels: expected words of the caption 'a cat', got 'dog'",
        ),
        ({"captioner": 5}, TypeError, "captioner: expected a model's name or a function, got int 5"),
        ({"captioner": "/nowhere/at/all"}, OSError, "nowhere"),
    ],
)
def test_bad_requests(pipe: DiffSegPipeline, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pipe(picture(), **{"semantic": True, **options})


def test_a_unet_in_pixel_space_has_no_names() -> None:
    unet = testing.tiny_unet("sd1", in_channels=3, out_channels=3, sample_size=32)
    with pytest.raises(ValueError, match="semantic: expected a checkpoint with a text encoder"):
        DiffSegPipeline(unet)(picture(32, 32), semantic=True, labels=["cat"])


def test_overflow_in_the_second_pass_is_reported(pipe: DiffSegPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    own = pipe.text_encoder.forward
    pipe(picture(), semantic=True, labels=["cat"])  # the empty prompt is embedded now
    monkeypatch.setattr(pipe.text_encoder, "forward", lambda ids: (own(ids)[0] * torch.nan,))
    with pytest.raises(ValueError, match="expected finite attention"):
        pipe(picture(), semantic=True, labels=["cat"])


def test_names_are_written_inside_their_segments() -> None:
    labels = np.zeros((120, 200), np.int32)
    labels[:, 100:] = 1
    blank = np.full((120, 200, 3), 128, np.uint8)
    written = visualize.write_names(blank, labels, {1: "dog"})
    changed = (written != blank).any(-1)
    assert changed[:, 100:].any()
    assert not changed[:, :100].any()
    assert visualize._inside(labels == 1) == (59, 150)
    ring = np.zeros((9, 9), bool)
    ring[2:7, 2:7] = True
    ring[4, 4] = False
    assert ring[visualize._inside(ring)]


def test_command_line(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture()).save("street.png")
    command = ["segment", "street.png", "--model", str(checkpoint), "--threshold", str(THRESHOLD)]
    assert cli.main([*command, "-o", "plain"]) == 0
    assert cli.main([*command, "-o", "named", "--labels", "traffic light, car"]) == 0
    assert sorted(path.name for path in Path("named").iterdir()) == [
        "street_labels.png", "street_overlay.png", "street_segments.json"
    ]  # fmt: skip
    assert not Path("plain", "street_segments.json").exists()
    listing = json.loads(Path("named", "street_segments.json").read_text())
    labels = np.asarray(Image.open("named/street_labels.png"))
    assert listing["caption"] == "traffic light, car"
    assert [info["id"] for info in listing["segments_info"]] == sorted(np.unique(labels))
    assert {info["label"] for info in listing["segments_info"]} <= {"traffic light", "car"}
    assert cli.main([*command, "-o", "kept", "--caption", "a car in the street", "--keep-masks"]) == 0
    assert np.array_equal(
        np.asarray(Image.open("kept/street_labels.png")), np.asarray(Image.open("plain/street_labels.png"))
    )
    assert cli.main([*command, "-o", "other", "--labels", "Straße, 狗"]) == 0
    assert '"caption": "Straße, 狗"' in Path("other", "street_segments.json").read_text("utf-8")
    capsys.readouterr()
    assert cli.main([*command, "-o", "named", "--labels", "traffic light, car"]) == 0
    assert "1 of 1 images have outputs in named and are skipped (--force overwrites)" in capsys.readouterr().err
    assert cli.main([*command, "-o", "named", "--labels", "car"]) == 2
    assert 'other settings: labels was "traffic light, car", is "car"' in capsys.readouterr().err
    assert cli.main([*command, "-o", "named", "--force"]) == 0
    assert not Path("named", "street_segments.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "cat,"], "--labels: expected at least one word, and none empty, got ['cat', '']"),
        (["--caption", "a dog", "--labels", "cat"], "--labels: expected"),
    ],
)
def test_command_line_with_wrong_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, options: list[str], message: str
) -> None:
    monkeypatch.setattr(DiffSegPipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    Image.fromarray(picture(64, 64)).save(tmp_path / "a.png")
    command = ["segment", str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), "--model", "owner/name"]
    assert cli.main([*command, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_command_line_without_the_tagger(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "HanTa.HanoverTagger", None)
    semantics.tagger.cache_clear()
    Image.fromarray(picture(64, 64)).save(tmp_path / "a.png")
    command = ["segment", str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), "--model", str(checkpoint)]
    assert cli.main([*command, "--semantic"]) == 2
    assert "pip install -e '.[semantic]' in a checkout" in capsys.readouterr().err
    assert cli.main([*command, "--caption", "a cat", "--labels", "cat"]) == 0


def test_command_line_without_a_text_encoder(tmp_path: Path, capsys: Any) -> None:
    Image.fromarray(picture(64, 64)).save(tmp_path / "a.png")
    assert cli.main(["segment", str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), "--semantic"]) == 2
    assert "--semantic: expected a model with a text encoder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
