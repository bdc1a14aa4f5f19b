"""Labelled tiles for fine-tuning: which image, which class, whose, and the one role of each patient. No torch here.

Letters: N tiles, G groups (patients, or slides), C classes, H and W rows and columns, 3 RGB.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from extract.config import ProblemsError, did_you_mean
from extract.finetuning.config import TileData
from extract.room import free_bytes
from extract.slides.hub_tiles import HubTilesError, open_hub_tiles
from extract.slides.images import TILE_SUFFIXES, decoded_tile
from extract.tables import TableError, read_texts

ROLES = ("train", "val", "test")
SPLITS = ("", *ROLES, "unused")
N_DRAWS = 200
"""Random splits looked at; the most balanced one is taken."""
N_READERS = 8
MEMORY_SHARE = 0.25


class TilesError(ProblemsError):
    """The labelled tiles cannot be used."""


@dataclass(frozen=True)
class Tileset:
    """One row a tile: `image` (path), `label`, `group`, `role`. `grouped` is False where no patient is known."""

    table: pd.DataFrame
    classes: tuple[str, ...]
    grouped: bool
    notes: tuple[str, ...] = ()

    @property
    def labels_N(self) -> np.ndarray:
        """Class index of every tile, int64."""
        return np.array([self.classes.index(label) for label in self.table["label"]], dtype=np.int64)

    @property
    def groups_N(self) -> np.ndarray:
        """Group index of every tile, int64."""
        return np.unique(self.table["group"].to_numpy(dtype=str), return_inverse=True)[1]

    def rows(self, role: str) -> np.ndarray:
        """Row numbers of the tiles with this role."""
        return np.flatnonzero((self.table["role"] == role).to_numpy())


# --- reading the table ---------------------------------------------------------------------------------------------


def load_tiles(data: TileData, tile_px: int, seed: int) -> tuple[Tileset, TileImages]:
    """Tiles, classes, roles and pixels, as the config says. Tiles with split `unused` are left out.

    With `data.features` no pixels are read.

    Raises:
        TilesError: the table cannot be read; or everything that is wrong with labels, groups, splits and images.
    """
    decode: Callable[[str], np.ndarray | str] = decoded_tile
    if data.csv or data.folder:
        table, grouped, notes = _from_csv(data) if data.csv else _from_folder(data)
    else:
        table, grouped, notes, decode = _from_hub(data)
    used = table[table["split"] != "unused"].reset_index(drop=True)
    if len(used) < len(table):
        notes = [*notes, f"left out because their split is unused: {len(table) - len(used)} tiles"]
    problems: list[str] = []
    try:
        tiles = with_roles(used, grouped, data, seed)
    except TilesError as error:
        problems += error.problems
    try:
        paths = [] if data.features else used["image"].tolist()
        images = TileImages(paths, tile_px, resize=data.resize, memory_gb=data.memory_gb, decode=decode)
    except TilesError as error:
        problems += error.problems
    _raise_if(problems)
    return replace(tiles, notes=(*notes, *([] if data.features else same_pixels(tiles, images)))), images


def with_roles(table: pd.DataFrame, grouped: bool, data: TileData, seed: int) -> Tileset:
    """The checked table (image, label, group, split) with a role for every tile.

    Raises:
        TilesError: everything that is wrong with labels, groups and splits.
    """
    found = sorted(set(table["label"]))
    classes = tuple(data.classes or found)
    problems = [
        f"label {name!r}: not among data.classes {list(classes)}{did_you_mean(name, classes)}"
        for name in found
        if name not in classes
    ]
    problems += _repeated_images(table) + _label_problems(table, classes) + _groups_in_two_splits(table)
    _raise_if(problems)
    role_N = assign_roles(table, classes, data.val_fraction, data.test_fraction, seed)
    tiles = Tileset(table.assign(role=role_N).drop(columns="split"), classes, grouped)
    _raise_if(leaks(tiles))
    return tiles


def _from_csv(data: TileData) -> tuple[pd.DataFrame, bool, list[str]]:
    assert data.csv is not None
    try:
        raw = read_texts(data.csv)
    except TableError as error:
        raise TilesError("the tiles cannot be read", error.problems) from None
    columns = list(raw.columns)
    group = data.group
    if group == "auto":
        group = next((c for c in ("patient", "slide") if c in raw), "patient")
    wanted = {"data.image": data.image, "data.label": data.label} | ({} if group == "file" else {"data.group": group})
    hint = ". Without patients or slides, data.group=file splits tile by tile, which leaks"
    _raise_if(
        f"{data.csv}: no column {name!r} ({key}){did_you_mean(name, columns)}. It has: {', '.join(columns)}"
        + (hint if key == "data.group" else "")
        for key, name in wanted.items()
        if name not in raw
    )
    root = data.folder or data.csv.parent
    text = {name: raw[name].str.strip() for name in raw}
    empty = pd.Series("", index=raw.index)
    table = pd.DataFrame(
        {
            "image": [str(root / name) for name in text[data.image]],
            "label": text[data.label],
            "group": text[data.image] if group == "file" else text[group],
            "split": text.get(data.split, empty).str.lower(),
        }
    )
    problems = [
        f"{data.csv}: row {row + 2} has no {what}"
        for what in ("label", "group")
        for row in np.flatnonzero((table[what] == "").to_numpy())
    ]
    problems += [
        f"{data.csv}: row {row + 2}: split {split!r}, expected train, val, test, unused or empty"
        for row, split in enumerate(table["split"])
        if split not in SPLITS
    ]
    _raise_if(problems)
    return table, group != "file", []


def _from_folder(data: TileData) -> tuple[pd.DataFrame, bool, list[str]]:
    """`FOLDER/class/*.png`, or `FOLDER/split/class/*.png` with the splits named in data.splits or train, val, test."""
    root = data.folder
    assert root is not None
    if not root.is_dir():
        raise TilesError("the tiles cannot be read", [f"data.folder={root}: no such folder"])
    splits: dict[str, str] = dict(data.splits) or {name: name for name in ROLES if (root / name).is_dir()}
    absent = [name for name in splits if not (root / name).is_dir()]
    there = _folders(root)
    _raise_if(
        f"data.splits.{name}: no folder {root / name}{did_you_mean(name, [p.name for p in there])}" for name in absent
    )
    rows, others, unmatched = [], Counter[str](), []
    for split, top in [(s, root / name) for name, s in splits.items()] or [("", root)]:
        for class_folder in _folders(top):
            for path in sorted(p for p in class_folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
                if path.suffix.lower() not in TILE_SUFFIXES:
                    others[path.suffix.lower() or path.name] += 1
                    continue
                group, known = _group_of(path, root, data.group_pattern)
                unmatched += [] if known else [path.name]
                rows.append((str(path), class_folder.name, group, split))
    suffixes = ", ".join(TILE_SUFFIXES)
    problems = [] if rows else [f"data.folder={root}: no images ({suffixes}) in one subfolder a class"]
    if unmatched:
        problems.append(
            f"data.group_pattern={data.group_pattern}: does not match {len(unmatched)} names: {_some(unmatched)}"
        )
    if rows and data.group_pattern is None and data.group != "file":
        problems.append(
            f"data.folder={root}: folders do not say which patient a tile is of, and tiles of one patient must stay "
            "together. Set data.group_pattern to a regular expression on the file names, use data.csv with a patient "
            "or slide column, or accept with data.group=file that val (and test, if it is drawn) shares patients"
        )
    _raise_if(problems)
    notes = [f"{n} files *{name} in {root} are no images and were passed over" for name, n in others.items()]
    table = pd.DataFrame(rows, columns=["image", "label", "group", "split"])
    return table, data.group_pattern is not None, notes


def _from_hub(
    data: TileData,
) -> tuple[pd.DataFrame, bool, list[str], Callable[[str], np.ndarray | str]]:
    """Parquet files of the hub, each of whose splits is one of ours."""
    assert data.hub is not None
    splits = {name: role for name, role in data.hub_splits.items() if role != "unused"}
    try:
        tiles = open_hub_tiles(data.hub, data.revision, data.root, list(splits))
    except HubTilesError as error:
        raise TilesError("the tiles cannot be had", list(error.args)) from None
    if data.group_pattern is None and data.group != "file":
        raise TilesError(
            "the tiles cannot be used",
            [
                f"data.hub={data.hub}: does not say which patient a tile is of. Set data.group_pattern to a regular "
                "expression on the images' names, or accept with data.group=file that val shares patients"
            ],
        )
    pattern = data.group_pattern
    groups = [(re.search(pattern, path) or [None, ""])[1] for path in tiles.paths] if pattern else tiles.names
    unmatched = [path for path, group in zip(tiles.paths, groups, strict=True) if not group]
    _raise_if(
        [f"data.group_pattern={pattern}: does not match {len(unmatched)} names: {_some(unmatched)}"]
        if unmatched
        else []
    )
    roles = [splits[split] for split in tiles.splits]
    table = pd.DataFrame({"image": tiles.names, "label": tiles.labels, "group": groups, "split": roles})
    return table, pattern is not None, tiles.notes, tiles.decoded


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _group_of(path: Path, root: Path, pattern: str | None) -> tuple[str, bool]:
    if pattern is None:
        return str(path.relative_to(root)), True
    found = re.search(pattern, path.name)
    return (found[1], True) if found and found[1] else ("", False)


# --- what can be wrong ---------------------------------------------------------------------------------------------


def _repeated_images(table: pd.DataFrame) -> list[str]:
    labels = table.groupby("image")["label"].agg(["size", "nunique"])
    problems = [
        f"{image}: listed {row['size']} times" + (", with different labels" if row["nunique"] > 1 else "")
        for image, row in labels[labels["size"] > 1].iterrows()
    ]
    return problems


def _label_problems(table: pd.DataFrame, classes: Sequence[str]) -> list[str]:
    """Fewer than two classes, or splits that do not hold the same ones."""
    empty = [name for name in classes if name not in set(table["label"])]
    problems = [f"class {name!r}: no tiles" for name in empty]
    if len(classes) < 2:
        problems.append(f"expected at least two classes, got {list(classes)}")
    to_train = table[table["split"].isin(["", "train"])]
    if to_train.empty:
        return [*problems, "no tile is left to train on: every row has split val or test"]
    trained = set(to_train["label"])
    for split in ("val", "test"):
        here = set(table["label"][table["split"] == split])
        if not here:
            continue
        unknown, absent = sorted(here - trained), sorted(trained - here)
        if unknown or absent:
            problems.append(
                f"labels differ between splits: {split}"
                + (f" has {unknown}, which train has not" if unknown else "")
                + (" and" if unknown and absent else "")
                + (f" lacks {absent}, which train has" if absent else "")
                + ". Name classes alike, or leave a class out (unused)"
            )
    return problems


def _groups_in_two_splits(table: pd.DataFrame) -> list[str]:
    return _in_two(table[table["split"] != ""], "split")


def leaks(tiles: Tileset) -> list[str]:
    """Groups with more than one role: there must be none."""
    return _in_two(tiles.table, "role")


def _in_two(table: pd.DataFrame, column: str) -> list[str]:
    found = table.groupby("group")[column].unique()
    return [f"patient or slide {g!r} is in {' and '.join(sorted(v))}" for g, v in found.items() if len(v) > 1]


# --- roles ---------------------------------------------------------------------------------------------------------


def assign_roles(
    table: pd.DataFrame, classes: Sequence[str], val_fraction: float, test_fraction: float, seed: int
) -> np.ndarray:
    """The role of every tile (text), one for all tiles of a group.

    A given val or test stays. If there is no val, or no test, part of the other groups becomes it. Groups are
    drawn class by class (a group counts for its rarest class), and of `N_DRAWS` such draws the one is taken that has
    every class in every role and the most even shares of tiles. Depends on the seed and the groups' names, not on the
    order of rows. (scikit-learn's StratifiedGroupKFold balances tiles greedily and promises no class in each role.)

    Raises:
        TilesError: a class has too few groups.
    """
    order_N = np.lexsort((table["image"], table["group"]))
    split_N = table["split"].to_numpy(dtype=str)[order_N]
    label_N = table["label"].map(list(classes).index).to_numpy()[order_N]
    group_N = table["group"].to_numpy(dtype=str)[order_N]
    role_N = split_N.astype(object)
    fractions = {
        role: fraction
        for role, fraction in (("val", val_fraction), ("test", test_fraction))
        if not (split_N == role).any()
    }
    taken = set(group_N[np.isin(split_N, ["val", "test"])])
    free_N = (split_N == "") | (split_N == "train")
    free_N &= ~np.isin(group_N, list(taken))
    role_N[(split_N == "") & ~free_N] = [_role_of(g, group_N, split_N) for g in group_N[(split_N == "") & ~free_N]]
    role_N[free_N] = "train"
    if fractions:
        rng = np.random.default_rng(seed)
        role_N[free_N] = _deal(group_N[free_N], label_N[free_N], fractions, classes, rng)
    back_N = np.empty(len(table), dtype=object)
    back_N[order_N] = role_N
    return back_N


def _role_of(group: str, group_N: np.ndarray, split_N: np.ndarray) -> str:
    """A tile without a split follows the others of its patient."""
    return next(str(s) for s in split_N[group_N == group] if s in ("val", "test"))


def _deal(
    group_N: np.ndarray,
    label_N: np.ndarray,
    fractions: dict[str, float],
    classes: Sequence[str],
    rng: np.random.Generator,
) -> np.ndarray:
    groups, index_N = np.unique(group_N, return_inverse=True)
    counts_GC = np.zeros((len(groups), len(classes)), dtype=np.int64)
    np.add.at(counts_GC, (index_N, label_N), 1)
    needed = 1 + len(fractions)
    roles = ["train", *fractions]
    has_C = (counts_GC > 0).sum(axis=0)
    _raise_if(
        f"class {name!r} has {n} patient{'s' * (n != 1)} or slide{'s' * (n != 1)} "
        f"({_some(groups[counts_GC[:, c] > 0])}), but {', '.join(roles)} need one each, {needed}: "
        "add patients of this class, or leave the class out"
        for c, (name, n) in enumerate(zip(classes, has_C.tolist(), strict=True))
        if 0 < n < needed
    )
    wanted_R = np.array([1 - sum(fractions.values()), *fractions.values()])
    stratum_G = np.where(counts_GC > 0, has_C, np.inf).argmin(axis=1)
    best = (np.inf, np.inf)
    for _ in range(N_DRAWS):
        role_G = _draw(stratum_G, wanted_R, rng)
        counts_RC = np.stack([counts_GC[role_G == r].sum(axis=0) for r in range(needed)])
        share_RC = counts_RC / np.maximum(counts_RC.sum(axis=0), 1)
        missing = int((counts_RC[:, has_C > 0] == 0).sum())
        cost = (missing, float(((share_RC - wanted_R[:, None])[:, has_C > 0] ** 2).sum()))
        if cost < best:
            best, best_G, best_RC = cost, role_G, counts_RC
    _raise_if(
        f"class {classes[c]!r}: no split was found with tiles of it in {roles[r]}; its patients also have other "
        "classes. Give the split in a column, or change data.val_fraction or data.test_fraction"
        for r, c in zip(*np.nonzero(best_RC[:, has_C > 0] == 0), strict=True)
    )
    role_N: np.ndarray = np.array(roles, dtype=object)[best_G[index_N]]
    return role_N


def _draw(stratum_G: np.ndarray, wanted_R: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Role index of every group: of each stratum about the wanted shares, at least one each if there are enough."""
    role_G = np.empty(len(stratum_G), dtype=np.int64)
    for stratum in np.unique(stratum_G):
        members = rng.permutation(np.flatnonzero(stratum_G == stratum))
        n, n_roles = len(members), len(wanted_R)
        if n < n_roles:
            role_G[members] = rng.choice(n_roles, size=n, p=wanted_R)
            continue
        held_R = np.maximum(np.rint(wanted_R[1:] * n).astype(np.int64), 1)
        while held_R.sum() >= n:
            held_R[held_R.argmax()] -= 1
        role_G[members] = np.repeat(np.arange(n_roles), [n - held_R.sum(), *held_R])
    return role_G


# --- pixels --------------------------------------------------------------------------------------------------------


class TileImages:
    """The pixels of all tiles: every image is decoded once here, so that a damaged one is known before training.

    Decoded tiles stay in memory as far as `memory_gb` allows; the rest is read again when it is needed.

    Attributes:
        digests: of every tile's pixels.
    """

    def __init__(
        self,
        paths: Sequence[str],
        tile_px: int,
        *,
        resize: bool = False,
        memory_gb: float | None = None,
        decode: Callable[[str], np.ndarray | str] = decoded_tile,
    ):
        """Decode `paths`: files, or names of which `decode` makes pixels.

        Raises:
            TilesError: all unreadable images and all sizes that are not `tile_px` square.
        """
        self.paths, self.tile_px, self.resize, self.decode = list(paths), tile_px, resize, decode
        budget = memory_gb * 1e9 if memory_gb else MEMORY_SHARE * free_bytes()
        n_kept = min(len(self.paths), int(budget // (tile_px * tile_px * 3)))
        self.kept_NHW3 = np.empty((n_kept, tile_px, tile_px, 3), dtype=np.uint8)
        self.digests: list[bytes] = []
        unreadable: list[str] = []
        sizes: dict[tuple[int, int], list[str]] = {}
        with ThreadPoolExecutor(N_READERS) as pool:
            for start in range(0, len(self.paths), 256):  # in parts: results wait in memory
                part = self.paths[start : start + 256]
                for i, (path, found) in enumerate(zip(part, pool.map(decode, part), strict=True), start):
                    if isinstance(found, str):
                        unreadable.append(f"{path}: {found}")
                        continue
                    sizes.setdefault((found.shape[1], found.shape[0]), []).append(path)
                    self.digests.append(hashlib.blake2b(found.tobytes(), digest_size=16).digest())
                    if i < n_kept and self._fits(found):
                        self.kept_NHW3[i] = self._to_tile(found)
        _raise_if(unreadable + self._size_problems(sizes))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """tiles_NHW3, uint8 RGB, of these row numbers.

        Raises:
            TilesError: an image that could be read before cannot be read any more.
        """
        tiles_NHW3 = np.empty((len(rows), self.tile_px, self.tile_px, 3), dtype=np.uint8)
        kept = rows < len(self.kept_NHW3)
        tiles_NHW3[kept] = self.kept_NHW3[rows[kept]]
        if not kept.all():
            with ThreadPoolExecutor(N_READERS) as pool:
                again = pool.map(self._read_again, [self.paths[i] for i in rows[~kept]])
                tiles_NHW3[~kept] = np.stack(list(again))
        return tiles_NHW3

    def _read_again(self, path: str) -> np.ndarray:
        found = self.decode(path)
        if isinstance(found, str) or not self._fits(found):
            what = found if isinstance(found, str) else f"is {found.shape[1]} x {found.shape[0]} now"
            raise TilesError("a tile has changed during training", [f"{path}: {what}"])
        return self._to_tile(found)

    def _fits(self, image_HW3: np.ndarray) -> bool:
        height_px, width_px = image_HW3.shape[:2]
        return height_px == width_px and (self.resize or height_px == self.tile_px)

    def _to_tile(self, image_HW3: np.ndarray) -> np.ndarray:
        if len(image_HW3) == self.tile_px:
            return image_HW3
        size = (self.tile_px, self.tile_px)
        return np.asarray(Image.fromarray(image_HW3).resize(size, Image.Resampling.BICUBIC))

    def _size_problems(self, sizes: dict[tuple[int, int], list[str]]) -> list[str]:
        wrong = {
            size: paths
            for size, paths in sizes.items()
            if size[0] != size[1] or (not self.resize and size[0] != self.tile_px)
        }
        side = f"{self.tile_px} x {self.tile_px}"
        different = "images of different sizes: " if len(sizes) > 1 else ""
        problems = [
            f"{different}{len(paths)} of {w} x {h} px ({_some(paths, 2)}), but the encoder sees {side}"
            for (w, h), paths in sorted(wrong.items())
        ]
        if problems and all(w == h for w, h in sizes):
            problems[-1] += ". data.resize=true scales them, which also changes their microns per pixel"
        return problems


def same_pixels(tiles: Tileset, images: TileImages) -> list[str]:
    """A note about tiles that are, pixel for pixel, also in another role."""
    role_of: dict[bytes, set[str]] = {}
    for digest, role in zip(images.digests, tiles.table["role"], strict=True):
        role_of.setdefault(digest, set()).add(str(role))
    n_both = sum(len(roles) > 1 for roles in role_of.values())
    if not n_both:
        return []
    return [f"{n_both} tiles are, pixel for pixel, in more than one of train, val and test under other names"]


# --- small helpers -------------------------------------------------------------------------------------------------


def _some(names: Iterable[object], limit: int = 3) -> str:
    listed = [str(n) for n in names]
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")


def _raise_if(problems: Iterable[str]) -> None:
    listed = list(problems)
    if listed:
        raise TilesError("the tiles cannot be used", listed)
