"""What people publish holds no paths, users, slide metadata or markup that came in by a name."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mil.report.page import write_report
from mil.results.published import FILE, published, restored, write_environment
from mil.results.readback import read_environment
from mil.results.trained import open_run

HOME = "/Users/alice"


@pytest.fixture
def home(monkeypatch) -> Path:
    monkeypatch.setattr(Path, "home", lambda: Path(HOME))
    return Path(HOME)


@pytest.mark.parametrize(
    ("text", "run", "shown"),
    [
        ("/Users/alice/cache/phikon", "/Users/alice/runs/a", "../../cache/phikon"),
        ("/Users/alice/cache/phikon", "/srv/runs/a", "~/cache/phikon"),
        ("/mnt/bob/slides", "/Users/alice/runs/a", "…/slides"),
        ("/srv/runs/a/plan.csv", "/srv/runs/a", "plan.csv"),
        ("cache/phikon", "/srv/runs/a", "cache/phikon"),
        ("https://host.org/x/y", "/srv/runs/a", "https://host.org/x/y"),
        ("owkin/camelyon16-features", "/srv/runs/a", "owkin/camelyon16-features"),
        ("1/2 of a/b, 3 / 4", "/srv/runs/a", "1/2 of a/b, 3 / 4"),
        ("cohort=/Users/alice/c.csv out=/srv/runs/a", "/srv/runs/a", "cohort=~/c.csv out=."),
        ("x: '/Users/alice/a b/c'", "/srv/runs/a", "x: '~/a b/c'"),
    ],
)
def test_a_path_is_written_as_seen_from_the_run_folder(home, text, run, shown):
    assert published(text, Path(run)) == shown


def test_environment_comes_back_in_full_with_paths_json_and_is_readable_without(home, tmp_path):
    environment = {
        "command": "python -m mil.train cohort=/Users/alice/c.csv",
        "features": {
            **{"folder": "/Users/alice/f", "layout": "cache", "dim": 3, "dtype": "float16", "encoder": "x"},
            **{"weights_sha256": "", "tile_px": 1, "mpp": 0.5, "overlap_px": 0},
            "extraction": {"encoder_source": "/mnt/alice/w.pt"},
            "source": {"files": [{"name": "/Users/alice/p.parquet"}, {"name": "q"}]},
        },
    }
    write_environment(tmp_path, environment, "environment.json")
    assert "alice" not in (tmp_path / "environment.json").read_text()
    assert read_environment(tmp_path) == environment
    assert "not for publication" in (tmp_path / FILE).read_text()
    (tmp_path / FILE).unlink()
    assert read_environment(tmp_path)["features"]["folder"] == "~/f"
    write_environment(tmp_path, environment, "environment.json", full=True)
    assert json.loads((tmp_path / "environment.json").read_text()) == environment
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize(
    "pointer", ["", "/", "/features", "/features/dim", "/nope/x", "/features/source/files/9/name", "x"]
)
def test_a_place_that_is_none_is_a_message(pointer):
    environment = {"features": {"dim": 3, "source": {"files": [{"name": "q"}]}}}
    assert restored(environment, {"values": {pointer: "/x"}})
    assert restored(environment, {"values": [1]})
    assert restored(environment, {})


def test_a_real_run_tells_no_absolute_path_and_can_still_be_read(studies):
    study = studies("mean")
    folder = study.folder
    published = ("environment.json", "report.html", "model-card.md", "checklists.md", "metrics.json", "slides.csv")
    for name in published:
        assert str(folder.parent) not in (folder / name).read_text(encoding="utf-8"), name
    features = study.arguments[1].partition("=")[2]
    assert open_run(folder).environment["features"]["folder"] == features
    assert "not for publication" in (folder / "config.yaml").read_text().splitlines()[0]


# --- names with markup -----------------------------------------------------------------------------------------------

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "--><b>x", "$\\frac{a}{b}$", "&amp;{{7*7}}"]


class Elements(HTMLParser):
    """Counts start tags and collects attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def report_of(folder: Path, names: list[str], classes: list[str]) -> Elements:
    """The elements of a report of 40 slides and 2 members with these names everywhere."""
    rng = np.random.default_rng(2)
    rows = []
    for member in range(2):
        for s in range(40):
            logit = rng.normal() + 1.5 * (s % 2)
            role = "test" if s % 4 // 2 == member else "train"
            rows.append(
                {"member": member, "repeat": 0, "fold": member, "seed": 0, "slide": f"{names[s % 5]}{s}"}
                | {"patient": f"{names[s % 5]}p{s}", "label": classes[s % 2], "split": "train", "role": role}
                | {"logit_0": logit, "p_0": 1 / (1 + np.exp(logit)), "p_1": 1 / (1 + np.exp(-logit))}
            )
    plan = pd.DataFrame({"member": [0, 1], "repeat": 0, "fold": [0, 1], "seed": 0, "lr": 1e-3, "weight_decay": 0.0})
    plan = plan.assign(epochs=1, best_epoch=1, n_train=20, n_val=0, n_test=20)
    history = pd.DataFrame({"member": [0, 1], "epoch": 1, "train_loss": 0.5, "train_auc": 0.7})
    history = history.assign(val_loss=np.nan, val_auc=np.nan)
    write_report(
        folder,
        title=names[0],
        predictions=pd.DataFrame(rows),
        plan=plan,
        history=history,
        classes=classes,
        config_yaml=f"cohort: {names[1]}",
        environment={names[2]: names[3]},
        notes=names,
        bootstrap=0,
    )
    elements = Elements()
    elements.feed((folder / "report.html").read_text(encoding="utf-8"))
    return elements


def test_markup_in_names_makes_no_element_of_the_page_or_its_pictures(tmp_path):
    plain = report_of(tmp_path / "plain", ["a", "b", "c", "d", "e"], ["normal", "tumor"])
    hostile = report_of(tmp_path / "hostile", HOSTILE, HOSTILE[:2])
    for tag in ("script", "img", "b", "iframe", "object", "a", "form", "link"):
        assert hostile.tags.get(tag, 0) == plain.tags.get(tag, 0), tag
    assert hostile.handlers == plain.handlers
    page = (tmp_path / "hostile" / "report.html").read_text(encoding="utf-8")
    assert "{{7*7}}" in page, "names are no template"
    assert not re.search(r"<script>alert|<img src=x|--><b>x", page)
    written = pd.read_csv(tmp_path / "hostile" / "slides.csv", dtype=str)
    assert set(written["label"].dropna()) == set(HOSTILE[:2])
