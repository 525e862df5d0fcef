"""Responses that a later request can continue: GET and DELETE /v1/responses/{id}, and its input items.

They are kept in this process, each for its own agent: the newest ones, and no more than `KEPT_BYTES`. When the gateway
has died in between, the program gets a 404 and sends the whole conversation.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl

import msgspec
from msgspec import Raw, Struct

from aiosd.gateway.web import HttpRequest, Problem, encode

KEPT, KEPT_BYTES = 256, 8 << 20  # responses, for one agent
MOST_LISTED = 100

Item = dict[str, Any]


class StoredResponse(Struct):
    """`messages`: the conversation with the answer; `items`: what was sent with this request; `shown`: the response."""

    messages: Raw
    items: Raw
    shown: Raw


def keep(request: HttpRequest, ident: str, messages: list[Item], items: list[Item], shown: Item) -> None:
    kept = request.account.responses
    kept[ident] = encode([encode_raw(one) for one in (messages, items, shown)])
    while len(kept) > KEPT or (len(kept) > 1 and sum(map(len, kept.values())) > KEPT_BYTES):
        del kept[next(iter(kept))]


def encode_raw(value: Any) -> Raw:
    return Raw(encode(value))


def find(request: HttpRequest, ident: str, param: str | None = None, code: str | None = None) -> StoredResponse:
    """The kept response of this id. Raises Problem (404)."""
    kept = request.account.responses.get(ident)
    if kept is None:
        named = f"{param}: " if param else ""
        message = f"{named}{ident[:80]!r} is not known (any more); send the whole conversation"
        raise Problem(404, message, param=param, code=code)
    messages, items, shown = msgspec.json.decode(kept, type=tuple[Raw, Raw, Raw])
    return StoredResponse(messages, items, shown)


def messages_of(request: HttpRequest, ident: str) -> list[Item]:
    """The messages of the conversation to continue. Raises Problem (404)."""
    kept = find(request, ident, "previous_response_id", "previous_response_not_found")
    messages: list[Item] = msgspec.json.decode(kept.messages)
    return messages


# ── routes ────────────────────────────────────────────────────────────────────────────────────────────────


async def get(request: HttpRequest) -> None:
    if _query(request).get("stream") == "true":
        raise Problem(400, "stream: what is over is not sent again in parts", param="stream")
    await request.reply_bytes(bytes(find(request, request.words["response"]).shown), b"application/json")


async def delete(request: HttpRequest) -> None:
    ident = request.words["response"]
    find(request, ident)
    del request.account.responses[ident]
    await request.reply({"id": ident, "object": "response", "deleted": True})


async def cancel(request: HttpRequest) -> None:
    find(request, request.words["response"])
    raise Problem(400, "only a response in the background can be cancelled; close the connection of any other")


async def input_items(request: HttpRequest) -> None:
    """List input items, the newest first unless `order` is asc: `limit` of them, after the one that `after` names."""
    query = _query(request)
    order, limit, after = query.get("order", "desc"), query.get("limit", "20"), query.get("after")
    if order not in ("asc", "desc"):
        raise Problem(400, "order: asc or desc", param="order")
    if not limit.isdecimal() or not 1 <= int(limit) <= MOST_LISTED:
        raise Problem(400, f"limit: from 1 to {MOST_LISTED}", param="limit")
    items: list[Item] = msgspec.json.decode(find(request, request.words["response"]).items)
    if order == "desc":
        items.reverse()
    begin = 0 if after is None else 1 + next((i for i, item in enumerate(items) if item["id"] == after), len(items))
    page = items[begin : begin + int(limit)]
    await request.reply(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else "",
            "last_id": page[-1]["id"] if page else "",
            "has_more": len(items) > begin + len(page),
        }
    )


def _query(request: HttpRequest) -> dict[str, str]:
    return dict(parse_qsl(request.query.decode("latin-1")))
