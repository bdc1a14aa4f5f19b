"""A finished run and one slide -> a score for every tile, and the slide's probability as predictions.csv has it.

Two kinds of score, each of the members that held the slide out (what the report says of the slide is theirs too):

    attention   What the members looked at. Attention aggregators: the weight times the number of tiles, so that 1 is
                the average tile. Chowder: the tile score (of several classes the highest). Max: the share of features
                for which the tile holds the slide's maximum. Mean looks at all tiles alike: evidence takes its place.
    evidence    What the tile says: the member's log-odds of the target class for a slide that would be nothing but this
                tile (`Aggregator.tile_logits`); times the attention as above where there is attention. 0 = for neither
                side. Of two classes and with a linear head, the mean over the tiles is the slide's log-odds. Of other
                tasks, for a higher risk, value or grade (`Task.evidence`): 0 is the member's median training risk, its
                mean training target, or even odds at the cuts.

Two scales. raw: the mean over members of their scores. percentile: each member's scores become percentiles within the
slide (share of its other tiles that score lower; ties count half), then the mean over members.

Axes: M members, N tiles of the slide, D features, C classes, 2 = (x, y).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from scipy.special import logsumexp
from scipy.stats import rankdata
from torch import Tensor

from extract.config import ProblemsError, did_you_mean
from extract.features.cache import Header
from extract.features.checksums import BY_CHECKSUMS
from extract.features.folder import FeatureFolder, open_feature_folder
from extract.features.joined import join_folders
from extract.places import shown, with_places
from extract.stores.sessions import bring
from mil.aggregators.contract import Aggregator
from mil.results.tables import NEVER_HELD_OUT, mean_of_logits, p_columns, slides_table, to_probabilities
from mil.results.task_summary import ensemble, task_slides
from mil.results.trained import TrainedStudy, score_slide, wrong_number
from mil.study.units import by_slide
from mil.tasks.contract import Task
from mil.tasks.metrics import decide
from mil.training.bags import as_tensor
from mil.training.checks import kind_differences
from mil.training.inputs import changed_inputs

Kind = Literal["attention", "evidence"]
Scale = Literal["percentile", "raw"]

ROLE_IN_WORDS = {
    "train": "trained on it",
    "val": "was selected with it",
    "test": "held it out",
    "unused": "never saw it",
}
EVIDENCE_FLOATS = 1 << 25
"""Tiles are scored alone in blocks whose activations need about so many floats."""
IN_CACHE = 2**18
"""Numbers that are looked through at once: a copy of them stays within a processor's cache."""
AGREE, AGREE_MIXED = 2e-3, 0.03
"""Probabilities found again may differ so much from predictions.csv: another device, another order of sums; the second
for studies in mixed precision of earlier versions, which wrote them in bfloat16."""


class HeatmapError(ProblemsError):
    """What is wrong with the run, the slide or its features; nothing was written."""


def features_of(trained: TrainedStudy, folders: Sequence[Path] = (), layout: str = "auto") -> FeatureFolder:
    """The features that the run was trained on, or those in `folders`, joined as the run's were."""
    parts = trained.feature_parts
    if folders and len(folders) != len(parts):
        raise HeatmapError("features", [wrong_number(trained, len(folders))])
    opened = [(folder, layout) for folder in folders] or [
        (Path(with_places(part["folder"])), part["layout"]) for part in parts
    ]
    gone = [shown(folder) for folder, _ in opened if not bring(folder).is_dir()]
    if gone and not folders:
        problem = f"{', '.join(gone)}: the features of the run are not there; set features.folder=..."
        raise HeatmapError("features", [problem])
    return join_folders([open_feature_folder(*one) for one in opened], trained.join)


# --- who says what of a slide ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What is known of a slide as a whole.

    members: who is asked, their numbers in the plan. kind: "out-of-fold", "test ensemble", "member 3", ... p_C: the
    probabilities as predictions.csv gives them, None for a slide that it does not list. label: None when unknown.

    Of a task other than classification there are no p_C and predicted, but outputs_O, the mean of the members' outputs,
    and said, what they mean in words; label is the target in words.
    """

    members: tuple[int, ...]
    kind: str
    p_C: np.ndarray | None
    label: str | None
    predicted: str | None
    outputs_O: np.ndarray | None = None
    said: str | None = None


@dataclass(frozen=True)
class Verdicts:
    """Who is asked about a slide of a finished run, and what predictions.csv holds of it."""

    trained: TrainedStudy

    @cached_property
    def slides(self) -> pd.DataFrame:
        """What slides.csv holds, indexed by slide, the most wrong first; a patient's slides all say what is said of it
        where a bag is a patient."""
        trained = self.trained
        if trained.of_classes:
            table = slides_table(trained.predictions, trained.classes, trained.thresholds)
        else:
            table = task_slides(trained.task, trained.predictions)
            table = table.assign(error=trained.task.error(table), number=trained.task.one_number(table))
        return by_slide(table, trained.roles).set_index("slide", drop=False)

    def on(self, slide: str, member: int | None = None, *, elsewhere: bool = False) -> Verdict:
        """By default the members that held the slide out, so that nobody is asked who learned it.

        Args:
            member: this member alone, whatever the slide was to it.
            elsewhere: the slide need not be one of the run's: the ensemble of all members is asked.

        Raises:
            HeatmapError: no such slide or member.
        """
        everyone = tuple(range(self.trained.n_members))
        problems = []
        if member is not None and member not in everyone:
            problems.append(f"member={member}: expected one of 0..{len(everyone) - 1}")
        known = slide in self.slides.index
        if not known and not elsewhere:
            hint = did_you_mean(slide, self.slides.index.tolist())
            problems.append(
                f"slide={slide}: not one of the {len(self.slides)} slides of {self.trained.folder} (for a new slide "
                f"set features.folder=... to its features){hint}"
            )
        if problems:
            raise HeatmapError("cannot draw", problems)
        if not known:
            kind = "ensemble of all members" if member is None else f"member {member}"
            members = everyone if member is None else (member,)
            return Verdict(members, f"{kind}; not a slide of the study", None, None, None)
        return self._of_the_study(slide, member, everyone)

    def _of_the_study(self, slide: str, member: int | None, everyone: tuple[int, ...]) -> Verdict:
        row, predictions = self.slides.loc[slide], self.trained.predictions
        own = predictions[predictions["slide"] == self.trained.bag_of[slide]].sort_values("member")
        if member is not None:
            members: tuple[int, ...] = (member,)
            role = own["role"][own["member"] == member].iloc[0]
            kind = f"member {member}, which {ROLE_IN_WORDS[role]}"
        elif row["kind"] == NEVER_HELD_OUT:
            members, kind = everyone, "all members; never held out: some learned it"
        else:
            honest = own[own["role"] == "test"] if (own["role"] == "test").any() else own
            members, kind = tuple(honest["member"].tolist()), str(row["kind"])
        asked = own[own["member"].isin(members)]
        if not self.trained.of_classes:
            outputs = [f"output_{c}" for c in range(self.trained.aggregator.n_logits)]
            truth = self.trained.task.truth({str(key): value for key, value in row.items()}) or None
            outputs_O = asked[outputs].to_numpy(dtype=np.float64).mean(axis=0)
            said = in_words(self.trained.task, ensemble(self.trained.task, asked))
            return Verdict(members, kind, None, truth, None, outputs_O, said)
        table = mean_of_logits(asked, self.trained.classes, self.trained.thresholds)
        p_1C = table[p_columns(self.trained.classes)].to_numpy(dtype=np.float64)
        predicted = self.trained.classes[int(decide(p_1C, table["threshold"].to_numpy())[0])]
        return Verdict(members, kind, p_1C[0], None if pd.isna(row["label"]) else str(row["label"]), predicted)


def in_words(task: Task, table: pd.DataFrame) -> str:
    """What a table of one slide with the columns of `Task.columns` says."""
    row = task.for_reader(table).iloc[0]
    return task.said({str(key): value for key, value in row.items()})


# --- scores ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TileScores:
    """Scores of one slide's tiles, for every member that was asked.

    scores_MN: raw. name: what they are, in words for a picture. signed: 0 parts the target class from the others.
    verdict: with the probabilities of predictions.csv, or, for a slide that is not there, those found now.
    top_MN, bottom_MN: which tiles each member kept as extremes (Chowder); None for others.
    """

    slide: str
    name: str
    signed: bool
    scores_MN: np.ndarray
    verdict: Verdict
    target: str
    classes: tuple[str, ...]
    top_MN: np.ndarray | None = None
    bottom_MN: np.ndarray | None = None

    def of_slide(self, slide: str, rows: slice) -> TileScores:
        """Those of one slide of a patient, whose tiles are these rows of the bag."""
        marks = [None if one is None else one[:, rows] for one in (self.top_MN, self.bottom_MN)]
        scores_MN = self.scores_MN[:, rows]
        return replace(self, slide=slide, scores_MN=scores_MN, top_MN=marks[0], bottom_MN=marks[1])

    @property
    def short(self) -> str:
        """The name without what stands in brackets."""
        return self.name.partition(" (")[0]

    def scaled(self, scale: Scale) -> np.ndarray:
        """scores_N on the scale asked for, float64."""
        scaled_N: np.ndarray = (percentiles(self.scores_MN) if scale == "percentile" else self.scores_MN).mean(axis=0)
        return scaled_N


def percentiles(scores_MN: np.ndarray) -> np.ndarray:
    """Percent of the slide's other tiles that score lower, ties counting half; 50 for a slide of one tile."""
    n_tiles = scores_MN.shape[1]
    if n_tiles == 1:
        return np.full(scores_MN.shape, 50.0)
    percentile_MN: np.ndarray = (rankdata(scores_MN, axis=1) - 1) / (n_tiles - 1) * 100
    return percentile_MN


def score_slide_tiles(
    trained: TrainedStudy,
    slide: str,
    features: FeatureFolder,
    verdict: Verdict,
    kind: Kind = "attention",
    target: str | None = None,
    shown: Sequence[int] | None = None,
) -> TileScores:
    """`score_tiles` of a slide in `features`; where a bag is a patient, what its tiles score among all of the patient.

    Raises:
        HeatmapError: as `score_tiles`; CacheError: features of the slide, or of another of its patient, are not there.
    """
    bag = trained.bag_of.get(slide, slide)
    slides = trained.slides_of.get(bag, [slide])
    if len(slides) == 1:
        return score_tiles(trained, bag, features.features(slide), verdict, kind, target, shown, called=slide)
    for one in slides:
        check_same_kind(trained, features.header(one))
    views = [features.features(one) for one in slides]
    start = sum(len(view) for view in views[: slides.index(slide)])
    whole = score_tiles(trained, bag, np.concatenate(views), verdict, kind, target, shown)
    return whole.of_slide(slide, slice(start, start + len(views[slides.index(slide)])))


def score_tiles(
    trained: TrainedStudy,
    slide: str,
    features_ND: np.ndarray | Tensor,
    verdict: Verdict,
    kind: Kind = "attention",
    target: str | None = None,
    shown: Sequence[int] | None = None,
    called: str | None = None,
) -> TileScores:
    """Scores of all tiles by the members of the verdict.

    Args:
        slide: the bag's name in roles.csv; of a slide that the study does not know, its own. called: how it is shown.
        features_ND: as stored.
        target: the class that evidence speaks for; default: the positive class of two, the predicted one of several.
        shown: give the scores of these members, whoever the verdict is of; they and those of the verdict are asked.

    Raises:
        HeatmapError: the features are not those of the study, or give other probabilities than predictions.csv.
    """
    aggregator, classes, rows = trained.aggregator, trained.classes, list(verdict.members)
    tiles_TD = as_tensor(features_ND) if isinstance(features_ND, np.ndarray) else features_ND
    check_features_fit(trained, slide, tiles_TD)
    row = trained.row_of(slide)
    covariates_1V = trained.covariates_of(slide)
    if trained.covariates and covariates_1V is None:
        verdict = replace(verdict, kind=f"{verdict.kind}; covariates as of an average patient")
    asked_members = None if shown is None else sorted({*rows, *shown})
    with aggregator.of_site(row):
        how: dict[str, Any] = {"covariates_1V": covariates_1V, "members": asked_members}
        found = score_slide(trained, tiles_TD, with_scores=True, **how)
    assert found.scores_MT is not None
    verdict = settled(trained, slide, verdict, found.logits_MBC[rows, 0].double().numpy())
    asked = target
    if verdict.p_C is None:
        target = trained.task.speaks_for(asked)
    else:
        target = target or classes[-1 if len(classes) == 2 else int(verdict.p_C.argmax())]
    rows = rows if shown is None else list(shown)
    looked_MN = found.scores_MT[rows].double().numpy()
    marks = extremes(aggregator, looked_MN)
    by_attention = aggregator.score_name == "attention"
    alike = aggregator.score_name == "all alike"
    if kind == "attention" and not alike:
        name = "attention (1 = average tile)" if by_attention else aggregator.score_name
        scores_MN = looked_MN * len(tiles_TD) if by_attention else looked_MN
        return TileScores(called or slide, name, False, scores_MN, verdict, target, classes, *marks)
    with aggregator.of_site(row):
        logits_MNC = tile_logits(trained, tiles_TD, rows)
    if trained.of_classes:
        scores_MN = log_odds(logits_MNC, classes.index(target))
    else:
        scores_MN = task_evidence(trained, logits_MNC, rows, asked)
    if by_attention:
        scores_MN = scores_MN * looked_MN * len(tiles_TD)
    alone = {"classification": "log-odds", "ordinal": "log-odds", "survival": "SD from the training median"}
    what = alone.get(trained.task.name, f"{trained.task.config.unit or 'units'} from the training mean")
    name = f"attention x evidence for {target}" if by_attention else f"evidence for {target} ({what} of the tile alone)"
    return TileScores(called or slide, name, True, scores_MN, verdict, target, classes, *marks)


def task_evidence(trained: TrainedStudy, logits_MNC: np.ndarray, rows: Sequence[int], target: str | None) -> np.ndarray:
    """`Task.evidence` of each member by its own facts, (M, N)."""
    found = [
        trained.task.evidence(logits_NC, {name: values[m] for name, values in trained.facts.items()}, target)
        for m, logits_NC in zip(rows, logits_MNC, strict=True)
    ]
    return np.stack(found)


def check_features_fit(trained: TrainedStudy, slide: str, tiles_TD: Tensor) -> None:
    """Raise HeatmapError unless these can be features of the run's encoder."""
    if tiles_TD.ndim != 2 or not len(tiles_TD) or tiles_TD.shape[1] != trained.description.in_dim:
        expected = f"(tiles, {trained.description.in_dim}) with at least one tile"
        raise HeatmapError("features", [f"slide {slide!r}: expected features {expected}, got {tuple(tiles_TD.shape)}"])
    if not all_finite(tiles_TD):
        raise HeatmapError("features", [f"slide {slide!r}: features hold NaN or infinity"])


def all_finite(tiles_TD: Tensor) -> bool:
    """Whether there is neither NaN nor infinity; of half floats by their bits, which is ten times as fast on a CPU."""
    if tiles_TD.dtype != torch.float16 or tiles_TD.device.type != "cpu":
        return bool(torch.isfinite(tiles_TD).all())
    bits = tiles_TD.contiguous().numpy().view(np.int16).reshape(-1)
    parts = (bits[at : at + IN_CACHE] & 0x7FFF for at in range(0, len(bits), IN_CACHE))
    return all(int(part.max()) < 0x7C00 for part in parts)


def check_same_kind(trained: TrainedStudy, header: Header) -> None:
    """Raise HeatmapError where features say that they are of another kind than the run's."""
    problems = [
        f"{header.path}: {key} is {now!r}, the run was trained on {before!r}"
        for key, before, now in kind_differences(trained.description.features, header.provenance.same_kind())
    ]
    if problems:
        raise HeatmapError("features of another kind", problems)


def check_same_features(trained: TrainedStudy, slide: str, header: Header) -> None:
    """Raise HeatmapError where the checksums of a slide's features and coordinates are not those of the run's.

    Files without checksums may have been copied since, which changes their time: `settled` looks at what they give.
    """
    if header.identity.startswith(BY_CHECKSUMS):
        problems = changed_inputs(trained.folder, [(slide, header.identity)], BY_CHECKSUMS)
        if problems:
            raise HeatmapError("features changed", [f"{header.path}: {problem}" for problem in problems])


def settled(trained: TrainedStudy, slide: str, verdict: Verdict, logits_MC: np.ndarray) -> Verdict:
    """The verdict with its probabilities; refuses features that give others than predictions.csv."""
    if not np.isfinite(logits_MC).all():
        members = [m for m, logits_C in zip(verdict.members, logits_MC, strict=True) if not np.isfinite(logits_C).all()]
        listed = ", ".join(map(str, members))
        raise HeatmapError("no scores", [f"slide {slide!r}: member {listed} gives no numbers: its training diverged"])
    if trained.of_classes:
        now, before = to_probabilities(logits_MC.mean(axis=0, keepdims=True))[0], verdict.p_C
        settled_one = replace(verdict, p_C=now)
    else:
        now, before = logits_MC.mean(axis=0), verdict.outputs_O
        settled_one = replace(verdict, outputs_O=now, said=said_now(trained, verdict.members, logits_MC))
    if before is None:
        return settled_one
    coarse = "mixed" in trained.config.train.precision and trained.environment.get("evaluated_in") != "float32"
    agree = AGREE_MIXED if coarse else AGREE
    if not np.allclose(now, before, atol=agree, rtol=0 if trained.of_classes else agree):
        problem = (
            f"slide {slide!r}: the features give {np.round(now, 4).tolist()}, predictions.csv says "
            f"{np.round(before, 4).tolist()}; they are not the features that the run was trained and tested with"
        )
        raise HeatmapError("features changed", [problem])
    return verdict


def said_now(trained: TrainedStudy, members: Sequence[int], logits_MC: np.ndarray) -> str:
    """What these members' outputs for one slide mean on average, in words."""
    said = [
        trained.task.predicted(logits_C[None], {name: values[m] for name, values in trained.facts.items()})
        for m, logits_C in zip(members, logits_MC, strict=True)
    ]
    means = {name: [float(np.mean([one[name][0] for one in said]))] for name in trained.task.columns()}
    return in_words(trained.task, pd.DataFrame(means).assign(patient="this slide's"))


def tile_logits(trained: TrainedStudy, tiles_TD: Tensor, rows: Sequence[int]) -> np.ndarray:
    """`Aggregator.tile_logits` of some members, in blocks: (M, N, C) float64."""
    aggregator = trained.aggregator
    widest = max(stack.shape[-1] for stack in aggregator.stacks().values())
    block = max(256, EVIDENCE_FLOATS // (aggregator.n_members * widest))
    with torch.inference_mode():
        parts = [aggregator.tile_logits(part.to(trained.device).float())[rows].cpu() for part in tiles_TD.split(block)]
    return torch.cat(parts, dim=1).double().numpy()


def log_odds(logits_MNC: np.ndarray, target: int) -> np.ndarray:
    """Log-odds of one class against the rest, (M, N)."""
    if logits_MNC.shape[2] == 1:
        return logits_MNC[:, :, 0] * (1.0 if target == 1 else -1.0)
    rest = [c for c in range(logits_MNC.shape[2]) if c != target]
    odds_MN: np.ndarray = logits_MNC[:, :, target] - logsumexp(logits_MNC[:, :, rest], axis=2)
    return odds_MN


def extremes(aggregator: Aggregator, scores_MN: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Which tiles each member keeps, highest and lowest, for aggregators that keep n_top and n_bottom (M, N)."""
    sizes = getattr(aggregator, "n_top", 0), getattr(aggregator, "n_bottom", 0)
    if not any(sizes):
        return None, None
    order_MN = np.argsort(-scores_MN, axis=1, kind="stable")
    kept = []
    for size, order in zip(sizes, (order_MN, order_MN[:, ::-1]), strict=True):
        marks_MN = np.zeros(scores_MN.shape, dtype=bool)
        np.put_along_axis(marks_MN, order[:, :size], True, axis=1)
        kept.append(marks_MN)
    return kept[0], kept[1]


# --- where the tiles are ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Places:
    """Where a slide's tiles are.

    coords_N2: top-left corners, (x, y), in px of a frame: level-0 px of the slide, or, `frame` says so, DeepZoom px.
    tile_side: a tile's side in the same px. mpp: microns per px of the frame, None when unknown.
    """

    coords_N2: np.ndarray
    tile_side: float
    mpp: float | None
    frame: str = "level-0"


def places_of(
    features: FeatureFolder,
    slide: str,
    header: Header,
    *,
    slide_mpp: float | None = None,
    width_height: tuple[int, int] | None = None,
) -> Places:
    """Coordinates and tile side, in level-0 px where they can be known, else in DeepZoom px.

    Args:
        slide_mpp, width_height: of the slide file, where it is at hand.

    Raises:
        HeatmapError: the features have no coordinates.
    """
    provenance = header.provenance
    tile_um = provenance.tile_px * provenance.mpp
    side = provenance.tile_level0_px or (tile_um / slide_mpp if slide_mpp else 0.0)
    levels = None if width_height is None else int(np.ceil(np.log2(max(width_height)))) + 1
    coords_N2 = features.coords(slide, mpp=slide_mpp, tile_level0_px=side or None, deepzoom_levels=levels)
    if coords_N2 is None:
        return deepzoom_places(features, slide, header)
    side = side or smallest_step(coords_N2)
    return Places(coords_N2, side, slide_mpp or (tile_um / side if tile_um else None))


def deepzoom_places(features: FeatureFolder, slide: str, header: Header) -> Places:
    """Places in the tiles' own DeepZoom level, for features that come with no slide."""
    address_N3 = features.deepzoom(slide)
    if address_N3 is None:
        raise HeatmapError("no coordinates", [f"{header.path}: the features of slide {slide!r} have no coordinates"])
    if len(np.unique(address_N3[:, 0])) > 1:
        raise HeatmapError("no coordinates", [f"{header.path}: tiles of several DeepZoom levels need the slide file"])
    side = header.provenance.tile_px or 224
    return Places(address_N3[:, 1:] * side, float(side), header.provenance.mpp or None, "DeepZoom")


def smallest_step(coords_N2: np.ndarray) -> float:
    """The grid's step, taken for a tile's side where nobody says it (tiles that do not overlap)."""
    steps = [np.diff(np.unique(coords_N2[:, axis])) for axis in (0, 1)]
    steps = [step for step in steps if len(step)]
    if not steps:
        raise HeatmapError("tile size unknown", ["one tile, and the features do not say how large it is"])
    return float(np.concatenate(steps).min())
