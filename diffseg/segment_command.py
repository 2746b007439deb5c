"""``diffseg segment``: which files are read and written, and what is said of them.

The work is done by :mod:`diffseg.folder`.
"""

from __future__ import annotations

import argparse
import glob
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import loading, runs
from .checks import RULES
from .folder import Job, segment_files, settings_of
from .images import SUFFIXES, files_in
from .loading import UsageError

_NOTED = (  # in the files of labels
    "model", "variant", "dtype", "threshold", "anchors", "iterations", "rule", "weights", "timestep",
    "processing_resolution", "refine", "semantic", "caption", "labels", "captioner", "keep_masks",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder or quoted glob pattern")
    parser.add_argument("-o", "--output", default="segments", metavar="DIR", help="folder (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="overwrite outputs that exist")
    loading.add_arguments(parser)
    loading.add_parameters(parser)
    parser.add_argument("--rule", choices=RULES, default="paper", help="merging rule (default: %(default)s)")
    parser.add_argument(
        "--resolution", dest="processing_resolution", type=loading.positive_int, metavar="SIDE",
        help="short for --processing-resolution",
    )  # fmt: skip
    parser.add_argument("--semantic", action="store_true", help="name the segments by the nouns of a caption")
    parser.add_argument("--caption", metavar="TEXT", help="the caption, instead of one that a model writes")
    parser.add_argument("--labels", metavar="A,B,...", help="the names to choose from, instead of nouns")
    parser.add_argument("--captioner", metavar="MODEL", help="image-to-text model (default: BLIP)")
    parser.add_argument("--keep-masks", action="store_true", help="do not fuse the masks that get the same name")
    parser.add_argument(
        "--batch-size", type=loading.positive_int, default=2, metavar="N", help="images a pass (default: %(default)s)"
    )
    parser.add_argument(
        "--time", action="store_true", help="print how long each stage took, without decoding and writing"
    )


def run(options: argparse.Namespace) -> int:
    """Writes NAME_labels.png, whose pixel values are segments, and NAME_overlay.png, with outlines, for each image.

    With --semantic, --caption or --labels, masks of one name are one segment, NAME_segments.json lists the segments and
    the overlay names them.
    """
    options.semantic = options.semantic or options.caption is not None or options.labels is not None
    for name, given in (("--captioner", options.captioner is not None), ("--keep-masks", options.keep_masks)):
        if given and not options.semantic:
            raise UsageError(f"{name}: expected --semantic, --caption or --labels with it")
    output = Path(options.output)
    loading.check_output("--output", output)
    loading.check_backend(options.backend, loading.find_device(options.device))
    loading.check_checkpoint("--model", options.model)
    loading.check_checkpoint("--captioner", options.captioner)
    jobs, incomplete = _plan(_expand(options.images, output), output, _settings(options), force=options.force)
    if not jobs:
        return 1 if incomplete else 0

    naming = _naming(options)
    pipe = loading.load_pipeline(options.model, options.device, options.dtype, variant=options.variant)
    asked = {name: getattr(options, name) for name in (*loading.OPTIONS, "processing_resolution", "refine")}
    asked |= {"time_stages": options.time, **naming}
    loading.check_options(pipe, asked)
    if naming and pipe.text_encoder is None:
        raise UsageError(
            f"--semantic: expected a model with a text encoder, such as --model {loading.STABLE_DIFFUSION}"
        )
    _load_captioner(pipe, asked)
    watched = sys.stderr.isatty()  # in a log a bar is a line each time that it is drawn
    with tqdm(total=len(jobs), unit="image", disable=len(jobs) == 1, mininterval=0.1 if watched else 30) as progress:
        say = progress.write if watched else print

        def done(job: Any, outcome: Any) -> None:
            progress.update()
            if outcome.error is not None:
                progress.write(_failure(job, outcome.error), file=sys.stderr)
            else:
                say(f"{job.overlay}  {outcome.segments} segment{'s' if outcome.segments != 1 else ''}")

        outcomes, seconds = segment_files(pipe, jobs, asked, batch_size=options.batch_size, done=done)
    failed = sum(outcome.error is not None for outcome in outcomes)
    if options.time and failed < len(jobs):
        for stage, value in seconds.items():
            print(f"{stage:>10}  {1000 * value / (len(jobs) - failed):8.1f} ms")
    if failed:
        print(f"diffseg: {failed} of {len(jobs)} images failed", file=sys.stderr)
    return 1 if failed or incomplete else 0


def _failure(job: Job, error: Exception) -> str:
    """The error of an image, which it names once."""
    return str(error) if str(job.source) in str(error) else f"{job.source}: {error}"


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What decides the segments of an image and their names, as it was asked for."""
    return {name: getattr(options, name) for name in _NOTED}


def _expand(patterns: Sequence[str], output: Path) -> list[Path]:
    """The files that paths, folders and glob patterns name, in order, each once.

    Folders and patterns do not name the results of an earlier run, nor hidden files.
    """
    files: list[Path] = []
    for pattern in patterns:
        if not pattern:
            raise UsageError("IMAGE: expected a path, got an empty one")
        path = Path(pattern)
        if path.is_dir():
            found = _without_results(files_in(path), output)
            if not found:
                raise UsageError(f"{path}: expected a folder with images ({', '.join(SUFFIXES)}), found none")
        elif path.exists():
            found = [path]
        elif not glob.has_magic(pattern):
            raise UsageError(f"{path}: no such file")
        else:
            found = sorted(Path(each) for each in glob.glob(pattern, recursive=True))
            found = _without_results(found, output)
            if not found:
                raise UsageError(f"{pattern}: no file matches")
        files += found
    return list(dict.fromkeys(files))


def _results(directory: Path, source: Path) -> tuple[Path, Path, Path]:
    """Where the labels, the overlay and the listing of an image go."""
    labels, overlay, listing = (
        directory / f"{source.stem}_{kind}" for kind in ("labels.png", "overlay.png", "segments.json")
    )
    return labels, overlay, listing


def _without_results(found: Sequence[Path], output: Path) -> list[Path]:
    """``found`` without labels and overlays, both beside their image, that are in ``output`` or noted as results."""
    there = set(found)
    results: set[Path] = set()
    for source in found:
        written = _results(source.parent, source)[:2]
        if there.issuperset(written) and (
            source.parent.resolve() == output.resolve() or settings_of(written[0]) is not None
        ):
            results.update(written)
    return [path for path in found if path not in results]


def _plan(sources: Sequence[Path], directory: Path, settings: dict[str, Any], *, force: bool) -> tuple[list[Job], int]:
    """What there is to do, and the number of images that are left with only some of their outputs.

    Without ``force`` images of which all outputs exist are left as they are, and said; so are those of which only some
    exist, unless the labels are of the same settings, as after a run that was killed. Labels of other settings are
    refused.
    """
    taken: dict[str, Path] = {}
    inputs = {source.resolve(): source for source in sources}
    jobs, kept, incomplete = [], 0, 0
    for source in sources:
        if source.stem in taken:
            raise UsageError(f"{taken[source.stem]} and {source} would both write {source.stem}_labels.png")
        taken[source.stem] = source
        labels, overlay, listing = _results(directory, source)
        named = settings["semantic"]
        stale = listing if force and not named else None
        job = Job(source, labels, overlay, listing if named else None, stale, json.dumps(settings))
        for path in job.outputs:
            if path.resolve() in inputs:
                raise UsageError(
                    f"--output: {source} would be written to {path}, which is an input too: give another folder"
                )
        missing = [output for output in job.outputs if not output.exists()]
        noted = None if force or labels in missing else settings_of(labels)
        if noted is not None and (changed := runs.changes(noted, settings)):
            raise UsageError(
                f"{labels} is of other settings: {changed}. Give those to go on, another --output, or --force to "
                "overwrite"
            )
        if force or missing == job.outputs or (missing and noted is not None):
            jobs.append(job)
        elif missing:
            incomplete += 1
            _say_incomplete(job, missing)
        else:
            kept += 1
    if kept:
        print(
            f"diffseg: {kept} of {len(sources)} images have outputs in {directory} and are skipped (--force "
            "overwrites)",
            file=sys.stderr,
        )
    return jobs, incomplete


def _say_incomplete(job: Job, missing: Sequence[Path]) -> None:
    there = [output for output in job.outputs if output not in missing]
    states = ((there, "exists", "exist"), (missing, "is missing", "are missing"))
    said = (f"{' and '.join(map(str, paths))} {one if len(paths) == 1 else more}" for paths, one, more in states)
    print(f"diffseg: {job.source}: incomplete: {', '.join(said)} (--force redoes it)", file=sys.stderr)


def _naming(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the pipeline's call that ask for names; UsageError where it would refuse them for any image."""
    if not options.semantic:
        return {}
    from . import semantics

    names = None if options.labels is None else [name.strip() for name in options.labels.split(",")]
    captioner = options.captioner or semantics.CAPTIONER
    try:
        captions, labels = semantics.check_request(options.caption, names, captioner, 1)
        if captions is not None:
            semantics.prompts(captions, labels, 1)
    except ImportError as error:
        raise UsageError(f"--semantic: {error}") from error
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    return {
        "semantic": True,
        "caption": options.caption,
        "labels": names,
        "captioner": captioner,
        "fuse": not options.keep_masks,
    }


def _load_captioner(pipe: Any, asked: dict[str, Any]) -> None:
    """Loads the model that writes captions, where one is needed, so that its error comes once."""
    if "semantic" in asked and asked["caption"] is None and asked["labels"] is None:
        try:
            pipe.load_captioner(asked["captioner"])
        except (OSError, ValueError, ImportError) as error:
            raise UsageError(f"--captioner {asked['captioner']}: {error}") from error
