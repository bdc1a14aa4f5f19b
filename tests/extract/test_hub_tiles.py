"""Labelled tiles in Parquet files of the hub: the shipped commands on files in the form that `datasets` writes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight

from extract.features.cache import read_features, read_names
from extract.finetune import main as finetune
from extract.finetuning.probe import GRID
from extract.finetuning.tuning import FROZEN, KNN
from extract.run import main as extract
from extract.slides.hub_tiles import NCT_CRC_CLASSES, HubTilesError, open_hub_tiles

SIDE_PX = 160
TINY = ["encoder.name=timm:test_vit", "encoder.random_weights=true", "encoder.device=cpu"]
PIXELS: dict[str, np.ndarray] = {}


def picture(name: str, label: int) -> bytes:
    """A tile whose colour says its class, roughly; kept, to compare what is read with it."""
    rng = np.random.default_rng(list(name.encode()))
    base = np.array([25 * label + 20, 240 - 25 * label, 120])
    PIXELS[name] = np.clip(base + rng.normal(0, 25, (SIDE_PX, SIDE_PX, 3)), 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(PIXELS[name]).save(stream, "png" if label % 2 else "tiff")
    return stream.getvalue()


def write_split(root: Path, split: str, labels: list[int], *, shards: int = 1, named: bool = True) -> None:
    """data/SPLIT-0000i-of-0000n-HASH.parquet: image (bytes, path) and label, names of classes in the metadata."""
    features = {"image": {"_type": "Image"}, "label": {"names": list(NCT_CRC_CLASSES), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if named else None
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64())], metadata=metadata)
    (root / "data").mkdir(parents=True, exist_ok=True)
    for shard, part in enumerate(np.array_split(np.arange(len(labels)), shards)):
        rows = [{"bytes": picture(f"{split}{i}", labels[i]), "path": f"p{i // 2}-{i}.tif"} for i in part]
        table = pa.table({"image": rows, "label": [labels[i] for i in part]}, schema=schema)
        path = root / "data" / f"{split}-{shard:05d}-of-{shards:05d}-0123abc.parquet"
        pq.write_table(table, path, row_group_size=7)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nct")
    write_split(folder, "nct_crc_he_1k", [i % 9 for i in range(45)], shards=2)
    write_split(folder, "crc_val_he_7k", [i % 9 for i in range(18)], shards=3)
    write_split(folder, "nct_crc_he_100", [0, 1], named=False)
    return folder


def test_every_tile_is_what_was_written(root: Path):
    tiles = open_hub_tiles("owkin/nct-crc-he", None, root, ["crc_val_he_7k", "nct_crc_he_1k"])
    assert len(tiles.names) == 63
    assert tiles.names[10] == "crc_val_he_7k/BACK/000010"
    assert tiles.paths[10] == "p5-10.tif"
    for name in tiles.names[::-1]:
        split, label, number = name.split("/")
        np.testing.assert_array_equal(tiles.decoded(name), PIXELS[f"{split}{int(number)}"])
        assert label == NCT_CRC_CLASSES[int(number) % 9]
    assert tiles.notes == []
    (note,) = open_hub_tiles("owkin/nct-crc-he", None, root, ["nct_crc_he_100"]).notes
    assert note.startswith("the files do not name their classes: taken for ADI, BACK, DEB")


def test_lora_from_the_shipped_config(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    quick = ["train.epochs=1", "bootstrap=20", "lora.rank=2"]
    assert finetune(["config=nct-crc-lora.yaml", f"data.root={root}", *TINY, *quick]) == 0
    metrics = json.loads((tmp_path / "runs" / "nct-crc-lora" / "metrics.json").read_text())
    assert metrics["classes"] == list(NCT_CRC_CLASSES)
    counts = {role: entry["tiles"] for role, entry in metrics["counts"].items()}
    assert counts == {"train": 36, "val": 9, "test": 18}


def test_probe_and_neighbours_from_cached_features(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert extract(["config=nct-crc.yaml", f"tiles.root={root}", "tiles.max_upsample=3", *TINY, "tiles.mpp=0.5"]) == 0
    cache = tmp_path / "cache" / "nct-crc"
    assert sorted(path.name for path in cache.glob("*.h5")) == ["crc_val_he_7k.h5", "nct_crc_he_1k.h5"]
    monkeypatch.setattr("extract.finetuning.tilesets.TileImages._fits", None)  # no image is looked at
    probe = ["config=nct-crc-lora.yaml", "mode=probe", f"data.root={root}", f"data.features={cache}", "out=run", *TINY]
    assert finetune(probe) == 0
    assert "nearest neighbours" in capsys.readouterr().out
    test = json.loads(Path("run/metrics.json").read_text())["test"]
    assert list(test) == [FROZEN, KNN]
    split = pd.read_csv("run/split.csv").set_index("image")
    features, labels = {}, {}
    for file in cache.glob("*.h5"):
        for name, feature_D in zip(read_names(file) or (), read_features(file).astype(np.float32), strict=True):
            key = f"{file.stem}/{name}"
            features.setdefault(split.role[key], []).append(feature_D)
            labels.setdefault(split.role[key], []).append(name.split("/")[0])
    neighbours = KNeighborsClassifier(20, metric="cosine").fit(features["train"], labels["train"])
    found = accuracy_score(labels["test"], neighbours.predict(features["test"]))
    assert test[KNN]["scores"]["accuracy"]["value"] == pytest.approx(found)
    probes = [
        make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000, class_weight="balanced"))
        for strength in GRID
    ]
    weight = compute_sample_weight("balanced", labels["val"])
    losses = []
    for one in probes:
        p_NC = one.fit(features["train"], labels["train"]).predict_proba(features["val"])
        losses.append(log_loss(labels["val"], p_NC, labels=one.classes_, sample_weight=weight))
    truth = probes[int(np.argmin(losses))].score(features["test"], labels["test"])
    assert test[FROZEN]["scores"]["accuracy"]["value"] == pytest.approx(truth)
    for name in (FROZEN, KNN):
        score = test[name]["scores"]["accuracy"]
        assert score["low"] <= score["value"] <= score["high"]
        assert score["low"] < score["high"]

    (cache / "crc_val_he_7k.h5").unlink()
    assert finetune([*probe, "overwrite=true"]) == 2
    assert "crc_val_he_7k.h5: no such file. Write it with python -m extract.run" in capsys.readouterr().err


def test_files_of_another_form(root: Path, tmp_path: Path):
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"image": [b"x"], "label": [0]}), tmp_path / "data" / "a-0.parquet")
    write_split(tmp_path, "b", [0, 1])
    table = pq.read_table(next((tmp_path / "data").glob("b-*"))).set_column(1, "label", pa.array([0, 12]))
    pq.write_table(table, next((tmp_path / "data").glob("b-*")))
    (tmp_path / "data" / "c-0.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(HubTilesError) as caught:
        open_hub_tiles("x/y", None, tmp_path, ["a", "b", "c"])
    first, second, third = caught.value.args
    assert "expected the columns image (a struct with bytes) and label (an integer), got image: binary" in first
    assert "row 2: label 12, expected 0 to 8" in second
    assert "c-0.parquet" in third
    with pytest.raises(HubTilesError, match=r"expected data/d-\*\.parquet"):
        open_hub_tiles("x/y", None, tmp_path, ["d"])
    write_split(tmp_path, "e", [])
    with pytest.raises(HubTilesError, match=r"^split e: its files hold no tile$"):
        open_hub_tiles("x/y", None, tmp_path, ["e"])
    broken = open_hub_tiles("owkin/nct-crc-he", None, root, ["nct_crc_he_100"])
    broken._groups[(0, 0)] = [b"", b"no image"]
    assert "no bytes" in str(broken.decoded(broken.names[0]))
    assert broken.decoded(broken.names[1]) == (
        "cannot be read as an image (its first bytes are those of no known format)"
    )


def test_extraction_names_its_own_keys_and_prints_few_of_many_failures(root: Path, tmp_path: Path, capsys):
    shared = ["config=nct-crc.yaml", *TINY, f"out={tmp_path / 'made'}"]
    assert extract([*shared, f"tiles.root={tmp_path / 'nowhere'}"]) == 2
    assert f"tiles.root={tmp_path / 'nowhere'}: no such folder" in capsys.readouterr().err
    assert extract([*shared, f"tiles.root={root}", "tiles.mpp=3"]) == 1
    said = capsys.readouterr().err
    assert said.count("failed: nct_crc_he_1k/") == 5
    assert "... and 40 more images of nct_crc_he_1k, in failed.csv" in said
    assert "failed: nct_crc_he_1k (read): 45 of 45 images cannot be used" in said
    assert len(pd.read_csv(tmp_path / "made" / "failed.csv")) == 45 + 18 + 2
