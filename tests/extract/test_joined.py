"""Several feature folders as one: against a dictionary of places, a slow loop over tiles, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from extract.config import ConfigError, ExtractConfig, Features, load_config
from extract.extraction.work import extract_cohort
from extract.features.cache import Provenance, write_features
from extract.features.errors import CacheError
from extract.features.folder import FeatureFolder, open_feature_folder
from extract.features.joined import JoinedFolder, join_folders, open_features
from mil.training.bags import load_bags


@pytest.fixture
def write(tmp_path) -> Callable[..., FeatureFolder]:
    """`write(name, slides, ...)`: a folder of slides whose tiles are at these places."""

    def make(name: str, slides: dict[str, np.ndarray], dim: int, *, side: float = 448, **made) -> FeatureFolder:
        folder = tmp_path / name
        folder.mkdir()
        for slide, coords_N2 in slides.items():
            rng = np.random.default_rng([len(name), len(coords_N2), dim])
            kind = {"tile_px": 224, "mpp": 0.5, "weights_sha256": f"sha-{name}", **made}
            provenance = Provenance(name, tile_level0_px=side, slide=slide, **kind)
            write_features(folder / f"{slide}.h5", rng.normal(size=(len(coords_N2), dim)), coords_N2, provenance)
        return open_feature_folder(folder)

    return make


def grid(columns: int, rows: int, step: int, start: tuple[int, int] = (0, 0)) -> np.ndarray:
    x, y = np.meshgrid(np.arange(columns), np.arange(rows))
    return np.stack([x.ravel(), y.ravel()], axis=1) * step + start


def some(coords_N2: np.ndarray, seed: int, share: float = 0.7) -> np.ndarray:
    """A part of the tiles, in another order."""
    rng = np.random.default_rng(seed)
    return rng.permutation(coords_N2)[: int(share * len(coords_N2))]


def test_equal_places_are_those_of_a_dictionary_and_what_one_lacks_is_counted(write):
    whole = grid(9, 7, 448, (32, 96))
    a = write("phikon", {"s1": some(whole, 1), "s2": whole}, 3)
    b = write("uni", {"s1": some(whole, 2), "s2": some(whole, 3)}, 5)
    joined = join_folders([a, b], "equal")
    for slide in ("s1", "s2"):
        of_b = {tuple(xy): row for xy, row in zip(b.coords(slide).tolist(), b.features(slide), strict=True)}
        places = [tuple(xy) for xy in a.coords(slide).tolist()]
        rows = [
            np.concatenate([row, of_b[xy]]) for xy, row in zip(places, a.features(slide), strict=True) if xy in of_b
        ]
        assert joined.features(slide).tolist() == np.array(rows).tolist()
        assert joined.coords(slide).tolist() == [list(xy) for xy in places if xy in of_b]
        header = joined.header(slide)
        assert (header.n_tiles, header.dim, header.dtype) == (len(rows), 8, "float16")
    assert header.provenance.encoder == "phikon + uni"
    assert header.provenance.weights_sha256 == "sha-phikon + sha-uni"
    n_joined = [joined.header(slide).n_tiles for slide in ("s1", "s2")]
    assert joined.left_out(["s1", "s2"]) == [44 + 63 - sum(n_joined), 44 + 44 - sum(n_joined)]
    assert f"({44 + 63 - sum(n_joined)} of 107)" in joined.notes(["s1", "s2"])[0]


@pytest.mark.parametrize(("side", "step", "start"), [(896, 896, (0, 0)), (896, 448, (100, -37)), (1000, 900, (31, 17))])
def test_nearest_is_the_coarse_tile_over_the_centre_by_a_slow_loop(write, side, step, start):
    coarse = some(grid(8, 6, step, start), 4, 0.9)
    fine = some(grid(13, 11, 448), 5, 0.9)
    a, b = write("coarse", {"s": coarse}, 2, side=side, mpp=1.0), write("fine", {"s": fine}, 3)
    joined = join_folders([a, b], "nearest")
    expected, places = [], []
    for (x, y), row in zip(fine.tolist(), b.features("s"), strict=True):
        centre = np.array([x + 224, y + 224])
        over = [
            (float(((centre - (corner + side / 2)) ** 2).sum()), i)
            for i, corner in enumerate(coarse)
            if (corner <= centre).all() and (centre < corner + side).all()
        ]
        if over:
            expected.append(np.concatenate([a.features("s")[min(over)[1]], row]))
            places.append([x, y])
    assert 0 < len(expected) < len(fine)
    assert joined.features("s").tolist() == np.array(expected).tolist()  # columns as the folders are given
    assert joined.coords("s").tolist() == places
    assert joined.header("s").provenance.mpp == 0.5


@pytest.mark.parametrize("memory", ["ram", "mmap"])
def test_bags_of_joined_folders_are_the_same_in_memory_and_mapped(write, memory):
    whole = grid(5, 4, 448)
    joined = join_folders([write("a", {"s": some(whole, 1)}, 3), write("b", {"s": some(whole, 2)}, 4)], "equal")
    header = joined.header("s")
    bags = load_bags(joined, ["s"], [header.n_tiles], [header.dtype], header.dim, memory, identities=[header.identity])
    assert torch.equal(bags.features(0), torch.from_numpy(joined.features("s")))
    assert bags.memory == memory


def test_nothing_in_common_says_how_the_grids_differ(write):
    a = write("a", {"s": grid(3, 2, 448)}, 2)
    b = write("b", {"s": grid(3, 2, 448, (10, 5))}, 2)
    with pytest.raises(CacheError, match="no tile in common") as error:
        join_folders([a, b], "equal").header("s")
    said = str(error.value)
    assert (
        "tiles of 224 px at mpp 0.5 (448.0 level-0 px), 6 tiles, step (448, 448), origin (0, 0), offset (0, 0)" in said
    )
    assert "origin (10, 5), offset (10, 5)" in said


def test_tiles_of_another_size_are_not_joined_by_their_corners(write):
    a, b = write("a", {"s": grid(4, 4, 448)}, 2), write("b", {"s": grid(2, 2, 896)}, 2, side=896, mpp=1.0)
    with pytest.raises(CacheError, match=r"448 and 896 level-0 px a side.*features\.join=nearest"):
        join_folders([a, b], "equal").header("s")


def test_a_layout_without_coordinates_is_refused_by_name_and_so_is_a_slide_that_one_lacks(write, tmp_path):
    a = write("a", {"s": grid(3, 2, 448), "t": grid(2, 2, 448)}, 2)
    plain = tmp_path / "clam" / "pt_files"
    plain.mkdir(parents=True)
    torch.save(torch.zeros(6, 4), plain / "s.pt")
    b = open_feature_folder(tmp_path / "clam")
    joined = join_folders([a, b], "equal")
    with pytest.raises(CacheError, match=rf"{b.folder} \(layout {b.layout}\): no coordinates of slide 's'"):
        joined.header("s")
    with pytest.raises(CacheError, match=f"{b.folder}: no features of slide 't'"):
        joined.header("t")
    assert sorted(joined.slides) == ["s", "t"]


def test_two_tiles_at_one_place_are_refused(write):
    twice = np.concatenate([grid(2, 2, 448), grid(1, 1, 448)])
    a, b = write("a", {"s": grid(2, 2, 448)}, 2), write("b", {"s": twice}, 2)
    with pytest.raises(CacheError, match="two tiles at one place"):
        join_folders([a, b], "equal").header("s")


def test_a_list_of_folders_is_read_and_written_as_a_list_and_one_folder_as_before(write):
    a, b = write("a", {"s": grid(2, 2, 448)}, 2), write("b", {"s": grid(2, 2, 448)}, 3)
    features = Features(folder=[a.folder, b.folder])
    assert features.folders == [a.folder, b.folder]
    assert Features(**features.model_dump()) == features
    assert Features(folder=a.folder).model_dump(mode="json")["folder"] == str(a.folder)
    assert isinstance(open_features(features), JoinedFolder)
    assert open_features(Features(folder=a.folder)) == a
    config = load_config(ExtractConfig, [f"features.folder=[{a.folder},{b.folder}]"])
    assert config.features.folders == [Path(a.folder), Path(b.folder)]
    with pytest.raises(ConfigError, match="several feature folders"):
        extract_cohort(config, [])
