"""YAML plus `key=value` overrides -> one frozen, typed config; every problem reported at once.

Light on purpose: `--help` and config errors must answer in well under a second, so nothing here imports
torch, pandas or h5py. `extract` and `mil` share this loader and the sections below.
"""

from __future__ import annotations

import difflib
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from yaml import MarkedYAMLError, YAMLError

from extract.layouts import LAYOUTS
from extract.places import in_words, with_places, with_urls

if TYPE_CHECKING:
    LayoutName = str
else:
    LayoutName = Literal[("auto", *LAYOUTS)]

SHIPPED_CONFIGS = Path(__file__).resolve().parent.parent / "configs"


class ProblemsError(Exception):
    """Everything that is wrong, found in one go. `main` functions print it and exit with code 2."""

    def __init__(self, title: str, problems: Sequence[str]):
        self.title, self.problems = title, list(problems)
        super().__init__("\n".join([f"{title} ({len(self.problems)}):", *(f"  - {p}" for p in self.problems)]))

    def __reduce__(self) -> tuple[type[ProblemsError], tuple[str, list[str]]]:
        """As it was given, from one process to another."""
        return type(self), (self.title, self.problems)


SHOWN_OF_A_KIND = 5
SHOWN_KINDS = 20


def tell(error: Exception) -> None:
    """Print an error for a person: problems by kind, five of each, the rest counted and all written to a file.

    A cohort of 369 slides without features would otherwise fill the terminal with one sentence 369 times. The file lies
    in the folder for temporary files: where problems are refused nothing else is written.
    """
    if not isinstance(error, ProblemsError):
        print(in_words(str(error)), file=sys.stderr)
        return
    error = ProblemsError(in_words(error.title), [in_words(problem) for problem in error.problems])
    lines, left_out = by_kind(error.problems)
    text = [f"{error.title} ({len(error.problems)}):", *lines]
    if left_out:
        text.append(_all_in_a_file(error))
    print("\n".join(text), file=sys.stderr)


def by_kind(problems: Sequence[str]) -> tuple[list[str], int]:
    """The lines to show, and how many problems are not among them. A kind is a sentence without names and numbers."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(kind_of(problem), []).append(problem)
    lines, left_out = [], 0
    for alike in list(kinds.values())[:SHOWN_KINDS]:
        lines += [f"  - {problem}" for problem in alike[:SHOWN_OF_A_KIND]]
        more = len(alike) - SHOWN_OF_A_KIND
        if more > 0:
            lines.append(f"    ... and {more} more of this kind")
            left_out += more
    others = sum(len(alike) for alike in list(kinds.values())[SHOWN_KINDS:])
    if others:
        lines.append(f"  ... and {others} of {len(kinds) - SHOWN_KINDS} other kinds")
    return lines, left_out + others


def kind_of(problem: str) -> str:
    """The sentence without what is quoted, paths, the name that it begins with, and numbers."""
    problem = re.sub(r"'[^']*'|\"[^\"]*\"", "*", problem)
    problem = re.sub(r"[^\s:,;()]*[/\\][^\s:,;()]*", "*", problem)
    return re.sub(r"\d+(\.\d+)?", "#", re.sub(r"^\S+: ", "*: ", problem))


def _all_in_a_file(error: ProblemsError) -> str:
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="slide-mil-problems-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(f"{error}\n")
        return f"All {len(error.problems)} are in {file.name}"
    except OSError as why:
        return f"(All {len(error.problems)} could not be written to a file: {why})"


class ConfigError(ProblemsError):
    """The config (file or overrides) is wrong; nothing was written."""


class Section(BaseModel):
    """Base of every config section: frozen, no unknown keys, defaults validated too."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,  # `classes: [0, 1]`
    )

    blocks: ClassVar[type[Section] | None] = None
    """What a section holds under names that are not keys, where it allows that."""

    word: ClassVar[str | None] = None
    """The key that is meant where a word stands for the section: `task: survival` for `task: {name: survival}`."""

    @model_validator(mode="before")
    @classmethod
    def _places_for_urls(cls, given: Any) -> Any:
        """`s3://lab/phikon` is the local place that mirrors it, see `extract.places`."""
        return with_places(given) if isinstance(given, dict) else given


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        known = ["auto", "cpu", "cuda", "mps"]
        raise ValueError(f"expected auto, cpu, cuda, cuda:NUMBER or mps, got {name!r}{did_you_mean(name, known)}")
    return name


Device = Annotated[str, AfterValidator(_device)]
"""The name of a device for torch. Whether there is one is found out where it is used."""


# --- sections shared by extraction and training -------------------------------------------------------------------


class Columns(Section):
    """How the cohort CSV names its columns."""

    slide: str = Field("slide", description="slide id; features are looked up under this name")
    patient: str = Field(
        "patient", description="patient id; slide if each slide is one patient; tcga: from the slide's TCGA barcode"
    )
    label: str | list[str] = Field(
        "label", description="class of the slide, a name or a number; task=regression: a number; a list: many targets"
    )
    time: str | list[str] = Field("time", description="task=survival: time to the event, or to the last visit")
    event: str | list[str] = Field(
        "event", description="task=survival: whether it happened: 0/1, yes/no, 1:DECEASED, ..."
    )
    split: str = Field("split", description="optional: train, test or empty (= train)")
    path: str = Field("path", description="optional: slide file")
    mpp: str = Field("mpp", description="optional: microns per pixel at level 0, overrides the file's")
    site: str = Field("site", description="optional: hospital; tcga: tissue source site of the slide's TCGA barcode")
    covariates: list[str] = Field(
        [], description="mil.train: of the patient, such as [age, sex, stage], added to what the slide says"
    )


class Tables(Section):
    """The cohort where it is more than the path of one table: `cohort.file` with a sheet, or two tables (STAMP's way).

    `clinical` has a row a patient, `slides` a row a slide and whose it is.
    """

    word: ClassVar[str | None] = "file"
    file: Path | None = Field(None, description="one table for all; cohort=FILE is short for it")
    clinical: Path | None = Field(None, description="two tables: a row a patient, with label or time and event")
    slides: Path | None = Field(None, description="two tables: a row a slide, with its patient")
    sheet: str | None = Field(None, description="Excel: the sheet, where there are several; of two tables, clinical's")
    slides_sheet: str | None = Field(None, description="Excel: the sheet of cohort.slides")
    slides_patient: str | None = Field(
        None, description="patient column of cohort.slides, where it is not columns.patient"
    )

    @model_validator(mode="after")
    def _one_or_two(self) -> Tables:
        if self.file and (self.clinical or self.slides):
            raise ValueError("one table (cohort.file) or two (cohort.clinical and cohort.slides), not both")
        if bool(self.clinical) != bool(self.slides):
            absent = "slides" if self.clinical else "clinical"
            raise ValueError(f"cohort.{absent} is not set; two tables are cohort.clinical=FILE cohort.slides=FILE")
        if not self.file and not self.clinical:
            raise ValueError("no table given; set cohort=FILE, or cohort.clinical=FILE cohort.slides=FILE")
        if self.file and (self.slides_sheet or self.slides_patient):
            raise ValueError("slides_sheet and slides_patient are of a second table, cohort.slides")
        return self

    @property
    def main(self) -> Path:
        """The table that has a row a slide."""
        path = self.file or self.slides
        assert path is not None
        return path

    @property
    def files(self) -> list[Path]:
        return [path for path in (self.file, self.clinical, self.slides) if path is not None]

    def __str__(self) -> str:
        return " + ".join(map(str, self.files))


def main_table(cohort: Path | Tables) -> Path:
    """The table that has a row a slide: paths in it may be relative to its folder."""
    return cohort.main if isinstance(cohort, Tables) else cohort


def table_files(cohort: Path | Tables) -> list[Path]:
    """All files that the cohort is read from."""
    return cohort.files if isinstance(cohort, Tables) else [cohort]


def _plain_file(cohort: Any) -> Any:
    """`{file: x}` with nothing else is the path itself."""
    if isinstance(cohort, dict) and [key for key, value in cohort.items() if value is not None] == ["file"]:
        return cohort["file"]
    return cohort


ONE_TABLE, SEVERAL = "one-table", "several-tables"
ONE_MPP, SEVERAL_MPPS = "one-mpp", "several-mpps"
CohortTables = Annotated[
    Annotated[Path, Tag(ONE_TABLE)] | Annotated[Tables, Tag(SEVERAL)],
    Discriminator(lambda cohort: SEVERAL if isinstance(cohort, dict | Tables) else ONE_TABLE),
    BeforeValidator(_plain_file),
]
"""What `cohort` may be: a table's path, or `Tables`."""


def with_one_kind(given: Mapping[str, Any], merged: dict[str, Any]) -> dict[str, Any]:
    """`merged` without the tables of a cohort that `given`, which goes before it, names otherwise."""
    new, old = given.get("cohort"), merged.get("cohort")
    if not isinstance(new, dict) or not isinstance(old, dict):
        return merged
    if new.get("file"):
        return merged | {"cohort": {}}
    if new.get("clinical") or new.get("slides"):
        return merged | {"cohort": {key: value for key, value in old.items() if key != "file"}}
    return merged


class Folders(Section):
    """Feature folders: one, or several whose columns are joined."""

    folder: Path | None = Field(
        None, description="one feature file a slide; extraction writes here; mil: [A, B] joins several folders"
    )
    more: list[Path] = Field([], description="mil: the folders after the first, as features.folder=[A, B] sets it")
    layout: LayoutName = Field("auto", description="who wrote the folder; auto detects it")

    @model_validator(mode="before")
    @classmethod
    def _several(cls, given: Any) -> Any:
        """`folder: [A, B]` is `folder: A` and `more: [B]`."""
        if isinstance(given, dict) and isinstance(given.get("folder"), list):
            first, *more = given["folder"] or [None]
            return given | {"folder": first, "more": more}
        return given

    @model_serializer(mode="wrap")
    def _as_one_key(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Written as it is given: one folder, or a list."""
        tree: dict[str, Any] = dump(self)
        more = tree.pop("more")
        return tree | ({"folder": [tree["folder"], *more]} if more else {})

    @property
    def folders(self) -> list[Path]:
        """All of them; none where none is set."""
        return [] if self.folder is None else [self.folder, *self.more]


class Features(Folders):
    """Where tile features are, or will be, cached."""

    join: Literal["equal", "nearest"] = Field(
        "equal", description="several folders: tiles of equal coordinates, or each with the coarser one over its centre"
    )
    fuse: Literal["columns", "logits"] = Field(
        "columns", description="several folders: columns side by side, or a member an encoder and their logits weighted"
    )
    dtype: Literal["float16", "float32"] = Field("float16", description="storage type of extracted features")


class Slides(Section):
    """The slide files."""

    folder: Path | None = Field(None, description="searched recursively for slides; not needed when the CSV has paths")
    mpp: float | None = Field(None, gt=0, description="level-0 microns per pixel for files that do not say")
    reader: Literal["auto", "openslide", "fast"] = Field(
        "auto",
        description="auto: a file's JPEG blocks where they are OpenSlide's pixels, else OpenSlide; fast: only those",
    )
    stage: Literal["auto", "true", "false"] = Field(
        "auto",
        description="copy slides to local scratch ahead of reading; auto: those on network shares (stores: all)",
    )
    scratch_gb: float = Field(50.0, gt=0, description="most that staged slides take on the local disk, 1e9 bytes")
    scratch: Path | None = Field(None, description="folder for staged slides; default: TMPDIR")

    @field_validator("stage", mode="before")
    @classmethod
    def _stage_word(cls, given: Any) -> Any:
        """YAML makes a truth value of `true`."""
        return str(given).lower() if isinstance(given, bool) else given


class Encoder(Section):
    """The frozen network that turns tiles into features."""

    name: str = Field(
        "phikon",
        description="phikon, uni, virchow2, ... (a wrong name lists all), timm:NAME, hf:OWNER/NAME or module:function",
    )
    weights: Path | None = Field(None, description="local weights file instead of the hub")
    revision: str | None = Field(None, description="hub revision to pin")
    adapter: Path | None = Field(None, description="LoRA adapter folder of extract.finetune, merged into the weights")
    random_weights: bool = Field(False, description="allow random weights (timm:NAME only, for tests)")
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    precision: Literal["auto", "float32", "bf16", "fp16"] = Field(
        "auto", description="auto: float32 on CPU, bf16 on GPU"
    )
    compile: bool = Field(False, description="torch.compile the encoder")


class Tissue(Section):
    """Thumbnail -> tissue mask."""

    mpp: float = Field(8.0, gt=0, description="microns per pixel of the thumbnail that is segmented")
    method: Literal["otsu", "fixed", "regions"] = Field(
        "otsu", description="saturation threshold: Otsu's, or `threshold`; regions: all that is drawn, no threshold"
    )
    threshold: float = Field(0.05, gt=0, lt=1, description="saturation 0..1 for method=fixed")
    smooth_um: float = Field(40.0, ge=0, description="width of the median filter before thresholding, in microns")
    closing_um: float = Field(40.0, ge=0, description="gaps narrower than this are closed")
    pen_marks: bool = Field(True, description="leave out what is coloured like a pen; false for green or blue stains")
    min_hole_um2: float = Field(20_000.0, ge=0, description="holes smaller than this are filled, square microns")
    min_speck_um2: float = Field(20_000.0, ge=0, description="pieces smaller than this are dropped, square microns")
    regions: Path | None = Field(
        None,
        description="SLIDE.geojson, SLIDE.xml (ASAP) or mask images SLIDE.png (values: classes) that limit the tissue",
    )
    include: list[str] = Field(
        [], description="classes of tissue.regions where tiles may lie, `tum*` too; default: all others"
    )
    exclude: list[str] = Field(
        ["exclude", "exclusion", "ignore*"], description="classes of tissue.regions where they never lie"
    )
    without_regions: Literal["error", "whole"] = Field(
        "error", description="slides without a file in tissue.regions: stop, or take all their tissue"
    )
    save: Literal["none", "geojson"] = Field("none", description="geojson: the mask as outlines, in OUT/tissue")

    @field_validator("regions")
    @classmethod
    def _needed(cls, regions: Path | None, given: ValidationInfo) -> Path | None:
        if regions is None and given.data.get("method") == "regions":
            raise ValueError("not set, but tissue.method=regions takes what is drawn in it; expected a folder")
        return regions


NO_TISSUE_RULES = ("regions", "include", "exclude", "without_regions", "save")
"""Keys of `tissue` that say nothing about how tissue is found; what limited a slide is in its own file."""


Mpp = Annotated[float, Field(gt=0)]
Mpps = Annotated[
    Annotated[Mpp, Tag(ONE_MPP)] | Annotated[list[Mpp], Field(min_length=1), Tag(SEVERAL_MPPS)],
    Discriminator(lambda mpp: SEVERAL_MPPS if isinstance(mpp, list) else ONE_MPP),
]
"""One, or a list: what is wrong is told of the kind that is given."""


class Tiles(Section):
    """Tissue mask -> tile grid; or a folder of tile images instead of slides."""

    min_tissue: float = Field(0.25, ge=0, le=1, description="least fraction of a tile that is tissue")
    overlap_px: int = Field(0, ge=0, description="overlap of neighbours, in tile pixels")
    tolerance: float = Field(
        0.05,
        ge=0,
        lt=0.5,
        description="a level this close to the wanted mpp is read as it is; how far tiles.coords may be off",
    )
    max_upsample: float = Field(1.0, ge=1, description="largest upsampling factor allowed")
    resample: Literal["area", "lanczos", "decoder"] = Field(
        "area",
        description="how a larger cut-out is shrunk to the tile; lanczos: as OpenSlide's DeepZoom does; decoder: while "
        "JPEG blocks are decoded, faster, other pixels",
    )
    folder: Path | None = Field(None, description="tile images instead of slides: one feature row an image")
    hub: str | None = Field(
        None, description="tile images in Parquet files of this Hugging Face dataset: a feature file a split"
    )
    hub_splits: list[str] = Field(["nct_crc_he_1k", "crc_val_he_7k"], description="tiles.hub: the splits to encode")
    revision: str | None = Field(None, description="tiles.hub: branch, tag or commit; default: main")
    root: Path | None = Field(None, description="tiles.hub: folder with its Parquet files, instead of the network")
    files: Literal["subfolder", "one"] = Field(
        "subfolder", description="tiles.folder: a feature file for each subfolder, or one for all"
    )
    mpp: Mpps | None = Field(
        None,
        description="microns per pixel of tiles (default: the encoder's) or of tile images; [0.5,1.0]: a folder each",
    )
    coords: Path | None = Field(
        None, description="folder of CLAM's, TRIDENT's or AtlasPatch's SLIDE.h5: tiles are exactly these, no tissue"
    )
    max: int = Field(0, ge=0, description="at most so many tiles a slide, evenly drawn; 0 = all")
    seed: int = Field(0, ge=0, description="of the draw of tiles.max")
    save: Literal["none", "jpeg", "png"] = Field("none", description="the tiles as images too, in OUT/tiles/SLIDE")
    select: Path | None = Field(
        None, description="RUN/fast/selector.npz of mil.predict fast=true: a coarse look chooses the tiles to encode"
    )
    select_keep: float = Field(0.1, gt=0, le=1, description="tiles.select: share of the tiles that is encoded")
    select_random: float = Field(0.2, ge=0, lt=1, description="tiles.select: share of those that is drawn by chance")

    @field_validator("select")
    @classmethod
    def _not_of_given(cls, select: Path | None, given: ValidationInfo) -> Path | None:
        if select is not None and given.data.get("coords") is not None:
            raise ValueError("tiles.coords gives the tiles already; leave out one of them")
        return select


NO_TILE_RULES = (
    *("folder", "hub", "hub_splits", "revision", "root", "files", "mpp", "coords", "save"),
    *("select", "select_keep", "select_random"),
)
"""Keys of `tiles` that are no rules by which tiles are chosen on slides; what limited a slide is in its own file."""
GRID_RULES = ("min_tissue", "overlap_px")
"""Keys of `tiles` that say nothing where coordinates are given."""


def magnifications(tiles: Tiles) -> list[float]:
    """Microns per pixel that `tiles.mpp` asks for; none: the encoder's."""
    return tiles.mpp if isinstance(tiles.mpp, list) else [] if tiles.mpp is None else [tiles.mpp]


class Extract(Section):
    """How `extract.run` works through the cohort."""

    workers: int | None = Field(None, ge=0, description="reader processes; default: cores - 1, at least 1, at most 8")
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="tiles per encoder batch; auto: by trying sizes on a GPU, 16 on a CPU"
    )
    prefetch: int = Field(4, ge=1, le=32, description="regions in flight per reader")
    qc: bool = Field(False, description="save mask and grid overview pictures")
    shard: str | None = Field(None, pattern=r"^\d+/\d+$", description="i/n: this process takes part i of n (1..n)")
    overwrite: bool = Field(False, description="redo slides that are already in the cache")
    max_bad_tiles: float = Field(0.1, ge=0, le=1, description="fraction of unreadable tiles that fails a slide")


def _address(address: str | None) -> str | None:
    if address in (None, "auto") or re.fullmatch(r"(ray://)?[\w.\-\[\]:]*[\w\]]:\d{1,5}", address):
        return address
    raise ValueError(f"expected auto, ray://HOST:PORT or HOST:PORT, got {address!r}")


class Run(Section):
    """Where the units of work run: one slide to extract, one pass of members to train."""

    on: Literal["local", "ray"] = Field("local", description="local: this machine; ray: a cluster (extra `ray`)")
    address: Annotated[str | None, AfterValidator(_address)] = Field(
        None, description="run.on=ray: auto (the cluster of this node) or ray://HOST:PORT; default: one is started here"
    )
    cpus: int | None = Field(
        None, ge=1, description="run.on=ray: CPUs of a worker; default: a node's, shared out among its GPUs"
    )
    devices: Literal["auto"] | Annotated[list[Device], Field(min_length=1)] = Field(
        "auto", description="extract.run without Ray: a process each, such as [cuda:0,cuda:1]; auto: all GPUs"
    )
    members_per_task: int | None = Field(
        None, ge=1, description="mil.train run.on=ray: members in a task; default: shared out evenly among workers"
    )


class ExtractConfig(Section):
    """Everything `python -m extract.run` can be told."""

    cohort: CohortTables | None = Field(
        None, description="table (CSV, TSV, .xlsx) with slide, patient, label, optional split, path, mpp"
    )
    columns: Columns = Columns()
    features: Features = Features()
    slides: Slides = Slides()
    encoder: Encoder = Encoder()
    tissue: Tissue = Tissue()
    tiles: Tiles = Tiles()
    extract: Extract = Extract()
    run: Run = Run()
    out: Path | None = Field(None, description="same as features.folder, for the command line")


STUDY_KEYS = (
    *("task", "classes", "data", "reviews", "study", "model", "train", "checks", "report"),
    *("resume", "overwrite", "seed", "auto", "plan"),
)
"""Top-level keys that belong to `mil.train`; `extract.run` passes over them so that both read the same file."""


# --- loading -------------------------------------------------------------------------------------------------------

ConfigT = TypeVar("ConfigT", bound=Section)


def find_config(name: str) -> Path:
    """The config file called `name`: a path first, then one that ships with the toolkit.

    Raises:
        ConfigError: no such file; the message lists the shipped ones.
    """
    for candidate in (Path(name), SHIPPED_CONFIGS / name, SHIPPED_CONFIGS / f"{name}.yaml"):
        if os.path.isfile(candidate):  # False, where Path.is_file raises, for a name that is too long
            return candidate
    shipped = sorted(p.name for p in SHIPPED_CONFIGS.glob("*.yaml"))
    raise ConfigError(
        "config not found",
        [f"config={name}: no such file, and not one of {', '.join(shipped)}{did_you_mean(name, shipped)}"],
    )


def load_config(
    schema: type[ConfigT],
    arguments: Sequence[str],
    *,
    ignored: Sequence[str] = (),
    bare_section: str | None = None,
    also: Callable[[dict[str, Any]], list[str]] = lambda tree: [],
    adapt: Callable[[dict[str, Any], dict[str, Any], set[str]], dict[str, Any]] = lambda merged, file, given: merged,
) -> ConfigT:
    """Merge `config=FILE` with the other `key=value` arguments and validate against `schema`.

    Args:
        schema: the config class.
        arguments: the command line after the program's name.
        ignored: top-level keys of the FILE that belong to another program (on the command line they are errors).
        bare_section: a section whose keys may also be written without their prefix (`qc=true` for `extract.qc=true`).
        also: further problems of the merged tree that the schema cannot see.
        adapt: makes another tree of the merged one, of what the file says, and of the keys of the command line.

    Raises:
        ConfigError: every unknown key, wrong type and bad value, each with its nearest valid name.
    """
    problems: list[str] = []
    file: dict[str, Any] = {}
    overrides = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key.strip("[]. "):
            problems.append(f"{argument!r}: expected key=value{did_you_mean(argument.lstrip('-'), key_names(schema))}")
        elif key == "config":
            file = {k: v for k, v in read_yaml(find_config(value)).items() if k not in ignored}
            file = spelled_out(file, schema)
        else:
            overrides.append(without_comment(argument))
    merged = file
    for override in overrides:
        try:
            _refuse_deep(override.partition("=")[2])
            tree = OmegaConf.from_dotlist([bare_to_full(override, schema, bare_section)])
            given: dict[str, Any] = OmegaConf.to_container(tree)  # type: ignore[assignment]  # a dict: a dotlist is one
            given = spelled_out(given, schema)
            merged, tree = with_one_kind(given, merged), OmegaConf.create(given)
            merged = OmegaConf.to_container(OmegaConf.merge(merged, tree), resolve=True)  # type: ignore[assignment]  # a dict: both are
        except UNREADABLE as error:
            problems.append(f"{override!r}: {first_line(error)}")
    merged = adapt(merged, file, {override.partition("=")[0] for override in overrides})
    if bare_section:
        merged = lift_bare_keys(merged, schema, bare_section)
    return valid_config(schema, merged, problems, also)


def spelled_out(tree: dict[str, Any], schema: type[Section]) -> dict[str, Any]:
    """The tree with sections where a word stands for one (`Section.word`)."""
    words = {key: section.word for key, field in schema.model_fields.items() for section in sections_in(field)}
    return {
        key: {words[key]: value} if words.get(key) and isinstance(value, str) else value for key, value in tree.items()
    }


def without_comment(override: str) -> str:
    """`#` begins a comment in YAML; in a value on the command line, such as a path, it is a letter."""
    key, _, value = override.partition("=")
    if not re.search(r"(^|\s)#", value) or value[:1] in ("'", '"', "[", "{"):
        return override
    return f"{key}='{value.replace(chr(39), 2 * chr(39))}'"


def merge_config(
    schema: type[ConfigT],
    base: str | PathLike[str] | Mapping[str, Any] | None,
    sections: Mapping[str, Any],
    *,
    also: Callable[[dict[str, Any]], list[str]] = lambda tree: [],
    adapt: Callable[[dict[str, Any], dict[str, Any], set[str]], dict[str, Any]] = lambda merged, file, given: merged,
) -> ConfigT:
    """`load_config` from Python: what a file or a dictionary says, under what `sections` say, `{"train": {"lr": 1}}`.

    Raises:
        ConfigError: no such file; or everything that is wrong, as `load_config` says it.
    """
    if isinstance(base, str | PathLike):
        base = read_yaml(find_config(os.fspath(base)))
    file, given = (spelled_out(plain_tree(tree), schema) for tree in (base or {}, sections))
    merged = merged_trees(with_one_kind(given, file), given)
    return valid_config(schema, adapt(merged, file, set(leaf_names(given))), also=also)


def valid_config(
    schema: type[ConfigT],
    tree: dict[str, Any],
    problems: Sequence[str] = (),
    also: Callable[[dict[str, Any]], list[str]] = lambda tree: [],
) -> ConfigT:
    """The config that `tree` says; ConfigError with `problems` and everything else that is wrong."""
    problems = list(problems)
    unset = [key for key, value in tree.items() if value is None and key in schema.model_fields]
    tree = {key: value for key, value in tree.items() if key not in unset}  # `slides:` with all under it commented
    try:
        tree = with_places(tree)
    except ValueError as error:
        raise ConfigError("problems in the config", [*problems, str(error)]) from None
    try:
        config = schema.model_validate(tree)
    except ValidationError as error:
        problems += [explain(e, schema) for e in error.errors()]
    try:
        problems += also(tree)
    except OSError as error:  # a name that is too long, links in a circle: no answer to whether a file is there
        problems.append(f"{os.fsdecode(error.filename or '')[:60]}...: {error.strerror}")
    if problems:
        raise ConfigError("problems in the config", problems)
    return config


def plain_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What YAML could have said: paths as text, sections and mappings as dictionaries, arrays and tuples as lists."""
    return {str(key): _plain_value(value) for key, value in tree.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, Section):
        value = value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Mapping):
        return plain_tree(value)
    if isinstance(value, PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy's numbers and arrays
        return value.tolist()
    return [_plain_value(item) for item in value] if isinstance(value, list | tuple) else value


def merged_trees(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` goes before `under`, key by key, also within dictionaries."""
    both = dict(under)
    for key, value in over.items():
        below = both.get(key)
        both[key] = merged_trees(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return both


def leaf_names(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of all that is no dictionary."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaf_names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def config_from_command_line(
    schema: type[ConfigT], arguments: Sequence[str], usage: str, more_help: str = "", **options: Any
) -> ConfigT:
    """`load_config` for a `main`: prints the help for `--help`, or the problems and exits with 2."""
    show_what_cannot_be_shown()
    if any(a in ("-h", "--help", "help") for a in arguments) or not arguments:
        print("\n\n".join(part for part in (usage.strip(), help_text(schema), more_help) if part))
        sys.exit(0 if arguments else 2)
    try:
        refuse_no_text(arguments)
        return load_config(schema, arguments, **options)
    except ConfigError as error:
        tell(error)
        sys.exit(2)


def show_what_cannot_be_shown() -> None:
    """Where the terminal knows ASCII only (the C locale), ± is shown as \\xb1, not a traceback after hours of work."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")


def refuse_no_text(arguments: Sequence[str]) -> None:
    """Raise ConfigError for arguments with bytes that are no text: they could not be written into any file."""
    bad = [ascii(a) for a in arguments if any("\ud800" <= letter <= "\udfff" for letter in a)]
    if bad:
        encoding = sys.getfilesystemencoding()
        advice = "rename the file or folder" if encoding == "utf-8" else "set PYTHONUTF8=1, or another locale than C"
        raise ConfigError("problems on the command line", [f"{a}: is no text in {encoding}; {advice}" for a in bad])


UNREADABLE = (
    *(OmegaConfBaseException, YAMLError, OSError),
    *(ValueError, RecursionError, TypeError, KeyError, AttributeError),
)
"""What OmegaConf and PyYAML raise for files and values that are no YAML, or none that can be merged."""
LARGEST_FILE = 2**20
LARGEST_TREE = 100_000
DEEPEST = 100
"""Lists within lists: a config has three or four, and PyYAML's time grows with the square of their number."""
"""Bytes and values of a config file; aliases can make gigabytes of a few lines."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The file as plain dictionaries, interpolations resolved. `1e-3` is a number here, unlike in plain YAML 1.1."""
    try:
        _refuse_bomb(path)
        loaded = OmegaConf.load(path)
        if not isinstance(loaded, DictConfig):
            raise ConfigError("problems in the config", [f"{path}: expected `key: value` lines, got a list"])
        tree = OmegaConf.to_container(loaded, resolve=True)
    except UNREADABLE as error:
        raise ConfigError("problems in the config", [f"{path}: {first_line(error)}"]) from None
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""For a look at the whole text before it is read: libyaml's parser, where PyYAML has it, takes a tenth of the time."""
OPENINGS = re.compile(rf"(?:[\[{{]\s*){{{DEEPEST + 1}}}")


def _refuse_bomb(path: Path) -> None:
    """Raise ValueError for a file that is, or unpacks to, far more than a config."""
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"expected a config of at most {LARGEST_FILE:,} bytes, got {path.stat().st_size:,}")
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        """How many values it unpacks to; what contains itself never ends."""
        if id(node) not in sizes:
            sizes[id(node)] = LARGEST_TREE + 1  # while it is open
            inside: list[yaml.Node] = []
            if isinstance(node, yaml.SequenceNode):
                inside = node.value
            elif isinstance(node, yaml.MappingNode):
                inside = [part for pair in node.value for part in pair]
            sizes[id(node)] = 1 + sum(map(size, inside))
        return sizes[id(node)]

    text = path.read_text(encoding="utf-8")
    _refuse_deep(text)
    try:
        root = yaml.compose(text, Loader=LOADER)
    except YAMLError:  # PyYAML's own parser says what is wrong, or knows better
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None and size(root) > LARGEST_TREE:
        raise ValueError(f"its aliases unpack to more than {LARGEST_TREE:,} values; write out what is meant")


def _refuse_deep(text: str) -> None:
    """Raise ValueError for YAML that is nested deeper than any config; it is not read further than that."""
    too_deep = ValueError(f"lists and sections within each other, more than {DEEPEST} deep")
    if OPENINGS.search(text):  # the parser would look a thousand characters ahead
        raise too_deep
    for loader in dict.fromkeys((LOADER, yaml.SafeLoader)):
        depth = 0
        with suppress(YAMLError):  # which reading it says
            for event in yaml.parse(text, Loader=loader):
                if depth > DEEPEST:
                    raise too_deep
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            return


def to_yaml(config: Section) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal config."""
    return OmegaConf.to_yaml(OmegaConf.create(with_urls(config.model_dump(mode="json"))))


def bare_to_full(override: str, schema: type[Section], section: str | None) -> str:
    key = override.partition("=")[0].partition(".")[0]
    if section and key not in schema.model_fields and key in section_of(schema, section).model_fields:
        return f"{section}.{override}"
    return override


def lift_bare_keys(tree: dict[str, Any], schema: type[Section], section: str) -> dict[str, Any]:
    """Move a section's keys that the file wrote at top level into the section."""
    own = section_of(schema, section).model_fields
    lifted = {k: v for k, v in tree.items() if k in own and k not in schema.model_fields}
    if not lifted:
        return tree
    rest = {k: v for k, v in tree.items() if k not in lifted}
    return rest | {section: {**lifted, **(rest.get(section) or {})}}


def section_of(schema: type[Section], name: str) -> type[Section]:
    return schema.model_fields[name].annotation  # type: ignore[return-value]  # a section's type is a model


def first_line(error: BaseException) -> str:
    if isinstance(error, MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- messages ------------------------------------------------------------------------------------------------------


def did_you_mean(name: str, valid: Sequence[str]) -> str:
    """`; did you mean 'x'?` for the nearest valid name, also comparing only what follows the last dot."""
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    if not near:
        by_leaf = {v.rpartition(".")[2]: v for v in reversed(valid)}
        near = [by_leaf[m] for m in difflib.get_close_matches(name.rpartition(".")[2], list(by_leaf), n=1, cutoff=0.6)]
    return f"; did you mean {near[0]!r}?" if near else ""


NO_KEYS = ("function-after", "function-plain", ONE_TABLE, SEVERAL, ONE_MPP, SEVERAL_MPPS)
"""What pydantic puts between the keys."""


def explain(error: Any, schema: type[Section]) -> str:
    """One pydantic error as a sentence: which key, what was expected, what was got."""
    key = ".".join(str(part) for part in error["loc"] if part not in NO_KEYS)
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key{did_you_mean(key, meant(schema, error['loc']))}"
    message = str(error["msg"])
    message = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if error["type"] == "missing":
        field = schema.model_fields.get(key)
        return f"{key}: not set" + (f"; expected {field.description}" if field and field.description else "")
    got = error.get("input")
    hint = colon_hint(key, got)
    if error["type"] == "literal_error" and isinstance(got, str):
        choices = [part.strip(" '") for part in str(error["ctx"]["expected"]).replace(" or ", ", ").split(", ")]
        hint = did_you_mean(got, choices)
    if error["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message[0].lower() + message[1:]}, got {got!r}{hint}"


def colon_hint(key: str, got: Any) -> str:
    """What YAML makes of `{a:b}`, a key without a value, and of `a:`, a mapping."""
    if got is None and ":" in key.rpartition(".")[2]:
        return "; YAML wants a space behind a colon: {NAME: value}"
    if isinstance(got, dict) and len(got) == 1 and list(got.values()) == [None]:
        return "; YAML takes a colon at the end for a mapping"
    return ""


def meant(schema: type[Section], loc: Sequence[str | int]) -> list[str]:
    """Keys that the unknown one at `loc` may stand for: those of its block where it is in one, else all of them."""
    block = block_at(schema, loc[:-1])
    if block is None:
        return [*section_names(schema), *key_names(schema)]
    return [".".join(map(str, [*loc[:-1], key])) for key in block.model_fields]


def block_at(schema: type[Section], path: Sequence[str | int]) -> type[Section] | None:
    """The class of the block that `path` leads into, such as train.chowder; None where it leads into no block."""
    if not path:
        return None
    field = schema.model_fields.get(str(path[0]))
    if field is None:
        return schema.blocks
    inner = field.annotation
    return block_at(inner, path[1:]) if isinstance(inner, type) and issubclass(inner, Section) else None


def walk(schema: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every settable key of `schema` as (dotted name, pydantic field), in order of definition."""
    for name, field in schema.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from walk(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field
            for section in sections_in(field):
                yield from walk(section, f"{prefix}{name}.")


def sections_in(field: Any) -> list[type[Section]]:
    """The sections among what a field may be."""
    found, waiting = [], [field.annotation]
    while waiting:
        one = waiting.pop()
        if isinstance(one, type) and issubclass(one, Section):
            found.append(one)
        waiting += get_args(one) if get_origin(one) is not Literal else []
    return found


def section_names(schema: type[Section]) -> list[str]:
    fields = schema.model_fields.items()
    return [name for name, f in fields if isinstance(f.annotation, type) and issubclass(f.annotation, Section)]


def key_names(schema: type[Section]) -> list[str]:
    return [name for name, _ in walk(schema)]


def help_text(schema: type[Section]) -> str:
    """All keys with type, default and meaning, one a line."""
    rows = [("config", "NAME", "", "a path, or one of the shipped files in configs/")]
    for name, field in walk(schema):
        default = field.get_default(call_default_factory=True)
        shown = (
            "-"
            if default is None or field.is_required()
            else str(default).lower()
            if isinstance(default, bool)
            else str(default)
        )
        rows.append((name, type_name(field.annotation), shown, field.description or ""))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = ["key=value (default in brackets):"]
    for name, kind, default, meaning in rows:
        tail = f"{meaning} [{default}]" if default else meaning
        lines.append(f"  {name:<{widths[0]}}  {kind:<{min(widths[1], 28)}}  {tail}")
    return "\n".join(lines)


def type_name(annotation: Any) -> str:
    """`int`, `a|b|c` for choices, `[int]` for lists; None is left out because `-` already says unset."""
    if get_origin(annotation) is Literal:
        return "|".join(str(a) for a in get_args(annotation))
    if get_origin(annotation) in (list, tuple, Sequence):
        return f"[{type_name(get_args(annotation)[0])}]"
    if get_origin(annotation) is Annotated:
        return type_name(get_args(annotation)[0])
    arguments = [a for a in get_args(annotation) if a is not type(None)]
    if arguments and get_origin(annotation) is not dict:
        return "|".join(name for a in arguments if (name := type_name(a)))
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return ""
    return {"Path": "path", "str": "text", "bool": "true|false"}.get(
        getattr(annotation, "__name__", ""), getattr(annotation, "__name__", str(annotation))
    )
