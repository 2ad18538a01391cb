"""Models whose circuits are known by construction: ground truth for circuit discovery.

    from mechmm.zoo import planted

    made = planted.build("shape_of_color", seed=0)
    made.edges                 # ("vision.input->vision.m0", ..., "m3->logits")
    pairs = made.pairs(64)     # the pairs that this truth is relative to

Each model is a LLaVA in Hugging Face format (CLIP vision tower, projector, Llama) whose weights are
compiled from a program: some heads and MLPs of every model compute the answer, all others read the
same streams, write noise as long as what the circuit writes, and do not reach it. An edge is true
where it carries something that the answer depends on and that differs between the prompts of some
pairs; an edge that carries the same in both prompts of every pair (where a cell is) is not,
although the model would fail without it. No edge is redundant.

The truth holds in float32 or finer (a long constant component keeps norms steady, and coarser
numbers would round away what stands beside it), for pairs of `Planted.pairs` and metrics of answer
and foil. Rules and attention are steep: a gradient at one end of a pair says little about the
other end.
"""

from mechmm.zoo.planted.models import TASKS, Planted, build

__all__ = ["TASKS", "Planted", "build"]
