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
although the model would fail without it. No edge of a model of `TASKS` is redundant; in those of
`REDUNDANT` either of two heads is enough, so that no single edge of theirs is necessary.

The truth holds in float32 or finer (a long constant component keeps norms steady, and coarser
numbers would round away what stands beside it), for pairs of `Planted.pairs` and metrics of answer
and foil. Rules and attention are steep: a gradient at one end of a pair says little about the
other end.

    planted.load("color_at_cell")

Trained models (`TRAINED`) have parameters from a random start and an optimiser, all of them alive
and none set by hand. Strict interchange intervention training (`mechmm.zoo.planted.training`) made
the circuit what their causal model says; `edges` are those of the causal model. What the circuit
does without the rest, and the rest without the circuit, is measured, not given: `mechmm bench
circuits` tells.
"""

from mechmm.zoo.planted.models import REDUNDANT, TASKS, TRAINED, Planted, build, load

__all__ = ["REDUNDANT", "TASKS", "TRAINED", "Planted", "build", "load"]
