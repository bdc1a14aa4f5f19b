"""The SLURM and Nextflow examples of configs/: what they would run is run, with stubs in the scheduler's place."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from extract.config import SHIPPED_CONFIGS, STUDY_KEYS, ExtractConfig, load_config
from extract.extraction.todo import cohort_slides, shard_of
from mil.config import StudyConfig
from mil.config_problems import study_problems

SLURM, NEXTFLOW = SHIPPED_CONFIGS / "slurm", SHIPPED_CONFIGS / "nextflow" / "main.nf"


@pytest.fixture
def submitted(tmp_path) -> Callable[..., list[list[str]]]:
    """`submitted(SLIDES=..., ...)`: submit.sh with stubs of python, sbatch and srun; the commands in their order.

    sbatch runs the script at once, an array's job after job, as SLURM sets their variables.
    """
    log = tmp_path / "log"
    stubs = {
        "python": f'echo "python $*" >> {shlex.quote(str(log))}',
        "srun": f'echo "srun $*" >> {shlex.quote(str(log))}',
        "sbatch": "\n".join(
            [
                f'echo "sbatch $*" >> {shlex.quote(str(log))}',
                'parts=1; for a in "$@"; do case $a in --array=1-*) parts=${a#--array=1-};; esac; script=$a; done',
                'for i in $(seq "$parts"); do',
                '  SLURM_ARRAY_TASK_ID=$i SLURM_ARRAY_TASK_COUNT=$parts SLURM_CPUS_PER_TASK=4 bash "$script" >&2',
                "done; echo 4711",
            ]
        ),
    }
    (tmp_path / "bin").mkdir()
    for name, text in stubs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\nset -euo pipefail\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def submit(**variables: str) -> list[list[str]]:
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        environment = {"PATH": path, "HOME": str(tmp_path)} | variables
        subprocess.run(["bash", str(SLURM / "submit.sh")], env=environment, check=True, timeout=60)
        return [shlex.split(line) for line in log.read_text().splitlines()]

    return submit


def test_the_array_extracts_every_slide_once_and_then_trains(submitted, slides, tmp_path):
    (tmp_path / "slides").mkdir()
    for number in range(5):
        slides.write_tiff(tmp_path / "slides" / f"s{number}.tiff", [slides.glass(50, 40)], mpp=0.5)
    runs = submitted(
        SLIDES=f"{tmp_path / 'slides'}", OUT=f"{tmp_path / 'out'}", PARTS="3", COHORT="c.csv", RUN="runs/a"
    )
    assert [run[0] for run in runs] == ["python", "sbatch", "srun", "srun", "srun", "sbatch", "srun"]
    assert runs[0][1:] == [str(SLURM / ".." / "weights.py"), "phikon"], "weights are fetched once, before the array"
    assert "--dependency=afterany:4711" in runs[5]
    taken = []
    for run in runs[2:5]:
        assert run[1:4] == ["python", "-m", "extract.run"]
        config = load_config(ExtractConfig, run[4:], ignored=STUDY_KEYS, bare_section="extract")
        assert config.extract.workers == 4
        taken += [file.slide for file in shard_of(cohort_slides(config), config.extract.shard)]
    assert sorted(taken) == [f"s{number}" for number in range(5)]
    assert runs[6][1:4] == ["python", "-m", "mil.train"]
    study = load_config(StudyConfig, runs[6][4:], also=study_problems)
    assert (study.features.folder, study.out, study.resume) == (tmp_path / "out", Path("runs/a"), False)


def test_a_job_without_its_folders_says_what_to_set(tmp_path):
    command = ["bash", str(SLURM / "submit.sh")]
    found = subprocess.run(command, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert "set SLIDES=FOLDER" in found.stderr


def test_the_commands_of_the_nextflow_example_are_valid(tmp_path):
    text = NEXTFLOW.read_text()
    assert len([line for line in text.splitlines() if line and not line.startswith("//")]) <= 45
    code = re.sub(r"//.*|'[^'\n]*'|\"[^\"\n]*\"", "", text)
    for opening, closing in ("{}", "()", "[]"):
        assert code.count(opening) == code.count(closing)
    processes = re.findall(r"^process (\w+) \{", text, re.MULTILINE)
    assert all(len(re.findall(rf"\b{name}\(", text)) == 1 for name in processes), "each is used once"
    scripts = re.findall(r'script: "(.*)"$', text, re.MULTILINE)
    assert len(scripts) == len(processes) == 3
    values = {
        f"params.{name}": value for name, value in re.findall(r"^params\.(\w+) = '?([^'\n]*)'?$", text, re.MULTILINE)
    }
    values |= {"params.slides": str(tmp_path), "params.out": "s3://lab/phikon", "params.cohort": "c.csv"}
    values |= {"part": "2", "task.cpus": "8", "projectDir": str(NEXTFLOW.parent)}
    weights, extract, train = (
        shlex.split(re.sub(r"\$\{([\w.]+)\}", lambda found: values[found[1]], one)) for one in scripts
    )
    assert weights[0] == "python"
    assert Path(weights[1]).is_file()
    assert extract[:3] == ["python", "-m", "extract.run"]
    config = load_config(ExtractConfig, extract[3:], ignored=STUDY_KEYS, bare_section="extract")
    assert (config.extract.shard, config.encoder.name) == ("2/8", "phikon")
    assert train[:3] == ["python", "-m", "mil.train"]
    load_config(StudyConfig, train[3:], also=study_problems)


def test_weights_are_loaded_where_they_come_from_the_hub(script, monkeypatch, capsys):
    weights = script(SHIPPED_CONFIGS / "weights.py")
    asked = []

    class Loaded:
        source, weights_sha256 = "the hub", "0123456789abcdef"

    monkeypatch.setattr(weights, "load_encoder", lambda section: (asked.append(section), Loaded())[1])
    weights.main(["phikon", "uni"])
    assert [(section.name, section.device) for section in asked] == [("phikon", "cpu"), ("uni", "cpu")]
    assert "phikon: the hub, weights 0123456789ab" in capsys.readouterr().out
