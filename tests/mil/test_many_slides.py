"""Memory-mapped studies of more slides than files may be open (20,000: benchmarks/mapped.py), or may be mapped."""

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import mil.training.bags
from extract.features.cache import CacheError, Provenance, write_features
from extract.features.folder import open_feature_folder
from extract.features.mapping import MappedArray
from mil.training.bags import Announced, BagsError, MappedViews, load_bags
from mil.training.checks import check_finite

DIM = 5
SWEEP = """
import resource, sys
from pathlib import Path
import torch
from extract.features.folder import open_feature_folder
from mil.training.bags import load_bags

limit, n_slides = int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
folder = open_feature_folder(Path(sys.argv[1]))
slides = [name for name in folder.slides for _ in range(n_slides // len(folder.slides))]  # one map each all the same
bags = load_bags(folder, slides, [3] * len(slides), ["float16"] * len(slides), 5, "mmap")
for _ in range(2):
    total = torch.stack([bags.features(i).float().sum() for i in range(len(bags))]).sum()
held = [bags.features(i) for i in range(len(bags))]
print(len(bags), len({view.data_ptr() for view in held}), float(total))
"""


def truth(slide: int) -> np.ndarray:
    return np.random.default_rng(slide).integers(-40, 40, (3, DIM)).astype(np.float32) / 8


def write(folder: Path, n_slides: int) -> list[str]:
    for slide in range(n_slides):
        write_features(folder / f"s{slide:04d}.h5", truth(slide), np.zeros((3, 2)), Provenance("phikon"))
    return [f"s{slide:04d}" for slide in range(n_slides)]


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_NOFILE")
@pytest.mark.parametrize(("open_files", "n_files", "n_slides"), [(1024, 40, 4_000), (256, 40, 2_000)])
def test_more_slides_than_open_files(tmp_path, open_files, n_files, n_slides):
    """All are used twice and then all are held at once, as by a step of many members."""
    write(tmp_path, n_files)
    command = [sys.executable, "-c", SWEEP, str(tmp_path), str(open_files), str(n_slides)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    n_bags, n_maps, total = done.stdout.split()
    assert (int(n_bags), int(n_maps)) == (n_slides, n_slides)
    assert float(total) == sum(float(truth(slide).sum()) for slide in range(n_files)) * (n_slides // n_files)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] != open_files, "only the subprocess is limited"


class Source:
    """A feature folder that counts how often each slide is opened."""

    def __init__(self, arrays: list[np.ndarray]):
        self.arrays, self.opened = arrays, [0] * len(arrays)

    def features(self, slide: str) -> np.ndarray:
        return self.arrays[int(slide)]

    def mapped(self, slide: str) -> np.ndarray:
        self.opened[int(slide)] += 1
        return self.arrays[int(slide)]

    def identity(self, slide: str) -> str:
        return slide


def views_of(arrays: list[np.ndarray], budget_bytes: float) -> tuple[MappedViews, Source]:
    source = Source(arrays)
    announced = [Announced((len(array), array.shape[1]), str(i)) for i, array in enumerate(arrays)]
    names = [str(i) for i in range(len(arrays))]
    return MappedViews(source, names, announced, sum(a.nbytes for a in arrays), budget_bytes), source


def test_no_more_maps_are_kept_than_the_system_allows(monkeypatch):
    monkeypatch.setattr(mil.training.bags, "MOST_MAPS", 3)
    views, source = views_of([truth(i).view(MappedArray) for i in range(5)], 0)
    for index in (0, 1, 2, 0, 3, 0, 1):  # 3 pushes out 1, the longest unused; 0 stays
        assert torch.equal(views[index], torch.from_numpy(truth(index)))
    assert source.opened == [1, 2, 1, 1, 0]
    assert sorted(views.kept) == [0, 1, 3]
    assert torch.equal(views[-1], torch.from_numpy(truth(4)))
    assert [len(view) for view in views[1:3]] == [3, 3]
    with pytest.raises(IndexError):
        views[5]


def test_what_cannot_be_mapped_is_kept_as_far_as_memory_goes():
    views, source = views_of([truth(i) for i in range(4)], budget_bytes=2 * truth(0).nbytes)
    for index in (0, 1, 0, 2, 0, 1):
        assert torch.equal(views[index], torch.from_numpy(truth(index)))
    assert source.opened == [1, 2, 1, 0]
    assert views.read_bytes == sum(views.read.values()) == 2 * truth(0).nbytes
    alone, _ = views_of([truth(0)], budget_bytes=0)
    assert torch.equal(alone[0], torch.from_numpy(truth(0))), "the one in use is never given up"


def test_maps_are_opened_on_first_use_only(tmp_path):
    slides = write(tmp_path, 2)
    bags = load_bags(open_feature_folder(tmp_path), slides, [3, 3], ["float16"] * 2, DIM, "mmap")
    assert bags.nbytes == 2 * 3 * DIM * 2
    (tmp_path / "s0001.h5").unlink()
    assert torch.equal(bags.features(0), torch.from_numpy(truth(0)).half())
    with pytest.raises(CacheError, match=r"s0001\.h5: no such feature file"):
        bags.features(1)


@pytest.mark.parametrize("memory", ["ram", "mmap"])
def test_files_replaced_after_they_were_checked_are_all_named(tmp_path, memory):
    slides = write(tmp_path, 4)
    folder = open_feature_folder(tmp_path)
    write_features(tmp_path / "s0001.h5", np.ones((2, DIM)), np.zeros((2, 2)), Provenance("phikon"))
    (tmp_path / "s0003.h5").unlink()
    arguments = (folder, slides, [3] * 4, ["float16"] * 4, DIM, memory)
    if memory == "ram":
        with pytest.raises(BagsError) as caught:
            load_bags(*arguments)
        problems = caught.value.problems
    else:
        problems = check_finite(slides, load_bags(*arguments))
    assert len(problems) == 2
    assert "slide 's0001'" in problems[0]
    assert "expected features of shape (3, 5), as it was checked, got (2, 5)" in problems[0]
    assert "s0003.h5: no such feature file" in problems[1]


@pytest.mark.parametrize("memory", ["ram", "mmap"])
@pytest.mark.parametrize("layout", ["cache", "torchmil"])
def test_features_replaced_by_others_of_the_same_shape_are_noticed(tmp_path, memory, layout):
    """Between the check and loading, or first use where they are mapped; of files with checksums and without."""
    if layout == "cache":
        slides = write(tmp_path, 3)
        write_features(tmp_path / "other.h5", np.ones((3, DIM)), np.zeros((3, 2)), Provenance("phikon"))
    else:
        slides = ["s0000", "s0001", "s0002"]
        for i, slide in enumerate([*slides, "other"]):
            np.save(tmp_path / f"{slide}.npy", truth(i).astype(np.float16))
    folder = open_feature_folder(tmp_path, layout)
    headers = [folder.header(slide) for slide in slides]
    identities = [header.identity for header in headers]
    arguments = (folder, slides, [3] * 3, ["float16"] * 3, DIM, memory)
    assert check_finite(slides, load_bags(*arguments, identities=identities)) == []
    mapped = load_bags(*arguments, identities=identities)
    path = folder.path("s0001")
    shutil.copy(folder.path("other"), path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    if memory == "mmap":
        problems = check_finite(slides, mapped)
    else:
        with pytest.raises(BagsError) as caught:
            load_bags(*arguments, identities=identities)
        problems = caught.value.problems
    assert len(problems) == 1
    assert "slide 's0001': its features file was replaced by another one after it was checked" in problems[0]


def test_the_same_features_written_again_are_the_same(tmp_path):
    """With other words of how they were made, at another time."""
    write(tmp_path, 1)
    folder = open_feature_folder(tmp_path)
    before = folder.identity("s0000")
    write_features(tmp_path / "s0000.h5", truth(0), np.zeros((3, 2)), Provenance("phikon", extra={"note": "again"}))
    first = folder.identity("s0000")
    write_features(tmp_path / "s0000.h5", truth(0), np.zeros((3, 2)), Provenance("phikon"))
    assert first == folder.identity("s0000")
    write_features(tmp_path / "s0000.h5", truth(0), np.ones((3, 2)), Provenance("phikon"))
    assert folder.identity("s0000") not in (first, ""), "coordinates count"
    assert before.startswith("xxh3 ")
