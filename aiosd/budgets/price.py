"""Prices of a model's tokens. Amounts of money are whole numbers of 10^-12 of the currency's unit, so that they add up
exactly. Only the person who writes prices and budgets knows which currency it is."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from aiosd.units import parse_money

PER = 1_000_000  # prices are for this number of tokens


class Price(Struct, frozen=True):
    """The price of one token of each kind."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0  # of a prompt, if the endpoint had it in its cache

    @property
    def is_free(self) -> bool:
        return not (self.prompt or self.completion or self.cached)

    def of_prompt(self, tokens: int, cached: int) -> int:
        return (tokens - cached) * self.prompt + cached * self.cached

    def of_completion(self, tokens: int) -> int:
        return tokens * self.completion


FREE = Price()


def read(value: Any) -> Price:
    """ "0.15,0.60" · "0.15,0.60,0.075" · [0.15, 0.6]: prompt, completion, cached prompt, each for a million tokens.
    Raises ValueError."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not 2 <= len(parts) <= 3:
        raise ValueError(f"{value!r} is no price (such as 0.15,0.60: a million tokens of prompt, of answer)")
    amounts = [_of_one(part) for part in parts]
    prompt, completion = amounts[:2]
    return Price(prompt, completion, amounts[2] if len(amounts) == 3 else prompt)


def _of_one(value: Any) -> int:
    whole, rest = divmod(parse_money(value), PER)
    if rest:
        raise ValueError(f"{value!r} has more than six decimals")
    return whole
