"""A learner reads what its run's reader read: pictures, sentences, vectors and tables, when the run's data are gone."""

import numpy as np
import pandas as pd
import pytest
import torch
from commands import QUICK
from PIL import Image
from test_after_commands import command

import metarun
from metarun.after import later_test, predict
from metarun.after.later_test import check_units
from metarun.data.columns import Columns, Number
from metarun.data.recipe import History, Recipe, TableRows
from metarun.errors import UserError
from metarun.tasks.authors import Authors
from metarun.tasks.completion import Completion
from metarun.tasks.entities import entities
from metarun.tasks.features import Features
from metarun.tasks.generation import Generation
from metarun.tasks.omniglot import Omniglot
from metarun.tasks.questions import questions
from metarun.tasks.sprites import SpriteDetection
from metarun.tasks.table import table
from metarun.tasks.text import text

pytestmark = pytest.mark.usefixtures("without_pictures")
SMALL = ("task.ways=3", "task.shots=2", *QUICK)
HUES = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (180, 180, 20)]


def noisy(folder, colour, count, seed):
    folder.mkdir(parents=True)
    for number in range(count):
        noise = np.random.default_rng((seed, number)).integers(-30, 31, (20, 24, 3))
        Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")


def test_a_learner_of_pictures_takes_folders_paths_and_arrays(tmp_path, monkeypatch):
    monkeypatch.setenv("METARUN_CACHE_DIR", str(tmp_path / "cache"))
    shades = np.random.default_rng(0).integers(0, 256, (9, 3))
    for number, shade in enumerate(shades):
        noisy(tmp_path / "data" / f"class{number}", shade, 6, number)
    arguments = (
        "algo=protonet",
        "task=images",
        f"task.path={tmp_path / 'data'}",
        "task.image_size=16",
        "model.filters=4",
    )
    run = metarun.train(*arguments, *SMALL, "task.train_ways=3", directory=tmp_path / "run")
    # The preset's 15 queries gave way to what a class of six pictures has, and they do again.
    code, said = command(later_test, run.directory, "task.shots=1", "eval.episodes=4", cwd=tmp_path)
    assert code == 0, said
    (tmp_path / "data").rename(tmp_path / "gone")
    for part, count in (("support", 2), ("query", 5)):
        for number, hue in enumerate(HUES):
            noisy(tmp_path / part / f"hue{number}", hue, count, 10 * number + count)
    learner = metarun.load(run.directory)
    paths, labels = [], []
    for number in range(len(HUES)):
        found = sorted((tmp_path / "support" / f"hue{number}").iterdir())
        paths += found
        labels += [f"hue{number}"] * len(found)
    adapted = learner.adapt(paths, labels)
    query = sorted((tmp_path / "query").rglob("*.png"))
    answers = adapted.predict(query)
    share = np.mean([answer == path.parent.name for answer, path in zip(answers, query, strict=True)])
    assert share > 0.5  # by chance 0.25
    arrays = [np.asarray(Image.open(path)) for path in query]
    assert (adapted.outputs(arrays) == adapted.outputs(query)).all()
    code, said = command(
        predict, run.directory, "--support", tmp_path / "support", "--query", tmp_path / "query", cwd=tmp_path
    )
    assert code == 0, said
    assert "20 predictions from 8 examples" in said
    assert f"accuracy on their own labels {100 * share:.2f} %" in said
    table = pd.read_csv(tmp_path / "predictions.csv")
    assert table["prediction"].tolist() == answers.tolist()


def test_a_learner_of_a_table_answers_in_the_unit_of_the_column(tmp_path):
    rng, frames = np.random.default_rng(0), []
    for patient in range(12):
        dose = rng.normal(50, 10, 12)
        frames.append(
            pd.DataFrame(
                {"patient": f"p{patient}", "dose": dose, "ward": "north", "pressure": 1000 + 3 * dose + 40 * patient}
            )
        )
    rows = pd.concat(frames)
    rows.to_csv(tmp_path / "visits.csv", index=False)
    run = metarun.train(
        *("algo=shared_params", "task=table", f"task.path={tmp_path / 'visits.csv'}", "task.by=patient"),
        *("task.target=pressure", "task.shots=6", "task.queries=6", *QUICK, "train.steps=60", "train.eval_every=60"),
        directory=tmp_path / "run",
    )
    (tmp_path / "visits.csv").unlink()
    dose = rng.normal(50, 10, 30)
    new = pd.DataFrame({"dose": dose, "ward": "north", "pressure": 1000 + 3 * dose + 250})
    adapted = metarun.load(run.directory).adapt(new[:10], new["pressure"][:10])
    found, truth = adapted.predict(new[10:]), new["pressure"][10:].to_numpy()
    assert np.abs(found - truth).mean() < 0.5 * np.abs(truth - new["pressure"][:10].mean()).mean()
    new[:10].to_csv(tmp_path / "support.csv", index=False)
    new[10:].drop(columns="pressure").to_csv(tmp_path / "query.csv", index=False)
    code, said = command(
        predict, run.directory, "--support", tmp_path / "support.csv", "--query", tmp_path / "query.csv", cwd=tmp_path
    )
    assert code == 0, said
    np.testing.assert_allclose(pd.read_csv(tmp_path / "predictions.csv")["prediction"], found, rtol=1e-5)
    new[:10].drop(columns="dose").to_csv(tmp_path / "support.csv", index=False)
    code, said = command(
        predict, run.directory, "--support", tmp_path / "support.csv", "--query", tmp_path / "query.csv", cwd=tmp_path
    )
    assert code == 1
    assert "'dose'" in said


def test_classes_of_a_table_keep_their_meaning(tmp_path):
    rng = np.random.default_rng(0)
    rows = pd.DataFrame({"clinic": np.repeat(np.arange(10), 20), "age": rng.normal(60, 9, 200)})
    rows["ill"] = (rows["age"] + rng.normal(0, 3, 200) > 60).astype(int)
    rows.to_csv(tmp_path / "clinics.csv", index=False)
    run = metarun.train(
        *("algo=protonet", "task=table", f"task.path={tmp_path / 'clinics.csv'}", "task.by=clinic", "task.target=ill"),
        *("task.shots=2", "task.queries=4", *QUICK),
        directory=tmp_path / "run",
    )
    learner = metarun.load(run.directory)
    shown = pd.DataFrame({"age": [80.0, 40.0]})
    adapted = learner.adapt(shown, [1, 0])
    asked = pd.DataFrame({"age": [79.0, 41.0]})
    for one, zero in ((1, 0), (1.0, 0.0), (True, False), ("1", "0")):
        found = learner.adapt(shown, [one, zero])
        for values, expected in ((found.classes_, [zero, one]), (found.predict(asked), [one, zero])):
            assert values.tolist() == expected
            assert {type(value) for value in values.tolist()} == {type(one)}
    same = learner.adapt(shown, [True, False]).outputs(shown)
    torch.testing.assert_close(same, adapted.outputs(shown))
    with pytest.raises(ValueError, match="the classes are 0, 1, and y holds 2"):
        learner.adapt(shown, [1, 2])
    assert adapted.task.compared(adapted.predict(shown), [1, 0]) == "accuracy on their own labels 100.00 %"


def test_rows_of_a_series_are_answered_in_the_order_in_which_they_are_given():
    history = History("who", "day", "level", 2, 1, None)
    columns = Columns([Number(name, 0.0, 1.0, False) for name in history.features], [])
    rows = TableRows(Recipe(columns, history.target, history=history))
    days = pd.DataFrame({"who": list("baab"), "day": [2, 10, 9, 1], "level": [0.1, 0.2, 0.3, 0.4]}, index=[7, 5, 5, 0])
    for kind in (int, str):
        torch.testing.assert_close(rows.inputs(days.astype({"day": kind})), torch.tensor([[0.1, 0.4], [0.2, 0.3]]))
    with pytest.raises(metarun.UserError, match="Row 2 of the rows: column 'day', the time"):
        rows.inputs(days.assign(day=[2, "soon", 9, 1]))


def test_the_rows_of_a_series_that_are_learned_from_have_a_target(tmp_path):
    history = History("who", "day", "level", 2, 1, None)
    recipe = Recipe(Columns([Number("level", 0.0, 1.0, False)], []), history.target, history=history)
    days = pd.DataFrame({"who": list("aaabbb"), "day": [1, 2, 3] * 2, "level": np.arange(6.0)})
    days.to_csv(tmp_path / "days.csv", index=False)
    read = TableRows(recipe).read(tmp_path / "days.csv")
    assert list(read.names) == ["2", "3", "5", "6"]
    shown = predict.with_targets(read)
    assert (shown.y, shown.names, shown.x["level"].tolist()) == ([2.0, 5.0], ["2", "5"], [1.0, 4.0])


def test_a_series_without_its_columns_is_refused():
    history = History("who", "day", "level", 2, 1, None)
    with pytest.raises(metarun.UserError, match="lack the column 'day'"):
        history.of(pd.DataFrame({"who": ["a"], "level": [1.0]}))


def test_a_later_test_does_not_take_what_the_run_has_seen(tmp_path):
    rng, label = np.random.default_rng(0), np.repeat(np.arange(20), 6)
    np.savez(tmp_path / "vectors.npz", x=rng.normal(size=(120, 2)), y=label)
    rows = pd.DataFrame({"who": label, "dose": rng.normal(size=120), "level": rng.normal(size=120)})
    rows.to_csv(tmp_path / "rows.csv", index=False)
    pd.DataFrame({"text": [f"word {i}" for i in range(120)], "label": label}).to_csv(
        tmp_path / "texts.csv", index=False
    )

    def of_vectors(seed, place="vectors.npz"):
        return Features(str(tmp_path / place), ways=2, queries=1, split_seed=seed)

    def of_rows(seed):
        return table(str(tmp_path / "rows.csv"), by="who", target="level", shots=2, split_seed=seed)

    def of_articles(seed):
        return questions(dataset="toy", shots=1, queries=1, split_seed=seed)

    def of_sprites(seed):
        return SpriteDetection(sprites="shapes", backgrounds="noise", image_size=32, split_seed=seed)

    for of in (of_vectors, of_rows, of_articles, of_sprites):
        check_units(of(0), of(0))
        check_units(None, of(1))
        with pytest.raises(UserError, match="The run was trained on"):
            check_units(of(0), of(1))
    # Other data may have classes of the same names.
    (tmp_path / "others.npz").write_bytes((tmp_path / "vectors.npz").read_bytes())
    check_units(of_vectors(0), of_vectors(1, "others.npz"))
    for family in (
        text(path=str(tmp_path / "texts.csv"), ways=2, queries=1),
        Omniglot(dataset="procedural"),
        Completion("procedural", image_size=16),
        entities(dataset="toy", shots=2, queries=2),
        Authors(dataset="toy", shots=2, queries=2),
        Generation(dataset="toy", shots=2, queries=2, merges=0),
        SpriteDetection(sprites="shapes", backgrounds="noise", image_size=32),
    ):
        assert not family.units["train"] & family.units["test"]
        assert all(family.units.values())


def test_a_learner_of_vectors_reads_arrays_and_tables(tmp_path):
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 5, (12, 4))
    y = np.repeat(np.arange(12), 8)
    np.savez(tmp_path / "vectors.npz", x=100 + centres[y] + rng.normal(0, 0.1, (96, 4)), y=y)
    arguments = ("algo=protonet", "task=features", f"task.path={tmp_path / 'vectors.npz'}")
    run = metarun.train(*arguments, *SMALL, "task.train_ways=3", directory=tmp_path / "run")
    (tmp_path / "vectors.npz").unlink()
    learner = metarun.load(run.directory)
    new = 100 + rng.normal(0, 5, (3, 4))
    assert learner.adapt(new, list("abc")).predict(new + 0.01).tolist() == list("abc")
    with pytest.raises(ValueError, match=r"\[examples, 4\], not \[3, 3\]"):
        learner.adapt(new[:, :3], list("abc"))
