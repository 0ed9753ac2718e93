"""What `lipass doctor --model FAMILY --checkout PATH` says, and what it refuses in one line."""

import json
import sys
from pathlib import Path

import pytest

from lipass.adapters.checkouts.imports import imported_from
from lipass.cli import main

CONTRACTS = Path(__file__).parent.parent / "adapters" / "contracts"


def said(capsys, *arguments):
    code = main(["doctor", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.slow
def test_a_checkout_is_examined_in_a_process_of_its_own(capsys):
    path = CONTRACTS / "hy_worldplay"
    code, out, _ = said(capsys, "--model", "hy-worldplay", "--checkout", path, "--json")
    found = json.loads(out)
    assert [one for one in found["checks"] if not one["holds"]] == []
    assert (code, found["holds"], found["family"]) == (0, True, "hy_worldplay")
    assert any("forward_vision" in one for one in found["changes"])
    assert not any(name.partition(".")[0] == "hyvideo" for name in sys.modules)
    assert not list(path.rglob("__pycache__"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "nobody", "--checkout", "."], "--model must be one of hy-worldplay"),
        (["--model", "hy-worldplay"], "takes --model and --checkout together"),
        (["--checkout", "."], "takes --model and --checkout together"),
        (["--model", "hy-worldplay", "--checkout", "/nowhere"], "--checkout must be a folder"),
    ],
)
def test_what_cannot_be_examined_is_one_line(capsys, arguments, told):
    code, out, err = said(capsys, *arguments)
    assert (code, out) == (2, "")
    assert told in err
    assert len(err.splitlines()) == 1


def test_a_folder_of_something_else_is_one_line(capsys, tmp_path):
    code, out, err = said(capsys, "--model", "hy-worldplay", "--checkout", tmp_path)
    assert (code, out) == (1, "")
    assert "holds hyvideo, and" in err
    assert len(err.splitlines()) == 1


@pytest.fixture
def stranger(tmp_path):
    """Yield a checkout that imports what nobody has installed."""
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name in ("strange_code", "nobodys_tokenizer", "nobodys_codec"):
        for one in [m for m in sys.modules if m.partition(".")[0] == name]:
            del sys.modules[one]


def test_packages_that_only_helpers_import_are_stood_in_for(stranger):
    (stranger / "strange_code.py").write_text(
        "from nobodys_tokenizer.models import Tokenizer\n"
        "class Own(Tokenizer):\n    pass\n"
        "try:\n    import nobodys_codec\nexcept ImportError:\n    nobodys_codec = None\n"
    )
    with imported_from(stranger, holds="strange_code.py") as stood_in:
        import strange_code
    assert stood_in == ["nobodys_tokenizer"]
    assert strange_code.nobodys_codec is None
    with pytest.raises(ModuleNotFoundError, match=r"nobodys_tokenizer.models.Tokenizer is needed"):
        strange_code.Tokenizer()
    with pytest.raises(ModuleNotFoundError):
        __import__("nobodys_codec")


def test_a_package_that_the_model_computes_with_is_named_with_its_pip_line(stranger):
    (stranger / "strange_code.py").write_text("import nobodys_codec\n")
    with (
        pytest.raises(ModuleNotFoundError, match="-m pip install nobodys_codec"),
        imported_from(stranger, ("torch", "nobodys_codec")),
    ):
        import strange_code  # noqa: F401
