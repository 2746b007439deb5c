"""Shapes held ready by ``pipe.warmup``: the labels of the eager pipeline, at less cost."""

import copy
import logging
import pickle
import resource
import threading
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pipelines
import pytest
import torch
from contract import skip_unless_it_runs
from diffusers import AutoencoderTiny
from pipelines import THRESHOLD, load, pixel_pipeline, quiet

import diffseg
from diffseg import capture, graphs, testing
from diffseg.pipeline import DiffSegPipeline


@pytest.fixture
def pipe():
    return pixel_pipeline()


@pytest.fixture
def replays(monkeypatch):
    """Counts the batches that recordings serve."""
    seen = []
    serve = graphs.Recording.__call__

    def counted(self, pictures):
        seen.append(len(pictures))
        return serve(self, pictures)

    monkeypatch.setattr(graphs.Recording, "__call__", counted)
    return seen


def picture(height=16, width=16, seed=0):
    return pipelines.picture(height, width, seed)


def assert_same(output, expected):
    assert output.num_segments == expected.num_segments
    for one, other in zip(output.labels, expected.labels, strict=True):
        assert np.array_equal(one, other)


def test_recorded_labels_are_the_eager_ones(checkpoint, replays):
    pipe = load(checkpoint)
    given = [picture(128, 128, seed) for seed in range(4)]
    before = pipe(given, batch_size=2)
    pipe.warmup(2, 128, 128)
    found = pipe(given, batch_size=2)
    assert replays == [2, 2]
    pipe._recordings.clear()
    assert_same(pipe(given, batch_size=2), found)
    assert not pipe.unet.conv_in.weight.is_contiguous()
    pipe.release()
    assert pipe.unet.conv_in.weight.is_contiguous()
    assert_same(pipe(given, batch_size=2), before)
    assert replays == [2, 2]
    for one, other in zip(found.labels, before.labels, strict=True):
        assert (one == other).mean() >= 0.999
    assert max(found.num_segments) > 1


def test_a_layout_that_was_chosen_stays(checkpoint):
    pipe = quiet(DiffSegPipeline.from_pretrained(checkpoint))
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.warmup(1, 128, 128)
    pipe.release()
    assert pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert pipe.vae.encoder.conv_in.weight.is_contiguous()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))], ids=["copy", "pickle"]
)
def test_a_warm_pipeline_can_be_copied(pipe, copied):
    pipe.warmup(1, 16, 16)
    found = pipe(picture())
    other = copied(pipe)
    assert_same(other(picture()), found)
    assert not other._recordings._held
    other.release()
    assert pipe._recordings._held


def test_inference_mode_leaves_no_trace(pipe, replays):
    """Its tensors could not be written to outside of it, nor be trained."""
    expected = pipe(picture())
    with torch.inference_mode():
        pipe.warmup(1, 16, 16)
    assert not any(weight.is_inference() for weight in pipe.unet.parameters())
    assert (pipe(picture()).labels[0] == expected.labels[0]).mean() >= 0.999
    assert replays == [1]
    with torch.inference_mode():
        pipe.release()
    assert not any(weight.is_inference() for weight in pipe.unet.parameters())


def test_options_belong_to_a_recording(pipe, replays):
    options = {"threshold": [0.02, 0.01], "iterations": 2, "rule": "official", "weights": [1, 2, 3, 4], "anchors": 5}
    pipe.warmup(1, 16, 16, timestep=20, **options)
    found = pipe(picture(), timestep=20, **options)
    assert replays == [1]
    pipe(picture(), timestep=21, **options)
    pipe(picture(), timestep=20, **{**options, "anchors": 6})
    pipe(picture(), timestep=20, refine=True, **options)
    pipe(picture(), timestep=20, time_stages=True, **options)
    assert replays == [1]
    pipe.release()
    assert_same(pipe(picture(), timestep=20, **options), found)


def test_several_shapes_and_sizes_of_labels(pipe, replays):
    sizes = [(16, 16), (16, 32), (24, 32), (30, 40), (7, 9)]
    expected = [pipe(picture(*size)) for size in sizes]
    pipe._lay_out()
    for size in sizes[:3]:
        pipe.warmup(1, *size)
    pipe.warmup(2, 16, 16)
    for _ in range(2):
        for size, other in zip(sizes, expected, strict=True):
            assert_same(pipe(picture(*size)), other)
    assert pipe.processed_size((7, 9), None) == pipe.processed_size((24, 32), None) == (12, 16)
    assert replays == [1] * 10  # the two last by a recording of another size, with labels at their own
    small = pipe(picture(), match_input_resolution=False).labels[0]
    assert small.shape == (16, 16)
    assert_same(
        pipe([picture(16, 16, 1), picture(8, 8, 2)], batch_size=2), pipe([picture(16, 16, 1), picture(8, 8, 2)])
    )
    assert replays[-3:] == [2, 1, 1]


def test_what_is_not_recorded_runs_eagerly_and_is_said_once(pipe, replays, caplog):
    with caplog.at_level(logging.DEBUG, logger="diffseg.graphs"):
        pipe(picture(16, 32))
        assert caplog.messages == []
        pipe.warmup(1, 16, 16)
        pipe([picture(16, 32), picture(16, 32)])
        pipe(picture(16, 32))
        pipe([picture(), picture()], batch_size=2)
    assert replays == []
    assert len(caplog.messages) == 2
    assert "Shape(batch_size=1, size=(8, 16))" in caplog.messages[0]
    assert "Shape(batch_size=2, size=(16, 16))" in caplog.messages[1]
    assert all("not recorded: it runs eagerly" in message for message in caplog.messages)


def test_moved_cast_or_replaced_networks_end_the_recordings(pipe, replays):
    pipe.warmup(1, 16, 16)
    pipe.to(torch.float64)
    assert not pipe._recordings._held
    pipe.warmup(1, 16, 16)
    pipe.unet.to(torch.float32)
    assert pipe(picture()).labels[0].shape == (16, 16)
    pipe.warmup(1, 16, 16)
    pipe.unet = pixel_pipeline(sample_size=8).unet
    pipe(picture())
    assert replays == []


def join_as_on_a_gpu(pipe):
    with pytest.MonkeyPatch.context() as context:
        context.setattr(DiffSegPipeline, "_execution_device", torch.device("cuda"))
        pipe._lay_out()


def joined(unet):
    return any(name.endswith(".to_qkv.weight") for name in unet.state_dict())


class Adapted(torch.nn.Linear):
    """As PEFT wraps a projection: its ``weight`` is not all that it multiplies by."""

    def forward(self, values):
        return 2 * super().forward(values)


def adapt(attn):
    attn.to_k = Adapted(attn.to_k.in_features, attn.to_k.out_features, bias=False)


def quantise(attn):
    """As torchao does, to a weight of a class of its own."""
    values = attn.to_q.weight.detach().as_subclass(type("Quantised", (torch.Tensor,), {}))
    attn.to_q.weight = torch.nn.Parameter(values, requires_grad=False)


def hook(attn):
    attn.to_v.register_forward_hook(lambda module, args, output: 2 * output)


@pytest.mark.parametrize("alter", [adapt, quantise, hook])
def test_projections_that_are_more_than_a_matrix_stay_apart(pipe, alter):
    alter(pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1)
    assert not graphs.fuse_projections(pipe.unet)
    assert not joined(pipe.unet)


def test_new_weights_come_between_release_and_warmup(pipe, replays):
    """Joined projections are copies: until they come apart, weights cannot be loaded."""
    other = pixel_pipeline(seed=1)
    expected = other(picture())
    join_as_on_a_gpu(pipe)
    pipe.warmup(1, 16, 16)
    before = pipe(picture())
    with pytest.raises(RuntimeError, match="to_qkv"):
        pipe.unet.load_state_dict(other.unet.state_dict())
    pipe.release()
    pipe.unet.load_state_dict(other.unet.state_dict())
    join_as_on_a_gpu(pipe)
    pipe.warmup(1, 16, 16)
    found = pipe(picture())
    assert replays == [1, 1]
    assert (found.labels[0] == expected.labels[0]).mean() >= 0.99
    assert not np.array_equal(found.labels[0], before.labels[0])


def test_joined_projections_are_not_saved(pipe, tmp_path):
    join_as_on_a_gpu(pipe)
    with pytest.raises(ValueError, match=r"save_pretrained: .* call release\(\) first"):
        pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    pipe.release()
    pipe.save_pretrained(tmp_path)
    assert DiffSegPipeline.from_pretrained(tmp_path).unet.state_dict().keys() == pipe.unet.state_dict().keys()


def test_a_replaced_unet_is_split(pipe):
    first, second = pipe.unet, pixel_pipeline(seed=1).unet
    join_as_on_a_gpu(pipe)
    assert joined(first)
    pipe.unet = second
    join_as_on_a_gpu(pipe)
    assert joined(second)
    assert not joined(first)
    pipe.unet = first
    pipe.release()
    assert not joined(second)
    pipe.release()


def test_joined_projections_come_apart(checkpoint):
    pipe = load(checkpoint)
    own, keys = pipe.unet.attn_processors, set(pipe.unet.state_dict())
    expected = pipe(picture(128, 128)).labels[0]
    assert graphs.fuse_projections(pipe.unet)
    assert not graphs.fuse_projections(pipe.unet)
    assert (pipe(picture(128, 128)).labels[0] == expected).mean() >= 0.999
    graphs.split_projections(pipe.unet)
    assert pipe.unet.attn_processors == own
    assert set(pipe.unet.state_dict()) == keys
    assert np.array_equal(pipe(picture(128, 128)).labels[0], expected)


def test_compiled_networks(pipe, checkpoint, monkeypatch, replays):
    compiled = []
    compiler = torch.compile

    def spy(function, **options):
        compiled.append((function, options))
        return compiler(function, backend="eager", fullgraph=True, **options)

    monkeypatch.setattr(torch, "compile", spy)
    expected = pipe(picture())
    pipe.warmup(1, 16, 16, compile=True)
    pipe.warmup(2, 16, 16, compile=True)
    found = pipe(picture())
    pipe([picture(), picture()], batch_size=2)
    assert replays == [1, 2]
    assert compiled == [(pipe._latents, {"dynamic": False}), (pipe.unet, {"dynamic": False})]
    assert (found.labels[0] == expected.labels[0]).mean() >= 0.999
    latent = DiffSegPipeline.from_pretrained(checkpoint)
    pixels = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(spy(latent._latents)(pixels), latent._latents(pixels))


def test_a_replaced_unet_is_compiled(pipe, monkeypatch):
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(function, backend="eager", **options))
    pipe.warmup(1, 16, 16, compile=True)
    pipe.unet = pixel_pipeline(seed=1).unet
    expected = pipe(picture())
    pipe.warmup(1, 16, 16, compile=True)
    assert (pipe(picture()).labels[0] == expected.labels[0]).mean() >= 0.999


def test_logsumexps_reach_aggregate(pipe, monkeypatch):
    given = []
    aggregate = diffseg.ops.aggregate

    def spy(*arguments, logsumexps, **options):
        given.append(logsumexps)
        return aggregate(*arguments, logsumexps=logsumexps, **options)

    monkeypatch.setattr(diffseg.ops, "aggregate", spy)
    pipe.warmup(1, 16, 16)
    pipe(picture())
    assert len(given) == 2
    for logsumexps in given:
        assert [each.shape[1:] for each in logsumexps] == [(8, 256), (8, 64), (8, 256), (8, 256)]


def test_overflow_is_reported_by_recordings(pipe):
    pipe.warmup(2, 16, 16)
    with torch.no_grad():
        pipe.unet.conv_in.weight.fill_(1e38)
    with pytest.raises(ValueError, match="expected finite attention"):
        pipe([picture(), picture()], batch_size=2)


def test_no_segments_means_overflow(pipe, monkeypatch):
    """On a GPU no kernel looks: the flag comes with the labels."""
    proposals = pipe._proposals
    monkeypatch.setattr(pipe, "_proposals", lambda *a, **k: (proposals(*a, **k)[0], torch.tensor([True, False, True])))
    with pytest.raises(ValueError, match="image 1: expected finite attention"):
        pipe([picture(), picture(), picture()], batch_size=3)


def test_no_call_asks_diffusers_where_and_in_what_it_runs(pipe, monkeypatch):
    """The answers walk the modules several times."""
    for name in ("dtype", "device"):
        monkeypatch.setattr(type(pipe.unet), name, property(lambda self: pytest.fail("walked")))
    assert pipe(picture()).labels[0].shape == (16, 16)


def test_a_recorded_call_does_not_walk_the_modules(pipe, monkeypatch):
    """Which diffusers does to say where a pipeline runs; in a full-size UNet that takes as long as half the forward."""
    pipe.warmup(1, 16, 16)
    found = graphs.Segmented([torch.zeros(16, 16, dtype=torch.int32)], torch.ones(1, dtype=torch.int32), None, None)
    monkeypatch.setattr(graphs.Recording, "__call__", lambda self, pictures: found)
    monkeypatch.setattr(torch.nn.Module, "modules", lambda self: pytest.fail("walked"))
    assert pipe(picture()).num_segments == [1]


def test_threads_take_turns(pipe):
    pipe.warmup(1, 16, 16)
    sizes = [(16, 16), (16, 32), (16, 16), (24, 16)]
    expected = [pipe(picture(*size, seed)) for seed, size in enumerate(sizes)]
    found = {}

    def work(seed):
        found[seed] = [pipe(picture(*sizes[seed], seed)) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, other in enumerate(expected):
        for output in found[seed]:
            assert_same(output, other)


def test_labels_that_stay_on_the_device_are_copied_before_the_wait(pipe, monkeypatch):
    """After it another thread may replay on a stream of its own."""
    expected = pipe(picture(), output_type="pt").labels[0]
    buffers = []
    at, wait = graphs.Segmented.at, graphs.download

    def keep(*arguments):
        buffers.append(at(*arguments))
        return buffers[-1]

    def wait_while_another_replays(tensors):
        arrived = wait(tensors)
        for each in buffers[-1].labels:
            each.fill_(-1)
        return arrived

    monkeypatch.setattr(graphs.Segmented, "at", keep)
    monkeypatch.setattr(diffseg.pipeline, "download", wait_while_another_replays)
    assert torch.equal(pipe(picture(), output_type="pt").labels[0], expected)


class FakeCuda:
    """Streams and captures without a device; as torch's, a capture that fails leaves its stream current."""

    def __init__(self, monkeypatch):
        self.current, self.captures, self.most_captures = threading.local(), 0, 0
        monkeypatch.setattr(graphs, "staging", lambda shape, device: (torch.zeros(1), torch.zeros(1)))
        for name, fake in {
            "Stream": lambda: SimpleNamespace(cuda_stream=0, wait_stream=lambda other: None),
            "current_stream": lambda: getattr(self.current, "stream", None),
            "CUDAGraph": object,
            "device": lambda device: nullcontext(),
            "stream": self.stream,
            "graph": self.graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    @contextmanager
    def stream(self, stream):
        before = torch.cuda.current_stream()
        self.current.stream = stream
        try:
            yield
        finally:
            self.current.stream = before

    @contextmanager
    def graph(self, graph, stream, capture_error_mode):
        self.captures += 1
        self.most_captures = max(self.captures, self.most_captures)
        before = torch.cuda.current_stream()
        self.current.stream = stream
        time.sleep(0.01)
        yield
        self.current.stream = before
        self.captures -= 1


def recording_on_a_gpu(run):
    return graphs.Recording(run, graphs.Shape(1, (16, 16)), torch.device("cuda"))


def test_one_capture_at_a_time(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    threads = [threading.Thread(target=recording_on_a_gpu, args=(lambda pixels: None,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (cuda.captures, cuda.most_captures) == (0, 1)


def test_a_capture_that_fails_leaves_the_current_stream(monkeypatch):
    cuda = FakeCuda(monkeypatch)

    def run(pixels):
        if cuda.captures:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        recording_on_a_gpu(run)
    assert torch.cuda.current_stream() is None


def test_downloads_are_to_the_host_whatever_the_default_device(monkeypatch):
    allocate = torch.empty

    def empty(*shape, device="meta", pin_memory=False, **options):
        return allocate(*shape, device=device, **options)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    event = SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    labels = torch.arange(6, dtype=torch.int32)
    assert torch.equal(graphs.download([labels])[0], labels)


def test_pipelines_that_share_a_unet_share_its_lock(pipe):
    other = DiffSegPipeline.from_pipe(pipe)
    assert graphs.lock_of(other.unet) is graphs.lock_of(pipe.unet)
    assert graphs.lock_of(torch.compile(pipe.unet)) is graphs.lock_of(pipe.unet)
    assert graphs.lock_of(pixel_pipeline().unet) is not graphs.lock_of(pipe.unet)


def test_a_cast_waits_for_the_call_under_way(pipe):
    casts = threading.Thread(target=pipe.to, args=(torch.float64,))

    def during(*_):
        if not casts.ident:
            casts.start()
            casts.join(0.5)
            assert casts.is_alive()

    pipe.unet.mid_block.register_forward_pre_hook(during)
    assert pipe(picture()).num_segments[0] >= 1
    casts.join()
    assert pipe.unet.dtype == torch.float64
    assert pipe(picture()).num_segments[0] >= 1


def test_release_after_an_interrupted_warmup_lays_the_weights_out_as_before(pipe, monkeypatch):
    lay_out = pipe.unet.to

    def interrupted(**layout):
        lay_out(**layout)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipe.unet, "to", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipe.warmup(1, 16, 16)
    monkeypatch.undo()
    pipe.release()
    assert all(each.is_contiguous() for each in pipe.unet.parameters())


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 16, 16), {}, ValueError, "batch_size: expected at least 1, got 0"),
        ((1, 16.5, 16), {}, TypeError, "height: expected an int, got float 16.5"),
        ((1, 16, 16), {"threshold": -1}, ValueError, "threshold: expected positive"),
        ((1, 16, 16), {"backend": "numpy"}, ValueError, "backend: expected one of"),
    ],
)
def test_wrong_warmups(pipe, arguments, options, error, message):
    with pytest.raises(error, match=message):
        pipe.warmup(*arguments, **options)


def offload_groups(unet):
    cpu = torch.device("cpu")
    unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


@pytest.mark.parametrize(
    "move",
    [
        lambda unet: setattr(unet, "_hf_hook", object()),
        offload_groups,
        lambda unet: unet.enable_layerwise_casting(torch.bfloat16, torch.float32),
    ],
    ids=["accelerate", "groups", "casts"],
)
def test_weights_that_hooks_move_or_cast_are_not_recorded(pipe, move):
    move(pipe.unet)
    with pytest.raises(
        ValueError, match="warmup: expected weights that stay as they are, found hooks that move or cast"
    ):
        pipe.warmup(1, 16, 16)


def test_a_tiny_vae(checkpoint, tmp_path):
    whole = DiffSegPipeline.from_pretrained(checkpoint)
    torch.manual_seed(0)
    tiny = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).eval()
    pipe = quiet(DiffSegPipeline(whole.unet, tiny, whole.text_encoder, whole.tokenizer, threshold=THRESHOLD))
    assert pipe.size_multiple == whole.size_multiple
    image = picture(128, 128)
    with torch.no_grad():
        pixels = diffseg.images.to_tensor(image)[None] * 2 - 1
        with diffseg.record_attention(pipe.unet) as record:
            pipe.unet(tiny.encode(pixels).latents, 300, encoder_hidden_states=pipe._context(1))
    expected = diffseg.segment(record.queries, record.keys, (128, 128), threshold=THRESHOLD)[0].numpy()
    assert (pipe(image).labels[0] == expected).mean() >= 0.999
    pipe.save_pretrained(tmp_path)
    again = quiet(DiffSegPipeline.from_pretrained(tmp_path))
    assert isinstance(again.vae, AutoencoderTiny)
    assert np.array_equal(again(image).labels[0], pipe(image).labels[0])


def test_soak():
    """500 calls of mixed shapes: memory stays flat, and no shape's result changes."""
    pipe = pixel_pipeline()
    given = [([picture(*size, seed) for seed in range(number)], number) for size, number in (
        ((16, 16), 1), ((16, 16), 2), ((16, 24), 1), ((32, 16), 3), ((20, 50), 1), ((5, 5), 1),
    )]  # fmt: skip
    pipe.warmup(1, 16, 16)
    pipe.warmup(3, 32, 16)
    first = [pipe(images, batch_size=number) for images, number in given]
    order = np.random.default_rng(0).integers(len(given), size=500)
    for turn, index in enumerate(order):
        images, number = given[index]
        assert_same(pipe(images, batch_size=number), first[index])
        if turn == 100:
            settled = resident()
    assert resident() - settled < 16 * 2**20


def resident():
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


# On a GPU


@pytest.fixture
def gpu_pipe(checkpoint):
    return quiet(DiffSegPipeline.from_pretrained(checkpoint, threshold=THRESHOLD, dtype=torch.float16).to("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "inductor"])
def test_a_graph_gives_the_eager_labels(gpu_pipe, replays, backend, compile):
    skip_unless_it_runs(backend)
    given = [picture(128, 128, seed) for seed in range(6)]
    gpu_pipe.warmup(2, 128, 128, backend=backend, compile=compile)
    gpu_pipe.warmup(1, 64, 128, backend=backend, compile=compile)
    found = [gpu_pipe(given, batch_size=2, backend=backend) for _ in range(3)]
    assert replays == [2] * 9
    for again in found[1:]:
        assert_same(again, found[0])
    recording = next(iter(gpu_pipe._recordings._held.values()))
    with torch.no_grad():  # the same calls without the graph, on the last batch's pixels
        again = recording._run(recording._pixels)
    for one, other in zip(again.labels, recording._result.labels, strict=True):
        assert torch.equal(one, other)
    gpu_pipe._recordings.clear()
    if not compile:  # compiled networks round otherwise, and these maps lie too close together for equal labels
        assert_same(gpu_pipe(given, batch_size=2, backend=backend), found[0])


@pytest.mark.gpu
@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_a_batch_waits_once(gpu_pipe, monkeypatch, ready, output_type):
    """Any other wait is an error: the events that downloads wait for are not watched, so they are counted."""
    waits = []
    synchronize = torch.cuda.Event.synchronize
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda self: (waits.append(1), synchronize(self))[1])
    given = [picture(128, 128, seed) for seed in range(4)]
    options = {"batch_size": 2, "output_type": output_type}
    gpu_pipe(given, **options)
    if ready:
        gpu_pipe.warmup(2, 128, 128)
    waits.clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gpu_pipe(given, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 2


@pytest.mark.gpu
def test_graphs_take_log_sum_exps_from_the_attention_call(gpu_pipe, monkeypatch):
    taken = []
    operator = capture.scaled_dot_product_attention
    monkeypatch.setattr(capture, "scaled_dot_product_attention", lambda *a: (taken.append(operator(*a)), taken[-1])[1])
    gpu_pipe.warmup(1, 128, 128)
    assert taken
    assert all(logsumexp is not None for _, logsumexp in taken)


@pytest.mark.gpu
def test_overflow_in_a_graph(gpu_pipe):
    gpu_pipe.warmup(2, 128, 128)
    with torch.no_grad():
        gpu_pipe.unet.conv_in.weight.fill_(6e4)
    with pytest.raises(ValueError, match=r"expected finite attention, found NaN or infinity.*bfloat16"):
        gpu_pipe([picture(128, 128), picture(128, 128)], batch_size=2)


@pytest.mark.gpu
def test_release_gives_the_memory_back(gpu_pipe):
    def reserved():
        torch._C._cuda_clearCublasWorkspaces()  # one a stream, which PyTorch may keep until the process ends
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    gpu_pipe(picture(128, 128))
    before = reserved()
    for size in ((128, 128), (128, 256), (192, 128)):
        gpu_pipe.warmup(1, *size, processing_resolution=size)
    held = torch.cuda.memory_reserved()
    gpu_pipe.release()
    assert reserved() <= before + 2**21 < held


@pytest.mark.gpu
def test_graphs_that_live_at_once_have_streams_of_their_own(gpu_pipe):
    """More warm-ups than PyTorch has streams, which it hands out in turn."""
    gpu_pipe.warmup(1, 128, 128)
    for _ in range(33):
        gpu_pipe.warmup(1, 64, 128)
    streams = [each._stream.cuda_stream for each in gpu_pipe._recordings._held.values()]
    assert len(streams) == len(set(streams)) == 2


@pytest.mark.gpu
def test_soak_on_a_gpu(gpu_pipe):
    sizes = [(128, 128), (64, 128), (128, 64), (100, 200)]
    for size in sizes[:2]:
        gpu_pipe.warmup(1, *size)
    first = [gpu_pipe(picture(*size)) for size in sizes]
    for turn, index in enumerate(np.random.default_rng(0).integers(len(sizes), size=500)):
        assert_same(gpu_pipe(picture(*sizes[index])), first[index])
        if turn == 100:
            settled = torch.cuda.memory_reserved()
    assert torch.cuda.memory_reserved() == settled


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_full_size_against_the_bare_forward(batch_size, backend, record_property, monkeypatch):
    """Stable Diffusion 1.4's architecture at 512: with segmentation against the same recorded forward without it."""
    skip_unless_it_runs(backend)
    for name in ("empty", "empty_like"):  # a graph would poison its memory at every replay
        monkeypatch.setattr(torch, name, getattr(torch, name).__wrapped__)
    pipe = quiet(DiffSegPipeline(**testing.stable_diffusion_components(dtype=torch.float16, device="cuda")))
    pipe.to("cuda")
    given = [picture(512, 512, seed) for seed in range(batch_size)]
    pipe.warmup(batch_size, 512, 512, backend=backend)
    bare = torch.cuda.CUDAGraph()
    pixels = torch.rand(batch_size, 3, 512, 512, device="cuda")
    steps = torch.full((batch_size,), 300, device="cuda")

    @torch.no_grad()
    def forward():
        latents = pipe._latents(pixels)
        return pipe.unet(latents, steps, encoder_hidden_states=pipe._context(batch_size).to(latents)).sample

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(bare):
        forward()
    ours = next(iter(pipe._recordings._held.values()))._graph
    assert ours is not None
    times = {name: [] for name in ("whole", "bare", "call")}
    for _ in range(30):
        for name, run in (
            ("whole", ours.replay),
            ("bare", bare.replay),
            ("call", lambda: pipe(given, batch_size=batch_size, backend=backend)),
        ):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    medians = {name: float(np.median(values)) for name, values in times.items()}
    images_a_second = 1000 * batch_size / medians["call"]
    record_property("milliseconds", medians)
    record_property("images_a_second", images_a_second)
    record_property("peak_bytes", torch.cuda.max_memory_allocated())
    assert medians["whole"] <= 1.05 * medians["bare"]
    if "H100" in torch.cuda.get_device_name():
        assert images_a_second >= 60
