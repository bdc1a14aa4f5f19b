"""Speed and memory of the viewer: a run of 20,000 slides, one of them real enough: 40,000 tiles, three levels.

    python benchmarks/view.py [slides=20000] [tiles=40000] [members=5] [rounds=5] [out=FILE.md]

The server is a process of its own; what is timed is asked for over HTTP, and, where chromium and playwright are there,
by a browser. Features of the one slide, its file and untrained members are made as in heatmap.py. Prints Markdown.
"""

from __future__ import annotations

import http.client
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import psutil
from heatmap import CLASSES, Theatre, make_theatre
from machine import machine, publish

from mil.look.tilescores import Verdicts

MS = 1000


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    n_slides, n_tiles = int(given.get("slides", 20_000)), int(given.get("tiles", 40_000))
    n_members, rounds = int(given.get("members", 5)), int(given.get("rounds", 5))
    out = Path(given["out"]) if "out" in given else None
    with tempfile.TemporaryDirectory() as folder:
        theatre = make_theatre(Path(folder), n_tiles, n_members, "abmil")
        path = Path(folder) / "predictions.csv"
        table = many(pd.read_csv(path, dtype={"patient": str}), n_slides)
        table.to_csv(path, index=False)
        roles = table[["slide", "patient", "label", "split"]].drop_duplicates("slide")
        theatre = replace(theatre, verdicts=Verdicts(replace(theatre.trained, roles=roles)))
        fresh = multiprocessing.get_context("spawn")  # its memory is the server's, not that of what made the slide
        addresses: multiprocessing.Queue[tuple[str, float, list[float]]] = fresh.Queue()
        server = fresh.Process(target=serve, args=(pickle.dumps(theatre), addresses), daemon=True)
        server.start()
        while addresses.empty():
            server.join(0.1)
            if server.exitcode is not None:
                raise SystemExit("the server ended before it served")
        url, seconds, memory = addresses.get()
        rows = measured(url, psutil.Process(server.pid), rounds, memory)
        rows += in_browser(url, rounds)
        server.terminate()
        server.join()
    arguments_shown = [argument for argument in sys.argv[1:] if not argument.startswith("out=")]
    command = f"Command: `{' '.join(['python benchmarks/view.py', *arguments_shown])}`"
    head = [
        "# The viewer on two CPU cores",
        command,
        machine("starlette", "uvicorn", "openslide-python", "torch", "numpy"),
        f"{n_slides:,} slides in the list; one slide of {n_tiles:,} tiles x 768, ABMIL, {n_members} members. "
        f"Before the first answer, once: {seconds:.1f} s (predictions.csv read back, slides.csv computed). The machine "
        f"did other work as well: load average {os.getloadavg()[1]:.1f} in the last five minutes; what was taken on "
        "the clock is longer for that, processor time is not.",
    ]
    head.append(
        "Memory beyond the libraries and the list is bounded: bytes that are kept (`memory_mb`, 512), eight handles of "
        "slides of some 30 MB, and one slide's scores at a time (here 60 MB of half floats, which become floats, and "
        "activations of a member), whose memory the allocator may keep for the next."
    )
    table = ["| what | median | all |", "|---|---|---|", *rows]
    publish("\n\n".join([*head, "\n".join(table)]), out)


# --- the server ------------------------------------------------------------------------------------------------------


def serve(pickled: bytes, addresses: multiprocessing.Queue[tuple[str, float, list[float]]]) -> None:
    """A run of many slides, of which the first has a file and features; says its address and how long opening took."""
    from mil.viewer.config import ViewConfig
    from mil.viewer.serving import make_server
    from mil.viewer.shown import Exhibit, Shown, table_of

    theatre: Theatre = pickle.loads(pickled)  # noqa: S301  # our own; multiprocessing itself would share tensors as files
    libraries = psutil.Process().memory_info().rss / 1e6
    began = time.perf_counter()
    exhibit = Exhibit("benchmark", theatre.trained, theatre.features)
    config = ViewConfig()
    files: dict[str, tuple[Path, float | None]] = dict(theatre.files)
    grid: dict[str, Any] = {"tissue": config.tissue, "tiles": config.tiles, "tile_px": 224, "tile_mpp": 0.5}
    shown = Shown((exhibit,), table_of([exhibit]), files, **grid, default_mpp=None, reviews=None, regions=None)
    serving = make_server(shown, config)
    opened = psutil.Process().memory_info().rss / 1e6
    serving.pages.warm_up = lambda: None  # type: ignore[method-assign]  # what it makes is what is measured
    addresses.put((serving.url, time.perf_counter() - began, [libraries, opened]))
    serving.run()


def many(one: pd.DataFrame, n_slides: int) -> pd.DataFrame:
    """The predictions of one slide, which one member held out, and random ones of many others."""
    rng = np.random.default_rng(0)
    n_members = len(one)
    rest = pd.DataFrame({name: np.tile(one[name].to_numpy(), n_slides - 1) for name in one.columns})
    number = np.repeat(np.arange(1, n_slides), n_members)
    logits = rng.normal(size=len(rest)) + np.repeat(rng.normal(size=n_slides - 1), n_members)
    names = [f"slide_{i:05d}" for i in range(n_slides)]
    rest = rest.assign(slide=[names[i] for i in number], patient=[f"p{i // 2:05d}" for i in number])
    rest = rest.assign(label=[CLASSES[i % 2] for i in number], logit_0=logits, p_1=1 / (1 + np.exp(-logits)))
    one = one.assign(split="train", role=["test", *["train"] * (n_members - 1)])
    return pd.concat([one, rest.assign(p_0=1 - rest["p_1"])], ignore_index=True)


# --- what is measured ------------------------------------------------------------------------------------------------


class Asker:
    """One connection that stays open, as a browser's does."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        self.root = parts.path
        self.connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)

    def __call__(self, path: str) -> bytes:
        self.connection.request("GET", self.root + path)
        answer = self.connection.getresponse()
        content = answer.read()
        assert answer.status == 200, (path, answer.status, content[:200])
        return content


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return (time.perf_counter() - began) * MS


def row(what: str, values: list[float], unit: str = "ms") -> str:
    digits = 0 if unit == "MB" or median(values) >= 100 else 1
    return f"| {what} | {median(values):,.{digits}f} {unit} | {', '.join(f'{v:,.{digits}f}' for v in values)} |"


def measured(url: str, process: psutil.Process, rounds: int, memory: list[float]) -> list[str]:
    """Over HTTP: the list, tiles, scores, ten viewers, memory."""
    import json

    ask = Asker(url)
    rows = [row("list of all slides (JSON)", [timed(lambda: ask("catalogue.json")) for _ in range(rounds)])]
    number = json.loads(ask("catalogue.json"))["slides"]["name"].index("slide")
    rows.append(row("slide opened, sizes of its levels", [timed(lambda: ask(f"slide/{number}.json"))]))
    levels = json.loads(ask(f"slide/{number}.json"))["levels"]
    squares = [
        (column, line)
        for line in range(-(-levels[0]["height"] // 1024))
        for column in range(-(-levels[0]["width"] // 1024))
    ]
    paths = [f"slide/{number}/level/0/{column}_{line}.jpg" for column, line in squares]
    began = processor_ms(process)
    cold = [timed(lambda path=path: ask(path)) for path in paths[: 4 * rounds]]  # type: ignore[misc]  # bound
    taken = (processor_ms(process) - began) / len(cold)
    warm = [timed(lambda path=path: ask(path)) for path in paths[: 4 * rounds]]  # type: ignore[misc]  # bound
    rows += [
        row("tile of 1,024 px of level 0, first time (slide open)", cold[:rounds]),
        row("the same, processor time of the server", [taken]),
        row("the same, asked again", warm[:rounds]),
    ]
    scores = f"study/0/slide/{number}/scores.bin?kind="
    ask(scores + "evidence&only=honest")  # as the server does by itself for the slide that stands first
    for what, only in (("the member that held the slide out", "&only=honest"), ("all members", "")):
        paths_of = [f"{scores}attention{only}{target}" for target in ("", "&target=0", "&target=1")]  # kept apart
        began = processor_ms(process)
        computed = [timed(lambda path=path: ask(path)) for path in paths_of]  # type: ignore[misc]  # bound
        rows += [
            row(f"scores of {what}, first time (computed)", computed),
            row("the same, processor time of the server", [(processor_ms(process) - began) / len(computed)]),
        ]
    rows.append(row("the same, asked again", [timed(lambda: ask(scores + "attention")) for _ in range(rounds)]))
    with ThreadPoolExecutor(10) as people:
        began = processor_ms(process)
        each = list(people.map(lambda _: timed(lambda: Asker(url)(scores + "evidence")), range(10)))
        taken = processor_ms(process) - began
    rows += [
        row("ten viewers ask at once for other scores of it (computed once)", sorted(each)),
        row("the same, processor time of the server", [taken]),
    ]
    rest = paths[4 * rounds :]
    shares = [rest[i::10][:8] for i in range(10)]
    with ThreadPoolExecutor(10) as people:
        each = sorted(chain.from_iterable(people.map(lambda share: viewer(url, share), shares)))
    rows.append(row("ten viewers at once, each 8 new tiles of one slide: a tile", each[:: len(shares)]))
    after = process.memory_info().rss / 1e6
    names = ("its libraries (torch, pandas)", "and the list of slides opened", "and after all this")
    rows += [row(f"memory of the server: {n}", [mb], "MB") for n, mb in zip(names, [*memory, after], strict=True)]
    return rows


def processor_ms(process: psutil.Process) -> float:
    """What the server has used of the processors so far."""
    times = process.cpu_times()
    return float(times.user + times.system) * MS


def viewer(url: str, paths: list[str]) -> list[float]:
    ask = Asker(url)
    return [timed(lambda path=path: ask(path)) for path in paths]  # type: ignore[misc]  # bound


def in_browser(url: str, rounds: int) -> list[str]:
    """By chromium: from the address to the list, and what colouring takes; no rows where it is missing."""
    chromium = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        return []
    first, shown, redraw = [], [], []
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(rounds):
            page = browser.new_page(viewport={"width": 1300, "height": 800})
            first.append(timed(lambda page=page: (page.goto(f"{url}#slide=slide"), page.wait_for_selector(".row"))))  # type: ignore[misc]  # bound
            page.wait_for_selector("body[data-slide=slide]")
            shown.append(page.evaluate("performance.now()"))
            redraw.append(page.evaluate(RECOLOUR))
            page.close()
        browser.close()
    return [
        row("browser: from the address to the list on the screen", first),
        row("browser: from the address to slide, heatmap and details on the screen", shown),
        row(
            "browser: heatmap of all tiles ranked, rastered and coloured anew",
            redraw,
        ),
    ]


RECOLOUR = """async () => {
  const choose = (name, value) => {
    const select = document.querySelector(`select[name=${name}]`);
    select.value = value;
    select.dispatchEvent(new Event("change"));
  };
  choose("scale", "raw");
  const began = performance.now();
  choose("member", "1");
  choose("scale", "percentile");
  return (performance.now() - began) / 2;
}"""


if __name__ == "__main__":
    main()
