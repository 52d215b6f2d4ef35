"""The contestant in JAX: the whole meta-step under ``jit``, with tasks mapped by ``vmap``."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.problems import Problem


def patches(x: Any, stride: int) -> Any:
    """Return 3×3 windows of padded images ``[n, channels, side, side]`` as ``[n, side, side, channels * 9]``.

    A product with these windows is a convolution. XLA's own convolution takes tens of seconds once ``vmap`` gives it
    separate weights per task, and with shared weights jaxlib 0.10.2 ended in a segmentation fault where it was tried.
    """
    side = -(-x.shape[2] // stride)
    x = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    span = stride * (side - 1) + 1
    shifted = [x[:, :, i : i + span : stride, j : j + span : stride] for i in range(3) for j in range(3)]
    return jnp.stack(shifted, 2).reshape(len(x), -1, side, side).transpose(0, 2, 3, 1)


def convolution(problem: Problem, w: Any, x: Any) -> Any:
    """Return the 3×3 convolution of ``x``, padded by one."""
    stride = 1 if problem.max_pool else 2
    return (patches(x, stride) @ w.reshape(len(w), -1).T).transpose(0, 3, 1, 2)


def features(problem: Problem, weights: Any, x: Any) -> Any:
    """Return the output of the trunk of the convolutional network."""
    for i in range(4):
        w, scale, shift = weights[3 * i : 3 * i + 3]
        x = convolution(problem, w, x)
        x = (x - x.mean((0, 2, 3), keepdims=True)) * jax.lax.rsqrt(x.var((0, 2, 3), keepdims=True) + 1e-5)
        x = jax.nn.relu(x * scale[:, None, None] + shift[:, None, None])
        if problem.max_pool:
            half = x.shape[2] // 2
            x = x[:, :, : 2 * half, : 2 * half].reshape(len(x), 64, half, 2, half, 2).max((3, 5))
    return x


def predict(problem: Problem, weights: Any, x: Any) -> Any:
    """Return the output of the whole network."""
    if problem.model == "mlp":
        for w, b in ((weights[0], weights[1]), (weights[2], weights[3])):
            x = jax.nn.relu(x @ w.T + b)
    else:
        x = features(problem, weights, x).mean((2, 3))
    return x @ weights[-2].T + weights[-1]


def task_loss(problem: Problem, weights: Any, x: Any, y: Any) -> Any:
    """Return the loss of one task."""
    out = predict(problem, weights, x)
    return ((out - y) ** 2).mean() if problem.model == "mlp" else -(y * jax.nn.log_softmax(out)).sum(1).mean()


def adapted(problem: Problem, weights: Any, x: Any, y: Any, steps: int) -> Any:
    """Return the weights after ``steps`` steps of gradient descent on a support set."""
    for _ in range(steps):
        grads = jax.grad(lambda w: task_loss(problem, w, x, y))(weights)
        if problem.method == "fomaml":
            grads = jax.lax.stop_gradient(grads)
        weights = [w - problem.inner_lr * g for w, g in zip(weights, grads, strict=True)]
    return weights


def adam(weights: Any, moments: Any, count: Any, grads: Any) -> tuple[Any, Any, Any]:
    """Return weights, moments and the number of steps after a step of Adam with a learning rate of 0.001."""
    count = count + 1
    mean = [0.9 * m + 0.1 * g for m, g in zip(moments[0], grads, strict=True)]
    square = [0.999 * v + 0.001 * g * g for v, g in zip(moments[1], grads, strict=True)]
    size, root = 1e-3 / (1 - 0.9**count), jnp.sqrt(1 - 0.999**count)
    new = [w - size * m / (jnp.sqrt(v) / root + 1e-8) for w, m, v in zip(weights, mean, square, strict=True)]
    return new, (mean, square), count


def meta_loss(problem: Problem, weights: Any, batch: Any) -> Any:
    """Return the mean query loss after adaptation."""

    def one(sx: Any, sy: Any, qx: Any, qy: Any) -> Any:
        if problem.method == "protonet":
            z = features(problem, weights, jnp.concatenate([sx, qx])).reshape(len(sx) + len(qx), -1)
            centres = (sy.T @ z[: len(sx)]) / problem.shots
            distance = ((z[len(sx) :, None] - centres[None]) ** 2).sum(-1)
            return -(qy * jax.nn.log_softmax(-distance)).sum(1).mean()
        return task_loss(problem, adapted(problem, weights, sx, sy, problem.inner_steps), qx, qy)

    if problem.method == "protonet":
        return one(*(batch[name][0] for name in ("sx", "sy", "qx", "qy")))
    return jax.vmap(one)(batch["sx"], batch["sy"], batch["qx"], batch["qy"]).mean()


class JaxContestant:
    """One jitted call per meta-step, Adam included; its buffers are donated to the results."""

    def __init__(self, problem: Problem, device: str) -> None:
        jax.config.update("jax_platforms", device)
        jax.config.update("jax_default_matmul_precision", "float32")
        self.weights = [jnp.asarray(w) for w in problem.weights()]
        self.moments = [jnp.zeros_like(w) for w in self.weights], [jnp.zeros_like(w) for w in self.weights]
        self.count = jnp.zeros(())
        self.batches = [{n: jnp.asarray(v) for n, v in problem.batch(i).items()} for i in range(4)]
        self.grad = jax.grad(lambda weights, batch: meta_loss(problem, weights, batch))

        def step(weights: Any, moments: Any, count: Any, batch: Any) -> Any:
            return adam(weights, moments, count, self.grad(weights, batch))

        self.jitted = jax.jit(step, donate_argnums=(0, 1))

    def gradient(self) -> np.ndarray[Any, Any]:
        """Return the first meta-gradient as one vector."""
        return np.concatenate([np.asarray(g).ravel() for g in jax.jit(self.grad)(self.weights, self.batches[0])])

    def step(self, number: int) -> None:
        """One meta-step."""
        out = self.jitted(self.weights, self.moments, self.count, self.batches[number % 4])
        self.weights, self.moments, self.count = out

    def wait(self) -> None:
        """Return when the steps so far are done."""
        self.count.block_until_ready()
