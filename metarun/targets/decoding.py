"""Writing text with a model that predicts next tokens: a loop of fixed length, so that it works under ``vmap``."""

from collections.abc import Callable

import torch
from torch import Tensor

from metarun import random
from metarun.contracts import Predict
from metarun.data.pieces import BOUNDARY, PADDING, UNKNOWN

Rule = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(prompt, text so far, logits ``[examples, ids]``) → logits, −∞ for tokens that must not follow."""


def written(
    predict: Predict,
    prompt: Tensor,
    length: int,
    temperature: float = 0.0,
    rule: Rule | None = None,
    begins: Tensor | None = None,
) -> Tensor:
    """Return texts ``[examples, length]`` of ids, each token chosen after those before it.

    What follows the first ``BOUNDARY`` of a text means nothing. With temperature 0 each token is the most likely one;
    otherwise it is drawn from the probabilities p ∝ exp(logit / temperature), with numbers from the task's seed.

    Args:
        predict: inputs ``[examples, columns + length]`` → logits ``[examples, length, ids]``.
        prompt: the first columns of the inputs ``[examples, columns]``.
        length: number of tokens to write.
        temperature: at least 0.
        rule: what a text has to obey; None: nothing.
        begins: tokens with which texts begin ``[examples, length]``, followed by 0; None: none.
    """
    place = torch.arange(length, device=prompt.device)
    text = prompt.new_zeros(len(prompt), length)
    inputs = torch.where(place == 0, BOUNDARY, text)
    seed = random.fresh_seed() if temperature else None
    for step in range(length):
        logits = predict(torch.cat([prompt, inputs], 1))[:, step]
        if seed is not None:
            # The largest of logits with Gumbel noise is a draw from their softmax.
            uniform = random.uniform(random.fold(seed, step), tuple(logits.shape)).to(logits)
            logits = logits / temperature - (-uniform.log()).log()
        if rule is not None:
            logits = rule(prompt, text, logits)
        chosen = logits.argmax(-1, keepdim=True)
        if begins is not None:
            chosen = torch.where(begins[:, step, None] > 0, begins[:, step, None], chosen)
        text = torch.where(place == step, chosen, text)
        inputs = torch.where(place == step + 1, chosen, inputs)
    return text


def readable(further: Rule | None = None) -> Rule:
    """Return the rule that texts hold neither padding nor unknown characters, followed by a further rule."""

    def rule(prompt: Tensor, text: Tensor, logits: Tensor) -> Tensor:
        ids = torch.arange(logits.shape[-1], device=logits.device)
        logits = logits.masked_fill((ids == PADDING) | (ids == UNKNOWN), -torch.inf)
        return logits if further is None else further(prompt, text, logits)

    return rule


def each_once(holds: Tensor) -> Rule:
    """Return the rule that a text says each of several things that its prompt holds once, and no other of them.

    Where a text would end with something left out, it says the most likely of what is left instead (as constraints in
    Balakrishnan et al. 2019, https://arxiv.org/abs/1906.07220, keep a text from ending).

    Args:
        holds: which tokens hold which things ``[ids, things]``, 1 or 0.
    """

    def rule(prompt: Tensor, text: Tensor, logits: Tensor) -> Tensor:
        own = holds.to(logits.device)
        there, said = (own[ids].sum(1) > 0 for ids in (prompt, text))
        wrong = (own[None] > 0) & (said | ~there)[:, None]
        logits = logits.masked_fill(wrong.any(-1), -torch.inf)
        left = ((own[None] > 0) & (there & ~said)[:, None]).any(-1)
        ends = (logits.argmax(-1) == BOUNDARY) & left.any(-1)
        return logits.masked_fill(ends[:, None] & ~left, -torch.inf)

    return rule
