"""Autoencoders read and write SAELens's files and compute what its formulas say."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mechmm.model.sparse import DictionaryError, SparseAutoencoder

D, F = 6, 20


def weights(seed=0):
    random = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def write(folder, config, tensors):
    folder.mkdir()
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": F, **config}))
    return folder


def states():
    return torch.randn(5, D, generator=torch.Generator().manual_seed(9))


def test_topk_keeps_the_largest():
    sae = SparseAutoencoder(**weights(), activation="topk", hook="h", k=3)
    features = sae.encode(states())
    pre = (states() - sae.b_dec) @ sae.W_enc + sae.b_enc
    for own, all_of_them in zip(features, pre, strict=True):
        kept = all_of_them.sort(descending=True).values[:3].clamp(min=0)
        torch.testing.assert_close(own.sort(descending=True).values[:3], kept)
        assert int((own != 0).sum()) <= 3


@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu"])
def test_what_is_saved_is_loaded(tmp_path, activation):
    more = {"topk": {"k": 4}, "relu": {"centred": False}, "jumprelu": {"threshold": torch.rand(F)}}
    sae = SparseAutoencoder(**weights(), activation=activation, hook="h", **more[activation])
    again = SparseAutoencoder.load(sae.save(tmp_path / "sae"))
    assert torch.equal(again.reconstruct(states()), sae.reconstruct(states()))
    assert (again.hook, again.k, again.centred) == (sae.hook, sae.k, sae.centred)
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert config["metadata"]["hook_name"] == "h"
    assert {"W_enc", "b_enc", "W_dec", "b_dec"} <= set(
        load_file(tmp_path / "sae/sae_weights.safetensors")
    )
    with pytest.raises(FileExistsError, match="not an empty folder"):
        sae.save(tmp_path / "sae")


def test_files_of_saelens(tmp_path):
    """Each configuration's own formula, written out."""
    own = weights()
    x = states()
    pre = x @ own["W_enc"] + own["b_enc"]
    older = {
        "architecture": "standard",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 2},
        "apply_b_dec_to_input": False,
        "hook_name": "blocks.1.hook_resid_pre",
        "normalize_activations": "none",
    }
    found = SparseAutoencoder.load(write(tmp_path / "older", older, own))
    kept = torch.zeros_like(pre).scatter(1, pre.topk(2).indices, pre.topk(2).values.relu())
    torch.testing.assert_close(found.encode(x), kept)
    assert found.hook == "blocks.1.hook_resid_pre"
    # Activations that SAELens rescales by decoder norms.
    scaled = {"architecture": "topk", "k": 2, "rescale_acts_by_decoder_norm": True}
    found = SparseAutoencoder.load(write(tmp_path / "scaled", scaled, own))
    norm = own["W_dec"].norm(dim=-1)
    pre = ((x - own["b_dec"]) @ own["W_enc"] + own["b_enc"]) * norm
    kept = torch.zeros_like(pre).scatter(1, pre.topk(2).indices, pre.topk(2).values.relu())
    torch.testing.assert_close(found.encode(x), kept)
    wanted = (kept / norm) @ own["W_dec"] + own["b_dec"]
    torch.testing.assert_close(found.reconstruct(x), wanted, atol=1e-4, rtol=1e-4)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DictionaryError, match=r"holds no readable cfg\.json"):
        SparseAutoencoder.load(tmp_path)
    gated = write(tmp_path / "gated", {"architecture": "gated"}, weights())
    with pytest.raises(DictionaryError, match="architecture 'gated' is not one of topk"):
        SparseAutoencoder.load(gated)
    normed = write(tmp_path / "normed", {"normalize_activations": "layer_norm"}, weights())
    with pytest.raises(DictionaryError, match="normalize_activations='layer_norm'"):
        SparseAutoencoder.load(normed)
    short = {name: value for name, value in weights().items() if name != "b_dec"}
    with pytest.raises(DictionaryError, match="has no b_dec"):
        SparseAutoencoder.load(write(tmp_path / "short", {}, short))
    odd = {**weights(), "b_enc": torch.zeros(3)}
    with pytest.raises(DictionaryError, match=r"b_enc has shape \(3,\)"):
        SparseAutoencoder.load(write(tmp_path / "odd", {}, odd))
    with pytest.raises(DictionaryError, match=r"k is 0; give 1\.\.20"):
        SparseAutoencoder(**weights(), activation="topk", hook="h")
    sae = SparseAutoencoder(**weights(), activation="relu", hook="h")
    with pytest.raises(DictionaryError, match="reads states of 6 numbers"):
        sae.encode(torch.zeros(2, 7))
