"""Load the trained weights that ship beside this file, or those of an own training run."""

from pathlib import Path
from typing import TypeVar

from safetensors.torch import load_file

from .codec import Codec
from .model import BASE, SMALL, ModelConfig, TinyWorld
from .stream import StreamWorld

SHIPPED = Path(__file__).parent / "weights"
CODEC = SHIPPED / "codec.safetensors"
World = TypeVar("World", bound=TinyWorld)
_SIZES = {"small": SMALL, "base": BASE, "sampler": SMALL}


def load(
    size: str = "small", folder: Path = SHIPPED, config: ModelConfig | None = None
) -> tuple[TinyWorld, Codec]:
    """Load model and codec in evaluation mode; `config` in place of that of a size.

    Raises:
        ValueError: a size without weights in `folder`.
    """
    path = folder / f"{size}.safetensors"
    if size not in _SIZES or not path.exists():
        have = [one for one in _SIZES if (folder / f"{one}.safetensors").exists()]
        wanted = size if size in _SIZES else "small"
        raise ValueError(
            f"weights of a size must be in {folder.name}/, got {size!r}; have {', '.join(have)}, "
            f"or train them with python -m lipass.examples.tinyworld.train --model {wanted} "
            "and give its folder; weights of small fit base too: load('small', config=BASE)"
        )
    return ready(TinyWorld(config or _SIZES[size]), path, folder)


def load_stream(
    path: Path = SHIPPED / "stream.safetensors",
    folder: Path = SHIPPED,
    config: ModelConfig = SMALL,
) -> tuple[StreamWorld, Codec]:
    """Load the streaming model, and the codec of `folder`, in evaluation mode.

    The weights of `small` fit too: what both models hold has the same names and shapes.
    """
    return ready(StreamWorld(config), path, folder)


def ready(model: World, path: Path, folder: Path) -> tuple[World, Codec]:
    """Load weights into a model, and the codec of `folder`; both in evaluation mode."""
    codec = Codec()
    model.load_state_dict(load_file(path))
    codec.load_state_dict(load_file(folder / CODEC.name))
    return model.eval().requires_grad_(False), codec.eval().requires_grad_(False)
