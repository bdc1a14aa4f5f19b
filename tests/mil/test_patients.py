"""Patients as bags: as bags of concatenated features made by hand; views, not copies; which slide a tile is of.

Axes: M members, P patients, S slides, T tiles, D features.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mil.training.bags
from extract.features.folder import open_feature_folder
from mil.aggregators import AGGREGATORS
from mil.training.bags import TrainingSteps, load_bags, make_batch
from mil.training.module import fit, predict_logits
from mil.training.patients import bags_of_patients

SLIDES_P = ((3,), (0, 5, 2), (1, 4), (6, 9), (7,), (8, 10, 11))
"""Slides of one patient need not stand together in the table."""
DIM = 6


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(3)
    return [rng.normal(size=(n, DIM)).astype(np.float16) for n in (4, 11, 3, 7, 30, 2, 5, 9, 3, 6, 8, 13)]


@pytest.fixture
def both(arrays, bags_of):
    """The patients' bags as views of the slides', and as bags of features put together by hand."""
    patients = bags_of_patients(bags_of(arrays, torch.float16), [f"p{i}" for i in range(len(SLIDES_P))], SLIDES_P)
    return patients, bags_of([np.concatenate([arrays[s] for s in own]) for own in SLIDES_P], torch.float16)


def trained_logits(bags, small_module, name, **more):
    labels_P, train_MP = np.array([0, 1, 1, 0, 1, 0]), np.array([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]], dtype=bool)
    module = small_module(bags, labels_P, train_MP, name=name, epochs=2, batch_size=3, **more)
    fit(module, progress=False)
    return predict_logits(module, list(range(len(bags))))


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_patient_is_one_bag_of_all_its_tiles(name, both, small_module, monkeypatch):
    monkeypatch.setattr(mil.training.bags, "VIEW_TILES", 9)  # some patients as views, some copied together
    patients, by_hand = both
    assert np.allclose(*(trained_logits(bags, small_module, name) for bags in (patients, by_hand)), atol=1e-6)


def test_subsets_moments_and_mixed_precision_too(both, small_module, monkeypatch):
    monkeypatch.setattr(mil.training.bags, "VIEW_TILES", 4)
    for more in ({"max_tiles": 7, "standardize": True}, {"precision": "bf16-mixed"}):
        found = [trained_logits(bags, small_module, "abmil", **more) for bags in both]
        assert np.allclose(*found, atol=1e-6), more
    assert np.array_equal(*(bags.means_SD for bags in both))


def test_subsets_are_the_rows_of_all_slides_end_to_end(both):
    patients, by_hand = both
    steps = TrainingSteps(patients, np.zeros(6), np.ones((1, 6), bool), 2, 0, lambda: 3, lambda: np.ones(1, bool), 5)
    for p in range(len(patients)):
        kept = steps.subset(p, 3)
        if kept is not None:
            assert torch.equal(torch.cat(patients.views_of(p, kept)), by_hand.features(p)[kept])


def test_large_patients_are_views_of_their_slides_features(arrays, both, bags_of, monkeypatch):
    monkeypatch.setattr(mil.training.bags, "VIEW_TILES", 9)
    slides = bags_of(arrays)
    patients = bags_of_patients(slides, [f"p{i}" for i in range(len(SLIDES_P))], SLIDES_P)
    batch = make_batch(patients, [1, 0, 2], np.zeros(6, dtype=np.int64), np.ones((1, 3), dtype=bool))
    views = {group.bags_b: group for group in batch.groups}
    assert set(views) == {(0,), (2,), (1,)}
    for b, p in ((0, 1), (2, 2)):
        there = [slides.features(s) for s in SLIDES_P[p]]
        assert [view.data_ptr() for view in views[(b,)].views] == [view.data_ptr() for view in there]
        assert torch.equal(views[(b,)].together(), torch.cat(there))
    assert patients.nbytes == slides.nbytes


def test_memory_mapped_patients_are_the_same(arrays, both, tmp_path, write_study, small_module, monkeypatch):
    monkeypatch.setattr(mil.training.bags, "VIEW_TILES", 9)
    write_study(tmp_path, arrays, np.arange(len(arrays)) % 2, dtype="float16")
    names, lengths = [f"slide_{i:02d}" for i in range(len(arrays))], [len(array) for array in arrays]
    mapped = load_bags(open_feature_folder(tmp_path, "cache"), names, lengths, ["float16"] * 12, DIM, "mmap")
    patients = bags_of_patients(mapped, [f"p{i}" for i in range(len(SLIDES_P))], SLIDES_P)
    assert patients.memory == "mmap"
    found = [trained_logits(bags, small_module, "transmil") for bags in (patients, both[1])]
    assert np.allclose(*found, atol=1e-6)


def test_a_slide_a_patient_is_the_slides_themselves(arrays, bags_of, small_module, monkeypatch):
    monkeypatch.setattr(mil.training.bags, "VIEW_TILES", 9)
    slides = bags_of(arrays[:6])
    patients = bags_of_patients(slides, list("abcdef"), [(s,) for s in range(6)])
    assert np.array_equal(*(trained_logits(bags, small_module, "abmil") for bags in (slides, patients)))
