"""From items to score to requests that a server takes, and back: pure, used by both shells."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from oasst.v1 import scoring_pb2

from oasst_client._batches import batches
from oasst_client._errors import ProtocolError
from oasst_client._request_id import new_request_id
from oasst_client._types import ItemScore, ScoreItem, ScoreItemLike

__all__ = [
    "REQUESTS_AT_ONCE",
    "TextPair",
    "scores_from",
    "split_pairs",
    "split_requests",
    "texts_of",
    "token_items",
]

# Requests of one call that are under way together: enough that a worker never waits for the next one.
REQUESTS_AT_ONCE = 4

# Of one request. Smaller than what a server takes: less is done again where one is lost.
_ITEMS_PER_REQUEST = 64
_TOKENS_PER_REQUEST = 32_768


@dataclass(frozen=True, slots=True)
class TextPair:
    """An item in texts, and its place among the items."""

    index: int
    context: str
    # Context and continuation.
    whole: str


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
    """Context and whole of each pair in turn."""
    return [text for pair in pairs for text in (pair.context, pair.whole)]


def token_items(
    items: Sequence[ScoreItemLike], pairs: Sequence[TextPair], ids: Iterable[Sequence[int]], *, end_of_text: int
) -> list[ScoreItem]:
    """All items as token ids; `ids` are those of each pair's context and whole. An empty context is `end_of_text`."""
    remaining_ids = iter(ids)
    whole: dict[int, ScoreItemLike] = dict(enumerate(items))
    for pair in pairs:
        context_ids, whole_ids = next(remaining_ids), next(remaining_ids)
        if pair.context:
            whole[pair.index] = ScoreItem(whole_ids, len(context_ids))
        else:
            whole[pair.index] = ScoreItem((end_of_text, *whole_ids), 1)
    return [item for item in whole.values() if isinstance(item, ScoreItem)]


def split_requests(items: Sequence[ScoreItem], *, model: str, token_logprobs: bool) -> list[scoring_pb2.ScoreRequest]:
    """Requests that hold all the items, in order, each with an id of its own.

    Raises:
        ValueError: a value no request can carry.
    """
    parts = batches(
        items, [len(item.token_ids) for item in items], most=_ITEMS_PER_REQUEST, most_cost=_TOKENS_PER_REQUEST
    )
    return [
        scoring_pb2.ScoreRequest(
            model=model,
            items=map(_item_proto, part),
            token_logprobs=token_logprobs,
            request_id=new_request_id(),
        )
        for part in parts
    ]


def scores_from(response: scoring_pb2.ScoreResponse, request: scoring_pb2.ScoreRequest) -> list[ItemScore]:
    """The scores of a request's items, in order."""
    if len(response.scores) != len(request.items):
        raise ProtocolError(f"{len(request.items)} items were answered with {len(response.scores)} scores")
    return [ItemScore(each.logprob, each.is_greedy, tuple(each.token_logprobs)) for each in response.scores]


def _item_proto(item: ScoreItem) -> scoring_pb2.ScoreItem:
    return scoring_pb2.ScoreItem(token_ids=item.token_ids, context_length=item.context_length)
