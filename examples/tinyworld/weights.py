"""Load the trained weights that ship beside this file, or those of an own training run."""

from pathlib import Path

from safetensors.torch import load_file

from .codec import Codec
from .model import BASE, SMALL, TinyWorld
from .stream import StreamWorld

SHIPPED = Path(__file__).parent / "weights"


def load(size: str = "small", folder: Path = SHIPPED) -> tuple[TinyWorld, Codec]:
    """Load model and codec in evaluation mode.

    Raises:
        ValueError: a size without weights in `folder`.
    """
    path = folder / f"{size}.safetensors"
    sizes = ("small", "base")
    if size not in sizes or not path.exists():
        have = [one for one in sizes if (folder / f"{one}.safetensors").exists()]
        raise ValueError(
            f"weights of a size must be in {folder.name}/, got {size!r}; have {', '.join(have)}, "
            "or train them with python -m lipass.examples.tinyworld.train"
        )
    model, codec = TinyWorld(SMALL if size == "small" else BASE), Codec()
    model.load_state_dict(load_file(path))
    codec.load_state_dict(load_file(folder / "codec.safetensors"))
    return model.eval().requires_grad_(False), codec.eval().requires_grad_(False)


def load_stream(path: Path = SHIPPED / "stream.safetensors") -> tuple[StreamWorld, Codec]:
    """Load the streaming model and the codec in evaluation mode.

    The weights of `small` fit too: what both models hold has the same names and shapes.
    """
    model, codec = StreamWorld(SMALL), Codec()
    model.load_state_dict(load_file(path))
    codec.load_state_dict(load_file(SHIPPED / "codec.safetensors"))
    return model.eval().requires_grad_(False), codec.eval().requires_grad_(False)
