"""The table of docs/grow.md: what half of the grid loses where all is known of the latents."""

from benchmarks.grow_resolution import known_latents


def table() -> str:
    """Compare steps on half of the grid with fewer steps, a row a size, list and tolerance."""
    lines = [
        "| latents | delta | on half | cost in steps | dB | fewer steps | dB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in known_latents():
        cells = (
            row["latents"],
            f"{row['delta']:g}",
            f"{row['on_half']} of {row['steps']}",
            f"{row['cost_in_steps']:g}",
            _pair(row["db_to_all_steps"], row["db_of_high_frequencies"]),
            row["fewer_steps"],
            _pair(row["fewer_db_to_all_steps"], row["fewer_db_of_high_frequencies"]),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _pair(whole: object, high: object) -> str:
    return "same" if whole is None else f"{whole}, {high}"
