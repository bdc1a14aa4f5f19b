"""What is found before training: files absent, misnamed, mixed, broken or empty; labels and patients that clash."""

import shutil
import tempfile
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from extract.cohort import Cohort, check_cohort
from extract.config import tell
from extract.features.cache import Provenance, write_features
from extract.features.folder import open_feature_folder
from mil.training.checks import Checked, CheckError, check_features, check_finite, kind_differences, near_names

PHIKON = Provenance("phikon", weights_sha256="a" * 64, tile_px=224, mpp=0.5, tile_level0_px=448.0)


def write(folder: Path, slide: str, *, n: int = 12, dim: int = 6, **changes) -> Path:
    rng = np.random.default_rng(n)
    path = folder / f"{slide}.h5"
    provenance = Provenance(**{**vars(PHIKON), "slide": slide, **changes})
    write_features(path, rng.standard_normal((n, dim)), rng.integers(0, 9999, (n, 2)), provenance)
    return path


def cohort_of(labels: list[str | None], *, patients: list[str] | None = None, **columns) -> Cohort:
    """Slides s00, s01, ... with these labels, each its own patient unless said otherwise."""
    table = pd.DataFrame({"slide": [f"s{i:02d}" for i in range(len(labels))]})
    table["patient"] = patients or [f"p{i}" for i in range(len(labels))]
    table["label"] = pd.Series(labels, dtype=object)
    table["split"], table["path"], table["mpp"] = "train", pd.Series([None] * len(labels), dtype=object), np.nan
    classes = columns.pop("classes", None)
    return check_cohort(table.assign(**columns), classes)


def xy(n: int) -> Cohort:
    return cohort_of(["xy"[i % 2] for i in range(n)])


@pytest.fixture
def folder(tmp_path):
    """Features of s00 .. s07."""
    for i in range(8):
        write(tmp_path / "cache", f"s{i:02d}")
    return tmp_path / "cache"


def check(cohort: Cohort, folder: Path, missing="error", **options) -> Checked:
    return check_features(cohort, open_feature_folder(folder), missing=missing, **options)


def problems_of(cohort: Cohort, folder: Path, missing="error", **options) -> str:
    with pytest.raises(CheckError) as caught:
        check(cohort, folder, missing, **options)
    return "\n".join(caught.value.problems)


# --- table against files -------------------------------------------------------------------------------------------


def test_a_sound_study_passes_without_a_word(folder):
    cohort = xy(8)
    checked = check(cohort, folder, expected_dim=6)
    pd.testing.assert_frame_equal(checked.cohort.table, cohort.table)
    assert list(checked.headers) == cohort.table["slide"].tolist()
    assert {(h.n_tiles, h.dim, h.dtype) for h in checked.headers.values()} == {(12, 6, "float16")}
    assert checked.notes == []
    assert checked.dropped.columns.tolist() == ["slide", "reason"]
    assert len(checked.dropped) == 0


def test_trap_3_slides_without_features_are_never_dropped_in_silence(folder):
    text = problems_of(xy(10), folder)
    assert "2 of 10 slides have no features in" in text
    assert "'s08', 's09'" in text
    checked = check(xy(10), folder, "drop")
    assert checked.dropped.values.tolist() == [["s08", "no features"], ["s09", "no features"]]
    assert checked.cohort.table["slide"].tolist() == [f"s{i:02d}" for i in range(8)]
    assert checked.cohort.table.index.tolist() == list(range(8))
    assert [n for n in checked.notes if "2 slides dropped (checks.missing=drop): 's08', 's09'" in n]


def test_features_without_a_slide_are_noted_with_their_number(folder):
    notes = check(xy(2), folder).notes
    assert len(notes) == 1
    assert "features of 6 slides that the table does not list are not used: 's02', 's03', 's04'" in notes[0]
    assert notes[0].endswith("and 1 more")


@pytest.mark.parametrize(
    ("table", "file"),
    [
        ("slide1", "slide1.svs"),
        ("slide1.ndpi", "slide1"),
        ("Slide_1", "slide-1"),
        ("slide1", "slide001"),
        ("TCGA-83-5908-01Z-00-DX1", "TCGA-83-5908-01Z-00-DX1.381c8f82-61a0"),
        ("TCGA-83-5908-01Z-00-DX1.381C8F82-61a0", "TCGA-83-5908-01Z-00-DX1"),
    ],
)
def test_a_slide_under_another_spelling_is_pointed_out(tmp_path, table, file):
    for i in range(2):
        write(tmp_path, f"s{i:02d}")
    write(tmp_path, file)
    cohort = xy(3)
    renamed = Cohort(cohort.table.assign(slide=["s00", "s01", table]), cohort.classes)
    assert f"slide {table!r} seems to be there as {file!r}" in problems_of(renamed, tmp_path)


def test_near_names_are_not_guessed_when_several_or_none_fit():
    assert near_names(["a1"], ["a01", "a001"]) == {}
    assert near_names(["block.1"], ["block.2"]) == {}
    assert near_names(["a10", "b"], ["a1", "c"]) == {}


def test_a_file_that_belongs_to_another_slide_of_the_table_is_not_suggested(folder):
    cohort = xy(9)
    renamed = Cohort(cohort.table.assign(slide=[*cohort.table["slide"][:8], "S1"]), cohort.classes)
    assert "'S1'" in problems_of(renamed, folder)
    assert "seems to be there" not in problems_of(renamed, folder)


def test_a_long_list_is_whole_and_shortened_where_it_is_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for i in range(57):
        write(tmp_path, f"S{i:02d}", n=1, dim=1)
    with pytest.raises(CheckError) as caught:
        check(xy(57), tmp_path)
    assert len(caught.value.problems) == 1 + 57
    tell(caught.value)
    assert capsys.readouterr().err.count("seems to be there") == 5


def test_a_truncated_file_is_named_and_can_be_dropped(folder):
    path = folder / "s03.h5"
    path.write_bytes(path.read_bytes()[:-100])
    text = problems_of(xy(8), folder)
    assert f"slide 's03': {path}: truncated" in text
    checked = check(xy(8), folder, "drop")
    assert checked.dropped["slide"].tolist() == ["s03"]
    assert "truncated" in checked.dropped["reason"][0]
    assert "s03" not in checked.headers


def test_an_empty_bag_gives_the_reason_that_extraction_recorded(folder):
    write(folder, "s05", n=0, empty_reason="no tissue found at 8 mpp")
    write(folder, "s06", n=0)
    text = problems_of(xy(8), folder)
    assert "s05.h5: no tiles (no tissue found at 8 mpp)" in text
    assert "s06.h5: no tiles (the file does not say why)" in text
    reasons = check(xy(8), folder, "drop").dropped.set_index("slide")["reason"]
    assert "no tissue found" in reasons["s05"]
    assert list(reasons.index) == ["s05", "s06"]


def test_tiny_bags_are_noted(folder):
    write(folder, "s01", n=9)
    write(folder, "s02", n=10)
    (note,) = check(xy(8), folder).notes
    assert note.startswith("1 slide with fewer than 10 tiles, in brackets how many: 's01 (9)'.")


def test_dropping_everything_is_an_error_that_says_why(folder):
    shutil.copytree(folder, folder.parent / "other")
    cohort = cohort_of(["x", "y"])
    strange = Cohort(cohort.table.assign(slide=["u", "v"]), cohort.classes)
    text = problems_of(strange, folder, "drop")
    assert "no slide of the table has usable features" in text
    assert "Not in the table, but there: 's00'" in text


# --- files against each other --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kind", "value", "usual"),
    [
        ({"dim": 5}, "width", "5", "6"),
        ({"encoder": "uni"}, "encoder", "'uni'", "'phikon'"),
        ({"weights_sha256": "b" * 64}, "encoder weights (sha256)", "'bbbbbbbbbbbb'", "'aaaaaaaaaaaa'"),
        ({"tile_px": 256}, "tile_px", "256", "224"),
        ({"mpp": 0.25}, "tile mpp", "0.25", "0.5"),
        ({"overlap_px": 32}, "overlap_px", "'32'", "'0'"),
    ],
)
def test_features_of_two_kinds_are_refused_with_an_example_of_each(folder, changes, kind, value, usual):
    odd = write(folder, "s06", **changes)
    text = problems_of(xy(8), folder)
    assert f"{kind} is {usual} in 7 files, such as {folder / 's00.h5'}; {value} in 1 file, such as {odd}" in text
    assert len(text.splitlines()) == 1
    assert text == problems_of(xy(8), folder, "drop")


def test_a_file_of_another_kind_does_not_matter_when_its_slide_is_not_listed(folder):
    write(folder, "s07", encoder="uni", dim=5)
    assert len(check(xy(7), folder).headers) == 7


def test_what_a_file_does_not_say_is_not_compared_and_mpp_may_differ_in_the_last_digits(folder):
    write(folder, "s00", encoder="", weights_sha256="", tile_px=0, mpp=0.0)
    write(folder, "s01", mpp=0.5 * 1.001)
    assert len(check(xy(8), folder).headers) == 8


def test_width_that_something_else_fixes(folder):
    text = problems_of(xy(8), folder, expected_dim=768)
    assert f"{folder / 's00.h5'}: features have 6 columns, expected 768; it was written by 'phikon'. 8 files" in text


def test_files_without_checksums_are_said_once(folder):
    for slide in ("s02", "s05"):
        with h5py.File(folder / f"{slide}.h5", "r+") as file:
            del file.attrs["checksums"]
    (note,) = check(xy(8), folder).notes
    assert note == (
        "2 of 8 feature files without a checksum (of another tool, or of an older version), damage in which may go "
        "unnoticed: 's02', 's05'"
    )
    unverified = check_features(xy(8), open_feature_folder(folder, verify=False), missing="error")
    assert unverified.notes == ["features were not compared with their checksums (checks.verify=false)"]


def test_a_mixture_of_trident_magnifications_is_refused(tmp_path):
    for i, magnification in enumerate([20, 20, 20, 10]):
        path = tmp_path / "features_uni_v1" / f"s{i:02d}.h5"
        path.parent.mkdir(exist_ok=True)
        with h5py.File(path, "w") as file:
            file["features"] = np.zeros((11, 3), np.float32)
            file["coords"] = np.zeros((11, 2), np.int64)
            file["coords"].attrs.update(patch_size=256, patch_size_level0=512, target_magnification=magnification)
    text = problems_of(xy(4), tmp_path)
    assert "target magnification is 20 in 3 files" in text
    assert "10 in 1 file" in text


# --- labels and patients -------------------------------------------------------------------------------------------


def test_trap_2_patients_in_both_splits_are_named(folder):
    patients = ["a", "b", "c", "d", "a", "b", "e", "f"]
    cohort = cohort_of(list("xyxyxyxy"), patients=patients, split=["train"] * 4 + ["test"] * 4)
    assert "2 patients with slides in the train and in the test split: 'a', 'b'" in problems_of(cohort, folder)


def test_a_patient_with_several_labels_is_noted(folder):
    cohort = cohort_of(list("xyxyxyxy"), patients=["a", "a", "b", "b", "c", "d", "e", "f"])
    notes = check(cohort, folder).notes
    assert len(notes) == 1
    assert "2 patients with slides of different labels, which stay together in one fold: 'a', 'b'" in notes[0]


def test_a_declared_class_without_slides(folder):
    cohort = cohort_of(list("xyxyxyxy"), classes=["x", "y", "z"])
    assert "class 'z' is declared (classes) but no slide has it: 'x' 4, 'y' 4, 'z' 0" in problems_of(cohort, folder)


def test_a_class_that_is_lost_by_dropping(folder):
    cohort = cohort_of([*"xxxxxxxx", "y", "y"])
    text = problems_of(cohort, folder, "drop")
    assert "class 'y'" in text
    assert "no slide has it once 2 slides without usable features are dropped" in text


def test_a_class_of_the_test_split_only(folder):
    cohort = cohort_of(list("xyxyxyxz"), split=["train"] * 6 + ["test"] * 2)
    assert "class 'z' occurs in the test split only" in problems_of(cohort, folder)


def test_one_class_or_no_label_at_all(folder):
    assert "expected slides of at least two classes, got 'x' 8" in problems_of(cohort_of(["x"] * 8), folder)
    assert "no slide of the train split has a label" in problems_of(cohort_of([None] * 8), folder)


def test_slides_without_a_label_are_noted(folder):
    cohort = cohort_of([*"xyxyx", None, None, "y"], split=["train"] * 6 + ["test"] * 2)
    assert check(cohort, folder).notes == [
        "1 slide of the train split without a label, not used: 's05'",
        "1 slide of the test split without a label, predicted, not scored: 's06'",
    ]


def test_everything_that_is_wrong_is_said_in_one_go(folder):
    (folder / "s01.h5").write_bytes(b"not HDF5")
    write(folder, "s02", n=0)
    write(folder, "s03", encoder="uni", dim=7)
    patients = ["a", "b", "c", "d", "e", "f", "g", "a", "h"]
    cohort = cohort_of(list("xxxxxxxxx"), patients=patients, split=["train"] * 6 + ["test"] * 3, classes=["x", "y"])
    text = problems_of(cohort, folder, expected_dim=6)
    for part in ("'s08'", "not an HDF5 file", "no tiles", "width is", "encoder is", "expected 6", "'a'", "class 'y'"):
        assert part in text, part


# --- values --------------------------------------------------------------------------------------------------------


class Arrays:
    """Stands in for mil.bags.Bags."""

    def __init__(self, *bags):
        self.bags = bags

    def features(self, index: int):
        return self.bags[index]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
def test_nan_and_infinity_are_found_wherever_they_are(dtype, convert):
    rng = np.random.default_rng(0)
    for trial in range(40):
        bag_TD = rng.standard_normal((int(rng.integers(1, 30)), 7)).astype(dtype)
        wanted = []
        for value in (np.nan, np.inf, -np.inf):
            if rng.random() < 0.4:
                bag_TD[rng.integers(len(bag_TD)), rng.integers(7)] = value
        bad = [t for t in range(len(bag_TD)) if any(not np.isfinite(v) for v in bag_TD[t])]
        n_nan, n_inf = int(np.isnan(bag_TD).sum()), int(np.isinf(bag_TD).sum())
        if bad:
            wanted = [f"slide 'b': {n_nan} NaN and {n_inf} infinite values in {len(bad)} of {len(bag_TD)} tile"]
        found = check_finite(["a", "b"], Arrays(convert(np.ones((2, 7), dtype)), convert(bag_TD)))
        assert len(found) == len(wanted), trial
        for line, start in zip(found, wanted, strict=True):
            assert line.startswith(start)
            assert f"the first is tile {bad[0]}." in line


def test_large_values_are_not_mistaken_for_infinity():
    """Their sum overflows in float16 and in float32."""
    for dtype in (np.float16, np.float32):
        largest = np.full((300, 5), np.finfo(dtype).max, dtype)
        smallest = np.full((3, 5), np.finfo(dtype).smallest_subnormal, dtype)
        assert check_finite(["a", "b", "c"], Arrays(largest, -largest, -smallest)) == []
    assert check_finite(["a"], Arrays(np.zeros((0, 5), np.float32))) == []


def test_a_fault_in_the_last_tile_of_a_bag_of_many_blocks_is_found():
    bag_TD = np.zeros((5000, 768), np.float16)
    bag_TD[-1, -1] = np.nan
    bag_TD[4000, 3] = np.inf
    expected = "slide 'a': 1 NaN and 1 infinite values in 2 of 5000 tiles, the first is tile 4000."
    assert check_finite(["a"], Arrays(bag_TD))[0].startswith(expected)


def test_columns_cut_from_a_wider_array_are_read_right():
    rows_TD = np.zeros((6, 10), np.float32)
    rows_TD[:, :3] = np.nan
    assert check_finite(["a"], Arrays(rows_TD[:, 3:])) == []


def test_memory_stays_bounded():
    bag_TD = np.ones((20_000, 768), np.float16)  # 31 MB
    tracemalloc.start()
    assert check_finite(["a"], Arrays(bag_TD)) == []
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_all_slides_with_nan_are_listed():
    slides = [f"s{i}" for i in range(30)]
    problems = check_finite(slides, Arrays(*[np.full((1, 2), np.nan, np.float32)] * 30))
    assert len(problems) == 30


# --- kinds of features ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", Provenance("e").same_kind())
def test_every_part_of_a_kind_is_compared(key):
    """In a warm start and for heatmaps; unknown values are not."""
    full = {
        "encoder": "a",
        "weights_sha256": "a" * 64,
        "tile_px": 224,
        "mpp": 0.5,
        "overlap_px": 16,
        "resample": "area",
    }
    other = {"encoder": "b", "weights_sha256": "b" * 64, "tile_px": 256, "mpp": 0.25, "overlap_px": 8}
    other["resample"] = "lanczos"
    short = {"weights_sha256": ("a" * 12, "b" * 12)}.get(key, (full[key], other[key]))
    assert set(full) == set(Provenance("e").same_kind())
    assert kind_differences(full, full | {key: other[key]}) == [(key, *short)]
    for unknown in (type(full[key])(), None):
        assert kind_differences(full, full | {key: unknown}) == kind_differences(full | {key: unknown}, full) == []
    assert kind_differences(full, {name: value for name, value in full.items() if name != key}) == []


def test_microns_per_pixel_that_hardly_differ_are_one_kind():
    assert kind_differences({"mpp": 0.5}, {"mpp": 0.505}) == []
    assert kind_differences({"mpp": 0.5}, {"mpp": 0.52}) == [("mpp", 0.5, 0.52)]
