"""Results survive a folder unchanged, and a bad folder is refused by name."""

import json
import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

from mechmm.results.result import Result, concat
from mechmm.results.store import write_whole


@dataclass(frozen=True, eq=False)
class Effects(Result):
    values: Tensor = field(metadata={"axis": -1})
    sites: pd.DataFrame
    names: tuple[str, ...] = ()
    examples: tuple[str, ...] = field(default=(), metadata={"axis": 0})
    picture: Image.Image | None = field(default=None, metadata={"keep": "first"})
    extra: Any = None

    def to_dataframe(self) -> pd.DataFrame:
        return self.sites.assign(effect=self.values.mean(-1).numpy())


@dataclass(frozen=True, eq=False)
class Curve(Result):
    points: np.ndarray

    def to_dataframe(self) -> pd.DataFrame:
        return pd.DataFrame({"point": self.points})


def sites() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "layer": np.array([0, 1, 2], dtype=np.int32),
            "head": [0.0, np.nan, np.inf],
            "share": np.array([0.1, -0.0, 1 / 3], dtype=np.float32),
            "span": ["<image>", "", None],
            "kept": [True, False, True],
            "box": [(0, 1), None, (2, 3)],
            "count": pd.array([1, None, 3], dtype="Int64"),
        }
    )


def effects(n: int = 4, **changes: Any) -> Effects:
    values = torch.randn(3, n, generator=torch.Generator().manual_seed(n))
    return replace(
        Effects(values=values, sites=sites(), names=("a", "b"), examples=tuple("wxyz"[:n])),
        **changes,
    )


def picture(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    "extra",
    [
        None,
        3,
        0.1 + 0.2,
        float("nan"),
        float("-inf"),
        "café </script>",
        [1, (2.5, "x"), [], ()],
        {"vision": torch.zeros(2, 0), "language": {"deep": np.arange(6).reshape(2, 3).T}},
        torch.tensor(1.5, dtype=torch.bfloat16),
        torch.arange(12).reshape(3, 4)[:, ::2],
        torch.tensor([True, False]),
        np.float32(0.25),
        np.array(2.0),
        np.arange(4, dtype=np.uint8)[::-1],
        (picture(1), picture(2).convert("L"), picture(3).convert("P")),
        pd.DataFrame({"x": [1, 2]}, index=pd.Index(["a", "b"], name="key")),
        pd.DataFrame(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_load_gives_back_what_was_saved(tmp_path: Path, extra: Any) -> None:
    result = effects(picture=picture(), extra=extra)
    loaded = Effects.load(result.save(tmp_path / "deep" / "run"))
    assert result.equals(loaded)
    assert type(loaded.names) is tuple
    pd.testing.assert_frame_equal(loaded.sites, result.sites, check_exact=True)


def test_a_folder_holds_json_and_safetensors_only(tmp_path: Path) -> None:
    folder = effects(picture=picture()).save(tmp_path / "run")
    names = {path.name for path in folder.iterdir()}
    assert names == {"result.json", "arrays.safetensors", "sites.json", "picture.png"}
    record = json.loads((folder / "result.json").read_text())
    assert record["class"] == "Effects"
    assert record["fields"]["names"] == {"$tuple": ["a", "b"]}


def test_views_of_one_memory_are_saved(tmp_path: Path) -> None:
    whole = torch.arange(6.0, requires_grad=True)
    result = effects(values=whole.reshape(3, 2), extra=[whole[:3], whole])
    assert Effects.load(result.save(tmp_path / "run")).equals(result)


def test_equals_sees_every_difference() -> None:
    result = effects(picture=picture(), extra={"a": torch.zeros(2)})
    for change in (
        {"values": result.values + 1e-6},
        {"values": result.values.double()},
        {"sites": result.sites.assign(layer=result.sites["layer"].astype("int64"))},
        {"names": ("a", "c")},
        {"picture": picture(1)},
        {"extra": {"a": np.zeros(2, dtype=np.float32)}},
        {"extra": None},
    ):
        assert not result.equals(replace(result, **change)), change
    assert not result.equals(Curve(np.zeros(2)))


def test_the_base_class_finds_the_class(tmp_path: Path) -> None:
    folder = Curve(np.arange(3.0)).save(tmp_path / "run")
    assert type(Result.load(folder)) is Curve


def test_an_existing_folder_is_refused_unless_empty(tmp_path: Path) -> None:
    result = effects()
    (tmp_path / "empty").mkdir()
    result.save(tmp_path / "empty")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        result.save(tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        result.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (object(), "`extra` is a object"),
        ([1, {"a": {2}}], "`extra.1.a` is a set"),
        ({1: "x"}, "key 1"),
        ({"$tuple": []}, "must be text not starting"),
        (np.array(["text"]), "use numbers or booleans"),
        (Image.new("CMYK", (2, 2)), "convert it to RGB"),
        (pd.DataFrame({"when": pd.to_datetime(["2020-01-01"])}), "`extra.when` is a Timestamp"),
        (pd.DataFrame({"kind": pd.Categorical(["a"], ["a", "b"])}), "would change when stored"),
        (pd.DataFrame({"cell": [np.zeros(2)]}), "use a field for them"),
        (
            pd.DataFrame({"x": [1]}, pd.MultiIndex.from_tuples([(0, 1)], names=("a", "b"))),
            "`reset_index()",
        ),
    ],
)
def test_what_cannot_be_stored_is_named_and_leaves_nothing(
    tmp_path: Path, extra: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=message.replace("$", r"\$").replace(".", r"\.")):
        effects(extra=extra).save(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_failure_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def fail_at_second(path: Path, data: bytes) -> int:
        written.append(path)
        if len(written) == 2:
            raise OSError("disk full")
        with open(path, "wb") as file:
            return file.write(data)

    monkeypatch.setattr(Path, "write_bytes", fail_at_second)
    with pytest.raises(OSError, match="disk full"):
        effects().save(tmp_path / "run")
    assert len(written) == 2
    assert not list(tmp_path.iterdir())


def test_a_failed_file_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_whole(tmp_path / "page.html", b"old")

    def fail(*args: Any) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_without_a_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no result\.json"):
        Effects.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        Effects.load(tmp_path / "nowhere")


def test_the_wrong_class_is_named(tmp_path: Path) -> None:
    folder = effects().save(tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"holds a Effects, not a Curve; open it with Effects\.load"
    ):
        Curve.load(folder)


@pytest.mark.parametrize("name", ["result.json", "arrays.safetensors", "sites.json", "picture.png"])
@pytest.mark.parametrize("damage", ["cut", "gone", "flipped"])
def test_damage_is_noticed(tmp_path: Path, name: str, damage: str) -> None:
    folder = effects(picture=picture()).save(tmp_path / "run")
    data = (folder / name).read_bytes()
    if damage == "gone":
        (folder / name).unlink()
    elif damage == "cut":
        (folder / name).write_bytes(data[: len(data) // 2])
    else:
        (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises((ValueError, FileNotFoundError), match=r"damaged|holds no result"):
        Effects.load(folder)


def test_files_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    folder = effects().save(tmp_path / "run")
    shutil.copy(folder / "sites.json", tmp_path / "sites.json")
    text = (folder / "result.json").read_text().replace("sites.json", "../sites.json")
    (folder / "result.json").write_text(text)
    with pytest.raises(ValueError, match="damaged"):
        Effects.load(folder)


def edit_record(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(record | changes))


def test_a_newer_format_asks_for_an_update(tmp_path: Path) -> None:
    folder = effects().save(tmp_path / "run")
    edit_record(folder, format=99)
    with pytest.raises(ValueError, match="update it"):
        Effects.load(folder)


def test_other_fields_are_refused_and_later_defaults_are_filled(tmp_path: Path) -> None:
    folder = effects().save(tmp_path / "run")
    fields = json.loads((folder / "result.json").read_text())["fields"]
    edit_record(folder, fields={k: v for k, v in fields.items() if k != "extra"})
    assert Effects.load(folder).extra is None
    edit_record(folder, fields={k: v for k, v in fields.items() if k != "sites"} | {"odd": 1})
    with pytest.raises(ValueError, match=r"\['odd', 'sites'\] do not match"):
        Effects.load(folder)


def test_concat_joins_examples_only() -> None:
    a, b = effects(2, picture=picture(0)), effects(3, picture=picture(1))
    both = concat([a, b])
    assert torch.equal(both.values, torch.cat([a.values, b.values], dim=-1))
    assert both.examples == (*a.examples, *b.examples)
    assert both.names == a.names
    assert both.picture is a.picture
    assert concat([a]).equals(a)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sites": sites().assign(layer=7)}, "results 0 and 1 differ in `sites`"),
        ({"names": ("other",)}, "differ in `names`"),
        ({"values": torch.zeros(4, 2)}, r"shape \(4, 2\) in result 1"),
        ({"values": torch.zeros(3, 4).double()}, "float64"),
    ],
)
def test_concat_refuses_other_experiments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        concat([effects(), effects(**change)])


def test_concat_needs_results_of_one_class_with_an_axis() -> None:
    with pytest.raises(ValueError, match="at least one"):
        concat([])
    with pytest.raises(ValueError, match="no example axis"):
        concat([Curve(np.zeros(1))])
    with pytest.raises(TypeError, match="Effects with Curve"):
        concat([effects(), Curve(np.zeros(1))])


def test_a_notebook_shows_the_class_its_fields_and_the_head_of_its_table() -> None:
    @dataclass(frozen=True, eq=False)
    class Loud(Result):
        values: Tensor
        name: str

        def to_dataframe(self) -> pd.DataFrame:
            return pd.DataFrame({"site": [self.name] * 9, "value": self.values.numpy()})

    shown = Loud(torch.zeros(9), "<script>alert(1)</script>")._repr_html_()
    assert "<b>Loud</b>" in shown
    assert "values: float32 [9]" in shown
    assert "The first 6 of 9 rows." in shown
    assert "<script" not in shown
    assert shown.count("&lt;script&gt;") == 1 + 6
