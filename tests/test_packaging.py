"""The installed package: one top-level name, lazy imports, one entry point, layers that hold."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("lipass", "passes", "kernels", "examples")
COMMANDS_THAT_RUN_IT = tuple(f"lipass/cli/{name}.py" for name in ("demo", "eval", "play"))
HEAVY = ("torch", "triton", "numpy", "sympy", "networkx", "rich", "matplotlib", "PIL")


def python(code, cwd, **environment):
    """Run code in a fresh interpreter and return what it did."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def output(code, cwd, **environment):
    done = python(code, cwd, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def sources():
    """Python files of the checkout under the paths they are installed at."""
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            if (path.parent / "pyproject.toml").exists():
                continue  # an example of a package of one's own
            below = path.relative_to(ROOT)
            yield below if folder == "lipass" else Path("lipass") / below


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build sdist and wheel from a copy, as a build in the checkout would leave files there."""
    copy = tmp_path_factory.mktemp("checkout")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=skip)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return next((copy / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def members(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {Path(name) for name in archive.namelist()}


def test_only_top_level_name_is_lipass(members):
    names = {member.parts[0] for member in members}
    assert {name for name in names if not name.endswith(".dist-info")} == {"lipass"}


def test_every_source_file_is_in_the_wheel(members):
    assert set(sources()) <= members


def test_data_files_are_in_the_wheel(members):
    assert {Path("lipass/py.typed"), Path("lipass/quality/page.css")} <= members
    for path in (ROOT / "lipass/play/page").iterdir():
        assert path.relative_to(ROOT) in members
    for folder in (ROOT / "examples", ROOT / "kernels"):
        for pattern in ("*.safetensors", "*.css", "*.js", "*.cpp"):
            for path in folder.rglob(pattern):
                assert Path("lipass") / path.relative_to(ROOT) in members


def test_wheel_works_away_from_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import lipass.kernels.plan, lipass.passes; print(lipass.kernels.__file__)"
    found = output(code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert found == str(tmp_path / "lipass/kernels/__init__.py")


@pytest.mark.parametrize("name", ["passes", "kernels", "examples"])
def test_editable_install_maps_the_folder(name, tmp_path):
    found = output(f"import lipass.{name} as m; print(m.__file__)", cwd=tmp_path)
    assert Path(found) == ROOT / name / "__init__.py"


@pytest.mark.parametrize("name", ["passes", "kernels"])
def test_bare_name_is_refused_with_the_right_one(name):
    done = python(f"import {name}; {name}.Anything", cwd=ROOT)
    assert done.returncode != 0
    assert f"imported as lipass.{name}, got '{name}'" in done.stderr
    assert f"import lipass.{name}" in done.stderr.splitlines()[-1]


def test_bare_kernels_has_no_version_and_no_modules_for_who_looks_for_another_package():
    code = "import kernels; print(getattr(kernels, '__version__', 'N/A'))"
    assert output(code, cwd=ROOT) == "N/A"
    done = python("import kernels.plan", cwd=ROOT)
    assert "No module named 'kernels.plan'" in done.stderr


def test_import_lipass_loads_nothing_heavy(tmp_path):
    code = f"import lipass, sys; print([m for m in {HEAVY} if m in sys.modules])"
    assert output(code, cwd=tmp_path) == "[]"


def test_command_line_parses_without_loading_torch(tmp_path):
    code = (
        "import sys; from lipass.cli import main; main(['demo', '--help']); "
        "print('torch' in sys.modules)"
    )
    assert output(code, cwd=tmp_path).endswith("False")


def test_import_kernels_loads_no_layer_above_and_no_triton(tmp_path):
    code = (
        "import lipass.kernels, sys; print([m for m in sys.modules if m == 'triton' or "
        "m.startswith(('lipass.passes', 'lipass.backend', 'lipass.session', 'lipass.compile'))])"
    )
    assert output(code, cwd=tmp_path) == "[]"


def test_torch_finds_the_backend_without_importing_lipass(tmp_path):
    code = (
        "import sys, torch; names = torch._dynamo.list_backends(None); "
        "print('light_interaction' in names, 'lipass' in sys.modules)"
    )
    assert output(code, cwd=tmp_path) == "True False"


def test_public_names_load_on_first_use(tmp_path):
    code = "import lipass; print(*(getattr(lipass, name) for name in lipass.__all__))"
    assert "Session" in output(code, cwd=tmp_path)


def test_unknown_name_is_an_attribute_error(tmp_path):
    done = python("import lipass; lipass.Sesion", cwd=tmp_path)
    assert "AttributeError: module 'lipass' has no attribute 'Sesion'" in done.stderr


def test_report_stays_the_function_after_its_module_is_imported(tmp_path):
    code = "import lipass.receipt, lipass; print(callable(lipass.report))"
    assert output(code, cwd=tmp_path) == "True"


@pytest.mark.parametrize("folder", ["lipass", "passes"])
def test_files_have_one_subject_as_their_lengths_say(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path


def test_only_the_commands_that_run_it_name_the_example():
    for folder in ("lipass", "passes", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.relative_to(ROOT).as_posix() not in COMMANDS_THAT_RUN_IT:
                assert not re.search("tiny_?world", path.read_text(), re.IGNORECASE), path


@pytest.mark.parametrize(
    ("folder", "above"),
    [
        ("kernels", r"lipass\.(?!kernels)\w+"),
        ("passes", r"lipass\.(?!kernels|passes|errors)\w+"),
    ],
)
def test_imports_go_down_only(folder, above):
    for path in (ROOT / folder).rglob("*.py"):
        for line in path.read_text().splitlines():
            assert not re.match(rf"\s*(from|import) {above}", line), f"{path}: {line}"
