"""Code and configuration from outside the repository: what a stranger writes works, or gets the right sentence."""

import errno
import re
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from commands import QUICK, environment, metarun
from omegaconf import OmegaConf

from metarun.cli import sentence_of_system_error
from metarun.command.resume import arguments_of_resumed, config_dirs, options_first
from metarun.config import build
from metarun.data.portable import plain, rebuilt
from metarun.errors import UserError
from metarun.tasks.sinusoid import Sinusoid

if TYPE_CHECKING:
    from collections.abc import Iterable

METARUN = Path(sys.executable).with_name("metarun")
PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


def console_script(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """What is installed, which, unlike ``python -m``, does not put the current folder on Python's path."""
    plain = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    return subprocess.run([str(METARUN), *arguments], cwd=cwd, env=plain, capture_output=True, text=True, check=False)


def code_blocks() -> list[tuple[str, str]]:
    """Language and text of each block of code on the page about extending metarun."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_examples_of_the_documentation_run_as_they_are_printed(tmp_path):
    blocks = code_blocks()
    assert [language for language, _ in blocks] == ["python", "yaml", "python", "yaml", "python", "bash"]
    for language, text in blocks:
        if language != "bash":
            path = tmp_path / text.partition("\n")[0].removeprefix("# ")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    commands = blocks[-1][1].splitlines()
    assert len(commands) == 2
    for command, runs in zip(commands, (console_script, metarun), strict=True):
        program, *arguments = command.split()
        assert program == "metarun"
        small = ("task.dataset=procedural", "task.image_size=16") if "task=omniglot" in arguments else ()
        done = runs(*arguments, *QUICK, "train.meta_batch=2", *small, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    run = next(path.parent for path in (tmp_path / "outputs").rglob("result.csv") if "lines" in str(path))
    assert "lines:steepest=3" in (run / "result.csv").read_text()
    # What stands in a directory does not decide where the configuration comes from.
    refused = metarun(f"resume={run}", cwd=tmp_path)
    assert refused.returncode == 1
    assert "name it again with --config-dir, or say trust=true" in refused.stderr
    resumed = metarun(f"resume={run}", "--config-dir", "my_conf", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr


def test_the_converter_of_the_documentation_survives_a_checkpoint(tmp_path, monkeypatch):
    text = next(text for _, text in code_blocks() if "class Heights" in text)
    (tmp_path / "documented_heights.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    heights = rebuilt(plain(import_module("documented_heights").Heights(170.0, 10.0)))
    assert heights.inputs([180, 160]).tolist() == [[1.0], [-1.0]]
    (tmp_path / "people.csv").write_text("name,height,weight\nEva,170,60\n")
    assert heights.read(tmp_path / "people.csv") == ([170], [60], ["Eva"])


class Inherited(Sinusoid):
    """No ``__init__``: it takes what its parent takes."""


class Nothing:
    """Neither it nor a parent but ``object`` has an ``__init__``."""


class Pair(NamedTuple):
    width: int
    names: str = ""


def for_checkers_alone(names: "Iterable[str]" = (), width: int = 3, other: "nowhere.Thing" = None):  # noqa: F821
    return width


def needs_a_path(path: str, device: str = "cpu"):
    return path


def built(target, group="task", given=None, **keys):
    config = OmegaConf.create({group: {"_target_": f"test_plugins.{target}", **keys}})
    return build(config, group, **(given or {"device": "cpu", "data_dir": "data"}))


def test_a_class_without_its_own_init_is_checked_by_its_parents():
    assert built("Inherited", shots=3).spec.sizes.shots == 3
    assert isinstance(built("Nothing"), Nothing)
    assert built("Pair", width=2) == Pair(2)
    with pytest.raises(
        UserError, match=r"task.shots must be a whole number or a list of 2 values, each a whole number, not 'three'"
    ):
        built("Inherited", shots="three")
    with pytest.raises(UserError, match=r"task.width is unknown"):
        built("Nothing", width=3)


def test_annotations_for_type_checkers_alone_are_left_out_and_the_others_checked():
    assert built("for_checkers_alone", names=["a"], other=1) == 3
    with pytest.raises(UserError, match=r"task.width must be a whole number"):
        built("for_checkers_alone", width="wide")


partly = partial(for_checkers_alone, width=5)


def test_a_call_that_cannot_be_made_says_which_argument_is_missing():
    assert built("partly") == 5
    assert built("needs_a_path", path="a") == "a"
    with pytest.raises(UserError, match=r"task.path is missing: .*needs_a_path needs it; .*\+task.path=VALUE"):
        built("needs_a_path")
    with pytest.raises(UserError, match=r"path is missing: .*metarun itself passes only spec"):
        built("needs_a_path", "model", given={"spec": None})
    with pytest.raises(UserError, match=r"model.path cannot be set: .* is given its path"):
        built("needs_a_path", "model", given={"path": None}, path="a")


PLUGIN = """
from metarun.algos.agnostic.maml import maml


def twice(model, inner_lr: float = 0.1, steps: int = 2):
    return maml(model, inner_lr, inner_steps=steps)
"""


def test_a_key_that_the_yaml_does_not_list_is_set_with_a_plus_and_the_sentence_says_so(tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN)
    (tmp_path / "my_conf" / "algo").mkdir(parents=True)
    (tmp_path / "my_conf" / "algo" / "twice.yaml").write_text("# mine\n_target_: mine.twice\ninner_lr: 0.02\n")
    # Between overrides, as Hydra itself does not take it.
    arguments = ["task=sinusoid", "--config-dir", "my_conf", "algo=twice", *QUICK]
    plain = metarun(*arguments, "algo.steps=1", cwd=tmp_path)
    assert plain.returncode == 1
    assert "There is no key algo.steps" in plain.stderr
    assert "(+algo.steps=... sets one that mine.twice takes and its YAML does not list)" in plain.stderr
    done = metarun(*arguments, "+algo.steps=1", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "twice (model-agnostic)" in done.stdout


def test_options_may_stand_anywhere():
    assert options_first(["a=1", "--config-dir", "x=y", "b=2", "-m", "~c"]) == (
        ["--config-dir", "x=y", "-m"],
        ["a=1", "b=2", "~c"],
    )
    assert options_first(["--info", "a=1"]) == (["--info"], ["a=1"])
    assert options_first(["--info", "searchpath", "a=1", "-cd=z"]) == (["--info", "searchpath", "-cd=z"], ["a=1"])
    assert config_dirs(["a=1", "-cd=z", "--config-dir", "x", "--config-dir=y"]) == ["x", "z", "y"]
    assert config_dirs([]) == []
    assert arguments_of_resumed(["a=1", "-m"]) == ["a=1", "-m"]


def test_missing_data_are_not_a_full_disk(tmp_path):
    run = tmp_path / "outputs" / "run"
    missing = sentence_of_system_error(FileNotFoundError(errno.ENOENT, "No such file", "my/table.csv"), run)
    assert missing == "There is no my/table.csv, which the run needs; put it there, or change the key that names it."
    locked = sentence_of_system_error(PermissionError(errno.EACCES, "Permission denied", "my/table.csv"), run)
    assert "my/table.csv cannot be used: Permission denied" in locked
    full = sentence_of_system_error(OSError(errno.ENOSPC, "No space left on device"), run)
    assert "make room" in full
    gone = sentence_of_system_error(FileNotFoundError(errno.ENOENT, "No such file", str(run / "a.csv")), run)
    assert "hydra.run.dir=DIR" in gone
    assert sentence_of_system_error(ConnectionError("reset"), run) is None


TABLE = """
import csv
import torch
from metarun.tasks.sinusoid import Sinusoid
from metarun.contracts import Task


class Table(Sinusoid):
    def __init__(self, path: str = "table.csv", device: str = "cpu") -> None:
        super().__init__(shots=2, queries=2)
        with open(path) as file:
            rows = [[float(cell or "nan") for cell in row] for row in csv.reader(file)]
        self.table = torch.tensor(rows)

    def sample(self, split, count, generator):
        rows = self.table[torch.rand(count, len(self.table), generator=generator).argsort(1)[:, :4]]
        parts = (rows[:, :2], rows[:, 2:])
        return Task(*({"x": part[..., :1], "y": part[..., 1:]} for part in parts))
"""


def test_a_missing_file_and_an_empty_cell_of_a_users_table_are_named(tmp_path):
    (tmp_path / "mine.py").write_text(TABLE)
    (tmp_path / "my_conf" / "task").mkdir(parents=True)
    (tmp_path / "my_conf" / "task" / "visits.yaml").write_text("# mine\n_target_: mine.Table\npath: table.csv\n")
    arguments = ["--config-dir=my_conf", "task=visits", *QUICK]
    missing = metarun(*arguments, cwd=tmp_path)
    assert "There is no table.csv, which the run needs" in missing.stdout + missing.stderr
    assert "make room" not in missing.stdout + missing.stderr
    (tmp_path / "table.csv").write_text("\n".join(["0.1,1", "0.2,", "0.3,3", "0.4,4", "0.5,5"]))
    empty = metarun(*arguments, cwd=tmp_path)
    said = empty.stdout + empty.stderr
    assert empty.returncode == 1
    assert re.search(r'the train tasks hold NaN in (support|query)\["y"\] .* fill the empty cells', said), said
    assert "Traceback" not in said
