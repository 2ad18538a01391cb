"""Matching metrics are what their definitions say, and hooks on both towers move them."""

import pytest
import torch

from mechmm.data.matching import match_accuracy, match_log_prob, match_logit_diff
from mechmm.model.batch import Batch
from mechmm.model.hooked import HookedMultimodal
from mechmm.testing import tiny_hf, tiny_inputs

LOGITS = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 5.0]])
OWN = torch.tensor([0, 1])


def test_metrics_are_as_defined():
    assert match_logit_diff(LOGITS, OWN).tolist() == [1.0, -4.0]
    assert match_accuracy(LOGITS, OWN).tolist() == [1.0, 0.0]
    expected = torch.stack([LOGITS[0].softmax(0)[0].log(), LOGITS[1].softmax(0)[1].log()])
    torch.testing.assert_close(match_log_prob(LOGITS, OWN), expected)
    assert torch.equal(match_logit_diff(LOGITS), match_logit_diff(LOGITS, OWN))


@pytest.mark.parametrize(
    ("logits", "own", "message"),
    [
        (LOGITS[:, :1], OWN, "one text leaves nothing"),
        (LOGITS, torch.tensor([0, 3]), r"from 0 to 2; got \[0, 3\]"),
        (LOGITS.T, None, "3 images and 2 texts"),
    ],
)
def test_what_cannot_be_matched_is_refused(logits, own, message):
    with pytest.raises(ValueError, match=message):
        match_logit_diff(logits, own)


@pytest.mark.parametrize("family", ["clip", "siglip", "siglip2"])
def test_an_edit_in_either_tower_moves_the_match(family):
    model = HookedMultimodal.from_hf(tiny_hf(family))
    batch = Batch.from_inputs(model, **tiny_inputs(model, (1, 1), words=(5, 5)))
    with torch.no_grad():
        plain = match_logit_diff(model(batch))
        for hook in ("vision.blocks.0.attn.hook_pattern", "text.blocks.0.attn.hook_pattern"):
            edited = model.run_with_hooks(batch, fwd_hooks=[(hook, lambda v, hook: v.flip(-1))])
            assert not torch.allclose(match_logit_diff(edited), plain)
