"""What a run is continued with must be what it was made of: checkpoints, passes, rows of the cohort, features."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

import mil.pipeline.training
from extract.config import ConfigError
from extract.digest import sealed, unsealed
from extract.features.cache import Provenance, read_coords, read_features, write_features
from mil.config import StudyConfig
from mil.pipeline.folder import flat, refuse_other_config, resolved_yaml
from mil.train import main
from mil.training.module import MembersModule

SETTINGS = ["study.folds=2", "train.epochs=3", "train.batch_size=5", "train.lr=0.02", "train.accelerator=cpu"]
SETTINGS += ["model.name=mean", "report.bootstrap=0", "report.heatmaps=0", "train.members_per_pass=1"]
SETTINGS += ["report.baselines=false"]


@dataclass(frozen=True)
class Study:
    """`begun`: stopped in the second pass after its second epoch. `out`: the same, uninterrupted."""

    arguments: list[str]
    data: Path
    out: Path
    begun: Path


pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def study(write_study, witness_arrays, tmp_path_factory) -> Study:
    folder = tmp_path_factory.mktemp("resume")
    arrays, labels_S = witness_arrays(16, seed=5)
    arguments = [*write_study(folder / "data", arrays, np.array(["a", "b"])[labels_S]), *SETTINGS]
    with pytest.MonkeyPatch.context() as patch:
        assert main([*arguments, f"out={folder / 'run'}"]) == 0
        patch.setattr(MembersModule, "on_train_epoch_start", interrupt_in_second_pass())
        assert main([*arguments, f"out={folder / 'begun'}"]) == 130
    return Study(arguments, folder / "data", folder / "run", folder / "begun")


def interrupt_in_second_pass() -> Callable[[MembersModule], None]:
    """Ctrl-C at the start of the third epoch of the second pass."""
    begin, begun = MembersModule.on_train_epoch_start, []

    def stop(module: MembersModule) -> None:
        begun.append(module.current_epoch)
        if len(begun) == 6:
            raise KeyboardInterrupt
        begin(module)

    return stop


def own_copy(study: Study, folder: Path, of: str = "begun") -> tuple[list[str], Path]:
    """The data and a run folder that a test may change, and the arguments that resume it."""
    data, out = shutil.copytree(study.data, folder / "data"), shutil.copytree(getattr(study, of), folder / "run")
    text = (
        (out / "config.yaml").read_text().replace(str(study.data), str(data)).replace(str(getattr(study, of)), str(out))
    )
    (out / "config.yaml").write_text(text)
    given = [argument.replace(str(study.data), str(data)) for argument in study.arguments]
    return [*given, f"out={out}", "resume=true"], data


def same_predictions(out: Path, study: Study) -> bool:
    return (out / "predictions.csv").read_bytes() == (study.out / "predictions.csv").read_bytes()


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_every_damage_to_sealed_content_is_noticed():
    rng = np.random.default_rng(0)
    content = rng.bytes(700)
    whole = sealed(content)
    assert unsealed(whole) == content
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        assert unsealed(bytes(damaged)) is None
    assert [unsealed(whole[:n]) for n in range(len(whole))] == [None] * len(whole)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("pass0.pt", "flip"),
        ("pass0.pt", "empty"),
        ("pass1/last.ckpt", "flip"),
        ("pass1/last.ckpt", "cut"),
        ("passes.pt", "flip"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_made_again(study, tmp_path, capsys, name, damage):
    arguments, _ = own_copy(study, tmp_path)
    path = tmp_path / "run" / "checkpoints" / name
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 3] ^= 4
    path.write_bytes({"flip": bytes(whole), "cut": bytes(whole[: len(whole) // 2]), "empty": b""}[damage])
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert f"{path}: damaged" in said
    assert said.count("trained again") == 1
    assert same_predictions(tmp_path / "run", study)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_whole_checkpoint_is_used(study, tmp_path, capsys, monkeypatch):
    """The test above would pass, too, if none ever was."""
    arguments, _ = own_copy(study, tmp_path)
    begin, epochs = MembersModule.on_train_epoch_start, []
    monkeypatch.setattr(
        MembersModule, "on_train_epoch_start", lambda module: (epochs.append(module.current_epoch), begin(module))[1]
    )
    assert main(arguments) == 0
    assert epochs == [2]
    assert "damaged" not in capsys.readouterr().err
    assert same_predictions(tmp_path / "run", study)


def test_passes_stay_as_they_were_begun_whatever_memory_there_is_now(study, tmp_path, monkeypatch):
    """`members_per_pass=auto` would put both members into one pass now, of which pass0.pt is not."""
    arguments, _ = own_copy(study, tmp_path)
    monkeypatch.setattr(mil.pipeline.training, "passes_of", lambda study, name: [np.arange(len(study.plan))])
    assert main(arguments) == 0
    assert same_predictions(tmp_path / "run", study)


# --- cohort and features ---------------------------------------------------------------------------------------------


def change_table(data: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    change(pd.read_csv(data / "cohort.csv", dtype=str)).to_csv(data / "cohort.csv", index=False)


def grow(data: Path) -> None:
    shutil.copy(data / "slide_03.h5", data / "slide_99.h5")
    row = {"slide": "slide_99", "patient": "p99", "label": "a"}
    change_table(data, lambda table: pd.concat([table, pd.DataFrame([row])], ignore_index=True))


def relabel(data: Path) -> None:
    other = {"a": "b", "b": "a"}
    change_table(data, lambda t: t.assign(label=t["label"].where(t["slide"] != "slide_04", t["label"].map(other))))


def shrink(data: Path) -> None:
    change_table(data, lambda table: table[table["slide"] != "slide_05"])


def other_patient(data: Path) -> None:
    change_table(data, lambda table: table.assign(patient=table["patient"].where(table["slide"] != "slide_06", "p00x")))


def other_features(data: Path) -> None:
    path = data / "slide_02.h5"
    features_ND, coords_N2 = read_features(path), read_coords(path)
    provenance = Provenance("synthetic", "none", 224, 0.5, tile_level0_px=448, slide="slide_02")
    write_features(path, features_ND[::-1], coords_N2, provenance, dtype=str(features_ND.dtype))


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "grown": (grow, "in the cohort but not in the plan: 'slide_99'"),
    "shrunk": (shrink, "in the plan but not in the cohort: 'slide_05'"),
    "label": (relabel, "slide 'slide_04': label was "),
    "patient": (other_patient, "slide 'slide_06': patient was "),
    "features": (other_features, "slide 'slide_02': its features are others now: were xxh3 "),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("of", ["out", "begun"])
def test_a_run_is_not_continued_on_other_data(study, tmp_path, capsys, of, change):
    arguments, data = own_copy(study, tmp_path, of)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    CHANGES[change][0](data)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert CHANGES[change][1] in said
    assert said.count("slide_") == 1, "nothing else has changed"
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_finished_run_on_the_same_data_is_finished(study, tmp_path, capsys):
    arguments, data = own_copy(study, tmp_path, "out")
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""
    (data / "slide_07.h5").unlink()
    assert main(arguments) == 0
    assert "note: features of 1 slide of the run are not there any more: not compared" in capsys.readouterr().err
    shutil.rmtree(data)
    assert main(arguments) == 0
    assert f"note: {data / 'cohort.csv'} is gone" in capsys.readouterr().err


def test_slides_that_were_dropped_are_no_change(write_study, witness_arrays, tmp_path, capsys):
    arrays, labels_S = witness_arrays(16, seed=5)
    data = write_study(tmp_path / "data", arrays, np.array(["a", "b"])[labels_S])
    (tmp_path / "data" / "slide_03.h5").unlink()
    arguments = [*data, *SETTINGS, "checks.missing=drop", f"out={tmp_path / 'run'}"]
    assert main(arguments) == 0
    assert main([*arguments, "resume=true"]) == 0
    shutil.copy(tmp_path / "data" / "slide_05.h5", tmp_path / "data" / "slide_03.h5")
    capsys.readouterr()
    assert main([*arguments, "resume=true"]) == 2
    assert "in the cohort but not in the plan: 'slide_03'" in capsys.readouterr().err


def test_a_runs_damaged_config_is_refused_when_it_is_resumed(tmp_path, mutations):
    """Or is another one, or the same: nothing else comes of reading it."""
    run = tmp_path / "run"
    config = StudyConfig(out=run, resume=True)
    whole = resolved_yaml(config).encode()
    run.mkdir()
    (run / "config.yaml").write_bytes(whole)
    refuse_other_config(config)
    odd = (b"\xff\xfe", b"a: [", b"[1, 2]", b"", b"5", b"model: 3\n", b"a: !!python/x 1", b"[" * 3_000, b"? [1]\n: 2\n")
    for damaged in (*odd, *mutations.mutations(whole, 25, 3)):
        (run / "config.yaml").write_bytes(damaged)
        with suppress(ConfigError):
            refuse_other_config(config)
            kept, said = flat(yaml.safe_load(damaged) or {}), flat(yaml.safe_load(whole))
            assert {key: said.get(key) for key in kept} == kept, "what is left of it"
