"""A contestant in a separate process, controlled through pipes.

``python -m benchmarks.worker CONTESTANT PROBLEM DEVICE`` (``cpu`` or ``cuda``).
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

CONTESTANTS = {
    "metarun eager": ("own", "Own", ("eager",)),
    "metarun replay": ("own", "Own", ("replay",)),
    "metarun compile": ("own", "Own", ("compile",)),
    "metarun xla": ("own", "Own", ("xla",)),
    "metarun cudagraph": ("own", "Own", ("cudagraph",)),
    "metarun replay, threads": ("own", "Own", ("replay", "threads")),
    "metarun compile, threads": ("own", "Own", ("compile", "threads")),
    "plain torch": ("torch_peers", "plain_torch", ()),
    "learn2learn": ("torch_peers", "learn2learn", ()),
    "higher": ("torch_peers", "higher", ()),
    "TorchOpt": ("torch_peers", "torchopt", ()),
    "JAX": ("jax_peer", "JaxContestant", ()),
}
"""Name → module, callable, and further arguments."""


def main() -> None:
    """Answer ``gradient PATH`` with ``ok`` and ``step N`` with the seconds of N steps, until the input ends."""
    from benchmarks.problems import PROBLEMS

    name, problem, device = sys.argv[1], PROBLEMS[sys.argv[2]], sys.argv[3]
    # The output of a contestant must not be mistaken for an answer.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: problem.cores])
    module, target, arguments = CONTESTANTS[name]
    began = time.perf_counter()
    contestant: Any
    try:
        if module != "jax_peer":
            import torch

            torch.set_num_threads(problem.cores)
            torch.backends.cudnn.allow_tf32 = False  # as in every run of metarun
        contestant = getattr(__import__(f"benchmarks.{module}", fromlist=[target]), target)(problem, device, *arguments)
    except Exception as error:
        print(f"no {type(error).__name__}: {' '.join(str(error).split())[:200]}", file=answers)
        return
    print(f"ready {time.perf_counter() - began:.3f}", file=answers)
    number = 0
    for line in sys.stdin:
        verb, argument = line.split(maxsplit=1)
        if verb == "gradient":
            import numpy as np

            np.save(Path(argument.strip()), contestant.gradient())
            print("ok", file=answers)
        else:
            began = time.perf_counter()
            for _ in range(int(argument)):
                contestant.step(number)
                number += 1
            contestant.wait()
            print(time.perf_counter() - began, file=answers)


if __name__ == "__main__":
    main()
