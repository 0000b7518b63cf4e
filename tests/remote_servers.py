"""A Google Cloud Storage and a Hugging Face hub on loopback, as far as reading goes, that count what they send."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_not-to-be-printed"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Remote:
    """What a server holds and has sent.

    Attributes:
      url: of the server.
      sent: bytes of every answered range of a file: name -> (first, past the last) of each.
      unknown: requests that it does not know.
    """

    def __init__(self, files: dict[str, bytes]):
        self.files = files
        self.url = ""
        self.sent: dict[str, list[tuple[int, int]]] = {}
        self.unknown: list[str] = []

    def bytes_of_shards(self) -> int:
        return sum(b - a for name, parts in self.sent.items() if name.endswith(".safetensors") for a, b in parts)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body go together: apart, the second waits for the first to be acknowledged
    disable_nagle_algorithm = True
    remote: Remote

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer_json(self, content: object, status: int = 200) -> None:
        self.answer(json.dumps(content).encode(), status, Content_Type="application/json")

    def answer_file(self, name: str) -> None:
        content = self.remote.files[name]
        wanted = self.headers.get("Range", "")
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = (int(first), min(int(last) + 1, len(content))) if wanted else (0, len(content))
        self.remote.sent.setdefault(name, []).append((start, stop))
        of = {"Content_Range": f"bytes {start}-{stop - 1}/{len(content)}"} if wanted else {}
        self.answer(content[start:stop], 206 if wanted else 200, ETag=_digest(content), **of)

    def unknown(self) -> None:
        self.remote.unknown.append(f"{self.command} {self.path}")
        self.answer_json({"error": "not found"}, 404)


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class _Storage(_Handler):
    """Objects of one bucket, `weights`."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        objects = "/storage/v1/b/weights/o"
        if url.path == objects:
            prefix = query.get("prefix", "")
            names = [name for name in self.remote.files if name.startswith(prefix)]
            self.answer_json({"kind": "storage#objects", "items": [self.item(name) for name in names]})
            return
        name = unquote(url.path.rpartition("/o/")[2])
        if objects not in url.path or name not in self.remote.files:
            self.unknown()
        elif url.path.startswith("/download") or query.get("alt") == "media":
            self.answer_file(name)
        else:
            self.answer_json(self.item(name))

    def item(self, name: str) -> dict[str, str]:
        content = self.remote.files[name]
        return {
            "name": name,
            "bucket": "weights",
            "size": str(len(content)),
            "generation": "7",
            "etag": _digest(content),
        }


class _Hub(_Handler):
    """One model, `org/name`, for those who have the token; its branch `main` is at `COMMIT`."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer_json({"error": f"Invalid credentials {self.headers.get('Authorization')}"}, 401)
            return
        path = unquote(urlsplit(self.path).path)
        model = "/api/models/org/name"
        if path in (model, f"{model}/revision/main", f"{model}/revision/{COMMIT}"):
            self.answer_json({"id": "org/name", "sha": COMMIT, "siblings": [], "private": True})
        elif path.startswith(f"{model}/tree/{COMMIT}"):
            self.answer_json([self.item(name) for name in self.remote.files])
        elif path.startswith(f"/org/name/resolve/{COMMIT}/") and path.split(f"{COMMIT}/")[1] in self.remote.files:
            self.answer_file(path.split(f"{COMMIT}/")[1])
        else:
            self.unknown()

    def item(self, name: str) -> dict[str, object]:
        content = self.remote.files[name]
        return {"type": "file", "oid": _digest(content), "size": len(content), "path": name}


@contextlib.contextmanager
def serving(kind: str, directory: Path, prefix: str = "") -> Iterator[Remote]:
    """A server, "gs" or "hf", of a directory's files."""
    names = [file for file in sorted(directory.rglob("*")) if file.is_file()]
    remote = Remote({prefix + str(file.relative_to(directory)): file.read_bytes() for file in names})
    handler = type("Handler", (_Storage if kind == "gs" else _Hub,), {"remote": remote})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    remote.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield remote
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
