"""What inspect tells people to do next follows from what it found."""

import pytest

from lipass.cli import main
from lipass.cli.next_steps import next_steps

UPSTREAM = "no reshape from [.., T, Y, X, ..] to its tokens is upstream of q"


def site(**changed):
    return {
        "name": "blocks.0:decode", "role": "decode", "action": "rewritten",
        "reason": "decode, budget 0.3", **changed,
    }  # fmt: skip


def found(**changed):
    return {
        "preset": "all", "graphs": [{}], "graph_breaks": [], "sites": [site()], "poses": [{}],
        **changed,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("document", "first"),
    [
        (found(), "compile it: torch.compile(model, backend='light_interaction', mode='all')"),
        (found(graphs=[], sites=[]), "make the target return what is called with tensors"),
        (found(sites=[]), "no attention was found: call F.scaled_dot_product_attention"),
        (found(preset="off"), "try --preset all"),
        (
            found(graph_breaks=[{"source": "model.py:3"}]),
            "mend the 1 graph breaks above, model.py:3 first",
        ),
        (
            found(sites=[site(action="kept", reason="its gradient is recorded")]),
            "1 sites are kept (its gradient is recorded): call the model under torch.no_grad()",
        ),
        (
            found(sites=[site(action="kept", reason="something rare")]),
            "1 sites are kept (something rare): `lipass explain TARGET 'blocks.0:decode'`",
        ),
        (
            found(sites=[site(reason="x; here it would run dense: predicted 2 ms vs 1 ms")]),
            "1 rewritten sites would run dense on this machine",
        ),
        (
            found(
                sites=[site(role="text", action="kept", reason=f"{UPSTREAM}; sparse.token_grid")]
            ),
            f"1 sites are kept ({UPSTREAM}; sparse.token_grid): say the grid with -o",
        ),
        (
            found(sites=[site(role="other", action="kept", reason="it has a mask")]),
            "1 sites are kept (it has a mask): leave masks of padding out",
        ),
        (
            found(sites=[site(), site(role="other", action="kept", reason="it is causal")]),
            "compile it",
        ),
        (found(poses=[]), "no cameras are among the inputs: give them to the session"),
        (
            found(sites=[site(role="cross", action="kept")], preset="exact"),
            "compile it: torch.compile(model, backend='light_interaction', mode='exact')",
        ),
    ],
)
def test_what_is_said_first_follows_from_what_was_found(document, first):
    assert next_steps(document)[0].startswith(first)


def test_attention_over_text_alone_asks_for_nothing():
    sites = [site(role="text", action="kept", reason="attention over the prompt")]
    assert next_steps(found(sites=sites)) == []


def test_pieces_without_a_name_are_to_be_named_or_their_lengths_shown():
    reason = "its 256 keys: it could be text or 4 latents; name the pieces"
    named, dynamic = next_steps(found(sites=[site(role="other", action="kept", reason=reason)]))
    assert "find-attention.segments" in named
    assert dynamic.startswith("inspect with --dynamic")


def test_table_of_a_model_ends_with_it(world, capsys):
    assert main(["inspect", world]) == 0
    ending = capsys.readouterr().out.partition("what to do next\n")[2].splitlines()
    assert ending[0].startswith("  - ")
    assert max(map(len, ending)) <= 80
    assert "lipass.report().table()" in " ".join(ending)
