"""Writing text with a model that predicts next tokens: a loop of fixed length, so that it works under ``vmap``."""

import torch
from torch import Tensor

from metarun import random
from metarun.contracts import Predict
from metarun.data.pieces import BOUNDARY


def written(predict: Predict, prompt: Tensor, length: int, temperature: float = 0.0) -> Tensor:
    """Return texts ``[examples, length]`` of ids, each token chosen after those before it.

    What follows the first ``BOUNDARY`` of a text means nothing. With temperature 0 each token is the most likely one;
    otherwise it is drawn from the probabilities p ∝ exp(logit / temperature), with numbers from the task's seed.

    Args:
        predict: inputs ``[examples, columns + length]`` → logits ``[examples, length, ids]``.
        prompt: the first columns of the inputs ``[examples, columns]``.
        length: number of tokens to write.
        temperature: at least 0.
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
        chosen = logits.argmax(-1, keepdim=True)
        text = torch.where(place == step, chosen, text)
        inputs = torch.where(place == step + 1, chosen, inputs)
    return text
