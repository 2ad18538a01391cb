"""Runs in a browser: a list of those in some folders, two of them side by side, and their pages.

The server answers on this machine alone (127.0.0.1), and only to addresses that name it, so that no
web page can reach it under a name of its own. It reads, and never writes. Files come from folders
of runs alone. A run may be a stranger's: its page is shown without any right to the others.
"""

from __future__ import annotations

import mimetypes
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from mechmm.runs.listing import Listing, compared, list_page, own_policy
from mechmm.runs.paths import MANIFEST

HOST, PORT = "127.0.0.1", 8765
NAMES = ("127.0.0.1", "localhost")
SHOWN = (".html", ".json", ".csv", ".toml", ".png", ".txt", ".jsonl")
"""Kinds of files that a browser shows; others it may only save."""
SANDBOX = (
    "sandbox allow-scripts allow-downloads; default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
"""What a run's own page may do: draw, and save its own data."""


def server(folders: Sequence[Path], port: int = PORT) -> ThreadingHTTPServer:
    """A server of the runs in some folders, which listens; port 0 finds a free one.

    Raises:
        ValueError: a folder does not exist or has no run; the port is in use or out of range.
    """
    listing = Listing.of(folders)
    if not 0 <= port < 65536:
        raise ValueError(f"--port is {port}; give a number from 1 to 65535")
    handler = type("Handler", (_Handler,), {"listing": listing})
    try:
        return ThreadingHTTPServer((HOST, port), handler)
    except OSError as error:
        raise ValueError(
            f"port {port} cannot be used ({error.strerror}); give another one with --port"
        ) from error


def view(folders: Sequence[Path], port: int = PORT) -> None:
    """Serve until interrupted.

    Raises:
        ValueError: as `server`.
    """
    with server(folders, port) as found:
        print(f"runs at http://{HOST}:{found.server_port}/ (end with Ctrl-C)", flush=True)
        try:
            found.serve_forever()
        except KeyboardInterrupt:
            print()


@dataclass(frozen=True)
class _Refused(Exception):  # noqa: N818 (an answer, not an error)
    status: HTTPStatus


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    listing: Listing
    begun = False
    """Whether the head of an answer is sent: there can be no other then."""
    timeout = 30
    server_version, sys_version = "mechmm", ""

    def do_GET(self) -> None:
        try:
            self._check_host()
            self._answer(urlsplit(self.path))
        except _Refused as refused:
            self._refuse(refused.status)
        except ConnectionError:  # nobody is there to answer
            self.close_connection = True
        except Exception as error:  # what a stranger's run may bring about
            print(f"mechmm: {self.path!r} cannot be answered: {error!r}", file=sys.stderr)
            if self.begun:
                self.close_connection = True
            else:
                self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self._send(b"This server only reads.", "text/plain", HTTPStatus.METHOD_NOT_ALLOWED)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal is for errors."""

    def _check_host(self) -> None:
        """A page that reached this server under another name has another host here."""
        name, _, port = self.headers.get("Host", "").rpartition(":")
        if name not in NAMES or port != str(self.port):
            raise _Refused(HTTPStatus.MISDIRECTED_REQUEST)

    @property
    def port(self) -> int:
        return self.connection.getsockname()[1]

    def _answer(self, address: SplitResult) -> None:
        if address.path == "/":
            self._page(list_page(self.listing.runs()))
        elif address.path == "/compare":
            chosen = parse_qs(address.query).get("run", [])
            runs = {run.place: run for run in self.listing.runs()}
            if len(chosen) != 2 or not set(chosen) <= set(runs):
                raise _Refused(HTTPStatus.BAD_REQUEST)
            self._page(compared(*(runs[place] for place in chosen)))
        elif address.path.startswith("/runs/"):
            self._file(self._found(unquote(address.path.removeprefix("/runs/"))))
        else:
            raise _Refused(HTTPStatus.NOT_FOUND)

    def _found(self, path: str) -> Path:
        """The file of a run, or refused."""
        number, *parts = path.split("/")
        known = {str(i): folder for i, folder in enumerate(self.listing.folders)}
        odd = any(part.startswith(".") or not part or set(part) & set("\\\0") for part in parts)
        if not odd and parts and number in known:
            try:
                found = _inside_run(known[number], parts)
            except OSError:  # a name that no file can have
                found = None
            if found is not None:
                return found
        raise _Refused(HTTPStatus.NOT_FOUND)

    # Answers -------------------------------------------------------------------------------------

    def _page(self, text: str) -> None:
        self._send(
            text.encode(errors="replace"),
            "text/html; charset=utf-8",
            policy=f"{own_policy()}; frame-ancestors 'none'",
        )

    def _file(self, file: Path) -> None:
        kind = mimetypes.guess_type(file.name)[0] if file.suffix in SHOWN else None
        text = "; charset=utf-8" if kind and not kind.startswith("image/") else ""
        with file.open("rb") as opened:
            size = file.stat().st_size
            self._head(HTTPStatus.OK, f"{kind or 'application/octet-stream'}{text}", size, SANDBOX)
            if self.command != "HEAD":
                shutil.copyfileobj(opened, self.wfile)

    def _refuse(self, status: HTTPStatus) -> None:
        self._send(status.phrase.encode(), "text/plain; charset=utf-8", status)

    def _send(
        self, data: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK, policy: str = SANDBOX
    ) -> None:
        self._head(status, kind, len(data), policy)
        if self.command != "HEAD":
            self.wfile.write(data)

    def _head(self, status: HTTPStatus, kind: str, size: int, policy: str) -> None:
        headers = {
            "Content-Type": kind,
            "Content-Length": str(size),
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers |= {"Allow": "GET, HEAD", "Connection": "close"}
        self.begun = True
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


for _other in ("PUT", "DELETE", "PATCH", "OPTIONS"):
    setattr(_Handler, f"do_{_other}", _Handler.do_POST)


def _inside_run(root: Path, parts: Sequence[str]) -> Path | None:
    """A file, if it lies in a run that lies in the folder; links are followed, and have to end
    there, too."""
    file = root.joinpath(*parts)
    above = [folder for folder in file.parents if folder.is_relative_to(root)]
    run = next((folder for folder in above if (folder / MANIFEST).is_file()), None)
    if run is None or not file.is_file() or not run.resolve().is_relative_to(root):
        return None
    return file if file.resolve().is_relative_to(run.resolve()) else None
