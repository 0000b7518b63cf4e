"""Who is let in, and what is noted of it: keys, paths without their version, counts and lines of the log."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from v4_jax.infer.http.request_log import Record
from v4_jax.infer.openai.api import ApiError

SALT = "v4_jax.prefix_salt"  # in a request's scope: what its key's prompts are kept apart by
RECORD = "v4_jax.record"  # in a request's scope: its line of the log

_SHORT = re.compile(
    r"/(chat/completions|completions|responses|messages|models)(/|$)"
)  # what clients ask that know no /v1


class Gate:
    """Lets in who has a key, where keys are asked for.

    Args:
      app: what is behind it.
      keys: any of which lets in; none lets everybody in.
      share_prefixes: whether prompts of all keys are kept together.
      refusal: the answer to who has none.
      count: takes path and status of every answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: tuple[str, ...],
        share_prefixes: bool,
        refusal: Callable[[str, ApiError], ASGIApp],
        count: Callable[[str, int], None],
    ) -> None:
        self._app, self._keys, self._share, self._refusal, self._count = app, keys, share_prefixes, refusal, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request, or refuses it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = dict(scope)
        if _SHORT.match(scope["path"]):
            scope |= {"path": "/v1" + scope["path"], "raw_path": b"/v1" + scope["raw_path"]}
        record = scope[RECORD] = Record(scope["method"], scope["path"])

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                self._count(scope["path"], message["status"])
            await send(message)

        try:
            key = self._key(scope)
            if self._keys and scope["path"].startswith("/v1/") and key is None:
                said = "the key is missing or unknown; expected Authorization: Bearer KEY, or x-api-key: KEY"
                record.error = error = ApiError(401, said, code="key")
                await self._refusal(scope["path"], error)(scope, receive, counting)
                return
            scope[SALT] = b"" if key is None or self._share else hashlib.sha256(key.encode()).digest()
            await self._app(scope, receive, counting)
        except Exception:
            record.error = ApiError(500, "the server has failed", code="failed")
            raise
        finally:
            record.close()

    def _key(self, scope: Scope) -> str | None:
        """The key that a request has; None without one that is known."""
        headers = dict(scope["headers"])
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if b"authorization" not in headers:  # as Anthropic's clients send it
            scheme, key = b"bearer", headers.get(b"x-api-key", b"")
        # All are compared: no early exit.
        found = [legal for legal in self._keys if hmac.compare_digest(key.strip(), legal.encode())]
        return found[0] if found and scheme.lower() == b"bearer" else None
