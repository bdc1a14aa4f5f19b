"""What a slide's file says of a patient stays in it: no output holds it."""

import re
from pathlib import Path

import tifffile

import extract
from extract.run import main
from extract.slides.slide import open_slide

SECRET = "DOE^JANE"


def test_names_in_a_slides_metadata_reach_no_output(slides, tmp_path, capsys):
    """An Aperio-like description with a patient, a user and a path, which OpenSlide gives out as properties."""
    image, _ = slides.paint_tissue(703, 901)
    (tmp_path / "slides").mkdir()
    text = (
        f"Aperio Image Library v1\r\n703x901 |AppMag = 20|MPP = 0.5|PatientName = {SECRET}|User = {SECRET}|Filename = x"
    )
    with tifffile.TiffWriter(tmp_path / "slides" / "a.svs") as file:
        file.write(image, tile=(256, 256), photometric="rgb", compression="jpeg", description=text, metadata=None)
    with open_slide(tmp_path / "slides" / "a.svs") as slide:
        assert any(SECRET in value for value in slide.properties.values()), "the file says it"
    arguments = [f"slides.folder={tmp_path / 'slides'}", f"out={tmp_path / 'made'}", "qc=true", "extract.workers=0"]
    assert main([*arguments, "encoder.name=timm:test_vit", "encoder.random_weights=true", "encoder.device=cpu"]) == 0
    written = [path for path in (tmp_path / "made").rglob("*") if path.is_file()]
    assert {path.suffix for path in written} == {".h5", ".png"}
    for path in written:
        assert SECRET.encode() not in path.read_bytes(), path
    captured = capsys.readouterr()
    assert SECRET not in captured.out + captured.err


def test_labels_and_macro_images_are_never_opened():
    """They are photographs of the glass, with the patient's name on it."""
    sources = [path.read_text(encoding="utf-8") for path in Path(extract.__file__).parent.rglob("*.py")]
    assert not [text for text in sources if re.search(r"associated_images|read_associated", text)]
