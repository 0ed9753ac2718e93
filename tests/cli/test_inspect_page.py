"""The page and the picture of `lipass inspect`: complete, alone, without errors in a browser."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from lipass.cli import main


class _Rows(HTMLParser):
    """Collect the first cell of each row of the site table: its title, then the names below."""

    def __init__(self):
        super().__init__()
        self.rows, self.inside, self.cell = [], False, False

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.inside = dict(attrs).get("class") == "sites"
        if tag == "th" and self.inside and dict(attrs).get("class") == "mono":
            self.rows.append([])
            self.cell = True

    def handle_endtag(self, tag):
        self.cell = self.cell and tag != "th"

    def handle_data(self, data):
        if self.cell:
            self.rows[-1].append(data)


@pytest.fixture
def written(world, tmp_path, capsys):
    page, picture = tmp_path / "out.html", tmp_path / "out.svg"
    assert main(["inspect", world, "--json", "--html", str(page), "--svg", str(picture)]) == 0
    return page, picture, json.loads(capsys.readouterr().out)


def test_page_has_a_row_for_equal_layers_that_opens_to_each_site(written):
    page, _, document = written
    parser = _Rows()
    parser.feed(page.read_text())
    names = [site["name"] for site in document["sites"]]
    assert parser.rows == [["blocks.0-1:decode", *names]]
    assert names == ["blocks.0:decode", "blocks.1:decode"]


def test_page_has_each_pass_and_the_rewritten_call_beside_the_old_one(written):
    page, _, document = written
    text = page.read_text()
    assert text.count('<details class="pass">') == len(document["passes"])
    assert re.search(r'<td class="gone">[^<]*scaled_dot_product_attention', text)
    assert re.search(r'<td class="new">[^<]*lipass.sparse_attention', text)


def test_page_loads_nothing_from_elsewhere(written):
    page, picture, _ = written
    for text in (page.read_text(), picture.read_text()):
        outside = re.findall(r"(?:src|href)=[\"'](?!data:|#)[^\"']*|url\((?!data:)", text)
        assert outside == []


def test_picture_is_xml_and_has_sites_cameras_and_layers(written):
    _, picture, _ = written
    root = ElementTree.fromstring(picture.read_text())
    kinds = [element.get("class", "") for element in root.iter()]
    assert kinds.count("layer") == 3
    assert "chip pose" in kinds
    assert "bar rewritten" in kinds


def test_folder_of_a_file_must_exist(world, tmp_path, capsys):
    assert main(["inspect", world, "--html", str(tmp_path / "no" / "out.html")]) == 2
    assert "must exist" in capsys.readouterr().err


def test_equal_layers_are_folded_where_there_are_many():
    from lipass.cli.inspect_svg import picture

    def layer(i):
        work = {"flops": 10**9, "attention_flops": 0, "nodes": 9, "step": None, "sites": []}
        return {"name": f"blocks.{i}", **work}

    graph = {"graph": 0, "nodes": 500, "nodes_after": 500, "flops": 1, "flops_after": 1}
    graph |= {"inputs": [], "layers": [layer(i) for i in range(60)]}
    drawn = picture({"target": "t", "graphs": [graph], "sites": [], "poses": [], "passes": []})
    assert drawn.count('class="layer"') == 1
    assert "blocks.0 .. blocks.59" in drawn
    assert ">x60<" in drawn


def test_notes_that_differ_in_numbers_are_one_line():
    from lipass.cli.inspect_page import _notes

    def note(i, reason):
        return {"site": f"history.{i}", "action": "rewritten", "reason": reason}

    (line,) = _notes([note(i, f"1 call run once for the same cache_{i}_2") for i in range(54)])
    assert "history.0 .. history.53 (54)</code> * call run once for the same cache_*_*" in line
    (line,) = _notes([note(0, "1 call run once"), note(1, "1 call run once")])
    assert line.endswith("</code> 1 call run once</li>")


def test_browser_shows_the_rows_without_a_console_error(written, opened):
    page, _, document = written
    dom = opened(page)
    assert 'class="scripted"' in dom  # the script ran
    parser = _Rows()
    parser.feed(dom)
    assert parser.rows == [["blocks.0-1:decode", *(site["name"] for site in document["sites"])]]


def test_page_is_no_wider_than_a_phone(written, measured):
    wide = "doc.documentElement.scrollWidth - doc.documentElement.clientWidth"
    for width, found in measured(written[0], {"wide": wide}).items():
        assert found["wide"] == 0, width
