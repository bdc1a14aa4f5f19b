"""A coarse look chooses the tiles to encode: what it sees, what it keeps, and what it costs on a made cohort."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score
from sklearn.neural_network import MLPRegressor

from extract.config import ConfigError, ExtractConfig, load_config
from extract.features.cache import read_coords, read_header
from extract.slides.coarse import LEAST_TILES, SelectorError, around, cheap_numbers, choose, load_selector, look
from extract.slides.slide import open_slide
from mil.predict import main as predict
from mil.prediction.fast import OwnSlide, fit, worth

ROOT = Path(__file__).resolve().parents[2]
SIDE_PX = 480


@pytest.fixture(scope="module")
def selecting() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("selecting", ROOT / "benchmarks" / "selecting.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["selecting"] = module  # as whom it is the study's encoder
    spec.loader.exec_module(module)
    yield module
    del sys.modules["selecting"]


@pytest.fixture(scope="module")
def cohort(selecting: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 slides of 20 tiles, and a study of them."""
    folder = selecting.make_cohort(tmp_path_factory.mktemp("made") / "old", 12, SIDE_PX, 3)
    selecting.study(folder, epochs=3, folds=3)
    return folder


def test_kept_are_the_best_and_a_few_by_chance():
    scores_N = np.random.default_rng(0).permutation(100).astype(float)
    kept = choose(scores_N, 0.2, 0.25, "a")
    assert len(kept) == len(set(kept.tolist())) == 20
    assert set(np.argsort(-scores_N)[:15]) <= set(kept.tolist())
    assert np.array_equal(kept, choose(scores_N, 0.2, 0.25, "a"))
    assert not np.array_equal(kept, choose(scores_N, 0.2, 0.25, "b"))
    assert len(choose(scores_N[:5], 0.1, 0.2, "a")) == 5
    assert len(choose(scores_N[:50], 0.01, 0.2, "a")) == LEAST_TILES


def test_neighbours_are_those_of_the_grid():
    coords_N2 = np.array([(x, y) for y in range(0, 400, 100) for x in range(0, 300, 100)])
    own_NF = np.random.default_rng(0).normal(size=(12, 2))
    for row, (x, y) in enumerate(coords_N2):
        near = [i for i, (u, v) in enumerate(coords_N2) if abs(u - x) <= 100 and abs(v - y) <= 100]
        np.testing.assert_allclose(around(own_NF, coords_N2, 100.0)[row], own_NF[near].mean(0))


def test_cheap_numbers_are_what_they_say():
    tiles_NHW3 = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3), dtype=np.uint8)
    density = -np.log((tiles_NHW3[1] + 1.0) / 256)
    grey = density.mean(2)
    steps = np.concatenate([np.abs(grey[1:] - grey[:-1]).ravel(), np.abs(grey[:, 1:] - grey[:, :-1]).ravel()])
    found_F = cheap_numbers(tiles_NHW3)[1]
    np.testing.assert_allclose(found_F[:3], density.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(found_F[3:6], density.std((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(found_F[12:14], [steps.mean(), steps.std()], rtol=1e-5)


def own_slide(rng: np.random.Generator, name: str) -> OwnSlide:
    cheap_NF = rng.normal(size=(60, 6))
    return OwnSlide(name, name, 0, cheap_NF, np.maximum(cheap_NF[:, 2], 0), np.zeros((60, 1)), (0,))


def test_a_selector_is_the_network_that_was_fitted_and_survives_its_file(tmp_path: Path, monkeypatch):
    rng, networks, original = np.random.default_rng(1), [], MLPRegressor.fit

    def kept(self: MLPRegressor, x: np.ndarray, y: np.ndarray) -> MLPRegressor:
        networks.append(self)
        return original(self, x, y)

    monkeypatch.setattr(MLPRegressor, "fit", kept)
    slides = [own_slide(rng, str(i)) for i in range(20)]
    selector = fit(slides, 0)
    new = own_slide(rng, "new")
    seen_NF = (new.cheap_NF - selector.mean_F) / selector.std_F
    np.testing.assert_allclose(selector.scores(new.cheap_NF), networks[0].predict(seen_NF), rtol=1e-9)
    assert np.corrcoef(selector.scores(new.cheap_NF), new.worth_N)[0, 1] > 0.9
    with open(tmp_path / "s.npz", "wb") as file:
        selector.save(file)
    again = load_selector(tmp_path / "s.npz")
    assert np.array_equal(again.scores(new.cheap_NF), selector.scores(new.cheap_NF))
    (tmp_path / "s.npz").write_bytes(b"PK half")
    with pytest.raises(SelectorError, match="not a selector of tiles"):
        load_selector(tmp_path / "s.npz")


def test_what_a_tile_is_worth():
    attention_MN = np.array([[0.1, 4.0, 0.5], [0.3, 2.0, 0.5]])
    np.testing.assert_allclose(worth(attention_MN, attention=True), np.log(0.1 + attention_MN.mean(0)))
    np.testing.assert_allclose(worth(np.array([[3.0, 1.0, 2.0, -5.0, 9.0]]), attention=False), [0.5, 0.5, 0, 1, 1])


def test_cheap_numbers_are_of_four_microns_a_pixel(selecting: ModuleType, tmp_path: Path):
    """All of what a slide's tiles look like at that scale, and nothing that is finer."""
    rng = np.random.default_rng(0)
    selecting.paint(tmp_path / "a.tiff", SIDE_PX, False, rng)
    coords_N2 = np.array([(x, y) for y in range(0, 384, 96) for x in range(0, 480, 96)])
    with open_slide(tmp_path / "a.tiff") as slide:
        cheap_NF = look(slide, coords_N2, 96.0)
    assert np.isfinite(cheap_NF).all()
    assert cheap_NF.shape == (20, 3 * 18)
    image_HW3 = selecting.stained(selecting.nuclei((384, 480), 2, 0.12, rng), rng)
    striped_HW3 = image_HW3.copy()
    selecting.striped(striped_HW3, 60, rng)
    assert (np.abs(striped_HW3.astype(int) - image_HW3).max(axis=2) > 0).mean() > 0.05
    small, small_striped = (
        cv2.resize(image, (120, 96), interpolation=cv2.INTER_AREA).astype(int) for image in (image_HW3, striped_HW3)
    )
    assert np.abs(small - small_striped).max() <= 2  # where light grain was cut off at white


def test_a_choice_is_worth_more_than_chance_and_intervals_are_pooled(selecting: ModuleType):
    low_high = selecting.together([(0.01, -0.02, 0.05), (0.03, 0.0, 0.07)])
    assert low_high == pytest.approx((0.02, 0.02 - 0.03 / 2**0.5, 0.02 + 0.04 / 2**0.5))
    row = selecting.Row(0.1, (0.96, 0.95, 0.7), (0.01, 0, 0.02), (0.26, 0.2, 0.3), (0, -0.1, 0.1), (0.9, 0.9))
    lines = selecting.table({"1": row, "2": row})
    assert len(lines) == 5
    assert "| 0.9600 | 0.9500 | 0.7000 | +0.0100 [+0.0000, +0.0200] |" in lines[2]
    assert lines[4].startswith("| mean | 10.0% | 0.9600 |")
    assert "98.96%" in lines[2]


def test_fast_encodes_few_tiles_and_says_what_it_costs(selecting: ModuleType, cohort: Path, tmp_path: Path, capsys):
    run = cohort / "run"
    found = selecting.predicted(run, cohort, "fast", "fast=true", "select.keep=0.4", "select.loss=0.9")
    said = capsys.readouterr().out
    trial = json.loads((run / "fast" / "trial.json").read_text())
    assert found.tiles == 12 * LEAST_TILES  # 0.4 of 20
    assert trial["n_slides"] == 12
    assert trial["tiles"] == pytest.approx(0.4)
    assert trial["loss"] == pytest.approx(trial["auc_all"] - trial["auc_fast"])
    assert "fast=true encodes 40% of the tiles; on 12 slides of the study that members held out this costs" in said
    assert len(found.p) == 12
    header = read_header(cohort / "fast" / "features" / "old000.h5")
    assert header.provenance.extra["tiles_before_choice"] == 20
    assert header.provenance.extra["tiles_chosen_by"].endswith("keep 0.4 random 0.2")
    chosen = {tuple(c) for c in read_coords(cohort / "fast" / "features" / "old000.h5").tolist()}
    assert chosen < {tuple(c) for c in read_coords(cohort / "features" / "old000.h5").tolist()}
    held_out = pd.read_csv(run / "slides.csv")
    p_column = next(name for name in held_out if name in ("p_tumour", "p_1", "p"))
    truth = roc_auc_score(held_out["label"].astype(str).isin(["tumour", "1"]), held_out[p_column])
    assert trial["auc_all"] == pytest.approx(truth)

    text = (run / "fast" / "trial.json").read_text()
    (run / "fast" / "trial.json").write_text(json.dumps(json.loads(text) | {"loss": 0.05, "auc_all": 0.9}))
    arguments = [f"run={run}", f"slides.folder={cohort / 'slides'}", "fast=true", "select.keep=0.4"]
    assert predict([*arguments, f"out={tmp_path / 'refused'}"]) == 2
    assert "more than select.loss=0.003 of the AUC allows. Keep more tiles (select.keep=0.8)" in capsys.readouterr().err
    assert not (tmp_path / "refused" / "features").exists()


def test_fast_needs_slides(cohort: Path, tmp_path: Path, capsys):
    run = cohort / "run"
    with pytest.raises(SystemExit):
        predict([f"run={run}", f"features.folder={cohort / 'features'}", "fast=true"])
    assert "fast=true: chooses tiles of slides to encode" in capsys.readouterr().err
    arguments = [f"run={run}", f"slides.folder={cohort / 'slides'}", "fast=true", "select.keep=0.3"]
    (tmp_path / "empty").mkdir()
    selecting_nothing = [*arguments, f"out={tmp_path / 'none'}", f"select.slides={tmp_path / 'empty'}"]
    assert predict(selecting_nothing) == 2
    said = capsys.readouterr().err
    assert "select.slides=FOLDER" in said or "empty" in said
    with pytest.raises(ConfigError, match=r"tiles\.coords gives the tiles already"):
        load_config(ExtractConfig, ["tiles.coords=x", "tiles.select=y"])
