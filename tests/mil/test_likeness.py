"""The config that extracts new slides as a study's were: encoder, weights and rules from what the study recorded."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from extract.config import ConfigError, Tissue
from extract.digest import sha256_of_file
from extract.features.cache import Header, Provenance
from mil.pipeline.provenance import how_extracted
from mil.prediction.config import PredictConfig
from mil.prediction.likeness import extraction_config, known_facts, study_encoder
from mil.results.trained import TrainedStudy, open_run

PHIKON = {"encoder": "phikon", "weights_sha256": "", "tile_px": 224, "mpp": 0.5, "overlap_px": 0}


@pytest.fixture
def trained_on(studies):
    """`trained_on(features, **said)`: a trained study whose features had this origin and said this of their making."""
    trained = open_run(studies("mean").folder)

    def make(features: dict, **said) -> TrainedStudy:
        named = {key.replace("__", "."): value for key, value in said.items()}
        extraction = {"extraction": named} if named else {}
        environment = {"features": {"folder": "", "layout": "cache", "dtype": "float32", **features, **extraction}}
        description = replace(trained.description, features=features)
        return replace(trained, description=description, environment=environment)

    return make


def config_of(**sections) -> PredictConfig:
    return PredictConfig.model_validate({"run": "x", "slide": "y"} | sections)


def refused(config: PredictConfig, trained: TrainedStudy) -> str:
    with pytest.raises(ConfigError) as error:
        extraction_config(config, trained, Path("features"), [])
    return str(error.value)


def test_every_rule_that_the_features_state_is_kept(trained_on):
    trained = trained_on(
        PHIKON | {"overlap_px": 12},
        tissue__method="fixed",
        tissue__mpp=4.0,
        tiles__min_tissue=0.6,
        tiles__tolerance=0.1,
        tiles__overlap_px=12,
        encoder_source="owkin/phikon@abc/model.safetensors",
        encoder_revision="abc",
    )
    notes: list[str] = []
    config = extraction_config(config_of(device="cpu"), trained, Path("features"), notes)
    assert (config.tissue.method, config.tissue.mpp, config.tissue.closing_um) == ("fixed", 4.0, Tissue().closing_um)
    assert (config.tiles.min_tissue, config.tiles.tolerance, config.tiles.overlap_px) == (0.6, 0.1, 12)
    assert (config.features.folder, config.features.dtype, config.features.layout) == (
        Path("features"),
        "float32",
        "cache",
    )
    assert (config.encoder.name, config.encoder.revision, config.encoder.device) == ("phikon", "abc", "cpu")
    assert notes == ["the study's features do not say which weights of 'phikon' made them: the hub's are used"]


def test_the_hubs_revision_is_pinned_and_what_is_unknown_is_noted(trained_on):
    """Imported features say their encoder and nothing else."""
    notes: list[str] = []
    config = extraction_config(config_of(), trained_on(PHIKON), Path("features"), notes)
    assert (config.encoder.name, config.encoder.revision, config.encoder.weights) == ("phikon", None, None)
    assert len(notes) == 2
    assert "tissue rules" in notes[0]


def test_tiles_are_shrunk_as_the_studys_were(trained_on):
    """Features imported from DeepZoom say lanczos: new slides are made so, and area averages are another kind."""
    config = extraction_config(config_of(), trained_on(PHIKON, **{"tiles.resample": "lanczos"}), Path("features"), [])
    assert config.tiles.resample == "lanczos"
    assert extraction_config(config_of(), trained_on(PHIKON), Path("features"), []).tiles.resample == "area"
    area = known_facts(PHIKON, {"tiles.min_tissue": 0.25}, "cache")
    lanczos = known_facts(PHIKON, {"tiles.min_tissue": 0.25, "tiles.resample": "lanczos"}, "cache")
    assert (area["tiles.resample"], lanczos["tiles.resample"]) == ("area", "lanczos")


def test_random_weights_stay_random(trained_on):
    made = {"encoder": "timm:test_vit", "weights_sha256": "a" * 64, "tile_px": 160, "mpp": 0.5, "overlap_px": 0}
    encoder = study_encoder(config_of(), trained_on(made), {"encoder_source": "random weights, seed 0"}, [])
    assert encoder.random_weights
    assert encoder.weights is None


def test_local_weights_must_be_the_very_same(trained_on, tmp_path):
    used, other = tmp_path / "used.safetensors", tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(3)}, used)
    save_file({"x": torch.ones(3)}, other)
    made = PHIKON | {"weights_sha256": sha256_of_file(used)}
    trained = trained_on(made, encoder_source=str(used), encoder_revision="")
    said = trained.environment["features"]["extraction"]
    assert study_encoder(config_of(), trained, said, []).weights == used, "still where it was"
    moved = used.rename(tmp_path / "moved.safetensors")
    assert f"{used}: no such file" in refused(config_of(), trained)
    assert "Set encoder.weights=FILE" in refused(config_of(), trained)
    assert study_encoder(config_of(encoder={"weights": moved}), trained, said, []).weights == moved
    wrong = refused(config_of(encoder={"weights": other}), trained)
    assert f"{other}: has sha256 {sha256_of_file(other)[:12]}" in wrong
    assert f"sha256 {made['weights_sha256'][:12]}" in wrong
    other.rename(used)
    assert "has sha256" in refused(config_of(), trained), "another file at the old place is not taken"


def test_a_local_copy_of_the_hubs_weights_is_compared_too(trained_on, tmp_path):
    copy = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(3)}, copy)
    from_hub = {"encoder_source": "owkin/phikon@abc/model.safetensors", "encoder_revision": "abc"}
    trained = trained_on(PHIKON | {"weights_sha256": sha256_of_file(copy)}, **from_hub)
    config = config_of(encoder={"weights": copy})
    assert study_encoder(config, trained, from_hub, []).weights == copy
    save_file({"x": torch.ones(3)}, copy)
    assert "has sha256" in refused(config, trained)


def test_an_encoder_that_reads_other_tiles_is_refused(trained_on):
    said = refused(config_of(), trained_on(PHIKON | {"tile_px": 256, "mpp": 0.25}))
    assert "its tiles are 256 px a side, encoder 'phikon' of this toolkit reads 224 px" in said
    assert "give features.folder=FOLDER" in said
    assert "encoder 'uni_v1' is not one of this toolkit" in refused(
        config_of(), trained_on(PHIKON | {"encoder": "uni_v1"})
    )
    assert "do not say their encoder" in refused(config_of(), trained_on(PHIKON | {"encoder": ""}))


def test_what_is_unknown_is_no_fact():
    unknown = {"encoder": "", "weights_sha256": "", "tile_px": 0, "mpp": 0.0, "overlap_px": 0}
    assert known_facts(unknown, {"slide_mpp": 0.25}, "clam") == {}
    assert known_facts(unknown, {"tissue.pen_marks": False, "tiles.overlap_px": 0}, "cache") == {
        "overlap_px": 0,
        "tissue.pen_marks": False,
    }


def test_training_records_what_all_files_say_alike():
    def header(**said) -> Header:
        named = {key.replace("__", "."): value for key, value in said.items()}
        return Header(Path("x.h5"), 3, 4, "float16", Provenance("phikon", extra=named | {"slide_mpp": 0.25}))

    alike = {"tissue__method": "otsu", "tiles__min_tissue": 0.25, "encoder_revision": "abc"}
    files = [header(**alike, tissue__mpp=8.0), header(**alike, tissue__mpp=4.0)]
    named = {"tissue.method": "otsu", "tiles.min_tissue": 0.25, "encoder_revision": "abc"}
    assert how_extracted(files) == {"extraction": named}
    assert how_extracted(files[:1]) == {"extraction": named | {"tissue.mpp": 8.0}}
    assert how_extracted([header(), header(**alike)]) == {}
