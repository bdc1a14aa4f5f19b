"""Tables as laboratories have them: separators, Excel, two tables, other names, spellings, endings; all said."""

from pathlib import Path

import pandas as pd
import pytest

from extract.cohort import CohortError, read_cohort
from extract.config import Columns, ConfigError, ExtractConfig, Tables, load_config, to_yaml
from extract.joining import BARCODE, names_without_endings
from extract.tables import TableError, read_texts

LABELS = Path(__file__).resolve().parents[3] / "shared" / "data" / "labels"
ROWS = [["slide", "patient", "label"], ["s1", "007", "a; b"], ["s2", "8", "c,d"], ["s3", "9", "e\tf"]]


def table(path: Path, rows, separator=",") -> Path:
    quoted = [separator.join(f'"{cell}"' if set(cell) & set(",;\t") else cell for cell in row) for row in rows]
    path.write_text("\n".join(quoted) + "\n", encoding="utf-8")
    return path


def problems_of(cohort, *arguments, **options) -> list[str]:
    with pytest.raises(CohortError) as caught:
        read_cohort(cohort, *arguments, **options)
    return caught.value.problems


def workbook(path: Path, **sheets) -> Path:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


# --- separators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_the_separator_is_told_from_the_first_line(tmp_path, separator):
    read = read_texts(table(tmp_path / "t.csv", ROWS, separator))
    assert [read.columns.tolist(), *read.to_numpy().tolist()] == ROWS


def test_separators_within_quotes_do_not_count_and_excels_first_line_is_no_header(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('slide,"a;b;c;d",patient\nx,1,2\n')
    assert read_texts(path).columns.tolist() == ["slide", "a;b;c;d", "patient"]
    path.write_text("sep=;\nslide;patient\nx;1\n")
    assert read_texts(path).to_dict("records") == [{"slide": "x", "patient": "1"}]


def test_a_decimal_comma_is_refused_with_a_hint(tmp_path):
    path = table(tmp_path / "t.csv", [["slide", "patient", "label", "age"], ["s", "p", "0,5", "1"]], ";")
    (problem,) = problems_of(path)
    assert "label: 1 number with a decimal comma, first '0,5' in row 2. Write decimal points" in problem
    (problem,) = problems_of(path, target="value")
    assert "Write a decimal point instead of the comma" in problem
    further = table(tmp_path / "u.csv", [["slide", "patient", "label", "age"], ["s", "p", "x", "61,5"]], ";")
    assert "age: 1 number with a decimal comma" in problems_of(further, further={"age": "report.subgroups"})[0]
    assert len(read_cohort(further)) == 1, "nobody asked for the age"
    path.write_text("slide,patient,label\ns,p,0,5\n")
    assert "is a decimal comma among them?" in problems_of(path)[0]


# --- Excel ---------------------------------------------------------------------------------------------------------


def test_a_workbook_reads_as_the_same_table_in_csv(tmp_path):
    rows = [["slide", "patient", "label"], ["s1", "007", 1], ["s2", 8, 0.0], ["s3", "9", None], [None, None, None]]
    cohort = read_cohort(workbook(tmp_path / "c.xlsx", Data=rows))
    csv = table(
        tmp_path / "c.csv", [["slide", "patient", "label"], ["s1", "007", "1"], ["s2", "8", "0"], ["s3", "9", ""]]
    )
    pd.testing.assert_frame_equal(cohort.table, read_cohort(csv).table)
    named_csv = workbook(tmp_path / "d.xlsx", Data=rows).rename(tmp_path / "d.csv")
    assert len(read_cohort(named_csv)) == 3, "told from the file, whatever it is called"


def test_the_sheet_is_said_where_there_are_several(tmp_path):
    path = workbook(
        tmp_path / "c.xlsx", Read=[["about", "this"]], Data=[["slide", "patient", "label"], ["s", "p", "x"]]
    )
    assert "2 sheets: Read, Data. Say which: cohort.sheet='Read'" in problems_of(path)[0]
    assert read_cohort(Tables(file=path, sheet="Data")).table["slide"].tolist() == ["s"]
    assert "no sheet 'Dta'; did you mean 'Data'?" in problems_of(Tables(file=path, sheet="Dta"))[0]


def test_cells_without_a_value_and_damaged_workbooks_are_refused(tmp_path):
    path = workbook(tmp_path / "c.xlsx", Data=[["slide", "patient", "label"], ["s", "=A2", "x"], ["t", "p", "#N/A"]])
    (problem,) = problems_of(path)
    assert "B2 (a formula that was never computed), C3 (#N/A)" in problem
    path.write_bytes(path.read_bytes()[:300])
    assert "is no Excel workbook that can be read" in problems_of(path)[0]
    path.write_bytes(b"\xd0\xcf\x11\xe0" + bytes(100))
    assert "save it as .xlsx" in problems_of(path)[0]
    twice = workbook(tmp_path / "t.xlsx", Data=[["slide", "slide"], ["s", "t"]])
    assert "columns of the same name ['slide']" in problems_of(twice)[0]


# --- two tables ----------------------------------------------------------------------------------------------------

CLINI = [["PATIENT", "label", "AGE"], ["p1", "x", "50"], ["p2", "y", "60"], ["p3", "y", "70"]]
SLIDES = [["FILENAME", "PATIENT"], ["s1a", "p1"], ["s1b", "p1"], ["s2", "p2"], ["s4", "p4"]]
STAMP = Columns(slide="FILENAME", patient="PATIENT")


def two(tmp_path, clini=CLINI, slides=SLIDES, **more) -> Tables:
    paths = (table(tmp_path / "clini.csv", clini, ";"), table(tmp_path / "slides.tsv", slides, "\t"))
    return Tables(clinical=paths[0], slides=paths[1], **more)


def test_two_tables_are_joined_on_the_patient_and_what_does_not_match_is_listed_both_ways(tmp_path):
    cohort = read_cohort(two(tmp_path), STAMP, further={"AGE": "report.subgroups"})
    merged = pd.DataFrame(SLIDES[1:], columns=SLIDES[0]).merge(
        pd.DataFrame(CLINI[1:], columns=CLINI[0]), on="PATIENT", how="left"
    )
    assert cohort.table["slide"].tolist() == merged["FILENAME"].tolist()
    assert cohort.table["patient"].tolist() == merged["PATIENT"].tolist()
    assert cohort.table["label"].tolist() == [*merged["label"][:3], None]
    assert cohort.further is not None
    assert cohort.further["AGE"].tolist() == ["50", "50", "60", ""]
    only_slides, only_clinical = cohort.notes
    assert "1 slide of 1 patient in" in only_slides
    assert "'p4'. They stay without a label" in only_slides
    assert "1 patient in" in only_clinical
    assert "without a slide in" in only_clinical
    assert only_clinical.endswith("'p3'")


def test_the_patient_may_be_called_otherwise_in_the_table_of_slides(tmp_path):
    slides = [["FILENAME", "case_id"], *SLIDES[1:]]
    (problem,) = problems_of(two(tmp_path, slides=slides), STAMP)
    assert "no column 'PATIENT', which says whose the slide is; set cohort.slides_patient=case_id" in problem
    cohort = read_cohort(two(tmp_path, slides=slides, slides_patient="case_id"), STAMP)
    assert cohort.table["patient"].tolist() == ["p1", "p1", "p2", "p4"]


def test_tables_that_contradict_each_other_or_have_nobody_in_common(tmp_path):
    (problem,) = problems_of(two(tmp_path, [*CLINI, ["p1", "y", "51"]]), STAMP)
    assert "1 patient with rows that differ: 'p1'" in problem
    assert len(read_cohort(two(tmp_path, [*CLINI, CLINI[1]]), STAMP)) == 4, "the same row twice says nothing else"
    both = [["FILENAME", "PATIENT", "label"], ["s1", "p1", "y"], ["s2", "p2", "y"]]
    assert "column 'label' is in" in problems_of(two(tmp_path, slides=both), STAMP)[0]
    nobody = problems_of(two(tmp_path, slides=[SLIDES[0], ["s9", "P-1"]]), STAMP)
    assert "no patient is in both tables" in nobody[0]
    assert len(nobody) == 3, "and who is in which"


def test_patients_of_tcga_slides_come_from_their_barcodes(tmp_path):
    clini = [["PATIENT_ID", "label"], ["TCGA-44-2655", "x"], ["TCGA-NC-A5HT", "y"]]
    slides = [["slide"], ["TCGA-44-2655-01Z-00-DX1.A"], ["tcga-nc-a5ht-01Z-00-DX1"]]
    cohort = read_cohort(two(tmp_path, clini, slides), Columns(patient="tcga"))
    assert cohort.table["label"].tolist() == ["x", "y"]
    assert cohort.table["patient"].tolist() == ["TCGA-44-2655", "TCGA-NC-A5HT"]


def test_one_table_or_two_on_the_command_line(tmp_path):
    def cohort(*arguments):
        return load_config(ExtractConfig, [f"cohort{argument}" for argument in arguments]).cohort

    assert cohort("=a.csv") == Path("a.csv")
    assert cohort("=a.xlsx", ".sheet=S") == Tables(file=Path("a.xlsx"), sheet="S")
    pair = cohort("=a.csv", ".clinical=c", ".slides=s")
    assert pair == Tables(clinical=Path("c"), slides=Path("s")), "what comes later counts"
    assert cohort(".clinical=c", ".slides=s", "=a.csv") == Path("a.csv")
    (tmp_path / "again.yaml").write_text(to_yaml(ExtractConfig(cohort=pair)))
    assert load_config(ExtractConfig, [f"config={tmp_path / 'again.yaml'}"]).cohort == pair
    for wrong, told in (((".clinical=c",), "cohort.slides is not set"), ((".sheet=S",), "no table given")):
        with pytest.raises(ConfigError, match=told):
            cohort(*wrong)


# --- names ---------------------------------------------------------------------------------------------------------


def test_the_names_of_clam_stamp_and_cbioportal_are_suggested(tmp_path):
    clam = problems_of(table(tmp_path / "t.csv", [["case_id", "slide_id", "label"], ["p", "s", "x"]]))
    assert "no column 'slide' (columns.slide); set columns.slide=slide_id (as CLAM calls it)" in clam[0]
    assert "set columns.patient=case_id (as CLAM calls it)" in clam[1]
    stamp = problems_of(table(tmp_path / "t.csv", SLIDES))
    assert "set columns.slide=FILENAME (as STAMP calls it)" in stamp[0]
    assert "set columns.patient=PATIENT (as STAMP calls it)" in stamp[1]
    portal = [["slide", "PATIENT_ID", "OS_MONTHS", "OS_STATUS"], ["s", "p", "1", "1:DECEASED"]]
    told = " ".join(problems_of(table(tmp_path / "t.csv", portal), target="survival"))
    for name in ("patient=PATIENT_ID", "time=OS_MONTHS", "event=OS_STATUS"):
        assert f"set columns.{name} (as cBioPortal calls it)" in told


def test_labels_that_differ_only_in_case_or_spaces(tmp_path):
    rows = [["slide", "patient", "label"], ["a", "1", "NEG"], ["b", "2", "neg"], ["c", "3", "NEG"], ["d", "4", "p os"]]
    path = table(tmp_path / "t.csv", rows)
    (problem,) = problems_of(path)
    assert "'NEG' (2 slides), 'neg' (1 slide). Make them equal, or set classes=[NEG,p os]" in problem
    cohort = read_cohort(path, classes=["NEG", "POS"])
    assert cohort.labels_S.tolist() == [0, 0, 0, 1]
    assert cohort.notes == (
        "2 labels that differ from the classes only in case or spaces: read 'neg' as 'NEG', 'p os' as 'POS'",
    )
    apart = read_cohort(path, classes=["NEG", "neg", "p os"])
    assert apart.labels_S.tolist() == [0, 1, 0, 2]
    assert apart.notes == ()


def test_file_endings_are_dropped_only_where_all_names_match_then(tmp_path):
    rows = [["slide", "patient", "label"], ["s001.svs", "1", "x"], ["s002.SVS", "2", "y"], ["s003", "3", "y"]]
    cohort = read_cohort(table(tmp_path / "t.csv", rows))
    named = cohort.named_as({"s001", "s002", "s003", "other"})
    assert named.table["slide"].tolist() == ["s001", "s002", "s003"]
    assert named.notes == ("file endings (.SVS, .svs) of 2 slide names in the table were left out",)
    assert cohort.named_as({"s001", "s003"}) is cohort, "one would not match"
    assert cohort.named_as(set(cohort.table["slide"])) is cohort
    assert names_without_endings(["a.svs", "a.tif"], {"a"}) is None, "two slides would become one"


def test_one_line_for_one_kind_however_many_slides_have_it(tmp_path):
    rows = [["slide", "patient", "label"], *([f"a/{i}", "", "x"] for i in range(300))]
    assert len(problems_of(table(tmp_path / "t.csv", rows))) == 2


def test_bytes_that_are_no_utf8_come_with_advice(tmp_path):
    (tmp_path / "t.csv").write_bytes("slide,patient,label\nä,p,x\n".encode("latin-1"))
    with pytest.raises(TableError, match="Save it as CSV UTF-8"):
        read_texts(tmp_path / "t.csv")


# --- real tables ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not LABELS.is_dir(), reason="no real tables here")
def test_the_tcga_lung_table_alone_and_split_into_two(tmp_path):
    path = LABELS / "lung_labels.csv"
    (problem,) = problems_of(path)
    assert "set columns.label=subtype" in problem
    columns = Columns(label="subtype")
    cohort = read_cohort(path, columns)
    raw = pd.read_csv(path, dtype=str)
    raw[["patient", "subtype"]].drop_duplicates().to_csv(tmp_path / "clini.csv", index=False, sep=";")
    raw[["slide", "site"]].to_csv(tmp_path / "slides.csv", index=False, sep="\t")
    pair = Tables(clinical=tmp_path / "clini.csv", slides=tmp_path / "slides.csv")
    joined = read_cohort(pair, Columns(patient="tcga", label="subtype"))
    assert joined.notes == ()
    assert joined.table["label"].tolist() == cohort.table["label"].tolist()
    assert joined.table["patient"].tolist() == [BARCODE.match(slide)[0].upper() for slide in raw["slide"]]
