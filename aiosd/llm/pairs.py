"""A query and a document as the one text that a model scores.

The file of a model that ranks has a template for this ("rerank"). Without one the two texts follow each other, with the
vocabulary's marks between them. Names of control tokens in query and document are plain text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from aiosd.llm import llama

_PLACES = re.compile(r"(\{query\}|\{document\})")


def tokens_of_pairs(model: llama.Model, query: str, documents: Iterable[str]) -> Iterator[list[int]]:
    """The tokens of each pair."""
    template = model.meta("tokenizer.chat_template.rerank")
    parts = _PLACES.split(template) if template else []
    head = [*model.query_marks[0], *model.tokenize(query, bos=False, special=False), *model.query_marks[1]]
    for document in documents:
        if parts:
            texts = {"{query}": query, "{document}": document}
            pieces = [
                model.tokenize(texts.get(part, part), bos=False, special=part not in texts) for part in parts if part
            ]
            yield [token for piece in pieces for token in piece]
        else:
            yield [*head, *model.tokenize(document, bos=False, special=False), *model.query_marks[2]]
