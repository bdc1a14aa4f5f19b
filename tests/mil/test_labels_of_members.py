"""Members with labels of their own in one pass: each as if alone with them.

Axes: M members, S slides, C outputs (1 for two classes).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from mil.aggregators import AGGREGATORS
from mil.aggregators.batch import pack
from mil.training.module import MembersModule, predict_logits

N_SLIDES = 18


@pytest.fixture(scope="module")
def cohort(bags_of, witness_arrays):
    """`cohort(classes)`: bags, labels of three members (the second and third permuted), train_MS and val_MS.

    Slides that a member does not use have no label for it.
    """

    def make(n_classes: int):
        arrays, labels_S = witness_arrays(N_SLIDES, seed=2, n_classes=n_classes, strength=2.0, lengths=(3, 12))
        places_MS = np.stack([np.random.default_rng(m).permutation(N_SLIDES) for m in (0, 0, 1)])
        train_MS, val_MS = places_MS >= 9, (places_MS >= 3) & (places_MS < 9)
        labels_MS = np.stack([labels_S, *(np.random.default_rng(m).permutation(labels_S) for m in (7, 8))])
        return bags_of(arrays), labels_S, np.where(train_MS | val_MS, labels_MS, -1), train_MS, val_MS

    return make


def said(module: MembersModule) -> np.ndarray:
    """Logits; of several classes less their mean, which nothing trains but rounding (softmax does not see it)."""
    logits_MSC = predict_logits(module, list(range(N_SLIDES)))
    return logits_MSC if logits_MSC.shape[2] == 1 else logits_MSC - logits_MSC.mean(axis=2, keepdims=True)


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("name", sorted(AGGREGATORS))
def test_a_member_with_labels_of_its_own_equals_the_member_alone(cohort, trained, name, n_classes):
    bags, labels_S, labels_MS, train_MS, val_MS = cohort(n_classes)
    settings = {
        "name": name,
        "n_classes": n_classes,
        "epochs": 2,
        "class_weights": "balanced",
        "select": "best",
        "metric": "loss",
        "lr": 0.01,
    }
    seeds = [4, 4, 9]  # a permuted member begins as the member that it is compared with
    together = trained(bags, labels_S, train_MS, val_MS, init_seeds=seeds, labels_MS=labels_MS, **settings)
    said_MSC, everyone = said(together), pd.DataFrame(together.history)
    for m in range(3):
        own_S = labels_S if m == 0 else labels_MS[m].clip(min=0)
        alone = trained(bags, own_S, train_MS[[m]], val_MS[[m]], init_seeds=seeds[m : m + 1], **settings)
        np.testing.assert_allclose(said_MSC[m], said(alone)[0], rtol=1e-5, atol=1e-6)
        mine = everyone[everyone["member"] == m].drop(columns="member").reset_index(drop=True)
        pd.testing.assert_frame_equal(mine, pd.DataFrame(alone.history).drop(columns="member"), rtol=1e-5, atol=1e-6)
    assert np.abs(said_MSC[0] - said_MSC[1]).max() > 1e-4, "labels must have a say"


def test_the_same_labels_for_each_member_are_the_labels_of_all_bit_for_bit(cohort, trained):
    bags, labels_S, _, train_MS, val_MS = cohort(2)
    shared = trained(bags, labels_S, train_MS, val_MS, class_weights="balanced")
    each = trained(bags, labels_S, train_MS, val_MS, class_weights="balanced", labels_MS=np.tile(labels_S, (3, 1)))
    for name, stack in shared.aggregator.state_dict().items():
        assert torch.equal(each.aggregator.state_dict()[name], stack), name
    pd.testing.assert_frame_equal(pd.DataFrame(each.history), pd.DataFrame(shared.history))


def test_a_train_or_val_slide_without_a_label_of_the_member_is_refused(cohort, small_module):
    bags, labels_S, labels_MS, train_MS, val_MS = cohort(2)
    used = np.flatnonzero(val_MS[1])[2]
    labels_MS[1, used] = -1
    with pytest.raises(ValueError, match=f"member 1: expected a label .* got none for row {used}"):
        small_module(bags, labels_S, train_MS, val_MS, labels_MS=labels_MS)
    with pytest.raises(ValueError, match=r"expected labels of \(3, 18\), got \(3, 17\)"):
        small_module(bags, labels_S, train_MS, val_MS, labels_MS=labels_MS[:, 1:])


def test_a_batch_takes_the_labels_of_its_members_along():
    batch = replace(pack([torch.ones(2, 3), torch.ones(4, 3)], 2, [0, 1]), labels_MB=torch.tensor([[0, 1], [1, 0]]))
    assert batch.to("meta").labels.device.type == "meta"
    assert batch.to("cpu").labels.tolist() == [[0, 1], [1, 0]]
    assert replace(batch, labels_MB=None).to("cpu").labels.tolist() == [0, 1]
