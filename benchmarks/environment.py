"""Say on what, with which versions and at which commit a measurement was taken."""

import subprocess

from lipass.cli import doctor

_PACKAGES = ("torch", "triton", "lipass")


def environment() -> dict[str, object]:
    """Describe device, versions and commit, for the documents under `benchmarks/results`."""
    found = doctor.findings()
    device = found["devices"][-1]
    return {
        "device": f"{device['name']}, {device['detail']}",
        "python": found["python"],
        "versions": {name: found["versions"][name] for name in _PACKAGES},
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("diff", "--stat") else ""),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()
