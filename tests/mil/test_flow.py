"""Where the slides went, counted another way, and what the encoder has seen."""

from __future__ import annotations

import json
from html import unescape

import pandas as pd
import pytest

from extract.encoders.table import ENCODERS, seen_by
from mil.results.flow import UNREADABLE, kind_of_reason, seen_before
from mil.train import main


def table_of(slides, patients, split="train"):
    return pd.DataFrame({"slide": slides, "patient": patients, "split": split})


def test_every_encoder_says_what_it_was_pretrained_on():
    assert all(spec.pretrained_on for spec in ENCODERS.values())
    assert {name for name, spec in ENCODERS.items() if spec.saw_tcga} == {
        *("phikon", "phikon-v2", "midnight", "lunit-vits8", "h0-mini", "ctranspath", "gpfm"),
        *("kaiko-vits8", "kaiko-vits16", "kaiko-vitb8", "kaiko-vitb16", "kaiko-vitl14"),
    }
    assert seen_by("phikon+adapter") == seen_by("phikon")
    assert seen_by("timm:resnet18") == seen_by("") == (None, None)


@pytest.mark.parametrize(
    ("slide", "patient", "is_tcga"),
    [
        ("TCGA-44-2655-01Z-00-DX1", "p", True),
        ("x", "tcga-44-2655", True),
        ("TCGA-44-26555", "p", False),
        ("test_001", "p", False),
    ],
)
def test_tcga_is_known_by_the_barcode_of_slide_or_patient(slide, patient, is_tcga):
    found = seen_before(table_of([slide, "other"], [patient, "q"], ["test", "train"]), "phikon")
    assert found["tcga"]["slides"] == found["tcga_test"]["slides"] == int(is_tcga)
    assert found["saw_tcga"] is True
    assert seen_before(table_of(["s"], ["p"]), "")["encoder"] is None


def test_reasons_for_leaving_out_have_kinds():
    assert kind_of_reason("no features") == "no feature file"
    assert kind_of_reason("/x/a.h5: no tiles (no tissue)") == "no tiles found"
    assert kind_of_reason("/x/a.h5: not an HDF5 file") == UNREADABLE


def test_the_flow_of_a_study_from_the_table_to_the_page(write_study, witness_arrays, tmp_path):
    arrays, labels_S = witness_arrays(30, seed=8, lengths=(3, 6))
    patients = [f"TCGA-AA-{i // 2:04d}" for i in range(30)]
    split = ["test" if i > 21 else "train" for i in range(30)]
    data = write_study(tmp_path / "f", arrays, labels_S, patients=patients, split=split)
    table = pd.read_csv(tmp_path / "f" / "cohort.csv", dtype={"label": "object"})
    table["label"] = [str(i // 2 % 2) for i in range(30)]
    table.loc[2, "label"] = None
    table.to_csv(tmp_path / "f" / "cohort.csv", index=False)
    (tmp_path / "f" / "slide_04.h5").unlink()
    (tmp_path / "f" / "slide_09.h5").write_bytes(b"no HDF5")
    (tmp_path / "f" / "slide_29.h5").unlink()
    out = tmp_path / "run"
    arguments = ["model.name=mean", "study.folds=2", "train.epochs=1", "train.accelerator=cpu", "report.bootstrap=0"]
    assert main([*data, *arguments, "report.heatmaps=0", "checks.missing=drop", f"out={out}"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    flow = metrics["flow"]
    assert flow["table"] == {"slides": 30, "patients": 15}
    assert {row["why"]: (row["slides"], row["patients"]) for row in flow["left_out"]} == {
        "no feature file": (2, 2),
        UNREADABLE: (1, 1),
    }
    tiles = sum(len(a) for i, a in enumerate(arrays) if i not in (4, 9, 29))
    assert flow["bags"]["slides"] == 27
    assert flow["bags"]["tiles"] == tiles
    assert flow["unlabelled"] == {"slides": 1, "patients": 1}
    assert flow["cross_validated"]["slides"] == 22 - 3
    assert flow["test"] == {"slides": 7, "patients": 4}
    assert flow["roles"]["train"]["most"] + flow["roles"]["test"]["fewest"] == 19
    assert flow["roles"]["val"] == {"fewest": 0, "most": 0}
    page = unescape((out / "report.html").read_text())
    assert "not known here what this encoder was pre-trained on" in page, "synthetic features"
    assert "barcodes of TCGA" in page
    assert (out / "figures" / "flow.png").exists()


def test_bags_of_unknown_encoders_and_known_ones_are_told_apart_in_words():
    found = seen_before(table_of(["a"], ["p"]), "h-optimus-0")
    assert found["saw_tcga"] is None
    assert "not stated by its authors" in found["pretrained_on"]
