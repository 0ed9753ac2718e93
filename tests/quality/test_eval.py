"""`lipass eval`: what it prints, and that it goes on where it was ended."""

import json
import runpy
import sys
import textwrap
from types import SimpleNamespace

import pytest

from lipass.cli import main
from lipass.errors import LipassError
from lipass.quality import results as results_module
from lipass.quality.page import page
from lipass.quality.results import Entry, Results
from lipass.quality.run import evaluate, missing
from lipass.quality.subject import Case
from lipass.quality.summary import KEPT, summary
from lipass.quality.table import table

CONFIGURATION = {"model": "toy", "cases": [1]}
CASE = Case("turn", "explored", 1)


@pytest.fixture
def target(tmp_path, monkeypatch, toy):
    """Return the target of the toy, and the list of subjects that it built."""
    built = []
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "my_model.py"
    path.write_text("build = None\n")

    def build():
        built.append(toy())
        return built[-1]

    module = f"{path}:build"
    monkeypatch.setattr("lipass.cli.importing.import_callable", lambda text: build)
    return module, built


def document(capsys, *arguments):
    code = main(["eval", *map(str, arguments), "--json"])
    said = capsys.readouterr()
    assert code == 0, said.err
    return json.loads(said.out)


def test_document_has_rows_and_intervals(target, tmp_path, capsys):
    found = document(capsys, target[0], "--out", tmp_path / "eval.jsonl")
    row = found["rows"][0]
    assert list(row) == [
        "method", "model", "trajectory", "regime", "room", "seed", "metric", "value",
    ]  # fmt: skip
    by_method = {one["method"]: one for one in found["summary"]}
    assert by_method["close"]["verdicts"] == {"unchanged": 3}
    assert by_method["broken"]["verdicts"] == {"broken": 3}
    truth = by_method["dense"]["metrics"]["psnr_vs_truth_db"]
    assert truth["low"] <= truth["mean"] <= truth["high"]
    assert by_method["close"]["kept"].keys() == set(KEPT)
    assert by_method["broken"]["kept"] == dict.fromkeys(KEPT, False)
    assert by_method["broken"]["metrics"].keys() == {
        "speedup_vs_off", "chunk_s_p50", "chunk_s_p95", "chunk_s_slope", "density",
    }  # fmt: skip


def test_table_and_page_name_all_methods(target, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["eval", target[0], "--out", str(tmp_path / "r"), "--html", str(page)]) == 0
    said = capsys.readouterr()
    shown, _, where = said.out.rpartition("\n\n")  # whose length is that of a path
    assert str(tmp_path) in where
    assert max(map(len, shown.splitlines())) <= 80
    text = page.read_text()
    for method in target[1][0].methods:
        assert method in said.out
        assert method in text
    assert text.count("data:image/webp") >= 4
    assert "://" not in text


def test_an_ended_run_goes_on_where_it_was(target, tmp_path, capsys):
    out, built = tmp_path / "eval.jsonl", target[1]
    whole = document(capsys, target[0], "--out", out)
    lines = out.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 9
    out.write_text("".join(lines[:6]) + lines[6][:40])  # ended while a line was written
    again = document(capsys, target[0], "--out", out)
    assert [one["metric"] for one in again["rows"]] == [one["metric"] for one in whole["rows"]]
    assert [method for method, _ in built[1].asked] == [
        "dense",
        "broken",
        "dense",
        "close",
        "broken",
    ]
    document(capsys, target[0], "--out", out)
    assert built[2].asked == []


def test_results_of_another_configuration_are_refused(tmp_path):
    path = tmp_path / "eval.jsonl"
    Results(path, CONFIGURATION)
    Results(path, CONFIGURATION)
    with pytest.raises(
        LipassError, match=r"must be of the same run.* has cases \[1\] in place of"
    ):
        Results(path, {**CONFIGURATION, "cases": [2]})


def test_a_second_run_on_one_file_is_refused_while_the_first_lives(tmp_path):
    path = tmp_path / "eval.jsonl"
    with Results(path, CONFIGURATION):
        with path.open("a") as file:
            file.write('{"method": "off", "ca')  # as a line of the first that is being written
        before = path.read_bytes()
        with pytest.raises(LipassError, match=r"one run at a time, .* writes .*eval.jsonl; wait"):
            Results(path, CONFIGURATION)
        assert path.read_bytes() == before
    Results(path, CONFIGURATION)  # goes on, and is closed by nobody
    assert path.read_bytes() == before[: before.index(b"\n") + 1]
    Results(path, CONFIGURATION)


def test_a_refused_file_is_not_held(tmp_path):
    path = tmp_path / "eval.jsonl"
    Results(path, CONFIGURATION)
    with pytest.raises(LipassError) as refused:
        Results(path, {**CONFIGURATION, "cases": [2]})
    assert Results(path, CONFIGURATION).entries == []
    del refused  # which held all that was on the stack


def test_where_there_are_no_locks_entries_that_are_there_twice_count_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    unlocked = runpy.run_path(results_module.__file__)["Results"]
    one, other = (unlocked(tmp_path / "r", CONFIGURATION) for _ in range(2))
    one.add(Entry("off", CASE, {"seam": 1.0}))
    other.add(Entry("off", CASE, {"seam": 2.0}))
    other.add(Entry("all", CASE, {"seam": 3.0}))
    values = [entry.values["seam"] for entry in Results(tmp_path / "r", CONFIGURATION)]
    assert values == [1.0, 3.0]


def test_what_a_subject_names_twice_is_rolled_out_once(toy, tmp_path):
    subject = toy(rooms=(1, 1))
    subject.methods = ("dense", "dense")
    results = Results(tmp_path / "r", {})
    evaluate(subject, results, lambda *_, **__: None)
    assert [entry.method for entry in results] == ["dense"]
    assert missing(subject, results) == []


HEAD = '{"schema": 1, "model": "toy", "cases": [1]}\n'


@pytest.mark.parametrize(
    "text",
    [
        "not json\n", "[1]\n", '{"schema": 9}\n', "\xff\xfe\n", "a line without an end",
        HEAD + "{}\n", HEAD + "[]\n{",
    ],
)  # fmt: skip
def test_other_files_are_refused_and_left_alone(text, tmp_path):
    path = tmp_path / "eval.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(LipassError, match="name another --out"):
        Results(path, CONFIGURATION)
    assert path.read_bytes() == text.encode("latin-1")


def test_a_method_that_jumps_at_seams_is_outside_of_the_interval(toy, tmp_path):
    subject = toy()
    results = Results(tmp_path / "r", {})
    roll_out = subject.roll_out

    def jumping(method, case, scene):
        made = roll_out(method, case, scene)
        if method == "close":
            made.frames[8::8] = made.frames[8::8].flip(-1)
        return made

    subject.roll_out, subject.methods = jumping, ("dense", "close")
    evaluate(subject, results, lambda *_, **__: None)
    (found,) = (one for one in summary(results, "dense") if one["method"] == "close")
    assert found["kept"]["seam_worst"] is False
    assert missing(subject, results) == []


def spoiling(subject, name, value):
    """Let a method of a subject make a value that cannot be compared, in its second room."""
    roll_out = subject.roll_out

    def spoilt(method, case, scene):
        made = roll_out(method, case, scene)
        if (method, case.room) == (name, 2):
            made.frames[9] = value
        return made

    subject.roll_out = spoilt


@pytest.fixture(scope="module")
def one_that_broke(toy, tmp_path_factory):
    """Results of which the second room of `close` has no figures of pictures."""
    subject = toy()
    subject.methods = ("dense", "close")
    spoiling(subject, "close", float("nan"))
    results = Results(tmp_path_factory.mktemp("broke") / "r", {})
    evaluate(subject, results, lambda *_, **__: None)
    return results


def test_means_without_a_walk_that_broke_are_not_kept(one_that_broke):
    dense, close = summary(one_that_broke, "dense")
    assert close["verdicts"] == {"unchanged": 2, "broken": 1}
    assert close["kept"] == dict.fromkeys(KEPT, False)
    assert close["metrics"]["psnr_vs_off_db"]["count"] == 2
    assert close["metrics"]["seam"]["worst"] is None
    assert close["metrics"]["chunk_s_p50"]["count"] == dense["metrics"]["seam"]["count"] == 3


def test_a_figure_that_the_dense_model_lacks_too_is_not_lost(one_that_broke):
    entries = [
        one._replace(values={**one.values, "loop_score": None}) if one.case.room == 2 else one
        for one in one_that_broke
    ]
    (close,) = (one for one in summary(entries, "dense") if one["method"] == "close")
    assert close["kept"]["seam"] is False
    assert close["kept"]["loop_score"] is not False


def test_table_and_page_say_of_how_many_walks_a_mean_is(one_that_broke):
    found = summary(one_that_broke, "dense")
    shown = table(found, "dense").splitlines()
    assert "close: of 2 of 3 walks, others have values out of range" in shown
    assert "  close: nothing; not: drift, slope, seams, worst seam, loop" in shown
    text = page("toy", "", found, one_that_broke.entries, "dense")
    assert "<small>of 2 walks<br>" in text
    assert "worst broken" in text
    assert "out of range: turn, explored, room 2.</p>" in text


@pytest.mark.parametrize("value", [float("nan"), -3.0])
def test_a_method_that_diverges_does_not_end_an_evaluation(value, toy, tmp_path):
    subject = toy(rooms=(2, 3))
    spoiling(subject, "close", value)
    results = Results(tmp_path / "r", {})
    evaluate(subject, results, lambda *_, **__: None)
    assert missing(subject, results) == []
    said = [entry.verdict for entry in results if entry.method == "close"]
    assert said == ["broken", "unchanged"]


@pytest.mark.parametrize(
    ("value", "said"),
    [(float("nan"), "must be finite, got 6912 of"), (1e6, r"must lie in 0..1, got .* 1e\+06")],
)
def test_a_dense_model_that_diverges_is_refused_by_its_case(value, said, toy, tmp_path):
    subject = toy(rooms=(1, 2))
    subject.methods = ("dense",)
    spoiling(subject, "dense", value)
    results = Results(tmp_path / "r", {})
    with pytest.raises(LipassError, match=f"frames of 'dense', .* room 2, {said}"):
        evaluate(subject, results, lambda *_, **__: None)
    assert {entry.case.room for entry in results} == {1}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "nothing"], "methods must be of 'off'"),
        (["--trajectory", "up"], "trajectories must be of"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["x.py:y", "--quick"], "a target brings its methods and walks"),
        (["x.py:y", "--rooms", "3"], "got --rooms beside x.py:y"),
        (["--out", "nowhere/eval.jsonl"], "the folder of --out must exist"),
    ],
)
def test_wrong_usage_is_told_before_the_work(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_prints_leaves_a_json_document_alone(tmp_path, capsys, monkeypatch, toy):
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "loud.py"
    path.write_text(
        textwrap.dedent(
            """
            import sys
            print("imported")
            from lipass.quality.subject import Case

            def build():
                print("built")
                toy = sys.modules["toys_of_a_test"].Toy(rooms=(1,))
                scene, roll_out = toy.scene, toy.roll_out
                toy.methods, toy.settings = ("dense",), {}
                toy.scene = lambda case: (print("shown"), scene(case))[1]
                toy.roll_out = lambda *given: (print("rolled out"), roll_out(*given))[1]
                return toy
            """
        )
    )
    monkeypatch.setitem(sys.modules, "toys_of_a_test", SimpleNamespace(Toy=toy))
    found = document(capsys, f"{path}:build", "--out", tmp_path / "r")
    assert {row["method"] for row in found["rows"]} == {"dense"}


def test_results_of_other_versions_are_refused_for_a_model_of_ones_own(target, tmp_path, capsys):
    out = tmp_path / "eval.jsonl"
    found = document(capsys, target[0], "--out", out)
    head = json.loads(out.read_text().splitlines()[0])
    assert found["settings"] == head["settings"]
    assert head["settings"]["noise"] == 0.01
    for key in ("versions", "threads"):
        other = {**head, "settings": {**head["settings"], key: "another"}}
        out.write_text(json.dumps(other) + "\n")
        assert main(["eval", target[0], "--out", str(out)]) == 1
        assert "must be of the same run" in capsys.readouterr().err


def test_a_target_that_returns_something_else_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "other.py"
    path.write_text(textwrap.dedent("def build():\n    return 3\n"))
    assert main(["eval", f"{path}:build", "--out", str(tmp_path / "r")]) == 1
    assert "must return a lipass.quality.subject.Subject" in capsys.readouterr().err
