"""The model card and the checklists: numbered as published, answered from the run, open where it cannot know."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from sklearn.metrics import recall_score

from extract.encoders.table import ENCODERS
from mil.report.checklists import (
    CARD,
    CLAIM,
    OPEN,
    TRIPOD_AI,
    Entry,
    card_markdown,
    checklists_markdown,
    filled_in,
    model_card,
)
from mil.report.facts import Facts, dropped, limits, read_facts
from mil.results.summary import summarise

CONFIG = {
    "study": {"val_fraction": 0.2, "nested": 0, "seeds": [0], "site_preserving": False},
    "model": {"name": ["abmil", "chowder"], "hidden": 64, "chowder": {"n_top": 5}},
    "train": {
        **{"optimizer": "adam", "batch_size": 16, "schedule": "constant", "precision": "32-true", "select": "last"},
        **{"metric": "auc", "class_weights": "none", "standardize": False, "chowder": {"standardize": True}},
    },
}
FEATURES = {"encoder": "phikon", "weights_sha256": "ab" * 32, "tile_px": 224, "mpp": 0.5, "overlap_px": 0}
ENVIRONMENT = {
    **{"slide-mil": "0.1.0", "python": "3.11.7", "versions": {"torch": "2.9"}, "aggregator": "abmil"},
    **{"command": "python -m mil.train", "features": FEATURES | {"dim": 768, "dtype": "float16"}},
}


@pytest.fixture(scope="module")
def reports(script):
    return script(Path(__file__).with_name("test_report.py"))


@pytest.fixture(scope="module")
def study(reports):
    return reports.make_study(repeats=2)


@pytest.fixture(scope="module")
def facts(reports, study) -> Facts:
    metrics = summarise(study[0], study[1], reports.TWO, bootstrap=20)
    return read_facts(metrics, yaml.safe_dump(CONFIG), ENVIRONMENT, ["2 slides dropped: a, b"])


def test_what_weakens_a_study_is_a_limit_and_not_left_out(facts):
    weak = replace(facts, notes=["slides come from 3 sites, and folds mix them", "2 slides dropped: a, b"])
    assert dropped(weak) == "2 slides dropped: a, b."
    assert "Slides come from 3 sites" in limits(weak)
    assert "dropped" not in limits(weak)


def answers(facts: Facts, which: int) -> dict[str, Entry]:
    return {entry.number: entry for entry in filled_in(facts)[which].entries}


def with_setting(facts: Facts, section: str, **values) -> Facts:
    return replace(facts, config={**facts.config, section: {**facts.config[section], **values}})


# --- the lists -------------------------------------------------------------------------------------------------------


def test_items_are_numbered_as_published():
    """Collins et al. 2024, table 2: 27 items of 52 parts; Tejani et al. 2024: 44 items."""
    parts = {
        3: "abc",
        5: "ab",
        6: "abc",
        8: "abc",
        9: "abc",
        12: "abcdefg",
        18: "abcdef",
        20: "abc",
        23: "ab",
        27: "abc",
    }
    expected = [f"{number}{part}" for number in range(1, 28) for part in parts.get(number, [""])]
    assert [item.number for item in TRIPOD_AI] == expected
    assert len(expected) == 52
    assert [item.number for item in CLAIM] == [str(number) for number in range(1, 45)]
    for items in (TRIPOD_AI, CLAIM):
        assert len({item.topic for item in items}) == len(items)
        assert all(item.answer or not item.rest for item in items)


def test_what_only_authors_know_is_left_to_them(facts):
    tripod, claim = answers(facts, 0), answers(facts, 1)
    for number in ("1", "2", "3a", "6b", "8c", "17", "18a", "18b", "18d", "19", "25", "27c"):
        assert tripod[number].said == ""
        assert tripod[number].open == f"{OPEN}."
    for number in ("2", "3", "5", "8", "11", "15", "16", "34", "41", "44"):
        assert (claim[number].said, claim[number].open) == ("", f"{OPEN}.")


def test_every_item_is_answered_or_open(facts):
    for one in filled_in(facts):
        assert all(entry.said or entry.open for entry in one.entries)
        assert one.answered + one.partly + one.left == len(one.entries)
        assert min(one.answered, one.partly, one.left) > 8
    assert {part.heading for part in model_card(facts)} == set(CARD)


# --- answers ---------------------------------------------------------------------------------------------------------


def test_answers_have_the_runs_numbers(facts, study):
    tripod, m = answers(facts, 0), facts.metrics
    auc = m["test"]["ensemble"]["metrics"]["auc"]
    assert f"test, ensemble {auc['value']:.3f} [{auc['low']:.3f}, {auc['high']:.3f}]" in tripod["23a"].said
    assert "Cross-validated: 46 slides of 23 patients; held-out test: 19 slides of 10 patients." in tripod["5a"].said
    assert "cross-validation, 6 folds in 2 repeats; 20% of each training part" in tripod["12a"].said.lower()
    slides = study[0].drop_duplicates("slide")
    counted = slides[slides["split"] == "test"].groupby("label")[["slide", "patient"]].nunique()
    normal, tumor = (f"{name} {counted.slide[name]} ({counted.patient[name]})" for name in ("normal", "tumor"))
    assert f"held-out test: {normal}, {tumor}." in tripod["20b"].said
    trained = sorted(study[1]["n_train"])
    assert f"Slides a member trained on: {trained[0]} to {trained[-1]};" in tripod["21"].said
    assert "2 slides dropped: a, b." in tripod["11"].said
    assert "score" in tripod["12e"].said
    assert "Youden on val" in tripod["15"].said
    [[tn, fp], [fn, tp]] = m["test"]["ensemble"]["confusion"]["matrix"]
    claim = answers(facts, 1)
    assert f"{fp + fn} of 19 slides wrong" in claim["39"].said
    truth, called = [0] * (tn + fp) + [1] * (fn + tp), [0] * tn + [1] * fp + [0] * fn + [1] * tp
    assert f"sensitivity {recall_score(truth, called):.3f}" in claim["38"].said


def test_answers_follow_the_settings(facts):
    def said(number: str, section: str, **values) -> str:
        return answers(with_setting(facts, section, **values), 0)[number].said

    assert answers(facts, 0)["13"].said == "The loss does not weight classes."
    assert "inverse frequency" in said("13", "train", class_weights="balanced")
    assert "as the encoder gives them" in answers(facts, 0)["12b"].said
    assert "standardised by each member's own" in said("12b", "train", standardize=True)
    assert "harmonised between sites (combat) by each" in said("12b", "train", harmonize="combat")
    assert "No setting was tuned" in answers(facts, 0)["12c"].said
    assert "best epoch by auc" in said("12c", "train", select="best")
    assert "3 inner folds chose" in said("12c", "study", nested=3)
    assert "and so are sites" in said("12a", "study", site_preserving=True)
    chowder = replace(facts, environment={**facts.environment, "aggregator": "chowder"})
    assert "standardised by each member's own" in answers(chowder, 0)["12b"].said, "a setting of its own"
    assert "chowder (hidden 64, n_top 5)" in answers(chowder, 0)["12c"].said


@pytest.mark.parametrize(
    ("block", "number"),
    [
        ("subgroups", "14"),
        ("subgroups", "23a"),
        ("confounding", "12d"),
        ("baselines", "12e"),
        ("operating_points", "15"),
    ],
)
def test_sections_of_the_report_answer_their_items(facts, block, number):
    more = replace(facts, metrics={**facts.metrics, block: {"any": 1}})
    assert "shown in the report." in answers(more, 0)[number].said
    assert "shown in the report." not in answers(facts, 0)[number].said


def test_methods_of_intervals_are_named_where_the_numbers_name_theirs(facts):
    metrics = json.loads(json.dumps(facts.metrics))
    numbers = metrics["test"]["ensemble"]["metrics"]
    for name in ("auc", "average_precision"):
        numbers[name]["method"] = "score"
    numbers["ece"]["method"] = "bootstrap"
    metrics["intervals"] = {"methods": {"score": "score limits", "bootstrap": "a bootstrap", "other": "unused"}}
    said = answers(replace(facts, metrics=metrics), 1)["29"].said
    expected = "AUC, average precision: score limits; calibration error (ECE): a bootstrap; over folds: mean and SD."
    assert said == f"95 % intervals: {expected}"


def test_predictions_of_an_earlier_study_are_external(facts):
    environment = {"study": {"aggregator": "abmil", "folder": "../run"}, "features": FEATURES}
    other = replace(facts, environment=environment, config={})
    own, new = answers(facts, 1), answers(other, 1)
    assert own["33"].said == ""
    assert own["32"].said
    assert new["33"].said.startswith("These are slides of another cohort")
    assert new["32"].said == ""
    assert new["25"].said == "", "nothing was trained here"
    assert "224 px at 0.5 microns" in new["9"].said


@pytest.mark.parametrize("name", ENCODERS)
def test_the_licence_of_every_encoder_is_said(facts, name):
    features = facts.environment["features"] | {"encoder": name}
    card = card_markdown("x", model_card(replace(facts, environment={**facts.environment, "features": features})))
    assert f"Encoder weights: {ENCODERS[name].licence}." in card
    assert f"Encoder {name} ({ENCODERS[name].hub_repo} on" in card


@pytest.mark.parametrize("config", ["", "a: [", "just text", "- 1", "{{7*7}}: 1"])
def test_a_run_that_says_nothing_of_itself_leaves_more_open(facts, config):
    bare = read_facts(facts.metrics, config, {"python": "3"}, [])
    for full, less in zip(filled_in(facts), filled_in(bare), strict=True):
        assert less.left > full.left
        assert not [entry for entry in less.entries if re.search(r"\bNone\b(?!: all| in this run)", entry.said)]
    assert "No slide was left out." in answers(bare, 0)["11"].said


def test_nothing_held_out_has_no_results(reports):
    predictions, plan, _ = reports.make_study(n_test=0)
    predictions["role"] = "train"
    facts = read_facts(summarise(predictions, plan, reports.TWO, bootstrap=0), "", {}, [])
    tripod = answers(facts, 0)
    assert tripod["21"].said == ""
    assert tripod["23a"].said == ""
    assert tripod["12a"].said.startswith("No cross-validation")


def test_several_classes(reports):
    predictions, plan, _ = reports.make_study(reports.THREE, folds=2)
    facts = read_facts(summarise(predictions, plan, reports.THREE, bootstrap=0), "", {}, [])
    tripod = answers(facts, 0)
    assert tripod["23a"].said.startswith("Macro AUC of 3 classes")
    assert "Probabilities of LUAD, LUSC, normal" in tripod["15"].said


# --- files -----------------------------------------------------------------------------------------------------------


def test_markdown_and_page_say_the_same(reports, study, tmp_path):
    reports.report(tmp_path, study, config_yaml=yaml.safe_dump(CONFIG), environment=ENVIRONMENT)
    page = reports.check_page(tmp_path)
    text = "".join(page.text.split())  # cells have no spaces between them
    lists, card = ((tmp_path / name).read_text() for name in ("checklists.md", "model-card.md"))
    rows = re.findall(r"^\| (\d+[a-z]?) \| (.*) \| (.*) \|$", lists, re.MULTILINE)
    assert len(rows) == 52 + 44
    for number, topic, answer in rows:
        assert "".join(f"{number}{topic}{answer}".replace("**", "").split()) in text
    for line in re.findall(r"^- (.*)$", card, re.MULTILINE):
        assert "".join(line.replace("**", "").replace(": ", "", 1).split()) in text
    assert "BMJ2024;385:e078378" in text
    assert "2024;6(4):e240300" in text
    assert "".join(f"52 items: {filled_in_counts(lists, 0)}".split()) in text


def filled_in_counts(markdown: str, which: int) -> str:
    table = [line for line in markdown.split("\n## ")[which + 1].splitlines() if re.match(r"\| \d", line)]
    left = sum(f"| **{OPEN}.** |" in line for line in table)
    partly = sum(OPEN in line for line in table) - left
    return f"{len(table) - left - partly} answered, {partly} in part, {left} for the authors"


def test_names_with_markup_stay_names_in_markdown(facts):
    hostile = "<img src=x>|`a`\nb"
    renamed = replace(facts, notes=[hostile])
    for written in (checklists_markdown(hostile, filled_in(renamed)), card_markdown(hostile, model_card(renamed))):
        assert "<img" not in written
        assert "\nb" not in written
        assert r"&lt;img src=x>\|\`a\` b" in written
    rows = [line for line in checklists_markdown("x", filled_in(renamed)).splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {4}
