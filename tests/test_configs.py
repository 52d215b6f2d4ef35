"""Every configuration file composes, builds what it names and runs."""

from functools import cache, wraps
from importlib.resources import files

import pytest
from conftest import composed, experiment_of
from omegaconf import OmegaConf

from metarun.assemble import algorithm_names, aliases, assemble
from metarun.command.presets import sections
from metarun.config import register_schema
from metarun.errors import UserError
from metarun.run import run
from metarun.tasks import authors, completion, entities, generate, generate_adversarial, generation, questions
from metarun.tasks import text as sentences

CONF = files("metarun.conf")
QUICK = (
    *("train.steps=2", "train.meta_batch=2", "train.eval_every=1", "train.val_episodes=2"),
    *("eval.episodes=3", "eval.adapt_steps=2"),
)
FEW = ("task.queries=3", "task.train_queries=1")
WRITING = ("model.width=8", "model.buckets=16")
CONTROL = ("task.shots=2", "task.queries=2")
SERVE_ALL = ("maml", "fomaml", "mamlpp", "reptile", "metasgd", "anil", "boil", "scratch")
GRADIENT = {"generate_adversarial": "fomaml"}
"""Tasks that MAML cannot serve, and what adapts by gradients there."""
TWENTY = ("sinusoid",)
"""Tasks on which every algorithm that fits takes twenty meta-steps; on others two."""
TWICE = ("text", "mdp", "teachers")
"""Tasks on which every algorithm that fits is validated more than once."""
VARIANT = ("maml", "protonet", "rl2", "transfer")
FEW_ALGORITHMS = {
    **dict.fromkeys(("text_crosslingual", "halfcheetah_direction", "halfcheetah_velocity"), VARIANT),
    "teachers": (*VARIANT, "cnp", "metanas", "shared_model"),
    **dict.fromkeys(("authors", "generation"), ("adaptive", "maml", "protonet", "transfer")),
    "questions": ("maml", "metanas", "protonet", "reference", "shared_params", "transfer"),
    "completion": ("cnp", "maml", "protonet", "reference"),
    "generate": ("cnp", "maml", "reference", "transfer"),
    "generate_adversarial": ("cnp", "fomaml", "reference", "reptile"),
}
"""Tasks that not every algorithm is tried on: variants of others, and those that tests/contract tries with more."""
PICTURES = ("task.dataset=procedural", "task.image_size=16")
DRAWN = ("task.draws=1", "task.test_draws=1", "task.generated=2", "task.sampler_steps=1")
SMALL = {
    "sprites": (
        "task.sprites=shapes",
        "task.backgrounds=noise",
        "task.image_size=32",
        "task.ways=2",
        "task.shots=1",
        "task.queries=1",
    ),
    "completion": (*PICTURES, "task.shots=5", "task.queries=9", "task.train_shots=5", "task.train_queries=9"),
    "generate": (*PICTURES, "task.shots=2", "task.queries=2", *DRAWN),
    "generate_adversarial": (*PICTURES, "task.shots=2", "task.queries=2", "task.train_queries=2", "task.generated=2"),
    "omniglot": ("task.dataset=procedural", "task.image_size=16", *FEW),
    "text": ("task.dataset=toy", "task.buckets=64", *FEW),
    "text_crosslingual": ("task.dataset=toy", "task.buckets=64", *FEW),
    "questions": (
        *("task.dataset=toy", "task.shots=2", "task.queries=3", "task.question=6", "task.passage=24", "task.buckets=4"),
    ),
    "authors": ("task.dataset=toy", "task.shots=3", "task.train_shots=2", "task.length=8", *WRITING, *FEW),
    "generation": ("task.dataset=toy", "task.shots=3", "task.train_shots=2", "task.length=8", *WRITING, *FEW),
    "entities": (
        *("task.dataset=toy", "task.shots=2", "task.queries=2", "task.train_shots=3", "task.train_queries=1"),
        *("task.longest=10", "task.buckets=32"),
    ),
    "navigation": ("task.horizon=5", *CONTROL),
    "bandit": ("task.pulls=4", *CONTROL),
    "gymnasium": ("task.horizon=5", *CONTROL),
    "halfcheetah_direction": ("task.horizon=5", *CONTROL),
    "halfcheetah_velocity": ("task.horizon=5", *CONTROL),
    "mdp": ("task.states=3", "task.actions=2", "task.episodes=2", "task.horizon=3", *CONTROL),
}


def remembering(make):
    """``make``, which gives the same object for the same arguments."""
    made = {}

    @wraps(make)
    def remembered(**named):
        key = repr(sorted(named.items()))
        if key not in made:
            made[key] = make(**named)
        return made[key]

    return remembered


SLOW = {
    "text": sentences,
    "text_crosslingual": sentences,
    "Completion": completion,
    "Generate": generate,
    "GenerateAdversarially": generate_adversarial,
    "questions": questions,
    "entities": entities,
    "Authors": authors,
    "Generation": generation,
}
SHARED = {name: remembering(getattr(module, name)) for name, module in SLOW.items()}


@pytest.fixture(autouse=True)
def slow_families_are_shared(monkeypatch):
    """Words are counted and pictures measured once, not once for each of forty algorithms."""
    for name, make in SHARED.items():
        monkeypatch.setattr(SLOW[name], name, make)


def names(group):
    return sorted(p.name.removesuffix(".yaml") for p in (CONF / group).iterdir() if p.name.endswith(".yaml"))


OF_FILES = (
    *("images", "features", "grocery", "cells", "faces", "detection", "bccd"),
    *("table", "molecules", "heart", "parkinsons", "glucose"),
)
"""Tasks that need files, for which tests/tasks/test_images.py and test_table.py make small ones."""
LARGE = ("sprites",)
"""Tasks with large inputs, which contract tests run with every algorithm, and tests/tasks/test_detection.py as runs."""
WITHOUT_FILES = [task for task in names("task") if task not in (*OF_FILES, *LARGE)]


def narrow(model):
    """Sets few filters and a small width where a model has them."""
    for key, small in {"filters": 8, "width": 16}.items():
        if key in model:
            model[key] = small


def test_files_are_parsed_once_in_a_test_run(files_of_packages_are_parsed_once):
    """Or Hydra has moved what reads them, and a test run takes longer in silence."""
    composed("algo=maml", "task=sinusoid")
    assert any(path.startswith("algo/maml") for _, _, path in files_of_packages_are_parsed_once)


ALIKE = (
    *("teachers", "completion", "text", "text_crosslingual", "mdp", "gymnasium"),
    *("halfcheetah_velocity", "halfcheetah_direction"),
)
"""Tasks with the metrics and the pictures of another."""


PAIRS = [
    (algo, task) for task in WITHOUT_FILES for algo in algorithm_names() if algo in FEW_ALGORITHMS.get(task, (algo,))
]


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize(("algo", "task"), PAIRS)
def test_every_pair_runs_or_is_refused_with_what_fits(algo, task, tmp_path):
    steps = 20 if task in TWENTY else 2
    more = (f"train.steps={steps}", f"train.eval_every={1 if task in TWICE else steps}")
    config, chosen = composed(f"algo={algo}", f"task={task}", *QUICK, *SMALL.get(task, ()), *more)
    narrow(config.model)
    try:
        run(config, chosen, tmp_path)
    except UserError as refused:
        said = str(refused)
        assert algo not in SERVE_ALL, said
        reasons = (
            "algorithms that fit it: ",
            "is a policy for ",
            "is a policy, and",
            "needs a model with",
            "is not known for",
            "learns from examples",
            "needs numbers",
            "needs targets that are numbers or",
        )
        assert any(reason in said for reason in reasons), said
        assert "fit it:" not in said or algo not in said.rpartition("fit it:")[2]
        assert algo not in sections(task, (CONF,))
    else:
        assert (tmp_path / "result.csv").exists()


@pytest.mark.parametrize(
    ("algo", "task"),
    [
        *((GRADIENT.get(task, "maml"), task) for task in WITHOUT_FILES if task not in ALIKE),
        *(("cnp", "sinusoid"), ("shared_model", "omniglot"), ("rl2", "bandit")),
    ],
)
def test_runs_leave_pictures(algo, task, tmp_path):
    """For the metrics of every kind of task, and for algorithms whose adaptation is one step, none, or episodes."""
    run(*composed(f"algo={algo}", f"task={task}", *QUICK, *SMALL.get(task, ())), tmp_path)
    for name in ("training", "adaptation"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


OF_MODELS = {
    "coordinate_mlp": ("completion", "omniglot"),
    "unet_small": ("generate", "omniglot"),
    "gan_small": ("generate_adversarial", "omniglot"),
    "resnet_fpn_small": ("sprites", "omniglot"),
}
"""Models that want neither characters nor sentences nor an environment, and what they are tried on."""


NARROW = {"resnet12": ("model.widths=[8,8,16,16]",), "resnet_fpn_small": ("model.widths=[8,8,8]",)}
"""Models of many channels; a model is built as its file says before it runs with few."""


@cache
def with_usual_model(task):
    own = [key for key in SMALL[task] if key not in WRITING]
    return composed(f"algo={GRADIENT.get(task, 'maml')}", f"task={task}", *QUICK, *own)


def is_refused(model, task):
    """Whether an experiment on a task cannot be built with another model than the usual one, which is said in words."""
    config, chosen = with_usual_model(task)
    config = config.copy()
    OmegaConf.set_struct(config, False)
    config.model = model
    try:
        assemble(config, chosen)
    except UserError as refused:
        assert "choose " in str(refused)  # noqa: PT017
        return True
    return False


# tests/test_embedding.py tries the two that need a network from elsewhere.
@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("model", [name for name in names("model") if name not in ("adapter", "pretrained")])
def test_every_model_runs_where_it_fits(model, tmp_path):
    content = composed(f"model={model}")[0].model
    tasks = OF_MODELS.get(model, ("omniglot", "text", "entities", "questions", "bandit", "authors"))
    (task,) = [task for task in tasks if not is_refused(content, task)]
    own = [key for key in SMALL[task] if key not in WRITING or model.endswith("decoder")]
    chosen = (f"algo={GRADIENT.get(task, 'maml')}", f"task={task}", f"model={model}", *NARROW.get(model, ()))
    config, named = composed(*chosen, *QUICK, *own)
    narrow(config.model)
    run(config, named, tmp_path)


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize(("downsample", "norm"), [("stride", "group"), ("max_pool", "batch"), ("max_pool", "none")])
def test_conv4_variants_run(downsample, norm, tmp_path):
    overrides = ("task=omniglot", "model.filters=4", f"model.downsample={downsample}", f"model.norm={norm}")
    run(*composed(*overrides, *QUICK, *SMALL["omniglot"]), tmp_path)


@pytest.mark.parametrize("experiment", names("experiment"))
def test_every_experiment_builds(experiment):
    _, chosen = composed(f"experiment={experiment}")
    if chosen["task"] == "omniglot":
        _, chosen = composed(f"experiment={experiment}", "task.dataset=procedural", "task.split=auto")
    assert experiment.startswith(chosen["algo"])
    header = (CONF / "experiment" / f"{experiment}.yaml").read_text()
    assert "Expected" in header


def test_an_experiment_wins_over_the_preset_and_the_command_line_over_both():
    config, chosen = composed("experiment=maml_sinusoid", "train.steps=7")
    assert (chosen["algo"], chosen["task"]) == ("maml", "sinusoid")
    assert config.task.shots == 5
    assert config.train.steps == 7
    assert experiment_of("algo=protonet", "task=omniglot", "task.dataset=procedural").config.task.train_ways == 60


def flat(config, prefix=""):
    """Dotted key → value."""
    found = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def plain(config):
    return OmegaConf.to_container(config, resolve=True, enum_to_str=True)


PRESETS = [(task, section) for task in names("preset") for section in sections(task, (CONF,))]
BORROWED = ("text_crosslingual", "features", "grocery", "cells", "faces")
TUNED = [(t, s) for t, s in PRESETS if t not in BORROWED and "/" not in s and s not in aliases()]


def test_every_preset_names_what_there_is():
    for task, section in PRESETS:
        algo, _, model = section.partition("/")
        assert task in names("task")
        assert algo in names("algo")
        assert model in ["", *names("model")]


@cache
def without_presets(algo, task):
    return flat(plain(composed(f"algo={algo}", f"task={task}", "~preset", "~preset@_global_")[0]))


def inherited(algo, task):
    """What a pair has without its preset: what the task sets, and over it what the algorithm sets.

    Taken apart, since composing every pair once more takes half a minute.
    """
    usual, by_algo = (without_presets(name, "sinusoid") for name in ("maml", algo))
    by_task = {key: value for key, value in without_presets("maml", task).items() if not key.startswith("algo.")}
    of_algo = {k: v for k, v in by_algo.items() if k.startswith("algo.") or k not in usual or usual[k] != v}
    return {**by_task, **of_algo}


def test_the_parts_of_a_pair_are_what_it_is_composed_of():
    for algo, task in (("mamlpp", "omniglot"), ("anp", "sinusoid"), ("maml", "bandit"), ("reptile", "text")):
        assert inherited(algo, task) == without_presets(algo, task)


@pytest.mark.parametrize(("task", "algo"), TUNED)
def test_a_preset_states_only_what_it_changes(task, algo):
    before, own = inherited(algo, task), flat(plain(sections(task, (CONF,))[algo]))
    assert own
    assert not [key for key, value in own.items() if key in before and before[key] == value]


def test_a_variant_of_a_task_has_its_presets():
    for algo in ("protonet", "maml"):
        variant, config = (plain(composed(f"algo={algo}", f"task={t}")[0]) for t in ("text_crosslingual", "text"))
        assert all(variant[group] == config[group] for group in ("algo", "train", "eval"))
        assert (config["task"]["train_ways"], variant["task"]["train_ways"]) == (
            20 if algo == "protonet" else None,
            None,
        )


def test_what_a_preset_sets_of_a_model_is_set_of_that_model_alone():
    pairs = [(task, *section.split("/")) for task, section in PRESETS if "/" in section]
    assert pairs
    # Of a task whose sections are those of another, one shows that they are found.
    first = {task: algo for task, algo, _ in reversed(pairs)}
    for task, algo, model in pairs:
        if task in BORROWED and algo != first[task]:
            continue
        own = plain(sections(task, (CONF,))[f"{algo}/{model}"])
        built, other = (plain(composed(f"algo={algo}", f"task={task}", f"model={m}")[0]) for m in (model, "mlp"))
        for group, keys in own.items():
            assert {key: built[group][key] for key in keys} == keys
        assert any({key: other[group].get(key) for key in keys} != keys for group, keys in own.items())


@pytest.mark.parametrize("task", ["sinusoid", "omniglot", "text_crosslingual"])
@pytest.mark.parametrize("alias", sorted(aliases()))
def test_an_alias_is_the_algorithm_with_its_presets(alias, task):
    original = aliases()[alias]
    first, second = (composed(f"algo={name}", f"task={task}")[0] for name in (alias, original))
    if (alias, task) == ("cavia", "omniglot"):  # where algo=adaptive is FiLM
        assert (first.algo.modulation, second.algo.modulation) == ("context", "film")
    else:
        assert first == second
    assert f"algo={original}" in (CONF / "algo" / f"{alias}.yaml").read_text().splitlines()[0]


WHAT_A_NAME_SAYS = {"cavia": "modulation", "fomaml": "first_order", "boil": "adapts", "np": "deterministic"}
"""The key that tells an algorithm from another one of the same code."""


def test_no_preset_takes_from_an_algorithm_what_its_name_says():
    """And an alias has all presets of its algorithm, except where these turn `adaptive` into FiLM."""
    table = {(task, section): plain(sections(task, (CONF,))[section]) for task, section in PRESETS}
    assert not [pair for pair, own in table.items() if WHAT_A_NAME_SAYS.get(pair[1]) in own.get("algo", {})]
    pairs = {(task, section) for task, section in PRESETS if section in aliases() or section in aliases().values()}
    for task in {task for task, _ in pairs}:
        for alias, original in aliases().items():
            own, other = table.get((task, alias)), table.get((task, original))
            film = original == "adaptive" and other is not None and other.get("algo", {}).get("modulation") == "film"
            assert film or own == other, (task, alias)


@pytest.fixture
def own_folder(tmp_path):
    """A function that writes files into a folder of the user and composes with it as ``--config-dir`` does."""

    def compose_with(files, *overrides):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        register_schema(tmp_path)
        return composed(f"hydra.searchpath=[file://{tmp_path}]", *overrides)[0]

    yield compose_with
    register_schema()


MINE = "# mine\n_target_: metarun.algos.agnostic.maml.maml\ninner_lr: 0.02\n"
LINES = "# mine\n_target_: metarun.tasks.sinusoid.Sinusoid\nshots: 7\n"


def test_a_strangers_algorithm_has_the_budget_of_the_task(own_folder):
    config = own_folder({"algo/mine.yaml": MINE}, "algo=mine", "task=omniglot")
    assert config.train == composed("algo=anp", "task=omniglot")[0].train
    assert (config.train.steps, config.train.meta_batch, config.algo.inner_lr) == (3000, 8, 0.02)


def test_a_strangers_task_has_the_defaults_of_all_or_a_budget_that_it_states(own_folder):
    defaults = OmegaConf.load(CONF / "config.yaml")
    files = {"task/lines.yaml": LINES, "task/quick.yaml": "# @package _global_\n# q\ntask: {}\ntrain:\n  steps: 9\n"}
    plain = own_folder(files, "task=lines")
    assert (plain.train.steps, plain.eval.adapt_steps) == (defaults.train.steps, defaults.eval.adapt_steps)
    assert plain.task.shots == 7
    assert own_folder(files, "task=quick").train.steps == 9


def test_what_is_set_later_wins(own_folder):
    """Defaults, task, algorithm, preset, experiment, command line."""
    preset = "mamlpp:\n  algo: {inner_steps: 4}\n  train: {steps: 31, lr: 0.5, clip: 3.0}\n"
    files = {
        "task/lines.yaml": "# @package _global_\n# l\ndefaults: [sinusoid, _self_]\n"
        "train: {steps: 30, meta_batch: 2, eval_every: 5}\neval: {adapt_steps: 9}\n",
        "preset/lines.yaml": preset,
        "experiment/mine.yaml": "# @package _global_\ntrain: {lr: 0.25, clip: 2.0}\n",
    }
    config = own_folder(files, "algo=mamlpp", "task=lines", "experiment=mine", "train.clip=1.5")
    assert config.train.val_episodes == OmegaConf.load(CONF / "config.yaml").train.val_episodes
    assert config.train.schedule.name == "cosine"  # of the task that it extends
    assert (config.train.meta_batch, config.train.eval_every) == (2, 5)
    assert (config.algo.inner_steps, config.eval.adapt_steps) == (4, 4)  # the algorithm: as many as trained
    assert (config.train.steps, config.train.lr, config.train.clip) == (31, 0.25, 1.5)


def test_strangers_presets(own_folder):
    files = {
        "algo/mine.yaml": MINE,
        "task/lines.yaml": LINES,
        "preset/omniglot/mine.yaml": "# @package _global_\ntrain:\n  steps: 11\n",
        "preset/omniglot/protonet.yaml": "# @package _global_\ntrain:\n  steps: 12\n",
        "preset/sinusoid.yaml": "mine:\n  train:\n    steps: 13\nmine/mlp:\n  model:\n    widths: [5]\n",
        "preset/lines.yaml": "presets_of: sinusoid\ntrain:\n  clip: 7.0\n",
    }
    assert own_folder(files, "algo=mine", "task=omniglot").train.steps == 11
    replaced = own_folder(files, "algo=protonet", "task=omniglot")
    assert (replaced.train.steps, replaced.train.meta_batch) == (12, 8)
    mine = own_folder(files, "algo=mine", "task=sinusoid")
    assert (mine.train.steps, mine.model.widths) == (13, [5])
    assert own_folder(files, "algo=mine", "task=lines").train.steps == 13
    borrowed = own_folder(files, "algo=cnp", "task=lines")
    assert (borrowed.train.steps, borrowed.train.clip) == (10000, 7.0)
    assert own_folder(files, "algo=mine", "task=text", "preset=sinusoid/mine").train.steps == 13


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "lines.yaml is not YAML"),
        ("- a", "must hold a section for each algorithm"),
        ("maml: 3", "must hold sections with keys such as algo and train, and maml is 3"),
        ("presets_of: nothing", "presets_of must name a task with sections, and nothing has none"),
        ("presets_of: lines", "presets_of must name a task with sections, and lines has none"),
    ],
)
def test_a_file_of_presets_that_cannot_be_understood_is_named(own_folder, text, words):
    with pytest.raises(UserError, match=words):
        own_folder({"task/lines.yaml": LINES, "preset/lines.yaml": text}, "task=lines")
