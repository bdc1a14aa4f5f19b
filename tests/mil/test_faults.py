"""What goes wrong around a study: other devices, other commands, full and read-only disks, signals, divergence."""

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from scipy.special import expit

import extract.features.cache
import extract.finetune
import extract.run
import extract.whole
import mil.compare
import mil.heatmap
import mil.lesions
import mil.predict
import mil.selftest
import mil.training.selftest
from extract.lock import LockError, only_command_in
from extract.whole import system_error
from mil.aggregators.batch import Batch
from mil.config import StudyConfig
from mil.config_reading import of_earlier_versions
from mil.heatmap import HeatmapConfig
from mil.look.tilescores import features_of
from mil.prediction.config import PredictConfig
from mil.results.trained import bags_of, logits_of, open_run
from mil.train import main
from mil.training.module import MembersModule, fit, predict_logits

SETTINGS = [
    "study.folds=2",
    "train.epochs=2",
    "train.batch_size=5",
    "train.lr=0.02",
    "train.accelerator=cpu",
    "model.name=mean",
    "report.bootstrap=0",
    "report.heatmaps=0",
    "report.baselines=false",
]


@dataclass(frozen=True)
class Small:
    """A study of 16 slides on disk: the arguments that train it, and a finished run folder."""

    arguments: list[str]
    out: Path


@pytest.fixture(scope="module", autouse=True)
def one_figure_only(draw_only):
    with pytest.MonkeyPatch.context() as patch:
        draw_only(patch, "roc")
        yield


@pytest.fixture(scope="module")
def small(write_study, witness_arrays, tmp_path_factory) -> Small:
    folder = tmp_path_factory.mktemp("small")
    arrays, labels_S = witness_arrays(16, seed=5)
    split = ["test" if i >= 12 else "train" for i in range(16)]
    data = write_study(folder / "data", arrays, np.array(["a", "b"])[labels_S], split=split)
    arguments = [*data, *SETTINGS]
    assert main([*arguments, f"out={folder / 'run'}"]) == 0
    return Small(arguments, folder / "run")


def said_by(capsys, command: Callable[[list[str]], int], arguments: Sequence[str], code: int) -> str:
    """What a command that ends with this exit code says on standard error."""
    try:
        found = command(list(arguments))
    except SystemExit as ended:
        found = ended.code
    said = capsys.readouterr().err
    assert found == code, said
    return said


def same_predictions(folder: Path, other: Path) -> bool:
    return (folder / "predictions.csv").read_bytes() == (other / "predictions.csv").read_bytes()


def change_config(folder: Path, old: str, new: str) -> None:
    text = (folder / "config.yaml").read_text()
    assert old in text
    (folder / "config.yaml").write_text(text.replace(old, new))


# --- one device ------------------------------------------------------------------------------------------------------

OF_SCHEDULERS = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NAME": "study",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "2",
    "SLURM_NODELIST": "node[1-2]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "TORCHELASTIC_RUN_ID": "elastic",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "GROUP_RANK": "1",
    "NODE_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1.invalid",
    "MASTER_PORT": "29500",
    "LSB_JOBID": "17",
    "LSB_DJOB_RANKFILE": "ranks",
    "JSM_NAMESPACE_SIZE": "4",
    "JSM_NAMESPACE_RANK": "3",
    "JSM_NAMESPACE_LOCAL_RANK": "1",
    "KUBERNETES_PORT": "tcp://10.0.0.1:443",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "PMI_RANK": "3",
    "PMI_SIZE": "4",
}
"""What SLURM, torchrun, LSF, Kubeflow and MPI set. Each would make Lightning wait for three more processes."""


def test_no_schedulers_variables_start_or_wait_for_other_processes(small, tmp_path, monkeypatch):
    for name, value in OF_SCHEDULERS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_zero_only, "rank", 3)  # as Lightning, imported under these variables, would have it
    started, sizes = [], []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: started.append(args) or popen(*args, **options))
    begin = MembersModule.on_train_start
    monkeypatch.setattr(
        MembersModule, "on_train_start", lambda module: (sizes.append(module.trainer.world_size), begin(module))[1]
    )
    assert main([*small.arguments, f"out={tmp_path / 'run'}"]) == 0
    assert (started, sizes) == ([], [1])
    assert same_predictions(small.out, tmp_path / "run")
    assert {name: os.environ.get(name) for name in OF_SCHEDULERS} == OF_SCHEDULERS
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("value", ["0", "-1", "[0,1]", "true"])
def test_devices_are_a_number_or_auto(small, tmp_path, capsys, value):
    said = said_by(capsys, main, [*small.arguments, f"train.devices={value}", f"out={tmp_path / 'run'}"], 2)
    assert "train.devices: expected auto, or a whole number from 1, got" in said
    assert not (tmp_path / "run").exists()


def test_an_unfinished_run_of_an_earlier_version_resumes(small, tmp_path, monkeypatch):
    """It says devices: auto, which was the default."""
    out, arguments = tmp_path / "run", [*small.arguments, f"out={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        patch.setattr(MembersModule, "on_train_epoch_start", interrupt_at(1))
        assert main(arguments) == 130
    change_config(out, "devices: 1", "devices: auto")
    shutil.copytree(out, tmp_path / "again")
    assert main([*arguments, "resume=true"]) == 0, "the same command"
    assert same_predictions(small.out, out)
    shutil.rmtree(out)
    shutil.copytree(tmp_path / "again", out)
    assert main([f"config={out / 'config.yaml'}", "resume=true"]) == 0, "its own config"
    assert same_predictions(small.out, out)


def interrupt_at(epoch: int) -> Callable[[MembersModule], None]:
    """Ctrl-C at the start of this epoch, counted from 0."""
    begin = MembersModule.on_train_epoch_start

    def stop(module: MembersModule) -> None:
        if module.current_epoch == epoch:
            raise KeyboardInterrupt
        begin(module)

    return stop


def test_a_finished_run_of_an_earlier_version_is_read(small, tmp_path):
    shutil.copytree(small.out, tmp_path / "run")
    (tmp_path / "run" / "hashes.json").unlink()  # earlier versions wrote none
    change_config(tmp_path / "run", "devices: 1", "devices: auto")
    change_config(tmp_path / "run", "precision: 32-true", "precision: 16-mixed")
    train = open_run(tmp_path / "run").config.train
    assert (train.devices, train.precision) == (1, "bf16-mixed")


def test_what_earlier_versions_said_is_only_changed_where_it_must():
    today = {"train": {"devices": 1, "precision": "32-true", "lr": 1e-3}, "seed": 3}
    assert of_earlier_versions(today) == today
    assert of_earlier_versions({"train": None}) == {"train": None}


# --- values that go to a library -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["64-true", "bf16-true", "16-mixed", "16-true", "transformer-engine", "64"])
def test_a_precision_that_does_not_work_is_not_offered(small, tmp_path, capsys, value):
    said = said_by(capsys, main, [*small.arguments, f"train.precision={value}", f"out={tmp_path / 'run'}"], 2)
    assert "train.precision: input should be 'auto', '32-true', 'tf32' or 'bf16-mixed'" in said
    assert not (tmp_path / "run").exists()


def test_an_accelerator_that_does_not_exist(small, tmp_path, capsys):
    said = said_by(capsys, main, [*small.arguments, "train.accelerator=gpuu", f"out={tmp_path / 'run'}"], 2)
    assert "train.accelerator: input should be 'auto', 'cpu'" in said
    assert "did you mean 'gpu'?" in said


@pytest.mark.parametrize("value", ["gpu", "cuda", "mps"])
def test_an_accelerator_that_is_not_there_is_refused_before_data_are_read(tmp_path, capsys, monkeypatch, value):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    arguments = [f"cohort={tmp_path / 'absent.csv'}", f"train.accelerator={value}", f"out={tmp_path / 'run'}"]
    said = said_by(capsys, main, arguments, 2)
    assert f"train.accelerator={value}: not in this machine, which has cpu" in said
    assert "absent.csv" not in said


@pytest.mark.parametrize("value", ["gpu", "cuda:", "cuda:x", "tpu", "CPU", ""])
@pytest.mark.parametrize("schema", [StudyConfig, PredictConfig, HeatmapConfig])
def test_names_of_devices_are_looked_at_with_the_config(schema, value):
    tree = {"encoder": {"device": value}} if schema is StudyConfig else {"device": value}
    with pytest.raises(ValueError, match="expected auto, cpu, cuda, cuda:NUMBER or mps"):
        schema.model_validate(tree)
    for good in ("auto", "cpu", "cuda", "cuda:1", "mps"):
        schema.model_validate({"encoder": {"device": good}} if schema is StudyConfig else {"device": good})


@pytest.mark.parametrize("value", ["0", "-3", "1.5", "none"])
def test_passes_hold_a_member_at_least(small, tmp_path, capsys, value):
    said = said_by(capsys, main, [*small.arguments, f"train.members_per_pass={value}", f"out={tmp_path / 'run'}"], 2)
    assert "train.members_per_pass" in said
    assert not (tmp_path / "run").exists()


def test_a_name_that_no_file_may_have_is_a_message(small, tmp_path, capsys):
    said = said_by(capsys, main, [*small.arguments, f"out={tmp_path / ('x' * 300)}"], 2)
    assert "cannot be written to (File name too long)" in said
    assert os.listdir(tmp_path) == []


# --- mixed precision -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(witness_arrays, trained) -> MembersModule:
    """90 slides whose logits lie close together, two members that select on 30 of them, trained in mixed precision."""
    arrays, labels_S = witness_arrays(90, seed=3)
    val_MS = np.tile(np.arange(90) >= 60, (2, 1))
    options = {"hidden": 24, "attention": 5, "head": (16,)}
    settings = {"epochs": 2, "precision": "bf16-mixed"}
    bags = bags_of([f"s{i}" for i in range(90)], [torch.from_numpy(array) for array in arrays])
    return trained(bags, labels_S, ~val_MS, val_MS, name="abmil", options=options, **settings)


def test_logits_of_mixed_precision_are_those_of_a_float32_evaluation(mixed):
    found_MS = predict_logits(mixed, list(range(90)))[:, :, 0]
    steps = mixed.evaluation_steps(list(range(90)))
    with torch.inference_mode():
        plain_MS = torch.cat([mixed.aggregator.eval()(batch).logits_MBC for batch in steps], dim=1)[:, :, 0].numpy()
    np.testing.assert_allclose(found_MS, plain_MS, rtol=1e-5, atol=1e-6)
    assert np.abs(expit(found_MS) - expit(plain_MS)).max() < 1e-5
    for logits_S in found_MS:
        assert len(np.unique(logits_S)) == 90, "no ties"
    rounded_MS = torch.from_numpy(plain_MS).bfloat16().float().numpy()
    assert len(np.unique(rounded_MS[0])) < 90, "which bfloat16 would make of them"


def test_validation_in_mixed_precision_is_a_float32_evaluation(mixed):
    logits_MS = predict_logits(mixed, list(range(90)))[:, :, 0]
    signs_S = np.where(mixed.labels_S == 1, 1, -1)
    for m, val_S in enumerate(mixed.members.val_MS):
        expected = np.logaddexp(0, -signs_S[val_S] * logits_MS[m, val_S]).mean()
        last = [row for row in mixed.history if row["member"] == m][-1]
        assert last["val_loss"] == pytest.approx(expected, abs=1e-6)


def test_a_study_in_mixed_precision_is_predicted_as_it_was_written(small, tmp_path):
    out = tmp_path / "run"
    assert main([*small.arguments, "train.precision=bf16-mixed", f"out={out}"]) == 0
    run = open_run(out, device="cpu")
    table = pd.read_csv(out / "predictions.csv").pivot_table(index="member", columns="slide", values="logit_0")
    assert run.environment["evaluated_in"] == "float32"
    features = features_of(run)
    tiles = [torch.from_numpy(features.features(slide)) for slide in table.columns]
    again_MS = logits_of(run, bags_of(list(table.columns), tiles))[:, :, 0]
    np.testing.assert_allclose(again_MS, table.to_numpy(), rtol=1e-5, atol=1e-6)


# --- two commands with the same out ----------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from extract.lock import only_command_in
with only_command_in(Path(sys.argv[1]), "mil.other", shared=sys.argv[2] == "shared"):
    print("holds", flush=True)
    time.sleep(300)
"""


@contextmanager
def held_by_another(out: Path, how: str = "alone") -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock on `out` until the end, or until it is killed."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out), how], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        try:
            yield process
        finally:
            process.kill()


def test_the_second_of_two_commands_says_so_and_does_nothing(small, tmp_path, capsys):
    out = tmp_path / "deep" / "run"
    tiny = ["aggregators=[mean]", "train_bags=20", "test_bags=20", "epochs=1", "seeds=1"]
    commands: dict[str, tuple[Callable[[list[str]], int], list[str]]] = {
        "train": (main, small.arguments),
        "predict": (mil.predict.main, [f"run={small.out}", f"features.folder={small.out.parent / 'data'}"]),
        "heatmap": (mil.heatmap.main, [f"run={small.out}", "slide=slide_00"]),
        "compare": (mil.compare.main, [str(small.out)]),
        "selftest": (mil.selftest.main, tiny),
        "lesions": (mil.lesions.main, [f"run={small.out}", f"annotations={tmp_path}"]),
        "finetune": (extract.finetune.main, ["encoder.name=timm:test_vit", "encoder.random_weights=true"]),
        "extract": (extract.run.main, [f"slides.folder={tmp_path}", "encoder.name=timm:test_vit"]),
    }
    commands["finetune"][1].append(f"data.folder={tmp_path}")
    commands["extract"][1].append("encoder.random_weights=true")
    with held_by_another(out) as process:
        for name, (command, arguments) in commands.items():
            said = said_by(capsys, command, [*arguments, f"out={out}"], 2)
            assert f"mil.other (process {process.pid} on " in said, name
            assert "set another out" in said
            assert sorted(os.listdir(out.parent)) == [".run.lock"], name
    assert main([*small.arguments, f"out={out}"]) == 0, "that one was killed, and its lock with it"
    assert os.listdir(out.parent) == ["run"]


def test_what_is_made_of_a_run_goes_into_a_sub_folder_or_elsewhere(small, tmp_path, capsys):
    """Nothing of a run is written over, and it stays valid with what was put into it."""
    run, data = tmp_path / "run", small.out.parent / "data"
    shutil.copytree(small.out, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    predicts = [f"run={run}", f"features.folder={data}", "known_patients=score", "device=cpu"]
    heatmaps = [f"run={run}", "slide=slide_13", "device=cpu", "tiles=0"]
    compares = [str(run), str(small.out)]
    commands = ((mil.predict.main, predicts), (mil.heatmap.main, heatmaps), (mil.compare.main, compares))
    for command, arguments in commands:
        for out in (run, run / "figures"):
            said = said_by(capsys, command, [*arguments, f"out={out}"], 2)
            assert "must stay as" in said or "its report would be lost" in said
    said = said_by(capsys, main, [*small.arguments, f"out={run / 'another'}"], 2)
    assert "a study has a folder that is no other's" in said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert mil.predict.main([*predicts, f"out={run / 'predictions'}"]) == 0
    assert mil.heatmap.main([*heatmaps, f"out={run / 'heatmaps'}"]) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert open_run(run, device="cpu").n_members == 2
    assert main([*small.arguments, f"out={small.out}", "resume=true"]) == 0, "finished"
    said = said_by(capsys, main, [*small.arguments, f"out={run}", "overwrite=true"], 2)
    assert f"{run / 'predictions'}: made by mil.predict; move it elsewhere, or set out=OTHER" in said
    assert (run / "predictions" / "predictions.csv").exists()


def test_the_lock_is_that_of_the_folder_whatever_its_name(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with only_command_in(tmp_path / "run", "first"):
        for name in ("run", "link", "other/../run"):
            with pytest.raises(LockError, match="first"), only_command_in(tmp_path / name, "second"):
                pass
        with only_command_in(tmp_path / "run2", "second"):
            pass
    with only_command_in(tmp_path / "run", "second"):
        pass
    assert os.listdir(tmp_path) == ["link"]


def test_a_thread_may_take_its_own_lock_again_and_no_other_may(tmp_path):
    with only_command_in(tmp_path / "run", "mil.train"), only_command_in(tmp_path / "run", "mil.train"):
        with ThreadPoolExecutor(1) as pool, pytest.raises(LockError, match="process"):
            pool.submit(only_command_in(tmp_path / "run", "mil.train").__enter__).result()
        assert os.listdir(tmp_path) == [".run.lock"]
    assert os.listdir(tmp_path) == []


def test_extractions_share_a_folder_and_nothing_else_may_use_it(tmp_path):
    with held_by_another(tmp_path / "cache", "shared"):
        with only_command_in(tmp_path / "cache", "extract.run", shared=True):
            pass
        assert (tmp_path / ".cache.lock").exists(), "the other one still holds it"
        with pytest.raises(LockError), only_command_in(tmp_path / "cache", "mil.train"):
            pass
    with only_command_in(tmp_path / "cache", "mil.train"), pytest.raises(LockError):
        only_command_in(tmp_path / "cache", "extract.run", shared=True).__enter__()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_and_work_goes_on(tmp_path, monkeypatch, capsys, number):
    def none(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    with only_command_in(tmp_path / "run", "mil.train"):
        pass
    assert "no lock beside" in capsys.readouterr().err


def test_the_folders_made_for_a_lock_go_with_it(tmp_path):
    with only_command_in(tmp_path / "a" / "b" / "run", "mil.train"):
        assert (tmp_path / "a" / "b" / ".run.lock").exists()
    assert os.listdir(tmp_path) == []


# --- disks -----------------------------------------------------------------------------------------------------------


def fail_first_writes(monkeypatch, number: int) -> list[str]:
    """Every file's first write fails with this error, as its bytes are flushed; the names of those that failed."""
    failed: list[str] = []
    rename = os.replace

    def replace(temporary: Path, path: Path) -> None:
        if str(path) not in failed:
            failed.append(str(path))
            raise OSError(number, os.strerror(number))
        rename(temporary, path)

    monkeypatch.setattr(extract.whole.os, "replace", replace)
    return failed


def test_a_disk_that_fills_at_any_write_costs_nothing_that_was_finished(small, tmp_path, monkeypatch, capsys):
    """The n-th file fails for all n; each time there is one message, no half file, and the run continues."""
    out = tmp_path / "run"
    failed = fail_first_writes(monkeypatch, errno.ENOSPC)
    code, tries, before = 2, 0, 0
    while code == 2:
        code = main([*small.arguments, f"out={out}", "resume=true" if (out / "config.yaml").exists() else "seed=0"])
        said, tries = capsys.readouterr().err, tries + 1
        assert tries < 60
        if code == 2:
            assert len(failed) == before + 1
            before += 1
            assert f"{failed[-1]}: no space left (No space left on device). No half file was left." in said
            assert said.count("stopped (1)") == 1
            assert "Traceback" not in said
        assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".partial", ".lock"))]
    assert (code, tries) == (0, len(failed) + 1)
    names = {Path(path).name for path in failed}
    assert {"config.yaml", "plan.csv", "last.ckpt", "pass0.pt", "members.safetensors", "metrics.csv"} <= names
    assert {"predictions.csv", "environment.json", "metrics.json", "roc.png", "report.html"} <= names
    assert same_predictions(small.out, out)
    assert (out / "logs" / "pass0" / "metrics.csv").read_bytes() == (
        small.out / "logs" / "pass0" / "metrics.csv"
    ).read_bytes()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO, errno.EPERM])
def test_what_a_disk_says_becomes_a_message(small, tmp_path, monkeypatch, capsys, number):
    failed = fail_first_writes(monkeypatch, number)
    said = said_by(capsys, main, [*small.arguments, f"out={tmp_path / 'run'}"], 2)
    assert failed[0] in said
    assert os.strerror(number) in said


@pytest.mark.parametrize("name", ["heatmap", "compare", "lesions"])
def test_a_disk_that_fills_at_any_write_of_pictures_and_comparisons(small, tmp_path, monkeypatch, capsys, name):
    outlines = tmp_path / "outlines"
    outlines.mkdir()
    ring = [[-9, -9], [460, -9], [460, 460], [-9, 460], [-9, -9]]
    lesion = {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [ring]}}
    for i in range(14):
        (outlines / f"slide_{i:02d}.geojson").write_text(
            json.dumps({"type": "FeatureCollection", "features": [lesion]})
        )
    command, arguments = {
        "lesions": (mil.lesions.main, [f"run={small.out}", f"annotations={outlines}", "device=cpu"]),
        "heatmap": (mil.heatmap.main, [f"run={small.out}", "slide=slide_13", "device=cpu", "threshold=50"]),
        "compare": (mil.compare.main, [str(small.out), str(shutil.copytree(small.out, tmp_path / "other"))]),
    }[name]
    failed = fail_first_writes(monkeypatch, errno.ENOSPC)
    code, tries = 2, 0
    while code == 2:
        code, tries = command([*arguments, f"out={tmp_path / 'out'}"]), tries + 1
        said = capsys.readouterr().err
        assert tries < 20
        if code == 2:
            assert f"{failed[-1]}: no space left (No space left on device). No half file was left." in said
            assert "Traceback" not in said
        assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".partial", ".lock"))]
    assert (code, tries) == (0, len(failed) + 1)
    assert len(failed) >= 2


def test_predictions_are_written_all_or_nothing(small, tmp_path, monkeypatch, capsys):
    cohort = small.arguments[0]
    arguments = [f"run={small.out}", cohort, f"features.folder={small.out.parent / 'data'}", f"out={tmp_path / 'p'}"]
    failed = fail_first_writes(monkeypatch, errno.ENOSPC)
    code = 2
    while code == 2:
        code = mil.predict.main([*arguments, "report.bootstrap=0"])
        said = capsys.readouterr().err
        if code == 2:
            assert f"{failed[-1]}: no space left" in said
            assert os.listdir(tmp_path / "p") == []
        assert len(failed) < 30
    assert code == 0
    assert {"predict.yaml", "members.csv", "predictions.csv", "metrics.json"} <= {Path(path).name for path in failed}


def limited(file_bytes: int) -> None:
    """For a process that is started: no file may become longer. Writing then fails as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))


def test_a_feature_file_that_finds_no_room_leaves_nothing_and_does_not_crash(tmp_path):
    """In a process of its own: HDF5 crashed when the process ended."""
    program = """
import sys, numpy as np
from pathlib import Path
from extract.features.cache import Provenance, write_features
features_ND = np.zeros((500, 64), np.float16)
try:
    write_features(Path(sys.argv[1]), features_ND, np.zeros((500, 2)), Provenance("e"))
except OSError as error:
    print(error.errno, error.filename)
"""
    path = tmp_path / "s.h5"
    command = [sys.executable, "-c", program, str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, preexec_fn=lambda: limited(40_000), check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == f"{errno.EFBIG} {path}\n"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (RuntimeError("unable to flush (file write failed: errno = 28, error message = 'No space left')"), 28),
        (ValueError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"), 122),
        (OSError(5, "Input/output error"), 5),
        (OSError(5, "Input/output error", "TEMPORARY"), 5),
        (OSError(13, "Permission denied", "/elsewhere"), None),
        (RuntimeError("something else"), None),
        (OSError("encoder error -2 when writing image file"), None),
    ],
)
def test_the_systems_error_is_found_behind_a_librarys(error, number):
    found = system_error(error, Path("x.h5"), Path("TEMPORARY"))
    assert (found and (found.errno, found.filename)) == (number and (number, "x.h5"))


@pytest.mark.parametrize(("happens", "word"), [("removed", "removed"), ("replaced", "replaced by another one")])
def test_a_run_folder_that_goes_while_training_is_not_made_again(small, tmp_path, monkeypatch, capsys, happens, word):
    out, begin = tmp_path / "run", MembersModule.on_train_epoch_start

    def lose(module: MembersModule) -> None:
        if module.current_epoch == 1:
            out.rename(tmp_path / "gone")
            if happens == "replaced":
                shutil.copytree(tmp_path / "gone", out)
        begin(module)

    monkeypatch.setattr(MembersModule, "on_train_epoch_start", lose)
    said = said_by(capsys, main, [*small.arguments, f"out={out}"], 2)
    assert f"{out}: was {word}" in said
    if happens == "removed":
        assert os.listdir(tmp_path) == ["gone"]
    else:
        assert sorted(map(str, out.rglob("*"))) == sorted(
            str(out / path.relative_to(tmp_path / "gone")) for path in (tmp_path / "gone").rglob("*")
        )


def test_a_run_folder_that_may_not_be_removed_loses_nothing(small, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    shutil.copytree(small.out, out)
    before = sorted(out.rglob("*"))

    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        said = said_by(capsys, main, [*small.arguments, f"out={out}", "overwrite=true"], 2)
    assert f"{out}: cannot be written to (Operation not permitted)" in said
    assert sorted(out.rglob("*")) == before
    assert main([*small.arguments, f"out={out}", "overwrite=true"]) == 0
    assert os.listdir(tmp_path) == ["run"]


# --- signals ---------------------------------------------------------------------------------------------------------


def test_sigterm_is_ctrl_c_and_the_run_continues(small, tmp_path, monkeypatch, capsys):
    arguments, begin = [*small.arguments, f"out={tmp_path / 'run'}"], MembersModule.on_train_epoch_start

    def terminate(module: MembersModule) -> None:
        if module.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        begin(module)

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(MembersModule, "on_train_epoch_start", terminate)
        said = said_by(capsys, main, arguments, 130)
    assert "Interrupted. resume=true continues from the last finished epoch" in said
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert main([*arguments, "resume=true"]) == 0
    assert same_predictions(small.out, tmp_path / "run")


@pytest.mark.parametrize("name", ["predict", "finetune", "extract", "heatmap", "compare", "lesions", "selftest"])
def test_sigterm_is_ctrl_c_in_every_command(small, tmp_path, monkeypatch, capsys, name):
    """Sent where the command takes its lock, which is before its work."""
    command, arguments, module = {
        "predict": (mil.predict.main, [f"run={small.out}", f"features.folder={tmp_path}"], "mil.predict"),
        "finetune": (extract.finetune.main, [f"data.folder={tmp_path}"], "extract.finetune"),
        "extract": (extract.run.main, [f"slides.folder={tmp_path}"], "extract.run"),
        "heatmap": (mil.heatmap.main, [f"run={small.out}", "slide=slide_00"], "mil.heatmap"),
        "compare": (mil.compare.main, [str(small.out)], "mil.compare"),
        "lesions": (mil.lesions.main, [f"run={small.out}", f"annotations={tmp_path}"], "mil.lesions"),
        "selftest": (mil.selftest.main, ["epochs=1"], "mil.selftest"),
    }[name]

    def terminate(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(f"{module}.only_command_in", terminate)
    assert "Interrupted" in said_by(capsys, command, [*arguments, f"out={tmp_path / 'out'}"], 130)
    assert os.listdir(tmp_path) == []


# --- divergence ------------------------------------------------------------------------------------------------------


TOO_HIGH = 3e38
"""A learning rate at which even a linear model's weights overflow."""


@pytest.mark.parametrize("select", ["last", "best"])
@pytest.mark.parametrize("name", ["abmil", "mean", "transmil", "dtfd"])
def test_a_member_that_diverges_is_left_behind_and_the_others_go_on_as_alone(witness_arrays, trained, name, select):
    arrays, labels_S = witness_arrays(24, seed=2)
    bags = bags_of([f"s{i}" for i in range(24)], [torch.from_numpy(array) for array in arrays])
    train_MS, val_MS = np.tile(np.arange(24) < 16, (2, 1)), np.tile(np.arange(24) >= 16, (2, 1))
    options = {"name": name, "epochs": 3, "select": select}
    with np.errstate(all="ignore"):
        both = trained(bags, labels_S, train_MS, val_MS, lr=[TOO_HIGH, 0.01], init_seeds=[0, 1], **options)
    alone = trained(bags, labels_S, train_MS[:1], val_MS[:1], lr=[0.01], init_seeds=[1], **options)
    assert 1 <= both.diverged_M[0] <= 2
    assert (both.diverged_M[1], alone.diverged_M[0]) == (0, 0)
    trained_for = [max(row["epoch"] for row in both.history if row["member"] == m) for m in (0, 1)]
    assert trained_for == [both.diverged_M[0], 3]
    np.testing.assert_allclose(
        predict_logits(both, list(range(24)))[1], predict_logits(alone, list(range(24)))[0], rtol=1e-4, atol=1e-5
    )


def test_weights_of_the_best_epoch_before_are_kept(witness_arrays, small_module):
    """Weights that become infinite in the second epoch."""
    arrays, labels_S = witness_arrays(24, seed=2)
    bags = bags_of([f"s{i}" for i in range(24)], [torch.from_numpy(array) for array in arrays])
    train_MS, val_MS = np.tile(np.arange(24) < 16, (2, 1)), np.tile(np.arange(24) >= 16, (2, 1))

    class Spoilt(MembersModule):
        def training_step(self, batch: Batch, step: int) -> torch.Tensor:
            if self.current_epoch == 1:
                with torch.no_grad():
                    next(self.aggregator.parameters())[0] = torch.inf
            return super().training_step(batch, step)

    settings = {"name": "mean", "epochs": 3, "select": "best", "module_class": Spoilt}
    module = small_module(bags, labels_S, train_MS, val_MS, **settings)
    fit(module, progress=False)
    assert module.diverged_M.tolist() == [2, 0]
    assert module.best_epoch_M[0] == 1
    assert np.isfinite(predict_logits(module, list(range(24)))).all()


def test_a_diverged_member_stays_so_when_the_run_resumes(witness_arrays, small_module, tmp_path, monkeypatch):
    arrays, labels_S = witness_arrays(24, seed=2)
    bags = bags_of([f"s{i}" for i in range(24)], [torch.from_numpy(array) for array in arrays])
    train_MS = np.tile(np.arange(24) < 16, (2, 1))

    def module() -> MembersModule:
        return small_module(bags, labels_S, train_MS, name="mean", epochs=5, lr=[TOO_HIGH, 0.01])

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MembersModule, "on_train_epoch_start", interrupt_at(3))
        fit(module(), tmp_path, progress=False)
    resumed, whole = module(), module()
    fit(resumed, tmp_path, resume=True, progress=False)
    fit(whole, progress=False)
    assert resumed.diverged_M.tolist() == whole.diverged_M.tolist()
    assert resumed.diverged_M[0] > 0
    assert len(resumed.history) == len(whole.history) == 5 + whole.diverged_M[0]


def test_a_study_whose_members_all_diverge_says_what_to_try(small, tmp_path, capsys):
    out = tmp_path / "run"
    said = said_by(capsys, main, [*small.arguments, f"train.lr={TOO_HIGH}", f"out={out}"], 1)
    assert "warning: 2 members diverged: 0 (epoch " in said
    assert "mean: every member diverged, the first in epoch" in said
    assert "train.lr smaller" in said
    metrics = json.loads((out / "metrics.json").read_text())
    plan = pd.read_csv(out / "plan.csv")
    assert metrics["diverged"] == plan[["member", "diverged"]].rename(columns={"diverged": "epoch"}).to_dict("records")
    assert any("member 0 diverged in epoch" in text for text in metrics["warnings"])
    assert not any("(training diverged?)" in text for text in metrics["warnings"])
    page = (out / "report.html").read_text()
    assert "member 1 diverged in epoch" in page
    said_by(capsys, main, [*small.arguments, f"train.lr={TOO_HIGH}", f"out={out}", "resume=true"], 1)
    said = said_by(capsys, mil.heatmap.main, [f"run={out}", "slide=slide_00", f"out={tmp_path / 'h'}"], 2)
    assert "its training diverged" in said


def test_a_sound_study_says_nothing_of_divergence(small):
    assert json.loads((small.out / "metrics.json").read_text())["diverged"] == []
    assert pd.read_csv(small.out / "plan.csv")["diverged"].isna().all()


def test_inner_folds_never_choose_a_rate_at_which_members_diverge(small, tmp_path):
    nested = ["study.nested=2", f"study.grid.lr=[{TOO_HIGH},0.02]", f"out={tmp_path / 'run'}"]
    assert main([*small.arguments, *nested]) == 0
    assert set(pd.read_csv(tmp_path / "run" / "plan.csv")["lr"]) == {0.02}


def test_the_selftest_calls_a_diverged_aggregator_so():
    config = mil.selftest.SelftestConfig(
        aggregators=["mean"], seeds=2, train_bags=20, test_bags=20, epochs=3, lr=TOO_HIGH
    )
    assert mil.training.selftest.run_test("one concept", "mean", config).verdict == "diverged"
