"""Mochi's attention, adopted, is what it was, and its latents become sparse."""

import pytest
import torch

pytest.importorskip("diffusers")

from video_zoo import VIDEO

import lipass
from lipass.receipt import current_report

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:In CPU autocast"),  # Mochi asks for fp32 there
]


@pytest.fixture
def mochi():
    torch.manual_seed(0)
    model, inputs = VIDEO["mochi"]()
    return model.eval(), {**inputs, "return_dict": False}


@pytest.mark.parametrize("said", ["all", "some", "scattered"])
def test_adopted_equals_the_model_and_becomes_sparse(mochi, said):
    model, inputs = mochi
    inputs = {n: torch.cat([x, x * 0.9]) if torch.is_tensor(x) else x for n, x in inputs.items()}
    mask = torch.ones(2, 7, dtype=torch.bool)
    if said == "some":
        mask[0, 5:], mask[1, 2:] = False, False
    elif said == "scattered":
        mask[0, ::2] = False
    inputs |= {"timestep": torch.tensor([500, 500]), "encoder_attention_mask": mask}
    options = {"preset": "sparse", "inner": "eager", "sparse.budget": 1.0}
    with torch.no_grad():
        expected = model(**inputs)[0]
        with lipass.adopt(model) as adoption:
            assert adoption.family == "mochi"
            assert [one.name for one in adoption.changes] == ["processor"] * 2
            torch.testing.assert_close(model(**inputs)[0], expected, atol=1e-5, rtol=1e-5)
            fast = torch.compile(model, backend="light_interaction", options=options)
            actual = fast(**inputs)[0]
        assert torch.equal(model(**inputs)[0], expected)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    found = [one for one in current_report().sites.values() if one.role == "self"]
    assert [one.action for one in found] == ["rewritten"] * 2
    assert current_report().left_eager == []
