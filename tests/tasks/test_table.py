"""Tasks from tables and fingerprints: what is drawn, how it is encoded, how it is split, and what is refused."""

import json
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import composed, experiment_of
from scenarios import generator

from metarun.checks.family import check_tasks
from metarun.data import tables
from metarun.data.columns import fitted
from metarun.data.converters import read_sentences, table_of
from metarun.data.fingerprints import read_molecules
from metarun.data.portable import plain, rebuilt
from metarun.data.recipe import History
from metarun.data.tables import Source
from metarun.errors import UserError
from metarun.run import run
from metarun.targets.labels import Labels
from metarun.targets.real import Measured
from metarun.tasks.cells import Cells, Draws, subsets
from metarun.tasks.few_shot import Range
from metarun.tasks.molecules import molecules
from metarun.tasks.table import held_out, table

PATIENTS, VISITS = 12, 14


def visits() -> pd.DataFrame:
    """Patients with numbers, a category, missing cells and a number to predict, as many visits as their number + 8."""
    rng = np.random.default_rng(0)
    frames = []
    for patient in range(PATIENTS):
        n = 8 + patient
        frames.append(
            pd.DataFrame(
                {
                    "patient": f"p{patient:02d}",
                    "day": rng.permutation(n) * 1.5,
                    "dose": np.where(rng.random(n) < 0.2, np.nan, rng.normal(5 + patient, 2, n)),
                    "ward": rng.choice(["north", "south", None], n),
                    "kind": rng.integers(1, 4, n),
                    "constant": 3,
                    "site": "ab"[patient % 2],
                    "level": rng.normal(100, 10, n),
                    "ill": rng.integers(0, 2, n),
                    "stage": rng.choice(["one", "two", "three"], n),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    place = tmp_path_factory.mktemp("table") / "visits.csv"
    visits().to_csv(place, index=False)
    return str(place)


NOT_FEATURES = ["ill", "stage", "level"]


def family(path, target="level", **keys):
    given = {"by": "patient", "shots": 3, "queries": None, "drop": [c for c in NOT_FEATURES if c != target], **keys}
    return table(path, target=target, **given)


def rows_of(data, task):
    """The rows of one task that are not padding, as tuples."""
    real = data["weight"][task] > 0 if "weight" in data else torch.ones(data["x"].shape[1], dtype=torch.bool)
    return {tuple(x.tolist() + y.tolist()) for x, y in zip(data["x"][task][real], data["y"][task][real], strict=True)}


def days_of(found):
    """A function from the feature of the day to the day itself."""
    (day,) = found.recipe.columns.numbers
    return lambda value: round(2 * (value * day.std + day.mean)) / 2


@pytest.mark.parametrize("target", ["level", "ill", "stage"])
def test_support_and_queries_are_different_rows_of_one_task_and_together_all_of_it(path, target):
    found, whole = family(path, target, shots=2, smallest=3), visits()
    tasks = found.sample("test", 2, generator())
    check_tasks(tasks, found.spec, "test", 2, "cpu")
    recipe, test = found.recipe, found.draws["test"]
    names = sorted(whole.patient.unique())
    order = test.draw_tasks(2, generator())
    for i, index in enumerate(order.tolist()):
        own = whole[whole.patient == names[index]]
        if target != "level":
            own = own.groupby(target).filter(lambda group: len(group) >= 3)
        every = {tuple(x.tolist() + y.tolist()) for x, y in zip(recipe.inputs(own), recipe.targets(own), strict=True)}
        support, query = rows_of(tasks.support, i), rows_of(tasks.query, i)
        assert not support & query
        assert support | query == every
        counts = tasks.support["y"][i].sum(0) if target != "level" else torch.tensor([len(support)])
        assert set(counts.tolist()) <= {0.0, 2.0, 3.0}


def test_a_class_that_a_task_lacks_is_named_in_ways(path):
    found = family(path, "stage", shots=4, smallest=5)
    tasks = found.sample("train", 20, generator())
    check_tasks(tasks, found.spec, "train", 20, "cpu")
    has = tasks.support["y"].sum(1) > 0
    assert not has.all()
    assert torch.equal(tasks.support["ways"][:, 0] > 0, has)
    assert not tasks.query["y"][~has[:, None].expand_as(tasks.query["y"])].any()


@pytest.mark.parametrize("size", [7, 3000])
def test_subsets_are_uniform_and_without_repetition(size):
    """Also where a pool is so large that rows are drawn one after the other."""
    sizes = torch.full((400,), size)
    sizes[0] = 2
    drawn = subsets(sizes, 5, generator())
    assert set(drawn[0, :2].tolist()) == {0, 1}
    assert all(len(set(row.tolist())) == 5 for row in drawn[1:])
    assert drawn.min() >= 0
    assert drawn.max() < size
    for column in (0, 4):  # each place of the order sees all numbers alike: mean and spread of a uniform one
        values = drawn[1:, column].double()
        assert abs(values.mean() - (size - 1) / 2) < 4 * size / (12 * 399) ** 0.5
        assert abs(values.std() - size / 12**0.5) < 0.1 * size


def test_ordered_support_comes_first_in_time_and_training_begins_anywhere(path):
    found, whole = family(path, order="day", features=["day"], queries=4), visits()
    names = sorted(whole.patient.unique())
    day_of = days_of(found)
    begins = set()
    for split in ("test", "train"):
        tasks = found.sample(split, 30, generator(3))
        order = found.draws[split].draw_tasks(30, generator(3))
        for i, index in enumerate(order.tolist()):
            days = sorted(whole[whole.patient == names[index]].day)
            support = sorted(day_of(row[0]) for row in rows_of(tasks.support, i))
            start = days.index(support[0])
            assert support == days[start : start + 3]
            assert min(day_of(row[0]) for row in rows_of(tasks.query, i)) > support[-1]
            begins.add((split, start))
    assert {start for split, start in begins if split == "test"} == {0}
    assert len(begins) > 4


def test_ordered_support_of_classes_comes_before_all_queries(path):
    found = family(path, "ill", order="day", features=["day"], shots=1, smallest=2)
    day_of = days_of(found)
    for split in ("train", "test"):
        tasks = found.sample(split, 20, generator())
        for i in range(20):
            days = [{day_of(row[0]) for row in rows_of(part, i)} for part in (tasks.support, tasks.query)]
            assert max(days[0]) < min(days[1])
            assert len(days[0]) == 2


def test_features_are_standardised_and_one_hot_by_statistics_of_training_tasks_alone(path, tmp_path):
    found, whole = family(path, drop=["ill", "stage", "site"], categorical=["kind"]), visits()
    recipe = found.recipe
    training = [sorted(whole.patient.unique())[i] for i in found.draws["train"].tasks.tolist()]
    train = whole[whole.patient.isin(training)]
    x = dict(zip(recipe.columns.names, recipe.inputs(whole).double().T, strict=True))
    dose = (whole.dose - train.dose.mean()) / train.dose.std(ddof=0)
    np.testing.assert_allclose(x["dose"], dose.fillna(0), atol=1e-5)
    np.testing.assert_array_equal(x["dose missing"], whole.dose.isna())
    np.testing.assert_array_equal(x["ward=north"], whole.ward == "north")
    np.testing.assert_array_equal(x["kind=2"], whole.kind == 2)
    assert set(x) == {"day", "dose", "dose missing", "ward=north", "ward=south", "kind=1", "kind=2", "kind=3"}
    changed = whole.copy()
    changed.loc[~changed.patient.isin(training), ["dose", "ward"]] = [1e6, "elsewhere"]
    changed.to_csv(tmp_path / "changed.csv", index=False)
    again = family(str(tmp_path / "changed.csv"), drop=["ill", "stage", "site"], categorical=["kind"])
    assert again.recipe == recipe
    assert recipe.inputs(changed).isfinite().all()


def test_scores_are_in_the_unit_of_the_target(path):
    found = family(path)
    query = {name: leaf[0] for name, leaf in found.sample("test", 1, generator()).query.items()}
    assert isinstance(found.target, Measured)
    level = torch.from_numpy(found.converter.answers(query["y"]))
    known = visits().level
    assert all((known - value).abs().min() < 1e-3 for value in level.tolist())
    guess = torch.zeros_like(query["y"])  # the mean of training rows
    expected = (level - found.target.shift).square().mean()
    torch.testing.assert_close(found.target.scores(guess, query)["mse"], expected, rtol=1e-4, atol=1e-4)


def test_a_threshold_makes_two_classes_and_names_keep_their_order(path):
    found = family(path, "level", threshold=100, shots=1)
    assert isinstance(found.target, Labels)
    assert found.target.names == ("up to 100", "above 100")
    assert family(path, "kind", kind="classes", shots=1, smallest=2).target.names == ("1", "2", "3")
    assert family(path, "ill", shots=1).spec.metrics[0].name == "auroc"


def test_splits_by_column_by_file_and_by_group(path, tmp_path):
    whole, names = visits(), sorted(visits().patient.unique())
    fold = {name: ("train", "valid", "test")[i % 3] for i, name in enumerate(names)}
    whole.assign(fold=whole.patient.map(fold)).to_csv(tmp_path / "folds.csv", index=False)
    pd.DataFrame(fold.items(), columns=["patient", "split"]).to_csv(tmp_path / "split.csv", index=False)
    for keys in (
        {"path": str(tmp_path / "folds.csv"), "split": "fold"},
        {"path": path, "split_file": str(tmp_path / "split.csv")},
    ):
        found = family(**keys)
        assert "fold" not in str(found.recipe.columns.names)
        assert [names[i] for i in found.draws["val"].tasks] == names[1::3]
        assert [names[i] for i in found.draws["test"].tasks] == names[2::3]
    for part, own in whole.groupby(whole.patient.map(fold)):
        (tmp_path / "parts").mkdir(exist_ok=True)
        own.to_csv(tmp_path / "parts" / f"{part}.csv", index=False)
    found = family(str(tmp_path / "parts"), split="file")
    assert [names[i] for i in found.draws["test"].tasks] == names[2::3]
    assert "file" not in str(found.recipe.columns.names)
    found = family(path, leave_out="b", leave_out_column="site")
    assert [names[i] for i in found.draws["test"].tasks] == names[1::2]
    others = {*found.draws["train"].tasks.tolist(), *found.draws["val"].tasks.tolist()}
    assert [names[i] for i in sorted(others)] == names[::2]
    random = [set(family(path).draws[part].tasks.tolist()) for part in ("train", "val", "test")]
    assert set.union(*random) == set(range(PATIENTS))
    assert sum(map(len, random)) == PATIENTS


def test_copies_of_rows_are_said(path, tmp_path, caplog):
    family(path)
    assert "copies" not in caplog.text
    pd.concat([visits(), visits()[:3]]).to_csv(tmp_path / "visits.csv", index=False)
    family(str(tmp_path / "visits.csv"))
    assert "visits.csv: 3 rows are copies of others in every column" in caplog.text
    assert tables.copies_in(pd.DataFrame({"a": [[1], [1], [2]]})) == 1


def test_a_name_with_spaces_after_it_is_the_same_and_one_in_another_case_is_warned_of(tmp_path, caplog):
    rows = visits()
    other = rows["patient"].where(rows.index % 2 == 0, rows["patient"] + " ")
    other = other.where(rows["patient"] != "p03", rows["patient"].where(rows.index % 2 == 0, "P03"))
    rows.assign(patient=other).to_csv(tmp_path / "rows.csv", index=False)
    units = table(str(tmp_path / "rows.csv"), "patient", "level", shots=2).units
    names = {one.partition(" of ")[0] for own in units.values() for one in own}
    assert names == {*rows["patient"], "P03"}
    assert "'P03' and 'p03' are different tasks, which may be in different splits" in caplog.text


def test_random_splits_keep_groups_together(tmp_path):
    rows = visits().assign(visit=lambda table: table.patient + "-" + (table.day // 6).astype(int).astype(str))
    rows.to_csv(tmp_path / "visits.csv", index=False)
    keys = {"by": "visit", "leave_out_column": "patient", "shots": 1, "queries": 1, "drop": [*NOT_FEATURES[:2], "day"]}
    found = table(str(tmp_path / "visits.csv"), target="level", **keys)
    patients = {part: {unit.partition("-")[0] for unit in own} for part, own in found.units.items()}
    assert sum(map(len, patients.values())) == len(set.union(*patients.values())) == PATIENTS
    assert len(patients["test"]) == 2


def test_more_shots_leave_every_task_in_its_split(path):
    splits = {}
    for shots in (3, 8, 9, 10):
        found = family(path, shots=shots, queries=1)
        splits[shots] = {int(task): part for part, draws in found.draws.items() for task in draws.tasks}
    assert len(splits[3]) > len(splits[8]) > len(splits[9]) > len(splits[10])
    assert all(splits[3][task] == part for own in splits.values() for task, part in own.items())


def test_validation_rows_of_training_tasks_are_not_trained_on(path):
    found = family(path, "ill", leave_out="p11", validate="rows", shots=1, smallest=4, train_queries=None)
    seen = {}
    for part in ("train", "val"):
        tasks = found.sample(part, 40, generator())
        seen[part] = {row for i in range(40) for half in tasks[:2] for row in rows_of(half, i)}
    assert seen["train"]
    assert seen["val"]
    assert not seen["train"] & seen["val"]
    cell = np.repeat([0, 1, 2], [4, 10, 100])
    assert np.bincount(cell[held_out(cell, 0.3, 0)]).tolist() == [2, 3, 30]


def test_a_history_is_that_of_a_loop_and_stops_at_gaps():
    rng = np.random.default_rng(1)
    time_of = {"a": [0, 5, 10, 15, 30, 35, 40, 45], "b": [5, 10, 15, 20, 25]}
    rows = pd.DataFrame([(who, t, rng.normal()) for who, ts in time_of.items() for t in ts], columns=["id", "t", "v"])
    found = History("id", "t", "v", history=2, ahead=1, step=5).of(rows.sample(frac=1, random_state=0))
    value = {(r.id, r.t): r.v for r in rows.itertuples()}
    expected = {
        (who, t): (value[who, t - 5], value.get((who, t + 5), np.nan)) for who, t in value if (who, t - 5) in value
    }
    assert len(found) == len(expected)
    for row in found.to_dict("records"):
        np.testing.assert_equal((row["v -1"], row["v +1"]), expected[row["id"], row["t"]])


def test_a_recipe_reads_further_rows_after_a_trip_through_json(path):
    found = family(path, order="day", history=2, target="level")
    again = rebuilt(json.loads(json.dumps(plain(found.recipe))))
    assert again == found.recipe
    rows = again.prepared(visits())
    x, known = again.inputs(rows), rows[again.target].notna()
    assert x.shape == (len(rows), *found.spec.inputs.shape)
    torch.testing.assert_close(
        again.targets(rows[known])[:, 0] * again.scale + again.shift,
        torch.tensor(rows[again.target][known].to_numpy()).float(),
    )
    with pytest.raises(UserError, match="lack the column 'dose'"):
        again.inputs(rows.drop(columns="dose"))


def test_queries_of_a_series_begin_when_the_targets_of_the_support_set_are_known(path):
    found = family(path, order="day", history=1, ahead=3, queries=None)
    assert found.draws["test"].gap == 2
    cells = found.draws["test"].cells
    for split in ("train", "test"):
        draws = found.draws[split]
        task = draws.draw_tasks(5, generator())
        support, query = draws.draw_rows(task, generator())
        rank = torch.empty(len(cells.row), dtype=torch.long)
        rank[cells.row] = cells.when
        real = torch.ones_like(query.row, dtype=torch.bool) if query.real is None else query.real
        first = rank[query.row].masked_fill(~real, 99).amin(1)
        assert torch.equal(first, rank[support.row].amax(1) + 3)


def test_two_million_rows_are_indexed_once_and_a_batch_is_drawn_in_under_twenty_milliseconds():
    rng = np.random.default_rng(0)
    task = np.sort(rng.integers(0, 1000, 2_000_000))
    task[-600_000:] = 999  # one very large task
    cells = Cells(np.arange(len(task)), task, np.zeros(len(task), dtype=np.int64), (1000, 1))
    draws = Draws(cells, torch.arange(1000), Range(10, 10), 50)
    x = torch.from_numpy(rng.random((len(task), 8), dtype=np.float32))
    times = []
    for i in range(5):
        began = time.perf_counter()
        support, query = draws.draw_rows(draws.draw_tasks(25, generator(i)), generator(i))
        assert x[support.row].shape == (25, 10, 8)
        assert x[query.row].shape == (25, 50, 8)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.02


def write(folder: Path, text: str, name: str = "t.csv") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


GOOD = [f"{who},{i},{i * 2}.5,{'ny'[i % 2]}" for who in "abcd" for i in range(6)]


def lines(*others: str, header: str = "who,x,y,z") -> str:
    return "\n".join([header, *(others or GOOD)]) + "\n"


def instead(row: int, text: str, header: str = "who,x,y,z") -> str:
    """The good table with another line ``row``, counted from 1 with the header."""
    return lines(*GOOD[: row - 2], text, *GOOD[row - 1 :], header=header)


BROKEN = {
    "no file": (None, {}, "There is no nowhere.csv"),
    "empty": ("", {}, r"t.csv is empty"),
    "header alone": (lines("").strip() + "\n", {}, r"t.csv has a header and no rows"),
    "no such by": (lines(), {"by": "whom"}, "t.csv has no column 'whom', which task.by names; it has who, x, y, z"),
    "no such target": (lines(), {"target": "w"}, "no column 'w', which task.target names"),
    "no such feature": (lines(), {"features": ["w"]}, "no column 'w', which task.features names"),
    "no such order": (lines(), {"order": "when"}, "no column 'when', which task.order names"),
    "target as feature": (lines(), {"features": ["y"]}, "features must not name the target, y"),
    "column twice": (lines(header="who,x,x,z"), {"target": "z"}, "t.csv has two columns 'x'"),
    "separator": (lines().replace(",", ";"), {}, "t.csv has a single column, .*set task.separator=';'"),
    "too many cells": (instead(9, "b,1,2.5,n,7"), {}, "t.csv has lines with other numbers of cells .*line 9"),
    "text in the target": (instead(9, "b,1,high,n"), {}, "t.csv line 9: column 'y' must hold numbers, .*'high'"),
    "no target": (instead(5, "a,3,,n"), {}, "t.csv line 5: the cell of column 'y' is empty; .*unlabelled=drop"),
    "no task": (instead(3, ",1,2.5,n"), {}, "t.csv line 3: the cell of column 'who' is empty"),
    "one value": (lines(*(f"{w},{i},1,n" for w in "abc" for i in range(6))), {}, "target 'y' has a single value, 1"),
    "small tasks": (lines(*(f"{i},{i},{i}.5,n" for i in range(9))), {}, "no task has 3 rows, one more than task.shots"),
    "two tasks": (lines(*GOOD[:12]), {}, "t.csv leaves 2 tasks for train, val, test"),
    "text among numbers": (
        instead(4, "a,?,4.5,n"),
        {},
        r"t.csv line 4: column 'x' holds '\?' among numbers; .*missing",
    ),
    "infinity": (instead(4, "a,inf,4.5,n"), {}, "t.csv line 4: column 'x' holds infinity"),
    "time as text": (instead(4, "a,noon,4.5,n"), {"order": "x"}, "t.csv line 4: column 'x' must hold numbers.*'noon'"),
    "nothing to learn from": (lines(), {"drop": ["x", "z"]}, "t.csv leaves no column that describes a row"),
    "no such group": (lines(), {"leave_out": "e"}, "leave_out=e must be one of .* 'who' .* a, b, c, d"),
    "task in two splits": (lines(), {"split": "z"}, "t.csv line 3: column 'z' holds 'y', and another row"),
    "threshold": (lines(), {"threshold": 99.0}, "target 'y' is from 0.5 to 10.5, so task.threshold=99 makes a single"),
    "names of columns": (lines(), {"columns": ["who"]}, "t.csv has 4 cells in line 1, and task.columns names 1"),
    "gap": (lines(), {"order": "x", "history": 5, "ahead": 9}, "no row with 5 values up to it and one 9 rows later"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_table_gets_a_sentence_that_names_the_place(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, keys, sentence = BROKEN[case]
    place = "nowhere.csv" if text is None else write(tmp_path, text)
    with pytest.raises((UserError, ValueError), match=sentence):
        table(place, **{"by": "who", "target": "y", "shots": 2, **keys})


def test_other_broken_files(tmp_path):
    (tmp_path / "latin.csv").write_bytes(lines().replace("a,", "ä,").encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.csv is not text in UTF-8"):
        table(str(tmp_path / "latin.csv"), "who", "y")
    (tmp_path / "t.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match=r"t.parquet (needs pyarrow|cannot be read)"):
        table(str(tmp_path / "t.parquet"), "who", "y")
    two = {"a": write(tmp_path, lines(), "1.csv"), "b": write(tmp_path, lines(header="who,x,y,w"), "2.csv")}
    with pytest.raises(UserError, match=r"2.csv and .*1.csv have different columns: only one of them has 'w'"):
        table(two, "who", "y")
    half = write(tmp_path, "task,split\na,train\nb,val\nc,test\n", "half.csv")
    with pytest.raises(UserError, match=r"half.csv gives no split for the task 'd'"):
        table(write(tmp_path, lines()), "who", "y", shots=2, split_file=half)
    twice = write(tmp_path, "task,split\na,train\nb,val\nc,test\nd,train\na,test\n", "twice.csv")
    with pytest.raises(UserError, match=r"twice.csv gives 'train' and 'test' for the task 'a'"):
        table(write(tmp_path, lines()), "who", "y", shots=2, split_file=twice)


def test_no_table_of_a_folder_is_lost(tmp_path):
    for name in ("a.csv", "B.CSV", "c.csv", "d.csv"):
        write(tmp_path, lines(), name)
    found = table(str(tmp_path), by="file", target="y", shots=2)
    assert sum(len(draws.tasks) for draws in found.draws.values()) == 4
    (tmp_path / "c.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"two tables named 'c', c.csv and c.parquet"):
        table(str(tmp_path), by="file", target="y", shots=2)


def test_numbers_of_rows_that_tools_write_are_no_feature(path, tmp_path, caplog):
    caplog.set_level("INFO")
    visits().sort_values("level").to_csv(tmp_path / "numbered.csv")
    found = family(str(tmp_path / "numbered.csv"))
    assert set(found.recipe.columns.names) == set(family(path).recipe.columns.names)
    assert "the column without a name numbers the rows, and is left out" in caplog.text


def test_a_table_in_several_files_names_the_file_and_line(tmp_path):
    good, bad = write(tmp_path, lines(), "1.csv"), write(tmp_path, instead(7, "a,5,none,y"), "2.csv")
    with pytest.raises(UserError, match=r"2.csv line 7: column 'y' must hold numbers"):
        table({"one": good, "two": bad}, by="file", target="y")


def test_a_parquet_file_gives_the_same_tasks(path, tmp_path):
    pytest.importorskip("pyarrow")
    visits().to_parquet(tmp_path / "visits.parquet")
    a, b = family(path), family(str(tmp_path / "visits.parquet"))
    # The columns lie differently in memory, so that their sums may be rounded differently.
    assert replace(a.recipe, shift=0.0, scale=1.0) == replace(b.recipe, shift=0.0, scale=1.0)
    assert np.allclose([a.recipe.shift, a.recipe.scale], [b.recipe.shift, b.recipe.scale], rtol=1e-12)
    first, second = (one.sample("test", 2, generator()).query["x"] for one in (a, b))
    torch.testing.assert_close(first, second)


def test_cells_have_one_meaning_in_every_type_of_column():
    truths = [
        pd.Series([True, False]),
        pd.Series([True, False], dtype=object),
        pd.Series([True, False], dtype="boolean"),
    ]
    for missing in (None, pd.NA):
        truths += [pd.Series([True, False, missing], dtype=kind) for kind in (object, "boolean")]
    assert all(tables.words(one)[:2].tolist() == ["1", "0"] for one in truths)
    assert all(tables.words(one)[2:].isna().all() for one in truths)
    ids = pd.Series([123456789012345678, 123456789012345679])
    assert tables.words(ids).tolist() == [str(one) for one in ids]
    for numbers in (pd.Series([1, 2]), pd.Series([1.0, 2.0]), pd.Series([1, 2], dtype="Int64"), pd.Series(["1", "2"])):
        assert tables.words(numbers).tolist() == ["1", "2"]
        assert tables.words(numbers.astype("category")).tolist() == ["1", "2"]
    days = [0.5, 400.0]
    moments = pd.Timestamp("1970-01-01") + pd.to_timedelta(pd.Series([*days, None]), unit="D")
    for dates in (moments, moments.astype("datetime64[ms]"), moments.dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo")):
        np.testing.assert_array_equal(tables.as_numbers(dates), [*days, np.nan])


def test_rows_with_dates_and_truths_are_encoded_alike_whatever_is_missing():
    dates, every = pd.to_datetime(pd.Series(["2020-01-01", None, "2020-01-05", "2020-01-03"])), np.ones(4, dtype=bool)
    source = Source([Path("x.csv")], [4], True)
    rows = pd.DataFrame({"when": dates, "smokes": pd.Series([True, False, None, True], dtype=object)})
    columns, left = fitted(rows, every, ["when", "smokes"], (), source)
    assert not left
    assert columns.names == ["when", "when missing", "smokes=0", "smokes=1"]
    found = columns.encode(rows)
    np.testing.assert_allclose(found[:, 0], [-1.224745, 0, 1.224745, 0], atol=1e-5)
    assert found[:, 1:].tolist() == [[0, 0, 1], [1, 1, 0], [0, 0, 0], [0, 0, 1]]
    whole = rows.iloc[[0, 3]].astype({"when": "datetime64[ms]", "smokes": bool})
    torch.testing.assert_close(columns.encode(whole), found[[0, 3]])


def test_decimal_commas_are_refused_and_not_taken_for_names(tmp_path):
    rows = [f"p{i % 5};{i},5;{i % 7},25;{i % 3}" for i in range(30)]
    (tmp_path / "rows.csv").write_text("\n".join(["who;dose;level;kind", *rows]))
    given = {"path": str(tmp_path / "rows.csv"), "separator": ";", "by": "who", "shots": 2}
    for key in ({"target": "level"}, {"target": "kind", "kind": "numbers"}):
        with pytest.raises(
            UserError, match=r"line 2: column '(dose|level)' holds '0,2?5', which looks like .* decimal comma"
        ):
            table(**given, **key)
    assert table(**given, target="kind", kind="numbers", categorical=["dose", "level"]).spec.inputs.shape == (18 + 7,)


def test_files_of_users_are_read_as_those_of_the_run(tmp_path):
    """Also with a mark of byte order, other separators, spaces after them and a cell too many."""
    expected = pd.DataFrame({"ward": ["north", "south"], "dose": [1.5, np.nan]})
    for separator in (",", ";", "\t"):
        lines = ["ward, dose", "north, 1.5", "south, ?"]
        (tmp_path / "rows.csv").write_text("\n".join(lines).replace(",", separator), encoding="utf-8-sig")
        pd.testing.assert_frame_equal(table_of(tmp_path / "rows.csv", ("?",)), expected)
    (tmp_path / "texts.csv").write_text("Utterance;intent\nNone;NA\nsee you;null\n")
    found = read_sentences(tmp_path / "texts.csv")
    assert (found.x, found.y) == (["None", "see you"], ["NA", "null"])
    (tmp_path / "texts.csv").write_text("text,label\n,greeting\n")
    with pytest.raises(ValueError, match="a row without a text"):
        read_sentences(tmp_path / "texts.csv")
    (tmp_path / "rows.csv").write_text("ward,dose\nnorth,1.5,7\n")
    with pytest.raises(ValueError, match="cannot be read as a table"):
        table_of(tmp_path / "rows.csv")


def fingerprints(folder: Path, **changed) -> str:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (60, 32), dtype=np.uint8)
    labels = rng.integers(-1, 2, (60, 8)).astype(np.int8)
    arrays = {"fp_packed": np.packbits(bits, axis=1), "labels": labels, "tasks": np.array([f"t{i}" for i in range(8)])}
    np.savez(folder / "m.npz", **{k: v for k, v in (arrays | changed).items() if v is not None})
    return str(folder / "m.npz")


BYTES = np.array([f"t{i}".encode() for i in range(8)])


def test_molecules_are_the_measured_ones_with_their_labels(tmp_path):
    place = fingerprints(tmp_path)
    found = molecules(place, shots=3, queries=None, smallest=None)
    with np.load(place) as file:
        bits, labels = np.unpackbits(file["fp_packed"], axis=1), file["labels"]
    tasks = found.sample("test", 2, generator())
    check_tasks(tasks, found.spec, "test", 2, "cpu")
    for i, assay in enumerate(found.draws["test"].draw_tasks(2, generator()).tolist()):
        measured = {(tuple(b), int(y)) for b, y in zip(bits.tolist(), labels[:, assay], strict=True) if y >= 0}
        shown = rows_of(tasks.support, i) | rows_of(tasks.query, i)
        assert {(tuple(map(int, row[:-2])), int(row[-1])) for row in shown} == measured


def test_new_molecules_are_in_no_training_task(tmp_path):
    found = molecules(fingerprints(tmp_path), shots=2, queries=None, smallest=None, new_molecules=0.5)
    seen = {}
    for part in ("train", "val", "test"):
        tasks = found.sample(part, 20, generator())
        seen[part] = {row[:-2] for i in range(20) for half in tasks[:2] for row in rows_of(half, i)}
    assert not seen["train"] & (seen["val"] | seen["test"])


def test_a_copy_of_a_training_molecule_is_not_new(tmp_path, caplog):
    bits = np.random.default_rng(1).integers(0, 2, (30, 32), dtype=np.uint8)
    packed = np.packbits(np.concatenate([bits, bits[:10], bits[:20]]), axis=1)
    found = molecules(fingerprints(tmp_path, fp_packed=packed), shots=1, queries=None, smallest=None, new_molecules=0.5)
    assert "30 molecules have the fingerprints of others" in caplog.text
    seen = {}
    for part in ("train", "test"):
        tasks = found.sample(part, 20, generator())
        seen[part] = {row[:-2] for i in range(20) for half in tasks[:2] for row in rows_of(half, i)}
    assert not seen["train"] & seen["test"]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"fp_packed": None}, "m.npz lacks the array 'fp_packed'"),
        ({"labels": np.full((60, 8), 2)}, "molecule 0 of the assay t0 has 2"),
        ({"labels": np.zeros((60, 7))}, r"labels must be \[molecules, assays\], \[60, 8\]"),
        ({"fp_packed": np.zeros((60, 32))}, "fp_packed must be .* of uint8"),
        ({"labels": np.zeros((60, 8))}, "no task has 4 rows in each of at least two classes"),
        ({"tasks": np.array(["t0"] * 8)}, "tasks has two assays t0; rename one of them"),
        ({"tasks": np.array([{}] * 8, dtype=object)}, "m.npz is not an .npz file of arrays"),
    ],
)
def test_broken_fingerprints_get_a_sentence(changed, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        molecules(fingerprints(tmp_path, **changed), shots=3, smallest=None)


def test_a_file_of_fingerprints_is_no_table_and_text_is_no_fingerprints(tmp_path):
    with pytest.raises(UserError, match=r"m.npz is not a table; choose task=molecules"):
        table(fingerprints(tmp_path), "who", "y")
    (tmp_path / "m.npz").write_text("no")
    with pytest.raises(UserError, match=r"m.npz is not an .npz file"):
        molecules(str(tmp_path / "m.npz"))
    with np.load(fingerprints(tmp_path)) as file:
        np.savez_compressed(tmp_path / "m.npz", **file)
    with zipfile.ZipFile(tmp_path / "m.npz") as archive:
        begin = archive.getinfo("labels.npy").header_offset + 50
    content = bytearray((tmp_path / "m.npz").read_bytes())
    content[begin : begin + 30] = bytes(byte ^ 255 for byte in content[begin : begin + 30])
    (tmp_path / "m.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"m.npz is not an .npz file"):
        molecules(str(tmp_path / "m.npz"))


def test_names_of_assays_may_be_bytes(tmp_path):
    texts, data = (read_molecules(Path(fingerprints(tmp_path, **own))) for own in ({}, {"tasks": BYTES}))
    assert data.tasks == texts.tasks


SHORT = (
    *("train.steps=4", "train.meta_batch=2", "train.eval_every=2", "train.val_episodes=4"),
    *("eval.episodes=4", "eval.adapt_steps=2", "task.drop=[ill,stage]"),
)


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize(
    ("algo", "target"),
    [
        *((algo, "level") for algo in ("maml", "reptile", "shared_params", "transfer", "cnp", "dkt")),
        *((algo, "stage") for algo in ("maml", "protonet", "shared_params", "transfer", "adaptive")),
    ],
)
def test_algorithms_run_on_tables_of_numbers_and_of_classes(algo, target, path, tmp_path, caplog):
    caplog.set_level("INFO")
    keys = (f"algo={algo}", "task=table", f"task.path={path}", "task.by=patient", f"task.target={target}")
    run(*composed(*keys, "task.shots=2", "task.smallest=3", "task.queries=5", *SHORT), tmp_path)
    assert "the episodes are of 2 different tasks, and the intervals are not about further ones" in caplog.text
    row = pd.read_csv(tmp_path / "result.csv").iloc[0]
    assert row["different_tests"] == pd.read_csv(tmp_path / "episodes.csv")["task"].nunique() <= 2
    further = ["mae", "r2"] if target == "level" else ["macro-f1", "negative-log-likelihood", "calibration-error"]
    assert np.isfinite([row["score"], *(row[name] for name in further)]).all()
    if target == "stage":
        confusion = pd.read_csv(tmp_path / "confusion.csv")
        assert len(confusion) == 9
        np.testing.assert_allclose(confusion.groupby("class")["share"].sum(), 1, rtol=1e-5)
        sizes = confusion.groupby("class")["rows"].sum()
        same = confusion[confusion["class"] == confusion["chosen"]].set_index("class")
        np.testing.assert_allclose(same["share"], same["rows"] / sizes, rtol=1e-5)


def test_columns_without_a_name_for_a_value_are_left_out_and_said():
    rows = pd.DataFrame({"a": ["x", "y", None, "x"], "same": ["u"] * 4, "empty": [None] * 4, "flag": [True, False] * 2})
    found, left = fitted(rows, np.ones(4, dtype=bool), list(rows), (), Source([Path("t.csv")], [4], True))
    assert found.names == ["a=x", "a=y", "flag=0", "flag=1"]
    assert left == {"same": "the same in all training rows", "empty": "empty"}


def test_a_number_that_training_never_changes_is_not_scaled_by_its_rounding():
    values = np.full(102, 0.1)
    values[0] = np.nan
    rows = pd.DataFrame({"same": values})
    assert np.nanstd(values) != 0
    found, _ = fitted(rows, np.ones(102, dtype=bool), ["same"], (), Source([Path("t.csv")], [102], True))
    further = found.encode(pd.DataFrame({"same": [0.1, 0.35, np.nan]}))
    torch.testing.assert_close(further, torch.tensor([[0.0, 0.0], [0.25, 0.0], [0.0, 1.0]]))


def published(folder: Path) -> None:
    """Small files in the layouts of the named data sets."""
    rng = np.random.default_rng(0)
    for name in ("uci_heart_disease", "uci_parkinsons_telemonitoring", "hall_cgm", "tox21_toxcast"):
        (folder / name).mkdir()
    for hospital in ("cleveland", "hungarian", "switzerland", "va"):
        rows = rng.integers(1, 4, (60, 14)).astype(str)
        rows[::5, 3] = "?"
        rows[:, 13] = rng.integers(0, 3, 60).astype(str)
        (folder / "uci_heart_disease" / f"processed.{hospital}.data").write_text("\n".join(map(",".join, rows)))
    patients = pd.DataFrame({"subject#": np.repeat(np.arange(1, 11), 20), "age": 70, "test_time": rng.random(200)})
    patients = patients.assign(motor_UPDRS=rng.random(200), total_UPDRS=1.0, PPE=rng.random(200))
    patients.to_csv(folder / "uci_parkinsons_telemonitoring" / "parkinsons_updrs.data", index=False)
    readings = pd.DataFrame({"id": np.repeat(list("abcdefg"), 60), "time": np.tile(300.0 * np.arange(60), 7)})
    readings.assign(gl=rng.normal(100, 10, 420), diagnosis="d").to_csv(
        folder / "hall_cgm" / "example_data_hall.csv", index=False
    )
    Path(fingerprints(folder / "tox21_toxcast")).rename(folder / "tox21_toxcast" / "toxcast_data_ecfp4_2048.npz")


def test_named_data_sets_are_tables_of_the_published_files(tmp_path):
    published(tmp_path)
    small = {"molecules": ("task.shots=2", "task.smallest=null")}
    found = {
        name: experiment_of(f"task={name}", f"data_dir={tmp_path}", *small.get(name, ())).family
        for name in ("heart", "parkinsons", "glucose", "molecules")
    }
    for family in found.values():
        for split in ("train", "val", "test"):
            check_tasks(family.sample(split, 3, generator()), family.spec, split, 3, "cpu")
    assert found["heart"].target.names == ("up to 0", "above 0")
    assert "trestbps missing" in found["heart"].recipe.columns.names
    assert found["parkinsons"].recipe.columns.names == ["test_time"]
    assert found["glucose"].spec.inputs.shape == (12,)
    assert found["molecules"].spec.metrics[0].name == "auroc"
    other = experiment_of("task=heart", f"data_dir={tmp_path}", "task.leave_out=va").family
    assert other.dataset != found["heart"].dataset
    assert "without va" in other.dataset


def test_a_later_test_sees_the_rows_of_another_file_as_the_run_saw_its_own(path, tmp_path):
    """Standardised by the run's means and in the run's units, whatever the order of the columns there."""
    keys = {"by": "patient", "target": "level", "shots": 3, "features": ["dose", "kind"]}
    trained = table(path, **keys)
    other = visits()[["kind", "site", "level", "patient", "dose"]]
    other["dose"], other["level"] = 2 * other["dose"] + 7, other["level"] + 50
    other.to_csv(tmp_path / "other.csv", index=False)
    found = table(str(tmp_path / "other.csv"), **keys, converter=trained.converter)
    assert (found.target.shift, found.target.scale) == (trained.target.shift, trained.target.scale)
    rows = other.rename(columns=str)
    torch.testing.assert_close(found.inputs(torch.arange(len(rows))), trained.converter.inputs(rows))
    task = found.sample("test", 2, generator())
    levels = trained.converter.answers(task.query["y"][task.query["weight"] > 0])
    assert np.abs(levels[:, None] - other["level"].to_numpy()).min(1).max() < 1e-3
    # Classes keep the columns that they had, even if one of them is not there.
    keys |= {"target": "stage"}
    trained = table(path, **keys)
    some = visits().query("stage != 'two'")
    some.to_csv(tmp_path / "some.csv", index=False)
    assert table(str(tmp_path / "some.csv"), **keys, converter=trained.converter).target.names == trained.target.names
    some.replace({"stage": {"one": "none"}}).to_csv(tmp_path / "none.csv", index=False)
    for goal, words in (("stage", "knows the classes one, three, two.*'none'"), ("site", "trained with, stage")):
        with pytest.raises(ValueError, match=words):
            table(str(tmp_path / "none.csv"), **{**keys, "target": goal}, converter=trained.converter)
