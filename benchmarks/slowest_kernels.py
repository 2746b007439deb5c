"""Prints the names of the two kernels of this package that take longest in one stage at SD 1.4's shapes, on a GPU.

python -P benchmarks/slowest_kernels.py          # their names, the slowest first
python -P benchmarks/slowest_kernels.py --run    # runs the stage, for a profiler around it
"""

from __future__ import annotations

import re
import sys

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

    run()
    if "--run" in sys.argv:
        run()
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
    spent = {event.key: event.self_device_time_total for event in profile.key_averages() if OWN.search(event.key)}
    for name in sorted(spent, key=lambda each: -spent[each])[:2]:
        print(re.findall(r"\w+_kernel", name)[0])


if __name__ == "__main__":
    main()
