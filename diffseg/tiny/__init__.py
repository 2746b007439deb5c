"""The bundled model: a small UNet in pixel space, for demonstration and tests (its card: ``assets/tiny/README.md``)."""

from pathlib import Path

MODEL = Path(__file__).parent.parent / "assets" / "tiny"
"""Folder of the bundled model, which ``DiffSegPipeline.from_pretrained`` loads."""
