"""The house rules of DESIGN: who may import whom, one door per dependency, docstrings, configs, what lies where."""

import ast
import fnmatch
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml as plain_yaml

from extract.config import SHIPPED_CONFIGS, STUDY_KEYS, ExtractConfig, load_config
from extract.finetune_config import FinetuneConfig, finetune_problems
from mil.config import StudyConfig, study_problems

ROOT = Path(__file__).resolve().parents[1]

EXTRACT = (
    ("config",), ("quiet",), ("cohort",), ("cache",), ("quickstart",), ("layouts",), ("parquet",), ("slide",), ("tissue",),
    ("tiles",), ("lora",), ("encoders",), ("claims",), ("readers",), ("extraction",),
    ("finetune_config",), ("tilesets", "augment", "probe"), ("finetune_report",), ("tuning",), ("run", "finetune"),
)  # fmt: skip
"""From left to right; modules import those to their left. Modules in one pair of brackets do not import one another."""
FOR_TRAINING = ("config", "quiet", "cohort", "cache", "quickstart", "layouts", "parquet")
MIL = (
    ("metrics",), ("sites",), ("study",), ("nested",), ("aggregators",), ("config",), ("optim",), ("bags",), ("checks",), ("members",),
    ("warmstart",), ("module",), ("trained",), ("tables",), ("summary",), ("wording",), ("figures",), ("report",), ("learning_curve",), ("drawing", "geojson"), ("tilescores",),
    ("scenes",), ("outlines",), ("heatmap", "lesions"), ("comparison",), ("pipeline",), ("likeness",), ("prediction",),
    ("predict", "train", "compare", "selftest"),
)  # fmt: skip
BEYOND = {
    "pipeline": {"run", "extraction", "encoders", "readers"},
    "likeness": {"encoders"},
    "prediction": {"extraction"},
    "predict": {"encoders", "readers"},
    "train": {"run", "extraction"},
    "heatmap": {"slide"},
    "lesions": {"slide"},
    "scenes": {"slide"},
}
"""What modules of `mil` may take from `extract` besides FOR_TRAINING: missing features are extracted, slides are shown."""

DOORS = {
    "openslide": {"extract.slide"},
    "h5py": {"extract.cache", "extract.layouts"},
    "lightning": {"mil.module", "extract.tuning"},
    "timm": {"extract.encoders"},
    "peft": {"extract.lora"},
    "pyarrow": {"extract.parquet"},
    "huggingface_hub": {"extract.parquet", "extract.encoders"},
    "omegaconf": {"extract.config", "mil.pipeline"},
    # extract never imports mil, so what fine-tuning reports on tiles has a small page of its own
    "matplotlib": {"mil.report", "mil.figures", "mil.drawing", "extract.finetune_report"},
    "shapely": {"mil.geojson", "mil.outlines"},
    "jinja2": {"mil.report", "extract.finetune_report"},
}
NO_TORCH = {"extract.config", "extract.quiet", "extract.cohort", "extract.cache", "extract.quickstart", "extract.parquet",
            "extract.slide", "extract.tissue", "extract.tiles", "extract.claims", "extract.readers", "extract.run",
            "extract.finetune", "extract.finetune_config", "extract.tilesets", "extract.probe", "extract.finetune_report",
            "mil.config", "mil.metrics", "mil.study", "mil.nested", "mil.tables", "mil.summary", "mil.wording", "mil.figures", "mil.report", "mil.sites",
            "mil.learning_curve", "mil.drawing", "mil.geojson", "mil.outlines", "mil.comparison", "mil.compare"}  # fmt: skip
TORCH_ALONE = tuple(f"mil.aggregators.{n}" for n in (
    "abmil", "chance", "chowder", "clam", "dsmil", "dtfd", "evidence", "hipt_mil", "layers", "pooling", "transformer",
    "transmil",
))  # fmt: skip


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the two packages."""
    found = {}
    for package in ("extract", "mil"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def for_types_only(node: ast.AST) -> bool:
    """`if TYPE_CHECKING:`"""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def import_nodes(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import below `node`, also those within functions, without those that only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not for_types_only(child):
            yield from import_nodes(child)


def imports(name: str) -> set[str]:
    """Dotted names of the modules that module `name` imports; `from mil import x` counts as mil.x if that is one."""
    found = set()
    for node in import_nodes(parsed(MODULES[name])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        assert node.level == 0, f"{name}: relative import; write the module's full name"
        inner = {f"{node.module}.{alias.name}" for alias in node.names}
        found |= (inner & set(MODULES)) or {str(node.module)}
    return found


def room(module: str) -> str:
    """`aggregators` of mil.aggregators.abmil."""
    return module.split(".")[1] if "." in module else ""


def left_of(order: tuple[tuple[str, ...], ...], name: str) -> set[str]:
    place = next(i for i, together in enumerate(order) if name in together)
    return {n for together in order[:place] for n in together}


# --- who may import whom -------------------------------------------------------------------------------------------


def test_every_module_has_its_place():
    known = {f"extract.{n}" for together in EXTRACT for n in together} | {f"mil.{n}" for t in MIL for n in t}
    assert {".".join(m.split(".")[:2]) for m in MODULES if "." in m} <= known


@pytest.mark.parametrize("name", [m for m in MODULES if m.startswith("extract.")])
def test_extract_imports_to_the_left_and_never_mil(name):
    own = {i for i in imports(name) if i.partition(".")[0] in ("extract", "mil")}
    allowed = left_of(EXTRACT, room(name))
    wrong = {i for i in own if i.startswith("mil") or (room(i) or "config") not in allowed}
    assert not wrong, f"{name} may import {sorted(allowed)} of extract"


@pytest.mark.parametrize("name", [m for m in MODULES if m.startswith("mil.")])
def test_mil_imports_to_the_left(name):
    found = imports(name)
    allowed = left_of(MIL, room(name)) | ({"aggregators"} if room(name) == "aggregators" else set())
    wrong = {i for i in found if i.startswith("mil") and room(i) not in allowed}
    assert not wrong, f"{name} may import {sorted(allowed)} of mil"
    allowed = set(FOR_TRAINING) | BEYOND.get(room(name), set())
    wrong = {i for i in found if i.startswith("extract") and room(i) not in allowed}
    assert not wrong, f"{name} may import {sorted(allowed)} of extract"


def test_the_reader_of_imports_sees_what_it_should():
    """The rules above are only as good as `imports`."""
    source = "import a.b\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import hidden\n\ndef f():\n    import c\n"
    names = {alias.name for node in import_nodes(ast.parse(source)) for alias in node.names}
    assert names == {"a.b", "TYPE_CHECKING", "c"}
    assert "mil.pipeline" in imports("mil.train"), "also within functions"
    assert "extract.cache" in imports("extract.layouts"), "from extract import cache"


# --- dependencies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", DOORS)
def test_one_door_for_a_dependency(package):
    users = {name for name in MODULES if package in {i.partition(".")[0] for i in imports(name)}}
    assert users <= DOORS[package]


@pytest.mark.parametrize("name", sorted(NO_TORCH & set(MODULES)))
def test_modules_without_torch(name):
    assert not {i for i in imports(name) if i.partition(".")[0] in ("torch", "torchmetrics", "torchvision", "lightning")}


@pytest.mark.parametrize("name", TORCH_ALONE)
def test_aggregators_know_torch_only(name):
    outside = {i.partition(".")[0] for i in imports(name)} - set(sys.stdlib_module_names) - {"mil"}
    assert outside <= {"torch"}


def test_every_dependency_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    declared = {re.split(r"[\[<>=! ]", d)[0].lower().replace("-", "_") for d in names}
    called = {"sklearn": "scikit_learn", "PIL": "pillow", "cv2": "opencv_python_headless", "yaml": "omegaconf",
              "openslide": "openslide_python", "pydantic_core": "pydantic"}  # fmt: skip
    used = {i.partition(".")[0] for name in MODULES for i in imports(name)}
    used -= set(sys.stdlib_module_names) | {"extract", "mil"}
    assert {called.get(u, u) for u in used} <= declared


# --- docstrings ----------------------------------------------------------------------------------------------------



def speaks_for_itself(node: ast.FunctionDef | ast.ClassDef, used_elsewhere: bool) -> bool:
    """A short annotated helper: its name and signature say what a docstring would repeat."""
    limit = 5 if used_elsewhere else 8
    length = (node.end_lineno or node.lineno) - node.lineno + 1
    return isinstance(node, ast.FunctionDef) and node.returns is not None and length <= limit


def undocumented(name: str) -> Iterator[str]:
    tree = parsed(MODULES[name])
    if not ast.get_docstring(tree) and tree.body:
        yield f"{name}: the module"
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node) and not speaks_for_itself(node, (name, node.name) in used_by_others()):
            yield f"{name}:{node.lineno}: {node.name}"


@cache
def used_by_others() -> set[tuple[str, str]]:
    """(module, name) of all that one module imports from another."""
    nodes = [node for path in MODULES.values() for node in import_nodes(parsed(path))]
    return {(str(n.module), a.name) for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names}


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_and_class_says_what_it_is(name):
    assert not list(undocumented(name))


# --- configs -------------------------------------------------------------------------------------------------------

CONFIGS = sorted(SHIPPED_CONFIGS.glob("*.yaml"))
FOR_FINETUNE = {"nct-crc-lora"}
"""Configs of `extract.finetune`; all others are studies."""


def test_there_are_the_configs_that_the_readme_promises():
    promised = {"quickstart.yaml", "camelyon16.yaml", "camelyon16-chowder.yaml", "cohort.yaml",
                "tcga-nsclc.yaml", "tcga-rcc.yaml"}  # fmt: skip
    assert promised <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_loads_and_its_header_says_command_time_and_result(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if path.stem in FOR_FINETUNE:
        program = "extract.finetune"
        load_config(FinetuneConfig, [f"config={path.name}", f"data.folder={ROOT}"], also=finetune_problems)
    else:
        program = "mil.train"
        arguments = [f"config={path.name}", *(["cohort=x.csv"] if path.stem == "cohort" else [])]
        load_config(StudyConfig, arguments, also=study_problems)
        load_config(ExtractConfig, arguments, ignored=STUDY_KEYS, bare_section="extract")
    lines = path.read_text(encoding="utf-8").splitlines()
    header = "\n".join(lines[: next(i for i, line in enumerate(lines) if line and not line.startswith("#"))])
    assert f"python -m {program} config={path.name}" in header
    for word in ("Command:", "Time:", "Expected:"):
        assert word in header, f"{path.name}: the header does not say {word}"


def test_what_the_template_shows_as_comments_is_valid_too(tmp_path):
    """Every `# key: value` line of cohort.yaml, uncommented."""
    lines = (SHIPPED_CONFIGS / "cohort.yaml").read_text(encoding="utf-8").splitlines()
    setting = re.compile(r"^(\s*)# ?((?:  )?\w+:(?: .*)?)$")
    shown = [setting.sub(r"\1\2", line) for line in lines]
    shown = [line for line in shown if not re.match(r"^(Command|Time|Expected):", line)]
    assert sum(a != b for a, b in zip(lines, shown, strict=False)) >= 6
    text = "\n".join(shown)
    assert {"columns", "classes"} <= set(plain_yaml.safe_load(text))
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    config = load_config(
        ExtractConfig, [f"config={tmp_path / 'c.yaml'}"], ignored=STUDY_KEYS, bare_section="extract"
    )
    assert config.columns.slide == "slide_id"
    (tmp_path / "s.yaml").write_text(text, encoding="utf-8")
    study = load_config(StudyConfig, [f"config={tmp_path / 's.yaml'}", "cohort=x.csv"], also=study_problems)
    assert study.classes == ["normal", "tumor"]


README_COMMANDS = re.findall(r"^ {4}python -m (.+)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)


class ReadSoFarError(Exception):
    """The command line was valid."""


@pytest.mark.parametrize("command", [c for c in README_COMMANDS if "adapter=" not in c])  # that needs a trained one
def test_a_command_of_the_readme_is_valid(command, monkeypatch, tmp_path):
    """Up to where its `main` has read it: not what lies in the files that it names, which are the reader's."""
    monkeypatch.chdir(tmp_path)
    module_name, *arguments = shlex.split(command.replace("=/data", "=data"))
    Path("tiles.csv").touch()
    for folder in ("runs/a", "runs/b", "data/NCT-CRC-HE"):
        Path(folder).mkdir(parents=True)
    module = importlib.import_module(module_name)
    reader = "config_from_command_line" if hasattr(module, "config_from_command_line") else "parse"
    read = getattr(module, reader)

    def read_only(*args, **options):
        read(*args, **options)
        raise ReadSoFarError

    monkeypatch.setattr(module, reader, read_only)
    with pytest.raises(ReadSoFarError):
        module.main(arguments)


def test_the_readmes_commands_are_found():
    assert len(README_COMMANDS) > 15
    assert {command.split()[0] for command in README_COMMANDS} >= {"mil.train", "extract.run", "mil.compare"}


# --- what lies where -----------------------------------------------------------------------------------------------

TOP_LEVEL = {"pyproject.toml", "README.md", "mil", "extract", "configs", "tests", "benchmarks", "LICENSE", "CHANGELOG.md"}


def project_files() -> list[Path]:
    """Files that are, or would be, in version control; all files where git is not at hand (an unpacked archive)."""
    git = shutil.which("git")
    if git and (ROOT / ".git").exists():
        command = [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        return [ROOT / name for name in listed if name and (ROOT / name).is_file()]
    return [p for p in ROOT.rglob("*") if p.is_file() and not {"__pycache__", ".venv"} & set(p.parts)]


def test_the_top_level_holds_only_what_belongs_there():
    names = {path.relative_to(ROOT).parts[0] for path in project_files()}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL


def test_package_files_are_empty():
    inits = [ROOT / "extract" / "__init__.py", ROOT / "mil" / "__init__.py", ROOT / "configs" / "__init__.py"]
    assert [path.read_text() for path in inits] == ["", "", ""]
    others = {name for name, path in MODULES.items() if path.name == "__init__.py"} - {"extract", "mil"}
    assert others == {"mil.aggregators"}


def test_no_file_names_the_machine_it_was_written_on():
    """Neither folders of one machine nor its user; this file, which must name them to look for them, is left out."""
    places = re.compile(r"(?<![\w.])/(work|tmp|root|home/\w+)/|/tmp\b|pytest-of-")
    found = []
    for path in project_files():
        if path == Path(__file__).resolve() or path.suffix in (".png", ".h5", ".npz"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if places.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found


def test_no_large_file_is_part_of_the_project():
    sizes = {str(path.relative_to(ROOT)): path.stat().st_size for path in project_files()}
    assert {name: size for name, size in sizes.items() if size > 1_000_000} == {}


# --- the wheel -----------------------------------------------------------------------------------------------------


def test_an_installed_wheel_holds_configs_and_template():
    """What setuptools would take: the packages its configuration finds and the data files it names."""
    from setuptools import find_packages

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = find_packages(str(ROOT), **settings["packages"]["find"])
    assert {"mil", "mil.aggregators", "extract", "configs"} == set(packages)
    data = settings["package-data"]
    for path in [*CONFIGS, *(p for name in ("mil", "extract") for p in (ROOT / name).rglob("*.html"))]:
        package = ".".join(path.parent.relative_to(ROOT).parts)
        assert any(fnmatch.fnmatch(path.name, pattern) for pattern in data[package]), path.name
    assert SHIPPED_CONFIGS.samefile(ROOT / "configs"), "next to `extract`, as in an installed wheel"


def test_continuous_integration_runs_the_readmes_test_command():
    script = ROOT / ".ci" / "run"
    if not script.exists():
        pytest.skip("no .ci/run here")
    assert os.access(script, os.X_OK)
    text = script.read_text()
    for needed in ("venv", "pytest", "ruff", "mypy"):
        assert needed in text
