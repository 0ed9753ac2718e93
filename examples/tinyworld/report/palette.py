"""Give each preset one colour that holds on light and dark paper, in all figures."""

PRESETS = {
    "truth": "#6b7280",
    "inductor": "#94a3b8",
    "off": "#64748b",
    "exact": "#0e9aa7",
    "context": "#3b82f6",
    "sparse": "#8b5cf6",
    "cache": "#d97706",
    "all": "#e5484d",
    "reference": "#30a46c",
    "no-memory": "#a1887f",
    "copy-last": "#bcaaa4",
}
KINDS = ("sink", "memory", "window", "kept")
_GREY = "#888888"


def preset_colour(preset: str) -> str:
    """Return the colour of a preset; presets of the user's own are grey."""
    return PRESETS.get(preset, _GREY)


def page_colour(preset: str) -> str:
    """Return the colour of a preset on the page, where other hues say why a frame is read."""
    return PRESETS[preset] if preset in ("off", "all") else _GREY


def kind_of(reason: str) -> str:
    """Return why a frame was kept: the first known word of its reason, else plainly `kept`."""
    for word in reason.lower().replace(":", " ").replace(",", " ").split():
        if word in KINDS:
            return word
    return "kept"
