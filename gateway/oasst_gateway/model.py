"""The model this gateway serves: its name, its limits and its tokenizer, read from a checkpoint's files."""

import json
from dataclasses import dataclass
from pathlib import Path

from oasst.presets import PRESETS
from oasst.prompt import ControlToken
from oasst.v1 import model_pb2

from oasst_gateway.errors import StartError
from oasst_gateway.presets import preset_params
from oasst_gateway.tokenizer import ModelTokenizer

__all__ = ["ModelLimits", "ServedModel", "load_model"]

_FILES = ["config.json", "tokenizer.json"]


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a request may ask of the model."""

    vocab_size: int  # Rows of the output layer.
    tokenizer_size: int  # Ids from here on are padding rows.
    max_positions: int  # Prompt and generated tokens together.
    max_prompt_tokens: int
    max_new_tokens: int
    max_choices: int
    longest_token: int  # In characters.

    @property
    def max_prompt_chars(self) -> int:
        """No text longer than this fits, whatever it says: known without tokenizing it."""
        return self.max_prompt_tokens * self.longest_token


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model by its name."""

    name: str
    limits: ModelLimits
    tokenizer: ModelTokenizer

    def to_proto(self) -> model_pb2.Model:
        """The model as ListModels tells it."""
        control_ids = self.tokenizer.control_ids
        return model_pb2.Model(
            name=self.name,
            vocab_size=self.limits.vocab_size,
            tokenizer_size=self.limits.tokenizer_size,
            max_positions=self.limits.max_positions,
            max_prompt_tokens=self.limits.max_prompt_tokens,
            max_new_tokens=self.limits.max_new_tokens,
            max_choices=self.limits.max_choices,
            control_tokens=model_pb2.ControlTokens(
                prompter=control_ids[ControlToken.PROMPTER],
                assistant=control_ids[ControlToken.ASSISTANT],
                end_of_text=control_ids[ControlToken.END_OF_TEXT],
                system=control_ids.get(ControlToken.SYSTEM),
                prefix_begin=control_ids.get(ControlToken.PREFIX_BEGIN),
                prefix_end=control_ids.get(ControlToken.PREFIX_END),
                padding=control_ids.get(ControlToken.PADDING),
            ),
            presets=[preset_params(name) for name in PRESETS],
        )


def load_model(
    path_or_id: str,
    *,
    name: str | None,
    max_prompt_tokens: int | None,
    max_new_tokens: int | None,
    max_choices: int,
) -> ServedModel:
    """The model of a local folder or a hub id; only its config and tokenizer are read, never its weights.

    Without a name it is called by its hub id or its folder's name. Limits not given are what the positions allow.

    Raises:
        StartError: if a file is missing or wrong.
    """
    folder = _find_folder(path_or_id)
    tokenizer = ModelTokenizer.from_folder(folder)
    vocab_size, max_positions = _read_config(folder / "config.json")
    if tokenizer.size > vocab_size:
        raise StartError(f"{folder}: the tokenizer has {tokenizer.size} ids, the model only {vocab_size} rows")
    most_tokens = max_positions - 1  # At least one token of prompt beside those generated, and the other way round.
    return ServedModel(
        name=name or (folder.name if Path(path_or_id).is_dir() else path_or_id),
        limits=ModelLimits(
            vocab_size=vocab_size,
            tokenizer_size=tokenizer.size,
            max_positions=max_positions,
            max_prompt_tokens=min(max_prompt_tokens or most_tokens, most_tokens),
            max_new_tokens=min(max_new_tokens or most_tokens, most_tokens),
            max_choices=max_choices,
            longest_token=tokenizer.longest_token,
        ),
        tokenizer=tokenizer,
    )


def _find_folder(path_or_id: str) -> Path:
    if Path(path_or_id).is_dir():
        return Path(path_or_id).resolve()
    # Imported only for a hub id: it takes as long to load as the rest of the gateway.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(path_or_id, allow_patterns=_FILES))
    except HFValidationError as error:
        raise StartError(f"--model {path_or_id} is neither a folder nor a hub id") from error
    except (OSError, ValueError) as error:  # The hub's own errors are kinds of these.
        reason = str(error).strip().splitlines()[0]
        raise StartError(f"--model {path_or_id} is no folder and cannot be had from the hub: {reason}") from error


def _read_config(path: Path) -> tuple[int, int]:
    """Rows of the output layer, and positions."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return int(config["vocab_size"]), int(config["max_position_embeddings"])
    except (OSError, ValueError, TypeError) as error:
        raise StartError(f"cannot read {path}: {error}") from error
    except KeyError as error:
        raise StartError(f"{path} lacks {error}") from error
