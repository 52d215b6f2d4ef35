"""Exported programs, run by torch alone."""

import json
import subprocess
import sys

import pytest
import torch
from commands import environment
from conftest import experiment_of
from learners import leave_a_checkpoint, with_algorithm

import metarun
from metarun.after.export import difference, random_task

SINUSOID = ("task=sinusoid", "task.shots=5", "eval.adapt_steps=2", "model.widths=[8, 8]")
IMAGES = ("task=omniglot", "task.dataset=procedural", "task.image_size=16", "task.ways=3", "task.train_ways=3")
PAIRS = {
    "sinusoid": (("maml", "shared_params"), {"queries": 7}),
    "omniglot": (("protonet", "shared_params", "maml"), {"queries": 4, "steps": 1}),
}
CHEAP = {"sinusoid": (("maml",), {"queries": 7, "steps": 1})}

ALONE = """
import sys
from pathlib import Path
sys.modules["metarun"] = None  # an import of it fails
import torch
for file in sorted(Path(sys.argv[1]).glob("*.pt2")):
    told = {"sizes.json": ""}
    program = torch.export.load(file, extra_files=told).module()
    expected = torch.load(file.with_suffix(".pt"))
    found = program(*expected["task"])
    print(file.stem, (found - expected["outputs"]).abs().max().item(), told["sizes.json"].replace("\\n", " "))
"""


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11 says so of what it reads
@pytest.mark.parametrize(
    "pairs", [pytest.param(CHEAP, id="one"), pytest.param(PAIRS, id="all", marks=pytest.mark.slow)]
)
def test_programs_agree_with_their_learners_in_a_process_without_metarun(pairs, tmp_path):
    for (task, (algos, sizes)), settings in zip(pairs.items(), (SINUSOID, (*IMAGES, "model.filters=4")), strict=False):
        experiment = experiment_of(f"algo={algos[0]}", *settings)
        for algo in algos:
            name = f"{task}-{algo}"
            leave_a_checkpoint(with_algorithm(experiment, algo), tmp_path / name)
            learner = metarun.load(tmp_path / name)
            learner.export(tmp_path / f"{name}.pt2", **sizes)
            spec = learner.spec
            shapes = {"shots": spec.sizes.shots, "ways": spec.sizes.ways or 1, "queries": sizes["queries"]}
            x, y, q = random_task(learner.learned, shapes, seed=9)
            targets = y.argmax(-1) if spec.offers("classes") else y
            outputs = learner.adapt(x, targets, steps=sizes.get("steps")).outputs(q)
            torch.save({"task": (x, y, q), "outputs": outputs}, tmp_path / f"{name}.pt")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path)], env=environment(), capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines()}
    assert len(found) == sum(len(algos) for algos, _ in pairs.values())
    assert max(found.values()) <= 1e-5, found
    told = {line.split()[0]: json.loads(line.split(maxsplit=2)[2]) for line in done.stdout.splitlines()}
    assert (told["sinusoid-maml"]["support_x"], told["sinusoid-maml"]["query_x"]) == ([5, 1], [7, 1])


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch):
    leave_a_checkpoint(experiment_of("algo=maml", *SINUSOID), tmp_path)
    learner = metarun.load(tmp_path)
    with pytest.raises(ValueError, match="head for 1"):
        learner.export(tmp_path / "a.pt2", ways=4)
    with pytest.raises(ValueError, match="queries must be at least 1"):
        learner.export(tmp_path / "a.pt2", queries=0)
    # A program that does not agree is not written, and an earlier one stays.
    (tmp_path / "a.pt2").write_bytes(b"earlier")
    monkeypatch.setattr("metarun.after.export.difference", lambda *given: difference(*given) + 1e-3)
    with pytest.raises(metarun.UserError, match=r"differs from the learner by 1\.0e-03"):
        learner.export(tmp_path / "a.pt2", steps=0)
    assert (tmp_path / "a.pt2").read_bytes() == b"earlier"
    assert torch.is_grad_enabled()
