"""metarun's own engines as contestants."""

from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from benchmarks.problems import Problem
from metarun.assemble import Experiment, assemble, training_tasks
from metarun.config import register_schema
from metarun.contracts import Task, Tree
from metarun.engine.choose import Stepper
from metarun.engine.meta_step import MetaStep
from metarun.engine.process import keep_freed_memory
from metarun.tree import like


def experiment_of(*overrides: str) -> Experiment:
    """Return the experiment that ``metarun OVERRIDES`` would run."""
    register_schema()
    with initialize_config_module("metarun.conf", version_base="1.3"):
        config = compose("config", overrides=list(overrides), return_hydra_config=True)
    names = {group: str(config.hydra.runtime.choices[group]) for group in ("algo", "task", "model")}
    return assemble(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]), names)


def overrides_of(problem: Problem) -> list[str]:
    """Return the problem as overrides of metarun's configuration."""
    found = [f"algo={problem.method}", f"train.meta_batch={problem.tasks}", "train.lr=0.001", "train.clip=null"]
    found += ["train.schedule=constant", "train.steps=1000000"]
    if problem.model == "mlp":
        found += ["task=sinusoid", f"task.shots={problem.shots}", f"task.train_queries={problem.queries}"]
    else:
        found += ["task=omniglot", "task.dataset=procedural", f"task.ways={problem.ways}", "task.train_ways=null"]
        found += [f"task.shots={problem.shots}", f"task.train_queries={problem.queries}", "task.queries=1"]
        found += [f"model.downsample={'max_pool' if problem.max_pool else 'stride'}"]
        found += [f"model.readout={'flatten' if problem.method == 'protonet' else 'mean'}"]
    if problem.method != "protonet":
        found += [f"algo.inner_lr={problem.inner_lr}", f"algo.inner_steps={problem.inner_steps}"]
    return found


class Own:
    """One of metarun's engines, with the memory setting that every run makes."""

    def __init__(self, problem: Problem, device: str, engine: str, task_map: str = "vmap") -> None:
        keep_freed_memory()
        extra = [f"engine={engine}", f"engine.task_map={task_map}", f"engine.threads={torch.get_num_threads()}"]
        self.experiment = experiment_of(*overrides_of(problem), *extra, f"device={device}")
        self.device = device
        self.meta_step = MetaStep(self.experiment)
        template = self.meta_step.layout.template
        order = [torch.from_numpy(w).to(device) for w in problem.weights()]
        theta = like(template, iter(order))
        weights = self.meta_step.layout.vector(theta)[None]
        self.state: Tree = {**self.meta_step.initial_train_state(), "weights": weights}
        seeds = [one.config.seed for one in self.experiment.replicas]
        self.drawn = training_tasks(self.experiment, seeds, problem.tasks, 0)
        self.batches = [self.tasks(problem.batch(i)) for i in range(4)]
        self.stepper = Stepper(self.experiment, self.meta_step)
        for number in range(2):
            self.stepper(self.given(number))
        if self.stepper.engine != engine or self.stepper.task_map != task_map:
            raise RuntimeError(f"{engine} with {task_map} could not be made")

    def tasks(self, batch: dict[str, Any]) -> Task:
        """Return a batch as metarun's tasks, with what the tasks of a run have besides inputs and targets."""
        b = {name: torch.from_numpy(value)[None].to(self.device) for name, value in batch.items()}
        support, query, seed = self.drawn
        return Task({**support, "x": b["sx"], "y": b["sy"]}, {**query, "x": b["qx"], "y": b["qy"]}, seed)

    def given(self, number: int) -> Tree:
        """Return the input of a step."""
        return {
            "train_state": self.state,
            "tasks": self.batches[number % 4],
            "rates": {"lr": torch.tensor([1e-3], device=self.device)},
        }

    def gradient(self) -> np.ndarray[Any, Any]:
        """Return the first meta-gradient as one vector, from the first moment of the engine's own step."""
        moment: torch.Tensor = self.stepper.run(self.given(0))["train_state"]["moments"]["mean"][0]
        vector: np.ndarray[Any, Any] = (moment / 0.1).cpu().numpy()
        return vector

    def step(self, number: int) -> None:
        """One meta-step."""
        self.state = self.stepper.run(self.given(number))["train_state"]

    def wait(self) -> None:
        """Return when the steps so far are done."""
        if self.device != "cpu":
            torch.cuda.synchronize()
