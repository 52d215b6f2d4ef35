"""The page of ``metarun-report``, read by Python's own parser; ``test_browser.py`` opens it in a browser."""

import shutil
import sys
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest
from results.test_compare import make_run

from metarun.results import report as module
from metarun.results.page.html import Cell, table
from metarun.results.report import report

HOSTILE = '<script>alert("1")</script>&\'"'
VOID = {"meta", "link", "img"}


class Page(HTMLParser):
    """What a page consists of; a tag that is closed in the wrong order raises."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def write_metrics(directory, scores):
    lines = [f"{step},,,,{score},{step / 10},0" for step, score in scores]
    header = "step,train_loss,train_score,val_loss,val_score,seconds,replica"
    (directory / "metrics.csv").write_text("\n".join([header, *lines]))


CONFIG = "algo:\n  inner_lr: {}\ntrain:\n  steps: 20\nnote: '<b>'\nseed: {}\n"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("runs")
    for seed in range(2):
        for algo, family, rate in (("maml", "agnostic", 0.1), ("protonet", "dependent", 0.2)):
            scores = rng.normal(0.7, 0.1, 40)
            directory = make_run(root, f"{algo} {seed}", algo, family, seed, scores, ("a=b",), device=HOSTILE)
            write_metrics(directory, [(10, 0.4), (20, 0.5 + seed / 10)])
            (directory / ".hydra" / "config.yaml").write_text(CONFIG.format(rate, seed))
    make_run(root, "failed", "anil", "agnostic", 0, scores, status="failed", reason=f"It broke {HOSTILE}.")
    report([root], root / "pages" / "report.html")
    return root


@pytest.fixture
def page(runs):
    return Page((runs / "pages" / "report.html").read_text())


def test_the_page_is_one_file_that_executes_nothing_from_the_runs(page, runs):
    text = (runs / "pages" / "report.html").read_text()
    assert len(text) < 1_000_000
    assert len(page.all("script")) == 1
    assert 'alert("1")' not in text
    assert page.text.count(HOSTILE) == 4 + 1
    for _, attrs in page.tags:
        address = attrs.get("src", attrs.get("href", "data:"))
        assert address.startswith(("data:", "#", "../"))
        assert not any(name.startswith("on") or name == "style" for name in attrs)


def test_every_picture_has_a_text_alternative(page):
    images = page.all("img")
    # Scores, costs, curves over steps, seconds and adaptation, histograms, seeds.
    assert len(images) == 7
    assert all(image["src"].startswith("data:image/png;base64,") and len(image["alt"]) > 40 for image in images)
    assert "Last values: maml 55.00 %, protonet 55.00 %" in images[2]["alt"]


def test_methods_whose_long_names_begin_alike_are_all_in_the_pictures(tmp_path):
    for rate in (1, 2):
        overrides = ("algo.inner_steps=5", "eval.adapt_steps=10", "train.eval_every=100", f"train.lr={rate}")
        make_run(tmp_path, f"maml {rate}", "maml", "agnostic", 0, np.linspace(0, 1, 9) / rate, overrides)
    make_run(tmp_path, "protonet", "protonet", "dependent", 0, np.linspace(0, 1, 9))
    report([tmp_path], tmp_path / "report.html")
    (histograms,) = (x["alt"] for x in Page((tmp_path / "report.html").read_text()).all("img") if "Hist" in x["alt"])
    assert "maml … train.lr=1 50.00 %, maml … train.lr=2 25.00 %" in histograms


def test_links_lead_to_the_runs(page, runs):
    links = {unquote(link["href"]) for link in page.all("a")}
    assert links == {f"../{algo} {seed}" for algo in ("maml", "protonet") for seed in range(2)}
    assert all((runs / "pages" / link).is_dir() for link in links)


def test_the_verdict_failed_runs_and_differences_of_configurations_are_there(page):
    assert "Families (best of each by validation): protonet (model-dependent) − maml (model-agnostic)" in page.text
    assert "(failed: It broke" in page.text
    assert "algo.inner_lr" in page.text
    assert "train.steps" not in page.text


def test_a_run_without_curves_or_configuration_is_still_reported(runs, tmp_path):
    root = shutil.copytree(runs, tmp_path / "runs")
    for name in ("metrics.csv", "episodes.csv", ".hydra/config.yaml"):
        (root / "maml 0" / name).write_bytes(b"\x00\xff,")
    report([root], root / "report.html", "maml")
    assert len(Page((root / "report.html").read_text()).all("img")) == 7


def test_cells_carry_the_numbers_that_they_are_sorted_by():
    page = Page(table(["name", "score"], [[Cell("a"), Cell("9 %", 0.09)], [Cell("b"), Cell("–", float("nan"))]], "c"))
    cells = page.all("td")
    assert [cell.get("data-value") for cell in cells] == [None, "0.09", None, "nan"]
    assert len(page.all("button")) == 2


def test_the_command(runs, monkeypatch, capsys):
    monkeypatch.setattr(module, "page_of", lambda comparison, out: "the page")
    monkeypatch.setattr(sys, "argv", ["metarun-report", str(runs)])
    module.main()
    assert capsys.readouterr().out == f"report: {runs / 'report.html'}\n"
    assert (runs / "report.html").read_text() == "the page"
    monkeypatch.setattr(sys, "argv", ["metarun-report", str(runs / "nowhere")])
    with pytest.raises(SystemExit, match="metarun-report: There is no"):
        module.main()
