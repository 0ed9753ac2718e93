"""The demo's report: complete, self-contained, readable on 80 columns."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from PIL import Image

from lipass.examples.tinyworld.report import mp4_left_out, races, table, write_report
from lipass.examples.tinyworld.report.page import page
from lipass.examples.tinyworld.report.pictures import mp4, strip_uri
from lipass.examples.tinyworld.report.race import LONGEST_S, frames_done, race

PRESETS = ("inductor", "off", "exact", "all", "no-memory", "copy-last")
SCENES = (("left/right", "explored", 9000), ("loop", "free", 9001))
CHUNKS, CHUNK_FRAMES, RECORDED = 4, 4, 8
VOID = {"meta", "link", "input", "br"}


def fabricate(pixels=16):
    """Two scenes, six presets; the baselines have no chunks and no steps."""
    random = np.random.default_rng(0)
    rows, rollouts, frames, truth = [], [], {}, {}
    for scene in SCENES:
        shape = (CHUNKS * CHUNK_FRAMES, pixels, pixels, 3)
        truth[scene] = random.integers(0, 255, shape, dtype=np.uint8)
        for position, preset in enumerate(PRESETS):
            frames[preset, *scene] = random.integers(0, 255, shape, dtype=np.uint8)
            rows.append(_row(preset, scene, 1.0 + position))
            rollouts.append(_rollout(preset, scene))
    equal = {"preset": "all", "action": "rewritten", "reason": "faster", "density": 0.31}
    kept = {"preset": "exact", "action": "kept", "reason": "32 keys < 128", "density": None}
    sites = [
        *({"name": f"blocks.{layer}", **equal} for layer in range(6)),
        {"name": "text.0", **kept},
    ]
    result = {
        "schema_version": 1,
        "device": "cpu",
        "versions": {"torch": "2.13.0"},
        "rows": rows,
        "rollouts": rollouts,
        "room": {"size": [6.0, 5.0], "boxes": [[1.0, 1.0, 2.0, 2.0]]},
        "sites": sites,
    }
    return result, frames, truth


def _keys(preset, scene):
    return dict(zip(("preset", "trajectory", "regime", "room"), (preset, *scene), strict=True))


def _row(preset, scene, speed):
    baseline = preset in ("no-memory", "copy-last")
    row = _keys(preset, scene) | {
        "dit_core_s": 4.0 / speed,
        "speedup_vs_off": speed,
        "psnr_vs_off_db": None if preset == "off" else 120.0 if preset == "exact" else 33.4,
        "psnr_vs_off_affected_db": math.nan if preset == "exact" else 31.0,
        "psnr_vs_truth_db": 29.2 if scene[1] == "explored" else None,
        "self_consistency_db": 27.5,
        "density": 0.4,
        "steps_computed": 32,
        "steps_total": 64,
        "context_latents_mean": 8.5,
        "kv_bytes_peak": 12_345_678,
        "recompiles_after_warmup": 0,
        "compile_s": 31.5,
    }
    kept = {"preset", "trajectory", "regime", "room", "psnr_vs_truth_db"}
    return {key: value if key in kept or not baseline else None for key, value in row.items()}


def _rollout(preset, scene):
    camera = [[1.0 + 0.1 * i, 2.0, 6.0 * i] for i in range(RECORDED + CHUNKS * CHUNK_FRAMES)]
    chunks = []
    for index in range(0 if preset in ("no-memory", "copy-last") else CHUNKS):
        last = RECORDED + index * CHUNK_FRAMES
        reasons = {i: "dropped: overlap 0.10 < 0.30" for i in range(1, last - 4)}
        reasons |= {0: "sink", 2: "memory: overlap 0.72"}
        reasons |= {i: "window" for i in range(last - 4, last)}
        chunks.append(
            {
                "index": index,
                "context": [0, 2, *range(last - 4, last)],
                "reasons": {str(frame): reason for frame, reason in reasons.items()},
                "window_chunks": 1,
                "dynamics": 0.0123,
                "overlap_max": 0.72,
                "steps_computed": 2,
                "steps_total": 4,
                "density": 0.4,
                "seconds": 0.12,
            }
        )
    return _keys(preset, scene) | {"chunks": chunks, "camera": camera}


class _Outline(HTMLParser):
    """Count elements by tag and class, and insist that tags are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.count = [], {}

    def handle_starttag(self, tag, attrs):
        for name in [tag, *(f"{tag}.{c}" for c in (dict(attrs).get("class") or "").split())]:
            self.count[name] = self.count.get(name, 0) + 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, write_report(*fabricate(), out)


@pytest.fixture(scope="module")
def html(report):
    return (report[0] / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def outline(html):
    parser = _Outline()
    parser.feed(html)
    assert not parser.open
    return parser.count


def test_one_table_row_per_preset_and_scene(outline):
    assert outline["tr.row"] == len(PRESETS) * len(SCENES)


def test_one_film_per_preset_and_the_truth(outline):
    assert outline["div.film"] == (len(PRESETS) + 1) * len(SCENES)


def test_map_and_timeline_only_where_chunks_were_decided(outline):
    assert outline["svg.map"] == outline["svg.timeline"] == 4 * len(SCENES)


def test_equal_layers_are_one_line_with_the_preset_whose_they_are(outline, html):
    assert outline["tr.rewritten"] == outline["tr.kept"] == 1
    assert re.search(r"<td>all</td><td>blocks\.\*</td>.*?<td>6</td>", html)
    assert re.search(r"<td>exact</td><td>text\.0</td>.*?<td>1</td>", html)


def test_page_refers_to_nothing_outside_of_itself(html):
    assert "://" not in html
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)|url\((?!data:)""", html)


def test_frames_with_the_same_reason_share_a_line(html):
    assert "dropped: overlap \u2026 &lt; 0.30: 1, 3</li>" in html
    assert "window: 4-7</li>" in html


def test_names_are_escaped():
    result, frames, truth = fabricate()
    result["sites"][0]["reason"] = "<script>alert(1)</script>"
    assert "<script>alert" not in page(result, frames, truth)


def test_all_files_are_written_and_readable(report):
    out, written = report
    names = {path.name for path in written}
    assert {"report.html", "receipt.json", "speed-quality.png", "chunks.png"} <= names
    assert {"frames-left-right-explored-9000.png", "film-loop-free-9001.gif"} <= names
    assert all(path.stat().st_size > 0 for path in written)
    assert json.loads((out / "receipt.json").read_text())["schema_version"] == 1


def durations_ms(path):
    with Image.open(path) as film:
        shown = []
        for index in range(film.n_frames):
            film.seek(index)
            shown.append(film.info["duration"])
    return shown


def test_race_ends_when_the_slower_one_is_done(report):
    shown_ms = durations_ms(report[0] / "race.gif")
    rollout = {run["preset"]: run for run in fabricate()[0]["rollouts"]}
    took_s = sum(chunk["seconds"] for chunk in rollout["off"]["chunks"])
    assert sum(shown_ms[:-1]) / 1000 == pytest.approx(took_s, abs=0.1)
    assert shown_ms[-1] > 1000


def test_long_race_is_played_faster(tmp_path):
    films = {name: np.zeros((8, 8, 8, 3), np.uint8) for name in ("off", "all")}
    path = race(films, {"off": [100.0, 200.0], "all": [50.0, 50.0]}, tmp_path / "race.gif")
    assert sum(durations_ms(path)[:-1]) / 1000 <= LONGEST_S + 0.1


def test_frames_of_a_race_come_while_their_chunk_is_made():
    ends_s = np.array([1.0, 3.0])
    shown = [frames_done(ends_s, now_s, 8) for now_s in (0, 0.5, 1.0, 2.0, 3.0, 9.0)]
    assert shown == [0, 2, 4, 6, 8, 8]


def test_no_race_where_one_was_not_timed(tmp_path):
    result, frames, _ = fabricate()
    result["rollouts"] = [run for run in result["rollouts"] if run["preset"] != "off"]
    assert races(result, frames, tmp_path) == []


def test_receipt_is_strict_json(report):
    text = (report[0] / "receipt.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_table_fits_80_columns():
    text = table(fabricate()[0])
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("\nexact") == len(SCENES)


def test_table_marks_what_was_not_measured():
    line = next(
        line for line in table(fabricate()[0]).splitlines() if line.startswith("copy-last")
    )
    assert line.split()[1:5] == ["-", "-", "-", "-"]


def test_too_long_a_film_is_refused():
    with pytest.raises(ValueError, match=r"at most 16383, got 200 \* 128; report fewer"):
        strip_uri(np.zeros((200, 128, 128, 3), np.uint8))


def test_report_without_a_room_or_sites():
    result, frames, truth = fabricate()
    result["sites"], result["room"] = [], None
    outline = _Outline()
    outline.feed(page(result, frames, truth))
    assert "svg.map" not in outline.count
    assert "table.sites" not in outline.count


def test_result_is_one_sentence(html):
    (sentence,) = re.findall(r'<h1 id="result">(.*?)</h1>', html)
    plain = re.sub("<.*?>", "", sentence)
    assert plain == "all makes these frames 4.00x as fast as off, and as close to the truth."


@pytest.mark.parametrize(
    ("truth_db", "told"), [(28.0, "1.2 dB further from"), (30.4, "1.2 dB closer to")]
)
def test_what_the_speed_cost_is_in_the_sentence(truth_db, told):
    result, frames, truth = fabricate()
    for row in result["rows"]:
        if row["preset"] == "all" and row["psnr_vs_truth_db"] is not None:
            row["psnr_vs_truth_db"] = truth_db
    assert f"off</i>, {told} the truth." in page(result, frames, truth)


def test_others_are_behind_a_toggle(html):
    first, _, others = html.partition('<details class="others">')
    assert re.findall(r'aria-label="film of (.*?)"', first) == ["truth", "off", "all"]
    assert "4 more: inductor, exact, no-memory, copy-last" in others


def test_browser_shows_the_rows_and_plays_without_a_console_error(report, opened):
    dom = opened(report[0] / "report.html")
    assert dom.count('<tr class="row') == len(PRESETS) * len(SCENES)
    assert re.search(r'class="[^"]*scripted', dom)


def test_first_screen_has_the_result_and_the_three_films_at_any_width(report, measured):
    films = "[...doc.querySelectorAll('.first')].slice(0, 3)"
    asked = {
        "wide": "doc.documentElement.scrollWidth - doc.documentElement.clientWidth",
        "names": f"{films}.map((one) => one.querySelector('h3').textContent)",
        "ends": f"{films}.map((one) => one.querySelector('.film').getBoundingClientRect().bottom)",
        "result": "doc.getElementById('result').getBoundingClientRect().bottom",
    }
    for width, found in measured(report[0] / "report.html", asked).items():
        assert found["wide"] == 0, width
        assert found["names"] == ["truth", "off", "all"]
        assert max(*found["ends"], found["result"]) < 800


def test_films_play_at_the_speed_they_were_made_where_asked(opened, tmp_path):
    result, frames, truth = fabricate()
    for run in result["rollouts"]:
        for chunk in run["chunks"]:
            chunk["seconds"] = 0.001 if run["preset"] == "all" else 1.5
    asked = "<script>document.querySelector('input[type=checkbox]').click()</script></body>"
    path = tmp_path / "raced.html"
    # A browser without a window draws when it likes, and its virtual time is that of timers.
    timed = "<script>requestAnimationFrame = (f) => setTimeout(() => f(performance.now()), 20)"
    document = page(result, frames, truth).replace("<body", f"{timed}</script><body", 1)
    path.write_text(document.replace("</body>", asked))
    dom = opened(path)
    shown = re.findall(r'<article class="first" style="[^"]*--frame: (\d+)[^>]*><h3>(.*?)<', dom)
    (slow, dense), (done, fast) = shown
    assert (dense, fast, int(done)) == ("off", "all", CHUNKS * CHUNK_FRAMES - 1)
    assert 0 < int(slow) < int(done)  # two of six seconds


def test_films_as_mp4_have_every_frame(tmp_path):
    av = pytest.importorskip("av")
    films = {name: np.zeros((8, 16, 16, 3), np.uint8) for name in ("truth", "off")}
    with av.open(mp4(films, tmp_path / "film.mp4")) as film:
        assert film.streams.video[0].frames == 8


def test_missing_pyav_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'lipass[video]'" in mp4_left_out()
