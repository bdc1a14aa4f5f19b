"""Members of several kinds in one pass: each as if it were alone, to the bit."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from mil.aggregators import AGGREGATORS
from mil.training.module import fit, predict_logits
from mil.training.panel import Panel

TRAIN_MS = np.array([[1, 1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1, 1]], dtype=bool)


def kinds(bags, small_module, name, **train):
    """Two members on two classes, and two on three."""
    found = []
    for n_classes, seed in ((2, 0), (3, 5)):
        labels_S = np.arange(9) % n_classes
        fixed = {"name": name, "n_classes": n_classes, "init_seeds": [seed, seed + 1], "batch_size": 4}
        found.append(small_module(bags, labels_S, TRAIN_MS, **fixed, **train))
    return found


def same_curves(a, b):
    pd.testing.assert_frame_equal(pd.DataFrame(a), pd.DataFrame(b), check_exact=True)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_kind_trains_as_if_it_were_alone(name, bags_of, witness_arrays, small_module):
    bags = bags_of(witness_arrays(9, 1)[0])
    alone, together = (kinds(bags, small_module, name, epochs=2, weight_decay=[0.0, 0.1]) for _ in range(2))
    for module in alone:
        fit(module, progress=False)
    fit(Panel(together), progress=False)
    for one, other, first in zip(alone, together, (0, 2), strict=True):
        assert np.array_equal(*(predict_logits(module, list(range(9))) for module in (one, other)))
        same_curves([row | {"member": row["member"] + first} for row in one.history], other.history)
        assert one.best_epoch_M.tolist() == other.best_epoch_M.tolist() == [2, 2]


def test_a_kind_that_stops_early_stops_alone_and_a_stopped_pass_goes_on(
    bags_of, witness_arrays, small_module, tmp_path
):
    bags, val_MS = bags_of(witness_arrays(9, 1)[0]), ~TRAIN_MS
    more = {"val_MS": val_MS, "select": "best", "patience": 2, "epochs": 9, "metric": "loss", "schedule": "cosine"}
    alone, together, stopped, resumed = (kinds(bags, small_module, "abmil", lr=0.3, **more) for _ in range(4))
    for module in alone:
        fit(module, progress=False)
    fit(Panel(together), progress=False)
    assert len({module.history[-1]["epoch"] for module in alone}) == 2 or alone[0].history[-1]["epoch"] < 9
    for one, other, first in zip(alone, together, (0, 2), strict=True):
        same_curves([row | {"member": row["member"] + first} for row in one.history], other.history)
        assert one.best_epoch_M.tolist() == other.best_epoch_M.tolist()
    panel = Panel(stopped)
    seen = []

    def stop(epoch=panel.on_train_epoch_start):
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        epoch()

    panel.on_train_epoch_start = stop
    with pytest.raises(KeyboardInterrupt):
        fit(panel, tmp_path / "c", tmp_path / "logs", progress=False)
    fit(Panel(resumed), tmp_path / "c", tmp_path / "logs", resume=True, progress=False)
    for one, other in zip(resumed, together, strict=True):
        same_curves(one.history, other.history)
    header = (tmp_path / "logs" / "metrics.csv").read_text().partition("\n")[0].split(",")
    assert {"val_loss/member0", "val_loss/member3", "train_auc/member2"} <= set(header)
