"""Adaptation and prediction of a learner as one program of torch's own operations.

``torch.export`` cannot trace the transforms of ``torch.func`` by itself, so adaptation is first traced by ``make_fx``
to plain operations, gradients of the inner loop among them, and these are exported. The file can be loaded wherever
torch is, without metarun::

    program = torch.export.load("learner.pt2").module()
    outputs = program(support_x, support_y, query_x)

Sizes are fixed: ``support_x [shots · ways, *input]``, ``support_y [shots · ways, ways]`` one-hot for classes,
``[shots, outputs]`` for numbers, ``query_x [queries, *input]``; outputs are logits ``[queries, ways]`` or numbers
``[queries, outputs]``. The file's extra file ``sizes.json`` says these shapes and what was exported.
"""

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from metarun.after.learner import as_in_test, seed_of
from metarun.after.load import Learned
from metarun.contracts import Tokens
from metarun.engine.batch import adapted
from metarun.errors import UserError, first_line, require
from metarun.system.files import atomic_write
from metarun.targets.scoring import loss_of

TOLERANCE = 1e-5
"""Largest difference between the program and the learner, relative to outputs of size one or more."""


def random_task(learned: Learned, sizes: dict[str, int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return random support inputs, support targets and query inputs of a task."""
    spec, generator = learned.spec, torch.Generator().manual_seed(seed)
    count = sizes["shots"] * sizes["ways"]

    def inputs(examples: int) -> Tensor:
        shape = (examples, *spec.inputs.shape)
        if isinstance(spec.inputs, Tokens):
            return torch.randint(spec.inputs.ids, shape, generator=generator)
        return torch.rand(shape, generator=generator)

    y = torch.randn(count, spec.target.outputs, generator=generator)
    if spec.offers("labels"):
        y = torch.eye(sizes["ways"]).repeat(sizes["shots"], 1)
    x, q = inputs(count), inputs(sizes["queries"])
    return x.to(learned.device), y.to(learned.device), q.to(learned.device)


def difference(program: Any, learner: Any, task: tuple[Tensor, Tensor, Tensor]) -> float:
    """Return the largest difference of outputs, relative to the largest output or to one."""
    expected: Tensor = learner(*task)
    found: Tensor = program(*task)
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def export(
    learned: Learned,
    path: Path,
    shots: int | None = None,
    queries: int | None = None,
    ways: int | None = None,
    steps: int | None = None,
) -> Path:
    """Write the program, after it was loaded again and compared with the learner; see ``Learner.export``.

    Raises:
        UserError: the method cannot be exported, or the program does not agree with the learner.
    """
    algorithm, theta, spec, names = learned.algorithm, learned.theta, learned.spec, learned.names
    if not (spec.offers("labels") or spec.offers("numbers")):
        raise UserError(f"task={names['task']} has neither numbers nor classes as targets, so it cannot be exported.")
    own_ways = spec.sizes.ways or 1
    sizes = {
        "shots": spec.sizes.shots if shots is None else shots,
        "queries": spec.sizes.queries * own_ways if queries is None else queries,
        "ways": own_ways if ways is None else ways,
        "steps": int(learned.config.eval.adapt_steps) if steps is None else steps,
    }
    for name, value in sizes.items():
        require(value >= (name != "steps"), f"{name} must be at least {int(name != 'steps')}, not {value}")
    require(
        sizes["ways"] == own_ways or algorithm.open_ways,
        f"algo={names['algo']} has a head for {own_ways} classes; export it with ways={own_ways}",
    )
    require(
        algorithm.max_steps is None or sizes["steps"] <= algorithm.max_steps,
        f"algo={names['algo']} has learned {algorithm.max_steps} steps of adaptation; export it with no more",
    )
    loss, seed = loss_of(learned.family), seed_of(0, learned.device)

    def adapt_and_predict(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
        with as_in_test(learned, seed, {}):
            state = adapted(algorithm, theta, {"x": x, "y": y}, loss, sizes["steps"])
            return algorithm.predict(theta, state, q)

    task = random_task(learned, sizes, seed=0)
    try:
        traced = make_fx(adapt_and_predict)(*task)
        program = torch.export.export(traced, task, strict=False)
    except Exception as error:
        what = f"algo={names['algo']} on task={names['task']}"
        raise UserError(f"{what} cannot be exported ({first_line(error)}).") from error
    shapes = {name: list(leaf.shape) for name, leaf in zip(("support_x", "support_y", "query_x"), task, strict=True)}
    told = {**names, "dataset": learned.dataset, **sizes, **shapes}
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={"sizes.json": json.dumps(told, indent=1)})
    content.seek(0)
    again = torch.export.load(content).module()
    apart = max(difference(again, adapt_and_predict, random_task(learned, sizes, seed)) for seed in (1, 2))
    if not apart <= TOLERANCE:
        raise UserError(
            f"The exported program of algo={names['algo']} differs from the learner by {apart:.1e}, and is not "
            "written: its computation depends on values in a way that cannot be traced."
        )
    with atomic_write(path) as file:
        file.write(content.getvalue())
    return path
