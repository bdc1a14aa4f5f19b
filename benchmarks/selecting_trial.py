"""How near what a study says mil.predict fast=true costs comes to what it costs on new slides: pooled, or within folds.

    python benchmarks/selecting_trial.py [cohorts=40] [slides=60] [new=200] [keep=0.1] [painted=1,2,3] [out=FILE]

No pictures: features are made (14 numbers a tile, 160 tiles a slide, a shade a slide; lymphocytes and loose nuclei in
both classes, lesions on 2 to 10 tiles of every second slide), and the cheap numbers are a blurred part of them. Each
cohort is a study (ABMIL, 5 folds) whose members score all tiles and the chosen ones: of its own slides, those that held
the slide out (`mil.prediction.fast`), and of new slides all together, as mil.predict does.

For each cohort: AUC of new slides with all tiles and with the chosen, their loss, and the study's own loss with all
pairs of slides (pooled) and with pairs of one fold (within). Then means, root mean squares of the errors, and how often
the intervals hold the loss of new slides. painted=: of the painted cohorts of benchmarks/selecting.py with these seeds
(whose new slides that table has), the study's own losses only.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score

from extract.features.cache import Provenance, write_features
from extract.slides.coarse import Selector, choose
from mil.look.tilescores import Verdicts, score_tiles
from mil.prediction import fast
from mil.prediction.config import Select
from mil.results.trained import TrainedStudy, open_run, score_slide
from mil.tasks.estimates import Estimate
from mil.tasks.paired import auc_difference_interval
from mil.tasks.stratified import nested_difference, stratified_auc_interval
from mil.train import main as train

WIDTH, CHEAP, TILES, BLUR = 14, 6, 160, 0.5
STRENGTH = (1.2, 3.0)
"""Of a lesion, in standard deviations of five features; drawn for each slide."""
LOOK_DF = np.random.default_rng(0).normal(size=(WIDTH, CHEAP)) / WIDTH**0.5


def bag(positive: bool, rng: np.random.Generator) -> np.ndarray:
    """Features of a slide, (N, D)."""
    features_ND = rng.normal(size=(TILES, WIDTH)) + rng.normal(0, 0.3, WIDTH)
    kinds = [((0, 4), 3.0, rng.integers(0, 30)), ((4, 8), 2.0, rng.integers(0, 30))]
    if positive:
        kinds.append(((6, 11), rng.uniform(*STRENGTH), rng.integers(2, 11)))
    first = 0
    for (low, high), strength, n_tiles in kinds:
        features_ND[first : first + n_tiles, low:high] += strength
        first += int(n_tiles)
    return features_ND.astype(np.float32)


def glance(features_ND: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cheap numbers (N, F): what a coarse look sees of them."""
    seen_NF: np.ndarray = features_ND @ LOOK_DF + rng.normal(0, BLUR, (len(features_ND), CHEAP))
    return seen_NF


def study(folder: Path, bags: dict[str, np.ndarray]) -> TrainedStudy:
    """Trained on features in files."""
    for name, features_ND in bags.items():
        coords_N2 = np.stack([np.arange(TILES) % 20, np.arange(TILES) // 20], 1) * 224
        made = Provenance("made", tile_px=224, mpp=0.5, tile_level0_px=224.0, slide=name)
        write_features(folder / "features" / f"{name}.h5", features_ND, coords_N2, made)
    labels = [["benign", "tumour"][i % 2] for i in range(len(bags))]
    pd.DataFrame({"slide": [*bags], "patient": [*bags], "label": labels}).to_csv(folder / "cohort.csv", index=False)
    arguments = [f"cohort={folder / 'cohort.csv'}", f"features.folder={folder / 'features'}", "model.name=abmil"]
    arguments += ["train.epochs=30", "train.accelerator=cpu", "report.bootstrap=0", f"out={folder / 'run'}"]
    assert train(arguments) == 0
    return open_run(folder / "run", device="cpu")


def own_slides(trained: TrainedStudy, bags: dict[str, np.ndarray], cheap: dict[str, np.ndarray]) -> list[fast.OwnSlide]:
    verdicts, found = Verdicts(trained), []
    for i, (name, features_ND) in enumerate(bags.items()):
        scored = score_tiles(trained, name, features_ND, verdicts.on(name))
        worth_N = fast.worth(scored.scores_MN, attention=True)
        found.append(fast.OwnSlide(name, name, i % 2, cheap[name], worth_N, features_ND, scored.verdict.members))
    return found


def own_losses(trained: TrainedStudy, slides: list[fast.OwnSlide], select: Select) -> tuple[Estimate, Estimate]:
    """Pooled, and within folds: the slides that the same members held out."""
    p_S2, _ = fast.held_out_scores(trained, slides, select)
    labels, patients = [slide.label for slide in slides], [slide.patient for slide in slides]
    folds = [str(slide.members) for slide in slides]
    all_, chosen = (stratified_auc_interval(labels, p_S, folds, patients) for p_S in p_S2.T)
    return auc_difference_interval(labels, *p_S2.T, patients), nested_difference(all_, chosen, patients)


def of_new(
    trained: TrainedStudy, selector: Selector, number: int, rng: np.random.Generator, select: Select
) -> list[float]:
    """p of a new slide with all tiles and with the chosen ones, the mean of all members."""
    features_ND, found = bag(bool(number % 2), rng), []
    scores_N = selector.scores(glance(features_ND, rng))
    for bag_ND in (features_ND, features_ND[choose(scores_N, select.keep, select.random, f"new{number}")]):
        with torch.inference_mode():
            logits_MC = score_slide(trained, bag_ND).logits_MBC[:, 0]
        p_M = torch.sigmoid(logits_MC[:, 0]) if logits_MC.shape[1] == 1 else logits_MC.softmax(1)[:, 1]
        found.append(float(p_M.mean()))
    return found


@dataclass(frozen=True)
class Row:
    """A cohort: AUC of new slides with all tiles and with the chosen, and the study's own losses."""

    all: float
    chosen: float
    pooled: Estimate
    within: Estimate

    @property
    def loss(self) -> float:
        return self.all - self.chosen


def one_cohort(folder: Path, seed: int, n_slides: int, n_new: int, select: Select) -> Row:
    rng = np.random.default_rng(seed)
    bags = {f"s{i:03d}": bag(bool(i % 2), rng) for i in range(n_slides)}
    cheap = {name: glance(features_ND, rng) for name, features_ND in bags.items()}
    trained = study(folder, bags)
    slides = own_slides(trained, bags, cheap)
    pooled, within = own_losses(trained, slides, select)
    selector, truth = fast.fit(slides, trained.config.seed), np.arange(n_new) % 2
    p_S2 = np.array([of_new(trained, selector, i, rng, select) for i in range(n_new)])
    return Row(*(float(roc_auc_score(truth, p_S)) for p_S in p_S2.T), pooled, within)


def one_painted(folder: Path, seed: int, select: Select) -> tuple[Estimate, Estimate]:
    """The study of benchmarks/selecting.py with this seed."""
    import selecting

    old = selecting.make_cohort(folder / f"old{seed}", 60, 1920, seed)
    trained = open_run(selecting.study(old, epochs=30), device="cpu")
    return own_losses(trained, fast.own_slides(trained, select), select)


# --- tables --------------------------------------------------------------------------------------------------------


def shown(found: Estimate) -> str:
    assert found.value is not None
    return f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def table(rows: dict[int, Row]) -> list[str]:
    """Markdown, and two lines that sum it up."""
    lines = ["| cohort | AUC, all tiles | chosen | loss | own, pooled | own, within folds |", "|" + " --- |" * 6]
    for seed, row in rows.items():
        own = f"{shown(row.pooled)} | {shown(row.within)}"
        lines.append(f"| {seed} | {row.all:.4f} | {row.chosen:.4f} | {row.loss:+.4f} | {own} |")
    losses_K = np.array([row.loss for row in rows.values()])
    lines += ["", f"Mean loss of new slides {losses_K.mean():+.4f}."]
    for name in ("pooled", "within"):
        own_K3 = np.array([[e.value, e.low, e.high] for e in (getattr(row, name) for row in rows.values())])
        error = float(np.sqrt(((own_K3[:, 0] - losses_K) ** 2).mean()))
        held = float(((own_K3[:, 1] <= losses_K) & (losses_K <= own_K3[:, 2])).mean())
        lines.append(f"{name}: mean {own_K3[:, 0].mean():+.4f}, root mean square error {error:.4f}, held {held:.0%}.")
    return lines


def main() -> None:
    from machine import machine, publish

    given = {"cohorts": "40", "slides": "60", "new": "200", "keep": "0.1", "painted": "", "out": ""}
    given |= dict(argument.split("=") for argument in sys.argv[1:])
    select, rows, said = Select(keep=float(given["keep"])), {}, []
    out = Path(given["out"]) if given["out"] else None
    command = " ".join(["python benchmarks/selecting_trial.py", *sys.argv[1:]])

    def show() -> None:
        lines = ["# What a study says that fewer tiles cost", "", f"`{command}`", "", *(table(rows) if rows else [])]
        publish("\n".join([*lines, "", *said, machine("torch", "scikit-learn")]), out)

    for seed in map(int, filter(None, given["painted"].split(","))):
        with tempfile.TemporaryDirectory() as folder:
            pooled, within = one_painted(Path(folder), seed, select)
        said.append(f"painted, seed {seed}: pooled {shown(pooled)}, within folds {shown(within)}\n")
        show()
    for seed in range(int(given["cohorts"])):
        with tempfile.TemporaryDirectory() as folder:
            rows[seed] = one_cohort(Path(folder), seed, int(given["slides"]), int(given["new"]), select)
        show()


if __name__ == "__main__":
    main()
