"""The parts of benchmarks/gpu.sh: `python benchmarks/gpu.py PART [device=cuda] [small]`. Each prints Markdown.

machine · right (every aggregator on the GPU against the CPU, and twice with one seed) · protocol (ABMIL's nested
protocol) · train (an epoch of one fold, five folds, 100 nested members, ragged bags) · torchmil (one fold beside it) ·
precision (AUC and probabilities of bf16-mixed and tf32 against float32) · encode (ViT-B/16, ViT-L/16 alone) · slide
(from a slide to features). Features are made, shaped like owkin/camelyon16-features: 269 slides of 1,000 x 768 float16.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from machine import machine
from torch.utils.flop_counter import FlopCounterMode

from mil.aggregators import AGGREGATORS, aggregator_class
from mil.aggregators.batch import pack
from mil.config import Train
from mil.training.bags import Bags, TrainingSteps
from mil.training.counting import Counted
from mil.training.device import DeviceFeatures, block_of, device_features
from mil.training.measuring import step_alone
from mil.training.module import Members, MembersModule, fit, predict_logits

PEAKS = {"H200": (989, 495), "H100": (989, 495), "A100": (312, 156), "L40S": (362, 183), "4090": (165, 82.6)}
"""TFLOP/s of dense bfloat16 and of TF32, per the vendor's data sheets; the first name found in the device's."""
PRECISIONS = ("32-true", "tf32", "bf16-mixed")


@dataclass(frozen=True)
class Run:
    """Where and how large."""

    device: torch.device
    small: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        return (20, 60, 32) if self.small else (269, 1000, 768)

    @property
    def accelerator(self) -> str:
        return "gpu" if self.device.type == "cuda" else self.device.type

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak(self, precision: str) -> float | None:
        """FLOP/s; None where it is not known."""
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else ""
        found = next((peak for key, peak in PEAKS.items() if key in name), None)
        return None if found is None else found[precision != "bf16-mixed"] * 1e12


def main() -> None:
    arguments = sys.argv[1:]
    device = next((a.removeprefix("device=") for a in arguments if a.startswith("device=")), "cuda")
    PARTS[arguments[0]](Run(torch.device(device), "small" in arguments))


def say(*cells: object) -> None:
    """A row of a table, at once: a part may be over before its table is."""
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def head(title: str, *columns: str) -> None:
    print(f"## {title}\n")
    say(*columns)
    say(*("---" for _ in columns))


@contextmanager
def tried(*cells: object) -> Iterator[None]:
    """One row's failure is a row."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - it is printed, and the others go on
        say(*cells, f"**{type(error).__name__}**: {str(error).splitlines()[0][:150] if str(error) else ''}")


# --- what is trained -------------------------------------------------------------------------------------------------


def made(run: Run, lengths: np.ndarray | None = None, **options) -> tuple[Bags, np.ndarray]:
    """Random bags with a witness in the positive ones, weak enough for errors."""
    n, tiles, dim = run.shape
    lengths = np.full(n, tiles) if lengths is None else lengths
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(int(lengths.sum()), dim, generator=generator).half()
    views, labels = block.split(lengths.tolist()), np.arange(len(lengths)) % 5 < 2
    direction_D = torch.randn(dim, generator=generator).half()
    for i in np.flatnonzero(labels):
        views[i][: max(1, len(views[i]) // 100)] += 0.2 * direction_D
    names = tuple(f"s{i}" for i in range(len(lengths)))
    on_device = "yes" if run.device.type == "cpu" else "auto"  # the GPU's path in a dry run too
    return Bags(names, lengths, dim, "ram", views, on_device=on_device, **options), labels.astype(np.int64)


def members_of(n_members: int, n_slides: int, nested: bool, validate: bool = False) -> Members:
    """Folds; nested: 5 x 5 inner folds x 4 cells, each trains on what both folds leave."""
    outer, inner = np.arange(n_slides) % 5, np.arange(n_slides) // 5 % 5
    rows = np.arange(n_members)
    train_MS = outer[None, :] != (rows % 5)[:, None]
    val_MS = np.zeros_like(train_MS)
    if nested:
        held_MS = train_MS & (inner[None, :] == (rows // 5 % 5)[:, None])
        train_MS, val_MS = train_MS & ~held_MS, held_MS if validate else val_MS
    lr_M = np.where(rows // 25 % 2, 1e-4, 1e-3)
    return Members(lr_M, np.where(rows // 50 % 2, 1e-4, 0.0), train_MS, val_MS)


def module_of(run: Run, name: str, bags: Bags, labels: np.ndarray, members: Members, epochs: int, precision: str):
    aggregator = aggregator_class(name)(bags.dim, 1, list(range(len(members))))
    settings = Train(epochs=epochs, accelerator=run.accelerator, precision=precision)
    return MembersModule(aggregator, bags, labels, 2, members, settings)


class Epochs:
    """Seconds of each epoch of a module: `fit` with a clock, the device waited for where an epoch begins."""

    def __init__(self, run: Run, module: MembersModule):
        ticks: list[float] = []
        begin = module.on_train_epoch_start

        def timed() -> None:
            begin()
            run.wait()
            ticks.append(time.perf_counter())

        module.on_train_epoch_start = timed  # type: ignore[method-assign]
        fit(module, progress=False)
        run.wait()
        ticks.append(time.perf_counter())
        self.seconds = np.diff(ticks)
        self.median = float(np.median(self.seconds[1:] if len(self.seconds) > 1 else self.seconds))


def first_step(run: Run, module: MembersModule) -> tuple[float, int, int]:
    """FLOPs, operations and copies to the device of a training step, counted in the first two of an epoch."""
    module.to(run.device)
    there = device_features(module.bags, run.device) or DeviceFeatures(module.bags, run.device, None)
    everyone = np.ones(len(module.members), dtype=bool)
    steps = TrainingSteps(
        module.bags, module.labels_S, module.members.train_MS, 16, 0, lambda: 0, lambda: everyone, there=there
    )
    step, batches = step_alone(module), iter(steps)
    step(next(batches))
    counted, flops = Counted(run.device), FlopCounterMode(display=False)
    batch = next(batches, None) or next(iter(steps))
    with flops:
        step(batch)
    with counted:
        step(batch)
    tiles = sum(len(g.tiles_TD) * (len(g.members) if g.members else len(everyone)) for g in batch.groups)
    return flops.get_total_flops() / tiles, counted.launches, sum(counted.waits.values())


# --- parts -----------------------------------------------------------------------------------------------------------


def which(run: Run) -> None:
    print(f"# {'A dry run of the script: these numbers mean nothing' if run.small else 'GPU'}\n")
    print(machine("torch", "lightning", "numpy", device=run.device) + "\n")
    peak = run.peak("bf16-mixed")
    print(f"Peak: {peak / 1e12:.0f} TFLOP/s bfloat16 dense\n" if peak else "Peak: not known, so shares of it are `?`\n")


def right(run: Run) -> None:
    """Against the CPU in float32, and twice with one seed in training mode: the same bits?"""
    columns = (
        "aggregator",
        "logits, largest difference",
        "gradients, largest difference / largest gradient",
        "same bits twice",
    )
    head("Every aggregator on the device against the CPU", *columns)
    lengths = (5, 300, 77, 1200) if not run.small else (5, 30, 7, 12)
    bags_of = [torch.randn(n, 64, generator=torch.Generator().manual_seed(n)) for n in lengths]
    block = Bags(tuple("abcd"), np.array(lengths), 64, "ram", torch.cat(bags_of).split(list(lengths)))
    there = DeviceFeatures(block, run.device, block_of(block, run.device))
    labels, uses = np.array([0, 1, 0, 1]), np.ones((3, 4), dtype=bool)
    torch.use_deterministic_algorithms(True, warn_only=True)
    for name in AGGREGATORS:
        with tried(name):
            found = []
            for where in ("cpu", "device", "device"):
                torch.manual_seed(0)
                model = aggregator_class(name)(64, 1, [1, 2, 3])
                batch = pack(bags_of, 3, labels.tolist())
                if where == "device":
                    model, batch = model.to(run.device), there.batch([0, 1, 2, 3], labels, uses)
                loss = model.losses(model(batch), batch.labels).sum()
                loss.backward()
                logits = model.eval()(batch).logits_MBC
                found.append((logits.cpu(), [p.grad.cpu() for p in model.parameters() if p.grad is not None]))
            (a, ga), (b, gb), (c, gc) = found
            largest = max(x.abs().max() for x in ga)
            worst = max(((x - y).abs().max() / largest).item() for x, y in zip(ga, gb, strict=True))
            same = torch.equal(b, c) and all(torch.equal(x, y) for x, y in zip(gb, gc, strict=True))
            say(name, f"{(a - b).abs().max().item():.1e}", f"{worst:.1e}", "yes" if same else "**no**")
    print()


def protocol(run: Run) -> None:
    """The Phikon paper's: 100 inner members with validation every epoch, then five refits and their predictions."""
    epochs = 2 if run.small else 50
    head(
        "ABMIL's nested protocol, 105 fits",
        "precision",
        f"inner, {epochs} epochs, s",
        "refits, s",
        "all, s",
        "at most 30 s",
    )
    bags, labels = made(run)
    for precision in ("bf16-mixed", "tf32", "32-true"):
        with tried(precision):
            began = time.perf_counter()
            inner = members_of(100, len(bags), nested=True, validate=True)
            fit(module_of(run, "abmil", bags, labels, inner, epochs, precision), progress=False)
            middle = time.perf_counter()
            outer = module_of(run, "abmil", bags, labels, members_of(5, len(bags), nested=False), epochs, precision)
            fit(outer, progress=False)
            predict_logits(outer, list(range(len(bags))))
            ended = time.perf_counter()
            whole = ended - began
            say(
                precision,
                f"{middle - began:.1f}",
                f"{ended - middle:.1f}",
                f"{whole:.1f}",
                "yes" if whole <= 30 else "no",
            )
    print()


def train(run: Run) -> None:
    columns = ("aggregator", "members", "bags", "precision", "s/epoch", "million tiles x members/s", "share of peak")
    head("Training", *columns, "peak GB", "operations a step", "waits in a step")
    n, tiles, _ = run.shape
    rng = np.random.default_rng(0)
    ragged = np.clip(rng.lognormal(np.log(1.5 * tiles), 1.0, n), 5, 10 * tiles).astype(np.int64)
    equal_bags, ragged_bags = made(run), made(run, ragged)
    plan = [(name, 1, False, p) for name in ("abmil", "chowder", "mean", "transmil") for p in ("32-true", "bf16-mixed")]
    plan += [(name, 100, True, "bf16-mixed") for name in ("abmil", "chowder", "mean")]
    plan += [("abmil", 5, False, "bf16-mixed"), ("transmil", 5, False, "bf16-mixed")]
    for kind, (bags, labels) in (("equal", equal_bags), ("ragged", ragged_bags)):
        for name, n_members, nested, precision in plan if kind == "equal" else plan[1:6:2] + plan[-2:-1]:
            members = members_of(n_members, n, nested)
            cells = (name, f"{n_members}{' nested' if nested else ''}", kind, precision)
            with tried(*cells):
                flops, launches, waits = first_step(run, module_of(run, name, bags, labels, members, 1, precision))
                if run.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                second = Epochs(run, module_of(run, name, bags, labels, members, 4, precision)).median
                taken = torch.cuda.max_memory_allocated() / 1e9 if run.device.type == "cuda" else float("nan")
                work = float((members.train_MS * bags.lengths_S).sum())
                peak = run.peak(precision)
                share = f"{work * flops / second / peak:.0%}" if peak else "?"
                say(*cells, f"{second:.3f}", f"{work / second / 1e6:.1f}", share, f"{taken:.1f}", launches, waits)
    print(
        "\nOperations: of torch, about one kernel each. Waits: what asks the device for a value, or copies and waits.\n"
    )


def torchmil(run: Run) -> None:
    head("One fold and epoch of ABMIL beside torchmil", "tool", "s/epoch", "ratio")
    try:
        from tensordict import TensorDict
        from torchmil.data import collate_fn
        from torchmil.models import ABMIL
        from torchmil.utils import Trainer
    except ImportError as error:
        print(f"\nSkipped: {error} (pip install torchmil)\n")
        return
    bags, labels = made(run)
    ours = Epochs(
        run, module_of(run, "abmil", bags, labels, members_of(1, len(bags), nested=False), 6, "32-true")
    ).median
    say("ours, float32", f"{ours:.3f}", "")
    fold = members_of(1, len(bags), nested=False).train_MS[0]
    data = [
        TensorDict({"X": bags.features(int(i)).float(), "Y": torch.tensor(labels[i])}) for i in np.flatnonzero(fold)
    ]
    model = ABMIL(in_shape=(bags.dim,), att_dim=128, gated=True, feat_ext=torch.nn.Linear(bags.dim, 128)).to(run.device)
    loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True, collate_fn=collate_fn)
    validation = torch.utils.data.DataLoader(data[:1], batch_size=16, collate_fn=collate_fn)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    trainer = Trainer(model, optimizer, device=str(run.device), verbose=False, disable_pbar=True)
    trainer.train(1, loader, validation)
    run.wait()
    began = time.perf_counter()
    trainer.train(3, loader, validation)
    run.wait()
    theirs = (time.perf_counter() - began) / 3
    say("torchmil, float32, bags in host memory", f"{theirs:.3f}", f"{theirs / ours:.1f} x (wanted: 20 x)")
    print()


def precision_part(run: Run) -> None:
    from precision import table

    table(run.device, run.accelerator, seeds=2 if run.small else 5, small=run.small)


def encode(run: Run) -> None:
    from extract.config import Encoder
    from extract.encoders.frozen import load_encoder
    from extract.extraction.batches import probed_size

    columns = ("network", "compiled", "batch (probed)", "tiles/s", "TFLOP/s", "share of peak", "first batch, s")
    head("Encoders alone, bf16, tiles in pinned memory, two batches in flight", *columns)
    networks = {"vit_base_patch16_224": 35.2, "vit_large_patch16_224": 123.2}  # GFLOP a tile, a multiply-add is two
    for network, gflop in networks.items() if not run.small else {"vit_tiny_patch16_224": 2.5}.items():
        for compiled in (False, True) if not run.small else (False,):
            with tried(network, compiled):
                section = Encoder(
                    name=f"timm:{network}",
                    random_weights=True,
                    device=str(run.device),
                    compile=compiled,
                    precision="bf16",
                )
                encoder = load_encoder(section)
                batch = probed_size(encoder) if not run.small else 4
                tiles = torch.randint(0, 256, (batch, 224, 224, 3), dtype=torch.uint8)
                tiles = tiles.pin_memory() if run.device.type == "cuda" else tiles
                began = time.perf_counter()
                encoder.encode(tiles)
                first = time.perf_counter() - began
                rate = rate_of(lambda t=tiles, e=encoder: e.begin(t), batch, 4.0 if not run.small else 0.2)
                peak = run.peak("bf16-mixed")
                share = f"{rate * gflop * 1e9 / peak:.0%}" if peak else "?"
                say(network, compiled, batch, f"{rate:,.0f}", f"{rate * gflop / 1e3:.1f}", share, f"{first:.1f}")
    print("\nWanted: ViT-B/16 compiled at 55 % of an H100's 989 TFLOP/s, which is 15,500 tiles/s.\n")


def rate_of(begin: Callable[[], Callable[[], torch.Tensor]], batch: int, seconds: float) -> float:
    """Tiles a second with two batches in flight."""
    waiting, done, began = [begin(), begin()], 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        waiting.append(begin())
        waiting.pop(0)()
        done += 1
    return done * batch / (time.perf_counter() - began)


def slide(run: Run) -> None:
    from extraction import extract, make_slide

    from extract.config import Encoder
    from extract.encoders.frozen import load_encoder
    from extract.extraction.readers import SlideFile
    from extract.run import busy_line

    head("From slides at 0.25 microns per pixel to features", "network", "workers", "tiles", "tiles/s", "what limits")
    side = 1024 if run.small else 20_480
    with tempfile.TemporaryDirectory() as folder:
        slides = [
            SlideFile(f"s{i}", make_slide(Path(folder) / f"s{i}.tiff", side, 0.25)) for i in range(1 + (not run.small))
        ]
        for network in (
            ("vit_base_patch16_224", "vit_large_patch16_224") if not run.small else ("vit_tiny_patch16_224",)
        ):
            for workers in (8, 15) if not run.small else (1,):
                with tried(network, workers):
                    name = f"timm:{network}"
                    precision = "bf16" if run.device.type == "cuda" else "float32"
                    section = Encoder(name=name, random_weights=True, device=str(run.device), precision=precision)
                    out = Path(folder) / f"{network}{workers}"
                    summary = extract(load_encoder(section), slides, out, workers=workers)
                    rate = summary.tiles / summary.seconds
                    say(network, workers, f"{summary.tiles:,}", f"{rate:,.0f}", busy_line(summary))
    print()


PARTS = {
    "machine": which,
    "right": right,
    "protocol": protocol,
    "train": train,
    "torchmil": torchmil,
    "precision": precision_part,
    "encode": encode,
    "slide": slide,
}

if __name__ == "__main__":
    main()
