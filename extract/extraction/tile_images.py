"""A folder of tile images -> cache: one feature row an image with its name, one file a subfolder or one for all.

Axes: N images of one file, B images of a batch, D features, H height, W width, 3 = RGB.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from extract.config import ConfigError, ExtractConfig, ProblemsError, Tiles, magnifications
from extract.encoders.frozen import FrozenEncoder, load_encoder
from extract.encoders.table import EncoderSpec
from extract.extraction.batches import chosen_size
from extract.extraction.claims import Claims
from extract.extraction.readers import Failure
from extract.extraction.summary import FAILED, Summary, read_failed, record_failures, remove_leftovers
from extract.extraction.todo import differences, shard_of
from extract.extraction.work import encoder_facts, n_workers
from extract.features.cache import SUFFIX, CacheError, Provenance, read_header, write_features
from extract.slides.hub_tiles import HubTilesError, open_hub_tiles
from extract.slides.images import TILE_SUFFIXES, decoded_tile, resized_tile
from extract.wording import count


@dataclass(frozen=True)
class ImageBag:
    """The images of one feature file. names: their paths below the bag's folder, with / between the parts.

    images: files, or names of which `decode` makes pixels; source: the hash of where the latter come from.
    """

    slide: str
    images: tuple[Path | str, ...]
    names: tuple[str, ...]
    decode: Callable[[Any], np.ndarray | str] = decoded_tile
    source: str = ""

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over names and sizes, or names and source: which images these are."""
        if self.source:
            return hashlib.sha256(repr((self.source, self.names)).encode()).hexdigest()
        sizes = [(name, Path(path).stat().st_size) for name, path in zip(self.names, self.images, strict=True)]
        return hashlib.sha256(repr(sizes).encode()).hexdigest()


def extract_tile_images(config: ExtractConfig, *, progress: bool = True) -> Summary:
    """Write the feature files of `tiles.folder` that are not there yet into `config.features.folder`.

    An image that cannot be used (damaged, not square, of the wrong scale) is a failure of its own, BAG/IMAGE in
    failed.csv; its row is left out. More than `extract.max_bad_tiles` of them fail the whole file.

    Raises:
        ProblemsError: no images, or files are there that were made otherwise (all listed; nothing was extracted).
        EncoderError: the encoder cannot be had.
    """
    folder = config.features.folder
    assert folder is not None
    bags = find_images(config)
    encoder = load_encoder(config.encoder)
    todo, there = sort_out(config, encoder, bags)
    summary = Summary(already_there=[bag.slide for bag in there])
    summary.failed += known_failures(folder / FAILED, summary.already_there)
    n_images = sum(len(bag.images) for bag in todo)
    began = time.monotonic()
    with Claims(folder) as claims, tqdm(total=n_images, unit="image", disable=not progress) as bar:
        for bag in todo:
            if not claims.take(bag.slide):
                summary.elsewhere.append(bag.slide)
                continue
            remove_leftovers(folder, bag.slide, f"{bag.slide}{SUFFIX}")
            failed = extract_bag(config, encoder, bag, bar)
            if all(failure.slide != bag.slide for failure in failed):
                summary.done.append(bag.slide)
                summary.tiles += len(bag.images) - len(failed)
            for line in told(failed, bag.slide):
                bar.write(line, file=sys.stderr)
            summary.failed += failed
            claims.release(bag.slide)
        record_failures(folder, claims, summary)
    summary.seconds = time.monotonic() - began
    return summary


SHOWN = 5
"""Images of a file whose failure is printed: where the scale is wrong it is all of thousands."""


def told(failed: Sequence[Failure], bag: str) -> list[str]:
    """What failed: the first images, how many more, and the file itself."""
    images = [failure for failure in failed if failure.slide != bag]
    lines = [failure.said for failure in images[:SHOWN]]
    if len(images) > SHOWN:
        lines.append(f"... and {count(len(images) - SHOWN, 'more image')} of {bag}, in {FAILED}")
    return lines + [failure.said for failure in failed if failure.slide == bag]


# --- what there is -------------------------------------------------------------------------------------------------


def find_images(config: ExtractConfig) -> list[ImageBag]:
    """The feature files to make and their images, sorted; this process's share of them.

    With tiles.files=subfolder each direct subfolder is a file, with all images below it; images in the folder itself
    make one of the folder's name. Hidden files and folders are passed over, and the features folder.

    Raises:
        ConfigError: no such folder, no images in it, or two files of one name.
    """
    root = config.tiles.folder
    if root is None:
        return shard_of(find_hub_images(config.tiles), config.extract.shard)
    if not root.is_dir():
        raise ConfigError("no tile images", [f"tiles.folder={root}: no such folder"])
    found: dict[str, list[Path]] = {}
    others = Counter[str]()
    for path in files_below(root, config.features.folder):
        if path.suffix.lower() in TILE_SUFFIXES:
            parts = path.relative_to(root).parts
            own = len(parts) > 1 and config.tiles.files == "subfolder"
            found.setdefault(parts[0] if own else "", []).append(path)
        else:
            others[path.suffix.lower() or path.name] += 1
    if others:
        listed = ", ".join(f"{n} *{suffix}" for suffix, n in sorted(others.items()))
        print(f"passed over in {root}, as they are no images: {listed}", file=sys.stderr)
    whole = root.resolve().name
    if not found:
        raise ConfigError("no tile images", [f"tiles.folder={root}: no file ends in one of {' '.join(TILE_SUFFIXES)}"])
    if "" in found and whole in found:
        problem = (
            f"{root}: images in the folder itself and a subfolder {whole!r} would both be {whole}{SUFFIX}; move one"
        )
        raise ConfigError("two feature files of one name", [problem])
    bags = []
    for name, images in sorted(found.items()):
        names = [path.relative_to(root / name).as_posix() for path in images]
        bags.append(ImageBag(name or whole, tuple(images), tuple(names)))
    return shard_of(bags, config.extract.shard)


def find_hub_images(tiles: Tiles) -> list[ImageBag]:
    """A file for each split of a dataset of the hub, its images named CLASS/NUMBER.

    Raises:
        ConfigError: the Parquet files cannot be had or are not of the form.
    """
    assert tiles.hub is not None
    try:
        found = open_hub_tiles(tiles.hub, tiles.revision, tiles.root, tiles.hub_splits, "tiles.root")
    except HubTilesError as error:
        raise ConfigError("no tile images", list(error.args)) from None
    for note in found.notes:
        print(f"{tiles.hub}: {note}", file=sys.stderr)
    bags = []
    for split in tiles.hub_splits:
        images = tuple(name for name, of in zip(found.names, found.splits, strict=True) if of == split)
        names = tuple(name.partition("/")[2] for name in images)
        digests = " ".join(file.sha256 for file in found.files if file.split == split)
        bags.append(ImageBag(split, images, names, found.decoded, digests))
    return bags


def files_below(root: Path, leave_out: Path | None) -> Iterator[Path]:
    """All files that are not hidden, sorted; links are followed, each real folder once."""
    seen = {os.path.realpath(leave_out)} if leave_out is not None else set()
    for name, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(name)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        yield from (Path(name) / file for file in sorted(files) if not file.startswith("."))


def sort_out(
    config: ExtractConfig, encoder: FrozenEncoder, bags: Sequence[ImageBag]
) -> tuple[list[ImageBag], list[ImageBag]]:
    """Files to make, and files that are there and made alike; ProblemsError for those that were made otherwise."""
    assert config.features.folder is not None
    todo, there, problems = [], [], []
    for bag in bags:
        path = config.features.folder / f"{bag.slide}{SUFFIX}"
        if config.extract.overwrite or not path.exists():
            todo.append(bag)
            continue
        try:
            different = differences(read_header(path), settings_of(config, encoder, bag))
        except CacheError as error:
            different = [str(error).removeprefix(f"{path}: ")]
        problems += [f"{path}: {'; '.join(different)}"] if different else []
        there.append(bag)
    if problems:
        advice = "overwrite=true makes them anew, out=FOLDER puts the new ones elsewhere"
        raise ProblemsError(f"features are there that were made otherwise; {advice}", problems)
    return todo, there


def settings_of(config: ExtractConfig, encoder: FrozenEncoder, bag: ImageBag) -> dict[str, Any]:
    """What an existing file must state to be the one that would be made now."""
    return {
        "encoder": encoder.id,
        "weights_sha256": encoder.weights_sha256,
        "tile_px": encoder.spec.tile_px,
        "images_mpp": image_mpp(config.tiles) or 0.0,
        "features.dtype": config.features.dtype,
        "slide_fingerprint": bag.fingerprint,
    }


def known_failures(path: Path, slides: Sequence[str]) -> list[Failure]:
    """Images that failed when the files that are there were made: they are told again."""
    rows = [(*row["slide"].partition("/"), row) for row in read_failed(path)]
    return [Failure(r["slide"], r["stage"], r["reason"]) for slide, slash, _, r in rows if slash and slide in slides]


# --- images to features --------------------------------------------------------------------------------------------


def extract_bag(config: ExtractConfig, encoder: FrozenEncoder, bag: ImageBag, bar: tqdm[Any]) -> list[Failure]:
    """Encode the images and write their file; what failed, BAG/IMAGE or, where nothing was written, also the BAG."""
    assert config.features.folder is not None
    features_ND = np.empty((len(bag.images), encoder.spec.dim), np.float32)
    reasons: dict[int, str] = {}
    size = chosen_size(encoder, config.extract.batch_size)
    for first, found in decoded_ahead(bag, size, max(1, n_workers(config))):
        fitted = [image if isinstance(image, str) else as_seen(image, encoder.spec, config.tiles) for image in found]
        reasons |= {first + i: tile for i, tile in enumerate(fitted) if isinstance(tile, str)}
        good = {first + i: tile for i, tile in enumerate(fitted) if not isinstance(tile, str)}
        if good:
            features_ND[list(good)] = encoder.encode(np.stack(list(good.values()))).numpy()
        bar.update(len(found))
    failed = [Failure(f"{bag.slide}/{bag.names[i]}", "image", f"{bag.images[i]}: {why}") for i, why in reasons.items()]
    allowed = config.extract.max_bad_tiles
    if len(reasons) > allowed * len(bag.images):
        many = f"{len(reasons)} of {count(len(bag.images), 'image')} cannot be used, extract.max_bad_tiles={allowed:g}"
        return [*failed, Failure(bag.slide, "read", f"{many} allows less; first: {failed[0].reason}")]
    kept = [i for i in range(len(bag.images)) if i not in reasons]
    with np.errstate(over="ignore"):  # looked for on the next line
        not_finite = int((~np.isfinite(features_ND[kept].astype(config.features.dtype))).any(axis=1).sum())
    if not_finite:
        what = f"{count(not_finite, 'image')} with features that are no finite numbers in {config.features.dtype}"
        return [*failed, Failure(bag.slide, "encode", f"{what}; try features.dtype=float32")]
    write_features(
        config.features.folder / f"{bag.slide}{SUFFIX}",
        features_ND[kept],
        np.zeros((len(kept), 2), np.int32),
        provenance_of(config, encoder, bag, len(reasons)),
        dtype=config.features.dtype,
        names=[bag.names[i] for i in kept],
    )
    return failed


def decoded_ahead(bag: ImageBag, size: int, n_threads: int) -> Iterator[tuple[int, list[np.ndarray | str]]]:
    """(number of the first, its images or what is wrong with them) of every batch; the next one is read meanwhile."""
    with ThreadPoolExecutor(n_threads, thread_name_prefix="image") as threads:
        waiting: list[tuple[int, list[Future[np.ndarray | str]]]] = []
        for first in range(0, len(bag.images), size):
            waiting.append((first, [threads.submit(bag.decode, path) for path in bag.images[first : first + size]]))
            if len(waiting) > 1:
                start, futures = waiting.pop(0)
                yield start, [future.result() for future in futures]
        for start, futures in waiting:
            yield start, [future.result() for future in futures]


def as_seen(image_HW3: np.ndarray, spec: EncoderSpec, tiles: Tiles) -> np.ndarray | str:
    """The image as the encoder sees tiles, or why it cannot be one: a tile covers the same square of tissue as one cut
    from a slide (within tiles.tolerance), and is not enlarged more than tiles.max_upsample."""
    height_px, width_px = image_HW3.shape[:2]
    size = f"is {width_px} x {height_px} px"
    if height_px != width_px:
        return f"{size}, expected a square tile"
    mpp = image_mpp(tiles)
    if mpp is None:
        if width_px == spec.tile_px:
            return image_HW3
        return f"{size}, the encoder sees {spec.tile_px} x {spec.tile_px}; tiles.mpp=... would say its scale"
    wide_um, wanted_um = width_px * mpp, spec.tile_px * spec.mpp
    if abs(wide_um / wanted_um - 1) > tiles.tolerance:
        wants = f"the encoder sees {wanted_um:g} ({spec.tile_px} px at {spec.mpp:g})"
        return f"{size} at {mpp:g} microns per pixel, {wide_um:g} microns wide; {wants}"
    if spec.tile_px / width_px > tiles.max_upsample:
        up = spec.tile_px / width_px
        return f"{size}, would be enlarged {up:.2f} times; tiles.max_upsample={tiles.max_upsample:g} allows less"
    return resized_tile(image_HW3, spec.tile_px)


def image_mpp(tiles: Tiles) -> float | None:
    """Microns per pixel of the images, where the user has said it."""
    return next(iter(magnifications(tiles)), None)


def provenance_of(config: ExtractConfig, encoder: FrozenEncoder, bag: ImageBag, n_bad: int) -> Provenance:
    """mpp is the encoder's where the user has said the images' (they were then checked), else unknown."""
    extra = encoder_facts(encoder) | {
        "coords_known": False,
        "images": len(bag.images),
        "images_unreadable": n_bad,
        "images_mpp": image_mpp(config.tiles) or 0.0,
    }
    return Provenance(
        encoder=encoder.id,
        weights_sha256=encoder.weights_sha256,
        tile_px=encoder.spec.tile_px,
        mpp=encoder.spec.mpp if image_mpp(config.tiles) else 0.0,
        slide=bag.slide,
        slide_fingerprint=bag.fingerprint,
        empty_reason="" if n_bad < len(bag.images) else "none of its images can be used",
        extra=extra,
    )
