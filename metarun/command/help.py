"""The text of ``metarun --help``; the members of each group are read from the configuration files."""

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

HEAD = """metarun: meta-learning experiments from the command line

  metarun [KEY=VALUE ...]      meta-train, select on validation tasks, meta-test, write tables and plots
  metarun-compare PATH...      compare runs on the same test episodes
                               (--against ALGO adds each run's difference from ALGO)
  metarun-report PATH...       write one HTML page on runs, with tables that sort and pictures
  metarun-status DIR           progress of runs and sweeps: failures, time left
  metarun-test DIR KEY=VALUE   test a finished run again, with other keys of task and eval
  metarun-predict DIR ...      adapt to examples of yours (--support) and predict others (--query)

Without arguments: metarun algo=maml task=sinusoid
"""

KEYS = """
Keys
  seed                     for initial weights and training tasks
  device                   auto, cpu, cuda or cuda:N
  data_dir                 folder of the data sets (default: METARUN_DATA_DIR, else data)
  resume                   directory of an interrupted run (with -m: sweep), to be continued there
  tracker                  null, or some of [tensorboard,wandb,mlflow], which follow a run live
  train.steps              meta-steps
  train.meta_batch         tasks per meta-step
  train.optimizer          adam, adamw, sgd, or for policies trpo
  train.lr                 learning rate of the outer optimizer
  train.eval_every         meta-steps between validations; the best parameters are tested
  train.task_chunk         tasks computed at a time, with the same gradient, where memory is short
  train.precision          float32, tf32 or bfloat16
  replicas.count           seeds trained together in one process, one row each
  replicas.over            or one run per value: replicas.over='{algo.inner_lr: [0.1, 0.03]}'
  engine                   what runs the meta-steps; auto says what it chose and why
  engine.task_map          auto, vmap or threads
  engine.threads           torch's threads on the CPU
  eval.episodes            test tasks, the same for every algorithm and seed
  eval.adapt_steps         adaptation steps in validation and test
  eval.seed                for validation and test tasks
  task.path, by, target    task=table: the file, the column that names a row's task, and the one to be predicted
  task.leave_out           task=table: the group to be tested on, such as one hospital
  task.ways                classes per task
  task.shots               support examples (per class in classification)
  task.queries             query examples of a test task (per class in classification)
  task.path                your own pictures (task=images: a folder, a zip or an index), sentences (task=text: a CSV),
                           vectors (task=features: a file of numpy.savez), text (task=authors, generation, questions,
                           entities: a folder), or pictures with boxes (task=detection: Pascal VOC or COCO)
  algo.inner_lr            step size of adaptation
  algo.inner_steps         adaptation steps in training
  algo.first_order         whether to drop second derivatives
  All keys of a run:       metarun algo=... task=... --cfg job

Examples
  metarun algo=protonet task=omniglot task.ways=20 task.shots=5
  metarun experiment=maml_sinusoid
  metarun algo=maml task=text task.dataset=toy
  metarun algo=protonet task=images task.path=my_pictures
  metarun algo=shared_params task=table task.path=visits.csv task.by=patient task.target=pressure
  metarun algo=thompson task=bandit task.arms=10 task.pulls=100
  metarun -m algo=maml,reptile,shared_params,scratch task=sinusoid seed=0,1
  metarun algo=maml task=sinusoid replicas.count=5
  metarun resume=outputs/2026-01-31/12-00-00-000000_maml_sinusoid
  metarun -m resume=outputs/sweeps/2026-01-31/12-00-00-000000
  metarun-compare outputs

Results go to outputs/. Hydra's own options: metarun --hydra-help. Tab completion: eval "$(metarun -sc install=bash)"
HYDRA_FULL_ERROR=1 shows the traceback of an error."""


def description(text: str) -> str:
    """The first comment line of a configuration file, leaving out Hydra's package directive."""
    lines = (line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    return next((line for line in lines if not line.startswith("@package")), "")


def members(root: Traversable | Path, group: str) -> dict[str, str]:
    """Name → description of each member of a group, sorted by name."""
    folder = root / group
    if not folder.is_dir():
        return {}
    yamls = sorted((path for path in folder.iterdir() if path.name.endswith(".yaml")), key=lambda path: path.name)
    return {path.name.removesuffix(".yaml"): description(path.read_text(encoding="utf-8")) for path in yamls}


def help_text(config_dirs: list[str]) -> str:
    """The whole help text, including the members in ``config_dirs``."""
    roots: list[Traversable | Path] = [files("metarun.conf"), *map(Path, config_dirs)]
    text = HEAD
    for group, what in {
        "algo": "algorithms",
        "task": "task families",
        "model": "models; each task names a default",
        "engine": "what runs the meta-steps",
        "experiment": "settings from papers",
    }.items():
        found: dict[str, str] = {}
        for root in roots:
            found |= members(root, group)
        text += f"\n{group}=... ({what})\n"
        text += "".join(f"  {name:<24} {line}\n" for name, line in found.items())
    return text + KEYS
