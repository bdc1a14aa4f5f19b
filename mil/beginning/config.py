"""Everything `python -m mil.init` can be told. Light: no torch, no pandas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from extract.config import CohortTables, Columns, Features, Section


class InitConfig(Section):
    """A cohort, features, and where the config goes."""

    cohort: CohortTables | None = Field(None, description="table (CSV, TSV, .xlsx) of slides; or two, as below")
    columns: Columns = Field(Columns(), description="where you know them; else they are suggested")
    features: Features = Features()
    out: Path = Field(Path("study.yaml"), description="the config that is written; never over another file")


def init_problems(tree: dict[str, Any]) -> list[str]:
    """What is not given."""
    features, problems = tree.get("features") or {}, []
    if not tree.get("cohort"):
        problems.append("cohort: not set; expected cohort=FILE, or cohort.clinical=FILE cohort.slides=FILE")
    if not (isinstance(features, dict) and features.get("folder")):
        problems.append("features.folder: not set; expected the folder of feature files")
    return problems
