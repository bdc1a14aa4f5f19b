"""mil.predict fast=true: a coarse look that chooses tiles, fitted on the study's own slides and tried on them.

What a tile is worth is what the members that held its slide out said of it. The selector (`extract.slides.coarse`) is
tried on slides of patients that it was not fitted on, and those are scored by members that did not learn them: all of
their tiles against the chosen ones.

Axes: S slides, N tiles of a slide, F cheap numbers, D features, M members.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GroupKFold
from sklearn.neural_network import MLPRegressor
from tqdm import tqdm

from extract.config import ConfigError, ExtractConfig
from extract.extraction.todo import cohort_slides
from extract.features.errors import CacheError
from extract.features.folder import FeatureFolder
from extract.slides.coarse import Selector, choose, load_selector, look
from extract.slides.errors import SlideError
from extract.slides.files import find_slides
from extract.slides.slide import open_slide
from extract.whole import replace_on_success, write_whole
from extract.wording import count
from mil.look.tilescores import Verdicts, features_of, percentiles, score_tiles
from mil.prediction.config import PredictConfig, Select
from mil.results.trained import TrainedStudy, score_slide
from mil.tasks.estimates import auc_interval
from mil.tasks.paired import auc_difference_interval
from mil.training.members import FILE as MEMBERS

FOLDER, SELECTOR, TRIAL = "fast", "selector.npz", "trial.json"
FOLDS = 5
LEAST_SLIDES = 10
MOST_TILES = 1000
"""Of a slide that the selector learns from; all of the highest 5 % are among them."""
HIDDEN = 24


@dataclass(frozen=True)
class OwnSlide:
    """A slide of the study: its cheap numbers, what its tiles are worth, and the features to score it by."""

    name: str
    patient: str
    label: int
    cheap_NF: np.ndarray
    worth_N: np.ndarray
    features_ND: np.ndarray
    members: tuple[int, ...]


@dataclass(frozen=True)
class Trial:
    """All tiles against the chosen ones on the study's own held-out slides. loss: auc_all - auc_fast, low to high."""

    members_sha256: str
    keep: float
    random: float
    n_slides: int
    tiles: float
    auc_all: float
    auc_fast: float
    loss: float
    low: float | None
    high: float | None

    @property
    def said(self) -> str:
        interval = "" if self.low is None else f" [{self.low:+.4f}, {self.high:+.4f}]"
        return (
            f"fast=true encodes {self.tiles:.0%} of the tiles; on {self.n_slides} slides of the study that members "
            f"held out this costs {self.loss:+.4f}{interval} of the AUC ({self.auc_fast:.4f} instead of "
            f"{self.auc_all:.4f})"
        )


def selector_for(config: PredictConfig, trained: TrainedStudy) -> tuple[Path, Trial]:
    """RUN/fast/selector.npz and its trial: those that are there, else made now from the study's slides.

    Raises:
        ConfigError: the study is of another task, its slides are not at hand, or the loss is more than allowed.
    """
    select = config.select
    if not trained.of_classes or len(trained.classes) != 2 or len(trained.feature_parts) > 1 or trained.covariates:
        raise ConfigError(
            "fast=true",
            ["the loss can be measured for two classes, one encoder and no covariates; leave fast out"],
        )
    folder = trained.folder / FOLDER
    digest = hashlib.sha256((trained.folder / MEMBERS).read_bytes()).hexdigest()
    trial = read_trial(folder)
    if trial is None or (trial.members_sha256, trial.keep, trial.random) != (digest, select.keep, select.random):
        trial = fit_and_try(trained, select, digest, folder)
    if trial.loss > select.loss * trial.auc_all:
        raise ConfigError(
            "fast=true",
            [
                f"{trial.said}: more than select.loss={select.loss:g} of the AUC allows. Keep more tiles "
                f"(select.keep={min(1.0, 2 * select.keep):g}), allow more, or leave fast out"
            ],
        )
    return folder / SELECTOR, trial


def read_trial(folder: Path) -> Trial | None:
    """What an earlier command found; None where there is nothing whole."""
    try:
        load_selector(folder / SELECTOR)
        return Trial(**json.loads((folder / TRIAL).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, SlideError):
        return None


def fit_and_try(trained: TrainedStudy, select: Select, digest: str, folder: Path) -> Trial:
    """Look at the study's slides, fit, try out, and leave both in `folder`."""
    slides = own_slides(trained, select)
    trial = try_out(trained, slides, select, digest)
    selector = fit(slides, trained.config.seed)
    folder.mkdir(exist_ok=True)
    with replace_on_success(folder / SELECTOR) as temporary, open(temporary, "wb") as file:
        selector.save(file)
    write_whole(folder / TRIAL, json.dumps(asdict(trial), indent=2) + "\n")
    return trial


# --- the study's own slides ------------------------------------------------------------------------------------------


def own_slides(trained: TrainedStudy, select: Select) -> list[OwnSlide]:
    """Slides that members held out, with file, features and coordinates.

    Raises:
        ConfigError: too few are at hand.
    """
    features, verdicts, files = features_of(trained), Verdicts(trained), slide_files(trained, select)
    found, why = [], ""
    roles = trained.roles.set_index("slide")
    held_out = roles[(roles == "test").any(axis=1)]
    for name, row in tqdm(held_out.iterrows(), "looking", len(held_out), unit="slide", disable=None, leave=False):
        slide = str(name)
        try:
            found.append(own_slide(trained, features, verdicts, row.rename(slide), files[slide]))
        except KeyError:
            why = f"{slide}: no slide file"
        except (CacheError, SlideError) as error:
            why = f"{slide}: {error}"
    labels = [own.label for own in found]
    if len(found) < LEAST_SLIDES or min(labels.count(0), labels.count(1)) < 2:
        raise ConfigError(
            "fast=true",
            [
                f"{count(len(found), 'slide')} of the study can be looked at, expected {LEAST_SLIDES} or more of both "
                f"classes, to fit the coarse look and to measure its loss; set select.slides=FOLDER of the study's "
                f"slides ({why or 'no slide was held out'})"
            ],
        )
    return found


def slide_files(trained: TrainedStudy, select: Select) -> dict[str, Path]:
    """Files of the study's slides as far as they are at hand."""
    config = trained.config
    if select.slides is not None:
        return find_slides(select.slides)
    if config.slides.folder is not None and config.slides.folder.is_dir():
        return find_slides(config.slides.folder)
    settings = ExtractConfig(cohort=config.cohort, columns=config.columns, slides=config.slides)
    try:
        return {file.slide: file.path for file in cohort_slides(settings)}
    except ConfigError as error:
        advice = "set select.slides=FOLDER of the study's slides"
        raise ConfigError("fast=true", [f"{advice} ({error.problems[0]})"]) from None


def own_slide(
    trained: TrainedStudy, features: FeatureFolder, verdicts: Verdicts, row: pd.Series, path: Path
) -> OwnSlide:
    """Looked at and scored; CacheError or SlideError where that cannot be done. row: of roles.csv, by its slide."""
    name = str(row.name)
    features_ND, coords_N2 = features.features(name), features.coords(name)
    made = features.header(name).provenance
    if coords_N2 is None or not len(features_ND):
        raise CacheError("no coordinates of its tiles")
    with open_slide(path, default_mpp=trained.config.slides.mpp) as slide:
        side = made.tile_level0_px or made.tile_px * made.mpp / slide.mpp
        cheap_NF = look(slide, coords_N2, side)
    scored = score_tiles(trained, name, features_ND, verdicts.on(name))
    return OwnSlide(
        name,
        str(row["patient"]),
        trained.classes.index(str(row["label"])),
        cheap_NF,
        worth(scored.scores_MN, trained.aggregator.score_name == "attention"),
        features_ND,
        scored.verdict.members,
    )


def worth(scores_MN: np.ndarray, attention: bool) -> np.ndarray:
    """What a tile counts for: the logarithm of its attention (1 = average), else how far its rank is from the middle,
    since a score may speak at both ends."""
    if attention:
        logarithm_N: np.ndarray = np.log(0.1 + scores_MN.mean(axis=0))
        return logarithm_N
    away_N: np.ndarray = np.abs(percentiles(scores_MN).mean(axis=0) / 50 - 1)
    return away_N


# --- fitting and trying out ------------------------------------------------------------------------------------------


def fit(slides: Sequence[OwnSlide], seed: int) -> Selector:
    """A network of one hidden layer that tells worth from cheap numbers; every slide weighs about alike."""
    rng = np.random.default_rng(seed)
    rows = [rows_to_learn(slide.worth_N, rng) for slide in slides]
    cheap_NF = np.concatenate([slide.cheap_NF[kept] for slide, kept in zip(slides, rows, strict=True)])
    worth_N = np.concatenate([slide.worth_N[kept] for slide, kept in zip(slides, rows, strict=True)])
    mean_F, std_F = cheap_NF.mean(axis=0), cheap_NF.std(axis=0) + 1e-6
    network = MLPRegressor(
        hidden_layer_sizes=(HIDDEN,), alpha=1e-2, learning_rate_init=3e-3, max_iter=40, random_state=seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a fixed number of passes is meant
        network.fit((cheap_NF - mean_F) / std_F, (worth_N - worth_N.mean()) / (worth_N.std() + 1e-9))
    (hidden_FK, out_K1), (hidden_bias_K, out_bias) = network.coefs_, network.intercepts_
    return Selector(mean_F, std_F, hidden_FK, hidden_bias_K, out_K1[:, 0], out_bias)


def rows_to_learn(worth_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All rows of a slide of few tiles; else those of most worth, and others by chance."""
    if len(worth_N) <= MOST_TILES:
        return np.arange(len(worth_N))
    top = np.argsort(-worth_N)[: max(1, len(worth_N) // 20)]
    others = np.setdiff1d(np.arange(len(worth_N)), top)
    drawn = rng.choice(others, size=min(len(others), max(1, MOST_TILES - len(top))), replace=False)
    return np.concatenate([top, drawn])


def try_out(trained: TrainedStudy, slides: Sequence[OwnSlide], select: Select, digest: str) -> Trial:
    """What the chosen tiles cost on slides that members held out.

    All pairs of slides count, also those that different members held out. Pairs of one fold alone come hardly
    nearer to the loss on new slides (`benchmarks/selecting_trial.py`), and there are a fifth as many.
    """
    patients = [slide.patient for slide in slides]
    p_S2, tiles = held_out_scores(trained, slides, select)
    labels = [slide.label for slide in slides]
    all_S, fast_S = p_S2.T
    auc_all, auc_fast = (auc_interval(labels, score_S, patients).value for score_S in (all_S, fast_S))
    lost = auc_difference_interval(labels, all_S, fast_S, patients)
    if auc_all is None or auc_fast is None or lost.value is None or lost.low is None:
        raise ConfigError("fast=true", ["fewer than two patients of one of the classes: no loss can be measured"])
    tried = (len(slides), tiles, auc_all, auc_fast, lost.value, lost.low, lost.high)
    return Trial(digest, select.keep, select.random, *tried)


def held_out_scores(trained: TrainedStudy, slides: Sequence[OwnSlide], select: Select) -> tuple[np.ndarray, float]:
    """p_S2: log-odds of all tiles and of those that selectors fitted without the slide's patient choose, by the members
    that held the slide out; and the share of tiles that was chosen."""
    patients = [slide.patient for slide in slides]
    n_folds = min(FOLDS, len(set(patients)))
    p_S2, kept, everything = np.zeros((len(slides), 2)), 0, 0
    for train, test in GroupKFold(n_folds).split(patients, groups=patients):
        selector = fit([slides[s] for s in train], trained.config.seed)
        for s in test:
            slide = slides[s]
            rows = choose(selector.scores(slide.cheap_NF), select.keep, select.random, slide.name)
            p_S2[s] = [log_odds(trained, slide, bag_ND) for bag_ND in (slide.features_ND, slide.features_ND[rows])]
            kept, everything = kept + len(rows), everything + len(slide.features_ND)
    return p_S2, kept / everything


def log_odds(trained: TrainedStudy, slide: OwnSlide, bag_ND: np.ndarray) -> float:
    """Of the positive class, the mean over the members that held the slide out."""
    with trained.aggregator.of_site(trained.row_of(slide.name)), torch.inference_mode():
        logits_MC = score_slide(trained, bag_ND).logits_MBC[list(slide.members), 0]
    own_M = logits_MC[:, 0] if logits_MC.shape[1] == 1 else logits_MC[:, 1] - logits_MC[:, 0]
    return float(own_M.double().mean())
