"""mechmm: TransformerLens for multimodal models.

Importing this package changes nothing: no download, no global setting, no hook. Its names are
imported when they are first used, so that `mechmm --help` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechmm import data, runs
    from mechmm.data.contrast import contrasted
    from mechmm.data.metrics import accuracy, flipped, kl, log_prob, logit_diff, prob
    from mechmm.data.pairs import Pair, PairDataset, Prompt
    from mechmm.engine import sites
    from mechmm.engine.source import Steer
    from mechmm.engine.sweep import Sweep
    from mechmm.engine.train_sae import train_sae
    from mechmm.engine.units import graph
    from mechmm.methods.ablate_tokens import TokenAblation, ablate_tokens
    from mechmm.methods.acdc import Acdc, acdc
    from mechmm.methods.attention_maps import AttentionMaps, attention_maps
    from mechmm.methods.attention_steering import attention_steering
    from mechmm.methods.attribution import Attribution, attribute
    from mechmm.methods.back_patch import BackPatching, back_patch
    from mechmm.methods.checkpoints import OverCheckpoints, over_checkpoints
    from mechmm.methods.circuits import Faithfulness, faithfulness, faithfulness_curve
    from mechmm.methods.cka import CKA, cka
    from mechmm.methods.completeness import Completeness, completeness
    from mechmm.methods.contrastive import ContrastiveDecoding
    from mechmm.methods.deletion_insertion import DeletionInsertion, deletion_insertion
    from mechmm.methods.dictionary import Dictionary, dictionary
    from mechmm.methods.direct_logit_attribution import (
        DirectLogitAttribution,
        direct_logit_attribution,
    )
    from mechmm.methods.dissection import Dissection, dissection
    from mechmm.methods.early_exit import EarlyExit, early_exit
    from mechmm.methods.emap import Emap, emap
    from mechmm.methods.hallucination import Hallucination, hallucination
    from mechmm.methods.input_attribution import InputAttribution, input_attribution
    from mechmm.methods.interchange import Interchange, interchange
    from mechmm.methods.knockout import Knockout, knockout, knockout_hooks, mediation
    from mechmm.methods.latent_lens import LatentBank, LatentLens, latent_bank, latent_lens
    from mechmm.methods.logit_lens import LogitLens, logit_lens
    from mechmm.methods.minimality import Minimality, minimality
    from mechmm.methods.modality_gap import ModalityGap, modality_gap
    from mechmm.methods.modality_shares import ModalityShares, modality_shares
    from mechmm.methods.neuron_attribution import NeuronAttribution, neuron_attribution
    from mechmm.methods.neuron_selectivity import NeuronSelectivity, neuron_selectivity
    from mechmm.methods.patching import Patching, patch
    from mechmm.methods.probe import Probe, probe
    from mechmm.methods.pruning import PruningCurve, pruning_curve
    from mechmm.methods.steering import steering
    from mechmm.methods.subspace_interchange import SubspaceInterchange, subspace_interchange
    from mechmm.methods.text_span import TextSpan, text_span
    from mechmm.methods.tuned_lens import TunedLens, tuned_lens
    from mechmm.model.audit import Audit, audit
    from mechmm.model.batch import Batch
    from mechmm.model.hooked import HookedMultimodal
    from mechmm.model.layout import Box, Patches, TokenLayout, Words
    from mechmm.model.sparse import SparseAutoencoder
    from mechmm.model.untrained import untrained
    from mechmm.results.circuit import Circuit
    from mechmm.results.graph import Graph
    from mechmm.results.report import Page
    from mechmm.results.steered import Steered
    from mechmm.results.units import Units
    from mechmm.runs.progress import progress

__version__ = "0.1.0"

_HOME = {
    "mechmm.data.contrast": ("contrasted",),
    "mechmm.data.metrics": ("accuracy", "flipped", "kl", "log_prob", "logit_diff", "prob"),
    "mechmm.data.pairs": ("Pair", "PairDataset", "Prompt"),
    "mechmm.engine.source": ("Steer",),
    "mechmm.engine.sweep": ("Sweep",),
    "mechmm.engine.train_sae": ("train_sae",),
    "mechmm.engine.units": ("graph",),
    "mechmm.methods.ablate_tokens": ("TokenAblation", "ablate_tokens"),
    "mechmm.methods.acdc": ("Acdc", "acdc"),
    "mechmm.methods.attention_maps": ("AttentionMaps", "attention_maps"),
    "mechmm.methods.attention_steering": ("attention_steering",),
    "mechmm.methods.attribution": ("Attribution", "attribute"),
    "mechmm.methods.back_patch": ("BackPatching", "back_patch"),
    "mechmm.methods.checkpoints": ("OverCheckpoints", "over_checkpoints"),
    "mechmm.methods.circuits": ("Faithfulness", "faithfulness", "faithfulness_curve"),
    "mechmm.methods.cka": ("CKA", "cka"),
    "mechmm.methods.completeness": ("Completeness", "completeness"),
    "mechmm.methods.contrastive": ("ContrastiveDecoding",),
    "mechmm.methods.deletion_insertion": ("DeletionInsertion", "deletion_insertion"),
    "mechmm.methods.dictionary": ("Dictionary", "dictionary"),
    "mechmm.methods.direct_logit_attribution": (
        "DirectLogitAttribution",
        "direct_logit_attribution",
    ),
    "mechmm.methods.dissection": ("Dissection", "dissection"),
    "mechmm.methods.early_exit": ("EarlyExit", "early_exit"),
    "mechmm.methods.emap": ("Emap", "emap"),
    "mechmm.methods.hallucination": ("Hallucination", "hallucination"),
    "mechmm.methods.input_attribution": ("InputAttribution", "input_attribution"),
    "mechmm.methods.interchange": ("Interchange", "interchange"),
    "mechmm.methods.knockout": ("Knockout", "knockout", "knockout_hooks", "mediation"),
    "mechmm.methods.latent_lens": ("LatentBank", "LatentLens", "latent_bank", "latent_lens"),
    "mechmm.methods.logit_lens": ("LogitLens", "logit_lens"),
    "mechmm.methods.minimality": ("Minimality", "minimality"),
    "mechmm.methods.modality_gap": ("ModalityGap", "modality_gap"),
    "mechmm.methods.modality_shares": ("ModalityShares", "modality_shares"),
    "mechmm.methods.neuron_attribution": ("NeuronAttribution", "neuron_attribution"),
    "mechmm.methods.neuron_selectivity": ("NeuronSelectivity", "neuron_selectivity"),
    "mechmm.methods.patching": ("Patching", "patch"),
    "mechmm.methods.probe": ("Probe", "probe"),
    "mechmm.methods.pruning": ("PruningCurve", "pruning_curve"),
    "mechmm.methods.steering": ("steering",),
    "mechmm.methods.subspace_interchange": ("SubspaceInterchange", "subspace_interchange"),
    "mechmm.methods.text_span": ("TextSpan", "text_span"),
    "mechmm.methods.tuned_lens": ("TunedLens", "tuned_lens"),
    "mechmm.model.audit": ("Audit", "audit"),
    "mechmm.model.batch": ("Batch",),
    "mechmm.model.hooked": ("HookedMultimodal",),
    "mechmm.model.layout": ("Box", "Patches", "TokenLayout", "Words"),
    "mechmm.model.sparse": ("SparseAutoencoder",),
    "mechmm.model.untrained": ("untrained",),
    "mechmm.results.circuit": ("Circuit",),
    "mechmm.results.graph": ("Graph",),
    "mechmm.results.report": ("Page",),
    "mechmm.results.steered": ("Steered",),
    "mechmm.results.units": ("Units",),
    "mechmm.runs.progress": ("progress",),
}
_MODULES = {"data": "mechmm.data", "runs": "mechmm.runs", "sites": "mechmm.engine.sites"}
_NAMES = {name: home for home, names in _HOME.items() for name in names}

__all__ = [
    "CKA",
    "Acdc",
    "AttentionMaps",
    "Attribution",
    "Audit",
    "BackPatching",
    "Batch",
    "Box",
    "Circuit",
    "Completeness",
    "ContrastiveDecoding",
    "DeletionInsertion",
    "Dictionary",
    "DirectLogitAttribution",
    "Dissection",
    "EarlyExit",
    "Emap",
    "Faithfulness",
    "Graph",
    "Hallucination",
    "HookedMultimodal",
    "InputAttribution",
    "Interchange",
    "Knockout",
    "LatentBank",
    "LatentLens",
    "LogitLens",
    "Minimality",
    "ModalityGap",
    "ModalityShares",
    "NeuronAttribution",
    "NeuronSelectivity",
    "OverCheckpoints",
    "Page",
    "Pair",
    "PairDataset",
    "Patches",
    "Patching",
    "Probe",
    "Prompt",
    "PruningCurve",
    "SparseAutoencoder",
    "Steer",
    "Steered",
    "SubspaceInterchange",
    "Sweep",
    "TextSpan",
    "TokenAblation",
    "TokenLayout",
    "TunedLens",
    "Units",
    "Words",
    "ablate_tokens",
    "accuracy",
    "acdc",
    "attention_maps",
    "attention_steering",
    "attribute",
    "audit",
    "back_patch",
    "cka",
    "completeness",
    "contrasted",
    "data",
    "deletion_insertion",
    "dictionary",
    "direct_logit_attribution",
    "dissection",
    "early_exit",
    "emap",
    "faithfulness",
    "faithfulness_curve",
    "flipped",
    "graph",
    "hallucination",
    "input_attribution",
    "interchange",
    "kl",
    "knockout",
    "knockout_hooks",
    "latent_bank",
    "latent_lens",
    "log_prob",
    "logit_diff",
    "logit_lens",
    "mediation",
    "minimality",
    "modality_gap",
    "modality_shares",
    "neuron_attribution",
    "neuron_selectivity",
    "over_checkpoints",
    "patch",
    "prob",
    "probe",
    "progress",
    "pruning_curve",
    "runs",
    "sites",
    "steering",
    "subspace_interchange",
    "text_span",
    "train_sae",
    "tuned_lens",
    "untrained",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'mechmm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
