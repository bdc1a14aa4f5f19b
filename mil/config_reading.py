"""Between file, command line and config: what other aggregators leave out, what earlier versions said, the help."""

from __future__ import annotations

import sys
from typing import Any

from mil.aggregators import AGGREGATORS, PUBLISHED_LR, option_types, options, ranges
from mil.config import DEFAULT_LR, Recipe, blocks_of, is_aggregator, names_of


def of_earlier_versions(tree: dict[str, Any]) -> dict[str, Any]:
    """A saved config with today's values for those of `train` that are no longer offered.

    On how many devices members trained changes nothing of them: one. How a finished study was trained changes nothing
    of what becomes of it, except that probabilities that were written in 16 bits are coarse: that it was mixed stays
    known.
    """
    train = tree.get("train")
    if not isinstance(train, dict):
        return tree
    said = dict(train)
    if said.get("devices") == "auto":
        said["devices"] = 1
    if said.get("precision") in ("16-mixed", "16", "bf16", 16):
        said["precision"] = "bf16-mixed"
    if said.get("precision") in ("32", 32):
        said["precision"] = "32-true"
    return tree | {"train": said}


def foreign_options(merged: dict[str, Any], file: dict[str, Any], given: set[str]) -> list[str]:
    """What the config file has for aggregators which `model.name` on the command line replaced: options and blocks.

    Another aggregator may have an option of the same name, such as `head`; the file did not mean that one.

    Args:
        merged: the whole config. file: what the file says of it. given: keys of the command line.
    """
    if "model.name" not in given or not (isinstance(file.get("model"), dict) and isinstance(merged.get("model"), dict)):
        return []
    name = merged["model"].get("name")
    of_file, wanted = names_of(file["model"]), names_of(merged["model"])
    options_of_others = [
        f"model.{key}"
        for key in file["model"]
        if any(key in options(n) for n in of_file) and not any(key in options(n) for n in of_file if n in wanted)
    ]
    blocks = [f"{section}.{key}" for section, key, _ in blocks_of(file) if is_aggregator(key)]
    named = [str(n) for n in (name if isinstance(name, list) else [name])]
    blocks_of_others = [key for key in blocks if key.rpartition(".")[2] not in named]
    return [
        key
        for key in options_of_others + blocks_of_others
        if not any(g == key or g.startswith(f"{key}.") for g in given)
    ]


def without(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """The tree without the dotted `key`."""
    first, _, rest = key.partition(".")
    return {k: without(v, rest) if rest and k == first else v for k, v in tree.items() if rest or k != first}


def outranked(tree: dict[str, Any], given: set[str]) -> list[str]:
    """Keys of the command line that do not reach every aggregator, because one has its own, as sentences."""
    return [
        f"{section}.{key}: not for {name}, which has its own: {section}.{name}.{key}={block[key]}"
        for section, name, block in blocks_of(tree)
        if isinstance(block, dict)
        for key in block
        if f"{section}.{key}" in given and f"{section}.{name}.{key}" not in given
    ]


def for_today(merged: dict[str, Any], file: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """What the file says for the aggregators that are named now."""
    if isinstance(merged.get("auto"), list):  # of a run's config.yaml; what the command line says is not to be chosen
        merged = merged | {"auto": [key for key in merged["auto"] if key not in given]}
    return for_named_aggregators(merged, file, given)


def for_named_aggregators(merged: dict[str, Any], file: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """The config without what the file has for other aggregators than those now named.

    Says which that is, and which keys of the command line an aggregator's own settings outrank.
    """
    foreign = foreign_options(merged, file, given)
    if foreign:
        print(f"Left out, as the config file has them for another aggregator: {', '.join(foreign)}", file=sys.stderr)
    for key in foreign:
        merged = without(merged, key)
    for line in outranked(merged, given):
        print(line, file=sys.stderr)
    return merged


def options_help() -> str:
    """The aggregators' options with their defaults, for `--help`."""
    lines = ["model.OPTION by aggregator (default in brackets):"]
    for name in AGGREGATORS:
        types = option_types(name)
        shown = [f"{k} [{_plain(default)}] {ranges.shown(types[k])}" for k, (_, default) in options(name).items()]
        lines.append(f"  {name:<11} {'; '.join(part.strip() for part in shown)}")
    lines.append("  torchmil:NAME, such as torchmil:ABMIL: the arguments of its class; feat_ext=WIDTH embeds first")
    keys, rates = ", ".join(Recipe.model_fields), ", ".join(f"{name} {lr:g}" for name, lr in PUBLISHED_LR.items())
    lines += [
        f"train.lr where it is not set: {rates}, others {DEFAULT_LR:g}",
        "For one aggregator of a list: model.NAME.OPTION, study.grid.NAME.lr, train.NAME.KEY with KEY one of",
        f"  {keys};",
        "  such as model.name=[abmil,chowder] model.chowder.n_top=5 train.chowder.lr=1e-2; plain keys are for the rest",
    ]
    return "\n".join(lines)


def _plain(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value).lower()
