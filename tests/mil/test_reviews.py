"""reviews.csv: what is written is read back, what is marked is left out of a study, and the report says so."""

from __future__ import annotations

import json
from html import unescape

import pandas as pd
import pytest

from extract.tables import TableError
from mil.config import StudyConfig
from mil.config_reading import for_today
from mil.study.reviews import MARKS, left_out, read_reviews, with_review, write_reviews
from mil.train import main


def test_what_is_written_is_read_back_and_the_last_mark_holds(tmp_path):
    path, table = tmp_path / "reviews.csv", read_reviews(tmp_path / "reviews.csv")
    for slide, mark, note in [("=b", "look again", '=1+1, "x"'), ("a", MARKS[0], ""), ("a", MARKS[1], "blurred")]:
        table = with_review(table, slide, mark, note, "2026-01-01 10:00:00")
        write_reviews(table, path)
        table = read_reviews(path)
    assert table[["slide", "mark", "note"]].to_numpy().tolist() == [
        ["=b", "look again", '=1+1, "x"'],
        ["a", "bad quality", "blurred"],
    ]
    assert "'=b" in path.read_text(), "no formula for a spreadsheet"
    assert left_out(path) == {"a": "marked 'bad quality' in a review"}
    write_reviews(with_review(with_review(table, "a", "", "", ""), "=b", "", "", ""), path)
    assert read_reviews(path).empty


def test_other_marks_and_files_are_refused(tmp_path):
    with pytest.raises(TableError, match="expected one of wrong label"):
        with_review(read_reviews(tmp_path / "none.csv"), "a", "wrong", "", "")
    with pytest.raises(TableError, match="no such file"):
        left_out(tmp_path / "none.csv")
    (tmp_path / "bad.csv").write_text("slide,mark,note,when\na,lovely,,\n")
    with pytest.raises(TableError, match="mark is 'lovely'"):
        left_out(tmp_path / "bad.csv")


def test_reviewed_slides_are_left_out_and_the_report_says_so(write_study, witness_arrays, run_study, tmp_path):
    arrays, labels_S = witness_arrays(24, seed=2, lengths=(3, 6))
    data = write_study(tmp_path / "f", arrays, labels_S)
    rows = [
        ("slide_03", "wrong label"),
        ("slide_08", "bad quality"),
        ("slide_11", "look again"),
        ("gone", "bad quality"),
    ]
    table = pd.DataFrame([(slide, mark, "", "") for slide, mark in rows], columns=["slide", "mark", "note", "when"])
    write_reviews(table, tmp_path / "reviews.csv")
    small = ["study.folds=2", "model.name=mean", "train.epochs=1", "report.heatmaps=0", f"out={tmp_path / 'run'}"]
    arguments = [*data, f"reviews={tmp_path / 'reviews.csv'}", *small]
    run_study(arguments)
    used = set(pd.read_csv(tmp_path / "run" / "slides.csv")["slide"])
    assert used == {f"slide_{i:02d}" for i in range(24)} - {"slide_03", "slide_08"}
    flow = json.loads((tmp_path / "run" / "metrics.json").read_text())["flow"]
    assert flow["table"]["slides"] == 24
    assert {row["why"]: row["slides"] for row in flow["left_out"]} == {
        "review: wrong label": 1,
        "review: bad quality": 1,
    }
    page = " ".join(unescape((tmp_path / "run" / "report.html").read_text()).split())
    assert "2 slides left out for reviews.csv" in page
    assert "'slide_03', 'slide_08'" in page
    assert "1 slide of reviews.csv not in the cohort" in page
    run_study([*arguments, "resume=true"])  # refuses a run that is another one


def test_a_review_of_everything_is_refused(write_study, witness_arrays, tmp_path, capsys):
    arrays, labels_S = witness_arrays(4, seed=2, lengths=(3, 6))
    data = write_study(tmp_path / "f", arrays, labels_S)
    table = pd.DataFrame({"slide": [f"slide_{i:02d}" for i in range(4)], "mark": "bad quality", "note": "", "when": ""})
    write_reviews(table, tmp_path / "r.csv")
    assert main([*data, f"reviews={tmp_path / 'r.csv'}", f"out={tmp_path / 'run'}"]) == 2
    assert "every slide of the cohort is left out" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_word_stands_for_the_file_and_marks_can_be_chosen():
    from extract.config import load_config

    given = ["cohort=x.csv", "reviews=r.csv", "reviews.leave_out=[look again]"]
    config = load_config(StudyConfig, given, adapt=for_today)
    assert (str(config.reviews.file), config.reviews.leave_out) == ("r.csv", ["look again"])
