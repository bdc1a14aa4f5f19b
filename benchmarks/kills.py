"""kill -9 at any moment: the same command goes on, and ends with what an uninterrupted one leaves.

    python benchmarks/kills.py [--runs=50] [--first=0] [--seed=0] [--only=passes,extract]

Every run of a command is killed once or twice, then typed again as a user would: the same command; where that says that
the folder exists, with the `resume=true` or else `overwrite=true` that the message names. Some kills come at a moment
drawn from the time that the command takes, others before a drawn one of its file operations (opening a file to write,
renaming, removing, making a folder): those moments are short, and are where half files come from. Every other run is
first killed before another one of the first operations, where it is decided whether there is something to go on with.
Of `readers` not the command is killed, but one of the processes that read slides for it, or all of them: the command
itself then ends, with a message and without what they were busy with. A run depends on its number alone, so that
`--first=25 --runs=25` goes on where `--runs=25` ended.

Checked after each kill: no half file under a final name. Checked at the end: no traceback, and the folder holds the
very files, byte by byte, of an uninterrupted run, and no others: no temporary file and no checkpoint is left. Compared
by content: environment.json, paths.json and metrics.json but for times and command, .safetensors by values and metadata
(its order changes from one writing to the next). report.html and hashes.json, which tell the time too, need only be
there.

Processes are forked from one that has imported everything and computed nothing. Small studies on one thread, with one
figure a report. Prints Markdown; exit code 1 if anything was not as it must be.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors import safe_open

import extract.extraction.work
import extract.finetune
import extract.finetuning.tuning
import extract.run
import mil.api.study
import mil.predict
import mil.prediction.study
import mil.report.page
import mil.train
from extract.features.cache import Provenance, read_header, write_features
from extract.features.folder import open_feature_folder
from extract.features.parquet import import_parquet

TESTS = Path(__file__).resolve().parents[1] / "tests" / "extract"
OUT = "out"
"""What every command writes, in its working directory."""
CHANGES = {"started", "training_seconds", "seconds", "command"}
"""Of environment.json and metrics.json: what two runs of the same command may differ in."""
DEPENDS = {"report.html", "hashes.json"}
WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
MOST_TRIES = 4
LONGEST_SECONDS = 300
"""Within which a command whose readers were killed must end."""

Main = Callable[[list[str]], int]
TREE = dict[str, bytes]


@dataclass(frozen=True)
class Command:
    """A command with its arguments, typed in `folder`, where it writes into `OUT`.

    its_readers: not it, but processes that read for it are killed.
    """

    name: str
    main: Main
    folder: Path
    arguments: list[str] = field(default_factory=list)
    its_readers: bool = False

    @property
    def out(self) -> Path:
        return self.folder / OUT


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run: what it leaves, how long it takes, and how many file operations it does."""

    tree: TREE
    seconds: float
    operations: int


@dataclass
class Counts:
    """Over all runs of a command. `phases`: where kills struck."""

    runs: int = 0
    kills: int = 0
    equal: int = 0
    tracebacks: int = 0
    half: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return self.equal == self.runs and not self.tracebacks and not self.half and not self.wrong


# --- processes -------------------------------------------------------------------------------------------------------


def start(command: Command, arguments: Sequence[str], log: Path, die_at: int = 0) -> int:
    """Fork a process that runs the command, its output in `log`; its id.

    Args:
        die_at: the file operation below the command's folder before which it kills itself; 0 = none.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = sys.stderr = os.fdopen(handle, "w", buffering=1)  # where they were something else, as in tests
        os.chdir(command.folder)
        done = count_operations(command.folder, die_at)
        code = run(command, arguments)
        (command.folder / "operations").write_text(str(done[0]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(command: Command, arguments: Sequence[str]) -> int:
    """Its exit code; 1 after a traceback, as of any program."""
    try:
        return command.main([*command.arguments, *arguments])
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:  # noqa: BLE001 - it is counted
        import traceback

        traceback.print_exc()
        return 1


def count_operations(folder: Path, die_at: int) -> list[int]:
    """Count this process's file operations below `folder` from now on; killed before the one numbered `die_at`."""
    done = [0]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not writes and event not in WRITES:
            return
        if isinstance(arguments[0], int) or not below(folder, arguments[0]):
            return
        done[0] += 1
        if done[0] == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    return done


def below(folder: Path, path: Any) -> bool:
    """Whether it is in the folder (as an absolute path or a relative one: it is the working directory)."""
    text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
    return bool(text) and (not text.startswith("/") or text.startswith(str(folder)))


def wait(pid: int, seconds: float = np.inf) -> int | None:
    """The exit code, negative of the signal that ended it; killed after so many seconds."""
    until = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG if np.isfinite(seconds) else 0)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            os.kill(pid, signal.SIGKILL)
            seconds = np.inf
        time.sleep(0.002)


def uninterrupted(command: Command) -> Reference:
    """Run it to the end, and clear the table for those that are killed."""
    log, began = command.folder / "log", time.monotonic()
    code = wait(start(command, [], log))
    said, seconds = log.read_text(), time.monotonic() - began
    if code != 0:
        raise RuntimeError(f"{command.name}: exit code {code}\n{said}")
    found = Reference(tree_of(command.out), seconds, int((command.folder / "operations").read_text()))
    clear(command)
    return found


def clear(command: Command) -> None:
    shutil.rmtree(command.out)
    (command.folder / "log").unlink()


def one_run(command: Command, reference: Reference, number: int, rng: np.random.Generator, counts: Counts) -> None:
    """Kill the command once or twice, let it end, and compare."""
    log = command.folder / "log"
    for kill in range(rng.integers(1, 3)):
        if command.its_readers:
            seconds = rng.uniform(0, reference.seconds / 2)
            kill_readers(command, log, seconds, everyone=rng.random() < 0.2, counts=counts)
            continue
        by_time = number % 2 == 1 and rng.random() < 0.8
        seconds = rng.uniform(0, reference.seconds) if by_time else np.inf
        die_at = 0 if by_time else int(rng.integers(1, reference.operations + 1))
        if number % 2 == 0 and kill == 0 and 3 + number // 2 <= reference.operations:
            die_at = 3 + number // 2
        code = wait(start(command, advice(log), log, die_at), seconds)
        if code == 2:  # it asks for an argument
            code = wait(start(command, advice(log), log, die_at), seconds)
        if code == -signal.SIGKILL:
            counts.kills += 1
            counts.phases[phase(command.out)] += 1
        look_for_half_files(command, counts)
    code, tries = None, 0
    while code != 0 and tries < MOST_TRIES:
        code, tries = wait(start(command, advice(log), log)), tries + 1
    said = log.read_text()
    found = tree_of(command.out)
    unlike = differences(reference.tree, found) if code == 0 else [f"exit code {code}"]
    counts.runs += 1
    counts.equal += not unlike
    counts.tracebacks += said.count("Traceback")
    counts.wrong += [*unlike, said] if unlike or "Traceback" in said else []
    clear(command)


def kill_readers(command: Command, log: Path, seconds: float, *, everyone: bool, counts: Counts) -> None:
    """Start the command, kill one of its readers (or all) so many seconds after they began, and let it end."""
    pid = start(command, advice(log), log)
    while not readers_of(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    time.sleep(seconds)
    readers = readers_of(pid)
    for reader in readers if everyone else readers[:1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(reader, signal.SIGKILL)
            counts.kills += 1
    counts.phases[phase(command.out) if readers else "no reader was there"] += 1
    code = wait(pid, LONGEST_SECONDS)
    if code not in (0, 1, 2):
        counts.wrong.append(f"readers killed: exit code {code}")
    look_for_half_files(command, counts)


def readers_of(pid: int) -> list[int]:
    """The busiest one first."""
    found = {}
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if "spawn_main" in " ".join(child.cmdline()):
                found[child.pid] = sum(child.cpu_times()[:2])
    return sorted(found, key=lambda reader: -found[reader])


def look_for_half_files(command: Command, counts: Counts) -> None:
    half = half_files(command.out)
    counts.half += len(half)
    counts.wrong += [f"half file: {path}" for path in half]


def advice(log: Path) -> list[str]:
    """What the last refusal asks for; [] where there was none: the same command."""
    said = log.read_text().rstrip().rpartition("\n")[2] if log.exists() else ""
    for argument in ("resume=true", "overwrite=true"):
        if argument in said:
            return [argument]
    return []


# --- folders ---------------------------------------------------------------------------------------------------------


def tree_of(folder: Path) -> TREE:
    """Every file below it, hidden ones too, by name; without what two runs may differ in. Folders beside `out` too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    beside = folder.parent.glob(f".{folder.name}.*")
    return {str(path.relative_to(folder.parent)): content_of(path) for path in [*files, *beside]}


def content_of(path: Path) -> bytes:
    if path.name in DEPENDS or path.is_dir():
        return b""
    if path.name in ("environment.json", "metrics.json"):
        return json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in CHANGES}).encode()
    if path.name == "paths.json":  # what environment.json holds in short, by its place there: /command/5
        values = json.loads(path.read_text())["values"]
        return json.dumps({k: v for k, v in values.items() if k.split("/")[1] not in CHANGES}).encode()
    if path.suffix == ".safetensors":
        return tensors_of(path)
    return path.read_bytes()


def tensors_of(path: Path) -> bytes:
    """Values and metadata by name: safetensors writes its metadata in another order every time."""
    with safe_open(path, "pt") as file:
        tensors = {name: (file.get_tensor(name).shape, file.get_tensor(name).numpy().tobytes()) for name in file.keys()}  # noqa: SIM118
        return repr((sorted((file.metadata() or {}).items()), sorted(tensors.items()))).encode()


def differences(expected: TREE, found: TREE) -> list[str]:
    absent = [f"absent: {name}" for name in expected if name not in found]
    more = [f"left: {name}" for name in found if name not in expected]
    other = [f"other content: {name}" for name in expected if name in found and expected[name] != found[name]]
    return absent + more + other


def half_files(folder: Path) -> list[Path]:
    """Files under a final name that cannot be read to their end."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    visible = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return [path for path in visible if not is_whole(path)]


def is_whole(path: Path) -> bool:
    try:
        return READERS[path.suffix](path) is not False
    except Exception:  # noqa: BLE001 - whatever a library says of a half file
        return False


def read_safetensors(path: Path) -> None:
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no dict
            file.get_tensor(name)


def read_feature_file(path: Path) -> None:
    header, folder = read_header(path), open_feature_folder(path.parent, "cache")
    if len(folder.features(path.stem)) != header.n_tiles:
        raise ValueError(path)


def read_table(path: Path) -> bool:
    with path.open(newline="", encoding="utf-8") as file:
        widths = {len(row) for row in csv.reader(file)}
    return len(widths) == 1 and path.read_bytes().endswith(b"\n")


READERS: dict[str, Callable[[Path], Any]] = {
    ".csv": read_table,
    ".json": lambda path: json.loads(path.read_text()),
    ".yaml": lambda path: path.read_text().endswith("\n") and yaml.safe_load(path.read_text()) is not None,
    ".md": lambda path: path.read_text().endswith("\n"),
    ".html": lambda path: path.read_text().rstrip().endswith("</html>"),
    ".png": lambda path: b"IEND" in path.read_bytes()[-16:] and cv2.imread(str(path)) is not None,
    ".safetensors": read_safetensors,
    ".pt": lambda path: torch.load(path, weights_only=True),
    ".ckpt": lambda path: torch.load(path, weights_only=False),
    ".h5": read_feature_file,
}


def phase(out: Path) -> str:
    """How far a command had come, by what it has left."""
    files = [path for path in out.rglob("*") if path.is_file()]
    names, own = {path.name for path in files}, {path.name for path in files if path.parent == out}
    if not any(not name.startswith(".") for name in names):
        return "before the first file"
    if own & {"hashes.json", "source.json", "comparison.csv"}:
        return "at the end"
    if "hashes.json" in names:
        return "in the second aggregator"
    if names & {"members.safetensors", "metrics.json", "predict.yaml", "head.safetensors"}:
        return "results are written"
    if "last.ckpt" in names or any(name.startswith("pass") for name in names):
        return "in training"
    return "slides are written" if any(name.endswith(".h5") for name in names) else "at the beginning"


# --- commands --------------------------------------------------------------------------------------------------------

QUICK = ["study.folds=2", "train.epochs=10", "train.batch_size=5", "train.lr=0.02", "train.accelerator=cpu"]
QUICK += ["report.bootstrap=0", "report.heatmaps=0", "train.members_per_pass=8"]
TINY = ["encoder.name=timm:test_vit", "encoder.random_weights=true", "encoder.device=cpu"]


def write_study(folder: Path) -> list[str]:
    """18 slides of two classes with their features; the arguments that name them."""
    rng, rows = np.random.default_rng(3), []
    for i in range(18):
        features_ND = rng.normal(size=(rng.integers(3, 21), 6)).astype(np.float32)
        features_ND[0, 0] += 4 * (i % 2)
        grid_N2 = np.stack([np.arange(len(features_ND)) * 448, np.zeros(len(features_ND))], axis=1)
        where = Provenance("synthetic", "none", 224, 0.5, tile_level0_px=448, slide=f"s{i:02d}")
        write_features(folder / f"s{i:02d}.h5", features_ND, grid_N2, where)
        rows.append((f"s{i:02d}", f"p{i:02d}", "ab"[i % 2], "test" if i >= 14 else "train"))
    pd.DataFrame(rows, columns=["slide", "patient", "label", "split"]).to_csv(folder / "cohort.csv", index=False)
    return [f"cohort={folder / 'cohort.csv'}", f"features.folder={folder}"]


def helper(name: str) -> ModuleType:
    """A module of the tests that paints slides or tiles."""
    spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def imports(arguments: list[str]) -> int:
    """`import_parquet` as a command: from where, to `OUT`."""
    import_parquet(Path(OUT), root=Path(arguments[0]), dim=6)
    return 0


def write_parquet(root: Path) -> None:
    schema = pa.schema([("features", pa.list_(pa.list_(pa.float32()))), ("label", pa.int64())])
    for n, name in ((12, "Phikon_train-00000-of-00001.parquet"), (5, "Phikon_test-00000-of-00001.parquet")):
        rng = np.random.default_rng(n)
        tiles = [rng.integers(0, 99, (rng.integers(3, 40), 6)).astype(np.float32).tolist() for _ in range(n)]
        table = pa.table({"features": tiles, "label": [i % 2 for i in range(n)]}, schema=schema)
        pq.write_table(table, root / name, row_group_size=2)


def training(root: Path, kind: str, *own: str) -> Command:
    (root / "study").mkdir(exist_ok=True)
    arguments = [*write_study(root / "study"), *QUICK, *own]
    return Command(f"train, {kind}", mil.train.main, root / kind, [*arguments, f"out={OUT}"])


def two_aggregators(root: Path) -> Command:
    names = ["model.name=[mean,abmil]", "model.abmil.hidden=6", "model.abmil.attention=5"]
    return training(root, "two aggregators", *names)


def two_passes(root: Path) -> Command:
    one = ["model.name=mean", "train.members_per_pass=1", "train.select=best", "study.val_fraction=0.3"]
    return training(root, "two passes", *one)


def nested(root: Path) -> Command:
    return training(root, "nested", "model.name=mean", "study.nested=2", "study.grid.lr=[0.02,0.002]")


def prediction(root: Path) -> Command:
    """Of a study that is trained here, in a process of its own."""
    study = training(root, "to predict", "model.name=mean")
    study.folder.mkdir()
    if wait(start(study, [], study.folder / "log")) != 0:
        raise RuntimeError((study.folder / "log").read_text())
    data = study.arguments[:2]
    options = [f"run={study.out}", *data, "report.bootstrap=0", "device=cpu", "known_patients=score", f"out={OUT}"]
    return Command("predict", mil.predict.main, root / "predict", options)


def extraction(root: Path) -> Command:
    slides = helper("slides")
    (root / "slides").mkdir()
    for i in range(4):
        slides.painted_slide(root / "slides" / f"s{i}.tiff", 901 - 40 * i, 703, seed=i)
    options = [*TINY, "extract.workers=0", f"slides.folder={root / 'slides'}", "qc=true", f"out={OUT}"]
    return Command("extract", extract.run.main, root / "extract", options)


def readers(root: Path) -> Command:
    (root / "read").mkdir()
    command = extraction(root / "read")
    options = ["extract.workers=2" if a == "extract.workers=0" else a for a in command.arguments]
    return replace(command, name="extract, its readers", arguments=options, its_readers=True)


def finetuning(root: Path) -> Command:
    tiles = helper("textures").write_tiles(root / "tiles", 24, 160, n_patients=6)
    options = [f"data.csv={tiles}", *TINY, "train.epochs=2", "bootstrap=20", f"out={OUT}"]
    return Command("finetune", extract.finetune.main, root / "finetune", options)


def parquet(root: Path) -> Command:
    (root / "parquet").mkdir()
    write_parquet(root / "parquet")
    return Command("Parquet import", imports, root / "import", [str(root / "parquet")])


COMMANDS: dict[str, Callable[[Path], Command]] = {
    "aggregators": two_aggregators,
    "passes": two_passes,
    "nested": nested,
    "predict": prediction,
    "extract": extraction,
    "readers": readers,
    "finetune": finetuning,
    "parquet": parquet,
}


def kill_often(command: Command, runs: range, seed: int) -> Counts:
    command.folder.mkdir(exist_ok=True)
    reference, counts = uninterrupted(command), Counts()
    for number in runs:
        one_run(command, reference, number, np.random.default_rng([seed, number]), counts)
    return counts


def row(command: Command, counts: Counts) -> str:
    where = ", ".join(f"{name} {n}" for name, n in counts.phases.most_common())
    cells = (command.name, counts.runs, counts.kills, where, counts.equal, counts.half, counts.tracebacks)
    return f"| {' | '.join(map(str, cells))} |"


def begin(script: str, *packages: str) -> dict[str, str]:
    """The arguments; one thread, one figure a report, and the first lines printed."""
    from machine import machine

    torch.set_num_threads(1)
    mil.report.page.FIGURES = {"roc": mil.report.page.FIGURES["roc"]}
    mil.report.page.SECTIONS = {k: replace(v, figures=()) for k, v in mil.report.page.SECTIONS.items()}
    print(f"Command: `python benchmarks/{script} {' '.join(sys.argv[1:])}`\n")
    print(machine(*packages) + "\n")
    return dict(a.removeprefix("--").split("=") for a in sys.argv[1:])


def main() -> int:
    arguments = begin("kills.py", "torch", "lightning", "h5py")
    first, seed = int(arguments.get("first", 0)), int(arguments.get("seed", 0))
    runs = range(first, first + int(arguments.get("runs", 50)))
    only = arguments.get("only", ",".join(COMMANDS)).split(",")
    print("| command | runs | kills | when | equal | half files | tracebacks |\n" + "| --- " * 7 + "|")
    good = True
    with tempfile.TemporaryDirectory() as folder:
        for name in only:
            command = COMMANDS[name](Path(folder))
            counts = kill_often(command, runs, seed)
            print(row(command, counts), flush=True)
            print("\n".join(counts.wrong), file=sys.stderr, end="")
            good &= counts.good
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
