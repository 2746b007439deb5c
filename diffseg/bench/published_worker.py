"""Runs the published TensorFlow code on demand; started by ``published`` in an interpreter that has TensorFlow.

    python published_worker.py SEGMENTOR.py FOLDER THRESHOLD ROUNDS POINTS THREADS

FOLDER holds the maps [B, heads, n, n] as 64.npy, 32.npy, 16.npy and 8.npy. For each line on its input it runs once,
writes labels.npy and prints the seconds and the resident memory added, in bytes.
"""

import importlib
import os
import resource
import sys
import time

import numpy as np


def main() -> None:
    segmentor, folder, threshold, rounds, points, threads = sys.argv[1:]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    tensorflow = importlib.import_module("tensorflow")
    tensorflow.config.threading.set_intra_op_parallelism_threads(int(threads))
    sys.path.insert(0, os.path.dirname(segmentor))
    module = importlib.import_module("segmentor")
    weights = [np.load(os.path.join(folder, f"{side}.npy")) for side in (64, 32, 16, 8)]
    published = module.DiffSeg([float(threshold)] * int(rounds), False, int(points))
    print("ready", flush=True)
    before = peak()
    for _ in sys.stdin:
        start = time.perf_counter()
        labels = published.segment(*weights)
        seconds = time.perf_counter() - start
        np.save(os.path.join(folder, "labels.npy"), labels.astype(np.int32))
        print(seconds, peak() - before, flush=True)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
