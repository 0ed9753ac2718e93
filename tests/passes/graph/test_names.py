"""What a site is called: repeats of a call, several sites in one module, names that are joined."""

import pytest

from lipass.passes.graph.names import repeat_of, without_repeat


@pytest.mark.parametrize(
    ("name", "plain", "repeat"),
    [
        ("blocks.0.attn", "blocks.0.attn", ""),
        ("blocks.0.attn@2:decode", "blocks.0.attn:decode", "@2"),
        ("attention@1", "attention", "@1"),
        ("attention@1#2:decode", "attention#2:decode", "@1"),
        ("attention#1:decode", "attention#1:decode", ""),
        ("a@1,b@1#2:self", "a,b#2:self", "@1"),
        ("me@home.attn:text", "me@home.attn:text", ""),
    ],
)
def test_the_repeat_of_a_name(name, plain, repeat):
    assert (without_repeat(name), repeat_of(name)) == (plain, repeat)
