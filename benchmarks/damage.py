"""Damaged files of every kind that is read: read, or refused by a message that names the file; nothing else.

    python benchmarks/damage.py [--mutations=20000] [--seed=0] [--kinds=tiff,svs] [--minutes=30] [--into=sum.json]

`--mutations=1000000`, shared out among the kinds in rounds, is the run before a release; with `--minutes` no more are
begun when that time is over, and the last line says how many there were. `--into` keeps the outcomes in a file: the
same command goes on where it ended, each kind with its next number, and prints the sum of all its parts, so that a
million need not be one run. Each mutation is drawn from (seed, its kind,
its number) alone. Outcomes: `read` = something came out (formats without checksums cannot tell; of this toolkit's
own feature files, which have them: what was written); `refused` = an error of ours that names the file; failures are
`traceback` (any other exception, or a message without the file), `crash` (the process died), `slow` (more than 30 s)
and `left behind` (refused, and yet something was written). Files of a run folder are damaged without its hashes.json,
with which every one would be refused. Reading is done in processes of its own. Prints Markdown.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from types import ModuleType

import numpy as np

READ, REFUSED = "read", "refused"
FAILURES = TRACEBACK, CRASH, SLOW, LEFT = "traceback", "crash", "slow", "left behind"
PER_WORKER, SECONDS_A_CASE, SECONDS_A_WORKER = 500, 30, 3_600
HERE = Path(__file__).resolve().parent

Change = Callable[[bytes, np.random.Generator], bytes]


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = made  # where dataclasses look for what an annotation names
    spec.loader.exec_module(made)
    return made


OF_BYTES = module(HERE / "reliability.py")
OF_TEXT: tuple[Change, ...] = module(HERE.parent / "tests" / "mutations.py").KINDS
EXTREMES = (0, 1, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def field(whole: bytes, rng: np.random.Generator) -> bytes:
    """An extreme number where a header may have one."""
    damaged, at = bytearray(whole), 2 * int(rng.integers(len(whole) // 2))
    n_bytes = int(rng.choice([2, 4, 8]))
    value = EXTREMES[int(rng.integers(len(EXTREMES)))] % 256**n_bytes
    damaged[at : at + n_bytes] = value.to_bytes(n_bytes, "little")
    return bytes(damaged[: len(whole)])


def damaged_bytes(whole: bytes, rng: np.random.Generator) -> bytes:
    kinds = [*OF_BYTES.MUTATIONS.values(), field, field]
    return bytes(kinds[int(rng.integers(len(kinds)))](bytearray(whole), rng))


def damaged_text(whole: bytes, rng: np.random.Generator) -> bytes:
    return OF_TEXT[int(rng.integers(len(OF_TEXT)))](whole, rng)


# --- what is written, and how it is read --------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """`write` makes a whole file at the path, `read` reads all of it; `damage` is for bytes or for text. `named`: a
    refusal must name the file (of a config it names the key; of files that contradict each other, either)."""

    name: str
    write: Callable[[Path], object]
    read: Callable[[Path], object]
    damage: Change = damaged_bytes
    named: bool = True


def write_own(path: Path) -> None:
    OF_BYTES.write_example(path, 37, 5)


@cache
def own_values() -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.h5"
        write_own(path)
        return repr(OF_BYTES.read_everything(path)[1:])


def read_own(path: Path) -> None:
    if repr(OF_BYTES.read_everything(path)[1:]) != own_values():
        raise AssertionError("other values than were written, and nothing was said")


def write_parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("features", pa.list_(pa.list_(pa.float32()))), ("label", pa.int64())])
    rng = np.random.default_rng(0)
    slides = [rng.integers(0, 90, (n, 6)).astype(np.float32).tolist() for n in (5, 1, 9)]
    pq.write_table(pa.table({"features": slides, "label": [0, 1, 1]}, schema=schema), path, row_group_size=2)


def read_parquet(path: Path) -> None:
    """In place, and imported: nothing that says "complete" is left of an import that is refused."""
    from extract.features.parquet import import_parquet, open_parquet_features

    features = open_parquet_features([path], 6)
    for slide in features.slides:
        features.features(slide)
    cache = path.parent / "imported"
    import_parquet(cache, root=path.parent, files={"train": path.name}, dim=6, progress=lambda _: None)
    shutil.rmtree(cache)


def write_clam(path: Path) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        features = np.random.default_rng(0).normal(size=(23, 5)).astype(np.float32)
        file.create_dataset("features", data=features, chunks=(8, 5), maxshape=(None, 5), compression="gzip")
        file["coords"] = np.arange(46, dtype=np.int64).reshape(23, 2)
        file["coords"].attrs["patch_level"] = 1


def write_pt(path: Path) -> None:
    import torch

    torch.save(torch.arange(60.0).reshape(12, 5), path)


def write_npy(path: Path) -> None:
    np.save(path, np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32))


def read_features(layout: str) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        from extract.features.folder import open_feature_folder

        folder = open_feature_folder(path.parent, layout)
        for reader in (folder.header, folder.features, folder.mapped, folder.coords):
            reader(path.stem)

    return read


def write_weights(path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {"a.weight": torch.ones(3, 4), "a.bias": torch.zeros(3), "n": torch.tensor([7])}
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)


def read_weights(path: Path) -> None:
    from extract.encoders.weights import read_state_dict

    read_state_dict(path)


def write_slide(path: Path) -> None:
    painter = module(HERE.parent / "tests" / "extract" / "slides.py")
    image, _ = painter.paint_tissue(310, 230)
    if path.suffix in (".png", ".jpg"):
        import cv2

        cv2.imwrite(str(path), image)
        return
    levels = painter.shrink(image, [(155, 115), (77, 57)])
    mpp_in, compression = ("aperio", "jpeg") if path.suffix == ".svs" else ("tags", "deflate")
    painter.write_tiff(path, levels, mpp=2.0, mpp_in=mpp_in, compression=compression)


def read_slide(path: Path) -> None:
    """As extraction does: the overview, the tissue, the plan, all tiles."""
    from extract.config import Tiles
    from extract.slides.slide import open_slide
    from extract.slides.tiles import group_into_regions, plan_tiles, read_tiles
    from extract.slides.tissue import find_tissue

    with open_slide(path, default_mpp=2.0) as slide:
        assert slide.fingerprint
        thumbnail = slide.thumbnail(8.0)
        tissue = find_tissue(thumbnail.image_HW3, thumbnail.mpp)
        plan = plan_tiles(slide.geometry, tissue, tile_px=32, mpp=slide.mpp, section=Tiles())
        for region in group_into_regions(plan)[:50]:
            read_tiles(slide, plan, region)


def text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content, encoding="utf-8")


SQUARE = [[10, 20], [410, 20], [410, 330], [10, 330], [10, 20]]
GEOJSON = json.dumps(
    {
        "type": "FeatureCollection",
        "features": [
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [SQUARE]},
                "properties": {"classification": {"name": "Tumor", "color": [1, 2, 3]}},
            }
        ],
    }
)
ASAP = (
    '<?xml version="1.0"?>\n<ASAP_Annotations><Annotations>'
    '<Annotation Name="A" Type="Polygon" PartOfGroup="Tumor" Color="#F4FA58"><Coordinates>'
    + "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}" />' for i, (x, y) in enumerate(SQUARE))
    + "</Coordinates></Annotation></Annotations></ASAP_Annotations>"
)
COHORT = "slide,patient,label,split,path,mpp\n" + "".join(
    f"s{i},p{i // 2},{'ab'[i % 2]},{'test' if i > 7 else ''},,{0.25 if i % 3 else ''}\n" for i in range(11)
)
FOLDS = "slide,fold,repeat,role\n" + "".join(f"s{i},{i % 3},0,test\n" for i in range(9))


def read_outline(path: Path) -> None:
    from mil.look.outlines import read_outlines

    assert np.isfinite(read_outlines(path).area.area)


def read_table(path: Path) -> None:
    from extract.cohort import read_cohort

    read_cohort(path)


def read_folds(path: Path) -> None:
    from mil.study.own_folds import _read_folds

    _read_folds(path)


def write_config(path: Path) -> None:
    from extract.config import SHIPPED_CONFIGS

    whole = (SHIPPED_CONFIGS / "camelyon16-paper.yaml").read_text()
    path.write_text("\n".join(line for line in whole.splitlines() if not line.startswith("#")))


def read_config(path: Path) -> None:
    from extract.config import load_config
    from mil.config import StudyConfig
    from mil.config_problems import study_problems

    load_config(StudyConfig, [f"config={path}"], also=study_problems)


def write_tiles(path: Path) -> None:
    for i in range(12):
        (path.parent / f"t{i}.png").write_bytes(b"x")
    rows = (f"t{i}.png,{'ab'[i % 2]},p{i},train\n" for i in range(12))
    path.write_text("image,label,patient,split\n" + "".join(rows))


def read_tiles_table(path: Path) -> None:
    from extract.finetuning.config import TileData
    from extract.finetuning.tilesets import _from_csv

    _from_csv(TileData(csv=path))


ARGUMENTS = """cohort=c.csv
features.folder=f
model.name=[abmil,chowder]
model.chowder.n_top=5
study.folds=5
study.train_sizes=[20]
train.epochs=20
train.lr=1e-3
data.memory=mmap
classes=[a,b]
report.bootstrap=100
out=o
"""


def read_arguments(path: Path) -> None:
    from extract.config import load_config
    from mil.config import StudyConfig
    from mil.config_problems import study_problems

    load_config(StudyConfig, path.read_bytes().decode(errors="surrogateescape").splitlines(), also=study_problems)


def read_other_config(schema: str, check: str) -> Callable[[Path], None]:
    """`module:class` of the config and `module:function` of what is wrong with it as a whole."""

    def read(path: Path) -> None:
        from extract.config import load_config

        (of_schema, name), (of_check, function) = schema.split(":"), check.split(":")
        also = getattr(importlib.import_module(of_check), function)
        load_config(getattr(importlib.import_module(of_schema), name), [f"config={path}"], also=also)

    return read


EXTRACT = """slides: {folder: ., mpp: 0.5}
features: {folder: out, dtype: float16}
encoder: {name: phikon, device: cpu, precision: float32}
tissue: {method: otsu, pen_marks: true}
tiles: {mpp: 0.5, overlap_px: 0}
extract: {workers: 2, qc: true}
"""
FINETUNE = """data: {folder: ., val_fraction: 0.15}
encoder: {name: phikon}
mode: lora
lora: {rank: 4}
train: {epochs: 5, lr: 1e-4, batch_size: 32}
out: runs/x
"""
PREDICT = """run: runs/x
cohort: new.csv
features: {folder: f, layout: auto}
report: {bootstrap: 100}
known_patients: score
out: predictions/x
"""


def write_run(path: Path) -> None:
    """The run folder that the file at this path is of."""
    import mil.report.page
    from mil.train import main as train

    kills, folder = module(HERE / "kills.py"), path.parents[1] / "study"
    folder.mkdir()
    mil.report.page.FIGURES.clear()
    options = [*kills.QUICK, "model.name=mean", "train.epochs=2", f"out={path.parent}"]
    with contextlib.redirect_stdout(io.StringIO()):
        code = train([*kills.write_study(folder), *options])
    if code:
        raise RuntimeError(f"training ended with exit code {code}")
    if path.name != "hashes.json":
        (path.parent / "hashes.json").unlink()


def read_run(path: Path) -> None:
    """As predicting and comparing do."""
    import mil.report.comparison
    from mil.results.trained import open_run, score_slide
    from mil.training.inputs import changed_inputs

    with contextlib.redirect_stderr(io.StringIO()):  # that there are no hashes
        trained = open_run(path.parent)
        score_slide(trained, np.ones((5, 6), np.float32))
        mil.report.comparison.read_run("run", path.parent)
        changed_inputs(path.parent, [("s00", "")])


def of_run(name: str) -> Kind:
    return Kind(f"run/{name}", write_run, read_run, damaged_bytes if name.endswith("tensors") else damaged_text, False)


FILES = {
    "parquet": Kind("s.parquet", write_parquet, read_parquet),
    "clam": Kind("s.h5", write_clam, read_features("clam")),
    "pt": Kind("s.pt", write_pt, read_features("clam")),
    "npy": Kind("s.npy", write_npy, read_features("torchmil")),
    "safetensors": Kind("w.safetensors", write_weights, read_weights),
    "pth": Kind("w.pth", write_weights, read_weights),
    "tiff": Kind("s.tiff", write_slide, read_slide),
    "svs": Kind("s.svs", write_slide, read_slide),
    "png": Kind("s.png", write_slide, read_slide),
    "jpeg": Kind("s.jpg", write_slide, read_slide),
    "geojson": Kind("s.geojson", text(GEOJSON), read_outline, damaged_text),
    "asap": Kind("s.xml", text(ASAP), read_outline, damaged_text),
    "cohort": Kind("c.csv", text(COHORT), read_table, damaged_text),
    "folds": Kind("f.csv", text(FOLDS), read_folds, damaged_text),
    "config": Kind("c.yaml", write_config, read_config, damaged_text, named=False),
    "features": Kind("s.h5", write_own, read_own),
    "labelled tiles": Kind("t.csv", write_tiles, read_tiles_table, damaged_text),
    "arguments": Kind("a.txt", text(ARGUMENTS), read_arguments, damaged_text, named=False),
    "run: members": of_run("members.safetensors"),
    "run: plan": of_run("plan.csv"),
    "run: roles": of_run("roles.csv"),
    "run: predictions": of_run("predictions.csv"),
    "run: metrics": of_run("metrics.json"),
    "run: environment": of_run("environment.json"),
    "run: config": of_run("config.yaml"),
    "extract config": Kind(
        "c.yaml",
        text(EXTRACT),
        read_other_config("extract.config:ExtractConfig", "extract.run:extraction_problems"),
        damaged_text,
        named=False,
    ),
    "finetune config": Kind(
        "c.yaml",
        text(FINETUNE),
        read_other_config("extract.finetuning.config:FinetuneConfig", "extract.finetuning.config:finetune_problems"),
        damaged_text,
        named=False,
    ),
    "predict config": Kind(
        "c.yaml",
        text(PREDICT),
        read_other_config("mil.prediction.config:PredictConfig", "mil.prediction.config:predict_problems"),
        damaged_text,
        named=False,
    ),
    "run: features": of_run("features.csv"),
    "run: decisions": of_run("decisions.json"),
    "run: paths": of_run("paths.json"),
    "run: hashes": of_run("hashes.json"),
}


# --- outcomes ------------------------------------------------------------------------------------------------------


def known() -> tuple[type[Exception], ...]:
    """What the commands turn into a message."""
    from extract.config import ProblemsError
    from extract.encoders.table import EncoderError
    from extract.features.errors import CacheError
    from extract.slides.errors import SlideError
    from extract.slides.tiles import GeometryError

    return ProblemsError, EncoderError, CacheError, SlideError, GeometryError


class TooSlowError(BaseException):
    """A case took longer than SECONDS_A_CASE."""


def too_slow(*_: object) -> None:
    raise TooSlowError


def outcome(kind: Kind, path: Path, what: str) -> str:
    """What reading the file comes to. `what`: which mutation it is, for messages."""
    signal.alarm(SECONDS_A_CASE)
    try:
        kind.read(path)
        return READ
    except known() as error:
        found = REFUSED if path.name in str(error) or not kind.named else TRACEBACK
        if found == TRACEBACK:
            print(f"{what}: does not name the file: {error}", file=sys.stderr)
        return LEFT if (path.parent / "imported" / "source.json").exists() else found
    except TooSlowError:
        print(f"{what}: more than {SECONDS_A_CASE} s", file=sys.stderr)
        return SLOW
    except Exception:  # noqa: BLE001 - what escapes is what is counted
        print(f"{what}: {traceback.format_exc()}", file=sys.stderr)
        return TRACEBACK
    finally:
        signal.alarm(0)
        shutil.rmtree(path.parent / "imported", ignore_errors=True)


def mutate(name: str, folder: Path, seed: int, first: int, count: int) -> Counter[str]:
    """Outcomes of mutations `first` to `first + count` of one kind."""
    kind, path = FILES[name], folder / FILES[name].name
    path.parent.mkdir(exist_ok=True)
    kind.write(path)
    whole = path.read_bytes()
    kind.read(path)
    found: Counter[str] = Counter()
    for number in range(first, first + count):
        rng = np.random.default_rng([seed, number, list(FILES).index(name)])
        damaged = whole
        while damaged == whole:
            damaged = kind.damage(whole, rng)
        path.unlink(missing_ok=True)  # a new file: the old one may still be mapped
        path.write_bytes(damaged)
        found[outcome(kind, path, f"{name}, mutation {number} of seed {seed}")] += 1
    return found


def in_a_worker(name: str, seed: int, first: int, count: int) -> Counter[str]:
    """`mutate` in a process of its own; where that dies or hangs, in halves, down to the mutation that did it."""
    found: Counter[str] = OF_BYTES.in_a_worker(__file__, [name, str(seed)], first, count, SECONDS_A_WORKER)
    return found


def work(name: str, numbers: list[int]) -> None:
    signal.signal(signal.SIGALRM, too_slow)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(mutate(name, Path(folder), *numbers)))


def earlier_parts(path: Path | None, seed: int, names: list[str]) -> tuple[dict[str, Counter[str]], Counter[str]]:
    """Outcomes and seconds by kind, of what `keep` kept there; those of `names` first."""
    content = json.loads(path.read_text()) if path and path.exists() else {"seed": seed, "found": {}, "seconds": {}}
    if content["seed"] != seed:
        raise SystemExit(f"--into={path}: is of seed {content['seed']}; give --seed={content['seed']}, or another file")
    found = {name: Counter(content["found"].get(name, {})) for name in [*names, *content["found"]]}
    return found, Counter(content["seconds"])


def keep(path: Path | None, seed: int, found: dict[str, Counter[str]], seconds: Counter[str]) -> None:
    if path:
        new = path.with_name(f"{path.name}.new")
        new.write_text(json.dumps({"seed": seed, "found": found, "seconds": seconds}, indent=1) + "\n")
        new.replace(path)


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], [int(number) for number in sys.argv[3:]])
        return 0
    from machine import machine

    arguments = dict(a.removeprefix("--").split("=") for a in sys.argv[1:])
    n_mutations, seed = int(arguments.get("mutations", 20_000)), int(arguments.get("seed", 0))
    names = arguments["kinds"].split(",") if "kinds" in arguments else list(FILES)
    print(f"Command: `python benchmarks/damage.py {' '.join(sys.argv[1:])}`\n")
    print(machine("numpy", "h5py", "pyarrow", "openslide-bin", "pillow", "safetensors", "torch") + "\n")
    columns, until = (READ, REFUSED, *FAILURES), time.monotonic() + 60 * float(arguments.get("minutes", "inf"))
    kept = Path(arguments["into"]) if "into" in arguments else None
    found, seconds = earlier_parts(kept, seed, names)
    each = -(-n_mutations // len(names))
    for first, name in product(range(0, each, PER_WORKER), names):  # in rounds
        began, done = time.monotonic(), found[name].total()
        if began < until and done < min(first + PER_WORKER, each):
            found[name] += in_a_worker(name, seed, done, min(first + PER_WORKER, each) - done)
            seconds[name] += round(time.monotonic() - began)
            keep(kept, seed, found, seconds)
    print(f"| kind | files | {' | '.join(columns)} | s |\n{'| --- ' * (len(columns) + 3)}|")
    for name in found:
        cells = " | ".join(f"{n:,}" for n in (found[name].total(), *(found[name][column] for column in columns)))
        print(f"| {name} | {cells} | {seconds[name]} |")
    total = sum(found.values(), Counter[str]())
    print(f"\n{sum(total[what] for what in FAILURES)} failures of {total.total():,}.")
    return int(any(total[what] for what in FAILURES))


if __name__ == "__main__":
    sys.exit(main())
