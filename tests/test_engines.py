"""Every engine, map over tasks and number of replicas gives what the plain step gives."""

import ctypes
import itertools
import logging
import random
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import composed, experiment_of
from scenarios import sampled
from torch import nn

from metarun.algos.agnostic.anil import anil
from metarun.algos.agnostic.imaml import imaml
from metarun.algos.agnostic.maml import maml
from metarun.assemble import Replica, assemble
from metarun.config import build
from metarun.engine import compiler, products, xla
from metarun.engine.ahead import Ahead
from metarun.engine.batch import meta_gradient
from metarun.engine.choose import Stepper, agrees
from metarun.engine.library import pointer_of
from metarun.engine.meta_step import MetaStep, accumulated, parts_of
from metarun.engine.products import compiled_products, with_fast_products
from metarun.engine.recorder import CannotRecord
from metarun.engine.recording import AsWritten, Captured, Recording
from metarun.errors import UserError
from metarun.evaluation import episodes, evaluate
from metarun.loop import rates_of, training_tasks
from metarun.nn.ops import channels_last
from metarun.random import stream
from metarun.run import run
from metarun.targets.scoring import loss_of
from metarun.tree import leaves, tree_map

TINY = ("train.steps=50", "train.meta_batch=4", "train.clip=0.5", "train.weight_decay=0.01", "train.schedule=cosine")
IMAGES = ("task=omniglot", "task.dataset=procedural", "task.image_size=16", "model.filters=4", "task.train_ways=null")
FEW = ("task.shots=3", "task.queries=3")
SETTINGS = {
    "maml": ("algo.inner_steps=2",),
    "reptile": ("algo.inner_steps=3",),
    "metasgd": (),
    "imaml": ("algo.inner_steps=2", "algo.cg_steps=2"),
    "adaptive": (),
    "cnp": ("algo.width=8",),
    "anp": ("algo.width=8", "algo.heads=2", "algo.latents=4"),
    "maml_images": ("algo=maml", *IMAGES),
    "mamlpp": ("algo.inner_steps=2", "algo.first_order_epochs=1", "algo.multi_step_epochs=2", "algo.epoch=1"),
    "mamlpp_images": ("algo=mamlpp", *IMAGES, "algo.inner_steps=2", "algo.batch_norm=per_step_running"),
    "metanas": ("model.widths=[4]", "algo.inner_steps=2", "algo.warm_up=1"),
    "protonet": IMAGES,
    "metaoptnet": (*IMAGES, "algo.solver_steps=4"),
    "baselinepp": IMAGES,
    "multitask": (),
    "shared_params": (),
    "dkt": (),
    "matching": IMAGES,
    "shared_model": IMAGES,
    "snail": ("algo.width=8", *FEW),
    "mann": ("algo.slots=6", "algo.width=3", "algo.controller=5", "algo.heads=2", *FEW),
    "incontext": ("algo.width=8", "algo.layers=2"),
    "transfer": IMAGES,
    "maml_navigation": ("algo=maml", "task=navigation", "task.horizon=5", "task.shots=3", "task.queries=3"),
    "rl2": ("task=bandit", "task.pulls=4", "task.queries=3", "task.shots=2"),
    "maml_padded": ("algo=maml", *IMAGES, "task.train_shots=[1,3]"),
    "reptile_padded": ("algo=reptile", "task.train_shots=[2,7]", "algo.inner_batch=3"),
    "anp_padded": ("algo=anp", "algo.width=8", "algo.heads=2", "algo.latents=4", "task.train_shots=[2,7]"),
    "snail_padded": ("algo=snail", "algo.width=8", "task.train_shots=[2,7]"),
    "protonet_text": ("algo=protonet", "task=text", "task.dataset=toy", "task.buckets=64", "task.train_ways=5"),
}


def setting(name, *more):
    own_model = () if name != "metanas" else ("model=supernet_mlp",)
    return experiment_of(f"algo={name}", *own_model, *SETTINGS[name], *TINY, *more)


def given(experiment, meta_step, step, state=None):
    seeds = [one.config.seed for one in experiment.replicas]
    tasks = training_tasks(experiment, seeds, experiment.config.train.meta_batch, step)
    return {
        "train_state": state or meta_step.initial_train_state(),
        "tasks": tasks,
        "rates": rates_of(experiment)[step],
    }


def with_two_inputs(name):
    """A meta-step, what its first step is given, and other tasks and weights, which a recording of it has not seen."""
    experiment = setting(name)
    meta_step = MetaStep(experiment)
    first = given(experiment, meta_step, 0)
    return meta_step, first, given(experiment, meta_step, 1, meta_step.whole(first)["train_state"])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_recording_and_chunks_of_tasks_give_what_the_step_gives(name):
    meta_step, first, second = with_two_inputs(name)
    recording = Recording(meta_step.whole, first)
    kept = tree_map(torch.clone, second)
    expected = meta_step.whole(second)
    for replayed in (recording, recording.replayed(first)):
        torch.testing.assert_close(replayed(second), expected, rtol=0, atol=0)
        torch.testing.assert_close(second, kept, rtol=0, atol=0)
    for_the_compiler = recording.other(with_fast_products(recording.graph, recording.constants))
    torch.testing.assert_close(for_the_compiler(second), expected, rtol=1e-9, atol=1e-12)
    in_chunks = accumulated(meta_step.gradient, meta_step.update, 2)
    torch.testing.assert_close(in_chunks(second), expected, rtol=1e-9, atol=1e-12)


def test_threads_run_scripts_as_they_are_written_and_leave_torch_as_it_was():
    """The setting is that of the process, so it has to stay until the last thread is done."""
    as_written = AsWritten()
    assert torch._C._get_graph_executor_optimize()
    with as_written:
        with as_written:
            assert not torch._C._get_graph_executor_optimize()
        assert not torch._C._get_graph_executor_optimize()
    assert torch._C._get_graph_executor_optimize()


IN_THREADS = ("maml", "metasgd", "cnp", "mamlpp", "protonet", "multitask", "incontext", "rl2", "protonet_text")
"""Of every kind one whose recording is short: that of one task is made by the code that makes that of all."""


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", IN_THREADS)
def test_the_recording_of_one_task_run_in_threads_gives_what_the_step_gives(name):
    meta_step, first, second = with_two_inputs(name)
    task = Recording(meta_step.gradient, parts_of(first, 1)[0]).replayed(parts_of(first, 1)[0])
    with ThreadPoolExecutor(2) as pool:
        in_threads = accumulated(task, meta_step.update, 1, pool)(second)
    torch.testing.assert_close(in_threads, meta_step.whole(second), rtol=1e-9, atol=1e-12)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")


@needs_compiler
@pytest.mark.skipif(torch.__version__ < "2.7", reason="libraries of torch 2.6 cannot solve linear systems")
@pytest.mark.usefixtures("float64")
def test_a_compiled_step_gives_what_the_step_gives_and_is_kept_for_every_run_that_has_the_same(tmp_path, monkeypatch):
    """It is compiled again only if the operations are others, or if the library is damaged."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    built, made = compiler.built, []

    def once(module, values, options, place):
        """Compile what comes first; the rest, which takes ten seconds each, is a copy of it."""
        if not made:
            built(module, values, options, first)
        made.append(module)
        return shutil.copytree(first, place, dirs_exist_ok=True) / "step.so"

    (first := tmp_path / "first").mkdir()
    monkeypatch.setattr(compiler, "built", once)
    experiment = experiment_of("algo=maml", "algo.inner_steps=1", "model.widths=[8]", *TINY)
    meta_step = MetaStep(experiment)
    values = {"now": given(experiment, meta_step, 0), "a": torch.rand(3, 4), "b": torch.rand(4, 3).T}
    values["c"] = torch.rand(3, 3) + 3 * torch.eye(3)
    state = values["now"]["train_state"]

    def compiled(scale):
        # The library calls torch for linear algebra, by what stands next to it.
        def step(tree):
            solved = torch.linalg.solve(tree["c"], tree["a"] * tree["b"])
            return {"step": meta_step.whole(tree["now"]), "y": solved.sin() * scale}

        return Recording(step, values).compiled(values)

    solved = 2.0 * (values["c"].inverse() @ (values["a"] * values["b"])).sin()
    for number in range(3):
        now = given(experiment, meta_step, number, state)
        expected = meta_step.whole(now)
        found = compiled(2.0)({**values, "now": now})
        torch.testing.assert_close(found["step"], expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found["y"], solved)
        state = expected["train_state"]
        assert len(made) == 1
    torch.testing.assert_close(compiled(3.0)(values)["y"], solved)
    assert len(made) == 2
    assert len(list(tmp_path.glob("libraries/*.json"))) == 2
    # Elsewhere, since a process does not read a library again that it has read.
    (elsewhere := tmp_path / "elsewhere" / "libraries").mkdir(parents=True)
    for path in tmp_path.glob("libraries/*.*"):
        (elsewhere / path.name).write_bytes(path.read_bytes()[:1000])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(elsewhere.parent))
    torch.testing.assert_close(compiled(2.0)(values)["y"], solved)
    assert len(made) == 3


@needs_compiler
@pytest.mark.usefixtures("float64")
def test_threads_run_a_library_at_once_and_what_is_kept_is_loaded_without_the_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def function(tree):
        return {"y": (tree["a"] @ tree["b"]).relu(), "z": {"sum": tree["a"].sum(1)}}

    def values():
        return {"a": torch.randn(4, 30, 20), "b": torch.randn(4, 20, 10)}

    recording = Recording(function, first := values())
    recording.compiled(first, at_once=2)
    assert len(list(tmp_path.glob("libraries/*.so"))) == 1
    for needed in ("require_compiler", "built", "in_memory"):
        monkeypatch.setattr(compiler, needed, None)
    compiled, others = recording.compiled(first, at_once=2), [values() for _ in range(200)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(compiled, others))
    torch.testing.assert_close(found, [function(other) for other in others], rtol=1e-12, atol=1e-12)


def test_calls_of_kernels_are_compiled_while_the_kernels_are_and_linked_once_both_are_there(monkeypatch, tmp_path):
    from torch._inductor import cpp_builder, cpu_vec_isa

    calls, kernels, link = "g++ a.cpp -c -o a.wrapper.o", "g++ b.cpp -c -o b.kernel.o", "g++ a.o b.o -o step.so"
    ended, compiling = [], threading.Event()

    def run(command, cwd):
        if command == kernels:
            compiling.set()
        elif command == calls and not compiling.wait(60):
            raise RuntimeError("the kernels were not compiled at the same time")
        ended.append(command)

    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", lambda: None)
    monkeypatch.setattr(compiler, "compiled_products", lambda place, threads: None)
    monkeypatch.setattr(cpp_builder, "run_compile_cmd", run)
    with compiler.on_all_cores({}, tmp_path):
        for command in (calls, kernels, link):
            cpp_builder.run_compile_cmd(command, str(tmp_path))
    assert cpp_builder.run_compile_cmd is run
    assert ended[-1] == link
    assert set(ended) == {calls, kernels, link}

    def fails(command, cwd):
        if command == calls:
            raise ValueError("calls")

    monkeypatch.setattr(cpp_builder, "run_compile_cmd", fails)
    with compiler.on_all_cores({}, tmp_path):
        cpp_builder.run_compile_cmd(calls, str(tmp_path))
        with pytest.raises(ValueError, match="calls"):
            cpp_builder.run_compile_cmd(link, str(tmp_path))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_validation_scores_the_last_step_as_it_is_scored_along_adaptation(name):
    experiment = setting(name, "eval.adapt_steps=2")
    replica, theta = experiment.replicas[0], experiment.initial_thetas()[0]
    tasks = list(episodes(experiment, "val", 3))
    along, last = (evaluate(experiment, replica, theta, tasks, only_last=only) for only in (False, True))
    assert last.adapt_steps[-1] == along.adapt_steps[-1]
    assert torch.equal(last.losses[:, -1], along.losses[:, -1])
    for metric, scores in along.scores.items():
        assert torch.equal(last.scores[metric][:, -1], scores[:, -1])
    if name == "maml":
        assert last.adapt_steps == [0, 2]


SIZES = (1, 2, 3, 7, 8, 10, 13, 16, 40, 41, 64, 65)


@needs_compiler
def test_products_of_small_matrices_are_those_of_torch(tmp_path):
    """Every layout and size of the factors and of the result, also beyond the largest that are ours, in both types."""
    made = compiled_products(tmp_path, 1)
    assert made is not None
    folder = Path(torch.__file__).parent / "lib"
    command = [shutil.which("g++"), "-shared", str(made), "-o", str(tmp_path / "products.so")]
    subprocess.run([*command, f"-L{folder}", "-ltorch_cpu", "-ltorch", "-lc10", f"-Wl,-rpath,{folder}"], check=True)
    product = ctypes.CDLL(str(tmp_path / "products.so")).metarun_bmm_out
    product.argtypes = [ctypes.c_void_p] * 3
    random_order = random.Random(0)

    def laid_out(rows, columns, turned):
        shape = (3, columns, rows) if turned else (3, rows, columns)
        return torch.randn(shape).transpose(1, 2) if turned else torch.randn(shape)

    for dtype, rounding in ((torch.float32, 1e-5), (torch.float64, 1e-14)):
        for turned in itertools.product((False, True), repeat=3):
            for _ in range(40):
                rows, columns, terms = random_order.choices(SIZES, k=3)
                a, b, out = (
                    laid_out(*size, turn).to(dtype)
                    for size, turn in zip(((rows, terms), (terms, columns), (rows, columns)), turned, strict=True)
                )
                # Rows that are apart, and the same matrix for the whole batch.
                a, b = torch.cat([a, a], 2)[:, :, :terms], b[:1].expand(3, -1, -1) if rows == 7 else b
                expected = torch.bmm(a, b)
                capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([out.fill_(torch.nan), a, b])
                assert product(*(pointer_of(capsule, None) for capsule in capsules)) == 0
                torch.testing.assert_close(out, expected, rtol=rounding, atol=rounding * 100)


def test_derivatives_of_weights_are_added_in_the_order_in_which_they_are_computed():
    """Kernels of a compiled step read no product across its rows."""

    def across(graph):
        """How often a kernel reads a product, or a sum of products, of many rows and columns transposed."""
        found, made = 0, (*products.PRODUCTS, *products.ELEMENTWISE)
        for node in graph.nodes:
            for term in node.all_input_nodes if node.target in (*products.ELEMENTWISE, aten.sum.dim_IntList) else ():
                wide, transposed = min(term.meta.get("shape", ())[-2:], default=0) >= products.NARROW, 0
                while term.target in (*products.TRANSPOSES, *products.VIEWS):
                    transposed += term.target in products.TRANSPOSES
                    term = term.args[0]
                found += wide and term.target in made and transposed % 2
        return found

    aten, (meta_step, first, _) = torch.ops.aten, with_two_inputs("maml")
    recording = Recording(meta_step.whole, first)
    assert across(recording.graph) > 0
    assert across(with_fast_products(recording.graph, recording.constants).graph) == 0


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", SETTINGS)
def test_the_step_of_every_algorithm_compiles_to_what_it_gives(name):
    meta_step, first, second = with_two_inputs(name)
    compiled = Recording(meta_step.whole, first).compiled(first)
    torch.testing.assert_close(compiled(second), meta_step.whole(second), rtol=1e-9, atol=1e-11)


def test_wide_products_are_the_same_products():
    def products(tree):
        a, b, c, d, e = (tree[name] for name in "abcde")
        return {
            "narrow": a @ b,
            "viewed": (a @ c).view(60, 4) + 1,
            "transposed": (a @ d).transpose(1, 2) * 2,
            "wide": b.transpose(1, 2) @ a,
            "of a narrow one": (a @ b) @ e,
            "column by row": a[:, :, :1] @ d.transpose(1, 2)[:, 2:3],
        }

    values = {"a": torch.randn(3, 20, 20)} | {name: torch.randn(3, 20, 4) for name in "bcd"}
    values["e"] = torch.randn(3, 4, 5)
    recording = Recording(products, values)
    rewritten = with_fast_products(recording.graph, recording.constants)
    shapes = [n.meta.get("shape") for n in rewritten.graph.nodes if n.target is torch.ops.aten.bmm.default]
    assert len(shapes) == 5
    assert sum(shape is None for shape in shapes) == 4  # those that were put in place of narrow ones
    expected = list(leaves(products(values)))
    torch.testing.assert_close(list(rewritten(*leaves(values))), expected)


def steps_of(experiment, count=3):
    meta_step = MetaStep(experiment)
    stepper, state = Stepper(experiment, meta_step), meta_step.initial_train_state()
    for step in range(count):
        out = stepper(given(experiment, meta_step, step, state))
        state = out["train_state"]
    return stepper, out


def through_numpy(x):
    return torch.from_numpy(x.detach().numpy() * 1.0)


class Detour(nn.Module):
    """A model that leaves torch on its way: what it gives there is a constant to a recording."""

    def __init__(self, spec):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.w + Leave.apply(x)


class Leave(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return through_numpy(x)

    @staticmethod
    def setup_context(context, inputs, output):
        pass

    @staticmethod
    def backward(context, gradient):
        return torch.zeros_like(gradient)

    @staticmethod
    def vmap(info, in_dims, x):
        return through_numpy(x), in_dims[0]


class Remembering(nn.Module):
    """A model that leaves torch with a parameter that no inner step changes."""

    def __init__(self, spec):
        super().__init__()
        self.trunk, self.head = nn.Linear(1, 1), nn.Linear(1, 1)
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.5)

    def forward(self, x):
        return self.head(self.trunk(x)) * (1 + Leave.apply(self.trunk.weight))


class Skipping(nn.Module):
    """A model that leaves a layer out by a number of Python's, so seldom that a comparison misses it."""

    def __init__(self, spec):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x):
        return x if random.random() < 1e-9 else self.layer(x)


def reading(algorithm):
    """The algorithm with a meta-gradient that reads a value, as a line search would."""

    def meta_grad(theta, tasks, loss):
        found = meta_gradient(algorithm, theta, tasks, loss)
        return found if found.loss.item() < 1e9 else found._replace(loss=found.loss * 0)

    return algorithm._replace(meta_grad=meta_grad)


@pytest.mark.parametrize("kind", ["of the tasks", "of a single task", "of a parameter", "reading", "skipping"])
def test_what_cannot_be_recorded_stays_eager_and_says_why(kind, caplog):
    experiment = experiment_of("engine=replay", *TINY, *["train.meta_batch=1"] * (kind == "of a single task"))
    first, spec = experiment.replicas[0], experiment.family.spec
    why, model = "its results differ from those of eager", Detour(spec)
    if kind == "reading":
        why, model, algorithm = "no replay: ", first.model, reading(first.algorithm)
    elif kind == "skipping":
        why, model = "random numbers of Python or NumPy", Skipping(spec)
        algorithm = maml(model)
    elif kind == "of a parameter":
        model = Remembering(spec)
        algorithm = anil(model)
    else:
        algorithm = maml(model)
    replicas = [Replica(first.config, first.differs, model, algorithm)]
    experiment = replace(experiment, replicas=replicas, algorithm=algorithm)
    with caplog.at_level(logging.INFO):
        stepper, _ = steps_of(experiment)
    assert stepper.engine == "eager"
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("engine: ")]
    assert len(lines) == 1
    assert why in lines[0]


def test_a_batch_of_another_shape_is_not_run_by_a_recording(caplog):
    """A family may draw another number of examples for each batch, and sizes are constants of a recording."""
    shots, found = {stream(0, "train", step).initial_seed(): 5 for step in (0, 1, 3)}, []
    for engine in ("eager", "replay"):
        experiment = experiment_of(f"engine={engine}", *TINY)
        sample = experiment.family.sample

        def drawn(split, count, generator, sample=sample):
            tasks = sample(split, count, generator)
            few = shots.get(generator.initial_seed(), 7)
            return tasks._replace(support=tree_map(lambda leaf: leaf[:, :few], tasks.support))

        experiment.family.sample = drawn
        with caplog.at_level(logging.INFO):
            stepper, out = steps_of(experiment, 4)
        assert stepper.engine == engine
        found.append(out)
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert caplog.text.count("Batches of tasks differ in their shapes") == 1


@pytest.mark.parametrize("recorded", [True, False])
def test_a_batch_may_lie_in_memory_in_another_order(recorded):
    """A recording may hold views that only the layout of its own example allows."""
    turned, found = {stream(0, "train", step).initial_seed() for step in (1, 3)}, []
    for engine in ("eager", "replay"):
        experiment = experiment_of(f"engine={engine}", *TINY)
        sample = experiment.family.sample

        def drawn(split, count, generator, sample=sample):
            tasks = tree_map(lambda leaf: leaf.contiguous(), sample(split, count, generator))
            if (generator.initial_seed() in turned) is recorded:
                return tree_map(lambda leaf: leaf.transpose(0, 1).contiguous().transpose(0, 1), tasks)
            return tasks

        experiment.family.sample = drawn
        stepper, out = steps_of(experiment, 4)
        assert stepper.engine == engine
        found.append(out)
    torch.testing.assert_close(*found)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have a single standard library of C++")
def test_a_library_with_its_own_standard_library_is_not_loaded(tmp_path):
    """Where it is linked statically, both copies would meet in one process, which ends."""
    if (linker := shutil.which("g++")) is None:
        pytest.skip("there is no g++")
    source = tmp_path / "step.cpp"
    source.write_text(
        "#include <regex>\nbool matches(const char* text) { return std::regex_match(text, std::regex(text)); }"
    )
    for name, more in {"own": ["-static-libstdc++"], "shared": []}.items():
        subprocess.run([linker, "-shared", "-fPIC", source, "-o", tmp_path / f"{name}.so", *more], check=True)
    with pytest.raises(CannotRecord, match="its standard library"):
        compiler.loaded(tmp_path / "own.so", 1)
    with pytest.raises(AttributeError, match="AOTInductorModelContainer"):
        compiler.loaded(tmp_path / "shared.so", 1)


def test_a_library_that_does_not_run_is_replaced_by_what_is_compiled_in_memory(tmp_path, monkeypatch):
    def fails(*inputs):
        raise RuntimeError("a call that the library cannot make")

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "as_library", lambda *arguments: fails)
    monkeypatch.setattr(compiler, "in_memory", lambda module, values, options: module)
    values = {"a": torch.rand(3)}
    compiled = Recording(lambda tree: {"y": tree["a"].sin()}, values).compiled(values)
    torch.testing.assert_close(compiled(values)["y"], values["a"].sin())


def test_without_a_compiler_a_run_stays_eager_and_says_why(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    from torch._inductor import config as inductor

    # pytest's own patch would leave the setting undefined to later tests.
    with inductor.patch({"cpp.cxx": ("/nowhere/no-compiler",)}), caplog.at_level(logging.INFO):
        stepper, _ = steps_of(experiment_of("engine=compile", "algo=transfer", "model.widths=[7]"))
    assert stepper.engine == "eager"
    assert "no compile: " in caplog.text
    assert "Compiling" not in caplog.text


@pytest.mark.parametrize(
    ("steps", "compiler", "jax", "engine"),
    [
        (30, True, True, "eager"),
        (300, True, True, "replay"),
        (3000, True, False, "replay"),
        # The default command, whose compiled step is kept for the next one.
        (5000, True, False, "compile"),
        (5000, True, True, "xla"),
        (1_000_000, True, True, "compile"),
        (1_000_000, False, False, "replay"),
    ],
)
def test_auto_takes_what_pays_whatever_the_clock_says(steps, compiler, jax, engine, monkeypatch, caplog):
    """A machine that is a hundred times slower for a while chooses the same."""
    real, slow = time.perf_counter, iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: real() + 100.0 * next(slow))

    def compiled(self, given):
        if not compiler:
            raise CannotRecord("no compiler")
        return self

    monkeypatch.setattr(Recording, "compiled", compiled)
    monkeypatch.setattr(Recording, "by_xla", lambda self, given: self)
    monkeypatch.setattr(xla, "installed", lambda: jax)
    experiment = experiment_of(*TINY, f"train.steps={steps}")
    with caplog.at_level(logging.INFO):
        stepper, _ = steps_of(experiment)
    assert stepper.engine == engine
    assert caplog.text.count("engine: ") == 1
    assert f"estimated for {steps} steps" in caplog.text


@pytest.mark.parametrize("chunk", [None, 4])
def test_a_gpu_that_is_too_small_takes_fewer_tasks_at_a_time_or_says_what_to_lower(chunk, monkeypatch):
    experiment = experiment_of("engine=eager", *TINY, f"train.task_chunk={chunk or 'null'}")
    meta_step = MetaStep(experiment)
    whole = meta_step.whole

    def too_much(tree):
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(meta_step, "whole", too_much)
    stepper = Stepper(experiment, meta_step)
    now = given(experiment, meta_step, 0)
    if chunk:
        with pytest.raises(UserError, match=r"train.task_chunk.*train.meta_batch"):
            stepper(now)
    else:
        torch.testing.assert_close(stepper(now)["result"], whole(now)["result"])
        assert stepper.chunk == 2


OVER = {
    "algo.inner_lr": ("maml", (), [0.01, 0.3]),
    "train.lr": ("maml", (), [0.01, 0.0001]),
    "train.clip": ("reptile", ("train.optimizer=sgd", "algo.inner_optimizer=sgd"), [0.01, 1.0]),
    "algo.strength": ("imaml", ("algo.inner_steps=3",), [0.5, 2.0]),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("key", OVER)
def test_replicas_that_differ_in_a_number_equal_separate_runs(key):
    algo, more, values = OVER[key]
    together = experiment_of(f"algo={algo}", *TINY, *more, f"replicas.over={{{key}: {values}}}", "replicas.count=2")
    assert [one.differs for one in together.replicas] == [
        {key: value, "seed": seed} for value in values for seed in (0, 1)
    ]
    meta_step, states = MetaStep(together), None
    alone = [experiment_of(f"algo={algo}", *TINY, *more, f"{key}={v}", f"seed={s}") for v in values for s in (0, 1)]
    own = [MetaStep(one) for one in alone]
    own_states = [None] * len(alone)
    for step in range(3):
        out = meta_step.whole(given(together, meta_step, step, states))
        states = out["train_state"]
        for index, (experiment, steps) in enumerate(zip(alone, own, strict=True)):
            single = steps.whole(given(experiment, steps, step, own_states[index]))
            own_states[index] = single["train_state"]
            mine = tree_map(lambda leaf, i=index: leaf[i : i + 1], out)
            torch.testing.assert_close(mine, single, rtol=1e-7, atol=1e-10)
    # The values make a difference, or this would show nothing.
    assert (states["weights"][0] - states["weights"][2]).abs().max() > 1e-5


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ("{task.shots: [1, 5]}", "sweep it with metarun -m task.shots"),
        ("{algo.inner_steps: [1, 2]}", "must be a number with a point"),
        ("{algo.inner_lr: 0.1}", "needs a list of different numbers"),
        ("{algo.inner_lr: [0.1, 0.1]}", "needs a list of different numbers"),
        ("{algo.inner_lr: [0.1, -1.0]}", "inner_lr must be above 0"),
        ("{train.lr: [0.1, 0.0]}", "train.lr must be a finite number above 0"),
    ],
)
def test_replicas_that_cannot_be_are_refused(over, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        assemble(*composed(f"replicas.over={over}"))


def deaf(model, spec, inner_lr: float = 0.1):
    """MAML that makes a plain number of its step size, so that a replica's own cannot reach it."""
    return maml(model, float(inner_lr))


def branching(model, spec, inner_lr: float = 0.1):
    """MAML whose loss depends on whether its step size is large."""
    found = maml(model, inner_lr)

    def predict(theta, state, x):
        return found.predict(theta, state, x) * (2 if inner_lr > 0.05 else 1)

    return found._replace(predict=predict)


def nearly_deaf(model, spec, inner_lr: float = 0.1):
    """Implicit MAML that makes a plain number of something that matters little, a quarter of a percent."""
    return imaml(model, strength=float(20 * inner_lr))


@pytest.mark.parametrize("target", ["deaf", "nearly_deaf", "branching"])
def test_a_hyperparameter_that_one_process_cannot_vary_is_refused(target, tmp_path):
    values = [0.1, 0.15] if target == "nearly_deaf" else [0.1, 0.01]
    config, names = composed(f"replicas.over={{algo.inner_lr: {values}}}", "train.steps=2")
    config.algo = {"_target_": f"test_engines.{target}", "inner_lr": 0.1}
    with pytest.raises(UserError, match=r"sweep them with metarun -m algo.inner_lr"):
        run(config, names, tmp_path)


@pytest.mark.usefixtures("without_pictures")
def test_a_replica_that_diverges_is_failed_and_the_others_are_not(tmp_path):
    quick = ("train.optimizer=sgd", "train.steps=40", "train.eval_every=5", "train.val_episodes=4", "eval.episodes=6")
    value = run(*composed(*quick, "replicas.over={train.lr: [0.001, 1.0]}"), tmp_path)
    table = pd.read_csv(tmp_path / "result.csv")
    assert list(table["status"]) == ["completed", "failed"]
    assert list(table["varied"]) == ["train.lr=0.001", "train.lr=1.0"]
    assert value == table["val_score"][0]
    assert set(pd.read_csv(tmp_path / "episodes.csv")["replica"]) == {0}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_step_against_the_gradient_does_not_agree_with_eager(optimizer):
    experiment = experiment_of(*TINY, f"train.optimizer={optimizer}", "train.lr=0.001")
    meta_step = MetaStep(experiment)
    now = given(experiment, meta_step, 0)
    found = meta_step.gradient(now)
    expected = meta_step.update({**now, **found})
    assert agrees(meta_step.whole(now), expected, now)
    wrong = meta_step.update({**now, **found, "gradient": -found["gradient"]})
    assert not agrees(wrong, expected, now)


@pytest.mark.usefixtures("without_pictures")
def test_precision_is_named_in_the_row_and_changes_little(tmp_path):
    scores = {}
    for name in ("float32", "bfloat16", "tf32"):
        quick = ("train.steps=30", "train.eval_every=30", "train.val_episodes=20", "eval.episodes=20")
        run(*composed(f"train.precision={name}", *quick), tmp_path / name)
        row = pd.read_csv(tmp_path / name / "result.csv").iloc[0]
        assert row["precision"] == name
        scores[name] = row["score"]
    assert scores["bfloat16"] == pytest.approx(scores["float32"], rel=0.1)
    assert scores["tf32"] == pytest.approx(scores["float32"], rel=0.1)
    assert scores["bfloat16"] != scores["float32"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("engine=cudagraph", "device=cpu"), "needs a CUDA device"),
        (("engine=xla",), r"pip install 'metarun\[xla\]'"),
        (("engine=eager", "engine.task_map=threads"), "runs recordings"),
        (("engine.task_map=threads", "replicas.count=2"), "one replica"),
        (("train.precision=bfloat16", "task=bandit"), "too coarse"),
        (("train.task_chunk=2", "train.meta_batch=3"), "must divide train.meta_batch=3"),
    ],
)
def test_engines_that_cannot_be_are_refused(overrides, words, monkeypatch):
    monkeypatch.setattr(xla, "installed", lambda: False)
    experiment = experiment_of(*overrides)
    with pytest.raises(UserError, match=words):
        Stepper(experiment, MetaStep(experiment))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_meta_gradient_reads_no_value_and_mixes_no_devices(name):
    """On torch's device without values, where both would raise: what a GPU needs that never waits for the host."""
    experiment = setting(name)
    model, family = experiment.model.to("meta"), experiment.family
    algorithm = build(experiment.config, "algo", model=model, spec=family.spec)
    theta = algorithm.init(torch.Generator())
    tasks = sampled(family, "train", 2, torch.Generator())
    there = tree_map(lambda leaf: leaf.to("meta"), tasks)
    found = meta_gradient(algorithm, tree_map(lambda leaf: leaf.to("meta"), theta), there, loss_of(family))
    assert {leaf.device.type for leaf in (*leaves(found.grads), found.loss, *found.scores.values())} == {"meta"}


def test_channels_last_changes_the_layout_alone():
    x, w = torch.randn(3, 5, 4, 6, 6), torch.randn(2, 4, 3, 3)
    assert torch.equal(channels_last(x[0]), x[0])
    assert channels_last(x[0]).is_contiguous(memory_format=torch.channels_last)
    convolved = torch.func.vmap(lambda images: torch.conv2d(channels_last(images), w))(x)
    torch.testing.assert_close(convolved, torch.stack([torch.conv2d(images, w) for images in x]))


gpu = pytest.mark.gpu


@gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("name", ["maml", "maml_images", "protonet", "rl2", "maml_navigation"])
def test_a_captured_step_gives_what_the_step_gives(name):
    experiment = setting(name, "device=cuda")
    meta_step = MetaStep(experiment)
    first = given(experiment, meta_step, 0)
    recording = Recording(meta_step.whole, first)
    second = given(experiment, meta_step, 1, meta_step.whole(first)["train_state"])
    expected = meta_step.whole(second)
    for source in [recording, *([recording.compiled(first)] if name == "maml" else [])]:
        captured = Captured(source, first)
        for _ in range(2):
            for leaf, other in zip(leaves(captured(second)), leaves(expected), strict=True):
                assert (leaf - other).norm() <= 5e-3 * other.norm() + 1e-6


@gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("name", ["maml", "protonet"])
def test_tasks_that_are_drawn_ahead_are_the_same(name):
    experiment = setting(name, "device=cuda")
    ahead, busy = Ahead("cuda"), torch.randn(4000, 4000, device="cuda")
    for step in range(5):
        draw = partial(training_tasks, experiment, [0], 4, step)
        for _ in range(20):
            busy = busy @ busy / busy.norm()
        for leaf, other in zip(leaves(ahead(draw)), leaves(draw()), strict=True):
            assert torch.equal(leaf, other)


def test_a_capture_that_fails_is_a_reason_and_not_an_error(monkeypatch):
    """Without a GPU the CUDA path is exercised up to the first call of CUDA."""

    def refuse(*arguments):
        raise RuntimeError("no stream here")

    monkeypatch.setattr(torch.cuda, "Stream", refuse)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the stream")
    current = []
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    values = {"x": torch.ones(2)}
    with pytest.raises(CannotRecord, match="no stream here"):
        Captured(Recording(lambda tree: {"y": tree["x"] * 2}, values), values)
    assert current == ["the stream"]
    elsewhere = torch.arange(2.0)
    with pytest.raises(CannotRecord, match="outside of the GPU"):
        Captured(Recording(lambda tree: {"y": tree["x"] * elsewhere}, values), values)


@pytest.mark.usefixtures("without_pictures")
def test_an_engine_that_is_asked_for_stands_in_the_row(tmp_path):
    quick = (
        "model.widths=[8]",
        "train.steps=6",
        "train.eval_every=6",
        "train.val_episodes=4",
        "eval.episodes=6",
        "replicas.count=2",
    )
    run(*composed("engine=replay", *quick), tmp_path)
    table = pd.read_csv(tmp_path / "result.csv")
    assert list(table["engine"]) == ["replay"] * 2
    assert (table["compile_seconds"] > 0).all()
    assert list(table["varied"]) == ["seed=0", "seed=1"]
    alone, names = composed("seed=1", *quick, "replicas.count=1")
    run(alone, names, tmp_path / "alone")
    single = pd.read_csv(tmp_path / "alone" / "result.csv").iloc[0]
    assert single["config_hash"] == table["config_hash"][1]
    assert single["score"] == pytest.approx(table["score"][1], rel=1e-4)
    assert SimpleNamespace(**single).episodes_hash == table["episodes_hash"][1]
