"""Errors of Hydra and OmegaConf as sentences."""

import difflib

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException


def sentence_of(error: BaseException) -> str:
    """Return an error of Hydra or OmegaConf as one sentence that says what to do."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"There is no {group}={name}; choose one of: {', '.join(error.options)}."
    if isinstance(error, OverrideParseException):
        return (
            f"The argument {error.override!r} cannot be read: write KEY=VALUE, with quotes around special characters."
        )
    if isinstance(cause, OmegaConfBaseException) and cause.key is not None:
        key = str(cause.full_key or cause.key)
        parent = cause.parent_node
        if type(cause).__name__ in ("ConfigAttributeError", "ConfigKeyError"):
            prefix = key.rpartition(".")[0]
            siblings = list(parent) if isinstance(parent, DictConfig) and not parent._is_none() else []
            close = difflib.get_close_matches(str(cause.key), [str(sibling) for sibling in siblings], 1)
            hint = (
                f"did you mean {prefix + '.' if prefix else ''}{close[0]}?"
                if close
                else "metarun --help lists the keys."
            )
            if prefix in ("algo", "task", "model"):
                hint += f" (+{key}=... sets one that {parent.get('_target_')} takes and its YAML does not list)"
            return f"There is no key {key}; {hint}"
        return f"{key}: {str(cause.msg or cause).splitlines()[0]}."
    text = " ".join(str(error).split())
    return text if text.endswith(".") else f"{text}."
