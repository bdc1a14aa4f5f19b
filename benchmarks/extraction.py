"""Speed and memory of extraction, both sides of every comparison in one run.

    python benchmarks/extraction.py [reading] [vit] [small] [memory] [gpu] [rounds=3] [side=20480]

`side` is the slide's height in pixels (a multiple of 512); smaller for a quick look. Slides are made: two pieces of
tissue on glass as a tiled JPEG pyramid, the tissue being a region of CMU-1-Small-Region.svs repeated (looked for in
SLIDE_MIL_SHARED/data/wsi, by default beside this repository) or, without that file, painted. Networks have random
weights. Prints Markdown. Needs tifffile (pip install -e '.[test]').
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import openslide
import psutil
import tifffile
import torch
from machine import machine
from openslide.deepzoom import DeepZoomGenerator
from PIL import Image
from torchvision.transforms import v2 as transforms

from extract.config import Encoder, ExtractConfig, Tiles, Tissue
from extract.encoders.frozen import FrozenEncoder, load_encoder
from extract.encoders.table import IMAGENET_MEAN, IMAGENET_STD, EncoderSpec
from extract.extraction import batches
from extract.extraction import work as extraction
from extract.extraction.readers import Planned, PlanTask, ReaderPool, Settings, SlideFile, TilesRead, read_task
from extract.extraction.summary import Summary
from extract.extraction.work import extract_cohort
from extract.slides.slide import open_slide
from extract.slides.tiles import Region, read_tile

SHARED = Path(os.environ.get("SLIDE_MIL_SHARED", Path(__file__).resolve().parents[2] / "shared"))
REGION = (768, 1536, 768, 1280)
"""Of CMU-1-Small-Region.svs, all tissue: left, top, width, height in level-0 px."""
TILE_PX, BLOCK_PX, BATCH = 224, 256, 64


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["memory-child"]:
        return memory_child(Path(arguments[1]))
    rounds, side = (next((int(a.partition("=")[2]) for a in arguments if a.startswith(k)), default)
                    for k, default in (("rounds=", 3), ("side=", 20_480)))  # fmt: skip
    parts = {"reading": reading, "vit": vit, "small": small, "memory": memory, "gpu": gpu}
    print(f"Command: `python benchmarks/extraction.py {' '.join(arguments)}`\n")
    print(machine("torch", "timm", "openslide-python", "openslide-bin", "simplejpeg", "numpy") + "\n")
    print(f"Tissue: {tissue_blocks()[1]}\n")
    for name in [a for a in arguments if a in parts] or parts:
        with tempfile.TemporaryDirectory() as folder:
            parts[name](Path(folder), rounds, side)
    return None


def listed(values: list[float], digits: int = 0) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


# --- slides ----------------------------------------------------------------------------------------------------------


def make_slide(path: Path, side: int, mpp: float = 0.5) -> Path:
    """A slide of side + 256 by side px: glass with two pieces of tissue, levels of 1, 1/4 and 1/16.

    Written block by block, so that memory does not limit its size.
    """
    rows, columns = side // BLOCK_PX, side // BLOCK_PX + 1
    resolution = (10_000 / mpp, 10_000 / mpp)
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for shrink in (1, 4, 16):
            height, width = rows * BLOCK_PX // shrink, columns * BLOCK_PX // shrink
            file.write(
                blocks_of_level(rows, columns, shrink),
                shape=(height, width, 3),
                dtype=np.uint8,
                tile=(BLOCK_PX, BLOCK_PX),
                photometric="ycbcr",
                subsampling=(2, 2),
                compression="jpeg",
                subfiletype=int(shrink > 1),
                resolution=resolution,
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    return path


def blocks_of_level(rows: int, columns: int, shrink: int) -> Iterator[bytes]:
    """The compressed blocks of a level, row by row, each made of shrink x shrink blocks of level 0."""
    for row in range(-(-rows // shrink)):
        for column in range(-(-columns // shrink)):
            kinds = tuple(
                tuple(kind_of_block(row * shrink + i, column * shrink + j, rows, columns) for j in range(shrink))
                for i in range(shrink)
            )
            yield compressed(kinds, shrink)


def kind_of_block(row: int, column: int, rows: int, columns: int) -> int:
    """Which of the tissue blocks, or -1 for glass: the places in two ellipses are tissue."""
    y, x = (row + 0.5) / rows, (column + 0.5) / columns
    if ((x - 0.3) / 0.22) ** 2 + ((y - 0.4) / 0.33) ** 2 > 1 and ((x - 0.75) / 0.18) ** 2 + ((y - 0.6) / 0.33) ** 2 > 1:
        return -1
    across, down = REGION[2] // BLOCK_PX, REGION[3] // BLOCK_PX
    return row % down * across + column % across


@cache
def compressed(kinds: tuple[tuple[int, ...], ...], shrink: int) -> bytes:
    side = BLOCK_PX // shrink
    picture = np.vstack([np.hstack([small_block(kind, side) for kind in row]) for row in kinds])
    done, encoded = cv2.imencode(".jpg", picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])
    assert done
    return encoded.tobytes()


@cache
def small_block(kind: int, side: int) -> np.ndarray:
    block_HW3 = glass_block() if kind < 0 else tissue_blocks()[0][kind]
    return block_HW3 if side == BLOCK_PX else cv2.resize(block_HW3, (side, side), interpolation=cv2.INTER_AREA)


@cache
def glass_block() -> np.ndarray:
    grain = np.random.default_rng(0).normal(0, 1.5, (BLOCK_PX, BLOCK_PX, 1))
    return np.clip(np.array([243, 242, 245]) + grain, 0, 255).astype(np.uint8)


@cache
def tissue_blocks() -> tuple[list[np.ndarray], str]:
    """Blocks of tissue, RGB, row by row, and where they come from."""
    left, top, width, height = REGION
    real = SHARED / "data" / "wsi" / "CMU-1-Small-Region.svs"
    if real.exists():
        with openslide.OpenSlide(real) as slide:
            region_HW3 = np.asarray(slide.read_region((left, top), 0, (width, height)).convert("RGB"))
        source = f"{width} x {height} px of {real.name}, repeated"
    else:
        region_HW3, source = painted_tissue(width, height), "painted"
    steps_y, steps_x = range(0, height, BLOCK_PX), range(0, width, BLOCK_PX)
    return [region_HW3[y : y + BLOCK_PX, x : x + BLOCK_PX] for y in steps_y for x in steps_x], source


def painted_tissue(width: int, height: int) -> np.ndarray:
    """Eosin with nuclei of about 8 px and texture of several sizes, so that JPEG has as much to do as with tissue."""
    rng = np.random.default_rng(0)
    texture_HW1 = sum(
        cv2.resize(rng.normal(0, 8, (height // s, width // s)), (width, height))[:, :, None] for s in (1, 4, 16)
    )
    nuclei_HW1 = cv2.resize((rng.random((height // 8, width // 8)) < 0.2).astype(float), (width, height))[:, :, None]
    image_HW3 = np.array([222, 134, 172]) * (1 - nuclei_HW1) + np.array([118, 72, 148]) * nuclei_HW1 + texture_HW1
    return np.clip(image_HW3, 0, 255).astype(np.uint8)


# --- encoders and runs -----------------------------------------------------------------------------------------------


class NoEncoder(torch.nn.Module):
    """As good as nothing: 768 means of the normalised pixels."""

    def forward(self, x_N3HW: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x_N3HW, 16).flatten(1)


def no_encoder() -> FrozenEncoder:
    spec = EncoderSpec("none", "none", "", dim=768, licence="none", mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return FrozenEncoder(spec, NoEncoder(), "made here", "", device=torch.device("cpu"))


class Watched:
    """Notes when an encoder began and ended each batch."""

    def __init__(self, encoder: FrozenEncoder):
        self.encoder, self.times = encoder, []
        self._encode, encoder.encode = encoder.encode, self._timed  # type: ignore[method-assign]

    def _timed(self, tiles_NHW3):
        began = time.monotonic()
        features_ND = self._encode(tiles_NHW3)
        self.times.append((began, time.monotonic()))
        return features_ND

    @property
    def longest_gap_s(self) -> float:
        return max(b[0] - a[1] for a, b in zip(self.times, self.times[1:], strict=False))

    @property
    def median_batch_s(self) -> float:
        return median(end - began for began, end in self.times)


def extract(encoder: FrozenEncoder, slides: list[SlideFile], out: Path, **options) -> Summary:
    """What `python -m extract.run` does with these slides, with an encoder that is loaded already."""
    config = ExtractConfig.model_validate({"features": {"folder": out}, "extract": options})
    loaded, extraction.load_encoder = extraction.load_encoder, lambda section: encoder
    try:
        summary = extract_cohort(config, slides, progress=False)
    finally:
        extraction.load_encoder = loaded
    assert not summary.failed, summary.failed
    return summary


def alone(encoder: FrozenEncoder, n_tiles: int, batch: int) -> float:
    """Tiles per second of an encoder on tiles in memory."""
    tiles_NHW3 = torch.randint(0, 256, (batch, *(encoder.spec.tile_px,) * 2, 3), dtype=torch.uint8)
    encoder.encode(tiles_NHW3)
    n_batches = max(1, round(n_tiles / batch))
    began = time.perf_counter()
    for _ in range(n_batches):
        encoder.encode(tiles_NHW3)
    return n_batches * batch / (time.perf_counter() - began)


# --- reading ---------------------------------------------------------------------------------------------------------


def reading(folder: Path, rounds: int, side: int) -> None:
    """Tiles per second, read, resized and normalised, ready for an encoder; no start-up, no search for tissue."""
    path = make_slide(folder / "slide.tiff", side)
    print(f"## Reading: {side + 256:,} x {side:,} px, tiles of {TILE_PX} px at 0.5 microns per pixel, normalised\n")
    print(
        "| slide's mpp | way | tiles | median tiles/s | all | CPU, ms a tile |\n| --- | --- | --- | --- | --- | --- |"
    )
    lines = []
    for mpp in (0.5, 0.25):
        file = SlideFile("slide", path, mpp)
        readers = {
            "ours, 2 workers": ("fast", "area"),
            "ours, slides.reader=openslide": ("openslide", "area"),
            "ours, tiles.resample=decoder": ("fast", "decoder"),
        }
        pools = [
            ReaderPool(Settings(TILE_PX, 0.5, Tissue(), Tiles(resample=resample), how=how), 2, 4)
            for how, resample in readers.values()
        ]
        planned, *_ = plans = [first_result(pool, file) for pool in pools]
        ways: dict[str, Callable[[], int]] = {
            **{
                way: lambda f=file, p=pool, q=plan: read_by_pool(p, f, q)
                for way, pool, plan in zip(readers, pools, plans, strict=True)
            },
            "loop of read_region": lambda q=planned: count(loop(path, q)),
            "DeepZoomGenerator": lambda q=planned: count(deep_zoom(path, q)),
            "loop in a DataLoader, 2 workers": lambda q=planned: in_data_loader(path, q),
        }
        if find_spec("fastslide"):
            ways["fastslide, 2 threads"] = lambda q=planned: with_fastslide(path, q)
        rates: dict[str, list[float]] = {way: [] for way in ways}
        costs_ms: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, read in ways.items():
                began, cpu_before = time.perf_counter(), cpu_s()
                n_tiles = read()
                rates[way].append(n_tiles / (time.perf_counter() - began))
                costs_ms[way].append(1000 * (cpu_s() - cpu_before) / n_tiles)
        for pool in pools:
            pool.close()
        for way, values in rates.items():
            shown = f"{median(values):.0f} | {listed(values)} | {median(costs_ms[way]):.2f}"
            print(f"| {mpp} | {way} | {len(planned.plan):,} | {shown} |")
        middle = [median(values) for values in rates.values()]
        (ours, ours_openslide, _, *others, loader), rest = middle[:6], middle[6:]
        lines.append(
            f"At {mpp}: {ours / ours_openslide:.2f} times through OpenSlide, {ours / max(others):.2f} times the better "
            f"single loop, {ours / loader:.2f} times the DataLoader"
            + "".join(f", {ours / other:.2f} times fastslide" for other in rest)
            + "."
        )
        lines += [f"At {mpp}: {what}" for what in differences(file, plans)]
    print("\n" + "\n".join(lines))
    print("CPU: of all processes together; on a machine that others use as well it is what can be compared.\n")


def differences(file: SlideFile, plans: list[Planned]) -> list[str]:
    """How far tiles read otherwise lie from those through OpenSlide, over 100 of them."""
    with open_slide(file.path, file.mpp) as fast, open_slide(file.path, file.mpp, how="openslide") as truth:
        ours, openslide_plan, decoder = (planned.plan for planned in plans)
        indices = np.linspace(0, len(ours) - 1, 100).astype(int).tolist()
        ways = {"JPEG blocks": (fast, ours), "tiles.resample=decoder": (fast, decoder)}
        said = []
        for way, (slide, plan) in ways.items():
            gaps = [read_tile(slide, plan, i).astype(int) - read_tile(truth, openslide_plan, i) for i in indices]
            levels = np.abs(np.stack(gaps))
            said.append(
                f"{way} against OpenSlide: {levels.mean():.3f} of 255 levels on average, {levels.max()} at most."
            )
    return said


def cpu_s() -> float:
    """Of this process and its children, those that have ended too."""
    alive = sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children())
    return sum(os.times()[:4]) + alive


def first_result(pool: ReaderPool, file: SlideFile) -> Planned:
    pool.submit(PlanTask(file))
    while True:
        for _, result in pool.results():
            assert isinstance(result, Planned), result
            return result


def read_by_pool(pool: ReaderPool, file: SlideFile, planned: Planned) -> int:
    """As `extract.extraction.work` does it: regions through shared memory into batches, normalised once a batch."""
    encoder, regions = no_encoder(), deque(planned.regions)
    batch_NHW3 = torch.empty(BATCH, TILE_PX, TILE_PX, 3, dtype=torch.uint8)
    floats_NHW3 = torch.empty(BATCH, TILE_PX, TILE_PX, 3)
    n, n_tiles = 0, 0
    while regions or pool.busy:
        while regions and pool.room:
            pool.submit(read_task(file, planned.plan, regions.popleft()))
        for _, result in pool.results():
            assert isinstance(result, TilesRead)
            tiles_KHW3, n_tiles = result.tiles_KHW3, n_tiles + len(result.tiles_KHW3)
            while len(tiles_KHW3):
                here = min(BATCH - n, len(tiles_KHW3))
                batch_NHW3.numpy()[n : n + here] = tiles_KHW3[:here]
                tiles_KHW3, n = tiles_KHW3[here:], n + here
                if n == BATCH:
                    encoder.prepare(batch_NHW3, floats_NHW3)
                    n = 0
            if regions and pool.room:
                pool.submit(read_task(file, planned.plan, regions.popleft()))
    encoder.prepare(batch_NHW3[:n], floats_NHW3[:n])
    return n_tiles


NORMALISE = transforms.Compose(
    [
        transforms.ToImage(),
        transforms.ToDtype(torch.float32, scale=True),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
)


def loop_tile(slide: openslide.OpenSlide, planned: Planned, index: int) -> torch.Tensor:
    plan = planned.plan
    x, y = plan.coords_N2[index].tolist()
    picture = slide.read_region((x, y), plan.level, (plan.read_px, plan.read_px)).convert("RGB")
    if plan.read_px != TILE_PX:
        picture = picture.resize((TILE_PX, TILE_PX), Image.Resampling.BILINEAR)
    return NORMALISE(picture)


def loop(path: Path, planned: Planned) -> Iterator[torch.Tensor]:
    with openslide.OpenSlide(path) as slide:
        for index in range(len(planned.plan)):
            yield loop_tile(slide, planned, index)


def deep_zoom(path: Path, planned: Planned) -> Iterator[torch.Tensor]:
    with openslide.OpenSlide(path) as slide:
        zoom = DeepZoomGenerator(slide, tile_size=TILE_PX, overlap=0, limit_bounds=False)
        level = zoom.level_count - 1 - round(np.log2(planned.plan.tile_level0_px / TILE_PX))
        for column, row in (planned.plan.level_coords_N2 // planned.plan.stride_px).tolist():
            yield NORMALISE(zoom.get_tile(level, (column, row)).convert("RGB"))


class LoopDataset(torch.utils.data.Dataset):
    """The loop as people put it into a DataLoader."""

    def __init__(self, path: Path, planned: Planned):
        self.path, self.planned, self.slide = path, planned, None

    def __len__(self) -> int:
        return len(self.planned.plan)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.slide is None:
            self.slide = openslide.OpenSlide(self.path)
        return loop_tile(self.slide, self.planned, index)


def in_data_loader(path: Path, planned: Planned) -> int:
    loader = torch.utils.data.DataLoader(LoopDataset(path, planned), batch_size=BATCH, num_workers=2)
    return sum(len(batch_N3HW) for batch_N3HW in loader)


def with_fastslide(path: Path, planned: Planned) -> int:
    """Regions of our plan by fastslide (pip install fastslide) in two threads, shrunk and normalised as ours are."""
    import fastslide

    encoder, plan = no_encoder(), planned.plan
    slide = fastslide.FastSlide.from_file_path(str(path))

    def read(region: Region) -> np.ndarray:
        place, size = (region.x_px, region.y_px), (region.width_px, region.height_px)
        pixels_HW3 = np.asarray(slide.read_region(place, plan.level, size).numpy())[:, :, :3]
        tiles = []
        for x, y in (plan.level_coords_N2[region.indices_K] - place).tolist():
            cut_HW3 = np.ascontiguousarray(pixels_HW3[y : y + plan.read_px, x : x + plan.read_px])
            whole = plan.read_px == TILE_PX
            tiles.append(cut_HW3 if whole else cv2.resize(cut_HW3, (TILE_PX, TILE_PX), interpolation=cv2.INTER_AREA))
        return np.stack(tiles)

    n_tiles = 0
    with ThreadPoolExecutor(2) as threads:
        for tiles_KHW3 in threads.map(read, planned.regions):
            encoder.prepare(torch.from_numpy(tiles_KHW3))
            n_tiles += len(tiles_KHW3)
    return n_tiles


def count(tiles: Iterator[torch.Tensor]) -> int:
    """Through all of them, collated into batches as an encoder wants them."""
    n_tiles, batch = 0, []
    for tile in tiles:
        batch.append(tile)
        if len(batch) == BATCH:
            n_tiles += len(torch.stack(batch))
            batch = []
    return n_tiles + len(batch)


# --- with an encoder -------------------------------------------------------------------------------------------------


def vit(folder: Path, rounds: int, side: int) -> None:
    """ViT-B/16, which is Phikon's network, on the CPU."""
    encoder = load_encoder(Encoder(name="timm:vit_base_patch16_224", random_weights=True, device="cpu"))
    slide = SlideFile("slide", make_slide(folder / "slide.tiff", min(side, 5120)))
    by_itself, whole = [], []
    for number in range(rounds):
        summary = extract(encoder, [slide], folder / f"out{number}")
        whole.append(summary.tiles / summary.seconds)
        by_itself.append(alone(encoder, summary.tiles, batches.CPU_BATCH))
    ratio = median(whole) / median(by_itself)
    print(f"## ViT-B/16 in float32 on the CPU, {summary.tiles} tiles\n")
    print("| | median tiles/s | all |\n| --- | --- | --- |")
    print(f"| encoder alone, tiles in memory | {median(by_itself):.2f} | {listed(by_itself, 2)} |")
    print(f"| extraction, from starting the readers to the last file | {median(whole):.2f} | {listed(whole, 2)} |")
    print(
        f"\nRatio {ratio:.3f}; the encoder was busy {summary.encoder_busy:.1%} of the time between its first and last "
        "batch.\n"
    )


def small(folder: Path, rounds: int, side: int) -> None:
    """ResNet-18 over eight slides: what happens between two slides."""
    encoder = load_encoder(Encoder(name="timm:resnet18", random_weights=True, device="cpu"))
    watched = Watched(encoder)
    slides = [SlideFile(f"s{i}", make_slide(folder / f"s{i}.tiff", min(side, 4096))) for i in range(8)]
    print("## ResNet-18 on the CPU over 8 slides\n")
    print(
        "| tiles | extraction, tiles/s | encoder alone, tiles/s | encoder busy | median batch, ms | "
        "longest gap between batches, ms |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for number in range(rounds):
        watched.times.clear()
        summary = extract(encoder, slides, folder / f"out{number}")
        assert len(summary.done) == 8
        gap, batch = watched.longest_gap_s * 1000, watched.median_batch_s * 1000
        by_itself = alone(encoder, summary.tiles // 4, batches.CPU_BATCH)
        rate = summary.tiles / summary.seconds
        print(
            f"| {summary.tiles} | {rate:.0f} | {by_itself:.0f} | {summary.encoder_busy:.1%} | {batch:.0f} | {gap:.0f} |"
        )
    print("\nBusy: share of the time between the first batch and the last in which the encoder worked.\n")


def memory(folder: Path, rounds: int, side: int) -> None:
    """Peak memory of a whole extraction, main process and readers, each in a process of its own."""
    print("## Peak memory of extraction, no encoder, 2 readers\n")
    print(
        "| slide, px a side | tiles | main process, MB | readers, MB | together, MB |\n| --- | --- | --- | --- | --- |"
    )
    together = []
    for size in (side // 2 // 512 * 512, side * 2):
        path = make_slide(folder / f"{size}.tiff", size)
        command = [sys.executable, __file__, "memory-child", str(path)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        tiles, own, readers = (float(value) for value in printed.split())
        together.append(own + readers)
        print(f"| {size:,} | {tiles:,.0f} | {own:.0f} | {readers:.0f} | {own + readers:.0f} |")
        path.unlink()
    print(f"\nRatio {together[1] / together[0]:.3f}. Shared pages count in every process that has touched them.\n")


def memory_child(path: Path) -> None:
    peaks: dict[int, float] = {}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            for child in psutil.Process().children():
                peaks[child.pid] = max(peaks.get(child.pid, 0), peak_mb(child.pid))

    thread = threading.Thread(target=watch)
    thread.start()
    with tempfile.TemporaryDirectory() as out:
        summary = extract(no_encoder(), [SlideFile("slide", path)], Path(out), workers=2)
    over.set()
    thread.join()
    readers = sorted(peaks.values())[-2:]  # multiprocessing's resource tracker is small
    print(summary.tiles, peak_mb(os.getpid()), sum(readers))


def peak_mb(pid: int) -> float:
    """VmHWM: getrusage would count the parent's peak before exec. 0 for a process that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in status if line.startswith("VmHWM")), 0.0)


def gpu(folder: Path, rounds: int, side: int) -> None:
    """Phikon's network in bf16 on a GPU."""
    print("## ViT-B/16 (Phikon's network) in bf16 on a GPU\n")
    if not torch.cuda.is_available():
        print("No GPU here.\n")
        return
    encoder = load_encoder(Encoder(name="timm:vit_base_patch16_224", random_weights=True, device="cuda"))
    slide = SlideFile("slide", make_slide(folder / "slide.tiff", side))
    print(f"{torch.cuda.get_device_name()}\n")
    print("| tiles | extraction, tiles/s | encoder alone, tiles/s | encoder busy |\n| --- | --- | --- | --- |")
    for number in range(rounds):
        summary = extract(encoder, [slide], folder / f"out{number}")
        rate, by_itself = summary.tiles / summary.seconds, alone(encoder, summary.tiles, BATCH)
        print(f"| {summary.tiles} | {rate:.0f} | {by_itself:.0f} | {summary.encoder_busy:.1%} |")
    print(
        "\nWhere the encoder is busy less than nine tenths of the time, reading limits: "
        "more cores and `workers` help.\n"
    )


if __name__ == "__main__":
    main()
