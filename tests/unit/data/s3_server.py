"""The part of the S3 interface that reading needs, over a folder: HEAD, GET with ranges, listings."""

import http.server
import time
import urllib.parse
from email.utils import formatdate
from functools import partial
from pathlib import Path
from typing import ClassVar


class S3Handler(http.server.BaseHTTPRequestHandler):
    """Serves `root` as every bucket."""

    protocol_version = "HTTP/1.1"
    requests: ClassVar[list[str]] = []
    cuts: ClassVar[list[int]] = []
    """Bytes of the body after which the next answers with content break off."""
    refuses = False

    def __init__(self, *args: object, root: Path) -> None:
        self.root = root
        super().__init__(*args)

    def log_message(self, *args: object) -> None:
        """Stay quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        self.requests.append(f"{self.command} {url.path}")
        query = urllib.parse.parse_qs(url.query, keep_blank_values=True)
        key = urllib.parse.unquote(url.path).lstrip("/").partition("/")[2]
        if "list-type" in query and not self.refuses:
            return self._list(query["prefix"][0] if "prefix" in query else "", int(query.get("max-keys", ["1000"])[0]))
        path = self.root / key
        if self.refuses:
            return self._answer(403)
        if not key:
            return self._answer(200)
        if not path.is_file():
            return self._answer(404)
        body = path.read_bytes()
        headers = {"Last-Modified": formatdate(path.stat().st_mtime, usegmt=True), "ETag": '"x"'}
        if wanted := self.headers.get("Range"):
            first, last = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
            headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
            return self._answer(206, body[first : last + 1], headers)
        return self._answer(200, body, headers)

    def _list(self, prefix: str, most: int) -> None:
        found = sorted(path for path in self.root.rglob("*") if path.is_file())
        found = [path for path in found if str(path.relative_to(self.root)).startswith(prefix)][:most]
        entries = "".join(
            f"<Contents><Key>{path.relative_to(self.root)}</Key><Size>{path.stat().st_size}</Size><LastModified>"
            f"{time.strftime('%Y-%m-%dT%H:%M:%S.000Z', time.gmtime(path.stat().st_mtime))}</LastModified></Contents>"
            for path in found
        )
        head = f"<IsTruncated>false</IsTruncated><KeyCount>{len(found)}</KeyCount>"
        body = f'<?xml version="1.0"?><ListBucketResult>{head}{entries}</ListBucketResult>'
        self._answer(200, body.encode(), {"Content-Type": "application/xml"})

    def _answer(self, code: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            if body and self.cuts:
                body, self.close_connection = body[: self.cuts.pop(0)], True
            self.wfile.write(body)


def build_server(root: Path) -> http.server.ThreadingHTTPServer:
    """A server on a free port of the loopback interface."""
    return http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(S3Handler, root=root))
