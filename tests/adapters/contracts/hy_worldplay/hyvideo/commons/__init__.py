"""Choose the code of attention by what is installed."""


def maybe_fallback_attn_mode(mode, infer_state=None, block_idx=None):
    if not mode.startswith("flash"):
        return mode
    try:
        import flash_attn  # noqa: F401

        return mode
    except Exception:
        return "torch"
