"""A disk that fills at any write of fine-tuning, and of extraction with its pictures: a message, and nothing half."""

import errno
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import extract.finetune
import extract.finetuning.report
import extract.run
import extract.whole
from extract.encoders.lora import WEIGHTS
from extract.features.cache import read_features
from extract.features.parquet import ImportProblem, import_parquet
from extract.whole import folder_on_success

TINY = ["encoder.name=timm:test_vit", "encoder.random_weights=true", "encoder.device=cpu"]


@pytest.fixture
def failed(monkeypatch) -> list[str]:
    """Every file's, and every folder's, first write fails where its bytes are flushed; the names of those that did."""
    names: list[str] = []
    rename = os.replace

    def replace(temporary: Path, path: Path) -> None:
        if str(path) not in names:
            names.append(str(path))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(temporary, path)

    monkeypatch.setattr(extract.whole.os, "replace", replace)
    return names


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_disk_that_fills_at_any_write_of_fine_tuning(tmp_path, textures: ModuleType, failed, capsys):
    tiles = textures.write_tiles(tmp_path / "tiles", 16, 160, n_patients=4)
    arguments = [f"data.csv={tiles}", *TINY, "train.epochs=1", "bootstrap=0", f"out={tmp_path / 'out'}"]
    code, tries = 2, 0
    while code == 2:
        code, tries = extract.finetune.main(arguments), tries + 1
        said = capsys.readouterr().err
        if code == 2:
            assert f"{failed[-1]}: no space left (No space left on device). No half file was left." in said
            assert "Traceback" not in said
            assert sorted(os.listdir(tmp_path)) == ["tiles"], "nothing of this fine-tuning was kept"
        assert tries < 20
    assert (code, tries) == (0, len(failed) + 1)
    names = {Path(path).name for path in failed}
    assert {"config.yaml", "head.safetensors", "split.csv", "predictions.csv", "report.html"} <= names
    assert "adapter" in names


def test_a_disk_that_fills_at_any_write_of_extraction_and_its_pictures(tmp_path, slides: ModuleType, failed, capsys):
    (tmp_path / "slides").mkdir()
    for i in range(2):
        slides.painted_slide(tmp_path / "slides" / f"s{i}.tiff", 601 - 40 * i, 503, seed=i)
    arguments = [*TINY, "extract.workers=0", f"slides.folder={tmp_path / 'slides'}", "qc=true"]
    arguments.append(f"out={tmp_path / 'out'}")
    code, tries = 2, 0
    while code == 2:
        code, tries = extract.run.main(arguments), tries + 1
        said = capsys.readouterr().err
        if code == 2:
            assert "no space left (No space left on device)" in said
            assert "Traceback" not in said
        assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".partial", ".claim", ".lock"))]
        assert tries < 12
    assert (code, 1 < tries <= len(failed) + 1) == (0, True), "a try may end with two slides under way"
    assert {"s0.h5", "s1.h5", "s0.png", "s1.png"} <= {Path(path).name for path in failed}
    for name in ("s0", "s1"):
        assert np.isfinite(read_features(tmp_path / "out" / f"{name}.h5")).all()


def test_a_disk_that_fills_at_any_write_of_an_import(tmp_path, failed):
    schema = pa.schema([("features", pa.list_(pa.list_(pa.float32()))), ("label", pa.int64())])
    for name, n in (("Phikon_train", 2), ("Phikon_test", 1)):
        tiles = np.arange(12.0).reshape(3, 4).tolist()
        table = pa.table({"features": [tiles] * n, "label": [0] * n}, schema=schema)
        pq.write_table(table, tmp_path / f"{name}-00000-of-00001.parquet")
    out, tries, done, said = tmp_path / "out", 0, False, ""
    while not done:
        tries += 1
        assert tries < 9
        try:
            import_parquet(out, root=tmp_path, dim=4, progress=lambda _: None)
            done = True
        except (ImportProblem, OSError) as error:
            said = str(error)
        assert done or "No space left on device" in said
        assert not [name for name in files_below(out) if name.endswith(".partial")]
        assert ("source.json" in files_below(out)) == done
    names = ["Phikon_test_000.h5", "Phikon_train_000.h5", "Phikon_train_001.h5", "cohort.csv", "source.json"]
    assert files_below(out) == sorted(Path(path).name for path in failed) == names
    assert tries == len(names) + 1


def test_every_file_of_a_folder_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    """fsync of each, then the rename: after a power cut there is the whole folder or none."""
    done: list[str] = []
    fsync, rename = os.fsync, os.replace

    def flush(handle: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    monkeypatch.setattr(extract.whole.os, "fsync", flush)
    monkeypatch.setattr(extract.whole.os, "replace", lambda a, b: (done.append("renamed"), rename(a, b))[1])
    with folder_on_success(tmp_path / "adapter") as temporary:
        (temporary / WEIGHTS).write_bytes(b"weights")
        (temporary / "deep").mkdir()
        (temporary / "deep" / "config").write_bytes(b"config")
    assert sorted(done[:2]) == sorted([WEIGHTS, "config"])
    assert done[2:] == ["renamed"]
    assert files_below(tmp_path) == [f"adapter/{WEIGHTS}", "adapter/deep/config"]
    with pytest.raises(KeyError), folder_on_success(tmp_path / "other") as temporary:
        raise KeyError
    assert os.listdir(tmp_path) == ["adapter"]
