"""`import mil` as a notebook uses it: names, examples, studies, run folders, features, single aggregators."""

import doctest
import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import extract
import mil
from extract.config import ConfigError, ProblemsError
from extract.features.cache import CacheError, Provenance, read_coords, write_features
from extract.features.folder import FeatureFolder
from mil.aggregators import AGGREGATORS, aggregator_class
from mil.aggregators.batch import pack
from mil.predict import main as predict_main
from mil.results.readback import read_environment

NAMES = {"mil": mil.__all__, "extract": extract.__all__}
SMALL = {"hidden": 6, "attention": 5, "head": [4]}
SETTINGS = {
    "study": {"folds": 3},
    "train": {"epochs": 3, "batch_size": 5, "lr": 0.02, "accelerator": "cpu"},
    "report": {"bootstrap": 20, "heatmaps": 0},
}


@pytest.fixture(scope="module", autouse=True)
def one_figure_only(draw_only):
    with pytest.MonkeyPatch.context() as patch:
        draw_only(patch, "roc")
        yield


# --- names and examples --------------------------------------------------------------------------------------------


def test_import_mil_imports_nothing_slow():
    slow = "{'torch', 'pandas', 'numpy', 'sklearn', 'lightning', 'h5py', 'pydantic', 'omegaconf'}"
    program = f"import sys, mil, extract; print(sorted({slow} & set(sys.modules)), dir(mil), dir(extract))"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said == f"[] {mil.__all__} {extract.__all__}\n"


@pytest.mark.parametrize(("package", "name"), [(p, name) for p, names in NAMES.items() for name in names])
def test_no_name_is_that_of_a_module(package, name):
    """Otherwise `import mil.train` puts the module in the function's place."""
    assert importlib.util.find_spec(f"{package}.{name}") is None


def test_a_wrong_name_says_what_there_is():
    with pytest.raises(AttributeError, match=r"no attribute 'run_stduy'; it has SlideClassifier, .*, run_study"):
        mil.run_stduy  # noqa: B018 - the look-up is what is tested


def test_every_name_has_an_example_that_runs(tmp_path, monkeypatch):
    """In one folder and in the order of the README: an example may use what one before it made."""
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    names = ("run_study", "open_run", "read_features", "SlideClassifier", "SlideRegressor", "SlideGrader")
    functions = [getattr(mil, name) for name in (*names, "SlideSurvival", "aggregator")]
    functions.append(extract.encoder)
    assert {f.__name__ for f in functions} == {*mil.__all__, *extract.__all__}
    said: list[str] = []
    for function in functions:
        examples = doctest.DocTestParser().get_doctest(function.__doc__, {}, function.__name__, None, 0)
        assert len(examples.examples) >= 3
        runner.run(examples, out=said.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)


README = Path(__file__).resolve().parents[2] / "README.md"


def test_what_the_readme_shows_runs(tmp_path, monkeypatch):
    """The code under "From Python", in order, in one session; one epoch stands for ten, a small network for Phikon."""
    after = README.read_text(encoding="utf-8").partition("## From Python\n")[2]
    blocks = re.findall(r"```python\n(.*?)```", after.partition("\n## ")[0], re.DOTALL)
    quicker = {
        '"phikon"': '"timm:test_vit", random_weights=True',
        "epochs=10": "epochs=1",
        '"epochs": 10': '"epochs": 1',
    }
    monkeypatch.chdir(tmp_path)
    session = {"tiles_NHW3": np.zeros((3, 160, 160, 3), dtype=np.uint8)}
    for block in blocks:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"(?s)\d+ slides of \d+ patients that the study trained on", UserWarning)
            for shown, run_instead in quicker.items():
                block = block.replace(shown, run_instead)
            exec(block, session)
    assert {"run_study", "open_run", "read_features", "SlideClassifier", "aggregator", "encoder"} <= set(
        re.findall(r"(?:mil|extract)\.(\w+)\(", "".join(blocks))
    )
    assert session["features_ND"].shape == (3, 64)
    assert len(session["bags"]) == len(session["labels"]) == 184


# --- studies -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(witness_arrays, write_study, tmp_path_factory) -> dict[str, str]:
    """22 slides of 11 patients, the last six slides are the test split: what names them in a config."""
    arrays, labels_S = witness_arrays(22, seed=1, strength=5.0)
    labels_S[:] = np.arange(22) // 2 % 2
    folder = tmp_path_factory.mktemp("api")
    split = ["train"] * 16 + ["test"] * 6
    patients = [f"p{i // 2}" for i in range(22)]
    names = np.array(["normal", "tumor"])[labels_S]
    write_study(folder / "data", arrays, names, split=split, patients=patients)
    return {"cohort": folder / "data" / "cohort.csv", "features": {"folder": folder / "data"}}


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    """A study of two aggregators."""
    model = {"name": ["abmil", "mean"], **SMALL}
    return mil.run_study(model=model, out=tmp_path_factory.mktemp("two") / "run", **data, **SETTINGS)


@pytest.fixture(scope="module")
def run(two):
    return two["abmil"]


def test_the_command_is_the_function(data, two, tmp_path):
    """The same predictions, byte by byte, and a table with the same numbers."""
    from mil.train import main

    arguments = [f"cohort={data['cohort']}", f"features.folder={data['features']['folder']}", f"out={tmp_path / 'run'}"]
    arguments += ["model.name=[abmil,mean]", "model.hidden=6", "model.attention=5", "model.head=[4]", "study.folds=3"]
    arguments += ["train.epochs=3", "train.batch_size=5", "train.lr=0.02", "train.accelerator=cpu"]
    assert main([*arguments, "report.bootstrap=20", "report.heatmaps=0"]) == 0
    for name in two.aggregators:
        ours, theirs = (folder / name / "predictions.csv" for folder in (two.folder, tmp_path / "run"))
        assert ours.read_bytes() == theirs.read_bytes()
    assert mil.open_run(tmp_path / "run").summary == two.summary


def test_environment_says_which_call_it_was(run):
    command = json.loads((run.folder / "environment.json").read_text())["command"]
    assert command.startswith("mil.run_study(")
    assert "'name': ['abmil', 'mean']" in command


def test_everything_wrong_is_in_one_text(data, tmp_path):
    with pytest.raises(ProblemsError) as refused:
        mil.run_study(
            "quickstart.yaml", trian={"epochs": 1}, train={"epochs": 0}, model={"hiden": 3}, out=tmp_path / "r"
        )
    text = str(refused.value)
    assert text.startswith("problems in the config (3):\n")
    for part in ("trian: unknown key; did you mean 'train'?", "train.epochs", "model.hiden: unknown option of"):
        assert part in text
    with pytest.raises(ProblemsError, match="no such file"):
        mil.run_study("quickstrat.yaml")
    with pytest.raises(ProblemsError, match="no such folder"):
        mil.run_study(cohort=data["cohort"], features={"folder": tmp_path / "nothing"}, out=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_sections_go_before_the_config_and_a_run_is_not_overwritten(data, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = {**data, **SETTINGS, "model": {"name": "chowder", "n_top": 2}, "out": "from_config"}
    mean = mil.run_study(base, model={"name": "mean"}, train={"epochs": 1})
    assert mean.folder == Path("from_config"), "the config's own, where no other is given"
    config = mean.trained.config
    assert (config.model.name, config.model.model_extra, config.train.epochs) == ("mean", {}, 1)
    assert config.train.batch_size == 5, "what the call does not name is the config's"
    with pytest.raises(ProblemsError, match="resume=true to continue it, or overwrite=true"):
        mil.run_study(base)


def test_a_run_folder_read_back(run):
    again = mil.open_run(run.folder)
    assert again.aggregators == ("abmil",) == run.aggregators
    assert again["abmil"].folder == run.folder
    assert again.metrics == json.loads((run.folder / "metrics.json").read_text())
    for name in ("predictions", "slides", "patients", "history"):
        table, raw = getattr(again, name), pd.read_csv(run.folder / f"{name}.csv")
        assert isinstance(table, pd.DataFrame)
        assert table.columns.tolist() == raw.columns.tolist()
        assert len(table) == len(raw) > 0
    assert "cross-validation" in again.summary
    page = again.report._repr_html_()
    assert os.fspath(again.report) == str(run.folder / "report.html")
    assert "<iframe srcdoc=" in page
    assert "&lt;html" in page
    assert len(page) > (run.folder / "report.html").stat().st_size


def test_with_several_aggregators_one_must_be_chosen(two):
    assert two.aggregators == ("abmil", "mean")
    assert mil.open_run(two.folder).summary == two.summary
    with pytest.raises(ProblemsError, match=r"choose one: run\['abmil'\], run\['mean'\]"):
        two.metrics  # noqa: B018 - the look-up is what is tested
    with pytest.raises(KeyError, match=r"abmli.*did you mean 'abmil'"):
        two["abmli"]
    assert two["mean"].metrics != two["abmil"].metrics
    assert two.report.path.read_text().startswith("<!")


def test_a_folder_that_is_no_run_is_refused(tmp_path, run):
    with pytest.raises(ProblemsError, match="no such folder"):
        mil.open_run(tmp_path / "nothing")
    with pytest.raises(ProblemsError, match="not a run folder"):
        mil.open_run(tmp_path)
    (tmp_path / "config.yaml").write_text((run.folder / "config.yaml").read_text())
    with pytest.raises(ProblemsError, match="not finished"):
        mil.open_run(tmp_path)


# --- predictions and heatmaps of a run -----------------------------------------------------------------------------


def test_predict_is_the_command_predict(run, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = data["features"]["folder"]
    with pytest.warns(UserWarning, match="16 slides of 16 patients that the study trained on"):
        table = run.predict(folder, device="cpu")
    assert sorted(os.listdir()) == [], "nothing is kept without out"
    assert predict_main([f"run={run.folder}", f"features.folder={folder}", "device=cpu", "out=said"]) == 0
    raw = pd.read_csv("said/predictions.csv")
    np.testing.assert_allclose(table["p_tumor"], raw["p_tumor"])
    assert table["slide"].tolist() == raw["slide"].tolist()
    assert any("held out as its test split" in note for note in table.attrs["notes"])
    with pytest.warns(UserWarning, match="no metric counts them"):
        labelled = run.predict(folder, cohort=data["cohort"], out="kept", device="cpu", report={"bootstrap": 0})
    assert labelled.attrs["metrics"] == json.loads(Path("kept/metrics.json").read_text())
    with pytest.raises(ProblemsError, match="no slides: give"):
        run.predict()
    with pytest.raises(ProblemsError, match="did you mean 'clam'"):
        run.predict({"folder": folder, "layout": "clamm"})
    with pytest.raises(ProblemsError, match=r"(?s)features\.foldr: unknown key"):
        run.predict({"foldr": folder})


def test_slides_that_cannot_be_extracted_are_refused(run, tmp_path, monkeypatch):
    """The study's features are of no encoder of this toolkit."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (30, 20)).save("new.png")
    with pytest.raises(ProblemsError, match="encoder 'synthetic' is not one of this toolkit"):
        run.predict(slide="new.png", out="out")


def test_a_slide_that_fails_is_warned_of(run, data, tmp_path):
    folder = data["features"]["folder"]
    (tmp_path / "slide_21.h5").write_bytes((folder / "slide_21.h5").read_bytes())
    (tmp_path / "slide_20.h5").write_bytes((folder / "slide_20.h5").read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"1 slide without a prediction(.|\n)*slide_20 \(features\): .*truncated"):
        table = run.predict(tmp_path)
    assert table["slide"].tolist() == ["slide_21"]


def test_a_heatmap_of_the_runs_own_slide(run, tmp_path):
    shown = run.heatmap("slide_03")
    n_tiles = len(mil.read_features(shown_folder(run))["slide_03"])
    assert len(shown.tiles) == n_tiles
    assert shown.tiles["percentile"].max() == 100
    shown.save(tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as image:
        assert image.format == "PNG"
        assert image.width > 100
    assert shown._repr_png_() == (tmp_path / "map.png").read_bytes()
    evidence = run.heatmap("slide_03", score="evidence", scale="raw", target="normal")
    assert evidence.png != shown.png
    with pytest.raises(ProblemsError, match="did you mean 'slide_03'") as refused:
        run.heatmap("slid_03", target="tumour")
    assert "target=tumour: expected one of normal, tumor" in str(refused.value)


def shown_folder(run) -> Path:
    return Path(read_environment(run.folder)["features"]["folder"])  # environment.json alone has no path of the machine


# --- features ------------------------------------------------------------------------------------------------------


def test_features_of_our_own_cache(data):
    folder = data["features"]["folder"]
    features = mil.read_features(folder)
    assert features.layout == "cache"
    assert len(features) == 22
    assert list(features)[:2] == ["slide_00", "slide_01"]
    slide = features["slide_07"]
    assert (slide.provenance.encoder, slide.provenance.mpp, slide.names) == ("synthetic", 0.5, None)
    assert slide.features.shape == (len(slide), 6)
    assert slide.features.dtype == np.float32
    np.testing.assert_array_equal(slide.coords, read_coords(folder / "slide_07.h5"))
    assert "slide_99" not in features
    assert features.get("slide_99") is None
    with pytest.raises(KeyError, match="did you mean 'slide_07'"):
        features["slid_07"]
    with pytest.raises(ProblemsError, match="no such folder"):
        mil.read_features(folder / "nothing")


def test_coordinates_that_need_to_know_the_slide(tmp_path):
    """slideflow stores centres: 20 tiles of 100 um, of slides with 0.5 and with 0.25 microns per pixel."""
    centres_N2 = np.array([[150, 350], [350, 550], [900, 150]])
    for name in ("a", "b"):
        torch.save(torch.ones(3, 4), tmp_path / f"{name}.pt")
        np.savez(tmp_path / f"{name}.index.npz", centres_N2)
    (tmp_path / "bags_config.json").write_text('{"tile_px": 200, "tile_um": 100}')
    features = mil.read_features(tmp_path, mpp={"a": 0.5, "b": 0.25})
    np.testing.assert_array_equal(features["a"].coords, centres_N2 - 100)
    np.testing.assert_array_equal(features["b"].coords, centres_N2 - 200)
    assert mil.read_features(tmp_path, mpp={"a": 0.5})["b"].coords is None
    assert mil.read_features(tmp_path)["a"].coords is None


@pytest.fixture
def parquet(tmp_path) -> list[np.ndarray]:
    """Two files of five slides with a DeepZoom address; one without tiles."""
    rng = np.random.default_rng(0)
    slides = []
    for n_tiles in (4, 2, 0, 5, 3):
        address_N3 = np.column_stack([np.full(n_tiles, 14), rng.integers(0, 9, (n_tiles, 2))])
        slides.append(np.column_stack([address_N3, rng.normal(size=(n_tiles, 7))]).astype(np.float32))
    kind = pa.schema([("features", pa.list_(pa.list_(pa.float32()))), ("label", pa.int64())])
    for number, part in enumerate((slides[:3], slides[3:])):
        table = pa.table({"features": [s.tolist() for s in part], "label": [0] * len(part)}, schema=kind)
        pq.write_table(table, tmp_path / f"Small_train-{number:05d}-of-00002.parquet", row_group_size=2)
    return slides


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 0, 3, 1, 1, 2]])
def test_parquet_files_are_read_where_they_lie(parquet, tmp_path, order):
    features = mil.read_features(tmp_path, dim=7, deepzoom_levels=16)
    names = [f"Small_train_{i:03d}" for i in range(5)]
    assert list(features) == names
    assert features.layout == "parquet"
    for i in order:
        slide, wanted = features[names[i]], parquet[i]
        np.testing.assert_array_equal(slide.features, wanted[:, 3:])
        if len(wanted):
            np.testing.assert_array_equal(slide.coords, wanted[:, 1:3] * 224 * 2)  # level 14 of 16 has half the pixels
    assert mil.read_features(tmp_path, dim=7)[names[0]].coords is None, "the frame is not known"
    without = mil.read_features(tmp_path, dim=10)[names[0]]
    np.testing.assert_array_equal(without.features, parquet[0])
    with pytest.raises(ProblemsError, match="expected tiles of 9 or 12 numbers, got 10"):
        mil.read_features(tmp_path, dim=9)[names[0]]
    (tmp_path / "Small_train-00001-of-00002.parquet").unlink()
    with pytest.raises(ProblemsError, match="Small_train has 2 files, number 1 is not there"):
        mil.read_features(tmp_path, dim=7)


@pytest.mark.parametrize("begun", [False, True])
def test_parquet_files_replaced_after_their_slides_were_listed_are_refused(parquet, tmp_path, begun):
    """By another file of the same size; also where its first slide was read already, and its rows are being read."""
    features = mil.read_features(tmp_path, dim=7)
    path = tmp_path / "Small_train-00000-of-00002.parquet"
    if begun:
        assert len(features["Small_train_000"]) == 4
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    other.replace(path)
    for slide in ("Small_train_000", "Small_train_001"):
        with pytest.raises(CacheError, match=r"00000-of-00002.parquet: was replaced by another file"):
            features[slide]
    np.testing.assert_array_equal(features["Small_train_003"].features, parquet[3][:, 3:])


def test_a_feature_file_replaced_while_it_is_read_is_refused(tmp_path, monkeypatch):
    """Coordinates of one file and features of another are no slide."""
    where = Provenance("synthetic")
    write_features(tmp_path / "a.h5", np.ones((3, 4)), np.zeros((3, 2)), where)
    read = FeatureFolder.coords

    def then_replaced(self, *arguments, **options):
        found = read(self, *arguments, **options)
        write_features(tmp_path / "a.h5", np.zeros((3, 4)), np.ones((3, 2)), where)
        return found

    monkeypatch.setattr(FeatureFolder, "coords", then_replaced)
    with pytest.raises(CacheError, match="was replaced by another one after it was checked"):
        mil.read_features(tmp_path)["a"]


# --- aggregators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("n_classes", [2, 3])
def test_an_aggregator_is_member_0_of_the_stack(name, n_classes):
    """Values, loss, scores and gradients, in training mode too, where the first call draws as a study's first epoch."""
    bag_TD = torch.from_numpy(np.random.default_rng(1).normal(size=(40, 6)).astype(np.float32))
    outputs = 1 if n_classes == 2 else n_classes
    one = mil.aggregator(name, in_dim=6, n_classes=n_classes, seed=5)
    stack = aggregator_class(name)(6, outputs, [5, 9])
    for mode in (True, False):
        one.train(mode).zero_grad()
        stack.train(mode).zero_grad()
        batch = pack([bag_TD], 2, [1])
        prediction = stack(batch)
        logits_C = one(bag_TD)
        assert logits_C.shape == (outputs,)
        torch.testing.assert_close(logits_C, prediction.logits_MBC[0, 0])
        one.calls = 0
        loss = one.loss(bag_TD, torch.tensor(1))
        losses_MB = stack.losses(prediction, batch.labels_B)
        torch.testing.assert_close(loss, losses_MB[0, 0])
        loss.backward()
        losses_MB[0, 0].backward()
        wanted = dict(stack.named_parameters())
        for key, parameter in one.stack.named_parameters():
            assert torch.equal(parameter[0], wanted[key][0])
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad[0], wanted[key].grad[0])
                assert not wanted[key].grad[1].any(), "the other member has learned nothing"
    scores_MT = stack(pack([bag_TD], 2), with_scores=True).scores_MT
    torch.testing.assert_close(one.tile_scores(bag_TD), scores_MT[0].detach())
    assert not one.training


def test_an_aggregator_learns_with_an_encoder_below_it():
    """Gradients reach the tiles, as finite differences say; dropout draws anew in every call."""
    torch.manual_seed(0)
    model = mil.aggregator("abmil", 4, hidden=5, attention=3, head=[4]).double()
    bag_TD = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)

    class InDouble(torch.nn.Module):  # `prepare` makes float32 of tiles
        def forward(self, bag_TD):
            return model.stack.pool_by_autograd(bag_TD, [len(bag_TD)], *model.stack.layers(model.stack.stacks()))[0]

    assert torch.autograd.gradcheck(InDouble(), bag_TD)
    model.float()
    tiles_TD = bag_TD.detach().float().requires_grad_()
    model(tiles_TD).sum().backward()
    assert tiles_TD.grad.abs().sum() > 0
    draws = mil.aggregator("transmil", 4, hidden=8, heads=2, landmarks=4)
    first, second = draws(tiles_TD.detach()), draws(tiles_TD.detach())
    assert not torch.equal(first, second)
    again = mil.aggregator("transmil", 4, hidden=8, heads=2, landmarks=4)
    assert torch.equal(again(tiles_TD.detach()), first)
    assert torch.equal(again(tiles_TD.detach()), second)


def test_what_is_wrong_with_an_aggregator_is_said_together():
    with pytest.raises(ConfigError) as refused:
        mil.aggregator("abmil", 0, 1, hiden=3, attention="many", init="runs/a")
    problems = refused.value.problems
    beginnings = ("in_dim=0", "n_classes=1", "model.init: not an option", "model.hiden: unknown", "model.attention")
    assert [[p for p in problems if p.startswith(b)] != [] for b in beginnings] == [True] * 5
    with pytest.raises(ConfigError, match="did you mean 'abmil'"):
        mil.aggregator("abmli", 4)
    with pytest.raises(ConfigError, match="greater than or equal to 0, got -1"):
        mil.aggregator("abmil", 4, hidden=-1)
    with pytest.raises(ValueError, match=r"expected one bag \(tiles, 4\) of at least one tile, got \(3, 5\)"):
        mil.aggregator("abmil", 4)(torch.zeros(3, 5))
