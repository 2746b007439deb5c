"""Bilinear sampling, as torch does it with ``align_corners=False``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def taps(position, small, large):
    """The two cells that bilinear upsampling from ``small`` to ``large`` cells reads, and the second one's weight.

    In whole numbers up to the last division: where a weight is 0 or nearly so, its rounding error would weigh a large
    neighbour.
    """
    unit = 2 * large
    source = tl.maximum((2 * position + 1) * small - large, 0)
    first = tl.minimum(source // unit, small - 1)
    return first, tl.minimum(first + 1, small - 1), (source - first * unit).to(tl.float32) / unit
