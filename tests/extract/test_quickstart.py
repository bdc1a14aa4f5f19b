"""The embedded cohort: shaped like a slide study, the same every time, written through the cache."""

import shutil

import numpy as np
import pytest

from extract import quickstart
from extract.cohort import read_cohort
from extract.features.cache import read_coords, read_features, read_header
from extract.features.folder import open_feature_folder
from extract.quickstart import make_quickstart, quickstart_slide, quickstart_table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    make_quickstart(folder)
    return folder


def test_the_table_is_a_cohort_with_features(folder):
    cohort = read_cohort(folder / "cohort.csv", classes=["normal", "tumor"])
    features = open_feature_folder(folder)
    assert features.layout == "cache"
    assert set(features.slides) == set(cohort.table["slide"])


def test_it_is_shaped_like_a_slide_study(folder):
    table = read_cohort(folder / "cohort.csv").table
    patients = table.groupby("patient")
    assert patients["slide"].count().max() >= 3, "several slides a patient"
    assert (patients["split"].nunique() == 1).all()
    assert (patients["label"].nunique() == 1).all()
    for split in ("train", "test"):
        share = (table["label"][table["split"] == split] == "tumor").mean()
        assert 0.25 < share < 0.75
    n_tiles = np.array([read_header(folder / f"{slide}.h5").n_tiles for slide in table["slide"]])
    assert n_tiles.max() > 20 * n_tiles.min(), "bags of very unequal size"
    coords_N2 = read_coords(folder / f"{table['slide'][0]}.h5")
    assert len(np.unique(coords_N2, axis=0)) == len(coords_N2)


def test_it_is_the_same_every_time(folder, tmp_path):
    make_quickstart(tmp_path)
    assert (tmp_path / "cohort.csv").read_bytes() == (folder / "cohort.csv").read_bytes()
    for slide in quickstart_table()["slide"][::40]:
        np.testing.assert_array_equal(read_features(tmp_path / f"{slide}.h5"), read_features(folder / f"{slide}.h5"))


def test_a_slides_label_moves_nothing_but_a_few_tiles():
    """The only difference between positive and negative: 1 to 3 % of the tiles, all along one direction."""
    (positive_ND, coords_N2), (negative_ND, same_N2) = (quickstart_slide(3, label) for label in (True, False))
    np.testing.assert_array_equal(coords_N2, same_N2)
    moved_N = (positive_ND != negative_ND).any(axis=1)
    assert 0 < moved_N.mean() <= 0.04
    shift_WD = positive_ND[moved_N] - negative_ND[moved_N]
    assert np.linalg.matrix_rank(shift_WD, tol=1e-3) == 1


def test_a_mean_over_tiles_says_little_and_the_best_tile_says_all(folder):
    """Along the hidden direction itself, so without any training: AUC of the mean tile and of the 99th percentile."""
    from sklearn.metrics import roc_auc_score

    positive_ND, negative_ND = quickstart_slide(3, True)[0], quickstart_slide(3, False)[0]
    shift_ND = positive_ND - negative_ND
    direction_D = shift_ND[np.argmax(np.abs(shift_ND).sum(axis=1))]
    table = read_cohort(folder / "cohort.csv").table
    bags = [read_features(folder / f"{slide}.h5").astype(np.float32) @ direction_D for slide in table["slide"]]
    truth = table["label"] == "tumor"
    best = roc_auc_score(truth, [np.quantile(bag - np.median(bag), 0.99) for bag in bags])
    mean = roc_auc_score(truth, [bag.mean() for bag in bags])
    assert best > 0.85
    assert mean < 0.75
    assert best > mean + 0.15


def test_what_is_there_is_kept_and_what_is_broken_is_made_anew(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "copy")
    names = sorted(path.name for path in folder.glob("*.h5"))
    truncated, absent = tmp_path / "copy" / names[0], tmp_path / "copy" / names[1]
    truncated.write_bytes(truncated.read_bytes()[:-100])
    absent.unlink()
    written = []
    write = quickstart.write_features
    monkeypatch.setattr(
        quickstart, "write_features", lambda path, *rest: (written.append(path.name), write(path, *rest))
    )
    make_quickstart(tmp_path / "copy")
    assert written == names[:2]
    for name in names[:2]:
        np.testing.assert_array_equal(read_features(tmp_path / "copy" / name), read_features(folder / name))
