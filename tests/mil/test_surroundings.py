"""Where and how a command runs: `python -O`, locale, names, temporary folder, umask, memory, clock."""

import ast
import errno
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from extract import ending
from extract.config import ProblemsError, tell
from extract.ending import ended, out_of_memory
from extract.run import main as extract_main
from mil.train import main

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["study.folds=2", "train.epochs=2", "train.batch_size=5", "train.accelerator=cpu", "model.name=mean"]
QUICK += ["report.bootstrap=0", "report.heatmaps=0", "report.baselines=false"]


def narrows_a_type(test: ast.expr) -> bool:
    """`x is not None`, `isinstance(x, ...)`, and these joined by `and`: for type checkers, who cannot know."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return all(narrows_a_type(value) for value in test.values)
    if isinstance(test, ast.Compare):
        return [type(op) for op in test.ops] == [ast.IsNot] and ast.unparse(test.comparators[0]) == "None"
    return isinstance(test, ast.Call) and ast.unparse(test.func) == "isinstance"


def test_no_safety_rests_on_assert():
    """`python -O` leaves asserts out."""
    for path in (path for package in ("extract", "mil") for path in sorted((ROOT / package).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.Assert) or narrows_a_type(node.test), f"{path}:{node.lineno}"
    assert not narrows_a_type(ast.parse("x > 0", mode="eval").body)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes_below(folder: Path) -> tuple[set[int], set[int]]:
    """Permissions of files and of folders."""
    paths = [folder, *folder.rglob("*")]
    files = {path.stat().st_mode & 0o777 for path in paths if path.is_file()}
    return files, {path.stat().st_mode & 0o777 for path in paths if path.is_dir()}


def test_a_study_comes_out_the_same_wherever_it_runs(
    python, write_study, witness_arrays, draw_only, tmp_path, monkeypatch, capfd
):
    """Once here, for a group, under a name that needs quoting; once under `python -O`, in the C locale, for its owner
    only, without a folder for temporary files, with files from the future (the clock was set back)."""
    arrays, labels_S = witness_arrays(16, seed=5)
    split = ["test" if i >= 12 else "train" for i in range(16)]
    odd = tmp_path / 'müller\'s "big" [study], $1 #2'
    draw_only(monkeypatch, "roc")
    with umask(0o002):
        data = write_study(odd / "features", arrays, np.array(["a", "b"])[labels_S], split=split)
        assert main([*data, *QUICK, f"out={odd / 'run'}"]) == 0
    assert modes_below(odd / "run") == ({0o664}, {0o775})
    assert modes_below(odd / "features")[0] == {0o664}
    plain = tmp_path / 'plain\'s "study"'
    (odd / "features").rename(plain)
    for path in plain.iterdir():
        os.utime(path, (time.time() + 1e6,) * 2)
    program = "import os, sys; os.umask(0o077); import mil.report.page as page; from mil.train import main; "
    program += "page.FIGURES = {'roc': page.FIGURES['roc']}; sys.exit(main(sys.argv[1:]))"
    arguments = ["cohort=cohort.csv", "features.folder=.", *QUICK, "out=run"]
    own = {"LC_ALL": "C", "PYTHONUTF8": "0", "TMPDIR": str(tmp_path / "none"), "PYTHONPATH": str(ROOT)}
    call = [*python, "-O", "-c", program, *arguments]
    done = subprocess.run(call, cwd=plain, env=os.environ | own, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"mean \\xb1 SD" in done.stdout
    assert modes_below(plain / "run") == ({0o600}, {0o700})
    assert (plain / "run" / "predictions.csv").read_bytes() == (odd / "run" / "predictions.csv").read_bytes()


def test_arguments_that_are_no_text_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["cohort=m\udcfcller.csv", "out=x"])
    assert "'cohort=m\\udcfcller.csv': is no text in utf-8; rename" in capsys.readouterr().err


def test_a_long_list_of_problems_needs_no_folder_for_temporary_files(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    tell(ProblemsError("problems", [f"slide {i}: is bad" for i in range(40)]))
    said = capsys.readouterr().err
    assert "slide 0: is bad" in said
    assert "(All 40 could not be written to a file: " in said


def test_without_any_folder_for_temporary_files_it_is_said_which_variable_to_set(capsys, monkeypatch):
    """TMPDIR is there and cannot be written to, and no other such folder can; also as matplotlib puts it."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc"])

    def matplotlib_without_a_home() -> int:
        raise OSError(
            "Matplotlib requires access to a writable cache directory, but there was an issue with the default path "
            "(/proc/x), and a temporary directory could not be created; set MPLCONFIGDIR"
        )

    for work in (lambda: len(tempfile.mkdtemp()), matplotlib_without_a_home):
        assert ended(work, interrupted=str, after=lambda: "And now?") == 2
        said = capsys.readouterr().err
        assert "no folder for temporary files can be written to; set TMPDIR=FOLDER (" in said
        assert "And now?" in said


MEMORY = """
import resource, sys
from pathlib import Path
import torch, psutil
from extract.ending import ended
from extract.features.folder import open_feature_folder
from mil.training.bags import load_bags

folder = open_feature_folder(Path(sys.argv[1]))
slides = ["s"] * 400
limit = psutil.Process().memory_info().vms + 100_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

def load():
    load_bags(folder, slides, [1000] * 400, ["float32"] * 400, 256, "ram")
    return 0

sys.exit(ended(load, interrupted=str, after=lambda: "And now?"))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_AS")
def test_a_memory_limit_that_is_hit_while_features_are_loaded_is_said(tmp_path):
    """410 MB, which the machine has and `ulimit -v` does not allow."""
    from extract.features.cache import Provenance, write_features

    write_features(tmp_path / "s.h5", np.ones((1000, 256)), np.zeros((1000, 2)), Provenance("e"), dtype="float32")
    call = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(
        call, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert "there is not enough memory for this" in done.stderr
    assert "And now?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9 bytes"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_only_what_is_about_memory_is_called_so(capsys, error, is_memory):
    assert bool(out_of_memory(error)) == is_memory

    def work() -> int:
        raise error

    if is_memory:
        assert ended(work, interrupted=str) == 2
        assert "not enough memory" in capsys.readouterr().err
    else:
        with pytest.raises(type(error)):
            ended(work, interrupted=str)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("can't start new thread"), "no further process or thread"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "no further process or thread"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "- there is not enough memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory", "a.h5"), "- a.h5: there is not enough memory"),
    ],
)
def test_what_the_system_refuses_is_said(capsys, error, words):
    def work() -> int:
        raise error

    assert ended(work, interrupted=str, after=lambda: "resume=true continues.") == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.rstrip().endswith("No half file was left. resume=true continues.")


@pytest.mark.parametrize("error", [OSError("codec configuration error when writing image file"), KeyError("x")])
def test_under_a_limit_that_leaves_nothing_whatever_a_library_raises_is_told(monkeypatch, capsys, error):
    """Pillow, when zlib gets no memory."""

    def work() -> int:
        raise error

    monkeypatch.setattr(ending, "left_by_limits", lambda: {"ulimit -v": 3_000_000, "the group's": 9**12})
    assert ended(work, interrupted=str) == 2
    said = capsys.readouterr().err
    assert f"(3 MB are left; {type(error).__name__}: {error})" in said
    assert "there is not enough memory" in said
    with pytest.raises(type(error)):
        monkeypatch.setattr(ending, "left_by_limits", lambda: {"ulimit -v": 300_000_000})
        ended(work, interrupted=str)
    monkeypatch.setattr(ending, "left_by_limits", dict)
    with pytest.raises(type(error)):
        ended(work, interrupted=str)


def test_overwriting_does_not_believe_the_clock(tmp_path, capsys):
    """A file from the future (the clock was set back) is no file that another process has just written."""
    import cv2

    image = np.random.default_rng(0).integers(90, 200, (448, 672, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "slide.png"), image)
    command = [f"slides.folder={tmp_path}", "slides.mpp=0.5", "encoder.name=timm:test_vit", f"out={tmp_path / 'out'}"]
    command += ["encoder.random_weights=true", "encoder.device=cpu", "extract.workers=0"]
    assert extract_main(command) == 0
    os.utime(tmp_path / "out" / "slide.h5", (time.time() + 1e6,) * 2)
    capsys.readouterr()
    assert extract_main([*command, "extract.overwrite=true"]) == 0
    assert "0 already there" in capsys.readouterr().out
    assert (tmp_path / "out" / "slide.h5").stat().st_mtime < time.time() + 1e3
