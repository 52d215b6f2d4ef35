"""Plain forms of objects, with which a checkpoint can hold them although it holds no code.

A checkpoint is read without running anything from it, so it consists of tensors, numbers, texts, lists and
dictionaries. An object that has been marked with ``portable`` (a dataclass, a named tuple or a function of a module)
is written as its name and its fields. When it is read, the name is looked up among the objects that the modules
imported so far have marked: a checkpoint can choose among these, and can neither import a module nor name anything
else.
"""

import dataclasses
from typing import Any, NoReturn, TypeVar

from torch import Tensor

from metarun.errors import UserError

Thing = TypeVar("Thing")

MARKED: dict[str, Any] = {}
"""What a checkpoint may name."""


def portable(thing: Thing) -> Thing:
    """Mark a dataclass, a named tuple or a function of a module, so that checkpoints can hold it (a decorator).

    The fields that a dataclass's constructor takes must be tensors, plain values, sequences and dictionaries of them,
    or portable themselves.
    """
    MARKED[name_of(thing)] = thing
    return thing


def name_of(thing: Any) -> str:
    """Return the module and the name of a class or a function."""
    return f"{thing.__module__}.{thing.__qualname__}"


def fields_of(value: Any) -> dict[str, Any] | None:
    """Return the arguments that would construct a dataclass or a named tuple again; None for other values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    return None


def plain(value: Any) -> Any:
    """Return the plain form of a value: tensors and plain values in lists, tuples and dictionaries.

    What is not portable is replaced by its name; ``rebuilt`` says so where it is needed.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        # A view would bring the whole of its storage into the file.
        return value.detach().cpu().clone()
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    if type(value) is dict:
        return {"dictionary": {key: plain(item) for key, item in value.items()}}
    if MARKED.get(getattr(value, "__module__", "") + "." + getattr(value, "__qualname__", "")) is value:
        return {"named": name_of(value)}
    fields = fields_of(value)
    if fields is not None and MARKED.get(name_of(type(value))) is type(value):
        return {"made by": name_of(type(value)), "from": {name: plain(field) for name, field in fields.items()}}
    return {
        "not portable": name_of(value if hasattr(value, "__qualname__") else type(value)),
        "called": callable(value),
    }


@dataclasses.dataclass(frozen=True)
class Absent:
    """Stands for a function that the checkpoint could not hold."""

    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse.

        Raises:
            UserError: always.
        """
        raise refusal(self.name)


def refusal(name: str) -> UserError:
    """Return the sentence on an object that is not portable."""
    return UserError(
        f"The checkpoint cannot hold {name}, which the learner needs: mark it with metarun.data.portable.portable (a "
        "dataclass of plain values and tensors, or a function of a module), and train again."
    )


def marked(name: str) -> Any:
    """Return the class or function of a name that a checkpoint holds.

    Raises:
        UserError: nothing of that name has been marked.
    """
    if name not in MARKED:
        raise UserError(
            f"The checkpoint names {name}, and the imported modules mark nothing of that name with "
            "metarun.data.portable.portable; use the version of the code that trained it."
        )
    return MARKED[name]


def rebuilt(value: Any) -> Any:
    """Return the object of a plain form; a function that the checkpoint could not hold is refused when it is called.

    Raises:
        UserError: the form is damaged, or holds something that is not portable.
    """
    if isinstance(value, list | tuple):
        return type(value)(rebuilt(item) for item in value)
    if not isinstance(value, dict):
        return value
    match value:
        case {"dictionary": dict(items)}:
            return {key: rebuilt(item) for key, item in items.items()}
        case {"named": str(name)}:
            return marked(name)
        case {"made by": str(name), "from": dict(fields)}:
            try:
                return marked(name)(**{key: rebuilt(field) for key, field in fields.items()})
            except (TypeError, ValueError) as error:
                raise UserError(f"The checkpoint's {name} cannot be made again ({error}); train again.") from error
        case {"not portable": str(name), "called": bool(called)}:
            if called:
                return Absent(name)
            raise refusal(name)
    raise UserError("The checkpoint does not describe what it was trained for; train again.")
