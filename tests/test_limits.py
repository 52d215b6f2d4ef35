"""Numbers that make no sense are refused before memory is spent, and memory does not grow with the number of steps."""

import resource
import time

import pytest
import torch
from conftest import composed, experiment_of

from metarun.assemble import assemble
from metarun.config import ABOVE_ZERO, AT_MOST_ONE, LOWER_BOUNDS, UPPER_BOUNDS, check_ranges, construct
from metarun.engine.optimizer import learning_rates
from metarun.errors import UserError
from metarun.loop import Rates, rates_of


def integer(key: str) -> bool:
    return key in UPPER_BOUNDS or key in ("train.decay_every", "train.eval_every", "train.task_chunk")


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_numbers_that_are_not_finite_are_refused_in_every_key(value):
    keys = {*LOWER_BOUNDS, *ABOVE_ZERO, *AT_MOST_ONE}
    floats = [key for key in sorted(keys) if not integer(key) and key != "train.trust_region.cg_episodes"]
    assert len(floats) == 8
    config, _ = composed()
    for key in floats:
        changed, (group, _, name) = config.copy(), key.rpartition(".")
        node = changed
        for part in group.split("."):
            node = node[part]
        node[name] = float(value)
        with pytest.raises(UserError, match=key):
            check_ranges(changed)


@pytest.mark.parametrize(
    "override", ["algo.inner_lr=inf", "algo.inner_lr=nan", "task.amplitude=[0.1,inf]", "+model.anything=[{a: nan}]"]
)
def test_numbers_that_are_not_finite_are_refused_in_task_model_and_algorithm(override):
    key = override.partition("=")[0].lstrip("+")
    with pytest.raises(UserError, match=f"{key} (must be finite|is unknown)"):
        assemble(*composed(override))


@pytest.mark.parametrize("key", sorted(UPPER_BOUNDS))
def test_absurd_sizes_are_refused_at_once(key):
    config, _ = composed(f"{key}=9223372036854775808" if "seed" in key else f"{key}=1000000000000000")
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(UserError, match=f"{key} must be at most"):
        check_ranges(config)
    assert time.monotonic() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000


def test_many_replicas_from_two_keys_are_refused_before_they_are_made():
    values = ",".join(str(0.001 * number) for number in range(1, 12))
    config, names = composed("replicas.count=1000", f"replicas.over={{algo.inner_lr: [{values}]}}")
    with pytest.raises(UserError, match="make 11000 runs"):
        assemble(config, names)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "step"])
def test_rates_of_single_steps_are_those_of_the_whole_schedule_to_the_bit(schedule, monkeypatch):
    """Also in blocks whose length is no multiple of what a processor computes at once."""
    experiment = experiment_of(
        f"train.schedule={schedule}",
        "train.steps=1003",
        "train.final=0.1",
        "train.decay_every=100",
        "replicas.over={train.lr: [0.001, 0.03]}",
    )
    whole = torch.stack([learning_rates(schedule, lr, 1003, 0.1, 0.5, 100) for lr in (0.001, 0.03)], 1).float()
    for block in (Rates.BLOCK, 37):
        monkeypatch.setattr(Rates, "BLOCK", block)
        rates = rates_of(experiment)
        assert torch.equal(torch.stack([rates[step]["lr"] for step in range(1003)]), whole)
        assert torch.equal(rates[500]["lr"], whole[500])


def test_memory_before_training_does_not_grow_with_the_number_of_steps():
    experiment = experiment_of("train.steps=1000000000000", "train.schedule=cosine")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rates = rates_of(experiment)
    assert rates[0]["lr"].item() == pytest.approx(0.001)
    assert rates[10**12 - 1]["lr"].item() == pytest.approx(0, abs=1e-9)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000


def sized(widths: tuple[int, ...], pair: tuple[int, int] = (1, 2)):
    return widths, pair


def test_a_tuple_of_any_length_takes_a_list_of_any_length():
    def built(**keys):
        return construct("model", {"_target_": "test_limits.sized", **keys})

    for widths in ([], [1], [1, 2], [1, 2, 3]):
        assert built(widths=widths) == (widths, (1, 2))
    for keys, words in (
        ({"widths": [1, "a"]}, "model.widths must be a list, each item a whole number"),
        ({"widths": [1], "pair": [1, 2, 3]}, "model.pair must be a list of 2 values, each a whole number"),
    ):
        with pytest.raises(UserError, match=words):
            built(**keys)
