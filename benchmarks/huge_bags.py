"""One bag of many tiles through one training step of every aggregator: peak memory and seconds, a process each.

    python benchmarks/huge_bags.py [--tiles 100000] [--dim 768] [--aggregators abmil ...] [--limit-gb 12]
        [--out FILE.md]

Default widths of every aggregator, float16 features, forward, loss, backward and an Adam step on the CPU, one member.
No tile is left out and no bag is cut, but for HIPT-MIL: TransMIL's and the transformer's attention keep no matrix of
tiles by tiles or by landmarks. In HIPT-MIL every tile looks at every other, which takes time with the square of the
tiles, so it gets 10,000 of them, drawn as data.max_tiles=10000 does afresh for every epoch. Peak memory is the
process's own count (VmHWM), with Python, torch and the features in it. The exit code is 1 if an aggregator needs
more than the limit.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from machine import processor, publish

from mil.aggregators import AGGREGATORS

SUBSAMPLED = {"hipt_mil": 10_000}
"""Tiles that are drawn of the bag, as by data.max_tiles."""


def child(name: str, tiles: int, dim: int) -> None:
    """One training step; prints JSON."""
    import torch

    from mil.aggregators import aggregator_class
    from mil.aggregators.batch import Batch, Group
    from mil.aggregators.threads import a_thread_a_bag
    from mil.training.optim import MemberAdam

    tiles_TD = torch.empty(tiles, dim, dtype=torch.float16)
    generator = torch.Generator().manual_seed(0)
    for part_TD in tiles_TD.split(10_000):
        part_TD.copy_(torch.randn(part_TD.shape, generator=generator))
    n = min(SUBSAMPLED.get(name, tiles), tiles)
    drawn_ND = tiles_TD if n == tiles else tiles_TD[torch.randperm(tiles, generator=generator)[:n].sort().values]
    batch = Batch(
        (Group(drawn_ND, (n,), (0,)),), torch.tensor([1]), torch.tensor([0]), torch.ones(1, 1, dtype=torch.bool)
    )
    aggregator = aggregator_class(name)(dim, 1, [0]).train()
    optimizer = MemberAdam(aggregator.parameters(), torch.tensor([1e-4]), torch.tensor([0.0]))
    began = time.perf_counter()
    with a_thread_a_bag(aggregator):
        loss = aggregator.losses(aggregator(batch), batch.labels_B).sum()
        loss.backward()
    optimizer.step()
    seconds = time.perf_counter() - began
    gradients = [p.grad for p in aggregator.parameters() if p.grad is not None]
    finite = bool(torch.isfinite(loss)) and all(bool(torch.isfinite(g).all()) for g in gradients)
    print(json.dumps({"peak_gb": peak_gb(), "seconds": seconds, "finite": finite, "stored_gb": tiles_TD.nbytes / 1e9}))


def peak_gb() -> float:
    status = Path("/proc/self/status").read_text().splitlines()  # getrusage would count the parent's peak before exec
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024 / 1e9


def measure(name: str, tiles: int, dim: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", name, "--tiles", str(tiles), "--dim", str(dim)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: exit code {done.returncode} (-9: killed, out of memory)\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def shown(name: str, tiles: int) -> str:
    n = SUBSAMPLED.get(name, tiles)
    return f"{name}, {n:,} tiles drawn" if n < tiles else name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--aggregators", nargs="+", default=list(AGGREGATORS), choices=list(AGGREGATORS))
    parser.add_argument("--limit-gb", type=float, default=12.0)
    parser.add_argument("--out", type=Path, help="also write the Markdown here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.tiles, options.dim)
        return 0
    rows, worst = [], 0.0
    for name in options.aggregators:
        found = measure(name, options.tiles, options.dim)
        worst = max(worst, found["peak_gb"])
        finite = "yes" if found["finite"] else "NO"
        rows.append(f"| {shown(name, options.tiles)} | {found['peak_gb']:.2f} | {found['seconds']:.1f} | {finite} |")
        print(rows[-1], file=sys.stderr, flush=True)
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "numpy"))
    text = "\n".join(
        [
            f"## One training step on one bag of {options.tiles:,} x {options.dim} float16, one member",
            "",
            "| aggregator | peak of the process, GB | s | finite |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            f"Largest peak {worst:.2f} GB, limit {options.limit_gb:g} GB.",
            "",
            f"- Command: `python {shlex.join(sys.argv)}`",
            f"- {platform.platform()}, {processor()}, Python {platform.python_version()}, {packages}",
            f"- Date: {time.strftime('%Y-%m-%d')}",
        ]
    )
    publish(text, options.out)
    return int(worst > options.limit_gb)


if __name__ == "__main__":
    sys.exit(main())
