"""The cost of a call, as far as it is known: an estimate until the endpoint reports its usage, and the count of this
core if the endpoint never does. Pure.

    a prompt    a token for `BYTES_PER_TOKEN` bytes of the request
    an answer   a token for each piece that came, and no fewer than one for `CHARACTERS_PER_TOKEN` characters: some
                endpoints put many tokens into a piece, or all of them

Each attempt is charged by itself, by its usage if that came, whether or not the attempt has led to an answer.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from aiosd.budgets.price import Price
from aiosd.llm.remote.answer import StreamedAnswer
from libaios.wire import Usage

if TYPE_CHECKING:
    from aiosd.llm.remote.call import RemoteCall

logger = logging.getLogger("llm.remote")

BYTES_PER_TOKEN = 4  # of a request
CHARACTERS_PER_TOKEN = 6  # of an answer: rarely more, as models write
MOST_TEMPLATE = 4096  # tokens that an endpoint's template may add to a prompt


def estimate(size: int) -> int:
    """Tokens of the prompt in a request of `size` bytes."""
    return size // BYTES_PER_TOKEN + 1


def of_answer(answer: StreamedAnswer) -> int:
    """Tokens of an answer."""
    reported = answer.usage.completion_tokens if answer.usage is not None else 0
    return reported or max(answer.chunks, answer.length // CHARACTERS_PER_TOKEN)


def of_prompt(answer: StreamedAnswer, estimated: int, endpoint: str) -> tuple[int, int]:
    """Tokens of the prompt of this attempt, and how many of them the endpoint had in its cache."""
    reported = answer.usage or Usage()
    prompt = reported.prompt_tokens or estimated
    most = estimated * BYTES_PER_TOKEN + MOST_TEMPLATE
    if prompt > most:  # no token is less than a byte
        logger.warning("%s: a prompt of %d tokens, it says; counted as %d", endpoint, prompt, most)
        prompt = most
    return prompt, min(reported.cached_tokens, prompt)


def of_texts(reported: int, estimated: int) -> int:
    """Tokens of texts whose vectors have come; `reported` 0: the endpoint does not report it."""
    return min(reported or estimated, estimated * BYTES_PER_TOKEN + MOST_TEMPLATE)


def allowed(call: RemoteCall, price: Price) -> tuple[int | None, str]:
    """How many tokens of an answer the budgets allow to an attempt that is about to begin, and which kind of budget
    allows none. Before an attempt nothing is under way, so all that the call has cost is in `wasted` and
    `prompt_charged`."""
    found: list[tuple[int, str]] = []
    if call.submit.budget is not None:
        left = call.submit.budget - call.prompt_charged - call.wasted - call.prompt_estimate
        found.append((left, "tokens"))
    if call.submit.money is not None:
        prompts = price.of_prompt(call.prompt_charged + call.prompt_estimate, 0)
        left = call.submit.money - prompts - price.of_completion(call.wasted)
        found.append((left // price.completion if price.completion else left + 1, "cost"))
    if call.account is not None:  # other calls may have used it meanwhile
        lefts = [purse.left for purse in call.account.purses if purse.left is not None]
        found += [(left - call.prompt_estimate, "tokens") for left in lefts]
    tokens, kind = min(found, default=(None, ""))
    return tokens, kind if tokens is not None and tokens < 1 else ""


def pay(call: RemoteCall, tokens: int) -> str:
    """Pay for these tokens before they come. If too little is left, pay for none, and return the kind of budget."""
    return "" if call.account is None else call.account.pay(tokens, tokens)


def is_spent(call: RemoteCall) -> bool:
    """Whether the pieces that have come are all that its budget allows. An endpoint whose request has a limit of tokens
    stops before that; some endpoints are not reliable."""
    budget = call.submit.budget
    return budget is not None and call.prompt_charged + call.wasted + call.answer.chunks >= budget
