"""Bilinear sampling, as torch does it with ``align_corners=False``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def taps(position, small, large):
    """The two cells that bilinear upsampling from ``small`` to ``large`` cells reads, and the second one's weight."""
    source = tl.maximum((position.to(tl.float32) + 0.5) * (small * 1.0 / large) - 0.5, 0.0)
    first = tl.minimum(source.to(tl.int32), small - 1)
    return first, tl.minimum(first + 1, small - 1), source - first.to(tl.float32)
