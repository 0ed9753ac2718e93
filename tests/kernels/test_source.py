import pytest

from lipass.kernels.source import kernels_hash, source_hash


@pytest.fixture
def folder(tmp_path):
    """Return a function that gives the hash of a folder with these files."""

    def run(**files):
        for path in tmp_path.rglob("*"):
            if path.is_file():
                path.unlink()
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        source_hash.cache_clear()
        return source_hash(tmp_path)

    yield run
    source_hash.cache_clear()


BASE = {"a_dot_py": "x = 1", "native_dot_h": "int x;"}


def test_same_files_have_the_same_hash(folder):
    assert folder(**BASE) == folder(**BASE)


@pytest.mark.parametrize(
    "changed",
    [
        BASE | {"a_dot_py": "x = 2"},
        BASE | {"native_dot_h": "int y;"},
        BASE | {"below__c_dot_cpp": ""},
        {"b_dot_py": "x = 1", "native_dot_h": "int x;"},
    ],
    ids=["module", "header", "added", "renamed"],
)
def test_changed_source_changes_it(folder, changed):
    assert folder(**BASE) != folder(**changed)


@pytest.mark.parametrize("name", ["README_dot_md", "a_dot_pyc", "native_dot_so"])
def test_what_is_no_source_does_not(folder, name):
    assert folder(**BASE) == folder(**BASE | {name: "text"})


def test_hash_stays_for_a_process(folder, tmp_path):
    """What runs is what was imported, whatever happens to the files later."""
    before = folder(**BASE)
    (tmp_path / "a.py").write_text("x = 3")
    assert source_hash(tmp_path) == before


def test_kernels_have_one():
    assert len(kernels_hash()) == 64
