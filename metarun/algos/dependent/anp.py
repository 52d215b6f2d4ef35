"""Attentive neural processes, and neural processes.

Kim et al. 2019, "Attentive Neural Processes", https://arxiv.org/abs/1901.05761 (§3). C are the context points, T the
targets, which include them:

    deterministic path    r_i = h(x_i, y_i),   r(x) = attention of x to the x_i, with the r_i as values
    latent path           s_i = k(x_i, y_i),   s = mean of s_i,   q(z | s) = N(μ(s), diag σ(s)²)
    decoder               p(y | x, r(x), z) = N(μ, σ²) with μ, σ = g(x, r(x), z)
    loss                  −E_{q(z | s_T)} log p(y_T | x_T, r(x_T), z) + KL(q(z | s_T) ‖ q(z | s_C)),  per target

Layers are those of the authors' code for one dimension (https://github.com/google-deepmind/neural-processes): no
self-attention unless asked for, one embedding of inputs for keys and queries, then projections that are separate for
queries, keys and values; σ of z is 0.1 + 0.9 sigmoid(·), σ of y is 0.1 + 0.9 softplus(·).

With ``waves`` inputs are places that the networks see as in ``cnp``, and the attention differs from the authors' in two
ways. Keys and queries are linear in the waves, and their projections start alike and large: attention is to nearby
context points from the first step on, where projections that are drawn apart from each other begin with an equal share
for every point, and stay near it for long. And a query may attend to nothing, a further value of zeros with a learned
logit: r(x) then also says whether any context point is near.

In training z is one sample from q(z | s_T), and the context is drawn as in ``cnp``. In validation and test the whole
support set is the context, ``samples`` latents are drawn from q(z | s_C), and

- predictions are the mean of μ over the samples;
- the second metric is the mean over query points of log (mean over the samples of p(y | x, r(x), z)).

All samples come from the task's seed, so that the same task always gets the same answer.

With ``deterministic=none`` the decoder knows the context from z alone: the neural process of Garnelo et al. 2018
(https://arxiv.org/abs/1807.01622). With ``deterministic=mean`` r is a mean, as in the neural processes that Kim et al.
compare with. With ``latents=0`` there is no latent path, which leaves a conditional neural process with attention.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from metarun.algos.dependent.cnp import (
    LOG_LIKELIHOOD,
    Points,
    as_normal,
    begin,
    drawn_context,
    layers,
    log_likelihood,
    placed,
    points,
)
from metarun.contracts import Algorithm, Loss, MetaLoss, Scores, Spec, Task, Tree, flat
from metarun.errors import require
from metarun.inner import both
from metarun.nn.functional import own_network
from metarun.nn.ops import mean_row, multi_head
from metarun.random import fresh_seed, normal
from metarun.targets.weights import count_of, mean_over, weight_of

Path = Literal["attention", "mean", "none"]

NEARNESS = 2.0
"""How much larger the projections of waves are at the start than those of other queries and keys."""


class Latent(NamedTuple):
    """A normal distribution of z with independent components."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Turn standard normal numbers ``[..., latents]`` into samples of z."""
        return self.mean + self.std * noise


def divergence(q: Latent, p: Latent) -> Tensor:
    """Return KL(q ‖ p) in nats, a scalar."""
    scaled = (q.std / p.std).square() + ((q.mean - p.mean) / p.std).square() - 1
    return (0.5 * scaled + p.std.log() - q.std.log()).sum()


class Attention(nn.Module):
    """Multi-head attention with separate projections of queries, keys and values (Vaswani et al. 2017, §3.2.2).

    Args:
        width: of values and of what is read, a multiple of ``heads``.
        heads: number of heads.
        places: None, or the width of queries and keys that are waves of places: their projections then start alike, and
            nothing can be attended to.
    """

    def __init__(self, width: int, heads: int, places: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = (nn.Linear(places or width, width, bias=False) for _ in range(2))
        self.value, self.mix = (nn.Linear(width, width, bias=False) for _ in range(2))
        for projection in (self.query, self.key, self.value, self.mix):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        self.nothing = None
        if places:
            with torch.no_grad():
                self.query.weight *= NEARNESS
                self.key.weight.copy_(self.query.weight)
            # Half of what a place's product with itself is at the start.
            self.nothing = nn.Parameter(torch.full((heads,), NEARNESS**2 / 4 * (width // heads) ** 0.5))

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, weight: Tensor) -> Tensor:
        """Attend to ``values [points, width]`` from ``queries [queries, width]``; points of weight 0 are ignored."""
        projected = self.query(queries), self.key(keys), self.value(values)
        read = multi_head(*projected, self.heads, weight, self.nothing)
        mixed: Tensor = self.mix(read)
        return mixed


class Encoder(nn.Module):
    """Points → representations ``[points, width]``; self-attention lets points see the points of weight 1."""

    def __init__(self, pair: int, width: int, heads: int, self_attention: int) -> None:
        super().__init__()
        self.layers = layers(pair, width, width, width, width)
        self.self_attention = nn.ModuleList(Attention(width, heads) for _ in range(self_attention))

    def forward(self, given: Points, weight: Tensor) -> Tensor:
        """``[points, width]``."""
        r: Tensor = self.layers(given.pairs())
        for attention in self.self_attention:
            r = r + attention(r, r, r, weight)
        return r


class LatentPath(nn.Module):
    """Points → the distribution of z."""

    def __init__(self, pair: int, width: int, latents: int, heads: int, self_attention: int) -> None:
        super().__init__()
        self.encoder = Encoder(pair, width, heads, self_attention)
        self.hidden = nn.Linear(width, (width + latents) // 2)
        self.mean, self.spread = (nn.Linear((width + latents) // 2, latents) for _ in range(2))

    def forward(self, given: Points, weight: Tensor) -> Latent:
        """Return q(z | s), where s is the mean over the points of weight 1."""
        s = self.hidden(mean_row(self.encoder(given, weight), weight)).relu()
        return Latent(self.mean(s), 0.1 + 0.9 * self.spread(s).sigmoid())


class Asked(NamedTuple):
    """The input of the network."""

    context: Points
    weight: Tensor
    """``[context points]``: 1, or 0 where a point does not count."""
    x: Tensor
    """Inputs of the targets ``[targets, inputs]``."""
    noise: Tensor
    """Standard normal numbers ``[samples, latents]``, for the samples of z given the context."""
    targets: Points | None = None
    """In training: the points from which q(z | s_T) is computed."""
    target_noise: Tensor | None = None
    """In training: standard normal numbers ``[latents]``, for the sample of z given the targets."""
    target_weight: Tensor | None = None
    """In training: ``[targets]``, 1, or 0 where a target is padding."""


class Answer(NamedTuple):
    """The output of the network."""

    mean: Tensor
    """``[samples, targets, outputs]``; in training the one for z given the targets comes last."""
    std: Tensor
    """Likewise."""
    kl: Tensor
    """KL(q(z | s_T) ‖ q(z | s_C)) in training, otherwise 0."""


class AttentiveProcess(nn.Module):
    """Both paths and the decoder."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        width: int,
        heads: int,
        latents: int,
        path: Path,
        self_attention: int,
        waves: int = 0,
    ) -> None:
        super().__init__()
        (self.place, places), self.path = placed(inputs, waves), path
        pair = places + outputs
        if path != "none":
            self.encoder = Encoder(pair, width, heads, self_attention)
        if path == "attention":
            self.embed = nn.Identity() if waves else layers(inputs, width, width)
            self.cross_attention = Attention(width, heads, places if waves else None)
        self.latent = LatentPath(pair, width, latents, heads, self_attention) if latents else None
        told = latents + (width if path != "none" else 0)
        self.decoder = layers(places + told, width, width, 2 * outputs)
        if waves:
            begin(self, places, [part.layers for part in self.modules() if isinstance(part, Encoder)])

    def deterministic(self, asked: Asked) -> Tensor:
        """Return r for every target: ``[targets, width]``, or without this path ``[targets, 0]``."""
        if self.path == "none":
            return asked.x[:, :0]
        r = self.encoder(asked.context, asked.weight)
        if self.path == "mean":
            return mean_row(r, asked.weight).expand(len(asked.x), -1)
        found: Tensor = self.cross_attention(self.embed(asked.x), self.embed(asked.context.x), r, asked.weight)
        return found

    def latents(self, asked: Asked) -> tuple[Tensor, Tensor]:
        """Return samples of z ``[samples, latents]`` and the KL divergence.

        In training the sample given the targets comes last.
        """
        none = asked.x.new_zeros(())
        if self.latent is None:
            return asked.noise, none
        prior = self.latent(asked.context, asked.weight)
        z = prior.sample(asked.noise)
        if asked.targets is None or asked.target_weight is None:
            return z, none
        posterior = self.latent(asked.targets, asked.target_weight)
        return torch.cat([z, posterior.sample(asked.target_noise)[None]]), divergence(posterior, prior)

    def forward(self, asked: Asked) -> Answer:
        """Return the distributions of the targets for every sample of z."""
        context = asked.context._replace(x=self.place(asked.context.x))
        targets = asked.targets and asked.targets._replace(x=self.place(asked.targets.x))
        asked = asked._replace(context=context, x=self.place(asked.x), targets=targets)
        r, (z, kl) = self.deterministic(asked), self.latents(asked)
        known = torch.cat([asked.x, r], -1)
        # One sample after the other, since memory would grow with the number of samples computed at once.
        outputs = [self.decoder(torch.cat([known, one.expand(len(known), -1)], -1)) for one in z]
        return Answer(*as_normal(torch.stack(outputs)), kl)


def anp(
    model: nn.Module,
    spec: Spec,
    deterministic: Path = "attention",
    latents: int = 128,
    samples: int = 8,
    least_context: int | None = 3,
    width: int = 128,
    heads: int = 8,
    self_attention: int = 0,
    waves: int = 0,
) -> Algorithm:
    """Attentive neural process.

    Args:
        model: only its dtype and device are used.
        spec: that of a regression task.
        deterministic: how the deterministic path aggregates the r_i: ``attention``, their ``mean``, or ``none`` for no
            such path.
        latents: number of components of z; 0: there is no latent path.
        samples: number of samples of z in validation and test, at least 1.
        least_context: smallest number of context points in training, at least 1; None: all support points always.
        width: width of every layer, at least 1, and a multiple of ``heads``.
        heads: number of attention heads, at least 1.
        self_attention: number of self-attention layers among the context points in the encoders of both paths.
        waves: number of half periods of the fastest wave of the inputs; 0: the networks see the inputs alone.
    """
    require(latents >= 0, f"latents must not be negative, and it is {latents}")
    require(latents > 0 or deterministic != "none", "without a deterministic path latents must be at least 1")
    require(samples >= 1, f"samples must be at least 1, not {samples}")
    require(least_context is None or least_context >= 1, f"least_context must be at least 1, not {least_context}")
    require(heads >= 1, f"heads must be at least 1, not {heads}")
    require(width >= 1 and width % heads == 0, f"width must be a positive multiple of heads={heads}, not {width}")
    require(self_attention >= 0, f"self_attention must not be negative, and it is {self_attention}")
    inputs = math.prod(spec.inputs.shape)
    forward, drawn = own_network(
        lambda: AttentiveProcess(
            inputs, spec.target.outputs, width, heads, latents, deterministic, self_attention, waves
        ),
        model,
    )

    def init(generator: torch.Generator) -> Tree:
        return {"weights": drawn(generator)}

    def noise(count: int, like: Tensor) -> Tensor:
        return normal(fresh_seed(), (count, latents)).to(like) if latents else like.new_zeros(1, 0)

    def adapt(theta: Tree, support: Tree, loss: Loss) -> Iterator[Tree | None]:
        yield None
        # Drawn once, so that all predictions from one state use the same samples.
        yield {**support, "noise": noise(samples, support["y"])}

    def answer(theta: Tree, state: Tree, x: Any) -> Answer:
        found: Answer = forward(theta["weights"], Asked(points(state), weight_of(state), flat(x), state["noise"]))
        return found

    def predict(theta: Tree, state: Tree, x: Any) -> Tensor:
        return answer(theta, state, x).mean.mean(0)

    def score_likelihood(theta: Tree, state: Tree, data: Tree) -> Scores:
        mean, std, _ = answer(theta, state, data["x"])
        by_sample = log_likelihood(data["y"], mean, std)
        return {LOG_LIKELIHOOD.name: mean_over(by_sample.logsumexp(0) - math.log(len(by_sample)), data)}

    def meta_loss(theta: Tree, task: Task, loss: Loss) -> MetaLoss:
        support, data = task.support, both(task)
        targets, target_weight = points(data), weight_of(data)
        weight = drawn_context(support, least_context)
        # Two samples: one given the targets, for the loss; one given the context, for a score that knows no targets.
        by_context, by_targets = noise(1, targets.y), noise(1, targets.y)
        mean, std, kl = forward(
            theta["weights"],
            Asked(points(support), weight, targets.x, by_context, targets, by_targets[0], target_weight),
        )
        _, scores = loss(lambda query: mean[0, len(support["y"]) :], task.query)
        likelihood = log_likelihood(targets.y, mean[-1], std[-1])
        return MetaLoss(kl / count_of(data) - mean_over(likelihood, data), scores)

    told_by_r = {"attention": spec.sizes.shots * width, "mean": width, "none": 0}[deterministic]
    return Algorithm(
        init,
        adapt,
        predict,
        approach="dependent",
        needs="numbers",
        paper="https://arxiv.org/abs/1901.05761" if deterministic != "none" else "https://arxiv.org/abs/1807.01622",
        meta_loss=meta_loss,
        metrics=(LOG_LIKELIHOOD,),
        scores=score_likelihood,
        adapted_parameters=lambda theta: told_by_r + latents,
    )
