"""Finds the two kernels of this package that take longest in one stage at SD 1.4's shapes, on a GPU.

python benchmarks/slowest_kernels.py          # name, and which launch of that name is the longest, from 0
python benchmarks/slowest_kernels.py --run    # runs the stage once, for a profiler around it
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable

import torch

import diffseg
from diffseg.bench import cases

OWN = re.compile(r"^_\w+_kernel$|diffseg::")  # Triton's and CUDA's


def main() -> None:
    device = torch.device("cuda")
    case = cases.sd14((512, 512), 1, device, torch.float16)

    def run() -> None:
        for backend in diffseg.available_backends("cuda"):
            if backend != "reference":
                diffseg.segment(
                    case.queries, case.keys, case.size, grids=case.grids, logsumexps=case.logsumexps, backend=backend
                )
        torch.cuda.synchronize()

    if "--run" in sys.argv:
        run()
        return
    run()  # compiles
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
    events = sorted(profile.events(), key=lambda each: each.time_range.start)
    for name, launch, _ in longest_launches((each.name, each.device_time_total) for each in events)[:2]:
        print(name, launch)


def longest_launches(launches: Iterable[tuple[str, float]]) -> list[tuple[str, int, float]]:
    """Of launches in their order, each with its time: each kernel's name, its longest launch and that one's time."""
    times = defaultdict(list)
    for signature, time in launches:
        if OWN.search(signature):
            times[re.findall(r"\w+_kernel", signature)[0]].append(time)
    found = [(name, max(range(len(all_of)), key=all_of.__getitem__), max(all_of)) for name, all_of in times.items()]
    return sorted(found, key=lambda each: -each[2])


if __name__ == "__main__":
    main()
