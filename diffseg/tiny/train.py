"""Trains the bundled model: plain noise prediction on generated scenes, without any mask.

    python -m diffseg.tiny.train --output runs/tiny

Interrupt it at will: the same command goes on from the last checkpoint, with the same batches as an uninterrupted run,
since every batch follows from the seed and its step alone. At the end the averaged weights are written in fp16 as a
diffusers pipeline, ``OUTPUT/model``, that ``DiffSegPipeline.from_pretrained`` loads.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from numpy.typing import NDArray
from tqdm import tqdm

from .scenes import SIDE, TRAIN_SEEDS, scene

WEIGHTS = (0.0, 0.0, 1.0, 0.5) + (0.0,) * 12
"""Of the layers in A_f: those on the grid of 32 x 32 on the way down, the first of them twice the second.

At this size and training, attention on the smaller grids and on the way up tells segments apart hardly at all.
"""
RECIPE = (
    "seed",
    "steps",
    "scenes",
    "rich",
    "batch_size",
    "crop",
    "learning_rate",
    "timesteps",
    "uniform",
    "bf16",
    "initial",
    "sharpen",
)

_PARTS = ("unet", "ema", "optimizer", "schedule")  # of Training, that a checkpoint holds


def build_unet() -> UNet2DConditionModel:
    """SD 1.4's layer structure (self-attention 5 + 5 + 5 + 1 on four grids), narrow and in pixel space."""
    return UNet2DConditionModel(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 48, 64, 64),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=2,  # as in SD 1.4's own configuration, this is the number of heads
        cross_attention_dim=16,
        norm_num_groups=8,
    )


def build_scheduler() -> DDPMScheduler:
    """SD 1.4's noise schedule."""
    return DDPMScheduler(1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def draw_batch(scenes: NDArray[np.uint8], batch_size: int, crop: int, rng: np.random.Generator) -> torch.Tensor:
    """Crops, every fourth of a half-size scene if it is small, mirrored and with shuffled colours; in [-1, 1]."""
    batch = np.empty((batch_size, crop, crop, 3), np.uint8)
    for item in batch:
        picture = scenes[rng.integers(len(scenes))]
        if crop <= SIDE // 2 and rng.random() < 0.25:
            half = picture.astype(np.float32).reshape(SIDE // 2, 2, SIDE // 2, 2, 3).mean((1, 3))
            picture = (half + 0.5).astype(np.uint8)
        top, left = rng.integers(0, picture.shape[0] - crop + 1, 2)
        picture = picture[top : top + crop, left : left + crop]
        picture = picture[:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]
        item[:] = picture[..., rng.permutation(3)]
    return torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_timesteps(batch_size: int, usual: tuple[int, int], uniform: bool, rng: np.random.Generator) -> torch.Tensor:
    """Four fifths from ``usual``, around where segmentation reads the network, the others from all.

    The four fifths are log-uniform: as many from 5 to 10 as from 50 to 100; or uniform.
    """
    if uniform:
        drawn = rng.integers(*usual, batch_size)
    else:
        first, last = np.log(usual)
        drawn = np.exp(rng.uniform(first, last, batch_size)).astype(np.int64)
    return torch.from_numpy(np.where(rng.random(batch_size) < 0.8, drawn, rng.integers(0, 1000, batch_size)))


class Training:
    """The network, its running average and its optimizer, as far as they have come."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device(arguments.device)
        torch.manual_seed(arguments.seed)
        unet = load_initial(arguments) if arguments.initial else build_unet()
        self.unet = unet.to(self.device).train()
        self.ema = EMAModel(self.unet.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=arguments.learning_rate, weight_decay=0.01)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, 100, arguments.steps)
        self.settings = {name: getattr(arguments, name) for name in RECIPE}
        self.step = 0
        self.loss: float | None = None  # a running mean

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint; SystemExit where it is of other settings."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["settings"] != self.settings:
            raise SystemExit(
                f"{path} was made with {state['settings']}, this run asks for {self.settings}: "
                "give the same options to go on, or another --output to start anew"
            )
        for name in _PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.step, self.loss = state["step"], state["loss"]

    def save(self, path: Path) -> None:
        """Writes a checkpoint; a file that is there is replaced at once."""
        state = {"settings": self.settings, "step": self.step, "loss": self.loss}
        temporary = path.with_suffix(".tmp")
        torch.save({**state, **{name: getattr(self, name).state_dict() for name in _PARTS}}, temporary)
        os.replace(temporary, path)

    def descend(self, loss: torch.Tensor) -> None:
        """One step down the gradient of ``loss``."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())
        self.loss = loss.item() if self.loss is None else 0.98 * self.loss + 0.02 * loss.item()
        self.step += 1


def train(arguments: argparse.Namespace) -> None:
    """Trains, from the last checkpoint where there is one, and writes the model."""
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = output / "checkpoint.pt"
    training = Training(arguments)
    if checkpoint.exists():
        training.load(checkpoint)
    last = min(arguments.steps, arguments.stop or arguments.steps)
    if training.step < last:
        run_steps(training, arguments, last, checkpoint)
    unet = training.unet
    training.ema.copy_to(unet.parameters())
    if arguments.keep:
        average_with(unet, load_initial(arguments), arguments.keep)
    export(unet, output / "model")


def run_steps(training: Training, arguments: argparse.Namespace, last: int, checkpoint: Path) -> None:
    """Trains up to step ``last``; the batch of each step follows from the seed and its number."""
    forward = torch.compile(training.unet) if arguments.compile else training.unet
    scheduler = build_scheduler()
    scenes = generate_scenes(arguments)
    progress = tqdm(range(training.step, last), desc="training", initial=training.step, total=last)
    for step in progress:
        rng = np.random.default_rng((arguments.seed, step))
        training.descend(noise_loss(forward, scheduler, scenes, arguments, rng))
        progress.set_postfix(loss=f"{training.loss:.4f}")
        if training.step % arguments.checkpoint_every == 0 or training.step == last:
            training.save(checkpoint)


def generate_scenes(arguments: argparse.Namespace) -> NDArray[np.uint8]:
    """[scenes, SIDE, SIDE, 3]; with ``--rich``, those of odd seeds are rich ones."""
    seeds = tqdm(TRAIN_SEEDS[: arguments.scenes], desc="generating scenes", unit="scene")
    return np.stack([scene(seed, rich=arguments.rich and seed % 2 == 1)[0] for seed in seeds])


def noise_loss(
    forward: Any,
    scheduler: DDPMScheduler,
    scenes: NDArray[np.uint8],
    arguments: argparse.Namespace,
    rng: np.random.Generator,
) -> torch.Tensor:
    """The mean square by which the network misses the noise in a batch that ``rng`` draws."""
    device = torch.device(arguments.device)
    images = draw_batch(scenes, arguments.batch_size, arguments.crop, rng).to(device)
    timesteps = draw_timesteps(arguments.batch_size, arguments.timesteps, arguments.uniform, rng).to(device)
    noise = torch.from_numpy(rng.standard_normal(images.shape, np.float32)).to(device)
    noisy = scheduler.add_noise(images, noise, timesteps)
    context = torch.zeros(arguments.batch_size, 1, forward.config.cross_attention_dim, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
        predicted = forward(noisy, timesteps, context).sample
    return F.mse_loss(predicted.float(), noise)


def load_initial(arguments: argparse.Namespace) -> UNet2DConditionModel:
    """The network of ``--initial``, the attention that is read made sharper by ``--sharpen``."""
    unet = UNet2DConditionModel.from_pretrained(arguments.initial, subfolder="unet")
    with torch.no_grad():
        for transformer in unet.down_blocks[1].attentions:  # the layers of WEIGHTS
            transformer.transformer_blocks[0].attn1.to_q.weight.mul_(arguments.sharpen)
    return unet


def average_with(unet: UNet2DConditionModel, initial: UNet2DConditionModel, share: float) -> None:
    """Moves the weights of ``unet`` towards those of ``initial``, by ``share`` of the way ("Model soups", 2022)."""
    with torch.no_grad():
        for weight, before in zip(unet.parameters(), initial.parameters(), strict=True):
            weight.lerp_(before.to(weight), share)


def export(unet: UNet2DConditionModel, directory: Path) -> None:
    """Writes ``unet`` in fp16 as a :class:`diffseg.DiffSegPipeline` in pixel space."""
    from ..pipeline import DiffSegPipeline

    # The configuration of a network that was loaded names the folder it came from.
    nameless = UNet2DConditionModel.from_config({key: value for key, value in unet.config.items() if key[0] != "_"})
    nameless.load_state_dict(unet.state_dict())
    DiffSegPipeline(unet=nameless.eval().half(), weights=list(WEIGHTS)).save_pretrained(directory)
    print(f"wrote {directory}: choose its threshold with python -m diffseg.tiny.report --choose")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diffseg.tiny.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", required=True, help="folder of the checkpoint and, at the end, of the model")
    parser.add_argument("--steps", type=int, default=2400, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="crops a step (default: %(default)s)")
    parser.add_argument("--crop", type=int, default=32, help="side of a crop, at most 64 (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=6000, help="scenes to generate (default: %(default)s)")
    parser.add_argument("--rich", action="store_true", help="make every other scene a rich one")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="its peak (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and noise (default: %(default)s)")
    parser.add_argument(
        "--timesteps", type=int, nargs=2, default=[4, 150], metavar=("FIRST", "LAST"),
        help="range of four fifths of the draws, FIRST at least 1, log-uniform (default: 4 150)",
    )  # fmt: skip
    parser.add_argument("--uniform", action="store_true", help="draw them uniformly instead")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16: faster where the processor has them")
    parser.add_argument("--stop", type=int, metavar="STEP", help="leave the schedule of --steps off after this one")
    parser.add_argument("--initial", metavar="MODEL", help="folder of a trained model to go on from (default: none)")
    parser.add_argument(
        "--sharpen", type=float, default=1.0, metavar="FACTOR",
        help="begin with the scores of the attention that is read times FACTOR (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--keep", type=float, default=0.0, metavar="SHARE",
        help="average the trained weights with those of --initial, SHARE of the latter (default: 0)",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS", help="(default: %(default)s)")
    arguments = parser.parse_args()
    first, last = arguments.timesteps
    if not 1 <= first < last <= 1000:
        parser.error(f"--timesteps: expected 1 <= FIRST < LAST <= 1000, got {first} {last}")
    if arguments.stop is not None and arguments.stop < 1:
        parser.error(f"--stop: expected a step from 1 on, got {arguments.stop}")
    if not 0 <= arguments.keep < 1 or (arguments.keep and not arguments.initial):
        parser.error(f"--keep: expected a share from 0 to below 1, and --initial, got {arguments.keep}")
    if not arguments.sharpen > 0 or (arguments.sharpen != 1 and not arguments.initial):
        parser.error(f"--sharpen: expected a factor above 0, and --initial, got {arguments.sharpen}")
    train(arguments)


if __name__ == "__main__":
    main()
