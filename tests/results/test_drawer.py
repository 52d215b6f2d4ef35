"""The process that draws: its pictures are those that would be drawn here, and what goes wrong there is told here."""

import sys
from pathlib import Path

import pytest

from metarun.results import drawer
from metarun.results.plots import plot_training
from metarun.targets.metric import Metric

CURVES = [("", [{"step": i, "train_score": 1 / i, "val_score": 2 / i} for i in range(1, 9)], 4)]


def ask(path):
    drawer.draw("training", plot_training, path, "maml on $sinusoid$", Metric("mse", False), CURVES)


def without_torch(path):
    if "torch" in sys.modules:
        raise RuntimeError("torch has been imported")


def fail(path):
    raise ValueError("there is nothing to draw")


@pytest.fixture(scope="module")
def running():
    """The process, started as by a command that has not imported matplotlib."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [one for one in sys.modules if one.partition(".")[0] == "matplotlib"]:
            patch.delitem(sys.modules, name)
        drawer.start()
    assert drawer._process is not None
    yield drawer._process
    drawer.stop()


def test_the_process_draws_what_is_drawn_here(running, monkeypatch, tmp_path, caplog):
    monkeypatch.chdir(tmp_path)
    ask(Path("there.png"))
    drawer.draw("nothing", fail, tmp_path)
    drawer.draw("light", without_torch, tmp_path)
    ask(tmp_path / "again.png")
    drawer.finish()
    assert running.poll() is None
    assert [record.message for record in caplog.records] == [
        "  nothing cannot be shown: ValueError: there is nothing to draw"
    ]
    plot_training(tmp_path / "here.png", "maml on $sinusoid$", Metric("mse", False), CURVES)
    here, there, again = ((tmp_path / f"{name}.png").read_bytes() for name in ("here", "there", "again"))
    assert here.startswith(b"\x89PNG")
    assert here == there == again


def test_a_picture_that_cannot_be_written_is_an_error(running, tmp_path):
    (tmp_path / "file").touch()
    ask(tmp_path / "file" / "training.png")
    with pytest.raises(OSError, match="file"):
        drawer.finish()
    assert running.poll() is None
    ask(tmp_path / "file" / "training.png")
    drawer.forget()
    drawer.finish()


def test_pictures_of_a_process_that_is_killed_are_drawn_here(running, tmp_path):
    ask(tmp_path / "first.png")
    running.kill()
    running.wait()
    ask(tmp_path / "second.png")
    drawer.finish()
    assert drawer._process is None
    ask(tmp_path / "third.png")
    for name in ("first", "second", "third"):
        assert (tmp_path / f"{name}.png").stat().st_size > 0


def test_no_process_is_started_where_matplotlib_is_at_hand():
    import matplotlib  # noqa: F401

    drawer.start()
    assert drawer._process is None
