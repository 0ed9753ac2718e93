import ast
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys
import torch
early = [name for name in sys.modules if name.startswith("lipass.compile.")]
import logging, lipass.runtime.events
logging.getLogger("lipass.runtime.events").info("at info")
logging.getLogger("lipass.kernels.registry").debug("at debug")
print(early)
"""


@pytest.mark.parametrize(("setting", "seen"), [("lipass", (1, 0)), ("+lipass", (1, 1))])
def test_torch_logs_turns_lipass_on_before_anything_of_it_is_imported(setting, seen):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={"TORCH_LOGS": setting, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stderr.count("at info"), done.stderr.count("at debug")) == seen
    # torch imports the packages that it lists, in the middle of its own import
    assert done.stdout.strip() == "[]"


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def test_compilation_says_what_became_of_its_sites(caplog):
    torch._dynamo.reset()
    compiled = torch.compile(
        attend, backend="light_interaction", options={"preset": "exact", "inner": "eager"}
    )
    q = torch.randn(1, 2, 8, 4)
    with torch.no_grad(), caplog.at_level(logging.DEBUG, "lipass"):
        compiled(q, q, q)
    said = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("a graph compiled of attend in ") for line in said), said
    assert any(line.startswith("pass find-attention: ") for line in said)


def test_library_prints_nothing():
    """What is not the command line says what it has to say by warnings, errors and logging."""
    for folder in ("lipass", "passes", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT)
            if inside.parts[:2] == ("lipass", "cli") or path.name == "__main__.py":
                continue
            calls = [
                node.lineno
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "print"
            ]
            assert not calls, f"{inside} prints in lines {calls}"


def test_handlers_and_levels_are_left_to_the_application():
    importing = "import logging, lipass.backend; print(logging.getLogger('lipass').handlers)"
    done = subprocess.run(
        [sys.executable, "-c", importing], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
