"""Runs as archives: what is packed comes back, and what is not a run is refused."""

from __future__ import annotations

import os
import struct
import zipfile
from types import SimpleNamespace

import pytest
from made import digest, inside, link, seal, with_entries, write_run

from mechmm.runs.archive import ArchiveError, Limits, pack, unpack
from mechmm.runs.paths import RunError
from mechmm.runs.verification import verify


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


@pytest.fixture
def archive(run):
    return pack(run)


def refused(archive, out, match, error=ArchiveError, **options):
    """Unpacking fails and leaves nothing."""
    before = set(out.parent.iterdir())
    with pytest.raises(error, match=match):
        unpack(archive, out, **options)
    assert set(out.parent.iterdir()) == before


def test_what_is_packed_comes_back(run, archive, tmp_path):
    back = unpack(archive, tmp_path / "back")
    found = inside(back)
    cited = found.pop("CITATION.cff").decode()
    assert found == inside(run)
    assert verify(back).ok
    assert verify(run).digest in cited
    assert 'title: "Is it so?"' in cited


def test_equal_folders_give_equal_bytes(run, archive, tmp_path):
    again = unpack(archive, tmp_path / "again")
    for path in again.rglob("*"):
        os.utime(path, (1, 1))
    assert pack(again, tmp_path / "two.zip").read_bytes() == archive.read_bytes()


def test_authors_and_an_edited_citation_are_kept(run, tmp_path):
    file = pack(run, tmp_path / "named.zip", authors=['Ada "A" Lovelace'])
    back = unpack(file, tmp_path / "back")
    cited = back / "CITATION.cff"
    assert '- name: "Ada \\"A\\" Lovelace"' in cited.read_text()
    cited.write_text(cited.read_text() + "doi: 10.1/2\n")
    again = unpack(pack(back, tmp_path / "again.zip"), tmp_path / "more")
    assert "doi: 10.1/2" in (again / "CITATION.cff").read_text()


def test_a_run_that_does_not_verify_is_not_packed(run, tmp_path):
    (run / "headlines.json").write_text("[]")
    with pytest.raises(ArchiveError, match=r"does not verify.*\bchanged: headlines\.json"):
        pack(run, tmp_path / "no.zip")
    assert not (tmp_path / "no.zip").exists()


def test_an_archive_is_never_written_over(run, archive):
    with pytest.raises(FileExistsError, match="exists"):
        pack(run, archive)
    with pytest.raises(ArchiveError, match=r"must end in \.zip"):
        pack(run, archive.with_suffix(".rar"))


def test_a_point_in_the_name_of_a_run_stays(tmp_path):
    assert pack(write_run(tmp_path / "run.v1")) == tmp_path / "run.v1.zip"


def test_room_is_asked_where_the_run_goes(archive, tmp_path, monkeypatch):
    full = tmp_path / "full"
    full.mkdir()
    room = {full: 0, archive.parent: 1 << 40}
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=room[path]))
    refused(archive, full / "run", "the disk has 0")
    assert verify(unpack(archive, tmp_path / "back")).ok


@pytest.mark.parametrize("kind", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_ways_of_packing_are_refused(archive, tmp_path, kind):
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("made/more.txt", b"x" * 100, compress_type=kind)
    refused(archive, tmp_path / "back", "is packed otherwise than by mechmm pack")


# Weights -------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(1000))
    return folder


def hashes(folder):
    return {name: digest(data) for name, data in inside(folder).items()}


def test_weights_travel_by_hash(tmp_path, model):
    named = {"name": "mine", "files": hashes(model), "sha256": "2" * 64}
    run = write_run(tmp_path / "run", model=named)
    back = unpack(pack(run, weights=model), tmp_path / "back")
    assert inside(back / "weights") == inside(model)
    assert verify(back).ok
    (back / "weights" / "config.json").write_text("{ }")
    assert verify(back).changed == ("weights/config.json",)
    (back / "weights" / "config.json").unlink()
    assert verify(back).missing == ("weights/config.json",)
    (model / "config.json").write_text('{"a": 1}')
    with pytest.raises(ArchiveError, match=r"config\.json is missing or not the file"):
        pack(run, tmp_path / "other.zip", weights=model)


def test_weights_that_could_run_code_stay_out(tmp_path, model):
    (model / "pytorch_model.bin").write_bytes(b"x")
    named = {"name": "mine", "files": hashes(model), "sha256": "2" * 64}
    run = write_run(tmp_path / "run", model=named)
    with pytest.raises(ArchiveError, match=r"pytorch_model\.bin' may run code"):
        pack(run, weights=model)


# What must not be unpacked -------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "run/../../evil",
        "/etc/evil",
        "made/..",
        "made/C:evil",
        "made\\..\\evil",
        "made//x",
    ],
)
def test_entries_outside_the_folder_are_refused(archive, tmp_path, name):
    with_entries(archive, (name, b"x"))
    refused(archive, tmp_path / "back", "would not lie in")


def test_links_are_refused(archive, tmp_path):
    with_entries(archive, (link("made/figures"), b"/etc"))
    refused(archive, tmp_path / "back", "is a link or device")


def test_files_that_the_manifest_does_not_name_are_refused(archive, tmp_path):
    with_entries(archive, ("made/more.json", b"{}"))
    refused(archive, tmp_path / "back", r"'more\.json', which its manifest does not name")


def test_pickles_are_refused_even_if_named(run, tmp_path):
    (run / "state.pkl").write_bytes(b"\x80\x04.")
    seal(run)
    refused(pack(run), tmp_path / "back", r"state\.pkl' may run code")


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize("name", ["made/headlines.json", "made/HEADLINES.json", "other/x"])
def test_names_that_meet_on_disk_are_refused(archive, tmp_path, name):
    with_entries(archive, (name, b"x"))
    refused(archive, tmp_path / "back", "one folder, each file once")


def test_a_bomb_is_refused_before_it_is_written(archive, tmp_path):
    with_entries(archive, ("made/zeros", bytes(20_000_000)))
    assert archive.stat().st_size < 100_000
    refused(archive, tmp_path / "back", "would unpack to 20,", limits=Limits(size=1_000_000))
    refused(archive, tmp_path / "back", "has .* files, more than 3", limits=Limits(files=3))


def test_a_bomb_that_lies_about_its_size_writes_no_more_than_it_said(run, tmp_path):
    (run / "zeros").write_bytes(bytes(20_000_000))
    seal(run)
    archive = pack(run)
    data = archive.read_bytes()
    archive.write_bytes(data.replace(struct.pack("<I", 20_000_000), struct.pack("<I", 10)))
    refused(archive, tmp_path / "back", "cannot be read|shorter|larger", limits=Limits(size=10**6))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_archive_is_refused(archive, tmp_path, share):
    data = archive.read_bytes()
    archive.write_bytes(data[: int(len(data) * share)])
    refused(archive, tmp_path / "back", "cannot be read as an archive.*fetch it again")


def test_a_corrupt_archive_is_refused(archive, tmp_path):
    with zipfile.ZipFile(archive) as file:
        start = file.getinfo("made/results/objects/arrays.safetensors").header_offset
    data = bytearray(archive.read_bytes())
    data[start + 100] ^= 0xFF
    archive.write_bytes(data)
    refused(archive, tmp_path / "back", "cannot be read as an archive")


def test_content_that_is_not_the_manifests_is_refused(run, archive, tmp_path):
    changed = tmp_path / "changed.zip"
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(changed, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry, b"[]" if entry.filename.endswith("headlines.json") else data)
    refused(changed, tmp_path / "back", r"changed: headlines\.json")


def test_an_archive_of_something_else_is_refused(tmp_path):
    file = with_entries(tmp_path / "other.zip", ("photos/cat.jpg", b"x"))
    refused(file, tmp_path / "back", r"no archive of a run: it has no manifest\.json")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        unpack(tmp_path / "none.zip")


def test_an_archive_of_a_newer_format_is_refused(run, archive, tmp_path):
    newer = tmp_path / "newer.zip"
    seal(run, format=2)
    with zipfile.ZipFile(newer, "w") as file:
        for name, data in inside(run).items():
            file.writestr(f"made/{name}", data)
    refused(newer, tmp_path / "back", "format 2; this mechmm reads up to 1", RunError)


def test_a_manifest_that_names_a_path_outside_is_refused(run, tmp_path):
    seal(run, outputs={"../../evil": "0" * 64})
    with pytest.raises(RunError, match=r"it names the path '\.\./\.\./evil'"):
        verify(run)


def test_unpacking_never_writes_into_a_full_folder(run, archive):
    before = inside(run)
    with pytest.raises(FileExistsError, match="not an empty folder"):
        unpack(archive, run)
    assert inside(run) == before
