"""MAML on the sinusoid in JAX, as a user of JAX would write it: ``python -m benchmarks.peers.jax_sinusoid``.

Tasks are drawn within the compiled step. Set ``JAX_COMPILATION_CACHE_DIR`` to keep what is compiled.
"""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.jax_peer import adam, adapted, meta_loss, task_loss
from benchmarks.peers import work_of_arguments
from benchmarks.problems import Problem

# Otherwise graphs that compile in less than a second are not kept.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def drawn(problem: Problem, key: Any) -> dict[str, Any]:
    """Return sine waves of random amplitude and phase."""
    keys = jax.random.split(key, 3)
    amplitude = jax.random.uniform(keys[0], (problem.tasks, 1, 1), minval=0.1, maxval=5.0)
    phase = jax.random.uniform(keys[1], (problem.tasks, 1, 1), maxval=jnp.pi)
    shape = (problem.tasks, problem.shots + problem.queries, 1)
    x = jax.random.uniform(keys[2], shape, minval=-5.0, maxval=5.0)
    y = amplitude * jnp.sin(x - phase)
    parts = {"s": slice(problem.shots), "q": slice(problem.shots, None)}
    return {f"{part}{name}": value[:, own] for part, own in parts.items() for name, value in (("x", x), ("y", y))}


def main() -> None:
    """Train, select, test and print."""
    work = work_of_arguments()
    training = work.training

    def step(state: Any, number: Any) -> Any:
        weights, moments, count = state
        tasks = drawn(training, jax.random.fold_in(jax.random.key(0), number))
        return adam(weights, moments, count, jax.grad(lambda w: meta_loss(training, w, tasks))(weights))

    def scores(weights: Any, batch: Any) -> Any:
        def one(sx: Any, sy: Any, qx: Any, qy: Any) -> Any:
            def further(fast: Any, _: None) -> tuple[Any, Any]:
                fast = adapted(training, fast, sx, sy, 1)
                return fast, task_loss(training, fast, qx, qy)

            before = task_loss(training, weights, qx, qy)
            return jnp.append(before, jax.lax.scan(further, weights, length=work.adapt_steps)[1])

        return jax.vmap(one)(batch["sx"], batch["sy"], batch["qx"], batch["qy"]).mean(0)

    jitted_step, jitted_scores = jax.jit(step), jax.jit(scores)
    validation = drawn(work.testing(work.val_episodes), jax.random.key(1000))
    test = drawn(work.testing(work.episodes), jax.random.key(1001))
    weights = [jnp.asarray(w) for w in training.weights()]
    zeros = [jnp.zeros_like(w) for w in weights]
    state, best = (weights, (zeros, zeros), jnp.zeros(())), (float("inf"), weights)
    for number in range(work.steps):
        state = jitted_step(state, number)
        if (number + 1) % work.eval_every == 0 or number + 1 == work.steps:
            score = float(jitted_scores(state[0], validation)[-1])
            best = min(best, (score, state[0]), key=lambda pair: pair[0])
    print(f"score {float(jitted_scores(best[1], test)[-1]):.4f}")


if __name__ == "__main__":
    main()
