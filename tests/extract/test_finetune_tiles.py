"""Labelled tiles: read from CSV and folders, one role a patient, all problems at once; flips, turns, stain jitter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from extract.config import ConfigError, load_config
from extract.finetuning.augment import HED_33, UNMIX_33, augment, flip_and_turn, jitter_hed
from extract.finetuning.config import Augment, FinetuneConfig, TileData, finetune_problems
from extract.finetuning.tilesets import TileImages, TilesError, assign_roles, leaks, load_tiles, with_roles

SIDE_PX = 8


def image(path: Path, value: int, side_px: int = SIDE_PX) -> Path:
    """A tile of its own colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side_px, side_px), (value % 256, value // 256, 7)).save(path)
    return path


def cohort(folder: Path, rows: list[tuple[str, ...]], columns: str = "image label patient") -> TileData:
    """A CSV with these rows and an image for each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows):
        if not (folder / row[0]).exists():
            image(folder / row[0], number)
    pd.DataFrame(rows, columns=columns.split()).to_csv(folder / "t.csv", index=False)
    return TileData(csv=folder / "t.csv")


def mixed_rows(n_patients: int = 12, seed: int = 0) -> list[tuple[str, ...]]:
    """Patients with one to five tiles of one or two of three classes."""
    rng = np.random.default_rng(seed)
    rows = []
    for p in range(n_patients):
        kinds = rng.choice(3, size=rng.integers(1, 3), replace=False)
        rows += [(f"{p}_{i}.png", "abc"[rng.choice(kinds)], f"p{p}") for i in range(rng.integers(1, 6))]
    return rows


# --- reading and roles ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_patient_has_one_role_and_every_role_has_every_class(tmp_path: Path, seed: int):
    tiles, _ = load_tiles(cohort(tmp_path, mixed_rows(20, seed)), SIDE_PX, seed)
    roles: dict[str, set[str]] = {}
    classes: dict[str, set[str]] = {}
    for row in tiles.table.itertuples():
        roles.setdefault(row.group, set()).add(row.role)
        classes.setdefault(row.role, set()).add(row.label)
    assert all(len(found) == 1 for found in roles.values())
    assert classes == {role: {"a", "b", "c"} for role in ("train", "val", "test")}


def test_the_split_depends_on_seed_and_names_and_not_on_the_order_of_rows(tmp_path: Path):
    table = pd.DataFrame(mixed_rows(), columns=["image", "label", "group"]).assign(split="")
    shuffled = table.sample(frac=1, random_state=3)
    one = table.assign(role=assign_roles(table, "abc", 0.2, 0.2, seed=0)).set_index("image")["role"]
    two = shuffled.assign(role=assign_roles(shuffled, "abc", 0.2, 0.2, seed=0)).set_index("image")["role"]
    assert one.equals(two.loc[one.index])
    others = [assign_roles(table, "abc", 0.2, 0.2, seed=s) for s in range(1, 6)]
    assert any((other != one.to_numpy()).any() for other in others)


def test_shares_are_about_those_asked_for():
    rows = [(f"{p}_{i}", "ab"[p % 2], f"p{p}") for p in range(40) for i in range(3)]
    table = pd.DataFrame(rows, columns=["image", "label", "group"]).assign(split="")
    role_N = assign_roles(table, "ab", val_fraction=0.1, test_fraction=0.25, seed=0)
    assert {r: (role_N == r).sum() for r in ("train", "val", "test")} == {"train": 78, "val": 12, "test": 30}


def test_a_given_split_stays_and_only_val_is_drawn(tmp_path: Path):
    rows = [(f"{p}.png", "ab"[p % 2], f"p{p}", "test" if p >= 8 else ["train", ""][p // 4]) for p in range(12)]
    rows += [("free.png", "a", "p9", ""), ("not.png", "b", "p3", "unused")]
    tiles, images = load_tiles(cohort(tmp_path, rows, "image label slide split"), SIDE_PX, seed=0)
    roles = {Path(row.image).stem: row.role for row in tiles.table.itertuples()}
    assert [p for p in range(12) if roles[str(p)] == "test"] == [8, 9, 10, 11]
    assert roles["free"] == "test", "follows its patient"
    assert "not" not in roles
    assert len(images) == 13
    assert tiles.notes == ("left out because their split is unused: 1 tiles",)
    assert sorted(roles.values()).count("val") == 2


def test_folders_of_classes_below_splits(tmp_path: Path):
    for split, n in (("NCT-100K", 6), ("VAL-7K", 2)):
        for c, name in enumerate(("ADI", "TUM")):
            for i in range(n):
                image(tmp_path / split / name / f"{name}-{i}.tif", 16 * i + c + 512 * n)
    (tmp_path / "NCT-100K" / "ADI" / "Thumbs.db").write_bytes(b"x")
    data = TileData(folder=tmp_path, group="file", splits={"NCT-100K": "train", "VAL-7K": "test"}, val_fraction=0.34)
    tiles, _ = load_tiles(data, SIDE_PX, seed=0)
    assert tiles.classes == ("ADI", "TUM")
    assert not tiles.grouped
    assert tiles.table.groupby(["role", "label"]).size().to_dict() == {
        **{("train", c): 4 for c in tiles.classes},
        **{("val", c): 2 for c in tiles.classes},
        **{("test", c): 2 for c in tiles.classes},
    }
    assert "1 files *.db" in tiles.notes[0]


def test_patients_from_file_names(tmp_path: Path):
    for p in range(6):
        for i in range(2):
            image(tmp_path / "ab"[p % 2] / f"SOB_14-{p}AB_{i}.png", 9 * p + i)
    tiles, _ = load_tiles(TileData(folder=tmp_path, group_pattern=r"_(14-\w+?)_\d+\.png"), SIDE_PX, seed=0)
    assert sorted(set(tiles.table["group"])) == [f"14-{p}AB" for p in range(6)]
    assert not leaks(tiles)
    with pytest.raises(TilesError, match=r"does not match 12 names"):
        load_tiles(TileData(folder=tmp_path, group_pattern="(nothing)"), SIDE_PX, seed=0)
    with pytest.raises(TilesError, match=r"Set data\.group_pattern .* data\.group=file"):
        load_tiles(TileData(folder=tmp_path), SIDE_PX, seed=0)


# --- pixels --------------------------------------------------------------------------------------------------------


def test_tiles_beyond_the_memory_are_read_again_and_equal(tmp_path: Path):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 256, (7, SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    paths = [str(tmp_path / f"{i}.png") for i in range(7)]
    for path, pixels in zip(paths, truth, strict=True):
        Image.fromarray(pixels).save(path)
    some = TileImages(paths, SIDE_PX, memory_gb=3.5 * SIDE_PX * SIDE_PX * 3 / 1e9)
    assert len(some.kept_NHW3) == 3
    rows = np.array([6, 0, 4, 2, 2])
    np.testing.assert_array_equal(some[rows], truth[rows])
    Path(paths[4]).unlink()
    with pytest.raises(TilesError, match=r"changed during training(.|\n)*4\.png: no such file"):
        some[rows]


def test_what_is_transparent_is_glass_and_grey_is_rgb(tmp_path: Path):
    Image.new("RGBA", (SIDE_PX, SIDE_PX), (10, 20, 30, 0)).save(tmp_path / "a.png")
    Image.new("L", (SIDE_PX, SIDE_PX), 77).save(tmp_path / "b.png")
    tiles_NHW3 = TileImages([str(tmp_path / "a.png"), str(tmp_path / "b.png")], SIDE_PX)[np.arange(2)]
    assert np.unique(tiles_NHW3[0]).tolist() == [255]
    assert np.unique(tiles_NHW3[1]).tolist() == [77]


def test_resize_scales_square_images_only(tmp_path: Path):
    paths = [str(image(tmp_path / f"{px}.png", 5, px)) for px in (8, 12)]
    assert TileImages(paths, SIDE_PX, resize=True)[np.arange(2)].shape == (2, SIDE_PX, SIDE_PX, 3)
    Image.new("RGB", (9, 8)).save(tmp_path / "wide.png")
    with pytest.raises(TilesError, match="9 x 8 px"):
        TileImages([*paths, str(tmp_path / "wide.png")], SIDE_PX, resize=True)


def test_the_same_pixels_in_two_roles_are_noted(tmp_path: Path):
    data = cohort(tmp_path, [(f"{p}.png", "ab"[p % 2], f"p{p}") for p in range(12)])
    for p in range(12):
        image(tmp_path / f"{p}.png", p % 2)
    tiles, _ = load_tiles(data, SIDE_PX, seed=0)
    assert tiles.notes == ("2 tiles are, pixel for pixel, in more than one of train, val and test under other names",)


# --- bad input -----------------------------------------------------------------------------------------------------


def problems_of(data: TileData) -> str:
    with pytest.raises(TilesError) as caught:
        load_tiles(data, SIDE_PX, seed=0)
    return str(caught.value)


def test_everything_that_is_wrong_is_told_together(tmp_path: Path):
    rows = [(f"{p}.png", "ab"[p % 2], f"p{p}") for p in range(10)]
    rows += [("c0.png", "c", "q"), ("c1.png", "c", "q"), ("cut.png", "a", "p0"), ("text.png", "a", "p0")]
    rows += [("sixteen.png", "a", "p0"), ("big.png", "b", "p1"), ("gone.png", "b", "p1"), ("5.png", "a", "p5")]
    data = cohort(tmp_path, rows)
    image(tmp_path / "big.png", 3, side_px=12)
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:48])
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(np.zeros((SIDE_PX, SIDE_PX), dtype=np.uint16)).save(tmp_path / "sixteen.png")
    (tmp_path / "gone.png").unlink()
    told = problems_of(data)
    assert f"{tmp_path / '5.png'}: listed 2 times, with different labels" in told
    assert "cut.png: cannot be read as an image" in told
    assert "text.png: cannot be read as an image" in told
    with Image.open(tmp_path / "sixteen.png") as sixteen:
        assert sixteen.mode in ("I;16", "I")  # I where Pillow is old
        assert f"sixteen.png: expected 8-bit RGB, got mode {sixteen.mode}" in told
    assert "gone.png: no such file" in told
    assert "images of different sizes: 1 of 12 x 12 px" in told
    assert "data.resize=true" in told


def test_a_class_with_one_patient(tmp_path: Path):
    rows = [(f"{p}.png", "ab"[p % 2], f"p{p}") for p in range(10)] + [("c0.png", "c", "q"), ("c1.png", "c", "q")]
    data = cohort(tmp_path, rows)
    (tmp_path / "3.png").write_text("no image")
    told = problems_of(data)
    assert "class 'c' has 1 patient or slide (q), but train, val, test need one each, 3" in told
    assert "3.png: cannot be read" in told, "found in the same run"


def test_labels_that_differ_between_splits(tmp_path: Path):
    rows = [(f"{p}.png", "abc"[p % 3], f"p{p}", "train") for p in range(9)]
    rows += [(f"t{p}.png", ["a", "b", "tumour"][p % 3], f"t{p}", "test") for p in range(6)]
    told = problems_of(cohort(tmp_path, rows, "image label patient split"))
    assert "labels differ between splits: test has ['tumour'], which train has not and lacks ['c']" in told


def test_a_patient_in_two_given_splits_is_a_leak(tmp_path: Path):
    rows = [(f"{p}.png", "ab"[p % 2], f"p{p // 2}", "test" if p > 8 else "train") for p in range(16)]
    told = problems_of(cohort(tmp_path, rows, "image label patient split"))
    assert "patient or slide 'p4' is in test and train" in told


def test_columns_cells_and_classes(tmp_path: Path):
    data = cohort(tmp_path, [("0.png", "a", "p")], "image label patient_id")
    assert "no column 'patient' (data.group); did you mean 'patient_id'?" in problems_of(data)
    data = cohort(tmp_path, [("0.png", "", "p", "train"), ("1.png", "a", "", "tset")], "image label patient split")
    told = problems_of(data)
    for needed in ("row 2 has no label", "row 3 has no group", "row 3: split 'tset', expected train"):
        assert needed in told
    rows = [(f"{p}.png", "ab"[p % 2], f"p{p}") for p in range(10)]
    data = cohort(tmp_path, rows).model_copy(update={"classes": ["a", "bb", "c"]})
    told = problems_of(data)
    assert "label 'b': not among data.classes ['a', 'bb', 'c']; did you mean 'bb'?" in told
    one = pd.DataFrame([("x", "a", "p")], columns=["image", "label", "group"]).assign(split="")
    with pytest.raises(TilesError, match="at least two classes"):
        with_roles(one, True, TileData(csv=tmp_path / "t.csv"), 0)
    assert "no such folder" in problems_of(TileData(folder=tmp_path / "nowhere", group="file"))
    assert "no images" in problems_of(TileData(folder=tmp_path, group="file"))
    assert "data.splits.x: no folder" in problems_of(TileData(folder=tmp_path, splits={"x": "train"}))


def test_config_problems_come_together(tmp_path: Path):
    arguments = ["encoder.name=phikn", "data.group_pattern=(", "train.lr=-1", "lora.targets=kv", "mode=lorra"]
    with pytest.raises(ConfigError) as caught:
        load_config(FinetuneConfig, [*arguments, "encoder.compile=true"], also=finetune_problems)
    told = str(caught.value)
    for needed in (
        "phikon",
        "data: no tiles given",
        "not a regular expression",
        "train.lr",
        "lora.targets",
        "did you mean 'lora'",
        "encoder.compile",
    ):
        assert needed in told
    with pytest.raises(ConfigError, match="expected brackets"):
        load_config(FinetuneConfig, ["data.folder=nowhere", "data.group_pattern=abc"], also=finetune_problems)
    for key, what in (("folder", "folder"), ("csv", "file")):
        with pytest.raises(ConfigError, match=rf"data\.{key}=nowhere: no such {what}"):
            load_config(FinetuneConfig, [f"data.{key}=nowhere"], also=finetune_problems)


# --- augmentation --------------------------------------------------------------------------------------------------


def test_flips_and_turns_are_numpys():
    rng = np.random.default_rng(0)
    tiles_NHW3 = rng.integers(0, 256, (8, 5, 5, 3), dtype=np.uint8)
    flip_N, turns_N = np.arange(8) % 2 == 1, np.arange(8) // 2
    got_NHW3 = flip_and_turn(torch.from_numpy(tiles_NHW3), flip_N, turns_N).numpy()
    for got, tile, flip, turns in zip(got_NHW3, tiles_NHW3, flip_N, turns_N, strict=True):
        np.testing.assert_array_equal(got, np.rot90(tile[:, ::-1] if flip else tile, turns))
    assert (
        len(
            {
                got.tobytes()
                for got in flip_and_turn(torch.from_numpy(tiles_NHW3[:1].repeat(8, 0)), flip_N, turns_N).numpy()
            }
        )
        == 8
    )


def test_jitter_is_unmix_change_mix_pixel_by_pixel():
    rng = np.random.default_rng(1)
    tiles_NHW3 = rng.integers(1, 256, (2, 4, 3, 3)).astype(np.float32)
    scale_N3, shift_N3 = rng.uniform(0.8, 1.2, (2, 3)), rng.uniform(-0.1, 0.1, (2, 3))
    got_NHW3 = jitter_hed(
        torch.from_numpy(tiles_NHW3), torch.from_numpy(scale_N3).float(), torch.from_numpy(shift_N3).float()
    )
    stains_33 = HED_33.double().numpy()
    for n, y, x in np.ndindex(2, 4, 3):
        amounts = np.linalg.solve(stains_33.T, -np.log(tiles_NHW3[n, y, x] / 255))
        light = np.exp(-(amounts * scale_N3[n] + shift_N3[n]) @ stains_33)
        np.testing.assert_allclose(got_NHW3[n, y, x].numpy(), 255 * np.clip(light, 0, 1), atol=0.02)


def test_no_jitter_changes_nothing_and_a_seed_says_what_is_done():
    tiles_NHW3 = torch.randint(0, 256, (6, 7, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    still = Augment(flips=False, turns=False, hed=0)
    assert torch.equal(augment(tiles_NHW3, still, [0]), tiles_NHW3.float())
    ones, zeros = torch.ones(6, 3), torch.zeros(6, 3)
    torch.testing.assert_close(jitter_hed(tiles_NHW3.float(), ones, zeros), tiles_NHW3.float(), atol=0.05, rtol=0)
    same = [augment(tiles_NHW3, Augment(), [3, 1, 4]) for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], augment(tiles_NHW3, Augment(), [3, 1, 5]))
    assert same[0].min() >= 0
    assert same[0].max() <= 255
    assert torch.allclose(UNMIX_33 @ HED_33, torch.eye(3), atol=1e-5)
