"""A finished run folder read back: the same members, the logits of its predictions.csv; unusable ones refused."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from mil.results.tables import member_thresholds
from mil.results.trained import CONFIG, METRICS, NEEDED, RunError, bags_of, logits_of, open_run, score_slide
from mil.training.hashes import FILE as HASHES

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture
def copied(studies, tmp_path):
    """A run folder that a test may spoil, without the hashes that would give it away."""
    folder = shutil.copytree(studies("chowder").folder, tmp_path / "run")
    (folder / HASHES).unlink()
    return folder


def refused(folder) -> str:
    with pytest.raises(RunError) as error:
        open_run(folder)
    return str(error.value)


# --- what is in it -------------------------------------------------------------------------------------------------


def test_the_run_folder_says_who_was_trained_on_what(studies):
    study = studies("abmil")
    trained = open_run(study.folder)
    assert (trained.n_members, trained.classes, trained.name) == (6, ("normal", "tumor"), "abmil")
    assert trained.description.features == {
        "encoder": "synthetic",
        "weights_sha256": "none",
        "tile_px": 224,
        "mpp": 0.5,
        "overlap_px": 0,
        "resample": "",
    }
    assert trained.config.train.standardize
    assert trained.aggregator.standardized
    assert not trained.aggregator.training
    assert trained.plan["fold"].tolist() == [0, 0, 1, 1, 2, 2]
    assert trained.roles["slide"].tolist() == study.slides
    assert trained.roles["split"].tolist() == study.split
    assert {"m0", "m5"} <= set(trained.roles.columns)


def test_thresholds_are_those_of_the_report_to_the_last_digit(studies):
    trained = open_run(studies("abmil").folder)
    wanted = member_thresholds(trained.predictions, trained.classes)
    pd.testing.assert_frame_equal(trained.thresholds, wanted, check_index_type=False)
    assert trained.thresholds["origin"].str.contains("val").any()


def test_predictions_are_read_as_text_and_numbers(copied):
    for name in ("predictions.csv", "roles.csv"):
        table = pd.read_csv(copied / name, dtype=str, keep_default_na=False)
        table.loc[table["slide"] == "slide_03", ["slide", "patient", "label"]] = ["NA", "007", ""]
        if name == "predictions.csv":
            table.loc[0, ["logit_0", "p_0", "p_1"]] = ""
        table.to_csv(copied / name, index=False)
    found = open_run(copied).predictions
    rows = found[found["slide"] == "NA"]
    assert len(rows) == 6
    assert set(rows["patient"]) == {"007"}
    assert rows["label"].isna().all()
    assert found["p_1"].dtype == float
    assert np.isnan(found["p_1"][0])


# --- the same numbers ----------------------------------------------------------------------------------------------


def written_logits(trained, slides) -> np.ndarray:
    """(M, S) from predictions.csv."""
    return trained.predictions.pivot_table(index="member", columns="slide", values="logit_0").loc[:, slides].to_numpy()


@pytest.mark.parametrize("name", ["abmil", "chowder", "mean", "max"])
def test_all_members_say_of_every_slide_what_training_wrote_down(name, studies):
    study = studies(name)
    trained = open_run(study.folder)
    seen = []
    logits_MSC = logits_of(trained, bags_of(study.slides, study.tiles), done=seen.append)
    assert sum(seen) == len(study.slides)
    assert logits_MSC.shape == (6, 30, 1)
    np.testing.assert_allclose(logits_MSC[:, :, 0], written_logits(trained, study.slides), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["abmil", "chowder", "max"])
def test_a_slide_alone_gets_the_same_logits_and_a_score_for_every_tile(name, studies):
    study = studies(name)
    trained = open_run(study.folder)
    for index in (0, 29):
        tiles_TD = study.tiles[index]
        found = score_slide(trained, tiles_TD.numpy(), with_scores=True)
        written = written_logits(trained, study.slides)[:, index]
        np.testing.assert_allclose(found.logits_MBC[:, 0, 0], written, rtol=1e-5, atol=1e-6)
        assert found.scores_MT.shape[0] == 6
        assert found.scores_MT.shape[-1] == len(tiles_TD)
        without = score_slide(trained, tiles_TD)
        assert without.scores_MT is None
        assert torch.equal(without.logits_MBC, found.logits_MBC)


def test_long_bags_and_threads_change_nothing(studies):
    """Bags that are used as views, several threads: equal to one slide at a time, single-threaded."""
    trained = open_run(studies("abmil").folder)
    rng = np.random.default_rng(3)
    bags = [torch.from_numpy(rng.normal(size=(n, 6)).astype(np.float16)) for n in (3, 700, 18_000, 257, 1)]
    single = np.concatenate([score_slide(trained, bag).logits_MBC.numpy() for bag in bags], axis=1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = logits_of(trained, bags_of(list("abcde"), bags))
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(together, single, rtol=1e-5, atol=1e-6)


def test_features_of_another_width_are_refused(studies):
    trained = open_run(studies("mean").folder)
    for wrong in (np.zeros((4, 7), np.float16), np.zeros((0, 6), np.float32), np.zeros(6, np.float32)):
        with pytest.raises(ValueError, match=r"expected features \(tiles, 6\)"):
            score_slide(trained, wrong)


# --- what cannot be used -------------------------------------------------------------------------------------------


def test_what_is_no_run_folder(tmp_path, copied):
    assert "no such folder; did you mean 'run'?" in refused(tmp_path / "runn")
    (tmp_path / "empty").mkdir()
    assert "not a run folder (no config.yaml)" in refused(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(tmp_path / "file")
    assert f"run={copied}" in refused(tmp_path), "the folder of several runs"


@pytest.mark.parametrize("name", NEEDED)
def test_a_run_that_was_interrupted_says_how_to_continue(name, copied):
    (copied / name).unlink()
    said = refused(copied)
    assert f"no {name}" in said
    assert f"config={copied / CONFIG} resume=true" in said


def test_a_folder_of_several_aggregators_lists_them(copied, tmp_path):
    top = tmp_path / "both"
    for name in ("abmil", "mean"):
        shutil.copytree(copied, top / name)
    shutil.copy(copied / CONFIG, top)
    said = refused(top)
    assert "several aggregators" in said
    assert f"run={top / 'abmil'}, run={top / 'mean'}" in said
    assert open_run(top / "mean").n_members == 6
    (top / "mean" / METRICS).unlink()
    assert f"config={top / CONFIG} resume=true" in refused(top / "mean"), "training is resumed as a whole"


def test_a_newer_version_is_refused_by_its_number(copied):
    environment = json.loads((copied / "environment.json").read_text())
    for version, refuses in (
        ("0.1.0", False),
        ("0.0.9", False),
        ("unknown", False),
        ("0.10.0.dev1", True),
        ("1.0", True),
    ):
        (copied / "environment.json").write_text(json.dumps(environment | {"slide-mil": version}))
        if refuses:
            assert f"slide-mil {version}, which is newer" in refused(copied)
        else:
            open_run(copied)


def change_json(path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_damage_is_named(copied):
    spoil = {
        "members.safetensors": lambda path: path.write_bytes(path.read_bytes()[:200]),
        "metrics.json": lambda path: change_json(path, thresholds=[{"member": 0, "threshold": 0.5, "origin": ""}]),
        "environment.json": lambda path: path.write_text("{"),
        "plan.csv": lambda path: path.write_text(path.read_text().rsplit("\n", 2)[0]),
        "roles.csv": lambda path: path.write_text(path.read_text().replace("m5", "n5", 1)),
        "config.yaml": lambda path: path.write_text(path.read_text() + "colour: blue\n"),
    }
    for name, change in spoil.items():
        kept = (copied / name).read_bytes()
        change(copied / name)
        said = refused(copied)
        assert str(copied / name) in said, name
        (copied / name).write_bytes(kept)
    open_run(copied)


def test_an_unknown_device_is_refused(studies):
    for name in ("gpu7", "cuda:99"):
        with pytest.raises(RunError, match=f"device={name}"):
            open_run(studies("mean").folder, device=name)
