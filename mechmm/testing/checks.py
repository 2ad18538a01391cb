"""Checks that nothing is left behind on a Hugging Face model."""

from __future__ import annotations

from transformers import PreTrainedModel

from mechmm.model import attention

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
RECORDER = "transformers.utils.output_capturing"
"""Where `transformers` keeps the hooks that it installs by itself to record hidden states."""


def assert_no_hooks(hf_model: PreTrainedModel) -> None:
    """Refuse a Hugging Face model on which anything of ours is left.

    The recorders that `transformers` installs by itself do not count.

    Raises:
        AssertionError: naming every module with a hook, a config or an attention module of ours.
    """
    left = []
    for name, module in hf_model.named_modules():
        for kind in HOOKS:
            hooks = getattr(module, kind).values()
            left += [
                f"{name}: {kind[1:]} {h}"
                for h in hooks
                if getattr(h, "__module__", None) != RECORDER
            ]
        config = getattr(module, "config", None)
        implementation = getattr(config, "_attn_implementation", None)
        if implementation in (attention.NAME, attention.PACKED):
            left.append(f"{name}: config with attention {implementation!r}")
        if module in attention._HOOKS:
            left.append(f"{name}: attention hooks")
    assert not left, "left behind on the model:\n" + "\n".join(left)
