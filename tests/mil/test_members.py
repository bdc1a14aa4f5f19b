"""members.safetensors: what was trained comes back, values, options and all."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from mil.aggregators import AGGREGATORS, aggregator_class, options
from mil.aggregators.batch import pack
from mil.aggregators.contract import Aggregator
from mil.training.members import FILE, Description, load_members, n_outputs, save_members

DIM = 7
OPTIONS = {
    "abmil": {"hidden": 6, "attention": 5, "gated": False, "embed_relu": True, "head": (4, 3)},
    "chowder": {"n_top": 3, "n_bottom": 2, "tile_hidden": (6,), "head": (5,)},
    "dsmil": {
        **{"attention": 5, "nonlinear": False, "values": True, "tile_hidden": (4,), "query_hidden": (3,)},
        **{"head": (6, 2), "scaled": False, "one_loss": True, "idle_values": 3},
    },
    "clam_sb": {
        "hidden": 6,
        "attention": 5,
        "dropout": 0.1,
        "n_instances": 2,
        "instance_weight": 0.2,
        "subtyping": True,
    },
    "dtfd": {"hidden": 6, "attention": 5, "gated": False, "pseudo_bags": 2, "distill": "maxs", "end_to_end": True},
    "transmil": {
        "hidden": 6,
        "heads": 2,
        "landmarks": 3,
        "pinv_steps": 4,
        "conv": 5,
        "dropout": 0.2,
        "dense": True,
        "start": "normal",
    },
    "transformer": {
        "hidden": 6,
        "heads": 2,
        "layers": 1,
        "induced": 3,
        "mlp": 8,
        "attention": 5,
        "dropout": 0.2,
    },
    "hipt_mil": {"hidden": 6, "heads": 2, "layers": 1, "mlp": 8, "attention": 5, "dropout": 0.2},
    "evidence": {"concepts": 4, "tile_hidden": (6,)},
    "mean": {"head": (4,)},
    "max": {"head": ()},
}


def described(name: str, classes: list[str], *, standardized: bool) -> Description:
    features = {"encoder": "phikon", "weights_sha256": "ab" * 32, "tile_px": 224, "mpp": 0.5, "overlap_px": 0}
    return Description(name, OPTIONS[name], DIM, classes, [4, 0, 2**62 + 1], standardized, features)


def built(description: Description) -> Aggregator:
    sizes = (DIM, n_outputs(description.classes), description.seeds)
    aggregator: Aggregator = aggregator_class(description.aggregator)(*sizes, **description.options)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in aggregator.parameters():  # as training would leave them, not as seeds make them
            parameter.add_(torch.from_numpy(rng.normal(size=parameter.shape)).float())
    if description.standardized:
        moments = torch.from_numpy(rng.uniform(1, 2, (2, 3, DIM))).float()
        aggregator.standardize(moments[0], moments[1])
    return aggregator.eval()


def logits(aggregator: Aggregator) -> torch.Tensor:
    rng = np.random.default_rng(1)
    bags = [torch.from_numpy(rng.normal(size=(n, DIM)).astype(np.float32)) for n in (4, 1, 9)]
    with torch.no_grad():
        return aggregator(pack(bags, 3)).logits_MBC


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("classes", [["normal", "tumor"], ["a", "b", "c"]], ids=["two", "three"])
@pytest.mark.parametrize("standardized", [False, True])
def test_round_trip(tmp_path, name, classes, standardized):
    description = described(name, classes, standardized=standardized)
    assert set(description.options) == set(options(name))
    aggregator = built(description)
    save_members(tmp_path, description, aggregator.state_dict())
    loaded, its_description = load_members(tmp_path)
    assert torch.equal(logits(loaded), logits(aggregator))
    assert not loaded.training
    plain = {
        name: tuple(value) if isinstance(value, list) else value for name, value in its_description.options.items()
    }
    assert plain == description.options
    for field in ("aggregator", "in_dim", "classes", "seeds", "standardized", "features"):
        assert getattr(its_description, field) == getattr(description, field)


def test_two_classes_have_one_logit_and_more_have_one_each():
    assert [n_outputs(["a", "b"]), n_outputs(("a", "b", "c")), n_outputs(["a", "b", "c", "d"])] == [1, 3, 4]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    description = described("mean", ["a", "b"], standardized=False)
    aggregator = built(description)
    save_members(tmp_path, description, aggregator.state_dict())
    before = (tmp_path / FILE).read_bytes()

    def broken(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("extract.tensors.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        save_members(tmp_path, description, {name: 2 * t for name, t in aggregator.state_dict().items()})
    assert (tmp_path / FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("name", ["abmil", "chowder"])
def test_loaded_members_give_the_logits_of_predictions_csv(studies, name):
    """End to end: what `python -m mil.train` wrote predicts what it said, for every slide and member."""
    study = studies(name)
    predictions = pd.read_csv(study.folder / "predictions.csv")
    aggregator, description = load_members(study.folder)
    assert description.classes == ["normal", "tumor"]
    assert description.standardized
    assert description.features["encoder"] == "synthetic"
    n_members = len(description.seeds)
    with torch.no_grad():
        logits_MB = aggregator(pack(study.tiles, n_members)).logits_MBC[:, :, 0].numpy()
    table = predictions.pivot_table(index="member", columns="slide", values="logit_0")
    assert table.columns.tolist() == study.slides
    np.testing.assert_allclose(logits_MB, table.to_numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(predictions["p_1"], 1 / (1 + np.exp(-predictions["logit_0"])), rtol=1e-6)
    np.testing.assert_allclose(predictions["p_0"] + predictions["p_1"], 1, rtol=1e-6)
