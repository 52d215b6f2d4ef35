"""Substitutes for those of torch's functions whose derivatives are wrong or missing under ``torch.func``.

Models are ordinary modules. Under ``torch.func.vmap``, some of torch's functions silently give a wrong second
derivative (batch, layer and instance normalisation), others give none at all (fused recurrent layers and attention),
and dropout has no generator to draw from. Inside the mode ``Substituted``, these functions, and the modules that call
them, are computed by their plain formulas. Functions that cannot be made correct are refused by name.

A module's ``train()`` and ``eval()`` mean what they mean in torch: batch statistics and dropout, or running statistics
and none. Three things differ, because a task must not influence the next one:

- running statistics are read, never written;
- dropout is on only in meta-training; in validation and test it is off, as if ``eval()`` had been called on all modules
  but those with buffers and torch's own normalisations, which go on using the statistics of the batch;
- a normalisation whose parameters are all frozen (``requires_grad=False``) uses its running statistics.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedParameter
from torch.overrides import TorchFunctionMode

from metarun.errors import UserError
from metarun.nn.attention import multi_head_attention_forward, scaled_dot_product_attention
from metarun.nn.layers import bilinear, cdist, embedding, embedding_bag, hardsigmoid, pdist, prelu
from metarun.nn.noise import (
    alpha_dropout,
    bernoulli,
    dropout,
    dropout_of_features,
    rand,
    rand_like,
    randn,
    randn_like,
    rrelu,
)
from metarun.nn.normalisation import all_frozen, batch_norm, instance_norm, layer_norm, weight_norm
from metarun.nn.padding import present_weight
from metarun.nn.recurrent import gru_cell, lstm_cell, plain_cell, recurrent, single_step
from metarun.nn.transforms import plain
from metarun.random import in_training

Formula = Callable[..., Any]


FORMULAS: dict[Any, Formula] = {
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.layer_norm: layer_norm,
    torch.layer_norm: lambda input, shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True: layer_norm(
        input, shape, weight, bias, eps
    ),
    torch.batch_norm: lambda input, weight, bias, mean, variance, training, momentum, eps, cudnn: batch_norm(
        input, mean, variance, weight, bias, training, momentum, eps
    ),
    torch.instance_norm: lambda input, weight, bias, mean, variance, by_input, momentum, eps, cudnn: instance_norm(
        input, mean, variance, weight, bias, by_input, momentum, eps
    ),
    F.dropout: dropout,
    torch.dropout: lambda input, p, train: dropout(input, p, train),
    torch.dropout_: lambda input, p, train: dropout(input, p, train, True),
    F.alpha_dropout: alpha_dropout,
    torch.alpha_dropout: lambda input, p, train: alpha_dropout(input, p, train),
    F.dropout1d: dropout_of_features(1, False),
    F.dropout2d: dropout_of_features(None, False),
    F.dropout3d: dropout_of_features(3, False),
    torch.feature_dropout: lambda input, p, train: dropout_of_features(None, False)(input, p, train),
    F.feature_alpha_dropout: dropout_of_features(None, True),
    torch.feature_alpha_dropout: lambda input, p, train: dropout_of_features(None, True)(input, p, train),
    F.rrelu: rrelu,
    torch.rrelu: rrelu,
    torch.rand: rand,
    torch.randn: randn,
    torch.rand_like: rand_like,
    torch.randn_like: randn_like,
    torch.bernoulli: bernoulli,
    Tensor.bernoulli: bernoulli,
    torch.lstm: recurrent("lstm", lstm_cell),
    torch.gru: recurrent("gru", gru_cell),
    torch.rnn_tanh: recurrent("rnn_tanh", plain_cell(torch.tanh)),
    torch.rnn_relu: recurrent("rnn_relu", plain_cell(torch.relu)),
    torch.lstm_cell: single_step(lstm_cell),
    torch.gru_cell: single_step(gru_cell),
    torch.rnn_tanh_cell: single_step(plain_cell(torch.tanh)),
    torch.rnn_relu_cell: single_step(plain_cell(torch.relu)),
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    F.multi_head_attention_forward: multi_head_attention_forward,
    # Asked in eval mode, to decide on a fast path that works on nested tensors, which cannot be mapped.
    torch._nested_tensor_from_mask_left_aligned: lambda *given: False,
    torch._weight_norm: weight_norm,
    F.prelu: prelu,
    torch.prelu: prelu,
    F.bilinear: bilinear,
    torch.bilinear: bilinear,
    F.hardsigmoid: hardsigmoid,
    torch.cdist: cdist,
    torch.pdist: pdist,
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
}


DRAWING = {
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, F.rrelu),
    *(torch.dropout, torch.dropout_, torch.feature_dropout, torch.alpha_dropout, torch.feature_alpha_dropout),
    *(torch.rrelu, torch.rand, torch.randn, torch.rand_like, torch.randn_like, torch.bernoulli, Tensor.bernoulli),
}
"""The functions among them that draw random numbers."""


REFUSED: dict[Any, str] = {
    torch._pack_padded_sequence: "pad the sequences, and mask what is padding",
    **dict.fromkeys(
        [torch.native_layer_norm, torch.native_batch_norm], "take torch.nn.functional's normalisation of the same name"
    ),
    **dict.fromkeys(
        [
            F.gumbel_softmax,
            F.fractional_max_pool2d_with_indices,
            F.fractional_max_pool3d_with_indices,
            torch.randint,
            torch.randint_like,
            torch.randperm,
            torch.multinomial,
            torch.normal,
            torch.poisson,
            torch.binomial,
            Tensor.multinomial,
            Tensor.bernoulli_,
            Tensor.cauchy_,
            Tensor.exponential_,
            Tensor.geometric_,
            Tensor.log_normal_,
            Tensor.normal_,
            Tensor.random_,
            Tensor.uniform_,
        ],
        "its random numbers would not come from the task's seed; take torch.rand, torch.randn or torch.bernoulli",
    ),
}


def norm_by_torch(function: Any) -> Formula:
    """Torch's own normalisation, without updates of running statistics; frozen modules use theirs."""

    def norm(
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        by_input: bool = function is F.instance_norm,
        momentum: float = 0.1,
        eps: float = 1e-5,
        **named: bool,
    ) -> Tensor:
        by_input = named.get("training", named.get("use_input_stats", by_input))
        by_input = by_input and (running_mean is None or not all_frozen(weight, bias))
        mean, variance = (None if s is None else s.clone() for s in (running_mean, running_var))
        out: Tensor = function(input, mean, variance, weight, bias, by_input, momentum, eps)
        return out

    return norm


def attention_by_torch(function: Any) -> Formula:
    """Torch's own attention in its plain implementation, which can be differentiated twice."""

    def attend(*args: Any, **named: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return function(*args, **named)

    return attend


BY_TORCH: dict[Any, Formula] = {
    F.batch_norm: norm_by_torch(F.batch_norm),
    F.instance_norm: norm_by_torch(F.instance_norm),
    F.scaled_dot_product_attention: attention_by_torch(F.scaled_dot_product_attention),
    F.multi_head_attention_forward: attention_by_torch(F.multi_head_attention_forward),
    # Torch's own second derivatives are wrong (torch.autograd.gradgradcheck fails), or missing.
    torch._weight_norm: weight_norm,
    F.hardsigmoid: hardsigmoid,
    torch.pdist: pdist,
    torch.cdist: cdist,
    F.embedding_bag: embedding_bag,
}
"""Replacements for the formulas where plain autograd checks them."""


def by_torch(function: Any, args: Any, named: dict[str, Any]) -> bool:
    """Whether torch's own function can stand in for the formula in this call.

    It cannot where it draws random numbers, or has to leave padding out of a batch.
    """
    if function in (F.batch_norm, torch.batch_norm) and present_weight() is not None:
        return False
    if function in (F.multi_head_attention_forward, F.scaled_dot_product_attention):
        place = 10 if function is F.multi_head_attention_forward else 4
        return not (args[place] if len(args) > place else named.get("dropout_p", 0.0))
    if function in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu):
        return not args[5]
    return function not in DRAWING


class Substituted(TorchFunctionMode):
    """Inside, the functions in ``FORMULAS`` are computed by its formulas, for the forward pass of one module.

    With plain autograd (`metarun.nn.transforms.plainly`), only the functions that torch itself cannot handle are.
    """

    def __init__(self, buffers: dict[int, str], replaced: dict[int, str], of: str) -> None:
        """``of`` is the name of the module's class.

        ``buffers`` maps the identities of its buffers to their names, and ``replaced`` those of its parameters for
        which others are given.
        """
        super().__init__()
        self.buffers, self.replaced, self.of = buffers, replaced, of

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if self.buffers and (written := self.written(function, args, named)):
            if written.rpartition(".")[2] == "num_batches_tracked":
                return args[0]
            raise UserError(refusal_of_writing(self.of, written))
        if self.replaced:
            self.refuse_replaced(function, args, named)
        formula = FORMULAS.get(function)
        if formula is not None and plain.get() and by_torch(function, args, named):
            formula = BY_TORCH.get(function, function)
        if formula is not None:
            return formula(*args, **named)
        if function in REFUSED:
            raise UserError(
                f"model: {self.of} calls {function.__name__}, which does not work here: {REFUSED[function]}."
            )
        return function(*args, **named)

    def refuse_replaced(self, function: Any, args: Any, named: dict[str, Any]) -> None:
        """Raise an error if a call uses a parameter itself, or a view of it, where another is given for it.

        Raises:
            UserError: it does; the output would not depend on what is learned.
        """
        if getattr(function, "__name__", "") == "__get__" and getattr(function, "__self__", None) not in VIEWING:
            return
        for given in (*args, *named.values()):
            for value in given if type(given) in (list, tuple) else (given,):
                if isinstance(value, Tensor) and (
                    name := self.replaced.get(id(value)) or self.replaced.get(base(value))
                ):
                    raise UserError(
                        f"model: the forward pass of {self.of} uses its parameter {name} by a reference or a view that "
                        "was kept outside of the module's parameters, such as in a list; then it would not be learned. "
                        "Take it from the module that has it in forward, or keep it in an nn.ParameterList."
                    )

    def written(self, function: Any, args: Any, named: dict[str, Any]) -> str | None:
        """The name of the buffer that a call would write to, if any."""
        name = getattr(function, "__name__", "")
        in_place = (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__set__")
        target = named.get("out", args[0] if in_place and args else None)
        return self.buffers.get(id(target))


VIEWING = (Tensor.T, Tensor.mT, Tensor.H, Tensor.mH, Tensor.data, Tensor.real, Tensor.imag)
"""The properties of a tensor that are tensors of the same numbers."""


def base(value: Tensor) -> int:
    """The identity of the tensor of which ``value`` is a view."""
    return id(value._base) if value._is_view() else 0


def refusal_of_writing(of: str, buffer: str) -> str:
    """The sentence that refuses a forward pass that writes to a buffer."""
    return (
        f"model: the forward pass of {of} writes to its buffer {buffer}, which all tasks would share; call eval() on "
        "the module that does, or make the buffer a parameter."
    )


def nothing() -> None:
    """Stand in for ``flatten_parameters``, which would ask for the memory address of weights inside a transform."""


class SafeForward:
    """The forward pass of a module with substituted functions and guarded buffers."""

    def __init__(self, module: nn.Module) -> None:
        """Prepare ``module``.

        Raises:
            UserError: two parameters share memory.
        """
        self.module, self.of = module, type(module).__name__
        for part in module.modules():
            if isinstance(part, nn.RNNBase):
                part.flatten_parameters = nothing  # type: ignore[method-assign]
        self.owners = [(name, part) for name, part in module.named_modules() if part._buffers]
        self.parameters = dict(module.named_parameters(remove_duplicate=False))
        self.quiet = [part for part in module.modules() if not (part._buffers or isinstance(part, _NormBase))]
        refuse_shared_memory(module)

    def __call__(self, weights: Any, x: Any) -> Any:
        """The output for ``x``, with ``weights`` in place of the parameters of the same names.

        Raises:
            UserError: the forward pass writes to a buffer, uses a parameter that is replaced, or calls a function that
                is refused.
        """
        held = [
            (f"{name}.{key}" if name else key, part, key, buffer, buffer._version)
            for name, part in self.owners
            for key, buffer in part._buffers.items()
            if buffer is not None
        ]
        buffers = {id(buffer): name for name, _, _, buffer, _ in held}
        replaced = {id(p): name for name, p in self.parameters.items() if weights.get(name, p) is not p}
        with Substituted(buffers, replaced, self.of), quietly(() if in_training() else self.quiet):
            out = torch.func.functional_call(self.module, weights, (x,))
        for name, part, key, buffer, version in held:
            if part._buffers.get(key) is not buffer or buffer._version != version:
                part._buffers[key] = buffer
                raise UserError(refusal_of_writing(self.of, name))
        return out


@contextmanager
def quietly(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, ``modules`` are in eval mode."""
    changed = [module for module in modules if module.training]
    for module in changed:
        module.training = False
    try:
        yield
    finally:
        for module in changed:
            module.training = True


def refuse_shared_memory(module: nn.Module) -> None:
    """Raise an error if two parameters, of which one is learned, begin at the same place in memory.

    Raises:
        UserError: they do, and would be learned separately.
    """
    there: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if isinstance(parameter, UninitializedParameter) or not parameter.numel() or not parameter.data_ptr():
            continue
        other, first = there.setdefault(parameter.data_ptr(), (name, parameter))
        if first is not parameter and (first.requires_grad or parameter.requires_grad):
            raise UserError(
                f"model: the parameters {other} and {name} of {type(module).__name__} share their memory and would be "
                f"learned separately here; let forward compute one from the other, or make both the same nn.Parameter."
            )
