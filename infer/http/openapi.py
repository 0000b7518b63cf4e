"""The OpenAPI page of the server, from the same declarations that check its requests."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from v4_jax.infer.anthropic.body import CountBody, MessagesBody
from v4_jax.infer.openai.bodies import ChatBody, CompletionBody
from v4_jax.infer.openai.responses_body import ResponsesBody

_REF = "#/components/schemas/{model}"

_ERRORS = {
    "400": "The body is not legal, or asks for more than there is room for.",
    "401": "The key is missing or unknown.",
    "404": "There is no such model.",
    "408": "The answer took longer than a request may take.",
    "413": "The body is larger than a body may be.",
    "415": "The body is not JSON.",
    "429": "Too many requests are being served; the header says when to try again.",
    "500": "The server has failed.",
    "503": "The engine does not run.",
}

_TEXT = {"type": "string"}
_WHOLE = {"type": "integer", "minimum": 0}


def _object(required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required.split(), "properties": properties}


_ERROR = _object(
    "error",
    error=_object("message type", message=_TEXT, type=_TEXT, param={"type": ["string", "null"]}, code={}),
)
_USAGE = _object(
    "prompt_tokens completion_tokens total_tokens prompt_cache_hit_tokens prompt_cache_miss_tokens "
    "prompt_tokens_details"
)
_OTHER_ERROR = _object("type error", type={"const": "error"}, error=_object("type message", type=_TEXT, message=_TEXT))
_ITEMS = {"type": "array", "items": _object("type", type=_TEXT)}
_RESPONSE = _object("id object created_at status model output usage", object={"const": "response"}, output=_ITEMS)
_MESSAGE = _object("id type role model content stop_reason usage", type={"const": "message"}, content=_ITEMS)
_COUNT = _object("input_tokens", input_tokens=_WHOLE)
_MODEL = _object("id object created owned_by", id=_TEXT, object={"const": "model"}, created=_WHOLE, owned_by=_TEXT)


def _answer(kind: str, text: str) -> dict[str, Any]:
    choice = _object(f"index finish_reason {text}", index=_WHOLE)
    choices = {"type": "array", "items": choice, "minItems": 1}
    fields = {"id": _TEXT, "object": {"const": kind}, "created": _WHOLE, "model": _TEXT}
    return _object("id object created model choices usage", **fields, choices=choices, usage=_USAGE)


def openapi(version: str, *, keys: bool) -> dict[str, Any]:
    """The page, OpenAPI 3.1.

    Args:
      version: of the server.
      keys: whether a key is asked for.
    """
    bodies = (ChatBody, CompletionBody, ResponsesBody, MessagesBody, CountBody)
    kinds: list[tuple[Any, Any]] = [(body, "validation") for body in bodies]
    _, schemas = models_json_schema(kinds, ref_template=_REF)
    security: list[dict[str, list[str]]] = [{"key": []}] if keys else []

    def response(text: str, schema: Any, kind: str = "application/json") -> dict[str, Any]:
        return {"description": text, "content": {kind: {"schema": schema}}}

    def errors(*codes: str, form: dict[str, Any] = _ERROR) -> dict[str, Any]:
        found = {code: response(_ERRORS[code], form) for code in codes}
        for code in {"429", "503"} & set(found):
            found[code]["headers"] = {"Retry-After": {"schema": _WHOLE}}
        return found

    def post(
        summary: str, body: str, answer: dict[str, Any], error: dict[str, Any] = _ERROR, streams: bool = True
    ) -> dict[str, Any]:
        whole = response("The answer; with stream, server-sent events of its pieces." if streams else "It.", answer)
        if streams:
            whole["content"]["text/event-stream"] = {"schema": _TEXT}
        content = {"application/json": {"schema": {"$ref": _REF.format(model=body)}}}
        return {
            "post": {
                "summary": summary,
                "security": security,
                "requestBody": {"required": True, "content": content},
                "responses": {"200": whole, **errors(*_ERRORS, form=error)},
            }
        }

    def get(summary: str, responses: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"get": {"summary": summary, "responses": responses, **more}}

    listed = _object("object data", object={"const": "list"}, data={"type": "array", "items": _MODEL})
    name = {"name": "model", "in": "path", "required": True, "schema": _TEXT}
    known = errors("401")
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "v4-jax",
            "version": version,
            "description": "DeepSeek-V4, in the forms of OpenAI's and Anthropic's APIs.",
        },
        "paths": {
            "/v1/chat/completions": post("Answer a conversation", "ChatBody", _answer("chat.completion", "message")),
            "/v1/completions": post("Continue a text", "CompletionBody", _answer("text_completion", "text")),
            "/v1/responses": post("Answer a conversation of items", "ResponsesBody", _RESPONSE),
            "/v1/messages": post("Answer a conversation, in Anthropic's form", "MessagesBody", _MESSAGE, _OTHER_ERROR),
            "/v1/messages/count_tokens": post(
                "How many tokens a conversation has", "CountBody", _COUNT, _OTHER_ERROR, streams=False
            ),
            "/v1/models": get("The models", {"200": response("One.", listed), **known}, security=security),
            "/v1/models/{model}": get(
                "A model",
                {"200": response("It.", _MODEL), **known, **errors("404")},
                security=security,
                parameters=[name],
            ),
            "/health": get(
                "Whether requests are served",
                {"200": response("They are.", _object("status")), **errors("503")},
            ),
            "/metrics": get("Counters for Prometheus", {"200": response("Them.", _TEXT, "text/plain")}),
        },
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
