"""What each expert of a mixture adds, computed again from the inputs of the `experts` module.

Two calling conventions of `transformers`: Llama 4 hands every expert all tokens, scaled by their
router score, one expert after the other; the others hand over the tokens with the experts chosen
for each and their weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor, nn


def expert_outputs(
    module: nn.Module, args: tuple, output: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """[token, expert, d_model], and the way from there to the module's output."""
    if len(args) == 1:
        number = module.num_experts
        each = rearrange(output, "(expert token) d -> token expert d", expert=number)  # type: ignore[arg-type]
        return each, lambda new: rearrange(new, "token expert d -> (expert token) d")
    tokens, chosen, weights = args
    hidden = _hidden(module, tokens)
    down: Any = module.down_proj
    each = einsum(hidden, down, "token expert h, expert d h -> token expert d")
    share = torch.zeros(each.shape[:2], dtype=weights.dtype, device=each.device)
    share = share.scatter_add(1, chosen, weights)
    return each * share[..., None], lambda new: new.sum(1).view(output.shape)


def _hidden(module: Any, tokens: Tensor) -> Tensor:
    """The hidden layer of every expert on every token."""
    both = einsum(tokens, module.gate_up_proj, "token d, expert h d -> token expert h")
    gate, up = both.chunk(2, dim=-1)
    return module.act_fn(gate) * up


def rerouted(module: Any, args: tuple, change: Callable[[Tensor], Tensor]) -> tuple:
    """The arguments of `experts` after a change of the routing weights [token, expert], which are
    zero where an expert is not chosen. Weight given to others chooses anew where weights are not 0.

    Raises:
        ValueError: where a token gives weight to more experts than the model lets it.
    """
    tokens, chosen, weights = args
    dense = torch.zeros(len(tokens), module.num_experts, dtype=weights.dtype, device=weights.device)
    new = change(dense.scatter(1, chosen, weights))
    if bool(new.scatter(1, chosen, 0).any()):
        number = chosen.shape[1]
        if bool(((new != 0).sum(1) > number).any()):
            raise ValueError(
                f"hook_router: a token gives weight to more than {number} experts, which this "
                "model cannot; set the weight of others to 0"
            )
        chosen = new.abs().topk(number, dim=1).indices
    return tokens, chosen, new.gather(1, chosen)
