"""The house rules of DESIGN: who may import whom, one door per dependency, docstrings, configs, what lies where."""

import ast
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
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml as plain_yaml

from extract.config import SHIPPED_CONFIGS, STUDY_KEYS, ExtractConfig, load_config
from extract.finetuning.config import FinetuneConfig, finetune_problems
from extract.run import extraction_problems
from mil.config import StudyConfig
from mil.config_problems import study_problems

ROOT = Path(__file__).resolve().parents[1]

FLOORS = [
    "extract.layouts extract.places",
    "extract.config",
    "extract.cells extract.digest extract.lazy extract.leftovers extract.owners extract.pages"
    " extract.quiet extract.room extract.shares extract.wording",
    "extract.sudden",
    "extract.ending",
    "extract.lock",
    "extract.whole extract.excel",
    "extract.stores",
    "extract.tables extract.tensors",
    "extract.joining",
    "extract.cohort",
    "extract.features",
    "extract.quickstart",
    *(
        "extract.outlines",
        "extract.slides",
        "extract.encoders",
        "extract.extraction extract.finetuning",
        "extract.run extract.finetune extract.convert",
    ),
    *(
        "mil.study mil.aggregators",
        "mil.config",
        "mil.config_problems mil.config_reading",
        "mil.tasks",
        "mil.training",
        "mil.results",
        "mil.report",
        "mil.look",
    ),
    *("mil.beginning", "mil.prediction mil.viewer", "mil.pipeline", "mil.api", "mil.ledger"),
    *("mil.train mil.init mil.predict mil.heatmap mil.lesions mil.compare mil.selftest mil.reproduce mil.view",),
]
"""From the ground up. A room imports from the floors below it only; `extract` lies below `mil`."""
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor.split()}
COMMANDS = [
    room
    for floor in FLOORS
    for room in floor.split()
    if (ROOT / f"{room.replace('.', '/')}.py").is_file()
    and f"python -m {room} " in (ROOT / f"{room.replace('.', '/')}.py").read_text(encoding="utf-8")
]

DOORS = {
    "openslide": {"extract.slides"},
    "tifffile": {"extract.slides"},
    "simplejpeg": {"extract.slides"},
    "h5py": {"extract.features"},
    "lightning": {"mil.training", "extract.finetuning"},
    "timm": {"extract.encoders"},
    "peft": {"extract.encoders"},
    "pyarrow": {"extract.features", "extract.slides"},  # features, and tile images, as the hub keeps them
    "huggingface_hub": {"extract.features", "extract.encoders"},
    "omegaconf": {"extract.config"},
    # extract never imports mil, so what fine-tuning reports on tiles has a small page of its own
    "matplotlib": {"mil.report", "mil.look", "extract.finetuning"},
    "shapely": {"extract.features", "extract.outlines", "extract.slides", "mil.look", "mil.viewer"},
    "crepes": {"mil.results"},
    "openpyxl": {"extract.excel"},
    "fsspec": {"extract.stores"},
    "jinja2": {"mil.report", "extract.finetuning"},
    "starlette": {"mil.viewer"},
    "uvicorn": {"mil.viewer"},
    "ray": {"extract.extraction", "mil.pipeline"},
}
HEAVY = {"torch", "torchmetrics", "torchvision", "lightning", "timm", "peft"}
NO_TORCH = {
    "extract.config",
    "extract.quiet",
    "extract.tables",
    "extract.cohort",
    "extract.quickstart",
    "extract.slides",
    "mil.config",
    "mil.config_problems",
    "mil.config_reading",
    "mil.study",
    "mil.tasks",
    "mil.report",
}
SLOW = HEAVY | {"pandas", "sklearn", "scipy", "matplotlib", "h5py", "cv2", "openslide", "pyarrow"}
"""What takes so long to import that `--help` and config errors must not wait for it."""


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


def comes_later(node: ast.AST) -> bool:
    """What is not run when the module is imported: functions, and `if TYPE_CHECKING:`."""
    return isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")


def import_nodes(node: ast.AST, at_once: bool = False) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import below `node`, or only those that are run `at_once`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not (at_once and comes_later(child)):
            yield from import_nodes(child, at_once)


@cache
def imports(name: str, at_once: bool = False) -> frozenset[str]:
    """Dotted names of the modules that module `name` imports; `from mil import x` counts as mil.x if that is one."""
    found: set[str] = set()
    for node in import_nodes(parsed(MODULES[name]), at_once):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        assert node.level == 0, f"{name}: relative import; write the module's full name"
        inner = {f"{node.module}.{alias.name}" for alias in node.names}
        found |= (inner & set(MODULES)) or {str(node.module)}
    return frozenset(found - {name})


def room(module: str) -> str:
    """`mil.aggregators` of mil.aggregators.abmil."""
    return ".".join(module.split(".")[:2])


# --- who may import whom -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in MODULES if "." in name])
def test_a_room_imports_from_the_floors_below_it(name):
    rooms = {room(i) for i in imports(name) if i.partition(".")[0] in ("extract", "mil")} - {room(name)}
    assert not {other for other in rooms if FLOOR[other] >= FLOOR[room(name)]}


def test_there_are_no_circles():
    own = {name: imports(name) & set(MODULES) for name in MODULES if "." in name}
    list(TopologicalSorter(own).static_order())  # raises CycleError, which names one


def test_the_reader_of_imports_sees_what_it_should():
    """The rules above are only as good as `imports`."""
    source = (
        "import a.b\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import seen\n\ndef f():\n    import c\n"
    )
    names = {alias.name for node in import_nodes(ast.parse(source)) for alias in node.names}
    assert names == {"a.b", "TYPE_CHECKING", "seen", "c"}
    assert "mil.api.study" in imports("mil.train"), "also within functions"
    assert "mil.api.study" not in imports("mil.train", at_once=True)
    assert "extract.features.cache" in imports("extract.features.layouts.cache"), "from extract.features import cache"


# --- dependencies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", DOORS)
def test_one_door_for_a_dependency(package):
    users = {room(name) for name in MODULES if package in {i.partition(".")[0] for i in imports(name)}}
    assert users <= DOORS[package]


@pytest.mark.parametrize("name", sorted(name for name in MODULES if room(name) in NO_TORCH))
def test_rooms_without_torch(name):
    assert not {i for i in imports(name) if i.partition(".")[0] in HEAVY}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_imports_nothing_slow_before_its_config_is_valid(name):
    """Followed through everything that is imported at the top of a module."""
    seen, waiting = set(), [name]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        waiting += imports(module, at_once=True) if module in MODULES else []
    assert not {module for module in seen if module.partition(".")[0] in SLOW}


def test_all_commands_are_found():
    assert set(COMMANDS) == {
        f"mil.{n}"
        for n in ("train", "init", "predict", "heatmap", "lesions", "compare", "selftest", "reproduce", "view")
    } | {
        "extract.run",
        "extract.finetune",
        "extract.convert",
    }


@pytest.mark.parametrize("name", [n for n in MODULES if room(n) == "mil.aggregators" and not n.endswith(".torchmil")])
def test_aggregators_know_torch_only_and_ranges(name):
    outside = {i.partition(".")[0] for i in imports(name)} - set(sys.stdlib_module_names) - {"mil"}
    assert outside <= {"torch", "annotated_types"}


def test_every_dependency_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    declared = {re.split(r"[\[<>=! ]", d)[0].lower().replace("-", "_") for d in names}
    called = {
        "sklearn": "scikit_learn",
        "PIL": "pillow",
        "cv2": "opencv_python_headless",
        "yaml": "omegaconf",
        "openslide": "openslide_python",
        "pydantic_core": "pydantic",
        "sksurv": "scikit_survival",
    }
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
FOR_EXTRACTION = {"nct-crc"}
"""Configs of `extract.finetune` and of `extract.run` alone; all others are studies."""


def test_there_are_the_configs_that_the_readme_promises():
    promised = {
        "quickstart.yaml",
        "camelyon16.yaml",
        "camelyon16-chowder.yaml",
        "cohort.yaml",
        "tcga-nsclc.yaml",
        "tcga-rcc.yaml",
    }
    assert promised <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_loads_and_its_header_says_command_time_and_result(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if path.stem in FOR_FINETUNE:
        program = "extract.finetune"
        load_config(FinetuneConfig, [f"config={path.name}", f"data.folder={ROOT}"], also=finetune_problems)
    elif path.stem in FOR_EXTRACTION:
        program = "extract.run"
        load_config(ExtractConfig, [f"config={path.name}"], bare_section="extract", also=extraction_problems)
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
    config = load_config(ExtractConfig, [f"config={tmp_path / 'c.yaml'}"], ignored=STUDY_KEYS, bare_section="extract")
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
    for folder in ("runs/a", "runs/b", "data/NCT-CRC-HE", "data/mil", "cache/nct-crc"):
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

TOP_LEVEL = {"pyproject.toml", "README.md", "mil", "extract", "configs", "tests", "benchmarks"} | {
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
}


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


TABLES = {"mil.aggregators"}
"""Rooms whose `__init__` is a table, see its docstring."""


@pytest.mark.parametrize("name", [n for n, path in MODULES.items() if path.name == "__init__.py" and "." in n])
def test_a_rooms_init_says_what_the_room_is_and_nothing_else(name):
    tree = parsed(MODULES[name])
    said = ast.get_docstring(tree) or ""
    assert len(re.findall(r"[.!](?=\s|$)", said)) >= 1
    if name not in TABLES:
        assert len(tree.body) == 1
        assert len(re.findall(r"[.!](?=\s|$)", said)) <= 3


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
    assert {".".join(p.parent.relative_to(ROOT).parts) for p in MODULES.values()} | {"configs"} == set(packages)
    data = settings["package-data"]
    shipped = {
        package: {path for pattern in patterns for path in (ROOT / package.replace(".", "/")).glob(pattern)}
        for package, patterns in data.items()
    }
    pages = [p for name in ("mil", "extract") for p in (ROOT / name).rglob("*") if p.suffix in (".html", ".css", ".js")]
    assert {*CONFIGS, *pages} <= set().union(*shipped.values())
    assert SHIPPED_CONFIGS.samefile(ROOT / "configs"), "next to `extract`, as in an installed wheel"


def test_continuous_integration_runs_the_readmes_test_command():
    script = ROOT / ".ci" / "run"
    if not script.exists():
        pytest.skip("no .ci/run here")
    assert os.access(script, os.X_OK)
    text = script.read_text()
    for needed in ("venv", "pytest", "ruff", "mypy"):
        assert needed in text


def test_every_action_is_pinned_to_a_commit():
    """A tag can be moved to other code; 40 hexadecimal digits cannot. What version they are is said beside."""
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    used = [line.strip() for path in workflows for line in path.read_text().splitlines() if "uses:" in line]
    assert len(used) >= 6
    assert not [line for line in used if not re.fullmatch(r"- uses: [\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)]
    for path in workflows:
        permissions = plain_yaml.safe_load(path.read_text())["permissions"]
        assert permissions in ({}, {"contents": "read"}), "what a job needs beyond this, it says itself"


def test_the_workflow_tests_the_versions_of_python_that_the_package_allows():
    lowest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    matrix = plain_yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["run"]["strategy"]
    assert matrix["matrix"]["python"][0] == lowest


# --- files that are whole or not there -----------------------------------------------------------------------------

WHOLE = {"replace_on_success", "folder_on_success"}
WRITERS = {
    "write_text",
    "write_bytes",
    "to_csv",
    "to_json",
    "to_parquet",
    "to_excel",
    "imwrite",
    "savefig",
    "save_file",
}
WRITERS |= {"tofile", "savez", "savez_compressed", "save_pretrained", "symlink_to", "hardlink_to", "copyfile", "copy2"}
OF_MODULES = {"torch.save", "np.save", "numpy.save", "json.dump", "pickle.dump", "shutil.copy", "shutil.copytree"}
OWN_WAY = {
    "extract.whole": "is how",
    "extract.extraction.claims": "a claim is made by being there",
    "extract.config": "the list of all problems, in the folder for temporary files",
    "extract.extraction.tile_pictures": "tiles count from when their slide's feature file is there",
    "extract.slides.scratch": "nobody reads a copy before it is whole, and none outlives its process",
    "extract.tensors": "puts the temporary file in order",
}


def writes(node: ast.Call) -> bool:
    """Whether a call writes a file by its name. What goes into a `buffer` does not."""
    name = ast.unparse(node.func)
    if any(ast.unparse(argument) == "buffer" for argument in node.args):
        return False
    if name == "open" or name.endswith((".open", ".fdopen", "h5py.File", "NamedTemporaryFile")):
        modes = [a.value for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)]
        in_memory = any(keyword.arg == "backing_store" for keyword in node.keywords)
        return not in_memory and any(isinstance(m, str) and re.fullmatch(r"[rwax+bt]*[wax+][bt+]*", m) for m in modes)
    return name in OF_MODULES or name.rpartition(".")[2] in WRITERS


def plain_writes(tree: ast.AST, inside: bool = False) -> Iterator[int]:
    """Lines of calls that write a file, and not into the temporary one of `with replace_on_success(...)`."""
    for node in ast.iter_child_nodes(tree):
        items = node.items if isinstance(node, ast.With) else []
        calls = [item.context_expr for item in items if isinstance(item.context_expr, ast.Call)]
        within = inside or any(ast.unparse(call.func) in WHOLE for call in calls)
        if isinstance(node, ast.Call) and writes(node) and not within:
            yield node.lineno
        yield from plain_writes(node, within)


def test_every_file_is_written_whole_or_not_at_all():
    others = {name: path for name, path in MODULES.items() if name not in OWN_WAY}
    found = [f"{name}:{line}" for name, path in others.items() for line in plain_writes(parsed(path))]
    assert not found
    for name in OWN_WAY:
        assert list(plain_writes(parsed(MODULES[name]))), f"{name} needs no exception any more"


@pytest.mark.parametrize(
    ("source", "n"),
    [
        ("open(path, 'w')", 1),
        ("path.open(mode='wb')", 1),
        ("open(path)", 0),
        ("path.open('rb')", 0),
        ("path.write_text('x')", 1),
        ("figure.savefig(buffer)", 0),
        ("torch.save(x, path)", 1),
        ("with replace_on_success(path) as temporary:\n    torch.save(x, temporary)", 0),
        ("with replace_on_success(path) as temporary, open(temporary, 'w') as file:\n    file.write('x')", 0),
        ("h5py.File(path, 'a')", 1),
    ],
)
def test_the_finder_of_plain_writes_finds_them(source, n):
    assert len(list(plain_writes(ast.parse(source)))) == n
