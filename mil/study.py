"""The plan of a study: which members are trained, and which role every slide has for each of them.

Letters: M members, S slides of the cohort, P patients, C classes, K folds.

What selects (early stopping, best epoch, threshold) may look at `val`, what is reported is `test`, and within a
member a patient has one role. `make_plan` and `load_plan` refuse to return a plan for which that is not so.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from extract.cache import replace_on_success
from extract.cohort import Cohort
from extract.config import ProblemsError, did_you_mean
from mil.sites import blocks, deal_sites

ROLES = ("train", "val", "test", "unused")
TRAIN, VAL, TEST, UNUSED = range(4)

MEMBER_TYPES = {
    "member": "int64", "repeat": "int64", "fold": "int64", "seed": "int64", "init_seed": "int64",
    "lr": "float64", "weight_decay": "float64",
}  # fmt: skip
SLIDE_COLUMNS = ["slide", "patient", "label", "split"]

N_DRAWS = 200  # random partitions looked at; more than this gains little (patients are exact in the first already)
FOR_FOLDS, FOR_VAL = 1, 2  # leading word of a random stream; never 0, which SeedSequence cannot tell from nothing


class PlanError(ProblemsError):
    """The plan cannot be made, or a saved one does not fit the cohort."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Members and roles.

    `members`: one row a member, index 0..M-1; columns member (its number in the whole study), repeat, fold, seed (as
    the user gave it), init_seed (63 bits, what its parameters are drawn from), lr, weight_decay.
    `roles_MS`: int8, index into `ROLES`; slides in the cohort's order.
    """

    members: pd.DataFrame
    roles_MS: np.ndarray

    def __post_init__(self) -> None:
        if self.roles_MS.ndim != 2 or len(self.roles_MS) != len(self.members):
            raise ValueError(f"expected roles of {len(self.members)} members, got shape {self.roles_MS.shape}")

    def __len__(self) -> int:
        return len(self.members)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return self.members.equals(other.members) and np.array_equal(self.roles_MS, other.roles_MS)

    __hash__ = None  # type: ignore[assignment]

    def uses(self, role: str) -> np.ndarray:
        """Bool (M, S): where the slide has this role for the member."""
        if role not in ROLES:
            raise ValueError(f"expected one of {', '.join(ROLES)}, got {role!r}")
        return self.roles_MS == ROLES.index(role)

    def subset(self, member_indices: Sequence[int] | np.ndarray) -> Plan:
        """The members in these rows, which keep their number in column `member`."""
        rows = np.asarray(member_indices)
        return Plan(self.members.iloc[rows].reset_index(drop=True), self.roles_MS[rows])


@dataclass(frozen=True)
class Round:
    """The roles of one fold of one repeat, shared by its seeds."""

    repeat: int
    fold: int
    roles_S: np.ndarray

    @property
    def name(self) -> str:
        return f"repeat {self.repeat} fold {self.fold}"


# --- making a plan -------------------------------------------------------------------------------------------------


def make_plan(
    cohort: Cohort,
    *,
    folds: int = 5,
    repeats: int = 1,
    seeds: Sequence[int] = (0,),
    val_fraction: float = 0.0,
    folds_csv: Path | None = None,
    lr: float,
    weight_decay: float,
    split_seed: int = 0,
    dropped: Collection[str] = (),
    site_preserving: bool = False,
) -> Plan:
    """Members = repeats x folds x seeds, in this order, and the role of every slide for each.

    Slides of the official test split are `test` for every member. Unlabelled slides of the train split are `unused`.
    All others are `test` in one fold of a repeat and `train` (or `val`) in its other folds. Folds are grouped by
    patient and stratified by label, see `deal_folds`. They depend on `split_seed` and the repeat only: not on the
    order of the cohort's rows, and all seeds share them.

    A patient may have slides of several labels. They stay together, and the patient is stratified as its rarest label:
    the one that the fewest patients have (one tumour slide among normal ones makes a tumour patient where those are
    rare, which a majority would hide).

    Args:
        cohort: the slides.
        folds: K; 1 trains on the whole train split, once per repeat and seed, and needs a test split or `val_fraction`.
        repeats: how many times the folds are drawn anew.
        seeds: one member each, with its own initialisation; 0 is a seed.
        val_fraction: this part of each member's training patients becomes `val`, grouped and stratified too; at least
            one patient of each class on both sides.
        folds_csv: the user's own folds instead of drawn ones; `folds` and `repeats` are then taken from the file.
            Columns slide, fold and optionally repeat: the fold in which the slide is test. With a column role as well:
            the role (train, val, test, unused) of the slide in this fold, one row for each slide and fold.
        lr, weight_decay: of every member.
        split_seed: decides the folds and the inner split.
        dropped: slides taken out of the cohort on purpose, which `folds_csv` may still list.
        site_preserving: a site (the cohort's column) has one role per member too, see `mil.sites`.

    Raises:
        PlanError: all reasons why this cannot be done without a leak or a fold that cannot be trained or scored.
    """
    _raise_if("the study is set up wrongly", _argument_problems(folds, repeats, seeds, val_fraction, split_seed))
    problems = _split_problems(cohort)
    if site_preserving:
        problems += _site_problems(cohort, folds if folds_csv is None else 1)
    if folds_csv is None:
        problems += _size_problems(cohort, folds, val_fraction)
        _raise_if("the folds cannot be made", problems)
        rounds = _drawn_rounds(cohort, folds, repeats, split_seed, site_preserving)
        problems = _folds_without_a_class(rounds, cohort) if site_preserving and folds > 1 else []
        _raise_if("the folds cannot be made", problems)
    else:
        rounds, in_file = _given_rounds(folds_csv, cohort, dropped, val_fraction)
        _raise_if("the folds cannot be used", problems + in_file)
    if val_fraction > 0:
        rounds, problems = _with_val(rounds, cohort, val_fraction, split_seed, site_preserving)
    for part in rounds:
        problems += _class_problems(part, cohort, folds_csv)
    _raise_if("the folds cannot be used", problems)
    plan = _plan_of(rounds, seeds, lr, weight_decay)
    _refuse_leaks(plan, cohort)
    if site_preserving:
        _refuse_sites_on_two_sides(plan, cohort)
    return plan


def patients_with_two_roles(plan: Plan, cohort: Cohort) -> list[tuple[int, str, tuple[str, ...]]]:
    """(member, patient, its roles) wherever a patient has more than one role besides `unused`. Empty = no leak."""
    return _with_two_roles(plan, *_patients(cohort))


def _with_two_roles(plan: Plan, names_P: np.ndarray, index_S: np.ndarray) -> list[tuple[int, str, tuple[str, ...]]]:
    """(member, name, its roles) wherever the slides of a name have more than one role besides `unused`."""
    found = []
    for member, roles_S in zip(plan.members["member"], plan.roles_MS, strict=True):
        has_PR = np.zeros((len(names_P), len(ROLES)), dtype=bool)
        has_PR[index_S, roles_S] = True
        has_PR[:, UNUSED] = False
        for p in np.flatnonzero(has_PR.sum(axis=1) > 1):
            found.append((int(member), str(names_P[p]), tuple(ROLES[r] for r in np.flatnonzero(has_PR[p]))))
    return found


def init_seed(seed: int, repeat: int, fold: int) -> int:
    """63-bit seed of a member's parameters: the same whatever other members there are."""
    return int(np.random.SeedSequence([seed, repeat, fold]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _plan_of(rounds: Sequence[Round], seeds: Sequence[int], lr: float, weight_decay: float) -> Plan:
    rows = [
        (r.repeat, r.fold, seed, init_seed(seed, r.repeat, r.fold), lr, weight_decay) for r in rounds for seed in seeds
    ]
    members = pd.DataFrame(rows, columns=list(MEMBER_TYPES)[1:])
    members.insert(0, "member", np.arange(len(rows)))
    return Plan(members.astype(MEMBER_TYPES), np.stack([r.roles_S for r in rounds for _ in seeds]))


def _refuse_leaks(plan: Plan, cohort: Cohort) -> None:
    leaks = patients_with_two_roles(plan, cohort)
    lines = [f"member {member}: patient {patient!r} is in {' and '.join(roles)}" for member, patient, roles in leaks]
    _raise_if("patients with more than one role", at_most(lines))


# --- drawing folds -------------------------------------------------------------------------------------------------


def deal_folds(patient_S: np.ndarray, label_S: np.ndarray, n_folds: int, rng: np.random.Generator) -> np.ndarray:
    """The fold (0..K-1) of every slide, int64; slides of a patient are in the same fold.

    Exact in patients: the number of patients of a class differs by at most one between folds, and so does the number
    of all patients. Among such partitions the one whose folds have the most equal number of slides of each class is
    taken, out of `N_DRAWS` random ones. (scikit-learn's StratifiedGroupKFold balances slides greedily and patients not
    at all: with 40 patients of very unequal size, folds without a positive patient are common.)

    Args:
        patient_S: patient of each slide, anything that can be sorted.
        label_S: class index of each slide, 0 or more.
    """
    counts_PC, patient_S = _slides_per_patient(patient_S, label_S)
    stratum_P = _stratum(counts_PC)
    total_C = np.maximum(counts_PC.sum(axis=0), 1)
    best = (np.inf, np.inf)  # (classes missing somewhere, imbalance of slides)
    for _ in range(_n_draws(counts_PC, stratum_P)):
        order_P = np.lexsort((rng.random(len(stratum_P)), stratum_P))  # stratum by stratum, shuffled within
        fold_P = np.empty(len(order_P), dtype=np.int64)
        fold_P[order_P] = rng.permutation(n_folds)[np.arange(len(order_P)) % n_folds]
        counts_KC = np.zeros((n_folds, counts_PC.shape[1]))
        np.add.at(counts_KC, fold_P, counts_PC)
        cost = (int((counts_KC[:, counts_PC.any(axis=0)] == 0).sum()), _imbalance(counts_KC / total_C, 1 / n_folds))
        if cost < best:
            best, best_P = cost, fold_P
    return best_P[patient_S]


def deal_slides(
    cohort: Cohort, which_S: np.ndarray, n_folds: int, rng: np.random.Generator, *, site_preserving: bool
) -> np.ndarray:
    """The fold of each of these slides: by patient (`deal_folds`), or by site (`mil.sites.deal_sites`)."""
    patient_S, label_S = _patients(cohort)[1][which_S], cohort.labels_S[which_S]
    if not site_preserving:
        return deal_folds(patient_S, label_S, n_folds, rng)
    return deal_sites(patient_S, _sites(cohort)[1][which_S], label_S, np.full(n_folds, 1 / n_folds), rng)


def hold_out(patient_S: np.ndarray, label_S: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Bool (S,): the slides of about this fraction of the patients of each class, at least one and not all of them.

    Drawn like `deal_folds`. Where patients have slides of several labels it is possible that no draw has every class
    on both sides; the caller checks.
    """
    counts_PC, patient_S = _slides_per_patient(patient_S, label_S)
    stratum_P = _stratum(counts_PC)
    n_C = np.bincount(stratum_P, minlength=counts_PC.shape[1])
    held_C = np.where(n_C >= 2, np.clip(np.rint(fraction * n_C), 1, np.maximum(n_C - 1, 1)), 0)
    first_C = np.cumsum(n_C) - n_C
    total_C = np.maximum(counts_PC.sum(axis=0), 1)
    best = (np.inf, np.inf)  # (classes missing somewhere, imbalance of slides)
    for _ in range(_n_draws(counts_PC, stratum_P)):
        order_P = np.lexsort((rng.random(len(stratum_P)), stratum_P))
        rank_P = np.empty(len(order_P), dtype=np.int64)  # place of the patient within its stratum
        rank_P[order_P] = np.arange(len(order_P)) - first_C[stratum_P[order_P]]
        held_P = rank_P < held_C[stratum_P]
        sides_2C = np.stack([counts_PC[held_P].sum(axis=0), counts_PC[~held_P].sum(axis=0)])
        cost = (int((sides_2C[:, counts_PC.any(axis=0)] == 0).sum()), _imbalance(sides_2C[0] / total_C, fraction))
        if cost < best:
            best, best_P = cost, held_P
    return best_P[patient_S]


def stratified_order(patient_S: np.ndarray, label_S: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Place (0, 1, ...) of each slide's patient in a random order of which every beginning is stratified.

    The first patients are one of each class, the largest class first; from then on the next is of the class that has
    the fewest compared with its share.
    """
    counts_PC, patient_S = _slides_per_patient(patient_S, label_S)
    stratum_P = _stratum(counts_PC)
    waiting = [rng.permutation(np.flatnonzero(stratum_P == c)).tolist() for c in range(counts_PC.shape[1])]
    share_C = np.array([len(patients) for patients in waiting]) / len(stratum_P)
    taken_C, place_P = np.zeros(len(waiting)), np.empty(len(stratum_P), dtype=np.int64)
    for place in range(len(stratum_P)):
        left_C = np.array([len(patients) > 0 for patients in waiting])
        first_C = left_C & (taken_C == 0)
        behind_C = share_C * (place + 1) - taken_C
        c = int(np.where(first_C if first_C.any() else left_C, behind_C, -np.inf).argmax())
        place_P[waiting[c].pop()] = place
        taken_C[c] += 1
    return place_P[patient_S]


def _slides_per_patient(patient_S: np.ndarray, label_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`counts_PC`, slides of each class that each patient has, and the patient index of each slide."""
    patients, index_S = np.unique(patient_S, return_inverse=True)
    counts_PC = np.zeros((len(patients), int(label_S.max()) + 1), dtype=np.int64)
    np.add.at(counts_PC, (index_S, label_S), 1)
    return counts_PC, index_S


def _stratum(counts_PC: np.ndarray) -> np.ndarray:
    """The rarest class of every patient, counted in patients; of equally rare ones the last."""
    has_PC = counts_PC > 0
    rarest_first_C = np.lexsort((-np.arange(has_PC.shape[1]), has_PC.sum(axis=0)))
    return rarest_first_C[np.argmax(has_PC[:, rarest_first_C], axis=1)]


def _n_draws(counts_PC: np.ndarray, stratum_P: np.ndarray) -> int:
    """One is enough when the patients of a stratum are alike: every draw is then equally balanced."""
    kinds = np.unique(np.column_stack([stratum_P, counts_PC]), axis=0)
    return 1 if len(kinds) == len(np.unique(stratum_P)) else N_DRAWS


def _imbalance(share: np.ndarray, wanted: float) -> float:
    return float(((share - wanted) ** 2).sum())


def _drawn_rounds(
    cohort: Cohort, folds: int, repeats: int, split_seed: int, site_preserving: bool = False
) -> list[Round]:
    free_S, rounds = _free(cohort), []
    for repeat in range(repeats):
        rng = np.random.default_rng([FOR_FOLDS, split_seed, repeat])
        fold_S = np.full(len(cohort), -1)  # with one fold nothing is held out
        if folds > 1:
            fold_S[free_S] = deal_slides(cohort, free_S, folds, rng, site_preserving=site_preserving)
        for fold in range(folds):
            roles_S = _fixed_roles(cohort)
            roles_S[free_S] = np.where(fold_S[free_S] == fold, TEST, TRAIN)
            rounds.append(Round(repeat, fold, roles_S))
    return rounds


def _with_val(
    rounds: Sequence[Round], cohort: Cohort, val_fraction: float, split_seed: int, site_preserving: bool = False
) -> tuple[list[Round], list[str]]:
    """The rounds with part of `train` turned into `val`, and where that is not possible."""
    patient_S, labels_S, problems, done = _patients(cohort)[1], cohort.labels_S, [], []
    for part in rounds:
        train_S = np.flatnonzero(part.roles_S == TRAIN)
        if not len(train_S):  # reported by _class_problems
            done.append(part)
            continue
        rng = np.random.default_rng([FOR_VAL, split_seed, part.repeat, part.fold])
        if site_preserving:
            sides_2 = np.array([val_fraction, 1 - val_fraction])
            group_S, noun = _sites(cohort)[1], "site"
            held_S = deal_sites(patient_S[train_S], group_S[train_S], labels_S[train_S], sides_2, rng) == 0
        else:
            group_S, noun = patient_S, "patient"
            held_S = hold_out(patient_S[train_S], labels_S[train_S], val_fraction, rng)
        roles_S = part.roles_S.copy()
        roles_S[train_S[held_S]] = VAL
        done.append(Round(part.repeat, part.fold, roles_S))
        for c in np.unique(labels_S[train_S]):
            here_S = labels_S[train_S] == c
            if not (here_S & held_S).any() or not (here_S & ~held_S).any():
                n = count(len(np.unique(group_S[train_S][here_S])), noun)
                problems.append(
                    f"{part.name}: class {cohort.classes[c]!r} has {n} to train with, too few for both sides of the "
                    f"inner split: use more {noun}s of this class, or study.val_fraction=0 with train.select=last"
                )
    return done, at_most(problems)


# --- folds from a file ---------------------------------------------------------------------------------------------


def _given_rounds(
    path: Path, cohort: Cohort, dropped: Collection[str], val_fraction: float
) -> tuple[list[Round], list[str]]:
    """The rounds of the user's file and everything that is wrong with it."""
    table, problems = _read_folds(path)
    row_of = {slide: row for row, slide in enumerate(cohort.table["slide"])}
    problems += _unknown_slides(path, table, row_of, dropped)
    table = table[table["slide"].isin(list(row_of))]
    table = table.assign(row=table["slide"].map(row_of).astype("int64"))
    problems += _misplaced_slides(path, table, cohort)
    table = table[table["fold"] >= 0]
    rounds, more = (_rounds_from_roles if "role" in table else _rounds_from_folds)(path, table, cohort)
    problems += more
    if val_fraction > 0 and any((r.roles_S == VAL).any() for r in rounds if "role" in table):
        problems.append(f"{path} has role val already: expected study.val_fraction=0, got {val_fraction:g}")
    if not rounds:
        return rounds, [*problems, f"{path}: no usable fold in it"]
    draft = _plan_of(rounds, [0], 1.0, 0.0)
    leaks = [
        f"{path}: {rounds[member].name}: patient {patient!r} is in {' and '.join(roles)}"
        for member, patient, roles in patients_with_two_roles(draft, cohort)
    ]
    return rounds, problems + at_most(leaks)


def _unknown_slides(path: Path, table: pd.DataFrame, row_of: dict[str, int], dropped: Collection[str]) -> list[str]:
    unknown = [s for s in dict.fromkeys(table["slide"]) if s not in row_of and s not in dropped]
    if not unknown:
        return []
    hint = did_you_mean(unknown[0], list(row_of))
    return [f"{path}: {count(len(unknown), 'slide')} not in the cohort: {name_some(unknown)}{hint}"]


def _misplaced_slides(path: Path, table: pd.DataFrame, cohort: Cohort) -> list[str]:
    """Slides of the official test split that the file wants elsewhere. A blank fold is right for them."""
    elsewhere = ~table["role"].isin(["test", ""]) if "role" in table else table["fold"] >= 0
    wrong = table["slide"][_official(cohort)[table["row"]] & elsewhere].unique()
    if not len(wrong):
        return []
    return [
        f"{path}: slides of the cohort's test split are test for every fold, the file cannot place them: "
        f"{name_some(wrong)}. Take them out of the file, or empty their split in the cohort"
    ]


def _read_folds(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Columns slide, repeat, fold (-1 = blank) and, if the file has it, role; and what could not be read."""
    try:
        raw = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise PlanError("the folds cannot be read", [f"{path}: {error}"]) from None
    raw.columns = [str(c).strip() for c in raw.columns]
    known = ["slide", "fold", "repeat", "role"]
    absent = [name for name in known if name not in raw.columns]
    unread = [c for c in raw.columns if c not in known and difflib.get_close_matches(c.lower(), absent, cutoff=0.75)]
    problems = [f"{path}: column {c!r} is not read{did_you_mean(c.lower(), absent)}" for c in unread]
    problems += [
        f"{path}: no column {name!r}; it has {', '.join(raw.columns)}" for name in absent if name in ("slide", "fold")
    ]
    _raise_if("the folds cannot be read", problems)
    table = pd.DataFrame({"slide": raw["slide"].str.strip()})
    for name in ("repeat", "fold"):
        text = raw[name].str.strip().str.removesuffix(".0") if name in raw else pd.Series("0", index=raw.index)
        blank = (text == "") & (name == "fold")
        bad = ~text.str.fullmatch(r"\d{1,9}") & ~blank
        problems += _bad_cells(path, text[bad], f"{name} {{}}, expected a whole number from 0")
        table[name] = pd.to_numeric(text.mask(bad | blank, "-1")).astype("int64")
    if "role" in raw:
        table["role"] = raw["role"].str.strip().str.lower()
        bad = ~table["role"].isin(ROLES) & (table["fold"] >= 0)
        problems += _bad_cells(path, table["role"][bad], f"role {{}}, expected one of {', '.join(ROLES)}")
        table = table[~bad]
    return table[table["repeat"] >= 0], problems


def _bad_cells(path: Path, cells: pd.Series, what: str) -> list[str]:
    pairs = zip(cells.index.tolist(), cells.tolist(), strict=True)
    return at_most([f"{path}: row {row + 2}: {what.format(repr(cell))}" for row, cell in pairs])


def _rounds_from_folds(path: Path, table: pd.DataFrame, cohort: Cohort) -> tuple[list[Round], list[str]]:
    """Each slide is test in its fold and train in the repeat's others."""
    free_S, rounds, problems = _free(cohort), [], []
    for repeat in sorted(table["repeat"].unique().tolist()):
        rows = table[table["repeat"] == repeat]
        problems += _row_problems(f"{path}: repeat {repeat}", rows, cohort)
        fold_S = np.full(len(cohort), -1)
        fold_S[rows["row"]] = rows["fold"]
        names = np.unique(fold_S[free_S & (fold_S >= 0)])
        if len(names) < 2:
            problems.append(f"{path}: repeat {repeat}: expected at least two folds, got {len(names)}")
        for fold in names:
            roles_S = _fixed_roles(cohort)
            listed_S = free_S & (fold_S >= 0)
            roles_S[listed_S] = np.where(fold_S[listed_S] == fold, TEST, TRAIN)
            rounds.append(Round(repeat, int(fold), roles_S))
    return rounds, problems


def _rounds_from_roles(path: Path, table: pd.DataFrame, cohort: Cohort) -> tuple[list[Round], list[str]]:
    """Each row gives a slide's role in one fold."""
    official_S, labels_S, rounds, problems = _official(cohort), cohort.labels_S, [], []
    for repeat, fold in sorted(set(zip(table["repeat"].tolist(), table["fold"].tolist(), strict=True))):
        rows = table[(table["repeat"] == repeat) & (table["fold"] == fold)]
        part = Round(repeat, fold, _fixed_roles(cohort))
        problems += _row_problems(f"{path}: {part.name}", rows, cohort)
        mine = rows[~official_S[rows["row"]]]
        role_R = mine["role"].map(ROLES.index).to_numpy(dtype=np.int8)
        unlabelled = mine["slide"][(labels_S[mine["row"]] < 0) & np.isin(role_R, [TRAIN, VAL])]
        if len(unlabelled):
            problems.append(f"{path}: {part.name}: unlabelled slides cannot be train or val: {name_some(unlabelled)}")
        part.roles_S[mine["row"]] = role_R
        rounds.append(part)
    return rounds, problems


def _row_problems(where: str, rows: pd.DataFrame, cohort: Cohort) -> list[str]:
    """Slides that are listed twice, or not at all though they have a label and no official role."""
    problems = []
    twice = rows["slide"][rows["slide"].duplicated()].unique()
    if len(twice):
        problems.append(f"{where}: listed more than once: {name_some(twice)}")
    listed_S = np.zeros(len(cohort), dtype=bool)
    listed_S[rows["row"]] = True
    absent = cohort.table["slide"][_free(cohort) & ~listed_S]
    if len(absent):
        problems.append(f"{where}: {count(len(absent), 'slide')} of the cohort not listed: {name_some(absent)}")
    return problems


# --- what can be wrong ---------------------------------------------------------------------------------------------


def _argument_problems(
    folds: int, repeats: int, seeds: Sequence[int], val_fraction: float, split_seed: int
) -> list[str]:
    problems = []
    if folds < 1:
        problems.append(f"study.folds={folds}: expected 1 (no cross-validation) or more")
    if repeats < 1:
        problems.append(f"study.repeats={repeats}: expected 1 or more")
    if not seeds:
        problems.append("study.seeds is empty: expected at least one seed, for example [0]")
    if len(set(seeds)) < len(seeds):
        problems.append(f"study.seeds={list(seeds)}: a seed occurs twice, its members would be copies")
    problems += [f"seed {s}: expected 0 to {2**32 - 1}" for s in [*seeds, split_seed] if not 0 <= s < 2**32]
    if not 0 <= val_fraction < 1:
        problems.append(f"study.val_fraction={val_fraction:g}: expected 0 or more and less than 1")
    return problems


def _split_problems(cohort: Cohort) -> list[str]:
    both = patients_in_both_splits(cohort)
    if not both:
        return []
    return [
        f"{count(len(both), 'patient')} with slides in the official train and test split: {name_some(both)}. "
        "Correct the cohort's split column"
    ]


def patients_in_both_splits(cohort: Cohort) -> list[str]:
    """Patients with slides in the official train and in the official test split."""
    n_splits = cohort.table.groupby("patient")["split"].nunique()
    return [str(patient) for patient in n_splits.index[n_splits > 1]]


def _size_problems(cohort: Cohort, folds: int, val_fraction: float) -> list[str]:
    """Too few classes, patients of a class, or nothing to report on."""
    free_S, labels_S, patient_S = _free(cohort), cohort.labels_S, _patients(cohort)[1]
    present = np.unique(labels_S[free_S])
    if len(present) < 2:
        got = f"only {cohort.classes[present[0]]!r}" if len(present) else "no labelled slide"
        return [f"training needs slides of at least two classes outside the test split, got {got}"]
    problems = []
    for c in present:
        n = len(np.unique(patient_S[free_S & (labels_S == c)]))
        if n < folds:
            what_to_do = f"use study.folds={n} or fewer" if n > 1 else "add patients"
            problems.append(
                f"class {cohort.classes[c]!r} has {count(n, 'patient')} outside the test split, but "
                f"study.folds={folds} needs {folds}, one in every fold: {what_to_do}, or leave the class out"
            )
    if folds == 1 and not _official(cohort).any() and val_fraction == 0:
        problems.append(
            "study.folds=1 trains on every slide and the cohort has no test split, so nothing is left to report on: "
            "use study.folds=5, mark test slides in the split column, or set study.val_fraction"
        )
    return problems


def _class_problems(part: Round, cohort: Cohort, folds_csv: Path | None) -> list[str]:
    """Why this round could not be trained or scored: a class that is not trained, a one-class test or val."""
    labels_S, problems = cohort.labels_S, []
    official_S = _official(cohort)
    what_to_do = f"change {folds_csv}" if folds_csv else "use fewer study.folds or another seed"
    untrained = np.setdiff1d(labels_S[labels_S >= 0], labels_S[part.roles_S == TRAIN])
    if len(untrained):
        names = [cohort.classes[c] for c in untrained]
        problems.append(f"{part.name}: no training slide of class {name_some(names)}: {what_to_do}, or leave it out")
    for role in (VAL, TEST):
        here_S = (part.roles_S == role) & (labels_S >= 0) & ~official_S
        if here_S.any() and len(np.unique(labels_S[here_S])) == 1:
            n, only = count(int(here_S.sum()), "slide"), cohort.classes[labels_S[here_S][0]]
            problems.append(
                f"{part.name}: {ROLES[role]} has one class only ({n} of {only!r}), its AUC is undefined: {what_to_do}"
            )
    if not np.isin(part.roles_S, [VAL, TEST]).any():
        problems.append(f"{part.name}: no slide is val or test, so nothing is left to report on: {what_to_do}")
    return problems


# --- sites ----------------------------------------------------------------------------------------------------------


def sites_with_two_roles(plan: Plan, cohort: Cohort) -> list[tuple[int, str, tuple[str, ...]]]:
    """(member, site, its roles) wherever a site has more than one role besides `unused`. Empty = site-preserving."""
    return _with_two_roles(plan, *_sites(cohort))


def notes_on_sites(cohort: Cohort, site_preserving: bool) -> list[str]:
    """What a reader of the report should know about the cohort's sites, if it says any."""
    if "site" not in cohort.table:
        return []
    table = cohort.table[_free(cohort)]
    notes = []
    n_sites = table["site"].nunique()
    if site_preserving:
        notes.append(f"site-preserving folds: each of the {count(n_sites, 'site')} is on one side of every member")
    elif n_sites > 1:
        notes.append(
            f"slides come from {n_sites} sites, and folds mix them: what a network learns about a site's stain or "
            "scanner counts as success. study.site_preserving=true keeps sites apart"
        )
    if n_sites > 1 and table.groupby("site")["label"].nunique().max() == 1:
        notes.append(
            "every site has slides of one class only, so site and class cannot be told apart. Tissue source site codes "
            "of TCGA are given anew in every project: one hospital has one code for its LUAD and another for its LUSC "
            "slides. To keep hospitals whole, put their names into a column (columns.site)"
        )
    return notes


def _site_problems(cohort: Cohort, folds: int) -> list[str]:
    """Why folds that preserve sites are impossible."""
    if "site" not in cohort.table:
        return [
            "study.site_preserving=true needs the site of every slide, and the cohort has none: name the CSV's column "
            "with columns.site, or take it from TCGA barcodes with columns.site=tcga"
        ]
    free_S, site_S = _free(cohort), cohort.table["site"].to_numpy(dtype=str)
    relevant_S = free_S | _official(cohort)
    blank = cohort.table["slide"][relevant_S & (site_S == "")]
    if len(blank):
        return [f"study.site_preserving=true: {count(len(blank), 'slide')} without a site: {name_some(blank)}"]
    problems = []
    both = np.intersect1d(site_S[free_S], site_S[_official(cohort)])
    if len(both):
        problems.append(
            f"study.site_preserving=true is impossible: {count(len(both), 'site')} with slides in the official train "
            f"and test split: {name_some(both)}. Change the cohort's split column, or set study.site_preserving=false"
        )
    block_S = blocks(_patients(cohort)[1][free_S], site_S[free_S]) if free_S.any() else np.array([], dtype=np.int64)
    labels_S, n_sites = cohort.labels_S[free_S], len(np.unique(site_S[free_S]))
    for c in np.unique(labels_S):
        n = len(np.unique(block_S[labels_S == c]))
        if n < folds:
            joined = " (sites that share a patient count as one)" if n_sites > block_S.max() + 1 else ""
            what_to_do = f"use study.folds={n} or fewer" if n > 1 else "no folds are possible with this class"
            problems.append(
                f"study.site_preserving=true is impossible: class {cohort.classes[c]!r} comes from {count(n, 'site')}"
                f"{joined}, but study.folds={folds} needs {folds}, one in every fold: {what_to_do}, or set "
                "study.site_preserving=false"
            )
    return problems


def _folds_without_a_class(rounds: Sequence[Round], cohort: Cohort) -> list[str]:
    """Where whole sites cannot give every fold all classes."""
    labels_S = cohort.labels_S
    everyone = np.unique(labels_S[_free(cohort)])
    problems = []
    for part in rounds:
        absent = np.setdiff1d(everyone, labels_S[(part.roles_S == TEST) & _free(cohort)])
        if len(absent):
            problems.append(
                f"{part.name}: no slide of class {name_some(cohort.classes[c] for c in absent)}: no division of the "
                "sites was found that has every class in every fold: use fewer study.folds, or "
                "study.site_preserving=false"
            )
    return at_most(problems)


def _refuse_sites_on_two_sides(plan: Plan, cohort: Cohort) -> None:
    leaks = sites_with_two_roles(plan, cohort)
    found = [f"member {member}: site {site!r} is in {' and '.join(roles)}" for member, site, roles in leaks]
    _raise_if("study.site_preserving=true, but sites with more than one role", at_most(found))


# --- saving and reading back ---------------------------------------------------------------------------------------


def save_plan(plan: Plan, cohort: Cohort, folder: Path) -> None:
    """Write plan.csv (the members) and roles.csv (a row a slide, a column m0, m1, ... a member, roles by name)."""
    names = np.array(ROLES)[plan.roles_MS]
    columns = {f"m{member}": names[i] for i, member in enumerate(plan.members["member"])}
    site = ["site"] if "site" in cohort.table else []
    roles = pd.concat([cohort.table[SLIDE_COLUMNS + site], pd.DataFrame(columns, index=cohort.table.index)], axis=1)
    for name, table in (("plan.csv", plan.members), ("roles.csv", roles)):
        with replace_on_success(folder / name) as temporary:
            table.to_csv(temporary, index=False)


def load_plan(folder: Path, cohort: Cohort) -> Plan:
    """The plan that `save_plan` wrote, for the same slides in the cohort's order, whatever the order in the file.

    Raises:
        PlanError: files missing or damaged; a slide, patient, label or split differs from the cohort; a leak.
    """
    members = _read_table(folder / "plan.csv", list(MEMBER_TYPES))
    try:
        members = members.astype(MEMBER_TYPES)
    except ValueError as error:
        raise PlanError("the saved plan cannot be read", [f"{folder / 'plan.csv'}: {error}"]) from None
    columns = [f"m{member}" for member in members["member"]]
    roles = _read_table(folder / "roles.csv", [*SLIDE_COLUMNS, *columns])
    _raise_if(f"the plan saved in {folder} is not for this cohort", _mismatches(roles, cohort))
    roles = roles.set_index("slide").loc[cohort.table["slide"].tolist(), columns]
    unknown = sorted(set(roles.to_numpy().ravel()) - set(ROLES))
    _raise_if("the saved plan cannot be read", [f"{folder / 'roles.csv'}: {r!r} is not a role" for r in unknown])
    roles_MS = np.stack([roles[c].map(ROLES.index).to_numpy(dtype=np.int8) for c in columns])
    plan = Plan(members, roles_MS)
    _refuse_leaks(plan, cohort)
    return plan


def _read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """The file's columns as text: numbers are converted from it without a loss."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise PlanError("the saved plan cannot be read", [f"{path}: {error}"]) from None
    absent = [c for c in columns if c not in table.columns]
    _raise_if("the saved plan cannot be read", [f"{path}: no column {name_some(absent)}"] if absent else [])
    if table.empty:
        raise PlanError("the saved plan cannot be read", [f"{path}: no rows"])
    return table


def _mismatches(roles: pd.DataFrame, cohort: Cohort) -> list[str]:
    """How the slides of roles.csv differ from the cohort's."""
    saved, now = set(roles["slide"]), set(cohort.table["slide"])
    problems = []
    if len(saved) < len(roles):
        problems.append(f"slides listed twice: {name_some(roles['slide'][roles['slide'].duplicated()])}")
    if saved - now:
        problems.append(f"in the plan but not in the cohort: {name_some(sorted(saved - now))}")
    if now - saved:
        problems.append(f"in the cohort but not in the plan: {name_some(sorted(now - saved))}")
    if problems:
        return problems
    before = roles.set_index("slide").loc[cohort.table["slide"].tolist()]
    for name in SLIDE_COLUMNS[1:]:
        is_now = ["" if value is None else str(value) for value in cohort.table[name]]
        pairs = zip(before.index, before[name], is_now, strict=True)
        problems += at_most([f"slide {s!r}: {name} was {old!r} and is {new!r}" for s, old, new in pairs if old != new])
    return problems


# --- small helpers -------------------------------------------------------------------------------------------------


def name_some(names: Iterable[object], limit: int = 5) -> str:
    """`'a', 'b', 'c' and 37 more`."""
    listed = [repr(str(n)) for n in names]
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def at_most(lines: Sequence[str], limit: int = 20) -> list[str]:
    """The first lines, and how many more there are."""
    more = [f"... and {len(lines) - limit} more"] if len(lines) > limit else []
    return [*lines[:limit], *more]


def count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _raise_if(title: str, problems: Sequence[str]) -> None:
    if problems:
        raise PlanError(title, problems)


def _official(cohort: Cohort) -> np.ndarray:
    """Bool (S,): slides of the official test split."""
    return (cohort.table["split"] == "test").to_numpy()


def _free(cohort: Cohort) -> np.ndarray:
    """Bool (S,): slides whose role the study decides: labelled, not of the official test split."""
    return ~_official(cohort) & (cohort.labels_S >= 0)


def _fixed_roles(cohort: Cohort) -> np.ndarray:
    """int8 (S,): test for the official test split, else unused until something else is decided."""
    return np.where(_official(cohort), TEST, UNUSED).astype(np.int8)


def _patients(cohort: Cohort) -> tuple[np.ndarray, np.ndarray]:
    """The patients' names in alphabetical order, and the index into them of every slide."""
    return np.unique(np.array(cohort.table["patient"].tolist(), dtype=str), return_inverse=True)


def _sites(cohort: Cohort) -> tuple[np.ndarray, np.ndarray]:
    """The sites' names in alphabetical order, and the index into them of every slide."""
    return np.unique(np.array(cohort.table["site"].tolist(), dtype=str), return_inverse=True)
