"""The schema of the configuration, its checks, and ``build``, which turns it into objects."""

import hashlib
import inspect
import json
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.core.config_store import ConfigStore
from hydra.utils import get_method
from omegaconf import MISSING, DictConfig, OmegaConf

from metarun.command.presets import register_presets
from metarun.errors import UserError

Optimizer = Enum("Optimizer", ["adam", "adamw", "sgd", "trpo"])
Schedule = Enum("Schedule", ["constant", "linear", "cosine", "step"])
Precision = Enum("Precision", ["float32", "tf32", "bfloat16"])
Mode = Enum("Mode", ["auto", "eager", "replay", "compile", "xla", "cudagraph"])
TaskMap = Enum("TaskMap", ["auto", "vmap", "threads"])


@dataclass
class TrustRegionConfig:
    """Settings for ``train.optimizer=trpo``."""

    kl: float = MISSING
    cg_steps: int = MISSING
    cg_episodes: int | None = MISSING
    damping: float = MISSING
    backtrack: float = MISSING
    backtracks: int = MISSING


@dataclass
class TrainConfig:
    """Meta-training; ``conf/config.yaml`` explains each key."""

    steps: int = MISSING
    meta_batch: int = MISSING
    lr: float = MISSING
    optimizer: Optimizer = MISSING
    weight_decay: float = MISSING
    schedule: Schedule = MISSING
    final: float = MISSING
    decay: float = MISSING
    decay_every: int = MISSING
    clip: float | None = MISSING
    eval_every: int = MISSING
    log_every: int = MISSING
    val_episodes: int = MISSING
    task_chunk: int | None = MISSING
    precision: Precision = MISSING
    trust_region: TrustRegionConfig = MISSING


@dataclass
class EngineConfig:
    """The engine, which runs the meta-steps."""

    mode: Mode = MISSING
    task_map: TaskMap = MISSING
    threads: int | None = MISSING
    keep_memory: Any = MISSING
    """A bool; OmegaConf would take every number for one, so ``check_ranges`` looks."""


@dataclass
class ReplicasConfig:
    """Runs that are trained together in one process."""

    count: int = MISSING
    over: Any = None


@dataclass
class EvalConfig:
    """Validation and test."""

    episodes: int = MISSING
    adapt_steps: int = MISSING
    seed: int = MISSING


@dataclass
class Config:
    """The top level; the groups ``task``, ``model`` and ``algo`` are checked by their constructors."""

    seed: int = MISSING
    device: str = MISSING
    data_dir: str = MISSING
    resume: str | None = MISSING
    tracker: Any = None
    train: TrainConfig = MISSING
    eval: EvalConfig = MISSING
    engine: EngineConfig = MISSING
    replicas: ReplicasConfig = MISSING
    task: Any = MISSING
    model: Any = MISSING
    algo: Any = MISSING


def register_schema(*config_dirs: Traversable) -> None:
    """Put the schema, and the presets of metarun and of the user's folders, where Hydra finds them."""
    ConfigStore.instance().store("schema", Config)
    register_presets(files("metarun.conf"), *config_dirs)


LOWER_BOUNDS: dict[str, float] = {
    "seed": 0,
    "train.steps": 0,
    "train.meta_batch": 1,
    "train.weight_decay": 0,
    "train.final": 0,
    "train.decay_every": 1,
    "train.eval_every": 1,
    "train.log_every": 1,
    "train.val_episodes": 2,
    "train.task_chunk": 1,
    "train.trust_region.cg_steps": 1,
    "train.trust_region.cg_episodes": 1,
    "train.trust_region.damping": 0,
    "train.trust_region.backtracks": 1,
    "engine.threads": 1,
    "replicas.count": 1,
    "eval.episodes": 2,
    "eval.adapt_steps": 0,
    "eval.seed": 0,
}
UPPER_BOUNDS: dict[str, float] = {
    "seed": 2**63 - 1,
    "eval.seed": 2**63 - 1,
    "train.steps": 10**12,
    "train.meta_batch": 10**6,
    "train.log_every": 10**7,
    "train.val_episodes": 10**6,
    "train.trust_region.cg_steps": 10**6,
    "train.trust_region.backtracks": 10**6,
    "eval.episodes": 10**7,
    "eval.adapt_steps": 10**6,
    "engine.threads": 1024,
    "replicas.count": 10_000,
}
"""Largest values: anything above is a typing error that would exhaust memory before anyone notices it."""
ABOVE_ZERO = ("train.lr", "train.decay", "train.clip", "train.trust_region.kl", "train.trust_region.backtrack")
AT_MOST_ONE = ("train.final", "train.trust_region.backtrack")


def check_ranges(config: DictConfig) -> None:
    """Raise an error if a value is out of range.

    Raises:
        UserError: the key and its range.
    """
    for key, bound in LOWER_BOUNDS.items():
        value = OmegaConf.select(config, key)
        if value is not None and not value >= bound:
            raise UserError(f"{key} must be at least {bound:g}, not {value}.")
        if value is not None and value == float("inf"):
            raise UserError(f"{key} must be a finite number, not {value}.")
    for key, bound in UPPER_BOUNDS.items():
        value = OmegaConf.select(config, key)
        if value is not None and value > bound:
            raise UserError(f"{key} must be at most {bound}, not {value}.")
    if type(config.engine.keep_memory) is not bool:
        raise UserError(f"engine.keep_memory must be true or false, not {config.engine.keep_memory}.")
    for key in AT_MOST_ONE:
        if not OmegaConf.select(config, key) <= 1:
            raise UserError(f"{key} must be at most 1, not {OmegaConf.select(config, key)}.")
    for key in ABOVE_ZERO:
        value = OmegaConf.select(config, key)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{key} must be a finite number above 0, not {value}.")


NOT_IN_NUMBERS = ("device", "data_dir", "resume", "tracker", "engine", "replicas")


def config_hash(config: DictConfig) -> str:
    """Return a hash of all that determines a run's numbers, but not of where and how it runs or where its data are."""
    plain = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    assert isinstance(plain, dict)
    kept = {key: value for key, value in plain.items() if key not in NOT_IN_NUMBERS}
    kept["train"] = {key: value for key, value in plain["train"].items() if key != "task_chunk"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML matches a type annotation; unknown annotations accept anything."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple and arguments[-1:] != (Ellipsis,):
        return isinstance(value, list) and len(value) == len(arguments) and all(map(_fits, value, arguments))
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, dict) and all(_fits(item, arguments[1]) for item in value.values())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str, type(None)):
        return isinstance(value, hint)
    return True


def _is_finite(value: Any) -> bool:
    """Whether no number in a value from YAML, or in its lists and mappings, is infinite or not a number."""
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _words(hint: Any) -> str:
    """Return a type annotation in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(option) for option in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple and arguments[-1:] != (Ellipsis,):
        return f"a list of {len(arguments)} values, each {_words(arguments[0])}"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"a list, each item {_words(arguments[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping, such as {name: value}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return names.get(hint, str(hint))


def type_hints(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the evaluated annotations of ``target``'s arguments, except those that only type checkers can evaluate."""
    # A class takes the arguments of its __init__, which may be inherited.
    called: Any = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    function = inspect.unwrap(called)
    scope = getattr(function, "__globals__", {})
    found: dict[str, Any] = {}
    for name, annotation in getattr(function, "__annotations__", {}).items():
        holder = types.SimpleNamespace(__annotations__={name: annotation})
        # Evaluating an annotation in quotes can fail in any way; such an argument is not checked.
        with suppress(Exception):
            found |= get_type_hints(holder, scope)
    return found


def check_call(group: str, name: str, signature: inspect.Signature, keys: Iterable[str], given: Iterable[str]) -> None:
    """Raise an error if a call lacks an argument, or if a key is named like an argument that metarun itself gives.

    Raises:
        UserError: the argument, and where to set it.
    """
    if both := sorted(set(given) & set(keys)):
        raise UserError(f"{group}.{both[0]} cannot be set: {name} is given its {both[0]}.")
    named = {*keys, *given}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for parameter in signature.parameters.values():
        missing = parameter.default is parameter.empty and parameter.kind not in variadic
        if missing and parameter.name not in named:
            known = {"task": "device, data_dir and typed", "model": "spec", "algo": "model and spec"}[group]
            raise UserError(
                f"{group}.{parameter.name} is missing: {name} needs it; give it in the YAML or as "
                f"+{group}.{parameter.name}=VALUE (metarun itself passes only {known})."
            )


ONLY_BY_NAME = ("typed", "converter")
"""Arguments for task families that a target must name to receive them."""


def build(config: DictConfig, group: str, exchanged: Mapping[str, Any] | None = None, **context: Any) -> Any:
    """Call the ``_target_`` of ``config[group]``, ``task``, ``model`` or ``algo``, with its keys; see `construct`."""
    return construct(group, OmegaConf.to_container(config[group], resolve=True), exchanged, **context)


def construct(group: str, content: Any, exchanged: Mapping[str, Any] | None = None, **context: Any) -> Any:
    """Call the ``_target_`` of ``content`` with its other keys, each checked against the target's annotations.

    Args:
        group: ``task``, ``model`` or ``algo``.
        content: what the configuration says of the group, as plain values; it is not changed.
        exchanged: other values for some keys, which are not checked again.
        context: further arguments by name; the target receives those that it takes. Those in ``ONLY_BY_NAME`` must be
            among its parameters: a target with ``**kwargs`` may pass those on to one that does not take them.

    Raises:
        UserError: the target does not exist, or a key is unknown, of the wrong type or out of range.
    """
    if not isinstance(content, dict) or not isinstance(content.get("_target_"), str):
        raise UserError(f"{group} needs a _target_, the dotted path of what it builds.")
    name: str = content["_target_"]
    keys = {key: value for key, value in content.items() if key != "_target_"}
    try:
        target: Callable[..., Any] = get_method(name)
    except (ImportError, ValueError) as error:
        raise UserError(f"{group}: {name} cannot be imported ({error.__cause__ or error}).") from error
    signature = inspect.signature(target)
    hints = type_hints(target)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for key, value in keys.items():
        if value == MISSING:
            raise UserError(f"{group}.{key} is missing: set it with {group}.{key}=VALUE.")
        if key not in signature.parameters and not takes_any:
            raise UserError(f"{group}.{key} is unknown: {name} does not take it.")
        if key in hints and not _fits(value, hints[key]):
            raise UserError(f"{group}.{key} must be {_words(hints[key])}, not {value!r}.")
        if not _is_finite(value):
            raise UserError(f"{group}.{key} must be finite, not {value!r}; null turns off what may be turned off.")
    context = {
        key: value
        for key, value in context.items()
        if key in signature.parameters or (takes_any and key not in ONLY_BY_NAME)
    }
    check_call(group, name, signature, keys, context)
    try:
        return target(**{**keys, **(exchanged or {})}, **context)
    except ValueError as error:
        raise UserError(f"{group}: {str(error).rstrip('.')}.") from error
