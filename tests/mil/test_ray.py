"""Beyond one machine: what three nodes make, of which one is killed, is what one machine makes. And what is refused."""

from __future__ import annotations

import errno
import filecmp
import importlib.util
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import extract.run
from extract.config import ConfigError, ExtractConfig, Run, load_config
from extract.encoders.frozen import FrozenEncoder, load_encoder
from extract.encoders.table import EncoderError
from extract.extraction import cluster as clusters
from extract.extraction import ray_slides, work
from extract.extraction.cluster import ClusterError, Node, Pool, connected, look_around, pool_of, unlike, versions
from extract.extraction.ray_slides import SMALL_BYTES, in_blocks, order_of, row_of
from extract.extraction.readers import SlideFile
from extract.extraction.served import DONE, EMPTY, FAILED, STOPPED, Order, Service
from extract.extraction.todo import settings_of
from mil.pipeline.cluster import makespan
from mil.train import main

pytestmark = pytest.mark.ray
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra `ray`)")
own_warnings = pytest.mark.filterwarnings("ignore::ResourceWarning:ray", "ignore:.*RAY_ACCEL_ENV.*:FutureWarning")

NETWORK = '''
import time

import torch


class Corners(torch.nn.Module):
    """Mean colours of a tile's quarters, which no batch changes."""

    def __init__(self, slow_s):
        super().__init__()
        self.register_buffer("scale", torch.ones(1))
        self.slow_s = slow_s

    def forward(self, x_N3HW):
        time.sleep(self.slow_s)
        half = x_N3HW.shape[-1] // 2
        quarters = [x_N3HW[..., i : i + half, j : j + half].mean((2, 3)) for i in (0, half) for j in (0, half)]
        return torch.cat(quarters, 1) * self.scale


def corners(weights):
    return Corners(0.15), {"dim": 12, "tile_px": 64, "mean": (0, 0, 0), "std": (1, 1, 1)}
'''


@pytest.fixture(scope="module")
def ray_nodes(script: Callable[[Path], ModuleType]) -> ModuleType:
    return script(Path(__file__).with_name("ray_nodes.py"))


@pytest.fixture(scope="module")
def lab(script, tmp_path_factory) -> Iterator[Path]:
    """A folder with slides, one of them glass and one damaged, and a network of one's own, where Python finds it."""
    folder = tmp_path_factory.mktemp("lab")
    slides = script(Path(__file__).parents[1] / "extract" / "slides.py")
    (folder / "slides").mkdir()
    for number in range(7):
        slides.painted_slide(folder / "slides" / f"s{number}.tiff", 501 + 64 * number, 403, seed=number)
    slides.write_tiff(folder / "slides" / "glass.tiff", [slides.glass(500, 400)], mpp=0.5)
    (folder / "slides" / "bad.tiff").write_bytes(b"no slide")
    (folder / "ray_test_network.py").write_text(NETWORK)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)  # of the nodes that are started
        yield folder


@pytest.fixture(scope="module")
def nodes(ray_nodes: ModuleType, lab: Path) -> Iterator[Any]:
    with ray_nodes.three_nodes() as found:
        yield found


@pytest.fixture(autouse=True)
def no_figures(monkeypatch, draw_only):
    draw_only(monkeypatch)


def when(ready: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """`act` as soon as something is so, while the test goes on."""

    def watch() -> None:
        until = time.monotonic() + 120
        while not ready() and time.monotonic() < until:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


# --- extraction -------------------------------------------------------------------------------------------------------


@needs_ray
@own_warnings
def test_a_node_is_killed_in_the_middle_of_extraction(nodes, lab, tmp_path, capsys, monkeypatch):
    """Slides go out in pairs, as many small ones do; what a dead worker had written of its pairs is not done again."""
    monkeypatch.setattr(
        ray_slides, "in_blocks", lambda todo, workers: [todo[i : i + 2] for i in range(0, len(todo), 2)]
    )
    given = [f"slides.folder={lab / 'slides'}", "encoder.name=ray_test_network:corners", "extract.batch_size=16"]
    local, far = tmp_path / "local", tmp_path / "far"
    assert extract.run.main([*given, f"out={local}", "extract.workers=0"]) == 1
    capsys.readouterr()
    nodes.refill()
    killer = when(lambda: len(list(far.glob("s*.h5"))) >= 2, nodes.kill)
    assert extract.run.main([*given, f"out={far}", "extract.workers=1", "run.on=ray"]) == 1, "as locally: one failed"
    killer.join()

    assert sorted(path.name for path in far.rglob("*")) == sorted(path.name for path in local.rglob("*"))
    names = [path.name for path in local.iterdir()]
    assert filecmp.cmpfiles(local, far, names, shallow=False) == (names, [], [])
    said = capsys.readouterr()
    assert "slides: 7 done, 0 already there, 1 empty, 1 failed" in said.out
    by_node = [line.split() for line in said.out.splitlines() if line.startswith("  node ")]
    assert sum(int(words[words.index("slides,") - 1]) for words in by_node) == 9, "each slide is some node's"
    assert "failed: bad (open)" in said.err
    again = [*given, f"out={far}", "extract.workers=0", "run.on=ray"]
    assert extract.run.main(again) == 1, "the damaged one again, and nothing else"
    assert "0 done, 8 already there, 0 empty, 1 failed" in capsys.readouterr().out


@needs_ray
@own_warnings
def test_the_checks_before_work(nodes, lab, tmp_path, monkeypatch, capsys):
    every = clusters.nodes()
    clusters.refuse_unlike(every, tmp_path / "new")
    assert not list(tmp_path.rglob("*")), "nothing is left of the probe"
    with pytest.raises(ClusterError, match=r"does not see .*nothing here.*; use paths that all nodes have"):
        clusters.refuse_unlike(every, tmp_path, [tmp_path / "nothing here"])
    monkeypatch.setattr(clusters, "versions", lambda: versions() | {"torch": "9.9"})
    with pytest.raises(ClusterError, match=r"has other versions: torch .*, here 9.9. Install the same everywhere"):
        clusters.refuse_unlike(every, tmp_path)
    monkeypatch.undo()
    given = [f"slides.folder={lab / 'slides'}", "encoder.name=ray_test_network:corners", f"out={tmp_path / 'far'}"]
    assert extract.run.main([*given, "run.on=ray", "run.cpus=2"]) == 2
    assert "no worker fits" in capsys.readouterr().err


# --- without a cluster ------------------------------------------------------------------------------------------------


def test_orders_and_outcomes_survive_as_rows():
    whole = Order(SlideFile("a", Path("a.svs"), 0.25, Path("r.geojson"), Path("c.h5")), (7, 12))
    for order in (whole, Order(SlideFile("b", Path("b.svs")))):
        assert order_of(row_of(order)) == order
    assert math.isnan(row_of(Order(SlideFile("b", Path("b.svs"))))["mpp"])


def test_small_slides_go_out_several_at_a_time(tmp_path):
    def files(suffix: str, sizes: list[int]) -> list[SlideFile]:
        paths = [tmp_path / f"s{i}{suffix}" for i in range(len(sizes))]
        for path, size in zip(paths, sizes, strict=True):
            with open(path, "wb") as file:
                file.truncate(size)
        return [SlideFile(path.stem, path) for path in paths]

    def lengths(todo: list[SlideFile], workers: int = 1) -> list[int]:
        blocks = in_blocks(todo, workers)
        assert [file for block in blocks for file in block] == todo
        return [len(block) for block in blocks]

    third = SMALL_BYTES // 3
    assert lengths(files(".svs", [1000] * 400)) == [32] * 12 + [16]
    assert lengths(files(".svs", [1000] * 400), workers=16) == [2] * 200, "so that everybody has something to do"
    assert lengths(files(".svs", [1000] * 11)) == [1] * 11
    assert lengths(files(".svs", [third] * 96)) == [3] * 32
    assert lengths(files(".svs", [*[1000] * 7, 10**9, *[1000] * 40])) == [4, 3, 1, *[4] * 10]
    assert lengths(files(".mrxs", [1000] * 96)) == [1] * 96, "the index of a slide of many files is no small slide"
    assert lengths([SlideFile(str(i), tmp_path / "far.svs") for i in range(96)]) == [1] * 96, "not here: in a store"


def test_workers_fill_the_nodes():
    small, large = Node("1", "a", 2, 0), [Node(str(i), "b", 64, 0) for i in range(2)]
    gpus = [Node("3", "c", 33, 4), Node("4", "d", 8, 1)]
    assert pool_of([small, *large], None, gpu=True) == Pool(2, 64, 0), "not as small as the head"
    assert pool_of([small, *large], 2, gpu=True) == Pool(65, 2, 0)
    assert pool_of([small, *gpus], None, gpu=True) == Pool(5, 8, 1)
    assert pool_of([*large, *gpus], None, gpu=False).gpus == 0
    assert str(Pool(3, 1, 0)) == "3 workers (1 CPU each)"


def test_a_stage_lasts_until_its_last_task_ends():
    assert makespan([3, 3, 3], 3) == 3
    assert makespan([3, 3, 3, 1], 2) == 6
    assert makespan([], 4) == 0


def test_the_simulation_of_equal_slides_is_arithmetic(script, monkeypatch):
    """One GPU encodes 3,000 tiles a second while its readers are faster; the first slide is read before. Eight take an
    eighth. With slow readers these are what counts; a lost node costs time, and its slides are done all the same."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    bench = script(Path(__file__).parents[2] / "benchmarks" / "cluster.py")
    still = {"sigma": 0.0, "fixed_s": 0.0, "hand_out_s": 0.0}
    model = bench.Model(slides=80, read_cpu_s=0.00456, **still, server_bytes_per_s=1e15)
    read, encode = 10_000 * 0.00456 / 15, 10_000 / 3000
    assert bench.simulate(model, 1)["seconds"] == pytest.approx(read + 79 * encode, rel=0.02)
    assert bench.simulate(model, 8)["seconds"] == pytest.approx(read + 9 * encode, rel=0.1)
    slow = bench.simulate(replace(model, readers=3), 1)
    assert slow["seconds"] == pytest.approx(80 * 5 * read, rel=0.02)
    assert slow["used"] == pytest.approx(encode / (5 * read), rel=0.02)
    lost = bench.simulate(replace(model, lost_every_s=60.0), 1)
    assert lost["seconds"] > bench.simulate(model, 1)["seconds"]
    assert lost["again"] > 0


def test_what_a_node_does_not_see_is_said(tmp_path):
    nodes = [Node(f"{i}aaaaaaaa", f"h{i}", 1, 0) for i in range(3)]
    blind = look_around(str(tmp_path), str(tmp_path / "none" / ".probe"), "token", [])
    (tmp_path / ".probe").write_text("token")
    good = look_around(str(tmp_path), str(tmp_path / ".probe"), "token", [str(tmp_path)])
    assert (good["sees"], good["writes"], good["missing"]) == (True, True, [])
    other = good | {"writes": False, "versions": versions() | {"python": "3.8"}}
    said = unlike(versions(), dict(zip(nodes, [blind, good, other], strict=True)), tmp_path)
    assert len(said) == 3
    assert "node h0 (0aaaaa) does not see what" in said[0]
    assert "node h2 (2aaaaa) cannot write there" in said[1]
    assert "node h2 (2aaaaa) has other versions: python 3.8, here" in said[2]


def test_without_ray_it_says_how_to_have_it(monkeypatch, tmp_path, lab, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "ray" else find(name, *more))
    given = [f"slides.folder={lab / 'slides'}", "encoder.name=ray_test_network:corners", f"out={tmp_path / 'far'}"]
    assert extract.run.main([*given, "run.on=ray"]) == 2
    assert "pip install 'slide-mil[ray]' here and on all nodes" in capsys.readouterr().err


@needs_ray
@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (ConnectionError("ray client connection timeout"), r"ray://head:10001: no connection; expected"),
        (
            RuntimeError("Version mismatch: The cluster was started with:\n  Ray: 2.9"),
            r"Ray: 2.9 Install the same Python",
        ),
    ],
)
def test_a_cluster_that_cannot_be_had(monkeypatch, raised, said):
    import ray

    def refuse(*given: Any, **options: Any) -> None:
        raise raised

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ClusterError, match=said), connected(Run(on="ray", address="ray://head:10001")):
        pass


@pytest.mark.parametrize("address", ["auto", "ray://head:10001", "10.0.0.1:6379", "ray://[::1]:10001"])
def test_addresses(address):
    assert Run(address=address).address == address


def test_an_address_that_is_none():
    with pytest.raises(ConfigError, match="expected auto, ray://HOST:PORT or HOST:PORT, got 'head'"):
        load_config(ExtractConfig, ["run.address=head"])


def test_a_worker_fills_batches_across_slides(lab, tmp_path, monkeypatch):
    """Six slides at once, whose tiles fill four batches of 16 and more; a batch that is not full is the exception."""
    sizes = []
    encode = FrozenEncoder.encode
    monkeypatch.setattr(FrozenEncoder, "encode", lambda self, tiles: sizes.append(len(tiles)) or encode(self, tiles))
    worker, _ = service_on(lab, tmp_path / "out")
    orders = [Order(SlideFile(f"s{i}", lab / "slides" / f"s{i}.tiff")) for i in range(6)]
    outcomes = [waiting.result() for waiting in [worker.hand_in(order) for order in orders]]
    assert [outcome.what for outcome in outcomes] == [DONE] * 6
    assert sum(outcome.tiles for outcome in outcomes) == sum(sizes) > 64
    assert sum(size < 16 for size in sizes) <= 2
    again = worker.hand_in(Order(orders[0].file)).result()
    assert again.tiles == outcomes[0].tiles, "written before by one that died: counted"
    empty = worker.hand_in(Order(SlideFile("glass", lab / "slides" / "glass.tiff"))).result()
    assert (empty.what, empty.tiles) == (EMPTY, 0)
    assert empty.said.startswith("warning: glass: empty")
    bad = worker.hand_in(Order(SlideFile("bad", lab / "slides" / "bad.tiff"))).result()
    assert (bad.what, bad.stage) == (FAILED, "open")
    assert not (tmp_path / "out" / "failed.csv").exists(), "that is written by who knows all slides"
    worker.close()


def test_a_worker_says_why_nothing_can_be_written(lab, tmp_path, monkeypatch):
    worker, _ = service_on(lab, tmp_path / "out")

    def full(*given: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(work, "write_features", full)
    for i in range(2):
        outcome = worker.hand_in(Order(SlideFile(f"s{i}", lab / "slides" / f"s{i}.tiff"))).result()
        assert (outcome.what, outcome.stage) == (STOPPED, "OutputError")
        assert "no space left" in outcome.reason
    worker.close()


def service_on(lab: Path, out: Path) -> tuple[Service, dict[str, Any]]:
    tree = {"features": {"folder": out}, "encoder": {"name": "ray_test_network:corners", "device": "cpu"}}
    config = ExtractConfig.model_validate(tree | {"extract": {"workers": 0, "batch_size": 16}})
    wanted = settings_of(config, load_encoder(config.encoder))
    return Service(config, wanted), wanted


def test_a_worker_with_other_weights_is_refused(lab, tmp_path):
    worker, wanted = service_on(lab, tmp_path / "out")
    worker.close()
    with pytest.raises(EncoderError, match=r"weights_sha256 is .* here, other where the work is handed out"):
        Service(worker.config, wanted | {"weights_sha256": "other"})


# --- training ---------------------------------------------------------------------------------------------------------


@needs_ray
@own_warnings
def test_a_node_is_killed_in_the_middle_of_training(nodes, write_study, witness_arrays, tmp_path, capsys):
    arrays, labels_S = witness_arrays(18, seed=5)
    given = [*write_study(tmp_path / "data", arrays, np.array(["a", "b"])[labels_S]), "study.folds=2"]
    given += ["model.name=[mean,abmil]", "train.epochs=15", "train.batch_size=5", "train.accelerator=cpu"]
    given += ["train.members_per_pass=1", "report.bootstrap=0", "report.heatmaps=0", "study.nested=2"]
    given += ["report.baselines=false"]
    local, far = tmp_path / "local", tmp_path / "far"
    assert main([*given, f"out={local}"]) == 0
    nodes.refill()
    begun = [far / "mean" / "inner" / "checkpoints" / f"pass{i}" / "last.ckpt" for i in range(4)]
    killer = when(lambda: any(path.exists() for path in begun) and nodes.busy(0, "one_pass"), nodes.kill)
    assert main([*given, f"out={far}", "run.on=ray"]) == 0
    killer.join()
    for name in ("mean", "abmil"):
        for file in ("predictions.csv", "plan.csv", "history.csv", "choices.csv", "inner/history.csv"):
            assert (far / name / file).read_bytes() == (local / name / file).read_bytes(), (name, file)
        assert (far / name / "members.safetensors").read_bytes() == (local / name / "members.safetensors").read_bytes()
    assert not list(far.rglob("checkpoints"))
    assert not list(far.rglob("*.partial"))
    assert not list(far.rglob("*.probe"))
    assert "ray: 3 nodes, 3 workers (1 CPU each)" in capsys.readouterr().out
    assert main([*given, f"out={far}", "resume=true"]) == 0, "where it ran does not matter to who goes on"
    assert "already finished" in capsys.readouterr().out
    assert main([*given, f"out={tmp_path / 'none'}", "run.on=ray", "run.members_per_task=2", "plan=true"]) == 0
    assert "of at most 2 members on 2 workers" in capsys.readouterr().out


# --- with stores ------------------------------------------------------------------------------------------------------


@pytest.mark.stores
@needs_ray
@own_warnings
def test_from_store_to_store_on_a_cluster(s3, nodes, lab, write_study, witness_arrays, tmp_path, capsys):
    """Workers are given what they are told and the environment, as on other machines, whose mirrors are empty."""
    slides = [f"s{number}.tiff" for number in range(2)]
    for name in slides:
        s3.put_file(str(lab / "slides" / name), f"lab/slides/{name}")
        (tmp_path / "few").mkdir(exist_ok=True)
        os.link(lab / "slides" / name, tmp_path / "few" / name)
    given = ["encoder.name=ray_test_network:corners", "extract.batch_size=16", "extract.workers=0"]
    assert extract.run.main([*given, f"slides.folder={tmp_path / 'few'}", f"out={tmp_path / 'local'}"]) == 0
    nodes.refill()
    with nodes.environment(s3.environment | {"SLIDE_MIL_CACHE": str(tmp_path / "theirs")}):
        assert extract.run.main([*given, "slides.folder=s3://lab/slides", "out=s3://lab/corners", "run.on=ray"]) == 0
        found = {name.removeprefix("lab/corners/"): s3.cat(name) for name in s3.find("lab/corners")}
        assert found == {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
        assert "2 done" in capsys.readouterr().out

        arrays, labels_S = witness_arrays(12, seed=5)
        data = tmp_path / "data"
        study = [*write_study(data, arrays, np.array(["a", "b"])[labels_S]), "study.folds=2", "model.name=mean"]
        study += ["train.epochs=3", "train.batch_size=5", "train.accelerator=cpu", "train.members_per_pass=1"]
        study += ["report.bootstrap=0", "report.heatmaps=0", "report.baselines=false", "data.memory=mmap"]
        assert main([*study, f"out={tmp_path / 'run'}"]) == 0
        for path in (path for path in data.rglob("*") if path.is_file()):
            s3.put_file(str(path), f"lab/data/{path.relative_to(data).as_posix()}")
        study = [argument.replace(str(data), "s3://lab/data") for argument in study]
        assert main([*study, "out=s3://lab/run", "run.on=ray"]) == 0
    found = {name.removeprefix("lab/run/"): s3.cat(name) for name in s3.find("lab/run")}
    local = {p.relative_to(tmp_path / "run").as_posix(): p for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert set(found) == set(local) - {"paths.json"}, "no checkpoint is left, and the curves are there"
    for name in ("predictions.csv", "members.safetensors", "plan.csv", "history.csv", "slides.csv"):
        assert found[name] == local[name].read_bytes(), name
    assert s3.never_written not in b"".join(found.values()).decode("latin-1")
