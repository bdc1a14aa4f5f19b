"""What goes wrong around a study: other devices, other commands, full and read-only disks, signals, divergence."""

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from scipy.special import expit

import mil.report.page
from mil.config import StudyConfig, of_earlier_versions
from mil.heatmap import HeatmapConfig
from mil.look.tilescores import features_of
from mil.prediction.config import PredictConfig
from mil.results.trained import bags_of, logits_of, open_run
from mil.train import main
from mil.training.module import MembersModule, predict_logits

SETTINGS = [
    "study.folds=2",
    "train.epochs=2",
    "train.batch_size=5",
    "train.lr=0.02",
    "train.accelerator=cpu",
    "model.name=mean",
    "report.bootstrap=0",
    "report.heatmaps=0",
]


@dataclass(frozen=True)
class Small:
    """A study of 16 slides on disk: the arguments that train it, and a finished run folder."""

    arguments: list[str]
    out: Path


@pytest.fixture(autouse=True)
def one_figure_only(monkeypatch):
    monkeypatch.setattr(mil.report.page, "FIGURES", {"roc": mil.report.page.FIGURES["roc"]})


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


@pytest.mark.parametrize("value", ["2", "auto", "-1", "[0,1]", "true"])
def test_more_than_one_device_is_refused(small, tmp_path, capsys, value):
    said = said_by(capsys, main, [*small.arguments, f"train.devices={value}", f"out={tmp_path / 'run'}"], 2)
    assert "train.devices: expected 1, got" in said
    assert "share out members" in said
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
    assert "train.precision: input should be '32-true' or 'bf16-mixed'" in said
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
