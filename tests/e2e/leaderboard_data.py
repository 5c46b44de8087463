"""Small data sets in the formats of the Open LLM Leaderboard's, found by their names from the folder they lie in."""

import json
import random
from pathlib import Path
from typing import Any

__all__ = ["write_leaderboard_data"]

_ANIMALS = ("owl", "fox", "whale", "bee", "horse", "spider", "crow", "shark", "goat", "newt")
_PLACES = ("forest", "sea", "desert", "city", "river", "field")
_LETTERS = ("A", "B", "C", "D")

Row = dict[str, Any]


def write_leaderboard_data(folder: Path, *, num_documents: int = 4) -> None:
    """A data set of each kind but MMLU's in `folder`: `num_documents` to evaluate, and 30 to draw shots from."""
    draw = random.Random(7)

    def rows(make: Any, number: int) -> list[Row]:
        return [make(draw, index) for index in range(number)]

    shots, few = 30, num_documents
    _write(folder / "allenai/ai2_arc", {"ARC-Challenge": {"train": rows(_arc, shots), "test": rows(_arc, few)}})
    hellaswag = {"train": rows(_hellaswag, shots), "validation": rows(_hellaswag, few)}
    _write(folder / "Rowan/hellaswag", {"default": hellaswag})
    truthfulqa = {"multiple_choice": {"validation": rows(_truthfulqa, few)}}
    _write(folder / "truthfulqa/truthful_qa", truthfulqa)
    winogrande = {"train": rows(_winogrande, shots), "validation": rows(_winogrande, few)}
    _write(folder / "allenai/winogrande", {"winogrande_xl": winogrande})
    _write(folder / "openai/gsm8k", {"main": {"train": rows(_gsm8k, shots), "test": rows(_gsm8k, few)}})


def _write(folder: Path, configs: dict[str, dict[str, list[Row]]]) -> None:
    """The rows as JSON lines, and the card that tells the data sets library which file is which split."""
    card = ["---", "configs:"]
    for config, splits in configs.items():
        card += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            path = folder / config / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            card += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))


def _arc(draw: random.Random, index: int) -> Row:
    animal, answers = draw.choice(_ANIMALS), draw.sample(_PLACES, 4)
    return {
        "id": str(index),
        "question": f"Where does the {animal} with number {index} live?",
        "choices": {"text": [f"in the {place}" for place in answers], "label": list(_LETTERS)},
        "answerKey": draw.choice(_LETTERS),
    }


def _hellaswag(draw: random.Random, index: int) -> Row:
    animal = draw.choice(_ANIMALS)
    return {
        "ind": index,
        "activity_label": "Watching animals",
        "ctx_a": f"A {animal} sits near the {draw.choice(_PLACES)}.",
        "ctx_b": "it",
        "endings": [f"goes to the {place} [title] and sleeps there." for place in draw.sample(_PLACES, 4)],
        "label": str(draw.randrange(4)),
    }


def _truthfulqa(draw: random.Random, index: int) -> Row:
    choices = [f"The {animal} lives in the {draw.choice(_PLACES)}." for animal in draw.sample(_ANIMALS, 3 + index % 3)]
    labels = [1] + [draw.randrange(2) for _ in choices[2:]] + [0]
    return {
        "question": f"Who lives in the {draw.choice(_PLACES)}?",
        "mc1_targets": {"choices": choices, "labels": [1] + [0] * (len(choices) - 1)},
        "mc2_targets": {"choices": choices, "labels": labels},
    }


def _winogrande(draw: random.Random, index: int) -> Row:
    first, second = draw.sample(_ANIMALS, 2)
    return {
        "sentence": f"The {first} ran from the {second} because the _ was hungry.",
        "option1": first,
        "option2": second,
        "answer": draw.choice(("1", "2")),
    }


def _gsm8k(draw: random.Random, index: int) -> Row:
    first, second = draw.randrange(2, 9), draw.randrange(2, 9)
    return {
        "question": f"A {draw.choice(_ANIMALS)} has {first} nuts and finds {second} more. How many has it?",
        "answer": f"It has {first} + {second} = {first + second} nuts.\n#### {first + second}",
    }
