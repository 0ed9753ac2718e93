"""Every recorded figure has a command that makes it again, and says of which commit it is."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest

from benchmarks import figures

ROOT = figures.ROOT
# Of a day on a GPU one document says the commit of all.
RECORDED = sorted([*figures.RESULTS.glob("*.json"), *figures.RESULTS.glob("gpu/day.json")])
PAGES = [
    ROOT / "README.md", ROOT / "DESIGN.md", *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "kernels").rglob("*.md"),
]  # fmt: skip


def by_hand(path):
    return any(str(path.relative_to(ROOT)).startswith(made) for made in figures.BY_HAND)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_what_is_recorded_has_a_maker_and_a_commit(path):
    assert by_hand(path) or path.stem in figures.FIGURES, (
        f"enter {path.stem} in FIGURES of benchmarks/figures.py"
    )
    commit = figures.commit_of(json.loads(path.read_text()))
    assert commit, f"{path.name} must say its commit; make figures ONLY={path.stem} writes it"
    assert re.fullmatch(r"[0-9a-f]{7,40}\+?", commit)


@pytest.mark.parametrize("name", figures.FIGURES)
def test_commands_and_pages_of_figures_exist(name):
    figure = figures.FIGURES[name]
    if figure.command[0] == "-m":
        assert importlib.util.find_spec(figure.command[1]) is not None
    for page in figure.pages:
        assert (ROOT / page).exists()


def test_what_a_page_links_to_is_made_for_it():
    for page in PAGES:
        for name in re.findall(r"benchmarks/results/(\w+)\.json", page.read_text()):
            if (where := f"benchmarks/results/{name}.json") in figures.BY_HAND:
                continue
            shown = figures.FIGURES[name].pages
            own = page.relative_to(ROOT)
            assert any(own.is_relative_to(one) for one in shown), f"{own} shows {where}"


def test_every_picture_has_a_maker():
    made = {*figures.PICTURES, *figures.BY_HAND}
    shown = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "docs").iterdir()
        if path.suffix in (".png", ".gif", ".svg")
    }
    assert shown <= made
    assert set(figures.PICTURES.values()) <= set(figures.FIGURES)


@pytest.mark.parametrize(
    ("printed", "document"),
    [
        ('{\n "a": 1\n}', {"a": 1}),
        ('{"a": 1}\n{"a": 2}\n', {"rows": [{"a": 1}, {"a": 2}]}),
        ("walk  right\n\nturn  3/40\n", {"printed": ["walk  right", "turn  3/40"]}),
    ],
)
def test_whatever_a_command_prints_is_kept(printed, document):
    assert figures.document_of(printed) == document


@pytest.mark.parametrize("written", ["", "--json"])
def test_a_figure_is_recorded_with_its_commit(written, tmp_path, monkeypatch):
    script = "import pathlib, sys; "
    script += (
        "pathlib.Path(sys.argv[-1]).write_text('{\"rows\": [1]}')"
        if written
        else "print('{\"rows\": [1]}')"
    )
    figure = figures.Figure(("-c", script), (), 1, written=written)
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    monkeypatch.setattr(figures, "FIGURES", {"some": figure})
    figures.make("some")
    document = json.loads((tmp_path / "some.json").read_text())
    assert document["rows"] == [1]
    assert figures.commit_of(document) == document["environment"]["commit"]
    assert [path.name for path in tmp_path.iterdir()] == ["some.json"]
    assert figures.line_of("some").split()[1] == figures.commit_of(document)


def test_a_command_that_fails_keeps_what_was_recorded_and_the_others_go_on(
    tmp_path, monkeypatch, capsys
):
    fails = figures.Figure(("-c", "raise SystemExit(3)"), (), 1)
    works = figures.Figure(("-c", "print('{}')"), (), 1)
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    monkeypatch.setattr(figures, "FIGURES", {"fails": fails, "works": works})
    monkeypatch.setattr(figures, "environment", lambda: {"commit": "1234567"})
    run = subprocess.run
    pages = []

    def run_but_pages(command, **more):
        if command[1] != "-m":
            return run(command, **more)
        return pages.append(command[2])

    monkeypatch.setattr(figures.subprocess, "run", run_but_pages)
    (tmp_path / "fails.json").write_text("{}")
    assert figures.main([]) == 1
    assert "fails failed with 3" in capsys.readouterr().err
    assert (tmp_path / "fails.json").read_text() == "{}"
    assert (tmp_path / "works.json").exists()
    assert pages == ["benchmarks.readme", "docs.make.generated"]


def test_a_name_that_no_figure_has_is_refused(capsys):
    with pytest.raises(SystemExit):
        figures.main(["--only", "nothing"])
    assert "got 'nothing'; see --list" in capsys.readouterr().err


def test_rows_of_the_free_sheet_are_cut_out(tmp_path, monkeypatch):
    from PIL import Image

    (tmp_path / "demo").mkdir()
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    (tmp_path / "demo/race.gif").write_text("")
    Image.new("RGB", (4, 4)).save(tmp_path / "demo/frames-left-right-explored-9001.png")
    presets = ["inductor", "off", "all"]
    sheet = Image.new("RGB", (4, 3 + 5 * 10))
    for row in range(5):
        sheet.paste((50 * row, 0, 0), (0, 3 + 10 * row, 4, 13 + 10 * row))
    sheet.save(tmp_path / "demo/frames-left-right-free-9001.png")
    rows = [{"regime": "free", "preset": preset} for preset in presets]
    figures._pictures_of_demo({"rows": rows})
    with Image.open(tmp_path / "docs/free.png") as cut:
        assert cut.size == (4, 3 + 4 * 10)
        shown = cut.convert("RGB")
        assert [shown.getpixel((1, 8 + 10 * n))[0] for n in range(4)] == [0, 50, 150, 200]


def test_figures_are_listed_with_their_commands(capsys):
    assert figures.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(figures.FIGURES)
    assert any("lipass demo --full --json" in line for line in lines)
    assert sys.executable not in "".join(lines)
