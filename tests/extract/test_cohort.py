"""The cohort table: what a CSV may look like, and everything that is wrong with it at once."""

import numpy as np
import pandas as pd
import pytest

from extract.cohort import Cohort, CohortError, check_cohort, read_cohort, write_cohort
from extract.config import Columns


@pytest.fixture
def csv(tmp_path):
    """Writes a CSV, gives its path."""

    def write(text: str, encoding: str = "utf-8"):
        path = tmp_path / "cohort.csv"
        path.write_text(text, encoding=encoding)
        return path

    return write


def problems_of(path, *arguments, **options) -> list[str]:
    with pytest.raises(CohortError) as caught:
        read_cohort(path, *arguments, **options)
    return caught.value.problems


def labels(cohort: Cohort) -> list[str | None]:
    return cohort.table["label"].tolist()


# --- what is read --------------------------------------------------------------------------------------------------


def test_a_minimal_table(csv):
    cohort = read_cohort(csv("slide,patient,label\nb,p1,tumor\na,p2,normal\nc,p1,tumor\n"))
    assert cohort.table["slide"].tolist() == ["b", "a", "c"], "the order of the file is kept"
    assert cohort.table.columns.tolist() == ["slide", "patient", "label", "split", "path", "mpp"]
    assert cohort.classes == ("normal", "tumor")
    assert cohort.labels_S.tolist() == [1, 0, 1]
    assert cohort.labels_S.dtype == np.int64
    assert cohort.table["split"].tolist() == ["train"] * 3
    assert cohort.table["path"].tolist() == [None] * 3
    assert cohort.table["mpp"].isna().all()


def test_all_columns_under_other_names_with_blanks_and_further_columns(csv):
    columns = Columns(slide="ID", patient="Case", label="Dx", split="Set", path="File", mpp="um")
    text = "Age, ID ,Case,Dx,Set,File,um\n50, s 1 , 007 , yes , TEST ,/d/s 1.svs, 0.2431\n51,s2,07,no,,,\n"
    table = read_cohort(csv(text), columns).table
    assert table.iloc[0].tolist() == ["s 1", "007", "yes", "test", "/d/s 1.svs", 0.2431]
    assert table.loc[1, ["slide", "patient", "label", "split", "path"]].tolist() == ["s2", "07", "no", "train", None]
    assert np.isnan(table.loc[1, "mpp"])


def test_an_mpp_that_is_no_number_is_not_taken_for_none(csv):
    """Else the file's own mpp would be used in silence."""
    text = 'slide,patient,label,mpp\na,1,x,"0,25"\nb,2,y,-1\nc,3,y,NA\nd,,y,0.5\n'
    mentioned = problems_of(csv(text))
    assert len(mentioned) == 2, "together with the missing patient"
    assert "row 2: mpp '0,25'; row 3: mpp '-1', expected microns per pixel at level 0 such as 0.25" in mentioned[0]
    assert "Write decimal points instead of commas" in mentioned[0]


def test_ids_stay_text(csv):
    """pandas would make 007 and 7 one patient and 1e5 a float."""
    table = read_cohort(csv("slide,patient,label\n001,007,0\n1e5,7,1\nNA,nan,0\n")).table
    assert table["slide"].tolist() == ["001", "1e5", "NA"]
    assert table["patient"].tolist() == ["007", "7", "nan"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(csv, encoding):
    assert read_cohort(csv("slide,patient,label\nä,p,x\nb,q,y\n", encoding)).table["slide"][0] == "ä"


def test_windows_line_ends_and_quotes(csv):
    table = read_cohort(csv('slide,patient,label\r\n"a, b",p,x\r\nc,q,y\r\n')).table
    assert table["slide"].tolist() == ["a, b", "c"]
    assert table["label"].tolist() == ["x", "y"]


@pytest.mark.parametrize("nothing", ["", "NA", "nan", "NaN", "None", "  "])
def test_a_slide_without_a_label(csv, nothing):
    cohort = read_cohort(csv(f"slide,patient,label\na,p,x\nb,q,{nothing}\nc,r,y\n"))
    assert labels(cohort) == ["x", None, "y"]
    assert cohort.labels_S.tolist() == [0, -1, 1]
    assert cohort.classes == ("x", "y")


def test_labels_that_pandas_wrote_as_floats(csv):
    """A column of 0, 1 with one label missing is saved by pandas as 0.0, 1.0."""
    frame = pd.DataFrame({"slide": list("abc"), "patient": list("pqr"), "label": [1, None, 0]})
    path = csv("")
    frame.to_csv(path, index=False)
    assert "1.0" in path.read_text()
    cohort = read_cohort(path)
    assert labels(cohort) == ["1", None, "0"]
    assert cohort.classes == ("0", "1")
    assert read_cohort(path, classes=["0", "1"]).labels_S.tolist() == [1, -1, 0]


def test_names_that_end_in_point_zero_are_left_alone(csv):
    assert labels(read_cohort(csv("slide,patient,label\na,p,v1.0\nb,q,v2.0\n"))) == ["v1.0", "v2.0"]


# --- classes -------------------------------------------------------------------------------------------------------


def test_numbers_are_ordered_by_value_and_names_by_alphabet(csv):
    assert read_cohort(csv("slide,patient,label\na,p,10\nb,q,9\nc,r,-1\n")).classes == ("-1", "9", "10")
    assert read_cohort(csv("slide,patient,label\na,p,tumor\nb,q,benign\n")).classes == ("benign", "tumor")


def test_given_classes_decide_the_order_and_may_hold_more_than_occur(csv):
    cohort = read_cohort(csv("slide,patient,label\na,p,x\nb,q,y\n"), classes=["z", "y", "x"])
    assert cohort.classes == ("z", "y", "x")
    assert cohort.labels_S.tolist() == [2, 1]


def test_a_label_that_is_not_among_the_classes(csv):
    [problem] = problems_of(csv("slide,patient,label\na,p,tumour\nb,q,normal\n"), classes=["normal", "tumor"])
    assert "labels ['tumour'] are not among classes ['normal', 'tumor']; did you mean 'tumor'?" in problem


# --- what is wrong -------------------------------------------------------------------------------------------------


def test_all_problems_are_reported_together(csv):
    text = (
        "slide,patient,label,split\n"
        "a,p,x,train\n"
        ",p,x,\n"  # no slide name
        "a,q,y,\n"  # twice
        "d/e,q,y,\n"  # a path
        "f\\g,q,y,\n"
        "h,,y,\n"  # no patient
        "i,r,z,valid\n"  # a split that does not exist, a label that is not declared
    )
    problems = problems_of(csv(text), classes=["x", "y"])
    text = "\n".join(problems)
    for part in (
        "row 3 has no slide name",
        "'a' is listed 2 times",
        "row 5: slide 'd/e'; row 6: slide 'f\\\\g' has a slash",
        "slide 'h' has no patient",
        "row 8: split 'valid', expected train, test or empty",
        "labels ['z'] are not among classes",
    ):
        assert part in text
    assert len(problems) == 6, "one line for one kind"
    assert all("cohort.csv" in problem for problem in problems)


def test_missing_columns_are_named_with_what_is_there(csv):
    problems = problems_of(csv("Slide,case,label\na,p,x\n"))
    assert len(problems) == 2
    assert "no column 'slide' (columns.slide); did you mean 'Slide'?" in problems[0]
    assert "no column 'patient' (columns.patient)" in problems[1]
    assert "columns.patient=slide if each slide is its own patient" in problems[1]
    assert all("Slide, case, label" in problem for problem in problems)


def test_one_patient_a_slide_on_request(csv):
    cohort = read_cohort(csv("slide,label\na,x\nb,y\n"), Columns(patient="slide"))
    assert cohort.table["patient"].tolist() == ["a", "b"]


def test_labels_and_patients_are_not_needed_for_extraction(csv):
    cohort = read_cohort(csv("slide,path\na,x.svs\nb,y.svs\n"), labelled=False)
    assert cohort.table["path"].tolist() == ["x.svs", "y.svs"]
    assert "is listed 2 times" in problems_of(csv("slide\na\na\n"), labelled=False)[0]


@pytest.mark.parametrize(("content", "encoding"), [("", "utf-8"), ("slide,patient,label\nä,p,x\n", "latin-1")])
def test_a_file_that_cannot_be_read_is_named(csv, content, encoding):
    assert "cohort.csv" in problems_of(csv(content, encoding))[0]


def test_an_absent_file_is_named(tmp_path):
    assert "absent.csv" in problems_of(tmp_path / "absent.csv")[0]


# --- use -----------------------------------------------------------------------------------------------------------


def test_write_then_read_gives_the_same(csv):
    text = "slide,patient,label,split,path,mpp\na,01,x,test,/d/a b.svs,0.2431234567\nb,1,,,,\nc,2,y,,,0.5\n"
    cohort = read_cohort(csv(text))
    path = csv("")
    write_cohort(path, cohort)
    again = read_cohort(path)
    pd.testing.assert_frame_equal(again.table, cohort.table)
    assert again.classes == cohort.classes


def test_subset_keeps_classes_and_counts_rows_anew(csv):
    cohort = read_cohort(csv("slide,patient,label\na,p,x\nb,q,y\nc,r,z\n"))
    part = cohort.subset(np.array([False, True, True]))
    assert part.classes == ("x", "y", "z")
    assert part.labels_S.tolist() == [1, 2]
    assert part.table.index.tolist() == [0, 1]
    assert len(part) == 2


def test_a_table_made_in_memory_is_checked_too():
    table = pd.DataFrame({"slide": ["a", "a"], "patient": ["p", "q"], "label": ["x", float("nan")], "split": "train"})
    table = table.assign(path=None, mpp=np.nan)
    with pytest.raises(CohortError, match="'a' is listed 2 times"):
        check_cohort(table)
    cohort = check_cohort(table.assign(slide=["a", "b"]))
    assert labels(cohort) == ["x", None]


# --- TCGA barcodes and sites ---------------------------------------------------------------------------------------

BARCODES = ("TCGA-44-2655-01Z-00-DX1.EE255271-780C", "tcga-44-2655-01A-01-TS1", "TCGA-NC-A5HT-01Z-00-DX1")


def test_patient_and_site_from_tcga_barcodes(csv):
    path = csv("slide,label\n" + "\n".join(f"{slide},x" for slide in BARCODES))
    table = read_cohort(path, Columns(patient="tcga", site="tcga")).table
    assert table["patient"].tolist() == ["TCGA-44-2655", "TCGA-44-2655", "TCGA-NC-A5HT"], "the first 12 characters"
    assert table["site"].tolist() == ["44", "44", "NC"], "the second field"
    assert table["slide"].tolist() == list(BARCODES), "features are looked up under this name"


def test_only_what_is_asked_for_is_taken_from_the_barcode(csv):
    path = csv(f"slide,patient,label\n{BARCODES[0]},Smith,x\n{BARCODES[2]},Jones,y\n")
    table = read_cohort(path, Columns(site="tcga")).table
    assert table["patient"].tolist() == ["Smith", "Jones"]
    assert table["site"].tolist() == ["44", "NC"]
    assert "site" not in read_cohort(path).table


def test_a_column_that_is_called_tcga_is_a_column(csv):
    path = csv("slide,tcga,label\na,p1,x\nb,p2,y\n")
    assert read_cohort(path, Columns(patient="tcga")).table["patient"].tolist() == ["p1", "p2"]


def test_slides_that_are_no_barcodes_are_named_with_all_other_problems(csv):
    slides = ["TCGA-44-26555-01Z", "TCGA-4-2655", "slide_1", "xTCGA-44-2655", "TCGA-44-2655.svs", "s6", "s7"]
    path = csv("slide,label,split\n" + "\n".join(f"{slide},x,middle" for slide in slides))
    problems = problems_of(path, Columns(patient="tcga", site="tcga"))
    (text,) = [p for p in problems if "barcode" in p]
    assert "columns.patient=tcga and columns.site=tcga" in text
    assert "'TCGA-44-26555-01Z', 'TCGA-4-2655', 'slide_1', 'xTCGA-44-2655', 's6' and 1 more" in text
    assert "row 6: split 'middle' and 2 more, expected train" in "".join(problems), "and the splits"
    assert len(problems) == 2


def test_a_site_column_is_optional_and_read_if_it_is_there(csv):
    path = csv("slide,patient,label,site,hospital\na,p,x, S1 ,H1\nb,q,y,,H2\n")
    assert read_cohort(path).table["site"].tolist() == ["S1", ""]
    assert read_cohort(path, Columns(site="hospital")).table["site"].tolist() == ["H1", "H2"]
    (text,) = problems_of(path, Columns(site="hospitl"))
    assert "no column 'hospitl' (columns.site); did you mean 'hospital'?" in text


def test_a_cohort_with_sites_is_written_and_read_back(csv, tmp_path):
    cohort = read_cohort(csv("slide,patient,label,site\na,p,x,S1\nb,q,y,S2\n"))
    write_cohort(tmp_path / "again.csv", cohort)
    pd.testing.assert_frame_equal(read_cohort(tmp_path / "again.csv").table, cohort.table)


def test_extraction_needs_no_barcodes(csv):
    """A config of mil.train with columns.patient=tcga also extracts slides, whatever they are called."""
    assert len(read_cohort(csv("slide\na\nb\n"), Columns(patient="tcga", site="tcga"), labelled=False)) == 2
