"""A config is refused, with the place and what to do, before a model is loaded."""

from __future__ import annotations

import json

import pytest

from mechmm.runs import config as configs
from mechmm.runs.expectation import Expectation
from mechmm.runs.lines import lines_of
from mechmm.runs.methods import METHODS
from mechmm.runs.place import ConfigError, Place

GOOD = """\
format = 1
name = "demo"

[model]
name = "mechmm/demo"

[pairs.color]
make = "shapes.pairs"
kind = "color"
n = 4

[[steps]]
name = "objects"
method = "ablate_tokens"
spans = ["object"]

[[steps]]
name = "eap"
method = "attribute"
algorithm = "eap"

[[steps]]
name = "alone"
method = "faithfulness"
circuit = { step = "eap", fraction = 0.05 }

[[headlines]]
name = "without the object"
step = "objects"
column = "value"
where = { span = "object" }
expect = "<= 0.35"

[engine]
chunk = 2
"""


def load(tmp_path, text, *overrides):
    path = tmp_path / "demo.toml"
    path.write_text(text)
    return configs.load(path, overrides)


def test_defaults_are_filled_in_and_read_back(tmp_path):
    found = load(tmp_path, GOOD)
    assert found.steps[0].options["metric"] == "accuracy"
    assert found.steps[0].options["pairs"] == "color"
    assert found.pairs["color"].options["form"] == "image"
    resolved = json.loads(json.dumps(found.to_dict()))
    again = configs.parse(resolved, Place("resolved.json"), found.base)
    assert again.to_dict() == found.to_dict()


def test_seed_is_the_default_of_pairs_and_steps(tmp_path):
    found = load(tmp_path, GOOD, "seed=7", "steps.eap.seed=3")
    assert found.pairs["color"].options["seed"] == 7
    assert [step.options["seed"] for step in found.steps] == [7, 3, 7]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('spans = ["', 'spanss = ["', r"demo.toml, line 15, steps\[0\].spanss: .*mean `spans`\?"),
        (
            'spans = ["object"]',
            "spans = [1]",
            r"line 15, .*spans: must be a list \(text\), not \[1\]",
        ),
        ('"ablate_tokens"', '"ablate_token"', r"line 14, steps\[0\].method: .*`ablate_tokens`"),
        ('algorithm = "eap"', 'algorithm = "aep"', r"line 20, steps\[1\].algorithm: .*`eap`"),
        ('step = "eap",', 'step = "epa",', r"line 25, steps\[2\].circuit.step: .*`eap`"),
        ('step = "eap",', 'step = "alone",', r"'alone' comes later"),
        (
            'step = "eap",',
            'step = "objects",',
            r"'objects' is ablate_tokens; give one that is attri",
        ),
        (", fraction = 0.05", "", r"give one of `n`, `fraction` and `threshold`"),
        ('"shapes.pairs"', '"shape.pairs"', r"line 8, pairs.color.make: .*`shapes.pairs`"),
        ("n = 4", 'n = "4"', r"line 10, pairs.color.n: must be a whole number, not '4'"),
        ("n = 4", "", r"line 7, pairs.color: missing key `n`"),
        ("n = 4", "n = 4\nkinds = 1", r"line 11, pairs.color.kinds: .*`kind`"),
        ("n = 4", "n = 4\nfolder = 'x'", r"give one of `make` and `folder`"),
        ("n = 4", "n = 4\nkeep = 'flip'", r"line 11, pairs.color.keep: .*`flips`"),
        ("format = 1", "format = 2", r"line 1, format: this mechmm reads format 1"),
        ('step = "objects"', 'step = "object"', r"line 29, headlines\[0\].step: .*`objects`"),
        ('"<= 0.35"', '"about 3"', r"line 32, headlines\[0\].expect: 'about 3' is no expectation"),
        ("chunk = 2", "chunk = 0", r"line 35, engine.chunk: must be 1 or more"),
        ("chunk = 2", 'name = "rays"', r"engine.name: unknown engine 'rays'"),
        ("[model]\n", "[model]\nnmae = 1\n", r"line 5, model.nmae: .*`name`"),
        ('[model]\nname = "mechmm/demo"\n', "", r"missing table \[model\]"),
        ('name = "eap"', 'name = "objects"', r"line 18, steps\[1\].name: two steps are named"),
        ('name = "eap"', 'name = "../eap"', r"must be letters, digits"),
        ("chunk = 2", "chunk = ", "demo.toml is no TOML: .*line 35"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, old, new, message):
    assert old in GOOD
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, GOOD.replace(old, new, 1))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pairs.color.nn=8", "override, pairs.color.nn: unknown key; did you mean `n`"),
        ("pairs.colour.n=8", "pairs has no 'colour'; did you mean `color`"),
        ("steps.object.spans=['a']", "steps has no 'object'; did you mean `objects`"),
        ("engine.chunk=many", "override, engine.chunk: must be a whole number, not 'many'"),
        ("engine.chunk=[1", "is no TOML value"),
        ("engine.address=127.0.0.1:6379", "put quotes around text"),
        ("engine", "write key=value"),
    ],
)
def test_wrong_overrides(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, GOOD, override)


def test_overrides_are_toml_values(tmp_path):
    words = ["pairs.color.n=8", 'steps.objects.spans=["object", "distractor"]', "engine.chunk=4"]
    found = load(tmp_path, GOOD, *words, "steps.eap.target=zero")
    assert found.pairs["color"].options["n"] == 8
    assert found.steps[0].options["spans"] == ["object", "distractor"]
    assert (found.engine.chunk, found.steps[1].options["target"]) == (4, "zero")


def test_paths_are_relative_to_the_config(tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("model", str(tmp_path / "model")):
        found = load(tmp_path, GOOD, f'model.name="{name}"')
        assert found.model.name == "model"
    assert str(tmp_path) not in json.dumps(found.to_dict())


def test_two_sets_have_to_be_told_apart(tmp_path):
    more = GOOD.replace("[[steps]]", '[pairs.b]\nmake = "shapes.color_pairs"\nn = 4\n[[steps]]', 1)
    with pytest.raises(ConfigError, match=r"missing key `pairs` \(there are color, b\)"):
        load(tmp_path, more)


def test_sites_are_tables_or_lists_of_them(tmp_path):
    text = GOOD.replace('method = "ablate_tokens"\nspans = ["object"]', 'method = "patch"')
    sites = '{ kind = "residual", spans = ["last"] }, { kind = "heads" }'
    found = load(tmp_path, text.replace('"patch"', f'"patch"\nsites = [{sites}]'))
    assert [one["kind"] for one in found.steps[0].options["sites"]] == ["residual", "heads"]
    with pytest.raises(ConfigError, match=r"steps\[0\].sites\[0\].kind: .*`residual`"):
        load(tmp_path, text.replace('"patch"', '"patch"\nsites = [{ kind = "residua" }]'))
    wrong = '"patch"\nsites = { kind = "residual", span = ["a"] }'
    with pytest.raises(ConfigError, match=r"steps\[0\].sites.span: .*`spans`"):
        load(tmp_path, text.replace('"patch"', wrong))
    with pytest.raises(ConfigError, match="missing key `sites`"):
        load(tmp_path, text)


def test_a_table_below_a_step_has_its_line():
    text = '[[steps]]\nname = "a"\n[[steps]]\n[steps.sites]\nkind = """\nx = 1\n"""\nspans = 1\n'
    assert lines_of(text)["steps[1].sites.spans"] == 8
    assert "steps[1].sites.x" not in lines_of(text)


def test_every_method_has_parameters_that_a_config_can_say():
    assert {"patch", "attribute", "knockout", "mediation", "over_checkpoints"} <= set(METHODS)
    for name, method in METHODS.items():
        assert not {"model", "report", "tokens", "method", "name"} & set(method.parameters), name


@pytest.mark.parametrize(
    ("text", "value", "agrees"),
    [
        ("<= 0.35", 0.35, True),
        ("< 0.35", 0.35, False),
        (">= -1e-3", 0.0, True),
        ("> .5", 0.5, False),
        ("== 2", 2.0, True),
        ("in [0.2, 0.4]", 0.4, True),
        ("in [0.2, 0.4]", 0.41, False),
        ("<= 1", float("nan"), False),
    ],
)
def test_expectations(text, value, agrees):
    assert Expectation.read(text).agrees(value) is agrees
