"""Open Assistant's message trees become threads: conversations that end with the assistant's turn.

A line of an export is a tree whose nodes are messages and whose children are replies:

    prompter: "Why is the sky blue?"
    ├── assistant: "Because of ..."          thread 1 ends here
    └── assistant: "Sunlight is ..."
        ├── prompter: "And at sunset?"
        │   └── assistant: "Then the ..."    thread 2 ends here
        └── prompter: "Thanks!"              nobody answered: no thread of its own

A leaf that is a prompter's makes a thread up to the message before it, but only if it is that message's first reply:
otherwise the message belongs to its first reply's threads already, or would be repeated.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal

from oasst.prompt import Speaker, Turn, check_turns
from pydantic import BaseModel

from oasst_training.errors import DataError
from oasst_training.json_lines import numbered_lines

__all__ = ["MessageNode", "MessageTree", "Thread", "read_threads", "threads_of"]

# The turns of one conversation, from a prompter's first to an assistant's last.
Thread = tuple[Turn, ...]

_SPEAKERS = {"prompter": Speaker.PROMPTER, "assistant": Speaker.ASSISTANT}


class MessageNode(BaseModel):
    """A message and its replies. Keys of an export that training does not need are not kept."""

    text: str
    role: Literal["prompter", "assistant"]
    lang: str | None = None
    review_result: bool | None = None
    deleted: bool = False
    synthetic: bool = False
    replies: list["MessageNode"] = []


class MessageTree(BaseModel):
    """A prompt and everything that was said to it."""

    tree_state: str
    prompt: MessageNode

    def is_ready(self, languages: Collection[str]) -> bool:
        """Whether it was finished and accepted, and is in one of these languages."""
        return (
            self.tree_state == "ready_for_export"
            and self.prompt.review_result is True
            and self.prompt.lang in languages
        )


def read_threads(path: Path, languages: Collection[str]) -> Iterator[list[Thread]]:
    """The threads of each tree that is ready, tree by tree. The file is gzipped if its name ends in `.gz`.

    Raises:
        DataError: naming the file and the line that is not a tree.
    """
    for number, line in numbered_lines(path):
        try:
            tree = MessageTree.model_validate_json(line)
            if tree.is_ready(languages):
                yield threads_of(tree)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not a message tree: {error}") from error


def threads_of(tree: MessageTree) -> list[Thread]:
    """The tree's threads, depth first, without those that hold a deleted or synthetic message.

    Raises:
        TurnOrderError: if prompter and assistant do not take turns.
    """
    return [_as_turns(nodes) for nodes in _leaf_threads([tree.prompt]) if _is_human(nodes)]


def _leaf_threads(nodes: list[MessageNode]) -> Iterator[list[MessageNode]]:
    """The ways from the end of `nodes` down to those leaves that make threads."""
    for index, reply in enumerate(nodes[-1].replies):
        if reply.replies:
            yield from _leaf_threads([*nodes, reply])
        elif reply.role == "assistant" or index == 0:
            yield [*nodes, reply]


def _is_human(nodes: list[MessageNode]) -> bool:
    return not any(node.deleted or node.synthetic for node in nodes)


def _as_turns(nodes: list[MessageNode]) -> Thread:
    """The messages up to the assistant's last."""
    turns = tuple(Turn(_SPEAKERS[node.role], node.text) for node in nodes)
    if turns[-1].speaker is Speaker.PROMPTER:
        turns = turns[:-1]
    check_turns(turns[:-1])
    return turns
