"""From items to score to requests that a server takes, and back: pure, used by both shells."""

import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from oasst.v1 import scoring_pb2

from oasst_client._batches import batches
from oasst_client._errors import APIError, FieldViolation, ProtocolError
from oasst_client._request_id import new_request_id
from oasst_client._types import ItemScore, ScoreItem, ScoreItemLike

__all__ = [
    "REQUESTS_AT_ONCE",
    "ScorePart",
    "TextPair",
    "scores_from",
    "split_pairs",
    "split_requests",
    "texts_of",
    "token_items",
    "told_of_all_items",
]

# Requests of one call that are under way together: enough that a worker never waits for the next one.
REQUESTS_AT_ONCE = 4

# Of one request. Smaller than what a server takes: less is done again where one is lost.
_ITEMS_PER_REQUEST = 64
_TOKENS_PER_REQUEST = 32_768

_INDEX = re.compile(r"\bitems\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class TextPair:
    """An item in texts, and its place among the items."""

    index: int
    context: str
    # Context and continuation.
    whole: str


@dataclass(frozen=True, slots=True)
class ScorePart:
    """Some of the items, as one request."""

    request: scoring_pb2.ScoreRequest
    # The place of its first item among all items.
    first: int


def split_pairs(items: Sequence[ScoreItemLike]) -> list[TextPair]:
    """The items that are texts, each with the white space between context and continuation in the continuation.

    A token begins with its space, so that a context which ends with one would end inside of a token.

    Raises:
        TypeError: an item is neither a ScoreItem nor two texts.
        ValueError: a continuation is empty.

    >>> split_pairs([("The sky is ", "blue")])
    [TextPair(index=0, context='The sky is', whole='The sky is blue')]
    """
    pairs: list[TextPair] = []
    for index, item in enumerate(items):
        if isinstance(item, ScoreItem):
            continue
        context, continuation = _texts_of(item, index)
        if not continuation:
            raise ValueError(f"items[{index}]: the continuation is empty")
        pairs.append(TextPair(index, context.rstrip(), context + continuation))
    return pairs


def _texts_of(item: object, index: int) -> tuple[str, str]:
    match item:
        case (str(context), str(continuation)):
            return context, continuation
        case _:
            raise TypeError(f"items[{index}]: give a ScoreItem or the texts (context, continuation), not {item!r:.80}")


def texts_of(pairs: Sequence[TextPair]) -> list[str]:
    """Every text that must be tokenized, once."""
    return list(dict.fromkeys(text for pair in pairs for text in (pair.context, pair.whole)))


def token_items(
    items: Sequence[ScoreItemLike], pairs: Sequence[TextPair], ids: Mapping[str, tuple[int, ...]], *, end_of_text: int
) -> list[ScoreItem]:
    """All items as token ids; `ids` are those of each text. An empty context is `end_of_text`.

    Raises:
        ValueError: a continuation has no token of its own: it ends inside of the context's last one.
    """
    whole: dict[int, ScoreItemLike] = dict(enumerate(items))
    for pair in pairs:
        context_length, token_ids = len(ids[pair.context]), ids[pair.whole]
        if not pair.context:
            context_length, token_ids = 1, (end_of_text, *token_ids)
        if context_length >= len(token_ids):
            raise ValueError(
                f"items[{pair.index}]: the continuation has no token of its own, {items[pair.index]!r:.200}"
            )
        whole[pair.index] = ScoreItem(token_ids, context_length)
    return [item for item in whole.values() if isinstance(item, ScoreItem)]


def split_requests(items: Sequence[ScoreItem], *, model: str, token_logprobs: bool) -> list[ScorePart]:
    """Requests that hold all the items, in order, each with an id of its own.

    Raises:
        ValueError: a value no request can carry, or an item without context or continuation.
    """
    for index, item in enumerate(items):
        if not 1 <= item.context_length < len(item.token_ids):
            raise ValueError(
                f"items[{index}]: context_length must be at least 1 and less than all its {len(item.token_ids)} ids,"
                f" is {item.context_length}"
            )
    parts: list[ScorePart] = []
    for part in batches(
        items, [len(item.token_ids) for item in items], most=_ITEMS_PER_REQUEST, most_cost=_TOKENS_PER_REQUEST
    ):
        request = scoring_pb2.ScoreRequest(
            model=model, items=map(_item_proto, part), token_logprobs=token_logprobs, request_id=new_request_id()
        )
        parts.append(ScorePart(request, parts[-1].first + len(parts[-1].request.items) if parts else 0))
    return parts


@contextmanager
def told_of_all_items(part: ScorePart) -> Generator[None]:
    """What is told inside of the request's items is told of their places among all items."""

    def moved(text: str) -> str:
        return _INDEX.sub(lambda match: f"items[{part.first + int(match[1])}]", text)

    try:
        yield
    except APIError as error:
        error.message = moved(error.message)
        error.field_violations = tuple(
            FieldViolation(moved(each.field), moved(each.description)) for each in error.field_violations
        )
        raise


def scores_from(response: scoring_pb2.ScoreResponse, request: scoring_pb2.ScoreRequest) -> list[ItemScore]:
    """The scores of a request's items, in order."""
    if len(response.scores) != len(request.items):
        raise ProtocolError(f"{len(request.items)} items were answered with {len(response.scores)} scores")
    return [ItemScore(each.logprob, each.is_greedy, tuple(each.token_logprobs)) for each in response.scores]


def _item_proto(item: ScoreItem) -> scoring_pb2.ScoreItem:
    return scoring_pb2.ScoreItem(token_ids=item.token_ids, context_length=item.context_length)
