import os
import re
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
from commands import QUICK, process
from hydra import compose, initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from metarun.assemble import assemble
from metarun.config import register_schema

register_schema()

DATA_DIR = Path(os.environ.get("METARUN_DATA_DIR", "data"))


QUICK_FILES = (
    *("algos/test_identities", "algos/test_mamlpp", "algos/test_readers", "results/test_compare"),
    *("results/test_reports", "test_sealed", "tasks/test_sinusoid", "tasks/test_teachers"),
    *("test_family_check", "test_imports", "test_limits", "test_models", "test_outer", "test_targets"),
    "test_transduction",
)
"""The quick tier: cheap, and likely to catch a mistake in what one is working on."""


def pytest_configure(config):
    """Hide GPUs, unless ``-m gpu`` asks for the tests that need one: ``device=auto`` is the CPU for all others."""
    if not re.search(r"(?<!not )\bgpu\b", config.getoption("markexpr") or ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    """Mark the quick tier."""
    for item in items:
        if any(str(item.path).endswith(f"{name}.py") for name in QUICK_FILES):
            item.add_marker("quick")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def files_of_packages_are_parsed_once():
    """Each composition reads twenty files of metarun and Hydra, and parsing them is a quarter of its time."""
    # Hydra imports its sources itself: what an import statement gives is another class of the same name.
    Plugins.instance()
    of_packages = SourcesRegistry.instance().resolve("pkg")
    read, kept = of_packages.load_config, {}

    def load_config(self, config_path):
        place = self.provider, self.path, config_path
        if place not in kept:
            kept[place] = read(self, config_path)
        return deepcopy(kept[place])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_packages, "load_config", load_config)
        yield kept


@pytest.fixture(autouse=True, scope="session")
def files_are_written_without_waiting_for_the_disk():
    """What a test writes need not outlive a power cut, and on some disks the waiting takes longer than a short run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def real_omniglot():
    if not (DATA_DIR / "omniglot" / "images_background.zip").is_file():
        pytest.skip("the real Omniglot is not in METARUN_DATA_DIR/omniglot")
    return str(DATA_DIR)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The directory of a short finished run, for tests that read or copy it."""
    root = tmp_path_factory.mktemp("finished")
    done = process(*QUICK, "hydra.run.dir=run", cwd=root)
    assert done.returncode == 0, done.stderr
    return root / "run"


def leave_pictures_out(patch):
    for place in ("run.write_examples", "results.drawer.draw"):
        patch.setattr(f"metarun.{place}", lambda *arguments: None)


@pytest.fixture
def without_pictures(monkeypatch):
    """``run`` as it is but for its pictures, which take longer than all the rest of a short run."""
    leave_pictures_out(monkeypatch)


HYDRAS_OWN = [
    f"~hydra/{group}"
    for group in ("help", "hydra_help", "hydra_logging", "job_logging", "launcher", "output", "sweeper")
]
"""Groups of Hydra that no experiment is built from, and whose composition takes as long as that of metarun's."""


@cache
def chosen(*overrides: str) -> tuple[DictConfig, dict[str, str]]:
    with initialize_config_module("metarun.conf", version_base="1.3"):
        config = compose("config", overrides=[*overrides, *HYDRAS_OWN], return_hydra_config=True)
    names = {group: str(config.hydra.runtime.choices[group]) for group in ("algo", "task", "model")}
    return OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]), names


@cache
def parsed(override: str) -> Override:
    return OverridesParser.create().parse_overrides([override])[0]


def composed(*overrides: str) -> tuple[DictConfig, dict[str, str]]:
    """Choose groups once in a test run, which takes Hydra a twentieth of a second, and set keys as Hydra does."""
    given = [parsed(override) for override in overrides]
    keys = [one for one in given if "." in one.key_or_group and not (one.is_delete() or one.is_hydra_override())]
    config, names = deepcopy(chosen(*(str(one.input_line) for one in given if one not in keys)))
    ConfigLoaderImpl._apply_overrides_to_config(keys, config)
    return config, names


def experiment_of(*overrides: str):
    return assemble(*composed(*overrides))
