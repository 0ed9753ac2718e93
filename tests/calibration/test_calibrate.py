import ast
import dataclasses
import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

import lipass
from lipass.calibration.ledger import Ledger
from lipass.calibration.picture import picture
from lipass.calibration.quality import Reference
from lipass.calibration.search import Tried, frontier
from lipass.calibration.spectrum import spectrum_of
from lipass.calibration.subject import Run
from lipass.calibration.told import table
from lipass.calibration.worth import Worth, correlation, curve
from lipass.cli import main
from lipass.errors import LipassError
from lipass.receipt import reset_report

sys.path.insert(0, str(Path(__file__).parent))
import walks

TARGET = str(Path(walks.__file__))
FAST = {"tries": 8, "repeats": 1, "frames": 4}


@pytest.fixture(autouse=True)
def _fresh():
    reset_report()
    torch._dynamo.reset()


def calibrated(**given):
    model, roll_out, paths, options = walks.build()
    return lipass.calibrate(
        model, roll_out, paths, **{"options": options, "compiled": False, **FAST, **given}
    )


@pytest.fixture(scope="module")
def found():
    reset_report()
    return calibrated()


def test_points_go_from_the_best_to_the_fastest(found):
    points = found.frontier.points
    assert [one.chunk_ms for one in points] == sorted(one.chunk_ms for one in points)[::-1]
    assert [one.db for one in points] == sorted(one.db for one in points)[::-1]
    assert all(one.db_worst <= one.db + 0.01 for one in points)
    assert found.again_db == 60.0
    assert len(found.tried) <= 8


def test_what_is_found_opens_sessions(found, tmp_path):
    found.frontier.save(tmp_path / "own.toml")
    again = lipass.Frontier.load(tmp_path / "own.toml")
    assert again == found.frontier
    model, roll_out, paths, _ = walks.build()
    with lipass.Session(frontier=again, target_chunk_ms=1e4) as session:
        roll_out(model, paths["ahead"], session)
    assert {one.plan.point for one in lipass.report().chunks} == {again.points[0].name}


def test_the_file_says_of_what_and_on_what_it_was_found(found):
    assert found.frontier.model["class"] == "Averaging"
    assert found.frontier.walks == ("way back", "ahead")
    assert {"device", "lipass", "torch", "python"} <= {*found.frontier.environment}
    assert found.frontier.options["preset"] == "all"


def test_frames_are_asked_what_they_are_worth(found):
    assert 0 < len(found.worth) <= 4
    assert {one.walk for one in found.worth} <= {"way back", "ahead"}
    assert all(0 <= one.overlap <= 1 for one in found.worth)


def test_a_compiled_model_is_calibrated_against_its_dense_twin():
    found = calibrated(compiled=True, tries=3, frames=0)
    assert found.frontier.points
    assert lipass.report().graphs > 0


def test_tries_are_gone_on_with(tmp_path):
    model, roll_out, paths, options = walks.build()
    paths, keep = {"ahead": paths["ahead"]}, tmp_path / "tries"
    given = {"options": options, "compiled": False, "keep": keep, "tries": 4, "repeats": 1,
             "frames": 0}  # fmt: skip
    first = lipass.calibrate(model, roll_out, paths, **given)
    saved = keep.read_text()
    again = lipass.calibrate(model, roll_out, paths, **given)
    assert [one["db"] for one in again.tried[:3]] == [one["db"] for one in first.tried[:3]]
    assert keep.read_text().startswith(saved)
    keys = [json.loads(line)[0] for line in keep.read_text().splitlines()]
    assert len(keys) == len({*map(str, keys)}) >= 4  # none was rolled out again


def test_other_options_are_tried_anew(tmp_path):
    ledger = Ledger(tmp_path / "tries", {"walk": "a"})
    ledger.put({"x": (1, 2)}, "walk", 0.5, [(4, 2)])
    assert Ledger(tmp_path / "tries", {"walk": "a"}).get({"x": (1, 2)}, "walk").chunks == ((4, 2),)
    assert Ledger(tmp_path / "tries", {"walk": "b"}).get({"x": (1, 2)}, "walk") is None
    assert ledger.get({"x": (1, 3)}, "walk") is None
    with (tmp_path / "tries").open("a") as file:
        file.write('["cut')
    assert Ledger(tmp_path / "tries", {"walk": "a"}).get({"x": (1, 2)}, "walk") is not None


def test_a_rollout_that_differs_each_time_is_refused():
    model, roll_out, paths, options = walks.build()

    def noisy(model, walk, session):
        return roll_out(model, walk, session) + torch.randn(1)

    with pytest.raises(LipassError, match="must be the same each time, got two"):
        lipass.calibrate(model, noisy, paths, options=options, compiled=False, **FAST)


@pytest.mark.parametrize(
    ("loop", "error", "said"),
    [
        (lambda model, walk, session: [1], TypeError, "must return a tensor, got list"),
        (lambda model, walk, session: walk, LipassError, r"session\.chunk\(\.\.\.\)`, got none"),
        (3, TypeError, r"a function of \(model, walk, session\), got int"),
    ],
)
def test_loops_that_are_none_are_refused(loop, error, said):
    model, _, paths, options = walks.build()
    with pytest.raises(error, match=said):
        lipass.calibrate(model, loop, paths, options=options, compiled=False, **FAST)


@pytest.mark.parametrize(
    ("paths", "error", "said"),
    [([], ValueError, "needs walks, got none"), (torch.eye(4), TypeError, r"write \[walk\]")],
)
def test_walks_that_are_none_are_refused(paths, error, said):
    model, roll_out, _, options = walks.build()
    with pytest.raises(error, match=said):
        lipass.calibrate(model, roll_out, paths, options=options, compiled=False, **FAST)


def test_a_preset_without_choices_of_a_session_is_refused():
    with pytest.raises(LipassError, match="got preset 'sparse' without context and steps"):
        calibrated(options={"preset": "sparse", "inner": "eager"})


def test_no_tries_are_refused():
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 1"):
        calibrated(tries=0)


def test_rollouts_of_other_lengths_are_refused():
    reference = Reference({"walk": torch.zeros(4, 2)})
    with pytest.raises(LipassError, match=r"must have one shape, got \[3, 2\] for \[4, 2\]"):
        reference.error("walk", torch.zeros(3, 2))


def test_results_that_are_not_finite_are_refused():
    with pytest.raises(LipassError, match="must make finite results, got values from"):
        Reference({"walk": torch.tensor([0.0, float("inf")])})


def test_a_walk_that_is_no_number_is_refused_wherever_it_stands():
    walks = {"ahead": torch.zeros(2), "back": torch.tensor([0.0, float("nan")])}
    with pytest.raises(LipassError, match="got values from nan to nan on 'back'"):
        Reference(walks)


def test_db_are_of_a_peak_of_1_for_pictures_and_of_the_range_for_others():
    assert Reference({"walk": torch.rand(100)}).peak == 1.0
    assert Reference({"walk": torch.tensor([-3.0, 5.0])}).peak == 8.0
    pictures = Reference({"walk": torch.rand(100)})
    assert pictures.db(0.01) == pytest.approx(20.0)
    assert pictures.db(0.0) == pictures.db(1e-9) == 60.0


def test_a_curve_shows_whether_overlap_foresees_worth():
    worth = [Worth("w", n, n / 10, db) for n, db in enumerate((0.0, 0.1, 0.2, 1.0, 2.0, 4.0))]
    assert correlation(worth) == pytest.approx(1.0)
    assert correlation([*worth[:2]]) is None
    rows = curve([*worth, Worth("w", 9, 1.0, 6.0)])
    assert [row["latents"] for row in rows] == [1, 2, 2, 1, 1]
    assert rows[-1] == {"overlap": [0.9, 1.0], "latents": 1, "db": 6.0}


def test_tables_fit_a_terminal_and_say_what_to_write(found):
    text = table(found, "frontier.toml")
    assert max(map(len, text.splitlines())) <= 80
    assert "* " in text
    assert 'Session(frontier="frontier.toml", target_chunk_ms=' in text
    assert "worth, by the share" in text


def test_pictures_have_a_dot_a_try_and_a_point(found):
    root = ElementTree.fromstring(picture(found))
    dots = [one.get("class") for one in root.iter("{http://www.w3.org/2000/svg}circle")]
    assert dots.count("front") == len(found.frontier.points)
    assert len(found.tried) == dots.count("tried") + dots.count("part")
    assert dots.count("default") == 1
    # A path is filled where nothing else is said, and would hide the dots.
    assert "path { fill: none; }" in picture(found)


def test_the_command_writes_a_frontier_and_shows_it(tmp_path, capsys):
    out = tmp_path / "own.toml"
    code = main(["calibrate", f"{TARGET}:build", "--no-compile", "--tries", "5", "--repeats", "1",
                 "--frames", "2", "--out", str(out), "--svg", str(tmp_path / "own.svg"), "--json",
                 "-o", "context.gain_min=0.05"])  # fmt: skip
    said = capsys.readouterr()
    assert code == 0, said.err
    document = json.loads(said.out)
    assert {"frontier", "tried", "again_db", "worth", "seconds"} <= {*document}
    assert lipass.Frontier.load(out).options["context.gain_min"] == 0.05
    assert (tmp_path / "own.svg").read_text().startswith("<svg")
    assert (tmp_path / "own.toml.tries").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [("build_other", "got Averaging; see docs/calibrate.md"), ("none", "does not; it defines")],
)
def test_a_target_that_is_none_is_wrong_usage(name, said, tmp_path, capsys):
    code = main(["calibrate", f"{TARGET}:{name}", "--out", str(tmp_path / "own.toml")])
    assert code == 2
    assert said in capsys.readouterr().err


def test_a_target_may_leave_options_out(tmp_path, capsys):
    out = str(tmp_path / "own.toml")
    code = main(["calibrate", f"{TARGET}:build_three", "--no-compile", "--tries", "2",
                 "--repeats", "1", "--frames", "0", "--out", out])  # fmt: skip
    assert code == 0
    assert "options = {" in capsys.readouterr().out


def test_points_of_an_earlier_frontier_are_tried_first(found):
    again = calibrated(earlier=found.frontier, tries=len(found.frontier.points))
    assert {one["label"] for one in again.tried} == {one.name for one in found.frontier.points}


@pytest.mark.parametrize("preset", ["context", "cache"])
def test_an_earlier_frontier_may_be_of_more_sections(found, preset):
    options = {**walks.build()[3], "preset": preset}
    again = calibrated(earlier=found.frontier, tries=3, options=options)
    assert again.tried


def test_an_earlier_frontier_of_another_type_is_refused():
    with pytest.raises(TypeError, match=r"must be a Frontier, got str; lipass.Frontier.load"):
        calibrated(earlier="frontier.toml")


def test_an_earlier_frontier_that_is_none_is_refused_before_any_work(tmp_path, capsys):
    code = main(["calibrate", f"{TARGET}:build", "--from", str(tmp_path / "none.toml"),
                 "--out", str(tmp_path / "own.toml")])  # fmt: skip
    assert code == 2
    assert "a frontier must be a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [(["--tries", "0"], "must be 1 or more"), (["-o", "context.gian_min=1"], "context.gain_min")],
)
def test_what_cannot_be_asked_for_is_wrong_usage(given, said, tmp_path, capsys):
    out = tmp_path / "own.toml"
    assert main(["calibrate", f"{TARGET}:build", "--out", str(out), *given]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_frontiers_are_of_whole_tries_only():
    assert frontier([Tried((0,), (1.0,), (30.0,), whole=False)]) == []


def test_graphs_that_were_not_tried_attend_to_all(found):
    assert found.frontier.options["sparse"] is False
    kept = calibrated(options={**walks.build()[3], "sparse.budget_decode": 0.2}, tries=3, frames=0)
    assert kept.frontier.options["sparse.budget_decode"] == 0.2


def test_a_compiled_model_is_refused_where_it_is_to_be_compiled():
    model, roll_out, paths, options = walks.build()
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match="got one that is compiled; pass the module itself"):
        lipass.calibrate(compiled, roll_out, paths, options=options)


def test_a_loop_that_was_changed_is_tried_anew(tmp_path):
    """As by somebody who sees that a chunk computed all of its steps."""
    ledger = Ledger(tmp_path / "tries", {"ahead": {}})
    ledger.put({"a": 1}, "ahead", 0.5, ((4, 4), (8, 4)))
    ledger.check({"a": 1}, "ahead", ((4, 4), (8, 4)))
    assert ledger.get({"a": 1}, "ahead") is not None
    ledger.put({"b": 1}, "ahead", 0.5, ((4, 4), (8, 4)))
    ledger.check({"a": 1}, "ahead", ((4, 4), (8, 2)))
    ledger.put({"a": 1}, "ahead", 0.4, ((4, 4), (8, 2)))
    again = Ledger(tmp_path / "tries", {"ahead": {}})
    again.check({"a": 1}, "ahead", ((4, 4), (8, 2)))
    for one in (ledger, again):
        assert one.get({"a": 1}, "ahead").error == 0.4
        assert one.get({"b": 1}, "ahead") is None


def test_walks_may_be_longer_than_the_receipt():
    model, roll_out, _, options = walks.build()
    path = walks.parse_trajectory("left-150, right-149")
    found = lipass.calibrate(
        model, roll_out, {"long": path}, options=options, compiled=False, tries=2, repeats=1,
        frames=2,
    )  # fmt: skip
    assert found.worth


@pytest.mark.parametrize("value", [float("inf"), 1e25])
def test_a_choice_that_overflows_is_far_away_and_no_end(value):
    dense = torch.linspace(0, 1, 8)
    reference = Reference({"ahead": dense})
    error = reference.error("ahead", torch.full((8,), value))
    assert reference.db(error) == -60.0


def test_what_writes_the_file_is_missed_before_any_work(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "tomli_w", None)
    code = main(["calibrate", f"{TARGET}:no_such_function", "--out", str(tmp_path / "x.toml")])
    assert code != 0
    assert "pip install 'lipass[calibrate]'" in capsys.readouterr().err


def test_the_spectrum_of_latents_that_the_loop_shows_is_fitted(found):
    assert "grow.spectrum" not in found.frontier.environment  # no planes
    assert "Spectrum" not in table(found, "own.toml")
    planes = torch.randn(12, 3, 8, 16, generator=torch.Generator().manual_seed(0))
    told = spectrum_of([Run(torch.zeros(1), (), (), one) for one in (planes, None)])
    assert told["grow.grid"] == [8, 16]
    assert told["grow.spectrum"] == pytest.approx([1.0, 0.0], abs=0.2)  # white noise
    assert spectrum_of([Run(torch.zeros(1), (), (), planes[..., :15])]) == {}  # no even grid
    quiet = spectrum_of([Run(torch.zeros(1), (), (), planes * 1e-4)])["grow.spectrum"]
    assert quiet[0] == pytest.approx(told["grow.spectrum"][0] * 1e-8, rel=1e-3)
    own = {**found.frontier.environment, **told}
    again = dataclasses.replace(
        found, frontier=dataclasses.replace(found.frontier, environment=own)
    )
    said = table(again, "own.toml").partition("Spectrum of the latents: ")[2].splitlines()[0]
    lipass.Config.resolve("off", {"grow": True, "grow.delta": 0.1, **ast.literal_eval(said)})
