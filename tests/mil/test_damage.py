"""Damaged run folders: whatever happens to a file, the right result or a refusal that names it; never a traceback."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from extract.cohort import check_cohort
from extract.config import ProblemsError
from extract.digest import sha256_of_file
from mil.compare import main as compare
from mil.predict import main as predict
from mil.prediction.config import PredictConfig
from mil.prediction.likeness import extraction_config, known_facts
from mil.prediction.results import slide_rows
from mil.prediction.slides import patients_in_study
from mil.report.comparison import Run, read_run, refuse_unlike
from mil.report.wording import comparison_table, overview_text, terminal_table
from mil.results.decisions import FILE as DECISIONS
from mil.results.readback import ENVIRONMENT, read_metrics
from mil.results.tables import predictions_table
from mil.results.trained import CONFIG, MEMBERS, NEEDED, open_run, score_slide
from mil.training.hashes import FILE as HASHES
from mil.training.hashes import without_times

READ = (CONFIG, *NEEDED, DECISIONS)
COMPARED = ("metrics.json", "predictions.csv", "plan.csv", "roles.csv")
"""What mil.compare reads."""


pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture
def run(studies, tmp_path) -> Path:
    """A run folder that a test may spoil."""
    return shutil.copytree(studies("mean").folder, tmp_path / "run")


TILES_TD = np.random.default_rng(4).normal(size=(9, 6)).astype(np.float32)


def predict_in_process(folder: Path) -> np.ndarray:
    """What mil.predict and mil.heatmap take from a run folder; the logits of one slide."""
    trained = open_run(folder)
    logits_MBC = score_slide(trained, TILES_TD).logits_MBC.numpy()
    table = pd.DataFrame({"slide": ["slide_02"], "patient": ["p07"], "label": ["tumor"], "split": ["test"]})
    cohort = check_cohort(table.assign(path=None, mpp=np.nan), trained.classes)
    rows = predictions_table(trained.plan, cohort.table, np.full((trained.n_members, 1), "test"), logits_MBC)
    in_study = dict(zip(cohort.table["slide"], patients_in_study(trained, cohort), strict=True))
    slide_rows(trained, cohort, rows, {"slide_02": 9}, in_study)
    made = trained.environment["features"]
    known_facts(trained.description.features, made.get("extraction", {}), made["layout"])
    assert len(trained.predictions) == trained.n_members * 30
    refused(lambda: extraction_config(PredictConfig(), trained, folder, []))  # "synthetic" is no encoder of ours
    return logits_MBC


def compare_in_process(folder: Path, other: Run) -> np.ndarray:
    """What mil.compare takes from a run folder."""
    runs = [read_run("run", folder), other]
    refuse_unlike(runs)
    studies = {one.name: one.metrics for one in runs}
    overview_text(studies)
    comparison_table(studies)
    terminal_table(read_metrics(folder))
    return runs[0].predictions[["logit_0", "p_0", "p_1"]].to_numpy()


def refused(action) -> str:
    """What it was refused with, "" if it was not."""
    try:
        action()
    except ProblemsError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", READ)
def test_without_hashes_damage_is_refused_or_does_no_harm(name, run, studies, mutations, capsys):
    """An older run, whose files are only checked against each other: a message that names a file, or numbers."""
    (run / HASHES).unlink()
    whole = (run / name).read_bytes()
    n_refused = 0
    other = read_run("other", studies("max").folder)
    for number, damaged in enumerate(mutations.mutations(whole, mutations.budget(40), seed=17)):
        (run / name).write_bytes(damaged)
        try:
            said = [refused(lambda: predict_in_process(run))]
            if name in COMPARED:
                said.append(refused(lambda: compare_in_process(run, other)))
        except Exception as error:
            raise AssertionError(f"{name}: mutation {number} of seed 17: {damaged[:300]!r}") from error
        n_refused += any(said)
        assert all(str(run) in text for text in said if "cannot use" in text)
    (run / name).write_bytes(whole)
    assert n_refused > mutations.budget(40) * 0.5, "most of what is read is checked"


def test_with_hashes_every_damage_is_noticed_by_name(run, studies, mutations):
    wanted = predict_in_process(run)
    missed = []
    for seed, name in enumerate((*READ, HASHES)):
        whole = (run / name).read_bytes()
        for number, damaged in enumerate(mutations.mutations(whole, mutations.budget(50), seed)):
            (run / name).write_bytes(damaged)
            said = refused(lambda: open_run(run))
            newer = name == ENVIRONMENT and "newer than this" in said  # its number was hit, which is said first
            harmless = name in (HASHES, ENVIRONMENT) and same_json(damaged, whole)
            if str(run / name) not in said and not newer and not harmless:
                missed.append((name, number))
        (run / name).write_bytes(whole)
    assert not missed
    np.testing.assert_array_equal(predict_in_process(run), wanted)


def same_json(a: bytes, b: bytes) -> bool:
    """White space, dates and durations may change: nothing is lost."""
    try:
        return without_times(json.loads(a)) == without_times(json.loads(b))
    except (ValueError, RecursionError):
        return False


def test_hashes_are_those_of_sha256sum(run):
    said = json.loads((run / HASHES).read_text())
    listed = said["files"]
    assert {*READ, "slides.csv", "patients.csv", "history.csv"} <= {*listed, ENVIRONMENT}
    assert list(said["without_times"]) == [ENVIRONMENT]
    assert not [name for name in listed if "checkpoints" in name or name.startswith("logs")]
    for name, digest in listed.items():
        assert hashlib.sha256((run / name).read_bytes()).hexdigest() == digest == sha256_of_file(run / name)


def test_of_the_environment_times_alone_may_change(run):
    path = run / ENVIRONMENT
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"started": "1999-12-31 23:59:59", "training_seconds": 1e6}))
    open_run(run)
    path.write_text(json.dumps(said | {"seed": 5}))
    assert f"{path}: sha256 " in refused(lambda: open_run(run))


def test_a_list_of_an_earlier_version_has_the_environment_as_it_is(run):
    """It has one list, of whole files, and the digest of that."""
    files = json.loads((run / HASHES).read_text())["files"] | {ENVIRONMENT: sha256_of_file(run / ENVIRONMENT)}
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    (run / HASHES).write_text(json.dumps({"algorithm": "sha256", "files": files, "of_this_list": own}))
    open_run(run)
    text = (run / ENVIRONMENT).read_text()
    (run / ENVIRONMENT).write_text(text.replace('"started": "2', '"started": "3'))
    assert f"{run / ENVIRONMENT}: sha256 " in refused(lambda: open_run(run))


def test_the_commands_refuse_a_changed_run_by_name(run, studies, tmp_path, capsys):
    path = run / MEMBERS
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 4
    path.write_bytes(damaged)
    features = studies("mean").arguments[1]
    assert predict([f"run={run}", features, f"out={tmp_path / 'p'}"]) == 2
    assert f"{path}: sha256 " in capsys.readouterr().err
    assert not (tmp_path / "p").exists()
    table = (run / "predictions.csv").read_text()
    (run / "predictions.csv").write_text(table.replace("0.1", "0.2", 1))
    assert compare([str(run), str(studies("max").folder), f"out={tmp_path / 'c'}"]) == 2
    assert f"{run / 'predictions.csv'}: sha256 " in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_a_run_without_hashes_is_accepted_and_that_is_said_once(run, capsys):
    (run / HASHES).unlink()
    for _ in range(3):
        open_run(run)
    assert capsys.readouterr().err.count(f"{run}: no {HASHES}") == 1


def test_files_that_contradict_each_other_are_refused(run, studies):
    """Each is whole by itself."""
    (run / HASHES).unlink()

    def swap(name: str, change) -> str:
        whole = (run / name).read_text()
        (run / name).write_text(change(whole))
        said = refused(lambda: predict_in_process(run))
        (run / name).write_text(whole)
        return said

    def predictions(change):
        return lambda text: change(pd.read_csv(pd.io.common.StringIO(text))).to_csv(index=False)

    assert "is train for" in swap("roles.csv", lambda t: t.replace("test,test", "test,train", 1))
    assert "the probabilities are not those of the logits" in swap(
        "predictions.csv", predictions(lambda t: t.assign(p_1=t["p_1"].where(t.index != 7, 0.123)))
    )
    assert "patient of 'slide_01' is not as in roles.csv" in swap(
        "predictions.csv", predictions(lambda t: t.assign(patient=t["patient"].where(t["slide"] != "slide_01", "p99")))
    )
    assert "rows are missing" in swap("predictions.csv", predictions(lambda t: t.drop(index=5)))
    assert "init_seed differs" in swap("plan.csv", lambda t: swap_column(t, "init_seed"))
    assert "features of another kind" in swap(
        "environment.json", lambda t: t.replace('"tile_px": 224', '"tile_px": 256')
    )
    assert "is not the last of two classes" in swap(
        "metrics.json", lambda t: t.replace('"positive_class": "tumor"', '"positive_class": "normal"')
    )
    assert not swap("plan.csv", lambda t: t), "and what is whole is not refused"


def swap_column(text: str, name: str) -> str:
    table = pd.read_csv(pd.io.common.StringIO(text))
    return table.assign(**{name: table[name].to_numpy()[::-1]}).to_csv(index=False)
