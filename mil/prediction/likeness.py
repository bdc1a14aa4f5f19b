"""New slides made like a study's: the config that extracts them so, and the comparison of features that are there."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from extract.config import NO_TILE_RULES, NO_TISSUE_RULES, ConfigError, Encoder, ExtractConfig, Features, Tiles, Tissue
from extract.digest import sha256_of_file
from extract.encoders.table import ENCODERS, TIMM, encoder_spec, is_hugging_face, is_own_network
from extract.features.cache import Header
from extract.wording import at_most, count
from mil.prediction.config import PredictConfig
from mil.results.trained import TrainedStudy
from mil.training.checks import SAME_MPP

TILE_MPP = "tile mpp"

# --- extracting ------------------------------------------------------------------------------------------------------


def extraction_config(config: PredictConfig, trained: TrainedStudy, folder: Path, notes: list[str]) -> ExtractConfig:
    """The config that made the study's features, as far as they say it, for the new slides.

    Args:
        folder: where the new features go.
        notes: gets what the study does not say.

    Raises:
        ConfigError: the encoder is unknown or none of this toolkit's, it reads other tiles, or its weights are not at
            hand.
    """
    made = trained.environment["features"]
    said = made.get("extraction", {})
    if not any(key.startswith("tissue.") for key in said):
        notes.append("the study's features do not say which tissue rules made them: those of its config were used")
    tissue = trained.config.tissue.model_dump() | _section(said, "tissue.", Tissue.model_fields)
    tissue |= {key: Tissue.model_fields[key].get_default() for key in NO_TISSUE_RULES}
    tell_of_limits(made, tissue["method"], notes)
    tiles = trained.config.tiles.model_dump() | _section(said, "tiles.", Tiles.model_fields)
    tiles |= {key: Tiles.model_fields[key].get_default() for key in NO_TILE_RULES}
    tiles["mpp"] = made["mpp"] or None
    if made["overlap_px"]:
        tiles["overlap_px"] = made["overlap_px"]
    return ExtractConfig(
        cohort=config.cohort,
        slides=config.slides,
        features=Features(folder=folder, layout="cache", dtype=made["dtype"]),
        encoder=study_encoder(config, trained, said, notes),
        tissue=Tissue(**tissue),
        tiles=Tiles(**tiles),
        extract=config.extract,
    )


def tell_of_limits(made: dict[str, Any], method: str, notes: list[str]) -> None:
    """Regions were drawn on the study's slides, or their tiles chosen, and nobody did so with new ones.

    Raises:
        ConfigError: the study's tissue is what was drawn, and nothing else, or its tiles are those of files.
    """
    how = {"tissue.regions": method == "regions", "tiles.coords": bool(made.get("at_given_coordinates"))}
    problems = [
        f"the study's tiles are those that somebody chose ({key}). Choose those of the new slides too, extract with "
        f"python -m extract.run {key}=FOLDER, and give features.folder"
        for key, so in how.items()
        if so
    ]
    if problems:
        raise ConfigError("slides cannot be extracted as the study's were", problems)
    if limited := made.get("limited_by_drawn_regions"):
        notes.append(
            f"tiles of {count(limited, 'slide')} of the study lie within drawn regions; of new slides all tissue is "
            "taken"
        )


def _section(said: dict[str, Any], prefix: str, fields: Iterable[str]) -> dict[str, Any]:
    return {key: said[prefix + key] for key in fields if prefix + key in said}


def study_encoder(config: PredictConfig, trained: TrainedStudy, said: dict[str, Any], notes: list[str]) -> Encoder:
    """The encoder that made the study's features, with the very same weights.

    Args:
        said: what the study's features say of their extraction.

    Raises:
        ConfigError: it is unknown or none of this toolkit's, it reads other tiles, or its weights are not at hand.
    """
    made = trained.description.features
    name = made["encoder"]
    refuse_foreign_encoder(name, made["tile_px"])
    source, revision = said.get("encoder_source", ""), said.get("encoder_revision", "")
    options = {"device": config.device, "precision": config.encoder.precision, "compile": config.encoder.compile}
    if is_own_network(name):
        return Encoder(name=name, weights=config.encoder.weights or trained.config.encoder.weights, **options)
    if config.encoder.weights is None and source.startswith("random weights"):
        return Encoder(name=name, random_weights=True, **options)
    if config.encoder.weights is None and (revision or not source):
        if not made["weights_sha256"]:
            notes.append(f"the study's features do not say which weights of {name!r} made them: the hub's are used")
        return Encoder(name=name, revision=revision or trained.config.encoder.revision, **options)
    return Encoder(name=name, weights=local_weights(config, trained, source, made["weights_sha256"]), **options)


def refuse_foreign_encoder(name: str, tile_px: int) -> None:
    """Raise ConfigError unless this toolkit has the encoder and gives it tiles like the study's (0 = unknown)."""
    if is_own_network(name) or is_hugging_face(name):  # its facts are read where it is loaded
        return
    if name not in ENCODERS and not name.startswith(TIMM):
        problem = f"encoder {name!r} is not one of this toolkit" if name else "its features do not say their encoder"
    else:
        spec = encoder_spec(name)
        if tile_px in (0, spec.tile_px):
            return
        problem = f"its tiles are {tile_px} px a side, encoder {name!r} of this toolkit reads {spec.tile_px} px"
    also = "Extract the slides with the tool that made the study's features and give features.folder=FOLDER"
    raise ConfigError("cannot extract as the study did", [f"{problem}. {also}"])


def local_weights(config: PredictConfig, trained: TrainedStudy, source: str, digest: str) -> Path:
    """The file with the study's weights: as given, else where it was when the study's features were made."""
    given = config.encoder.weights
    tried = [given] if given else [trained.config.encoder.weights, Path(source)]
    files = list(dict.fromkeys(path.expanduser() for path in tried if path is not None))
    digests = {path: sha256_of_file(path) for path in files if path.is_file()}
    for path, found in digests.items():
        if not digest or found == digest:
            return path
    said = {path: f"has sha256 {digests[path][:12]}" if path in digests else "no such file" for path in files}
    listed = [f"{path}: {what}" for path, what in said.items()]
    wanted = f"the study's features were made with {source or 'weights'}, sha256 {digest[:12]}"
    raise ConfigError("not the study's weights", [f"{'; '.join(listed)}; {wanted}. Set encoder.weights=FILE"])


# --- comparing -------------------------------------------------------------------------------------------------------


def other_kind(trained: TrainedStudy, headers: dict[str, Header], layout: str) -> tuple[list[str], list[str]]:
    """How files differ from those that the study was trained on, as problems; what cannot be compared, as notes."""
    study = trained.environment["features"]
    wanted = known_facts(trained.description.features, study.get("extraction", {}), study["layout"])
    wanted["width"] = trained.description.in_dim
    different: dict[tuple[str, str, str], list[Path]] = {}
    silent: dict[str, int] = {}
    for header in headers.values():
        found = known_facts(header.provenance.same_kind(), header.provenance.extra, layout) | {"width": header.dim}
        for what in wanted.keys() | found.keys():
            if what not in wanted or what not in found:
                silent[what] = silent.get(what, 0) + 1
            elif not _same(found[what], wanted[what], SAME_MPP if what == TILE_MPP else 1e-6):
                key = (what, _short(found[what]), _short(wanted[what]))
                different.setdefault(key, []).append(header.path)
    problems = [
        f"{what} is {found} in {count(len(paths), 'file')}, such as {paths[0]}; the study's is {expected}"
        for (what, found, expected), paths in sorted(different.items())
    ]
    if not silent:
        return problems, []
    listed = ", ".join(at_most(sorted(silent, key=lambda what: ("." in what, what)), 6))
    number = count(max(silent.values()), "file")
    return problems, [f"{number} could not be compared with the study's in what one side does not say: {listed}"]


def known_facts(same_kind: dict[str, Any], extra: dict[str, Any], layout: str) -> dict[str, Any]:
    """How features were made, by name, without what is unknown: "" and 0; our own cache knows an overlap of 0."""
    named = {"encoder": "encoder", "weights_sha256": "encoder weights (sha256)", "tile_px": "tile_px", "mpp": TILE_MPP}
    facts = {name: same_kind[key] for key, name in named.items() if same_kind[key] not in ("", 0)}
    if same_kind["overlap_px"] or layout == "cache":
        facts["overlap_px"] = same_kind["overlap_px"]
    rules = {key: value for key, value in extra.items() if key.startswith(("tissue.", "tiles."))}
    rules.pop("tiles.overlap_px", None)
    if any(key.startswith("tiles.") for key in rules):
        rules.setdefault("tiles.resample", "area")  # from before there was a choice
    return facts | rules


def _same(found: Any, wanted: Any, tolerance: float = 1e-6) -> bool:
    """`tolerance` is relative, for numbers that are no whole ones."""
    if isinstance(found, float) or isinstance(wanted, float):
        return math.isclose(found, wanted, rel_tol=tolerance)
    return bool(found == wanted)


def _short(value: Any) -> str:
    if isinstance(value, str):
        return repr(f"{value[:12]}..." if len(value) == 64 else value)
    return f"{value:g}" if isinstance(value, float) else str(value)
