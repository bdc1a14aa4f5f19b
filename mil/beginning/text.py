"""What was found, in words; and the commented config that follows from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from extract.config import Columns, Tables
from extract.wording import count, name_some
from mil.beginning.findings import Found, classes_of


def told(found: Found) -> Iterator[str]:
    """Lines for the terminal."""
    yield f"table {found.tables}: {count(len(found.rows), 'slide')} of {count(found.n_patients, 'patient')}"
    yield from (f"  {note}" for note in found.notes)
    named = ", ".join(f"columns.{role}={name}" for role, name in found.columns.items())
    yield f"  columns: {named or 'none that is known'}"
    yield f"  {len(found.matched)} with features, {len(found.without)} without" + (
        f": {name_some(found.without)}" if found.without else ""
    )
    if found.unlisted:
        more = count(len(found.unlisted), "slide")
        yield f"  features of {more} that the table does not list: {name_some(found.unlisted)}"
    if "site" in found.columns:
        sites = {cell.strip() for cell in found.rows[found.columns["site"]]} - {""}
        yield f"  {count(len(sites), 'site')}: {name_some(sorted(sites))}"
    if found.task is None:
        yield "  no label: " + (
            f"set columns.label to one of {', '.join(found.classes)}" if found.classes else "no column looks like one"
        )
        return
    for name, labels in (found.targets or {"": found.labels}).items():
        listed = ", ".join(f"{label}: {n}" for label, n in list(labels.items())[:8])
        more = f" and {len(labels) - 8} more values" if len(labels) > 8 else ""
        yield f"  labels{' of ' + name if name else ''}: {listed}{more}"
    yield f"  suggested task: {found.task}"
    if len(found.classes) not in (0, len(found.labels)):
        yield "  labels that differ only in case or spaces are read as one: see classes in the config"


def config_text(found: Found, folder: Path, layout: str, out: Path) -> str:
    """YAML that `mil.train` accepts."""
    lines = [
        "# Written by mil.init from what it found; every line is yours to change.",
        "#",
        f"# Command:   python -m mil.train config={out}",
        "#            plan=true prints what that would train, and what it would take, and stops",
        *tables_lines(found.tables),
        "columns:",
        *columns_lines(found),
        *task_lines(found),
        "features:",
        f"  folder: {quoted(folder)}",
        f"  layout: {layout}",
        "checks:",
        f"  missing: {'drop' if found.without else 'error'}                # "
        + (
            f"{count(len(found.without), 'slide')} had no features when this was written"
            if found.without
            else "or drop"
        ),
        "study:",
        f"  folds: {folds(found)}                      # grouped by patient, stratified by label",
        "model:",
        "  name: abmil                   # a list compares: [abmil, chowder, mean]",
        "train:",
        "  epochs: auto                  # chosen from the cohort, with the reason; or a number",
        "  batch_size: auto",
        "data:",
        "  max_tiles: auto",
    ]
    return "\n".join(lines) + "\n"


def quoted(text: object) -> str:
    """As YAML takes it, whatever is in it."""
    return json.dumps(str(text), ensure_ascii=False)


def tables_lines(tables: Path | Tables) -> list[str]:
    if not isinstance(tables, Tables):
        return [f"cohort: {quoted(tables)}"]
    given = {key: value for key, value in tables.model_dump().items() if value is not None}
    return ["cohort:", *(f"  {key}: {quoted(value)}" for key, value in given.items())]


def columns_lines(found: Found) -> list[str]:
    """The columns that there are, and commented those that there might be."""
    lines = []
    for role in Columns.model_fields:
        name = found.columns.get(role)
        known = name is not None and (role in ("slide", "patient") or needed(found, role))
        if role == "label" and found.targets:
            lines.append(f"  label: [{', '.join(map(quoted, found.targets))}]    # a run folder each, in one pass")
            continue
        alone = role == "patient" and name == found.columns.get("slide")
        why = "    # no column says whose the slide is: each counts as its own patient" if alone else ""
        lines.append(f"  {role}: {quoted(name)}{why}" if known else f"  # {role}: {name or role}")
    return lines


def needed(found: Found, role: str) -> bool:
    """Whether a column that is there is used: those of other tasks are left to a comment."""
    if role in ("time", "event"):
        return found.task == "survival"
    return role != "label" or found.task != "survival"


def task_lines(found: Found) -> list[str]:
    """The task and its classes, of each target where there are several."""
    if found.task is None:
        return ["# task: classification         # columns.label is still to be set"]
    lines = [f"task: {found.task}"]
    if found.task in ("classification", "ordinal"):
        order = "from the lowest grade to the highest" if found.task == "ordinal" else "the positive class last"
        if found.targets:
            lines.append(f"classes:    # {order}")
            named = {name: classes_of(labels) for name, labels in found.targets.items()}
            return lines + [f"  {quoted(k)}: [{', '.join(map(quoted, v))}]" for k, v in named.items()]
        lines.append(f"classes: [{', '.join(map(quoted, found.classes))}]    # {order}")
    return lines


def folds(found: Found) -> int:
    """5, or fewer where the rarest class (event) has fewer slides."""
    if found.task not in ("classification", "ordinal"):
        return 5
    rarest = [n for labels in (found.targets or {"": found.labels}).values() for n in labels.values()]
    return max(2, min(5, *rarest)) if rarest else 5
