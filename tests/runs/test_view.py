"""The server of runs shows runs, and nothing else, to this machine alone."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from browser import browser

from mechmm import cli
from mechmm.results.report import Page, Section
from mechmm.runs.listing import Listing, list_page
from mechmm.runs.view import server

EVIL = "<script>window.ran=1</script>"


def make(folder: Path, name: str = "run", agrees: bool | None = True, **config: Any) -> Path:
    """A run as far as a list shows it."""
    lines = [{"name": f"accuracy {EVIL}", "step": "s", "value": 0.25, "low": 0.1, "high": 0.4}]
    files = {
        "resolved.json": {"name": name, "question": "Why?", "model": {"name": "m"}, **config},
        "headlines.json": [{**lines[0], "expect": "<= 0.35", "agrees": agrees}],
        "manifest.json": {
            "format": 1,
            "mechmm": "0.1.0",
            "name": name,
            "state": "finished",
            "outputs": {},
            "model": {"name": "m"},
            "pairs": {},
            "started": f"2026-01-0{len(name) % 9 + 1}T10:00:00+00:00",
            "packages": {"torch": name},
        },
    }
    folder.mkdir(parents=True)
    for file, value in files.items():
        (folder / file).write_text(json.dumps(value))
    Page(name, sections=[Section("s", ["the page"])]).save(folder / "report.html")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("all")
    (base / "secret.txt").write_text("secret")
    runs = base / "runs"
    make(runs / "one", "first one", seed=0)
    make(runs / "deeper" / "two", f"second {EVIL}", False, seed=1)
    make(runs / "odd <b>&", "third")
    make(base / "outside", "outside")
    (runs / "notes.txt").write_text("not a run's")
    (runs / "one" / ".lock").write_text("")
    (runs / "one" / "link.txt").symlink_to(base / "secret.txt")
    (runs / "one" / "up").symlink_to(base)
    (runs / "linked").symlink_to(base / "outside")
    (runs / "one" / "own.svg").write_text("<svg onload='alert(1)'/>")
    return runs


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[int]:
    with served(folder) as found:
        yield found


@contextmanager
def served(folder: Path) -> Iterator[int]:
    """The port of a server of the runs in a folder."""
    with server([folder], 0) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found.server_port
        found.shutdown()
        thread.join()


def ask(
    port: int, path: str, method: str = "GET", headers: Mapping[str, str] | None = None
) -> tuple[HTTPResponse, str]:
    """An answer to a path as it is, and its text."""
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest(method, path, skip_host=bool(headers and "Host" in headers))
    for name, value in (headers or {}).items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer, text


def test_all_runs_are_listed_with_what_they_found(port: int) -> None:
    answer, text = ask(port, "/")
    assert answer.status == 200
    assert text.count('class="headline run') == 3
    assert "outside" not in text, "links are not followed"
    assert "0.250 (0.100 to 0.400), expected ≤ 0.35" in text
    assert "Why?" in text
    assert text.count("Verdict: agrees with the prediction") == 2
    assert text.count("Verdict: disagrees with the prediction") == 1
    assert EVIL not in text
    assert 'href="/runs/0/odd%20%3Cb%3E%26/report.html"' in text


def test_pages_and_files_of_runs_are_served(port: int, folder: Path) -> None:
    answer, text = ask(port, "/runs/0/one/report.html")
    assert answer.status == 200
    assert text == (folder / "one" / "report.html").read_text()
    policy = answer.getheader("Content-Security-Policy") or ""
    assert policy.startswith("sandbox allow-scripts allow-downloads; default-src 'none'")
    assert ask(port, "/runs/0/odd%20%3Cb%3E%26/report.html")[0].status == 200
    answer, text = ask(port, "/runs/0/deeper/two/resolved.json")
    assert (answer.status, answer.getheader("Content-Type")) == (
        200,
        "application/json; charset=utf-8",
    )
    assert json.loads(text)["seed"] == 1


def test_what_a_browser_could_run_is_only_saved(port: int) -> None:
    answer, _ = ask(port, "/runs/0/one/own.svg")
    assert answer.getheader("Content-Type") == "application/octet-stream"
    assert answer.getheader("X-Content-Type-Options") == "nosniff"


@pytest.mark.parametrize(
    "path",
    [
        "/runs/0/../secret.txt",
        "/runs/0/one/../../secret.txt",
        "/runs/0/one/%2e%2e/%2e%2e/secret.txt",
        "/runs/0/one/..%2f..%2fsecret.txt",
        "/runs/0/one/%252e%252e/secret.txt",
        "/runs/0/one//etc/passwd",
        "/runs/0//etc/passwd",
        "/runs/0/one/..\\..\\secret.txt",
        "/runs/0/one/link.txt",
        "/runs/0/one/up/secret.txt",
        "/runs/0/one/up/outside/report.html",
        "/runs/0/linked/report.html",
        "/runs/0/one/.lock",
        "/runs/0/notes.txt",
        "/runs/0/one",
        "/runs/0/one/",
        "/runs/0/",
        "/runs/1/one/report.html",
        "/runs/-1/one/report.html",
        "/runs/" + "9" * 5000 + "/one/report.html",
        "/runs/x/one/report.html",
        "/runs/0/one/report.html%00.txt",
        "/runs/0/one/" + "a" * 5000,
        "/etc/passwd",
        "/secret.txt",
    ],
)
def test_nothing_outside_of_runs_is_served(port: int, path: str) -> None:
    answer, text = ask(port, path)
    assert answer.status == 404
    assert "secret" not in text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_it_only_reads(port: int, method: str) -> None:
    answer, _ = ask(port, "/", method)
    assert (answer.status, answer.getheader("Allow")) == (405, "GET, HEAD")


def test_head_is_get_without_the_text(port: int) -> None:
    for path in ("/", "/runs/0/one/report.html", "/nothing"):
        (answer, text), (other, whole) = ask(port, path, "HEAD"), ask(port, path)
        assert (answer.status, text) == (other.status, "")
        assert answer.getheader("Content-Length") == str(len(whole.encode()))


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{}", "127.0.0.1:1", "", "localhost"]
)
def test_other_names_of_this_machine_are_refused(port: int, host: str) -> None:
    answer, text = ask(port, "/", headers={"Host": host.format(port)})
    assert answer.status == 421
    assert "first one" not in text


def test_its_own_names_are_not(port: int) -> None:
    for host in (f"localhost:{port}", f"127.0.0.1:{port}"):
        assert ask(port, "/", headers={"Host": host})[0].status == 200


def test_two_runs_are_compared(port: int) -> None:
    answer, text = ask(port, "/compare?run=0/one&run=0/deeper/two")
    assert answer.status == 200
    assert EVIL not in text
    differ = text[text.index("Settings that differ</h2>") :]
    assert ">seed<" in differ
    assert ">question<" not in differ
    for query in ("", "run=0/one", "run=0/one&run=0/none", "run=0/one&run=0/one&run=0/one"):
        assert ask(port, f"/compare?{query}")[0].status == 400


def test_odd_headlines_of_one_run_leave_the_others(tmp_path: Path) -> None:
    make(tmp_path / "good", "good one")
    odd = make(tmp_path / "odd", "odd one")
    lines = [{"value": 10**400, "agrees": False}, {"name": "\ud800", "value": -(10**400)}]
    (odd / "headlines.json").write_text(json.dumps(lines))
    text = list_page(Listing.of([tmp_path]).runs())
    assert "good one" in text
    assert "None: 1.00e+400" in text
    with served(tmp_path) as port:
        answer, text = ask(port, "/")
    assert answer.status == 200
    assert "good one" in text


def test_what_nobody_thought_of_is_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> str:
        raise AssertionError("unthought of")

    make(tmp_path / "one")
    monkeypatch.setattr("mechmm.runs.view.list_page", fails)
    with served(tmp_path) as port:
        answer, text = ask(port, "/")
    assert (answer.status, text) == (500, "Internal Server Error")
    assert "unthought of" in capsys.readouterr().err


def test_runs_that_come_later_or_are_damaged_are_listed(tmp_path: Path) -> None:
    make(tmp_path / "one")
    with server([tmp_path], 0) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        try:
            late = make(tmp_path / "late", "late")
            (late / "headlines.json").write_text("{not json")
            made = make(tmp_path / "going on", "going on")
            (made / "manifest.json").write_text('{"state": "running"}')
            (made / "report.html").unlink()
            text = ask(found.server_port, "/")[1]
        finally:
            found.shutdown()
            thread.join()
    assert "headlines.json cannot be read" in text
    assert "Not finished (running)" in text
    assert "going on (no page yet)" in text


def test_what_cannot_be_served_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        run = str(make(tmp_path / "run"))
        for words, said in (
            ([str(tmp_path / "empty")], "holds no run"),
            ([str(tmp_path / "none")], "is no folder"),
            ([run, "--port", port], f"port {port} cannot be used (Address already in use)"),
            ([run, "--port", "70000"], "from 1 to 65535"),
        ):
            monkeypatch.setattr(sys, "argv", ["mechmm", "view", *words])
            with pytest.raises(SystemExit) as end:
                cli.main()
            assert end.value.code == 1
            assert said in capsys.readouterr().err


def test_it_listens_on_this_machine_alone(folder: Path) -> None:
    with server([folder], 0) as found:
        assert found.server_address[0] == "127.0.0.1"


def test_the_list_is_filtered_and_compared_in_a_browser(port: int) -> None:
    with browser() as tab:
        tab.window(width=360)
        tab.open(f"http://127.0.0.1:{port}/")
        shown = "[...document.querySelectorAll('.run:not([hidden]) h2')].map((h) => h.textContent)"
        assert len(tab.js(shown)) == 3
        assert tab.js("document.documentElement.scrollWidth - window.innerWidth") <= 0
        tab.js("document.getElementById('filter').focus()")
        tab.call("Input.insertText", text="FIRST why")
        assert tab.js(shown) == ["first one"]
        assert tab.js("document.getElementById('compare').disabled")
        tab.js("document.getElementById('filter').select()")
        tab.call("Input.insertText", text="agrees")
        assert len(tab.js(shown)) == 3
        tab.js("[...document.querySelectorAll('.run input')].slice(0, 2).forEach((b) => b.click())")
        assert tab.errors == []
        tab.js("document.getElementById('compare').click()")
        tab.until("document.querySelector('h1')?.textContent === 'Two runs'")
        tab.open(f"http://127.0.0.1:{port}/runs/0/one/report.html")
        assert tab.js("document.body.textContent").count("the page") == 1
        assert tab.js("window.origin") == "null", "a page has no right to the others"
        assert tab.errors == []
