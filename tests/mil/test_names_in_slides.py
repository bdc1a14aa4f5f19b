"""What a DICOM slide says of its patient stays in the slide: not in features, run folders, predictions or pictures.

A real slide, into whose copy a patient's name, id and date of birth are put. Skipped where the data are absent.
"""

import os
import struct
from pathlib import Path

import numpy as np
import openslide
import pandas as pd
import pytest

import mil.predict
from mil.train import main

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("SLIDE_MIL_SHARED", ROOT.parent / "shared")) / "data"
SLIDE = SHARED / "wsi" / "multi_frame_jpeg_camelyon_challenge_image.dcm"
PATIENT = {
    (0x0010, 0x0010): ("PN", "DOE^JANINA "),
    (0x0010, 0x0020): ("LO", "MRN-77341905"),
    (0x0010, 0x0030): ("DA", "19570403"),
}
LONG = {b"OB", b"OW", b"OF", b"OD", b"SQ", b"UC", b"UN", b"UR", b"UT"}
NOT_OF_PERSONS = {"slide", "dicom", "VOLUME", "ORIGINAL", "PRIMARY", "DERIVED", "RESAMPLED", "TILED_FULL", "DCM"}
SETTINGS = ["encoder.name=timm:test_vit", "encoder.random_weights=true", "encoder.device=cpu", "extract.workers=0"]
SETTINGS += ["tissue.mpp=2", "model.name=abmil", "train.epochs=2", "train.accelerator=cpu", "study.folds=2"]
SETTINGS += ["report.bootstrap=0", "report.heatmaps=2"]

pytestmark = pytest.mark.skipif(not SLIDE.exists(), reason=f"no slides in {SHARED}")


def with_patient(whole: bytes) -> bytes:
    """The slide with the patient's elements where they belong: elements of a DICOM file are sorted by their tags."""
    place = 132
    while struct.unpack("<HH", whole[place : place + 4]) < min(PATIENT):
        kind = whole[place + 4 : place + 6]
        long = kind in LONG
        length = struct.unpack_from("<I", whole, place + 8) if long else struct.unpack_from("<H", whole, place + 6)
        assert kind.isalpha()
        assert length[0] != 0xFFFFFFFF
        place += (12 if long else 8) + length[0]
    added = b"".join(
        struct.pack("<HH2sH", *tag, kind.encode(), len(text)) + text.encode() for tag, (kind, text) in PATIENT.items()
    )
    return whole[:place] + added + whole[place:]


def words_of(path: Path) -> set[str]:
    """Everything of some length that a slide's metadata say, besides numbers."""
    with openslide.OpenSlide(path) as slide:
        said = {str(value) for name, value in slide.properties.items() if name.startswith("dicom.")}
    long = {word for word in said if len(word) >= 6 and not word.replace(".", "").isdigit()}
    return {word for word in long if word not in NOT_OF_PERSONS} | {text.strip() for _, text in PATIENT.values()}


def test_nothing_of_what_a_slide_says_of_its_patient_is_written_anywhere(tmp_path):
    path = tmp_path / "slide.dcm"
    path.write_bytes(with_patient(SLIDE.read_bytes()))
    words = words_of(path)
    assert {"DOE^JANINA", "GO-1692202754026-1-A", "Kidney medial right tumor"} <= words, "they are in the slide"
    rows = [{"slide": f"s{i}", "patient": f"p{i}", "label": "ab"[i % 2], "path": path, "mpp": 0.5} for i in range(8)]
    pd.DataFrame(rows).to_csv(tmp_path / "cohort.csv", index=False)
    data = [f"cohort={tmp_path / 'cohort.csv'}", f"features.folder={tmp_path / 'out' / 'features'}"]
    assert main([*data, *SETTINGS, f"out={tmp_path / 'out' / 'run'}"]) == 0
    new = [f"run={tmp_path / 'out' / 'run'}", *data, "device=cpu", "report.bootstrap=0", "known_patients=score"]
    assert mil.predict.main([*new, f"out={tmp_path / 'out' / 'predicted'}"]) == 0
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert {".h5", ".html", ".json", ".csv", ".yaml", ".safetensors"} <= {file.suffix for file in files}
    found = {(file.name, word) for file in files for word in words if word.encode() in file.read_bytes()}
    assert not found
    assert np.isfinite(pd.read_csv(tmp_path / "out" / "predicted" / "predictions.csv").filter(like="p_")).all(axis=None)
