"""A study of two feature folders: against features joined by hand, on new slides, in heatmaps, and fused by logits."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import extract.run
import mil.predict
from extract.features.cache import Provenance, write_features
from extract.features.folder import open_feature_folder
from mil.look.scenes import open_theatre
from mil.results.trained import open_run
from mil.train import main

SLIDES = [f"s{i:02d}" for i in range(30)]
QUICK = [
    "study.folds=2", "train.epochs=2", "train.lr=0.02", "train.accelerator=cpu", "report.bootstrap=0",
    "report.baselines=false", "model.hidden=6", "model.attention=5",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick(no_figures):
    """Small studies, many of them: see conftest.py."""


@dataclass(frozen=True)
class Cache:
    """Two encoders' features of the same slides, each lacking some tiles, and both joined by hand."""

    folder: Path

    @property
    def both(self) -> str:
        return f"features.folder=[{self.folder / 'phikon'},{self.folder / 'uni'}]"

    def arguments(self, name: str) -> list[str]:
        return [f"cohort={self.folder / 'cohort.csv'}", *QUICK, f"out={self.folder / name}"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    folder = tmp_path_factory.mktemp("joined")
    rng = np.random.default_rng(4)
    labels = np.array(["normal", "tumor"])[rng.permutation(np.arange(30) % 2)]
    for slide, label in zip(SLIDES, labels, strict=True):
        xy = np.stack([np.arange(24) % 6, np.arange(24) // 6], axis=1) * 448
        tiles = {"phikon": rng.normal(size=(24, 4)), "uni": rng.normal(size=(24, 5))}
        tiles["phikon"][:4, 0] += 3 * (label == "tumor")
        tiles["uni"][2:6, 1] += 3 * (label == "tumor")
        kept = {"phikon": np.sort(rng.permutation(24)[:20]), "uni": rng.permutation(24)[:21]}
        for name, rows in kept.items():
            made = Provenance(name, f"sha-{name}", 224, 0.5, tile_level0_px=448, slide=slide)
            write_features(folder / name / f"{slide}.h5", tiles[name][rows], xy[rows], made)
        common = [row for row in kept["phikon"] if row in kept["uni"]]
        whole = np.concatenate([tiles["phikon"], tiles["uni"]], axis=1)[common]
        made = Provenance("phikon + uni", "sha-phikon + sha-uni", 224, 0.5, tile_level0_px=448, slide=slide)
        write_features(folder / "hand" / f"{slide}.h5", whole, xy[common], made)
    split = ["test" if i >= 24 else "train" for i in range(30)]
    table = pd.DataFrame({"slide": SLIDES, "patient": SLIDES, "label": labels, "split": split})
    table.to_csv(folder / "cohort.csv", index=False)
    return Cache(folder)


@pytest.fixture(scope="module")
def run(cache) -> Path:
    assert main([*cache.arguments("run"), cache.both, "report.heatmaps=1"]) == 0
    return cache.folder / "run"


def test_features_joined_by_hand_give_the_same_predictions(cache, run):
    hand = [f"features.folder={cache.folder / 'hand'}", "report.heatmaps=0"]
    assert main([*cache.arguments("hand_run"), *hand]) == 0
    found, reference = (pd.read_csv(cache.folder / name / "predictions.csv") for name in ("run", "hand_run"))
    pd.testing.assert_frame_equal(found, reference)
    assert main([*cache.arguments("mapped"), cache.both, "data.memory=mmap", "report.heatmaps=0"]) == 0
    pd.testing.assert_frame_equal(pd.read_csv(cache.folder / "mapped" / "predictions.csv"), found)


def test_provenance_names_each_folder_its_encoder_and_what_was_left_out(run):
    said = json.loads((run / "environment.json").read_text())["features"]
    assert [part["encoder"] for part in said["parts"]] == ["phikon", "uni"]
    assert [part["dim"] for part in said["parts"]] == [4, 5]
    assert said["join"] == "equal"
    left_out = [part["tiles_left_out"] for part in said["parts"]]
    assert left_out[1] - left_out[0] == 30
    assert "2 feature folders joined by equal coordinates" in (run / "report.html").read_text()


def test_new_slides_are_read_with_all_encoders_and_other_folders_are_refused_by_name(cache, run, tmp_path, refused):
    given = [f"run={run}", f"cohort={cache.folder / 'cohort.csv'}", "report.bootstrap=0"]
    out = tmp_path / "new"
    assert mil.predict.main([*given, cache.both, f"out={out}", "known_patients=score"]) == 0
    found = pd.read_csv(out / "members.csv").set_index(["member", "slide"])["logit_0"]
    own = pd.read_csv(run / "predictions.csv").set_index(["member", "slide"])["logit_0"].loc[found.index]
    assert np.allclose(found, own, atol=1e-5)
    phikon, uni = cache.folder / "phikon", cache.folder / "uni"
    said = refused(mil.predict.main, *given, f"features.folder=[{uni},{phikon}]", f"out={tmp_path / 'a'}")
    assert f"number 1, {uni}, is of 'uni'; the study's is of 'phikon'" in said
    assert "the study's encoders in another order" in said
    said = refused(mil.predict.main, *given, f"features.folder={phikon}", f"out={tmp_path / 'b'}")
    assert "expected 2 folders (phikon, uni), in the order in which the study was trained, got 1" in said
    hand = cache.folder / "hand"
    said = refused(mil.predict.main, *given, f"features.folder=[{phikon},{hand}]", f"out={tmp_path / 'c'}")
    assert f"number 2, {hand}, is of 'phikon + uni'; the study's is of 'uni'" in said


def test_heatmaps_are_of_the_joined_tiles(cache, run):
    theatre = open_theatre(open_run(run))
    for features in ((), (cache.folder / "phikon", cache.folder / "uni")):
        theatre = open_theatre(open_run(run), features=features)
        with theatre.scene("s03") as scene:
            hand = open_feature_folder(cache.folder / "hand")
            assert scene.places.coords_N2.tolist() == hand.coords("s03").tolist()
            assert len(scene.scores_N) == len(scene.places.coords_N2)


def test_folders_without_a_tile_in_common_stop_the_study(cache, tmp_path, refused):
    for slide in SLIDES:
        xy = np.stack([np.arange(5), np.zeros(5, int)], axis=1) * 448 + 7
        made = Provenance("uni", "sha-uni", 224, 0.5, tile_level0_px=448, slide=slide)
        write_features(tmp_path / "off" / f"{slide}.h5", np.zeros((5, 5)), xy, made)
    both = f"features.folder=[{cache.folder / 'phikon'},{tmp_path / 'off'}]"
    said = refused(main, *cache.arguments("never"), both)
    assert "no tile in common" in said
    assert "offset (7, 7)" in said


def test_a_new_slide_is_extracted_with_every_encoder_of_the_study(tmp_path):
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("joined_test_slides", Path(__file__).parents[1] / "extract" / "slides.py")
    slides = module_from_spec(spec)
    sys.modules[spec.name] = slides
    spec.loader.exec_module(slides)
    (tmp_path / "slides").mkdir()
    for number in range(4):
        slides.painted_slide(tmp_path / "slides" / f"s{number}.tiff", 901 + 32 * number, 703, seed=number)
    for name in ("test_vit", "test_vit3"):
        encoder = [f"encoder.name=timm:{name}", "encoder.random_weights=true", "encoder.device=cpu", "workers=0"]
        where = [f"slides.folder={tmp_path / 'slides'}", f"out={tmp_path / name}", "features.dtype=float32"]
        assert extract.run.main([*where, *encoder]) == 0
    table = pd.DataFrame({"slide": [f"s{i}" for i in range(4)], "label": list("abab")})
    table.assign(patient=table["slide"], split=["train"] * 3 + ["test"]).to_csv(tmp_path / "c.csv", index=False)
    both = f"features.folder=[{tmp_path / 'test_vit'},{tmp_path / 'test_vit3'}]"
    more = [f"cohort={tmp_path / 'c.csv'}", both, "study.folds=1", "report.heatmaps=0", f"out={tmp_path / 'run'}"]
    assert main([*QUICK, *more]) == 0
    new = [f"run={tmp_path / 'run'}", f"slide={tmp_path / 'slides' / 's3.tiff'}", "extract.workers=0"]
    assert mil.predict.main([*new, f"out={tmp_path / 'new'}", "device=cpu"]) == 0
    found = pd.read_csv(tmp_path / "new" / "members.csv")["logit_0"]
    own = pd.read_csv(tmp_path / "run" / "predictions.csv")
    assert found.tolist() == pytest.approx(own["logit_0"][own["slide"] == "s3"].tolist(), abs=1e-5)
    made = sorted(path.parent.name for path in (tmp_path / "new" / "features").rglob("*.h5"))
    assert made == ["0-timm-test_vit", "1-timm-test_vit3"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("slides.folder=x", "slides.folder: not with several feature folders"),
        ("data.source=quickstart", "features.folder: one folder with data.source=quickstart"),
    ],
)
def test_several_folders_are_read_and_not_made(cache, refused, more, said):
    assert said in refused(main, *cache.arguments("never"), cache.both, more)


# --- fused by logits -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fused(cache) -> Path:
    assert main([*cache.arguments("fused"), cache.both, "features.fuse=logits", "report.bootstrap=20"]) == 0
    return cache.folder / "fused"


def test_fused_predictions_are_the_weighted_logits_of_encoders_trained_alone(cache, fused, run):
    alone = []
    for name, columns in (("phikon", slice(0, 4)), ("uni", slice(4, 9))):
        hand = open_feature_folder(cache.folder / "hand")
        for slide in SLIDES:
            made = Provenance(name, "", 224, 0.5, tile_level0_px=448, slide=slide)
            kept = hand.features(slide)[:, columns], hand.coords(slide)
            write_features(cache.folder / f"only_{name}" / f"{slide}.h5", *kept, made)
        only = [f"features.folder={cache.folder / f'only_{name}'}", "report.heatmaps=0"]
        assert main([*cache.arguments(f"run_{name}"), *only]) == 0
        alone.append(pd.read_csv(cache.folder / f"run_{name}" / "predictions.csv"))
    table = pd.read_csv(fused / "encoders.csv")
    assert table["encoder"].tolist() == ["phikon", "uni"] * 2
    weights = table.pivot_table(index="member", columns="encoder", values="weight")
    found = pd.read_csv(fused / "predictions.csv")
    by_hand = sum(
        found["member"].map(weights[name]) * one["logit_0"] for name, one in zip(("phikon", "uni"), alone, strict=True)
    )
    assert np.allclose(found["logit_0"], by_hand, atol=1e-5)
    block = json.loads((fused / "metrics.json").read_text())["fusion"]
    assert [row["title"] for row in block["rows"]][1:] == ["phikon alone", "uni alone", "columns concatenated"]
    metrics = [json.loads((cache.folder / f"run_{name}" / "metrics.json").read_text()) for name in ("phikon", "uni")]
    metrics.append(json.loads((run / "metrics.json").read_text()))
    for row, one in zip(block["rows"][1:], metrics, strict=True):
        assert row["out_of_fold"]["metric"]["value"] == one["pooled_out_of_fold"]["metrics"]["auc"]["value"]
    assert "Encoders" in (fused / "report.html").read_text()


def test_a_fused_study_predicts_draws_and_is_resumed(cache, fused, tmp_path):
    given = [f"run={fused}", f"cohort={cache.folder / 'cohort.csv'}", "known_patients=score", "report.bootstrap=0"]
    assert mil.predict.main([*given, cache.both, f"out={tmp_path / 'new'}"]) == 0
    found = pd.read_csv(tmp_path / "new" / "members.csv").set_index(["member", "slide"])["logit_0"]
    own = pd.read_csv(fused / "predictions.csv").set_index(["member", "slide"])["logit_0"].loc[found.index]
    assert np.allclose(found, own, atol=1e-5)
    with open_theatre(open_run(fused)).scene("s03") as scene:  # compares with predictions.csv
        assert np.isfinite(scene.scores_N).all()
    assert (
        main([*cache.arguments("fused"), cache.both, "features.fuse=logits", "report.bootstrap=20", "resume=true"]) == 0
    )


def test_fusing_needs_several_folders_and_does_not_go_with_what_has_one_aggregator(cache, refused):
    one = [f"features.folder={cache.folder / 'uni'}", "features.fuse=logits"]
    assert "features.fuse=logits: needs several folders" in refused(main, *cache.arguments("never"), *one)
    both = [cache.both, "features.fuse=logits", "report.permutations=3"]
    assert "report.permutations: not together with features.fuse=logits" in refused(main, *cache.arguments("n"), *both)


def test_other_tasks_fuse_too(cache, tmp_path):
    table = pd.read_csv(cache.folder / "cohort.csv")
    table["label"] = (table["label"] == "tumor") + np.arange(30) / 30
    table.to_csv(tmp_path / "values.csv", index=False)
    more = [f"cohort={tmp_path / 'values.csv'}", "task=regression", cache.both, "features.fuse=logits"]
    assert main([*cache.arguments("never"), *more, "report.encoders=false", f"out={tmp_path / 'run'}"]) == 0
    block = json.loads((tmp_path / "run" / "metrics.json").read_text())["fusion"]
    assert [row["name"] for row in block["rows"]] == ["fused", "alone_0", "alone_1"]
    own = block["rows"][0]["out_of_fold"]["metric"]["value"]
    for row in block["rows"][1:]:
        gap = row["out_of_fold"]["difference"]["difference"]
        assert gap == pytest.approx(own - row["out_of_fold"]["metric"]["value"])
