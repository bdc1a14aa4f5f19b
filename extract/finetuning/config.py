"""Everything `python -m extract.finetune` can be told, and what of it contradicts itself. No torch, no pandas."""

from __future__ import annotations

import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from extract.config import Encoder, Section
from extract.encoders.lora import Lora
from extract.encoders.table import encoder_problems
from extract.stores.looking import is_dir, is_file


class TileData(Section):
    """The labelled tiles: a folder per class, a CSV, or Parquet files of the hub (where neither is set)."""

    folder: Path | None = Field(None, description="one subfolder a class (below splits, if any); or the CSV's images")
    csv: Path | None = Field(None, description="CSV with image, label, patient or slide, and optional split")
    image: str = Field("image", description="CSV column: image file, relative to data.folder or to the CSV")
    label: str = Field("label", description="CSV column: class of the tile")
    group: str = Field(
        "auto", description="CSV column of what stays together; auto: patient, else slide; file: nothing does"
    )
    group_pattern: str | None = Field(None, description="folder: regular expression on file names; group 1 = patient")
    split: str = Field("split", description="CSV column, optional: train, val, test or empty (= decided here)")
    splits: dict[str, Literal["train", "val", "test", "unused"]] = Field(
        {}, description="folder: which of its subfolders is which split, {NAME: train}"
    )
    hub: str | None = Field(
        None, description="Hugging Face dataset of images and labels, where no folder or csv is set"
    )
    revision: str | None = Field(None, description="hub: branch, tag or commit; default: main")
    root: Path | None = Field(None, description="hub: folder with its Parquet files, instead of the network")
    hub_splits: dict[str, Literal["train", "val", "test", "unused"]] = Field(
        {"nct_crc_he_1k": "train", "crc_val_he_7k": "test"}, description="hub: which of its splits is which"
    )
    features: Path | None = Field(
        None, description="mode=probe: features of these tiles that extract.run has written, instead of their images"
    )
    classes: list[str] | None = Field(None, description="class names in the wanted order; default: sorted")
    val_fraction: float = Field(0.15, gt=0, lt=0.5, description="of the groups that have no split, held out as val")
    test_fraction: float = Field(0.2, gt=0, lt=0.5, description="of the groups, held out as test if no split is test")
    resize: bool = Field(False, description="bring square images of another size to the encoder's tile_px")
    memory_gb: float | None = Field(None, gt=0, description="decoded tiles kept in memory; default: a quarter of it")


class Augment(Section):
    """What makes a tile look different every time it is trained on."""

    flips: bool = Field(True, description="mirror at random")
    turns: bool = Field(True, description="turn by 0, 90, 180 or 270 degrees at random")
    hed: float = Field(
        0.05, ge=0, lt=0.5, description="stain jitter: H, E and D times 1 +- this, plus +- this (mild); 0: none"
    )


class Tune(Section):
    """How it learns."""

    epochs: int = Field(20, ge=1, description="at most")
    patience: int = Field(4, ge=1, description="epochs without a lower val loss until it stops")
    batch_size: int = Field(32, ge=1, description="tiles in a step")
    lr: float | None = Field(None, gt=0, description="AdamW's highest learning rate; default: lora 5e-4, full 2e-5")
    head_lr: float = Field(1e-3, gt=0, description="of the linear head")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decoupled weight decay")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="learning rate over the steps")
    warmup: float = Field(0.05, ge=0, lt=1, description="part of the steps in which the learning rate rises")
    class_weights: Literal["balanced", "none"] = Field("balanced", description="balanced: by inverse frequency")
    checkpointing: bool = Field(False, description="recompute activations: less memory, slower")


class FinetuneConfig(Section):
    """Everything `python -m extract.finetune` can be told."""

    mode: Literal["lora", "probe", "full"] = Field("lora", description="lora, linear probe only, or all weights")
    data: TileData = TileData()
    encoder: Encoder = Encoder()
    lora: Lora = Lora()
    augment: Augment = Augment()
    train: Tune = Tune()
    bootstrap: int = Field(1000, ge=0, description="resamples of the groups for the 95 % intervals")
    out: Path | None = Field(None, description="run folder; default: runs/NAME of the config")
    seed: int = Field(0, ge=0, description="of split, adapter, order, augmentation and bootstrap")
    overwrite: bool = Field(False, description="replace the run folder if it exists")


def finetune_problems(tree: dict[str, Any]) -> list[str]:
    """What the sections cannot see by themselves: no tiles, an encoder that cannot be had, a pattern that is none."""
    data = tree.get("data") if isinstance(tree.get("data"), dict) else {}
    assert isinstance(data, dict)
    problems = []
    if not data.get("folder") and not data.get("csv") and not data.get("hub"):
        problems.append(
            "data: no tiles given; set data.folder=FOLDER (one subfolder a class), data.csv=FILE.csv or data.hub=NAME"
        )
    for key in ("folder", "csv", "root", "features"):  # before any weights are downloaded
        exists = is_file if key == "csv" else is_dir
        if data.get(key) and not exists(Path(str(data[key])).expanduser()):
            problems.append(f"data.{key}={data[key]}: no such {'file' if key == 'csv' else 'folder'}")
    if data.get("features") and tree.get("mode") != "probe":
        problems.append("data.features: features are there already, so nothing can be fine-tuned; set mode=probe")
    if data.get("csv") and (data.get("splits") or data.get("group_pattern")):
        problems.append("data.csv: has columns for split and group; data.splits and data.group_pattern are for folders")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # of patterns that will mean something else
            pattern = re.compile(str(data.get("group_pattern") or "()"))
        if not pattern.groups:
            problems.append(f"data.group_pattern={pattern.pattern}: expected brackets around what names the patient")
    except (re.error, FutureWarning) as error:
        problems.append(f"data.group_pattern={data['group_pattern']}: not a regular expression ({error})")
    with suppress(ValidationError):  # which the section itself reports
        encoder = Encoder.model_validate(tree.get("encoder") or {})
        problems += encoder_problems(encoder)
        if encoder.adapter is not None:
            problems.append("encoder.adapter: fine-tuning starts from the encoder itself; leave it out")
        if encoder.compile:
            problems.append("encoder.compile=true: only for extraction; leave it out")
    return problems
