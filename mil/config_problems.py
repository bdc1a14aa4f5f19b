"""What is wrong with a study's config beyond the types of its keys: names, options, what contradicts each other."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from pydantic import ValidationError

from extract.config import did_you_mean, explain
from mil.aggregators import AGGREGATORS, TORCHMIL, option_types, options, ranges
from mil.config import Model, blocks_of, folder_of, is_aggregator, names_of, options_schema


def study_problems(tree: dict[str, Any]) -> list[str]:
    """What the sections cannot see by themselves: aggregator names and options, settings that contradict each other."""
    train, study = tree.get("train") or {}, tree.get("study") or {}
    data = tree.get("data") or {}
    problems = model_problems(tree.get("model") or {}) + block_problems(tree)
    if isinstance(train, dict) and isinstance(study, dict):
        val = study.get("val_fraction") or study.get("folds_csv")
        if train.get("select") == "best" and not val:
            problems.append("train.select=best: needs validation slides; set study.val_fraction, such as 0.2")
        if train.get("patience") and train.get("select") != "best":
            problems.append("train.patience: only with train.select=best")
        problems += nested_problems(study, train)
        problems += calibration_problems(tree.get("report") or {}, study)
    tiles, slides, features = (tree.get(key) or {} for key in ("tiles", "slides", "features"))
    if isinstance(tiles, dict) and tiles.get("folder"):
        problems.append(
            "tiles.folder: tile images are extracted first, python -m extract.run tiles.folder=FOLDER out=FEATURES; "
            "then train with features.folder=FEATURES"
        )
    if isinstance(slides, dict) and slides.get("folder") and isinstance(features, dict):
        problems += extraction_problems(features, data.get("source", "cohort") if isinstance(data, dict) else "cohort")
    problems += several_folders_problems(features, slides, data) + fusion_problems(tree, features)
    said = tuple(problems)  # wrong for the first of several aggregators
    problems += [p for p in range_problems(tree.get("model") or {}) if not p.startswith(said)]
    problems += warm_start_problems(tree.get("model") or {}, train)
    problems += task_problems(tree)
    if isinstance(study, dict) and study.get("nested"):  # each would need inner folds, and checks of them, of its own
        given = {"study.train_sizes": study, "model.init": tree.get("model")}
        problems += [
            f"{key}: not together with study.nested"
            for key, section in given.items()
            if isinstance(section, dict) and section.get(key.partition(".")[2])
        ]
    problems += report_problems(tree.get("report") or {})
    problems += covariate_problems(tree.get("columns") or {})
    problems += target_problems(tree)
    if isinstance(data, dict) and data.get("source", "cohort") == "cohort" and not tree.get("cohort"):
        problems.append("cohort: no CSV given; set cohort=FILE.csv (columns slide, patient, label)")
    return problems


def report_problems(report: Any) -> list[str]:
    """Sub-groups that cannot be read."""
    if not isinstance(report, dict):
        return []
    given, problems = report.get("subgroups") or [], []
    if given and isinstance(given, list):
        from mil.study.subgroups import spelling_problems  # with pandas, so only where it is needed

        problems = spelling_problems(given)
    return problems


def several_folders_problems(features: Any, slides: Any, data: Any) -> list[str]:
    """Several feature folders are read as they are: each has an encoder of its own."""
    if not isinstance(features, dict) or not (isinstance(features.get("folder"), list) or features.get("more")):
        return []
    problems = []
    if isinstance(slides, dict) and slides.get("folder"):
        problems.append(
            "slides.folder: not with several feature folders; extract each with its encoder first, "
            "python -m extract.run encoder.name=NAME slides.folder=SLIDES out=FOLDER"
        )
    if isinstance(data, dict) and data.get("source", "cohort") != "cohort":
        problems.append(f"features.folder: one folder with data.source={data['source']}, got several")
    return problems


NOT_FUSED = {
    "study.train_sizes": [],
    "report.permutations": 0,
    "train.harmonize": "none",
    "model.init": None,
}
"""Keys that features.fuse=logits does not go with, and what they are without."""


def fusion_problems(tree: dict[str, Any], features: Any) -> list[str]:
    """features.fuse=logits with one folder, or with what has one aggregator for all columns."""
    if not isinstance(features, dict) or features.get("fuse") != "logits":
        return []
    several = (isinstance(features.get("folder"), list) and len(features["folder"]) > 1) or features.get("more")
    problems = [] if several else ["features.fuse=logits: needs several folders, features.folder=[A, B]"]
    for key, without in NOT_FUSED.items():
        section, _, name = key.partition(".")
        given = tree.get(section)
        if isinstance(given, dict) and given.get(name) not in (None, without):
            problems.append(f"{key}: not together with features.fuse=logits")
    return problems


def covariate_problems(columns: Any) -> list[str]:
    """Covariates that are named twice."""
    names = columns.get("covariates") if isinstance(columns, dict) else None
    if not names or not isinstance(names, list):
        return []
    from mil.study.covariates import spelling_problems  # with pandas, so only where it is needed

    return spelling_problems(names)


def target_problems(tree: dict[str, Any]) -> list[str]:
    """Lists of targets that do not fit each other, or cannot be folders, and what many targets cannot be asked for."""
    columns, classes = tree.get("columns") or {}, tree.get("classes")
    task = tree.get("task") or {}
    if not isinstance(columns, dict) or not isinstance(task, dict):
        return []
    survival = task.get("name") == "survival"
    roles = ("time", "event") if survival else ("label",)
    lists = {role: columns[role] for role in roles if isinstance(columns.get(role), list)}
    problems = [f"columns.{role}: a list without a target" for role, names in lists.items() if not names]
    others = {"label", "time", "event"} - set(roles)
    problems += [
        f"columns.{role}: a list of targets, but task={task.get('name', 'classification')} reads columns."
        f"{' and columns.'.join(roles)}"
        for role in sorted(others)
        if isinstance(columns.get(role), list)
    ]
    if len({len(names) for names in lists.values()}) > 1:
        listed = ", ".join(f"{len(names)} in columns.{role}" for role, names in lists.items())
        problems.append(f"columns.time, columns.event: expected a time and an event for each target, got {listed}")
    targets = [str(name) for name in next(iter(lists.values()), [])]
    problems += folder_problems(targets, roles[0])
    if isinstance(classes, dict):
        unknown = [name for name in classes if name not in targets]
        problems += [
            f"classes.{name}: not a target of columns.label{did_you_mean(name, targets)}" for name in unknown
        ] or ([] if targets else ["classes: names by target, but columns.label is no list of targets"])
    for section, key, default, why in OF_ONE_TARGET if lists else ():
        part = tree.get(section)
        if isinstance(part, dict) and part.get(key, default) not in (default, None):
            problems.append(f"{section}.{key}: not with many targets: {why}")
    return problems


OF_ONE_TARGET: tuple[tuple[str, str, Any, str], ...] = (
    ("data", "source", "cohort", "only a cohort CSV has them (data.source=cohort)"),
    ("model", "init", None, "a warm start is from a study of one target; train each target from its own"),
    ("features", "fuse", "columns", "a target's weights would be fitted with others'; fuse one target at a time"),
    ("report", "permutations", 0, "each target would need its own; the overview corrects for their number instead"),
)
NOT_A_TARGET = ("figures", "together")


def folder_problems(targets: list[str], role: str) -> list[str]:
    """Targets that occur twice, or whose run folders would have one name."""
    problems = [
        f"columns.{role}: target {name!r} occurs twice" for name in dict.fromkeys(targets) if targets.count(name) > 1
    ]
    folders: dict[str, list[str]] = {}
    for name in dict.fromkeys(targets):
        folders.setdefault(folder_of(name).lower(), []).append(name)
    for folder, names in folders.items():
        if len(names) > 1:
            problems.append(f"columns.{role}: {' and '.join(map(repr, names))} would share the run folder {folder!r}")
        if folder in NOT_A_TARGET:
            problems.append(f"columns.{role}: {names[0]!r} is the name of a folder of the overview; rename the column")
    return problems


LOSSES = {"survival": ("cox", "discrete"), "regression": ("mse", "huber", "l1")}
OF_TASK = {"horizons": "survival", "cut": "regression", "unit": "survival or regression"}


def task_problems(tree: dict[str, Any]) -> list[str]:
    """Options of another task, and what is not there yet for tasks other than classification."""
    task = tree.get("task") or {}
    if not isinstance(task, dict):
        return []
    name, loss = str(task.get("name", "classification")), task.get("loss")
    problems = [
        f"task.{key}: only with task={owner}, got task={name}"
        for key, owner in OF_TASK.items()
        if task.get(key) not in (None, []) and name not in owner
    ]
    if loss is not None and loss not in LOSSES.get(name, ()):
        known = ", ".join(LOSSES.get(name, ())) or "no losses to choose from"
        problems.append(f"task.loss={loss}: task={name} has {known}")
    if "intervals" in task and task["intervals"] != 4 and loss != "discrete":
        problems.append("task.intervals: only with task.loss=discrete")
    if isinstance(task.get("horizons"), list):
        bad = [h for h in task["horizons"] if not isinstance(h, int | float) or h <= 0]
        problems += [f"task.horizons: expected times above 0, got {bad}"] if bad else []
    if name == "classification":
        return problems
    if name == "ordinal" and not tree.get("classes"):
        problems.append("task=ordinal: the order of the grades is not known; set classes=[LOWEST,...,HIGHEST]")
    if name in ("survival", "regression") and tree.get("classes"):
        problems.append(f"classes: task={name} has none; leave them out")
    sections = {key: tree.get(key) for key in ("data", "study", "model", "train", "report")}
    refused: tuple[tuple[str, str, Any, str], ...] = (
        ("data", "source", "cohort", "only data.source=cohort is there"),
        ("train", "class_weights", "none", "weights of classes belong to task=classification"),
        ("report", "calibrate", "none", "it is of probabilities of classes"),
    )
    for section, key, default, why in refused:
        part = sections[section]
        if isinstance(part, dict) and part.get(key, default) not in (default, None):
            problems.append(f"{section}.{key}: not with task={name}: {why}")
    return problems


def extraction_problems(features: dict[str, Any], source: str) -> list[str]:
    """slides.folder asks for extraction, which needs a cohort CSV and a folder of this toolkit's own layout."""
    problems = []
    if source != "cohort":
        problems.append(f"slides.folder: only with data.source=cohort, got data.source={source}")
    if not features.get("folder"):
        problems.append("features.folder: not set; with slides.folder it says where the extracted features are kept")
    if features.get("layout", "auto") not in ("auto", "cache"):
        problems.append(
            f"slides.folder: extraction writes this toolkit's own layout, not features.layout={features['layout']}; "
            "leave slides.folder out to train on that folder as it is"
        )
    return problems


def calibration_problems(report: Any, study: dict[str, Any]) -> list[str]:
    """A calibration needs slides with labels that it does not report: val, or the other folds."""
    wanted = report.get("calibrate", "none") if isinstance(report, dict) else "none"
    if wanted == "none" or study.get("folds", 5) != 1 or study.get("val_fraction") or study.get("folds_csv"):
        return []
    return [f"report.calibrate={wanted}: with study.folds=1 it needs val slides; set study.val_fraction, such as 0.2"]


def nested_problems(study: dict[str, Any], train: dict[str, Any]) -> list[str]:
    """What contradicts `study.nested`, and a grid or ranges that cannot be searched."""
    nested, problems = study.get("nested") or 0, []
    parts = {name: study.get(name) or {} for name in ("grid", "ranges")}
    given = {f"study.{name}.{k}": v for name, part in parts.items() if isinstance(part, dict) for k, v in part.items()}
    for key, block in [(key, block) for key, block in given.items() if isinstance(block, dict)]:
        del given[key]
        given |= {f"{key}.{k}": v for k, v in block.items()}
    given = {key: values for key, values in given.items() if values != []}  # [] is the default, which runs write out
    if not nested:
        problems += [f"{key}: needs nested cross-validation; set study.nested=5, or train.lr=..." for key in given]
        if study.get("search") == "random":
            problems.append("study.search=random: needs nested cross-validation; set study.nested=5")
        return problems
    if nested == 1:
        problems.append("study.nested=1: expected 0 (off) or at least 2 inner folds")
    if study.get("val_fraction"):
        problems.append("study.val_fraction: study.nested has its own inner folds; set one of them to 0")
    if train.get("select") == "best":
        problems.append("train.select=best: study.nested chooses the number of epochs itself; use train.select=last")
    random = study.get("search") == "random"
    wrong = "study.grid." if random else "study.ranges."
    hint = "study.search=random draws from study.ranges" if random else "set study.search=random"
    problems += [f"{key}: not used, {hint}" for key in given if key.startswith(wrong)]
    for key, values in given.items():
        if not isinstance(values, list) or not all(isinstance(v, int | float) for v in values):
            continue  # the section itself reports the type
        positive = key.endswith(".lr") or key.startswith("study.ranges.")
        bad = [v for v in values if v < 0 or (positive and v == 0)]
        if bad:
            problems.append(f"{key}: expected numbers {'above' if positive else 'of at least'} 0, got {bad}")
        if key.startswith("study.grid.") and len(set(values)) < len(values):
            problems.append(f"{key}: a value occurs twice, its members would be copies: {values}")
        if key.startswith("study.ranges.") and (len(values) != 2 or values[0] >= values[1]):
            problems.append(f"{key}: expected [lowest, highest], got {values}")
    if random and not any(key.startswith("study.ranges.") for key in given):
        problems.append("study.search=random: no range; set study.ranges.lr=[1e-5,1e-2] or study.ranges.weight_decay")
    return problems


def warm_start_problems(model: Any, train: Any) -> list[str]:
    """Keys of a warm start that say nothing without the others."""
    if not isinstance(model, dict) or not isinstance(train, dict):
        return []
    problems, name = [], model.get("name", "abmil")
    if model.get("init") and not isinstance(name, str):
        problems.append(f"model.init: a study's members are of one aggregator; expected one model.name, got {name}")
    if model.get("init") and train.get("harmonize", "none") != "none":
        problems.append("train.harmonize: not together with model.init, whose weights know other features; use none")
    if not model.get("init"):
        if model.get("init_from", "member") != "member":
            problems.append("model.init_from: only with model.init=RUN_FOLDER")
        if train.get("freeze", "none") != "none":
            problems.append("train.freeze: would freeze random parameters; only with model.init=RUN_FOLDER")
    return problems


def model_problems(model: Any) -> list[str]:
    """Unknown aggregators, unknown or wrong options. An option must exist in at least one of the named aggregators."""
    if not isinstance(model, dict):
        return []  # the section itself reports the type
    name = model.get("name", "abmil")
    names = name if isinstance(name, list) else [name]
    if not all(isinstance(n, str) for n in names):
        return []  # the same
    problems = [
        f"model.name: no aggregator {n!r}; there are {', '.join(AGGREGATORS)}{did_you_mean(str(n), list(AGGREGATORS))}"
        for n in names
        if n not in AGGREGATORS and not str(n).startswith(TORCHMIL)
    ]
    if len(set(map(str, names))) < len(names) or not names:
        problems.append(f"model.name: expected different aggregators, got {names}")
    torchmil = [n for n in names if str(n).startswith(TORCHMIL)]
    if torchmil and find_spec("torchmil") is None:
        problems.append(f"model.name: {', '.join(torchmil)}: torchmil is not installed; pip install torchmil")
    known = names_of(model)
    valid = [f"model.{key}" for key in [*Model.model_fields, *(o for n in known for o in options(n)), *known]]
    for key, value in model.items():
        owners = [n for n in known if key in options(n)]
        if key in Model.model_fields or is_aggregator(key) or (not known and problems):
            continue
        if not owners and not torchmil:  # a torchmil model says itself, when it is built, what it does not know
            hint = did_you_mean(f"model.{key}", valid)
            problems.append(f"model.{key}: unknown option of {', '.join(map(str, names))}{hint}")
        for owner in owners[:1]:
            problems += option_problems(owner, key, value)
    return problems


def block_problems(tree: dict[str, Any]) -> list[str]:
    """Blocks for aggregators that `model.name` does not have, and options in them that theirs lacks."""
    model = tree.get("model") or {}
    if not isinstance(model, dict):
        return []
    name, problems = model.get("name", "abmil"), []
    names = [str(n) for n in (name if isinstance(name, list) else [name])]
    for section, key, block in blocks_of(tree):
        where = f"{section}.{key}"
        if key not in names:
            hint = did_you_mean(where, [f"{section}.{n}" for n in names])
            problems.append(f"{where}: a block for one of model.name, which is {', '.join(names)}{hint}")
        elif block is not None and not isinstance(block, dict):
            problems.append(f"{where}: expected a block, such as {where}.KEY=VALUE, got {block!r}")
        elif section == "model" and key in AGGREGATORS:
            problems += [p for k, value in (block or {}).items() for p in own_option_problems(key, k, value)]
    return problems


def own_option_problems(name: str, key: str, value: Any) -> list[str]:
    """What is wrong with `model.NAME.KEY=VALUE`."""
    if key in options(name):
        return option_problems(name, key, value, f"model.{name}")
    hint = did_you_mean(f"model.{name}.{key}", [f"model.{name}.{option}" for option in options(name)])
    return [f"model.{name}.{key}: unknown option of {name}{hint}"]


def option_problems(name: str, key: str, value: Any, section: str = "model") -> list[str]:
    """What is wrong with this value of an option of aggregator `name`, which the config has in `section`."""
    schema = options_schema(name)
    try:
        schema.model_validate({key: value})
    except ValidationError as error:
        return [f"{section}.{explain(e, schema)}" for e in error.errors()]
    return []


def range_problems(model: Any) -> list[str]:
    """Options that are wrong for one aggregator of several, or beside another option, such as a width and heads."""
    problems: list[str] = []
    known = names_of(model) if isinstance(model, dict) else []
    for name in known:
        own, of = model.get(name), f" ({name})" if len(known) > 1 else ""
        own = own if isinstance(own, dict) else {}  # what this aggregator alone is told
        given = {k: v for k, v in (model | own).items() if k in options(name)}
        try:
            chosen = options_schema(name).model_validate(given).model_dump()
        except ValidationError as error:
            schema = options_schema(name)
            problems += ["model." + explain(e, schema) + of for e in error.errors() if e["loc"][0] not in own]
            continue
        problems += [problem + of for problem in ranges.problems(option_types(name), chosen)]
    return problems
