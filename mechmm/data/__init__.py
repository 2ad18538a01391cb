"""What a model is asked: pairs of prompts, metrics, corruptions, and two data sources."""

from mechmm.data import corruption, digits, generated, matching, metrics, questions, scenes, shapes
from mechmm.data.corruption import Cells, CorruptionError, corrupt, make_pairs
from mechmm.data.metrics import METRICS, Answers, Metric, score
from mechmm.data.pairs import Pair, PairBatch, PairDataset, PairError, Prompt
from mechmm.data.questions import KINDS, Question
from mechmm.data.scenes import Scene, Thing

__all__ = [
    "KINDS",
    "METRICS",
    "Answers",
    "Cells",
    "CorruptionError",
    "Metric",
    "Pair",
    "PairBatch",
    "PairDataset",
    "PairError",
    "Prompt",
    "Question",
    "Scene",
    "Thing",
    "corrupt",
    "corruption",
    "digits",
    "generated",
    "make_pairs",
    "matching",
    "metrics",
    "questions",
    "scenes",
    "score",
    "shapes",
]
