"""The recipe of a training run: the keys of Open-Assistant's `config.yaml`, read from named blocks of such a file.

    recipe = load_recipe(Path("config.yaml"), ["defaults", "reference-data", "reference-pythia-12b"])

Later blocks overrule earlier ones key by key, and overrides given as `KEY=VALUE` overrule them all. A key that is not
in the list below is refused, and so is a value that would ask for something this recipe does not do.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from oasst_training.errors import RecipeError

__all__ = [
    "AlpacaSpec",
    "DataSetSpec",
    "DialoguesSpec",
    "OasstExportSpec",
    "Precision",
    "Recipe",
    "find_file",
    "load_recipe",
]

Precision = Literal["fp16", "bf16", "fp32"]
Share = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class OasstExportSpec(_Strict):
    """Message trees as Open Assistant exports them: JSON lines, gzipped if the name ends in `.gz`."""

    name: Literal["oasst_export"] = "oasst_export"
    input_file_path: Path
    lang: str = "en"  # Codes separated by commas. A tree counts by its prompt's language.
    val_split: Share = 0.2  # Of the trees.


class AlpacaSpec(_Strict):
    """Instructions: objects with `instruction`, `input` and `output`, as JSON lines or one JSON list."""

    name: Literal["alpaca"] = "alpaca"
    input_file_path: Path | None = None  # None: yahma/alpaca-cleaned from the hub.
    val_split: Share = 0.2


class DialoguesSpec(_Strict):
    """Chats drawn at random from dialogues in many wordings: what the demo model learns."""

    name: Literal["dialogues"] = "dialogues"
    input_file_path: Path
    num_chats: Annotated[int, Field(gt=0)]
    # Each chat draws one of these: the tokens it has at least. 0 gives one dialogue.
    chat_lengths: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    casual_probability: Probability = 0.25
    val_split: Share = 0.0


DataSetSpec = Annotated[OasstExportSpec | AlpacaSpec | DialoguesSpec, Field(discriminator="name")]


class Recipe(_Strict):
    """Every key of a recipe. The values here are those of the original's `defaults` block."""

    # What is trained on what.
    model_name: str  # A folder, or an id on the hub, with a GPT-NeoX checkpoint.
    datasets: tuple[DataSetSpec, ...]
    output_dir: Path = Path("saved_model")
    cache_dir: Path = Path(".cache")  # Downloads, and the second place where data files are looked for.

    # How much of it, in which order.
    rng_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0xA1221F97
    num_train_epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3
    per_device_train_batch_size: Annotated[int, Field(gt=0)] = 2
    gradient_accumulation_steps: Annotated[int, Field(gt=0)] = 32
    sort_by_length: bool = False  # Samples of a micro batch are then about equally long.

    # The samples.
    max_length: Annotated[int, Field(gt=1)] = 512
    random_offset_probability: Probability = 0.8
    label_masking: bool = True  # False: the prompters' words count too.

    # The optimizer. The rate rises with the logarithm of the step, then falls in a line to nothing.
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-5
    warmup_steps: Annotated[int, Field(ge=0)] = 600
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-12
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 2.0

    # The model while it trains.
    dtype: Precision = "fp16"
    residual_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    fuse_gelu: bool = True  # The tanh approximation of GELU; the exported model keeps its own.
    gradient_checkpointing: bool = False
    deepspeed_config: Path | None = None  # Used with --deepspeed only.

    # What is reported and kept on the way.
    logging_steps: Annotated[int, Field(gt=0)] = 10
    eval_steps: Annotated[int, Field(gt=0)] = 200
    eval_size: Annotated[int, Field(gt=0)] | None = None  # Of each data set; None: all of it.
    per_device_eval_batch_size: Annotated[int, Field(gt=0)] = 2
    save_steps: Annotated[int, Field(gt=0)] = 1000
    save_total_limit: Annotated[int, Field(gt=0)] | None = 4

    # Not in the original.
    export_dtype: Precision = "fp16"
    num_threads: Annotated[int, Field(gt=0)] | None = None  # Sums depend on it: the same bits need the same number.

    # Keys of the original for what this recipe does not do: they are taken at the value that asks for nothing.
    loss_fn: Literal["CrossEntropyLoss"] = "CrossEntropyLoss"
    freeze_layer: None = None
    quantization: Literal[False] = False
    seq2seqmodel: Literal[False] = False
    samples_mixing: Literal[False] = False
    use_custom_sampler: Literal[False] = False
    use_system_prefix: Literal[False] = False
    per_digit_tokens: Literal[False] = False
    is_reward_model: Literal[False] = False

    # Keys of the original that change nothing here, whatever they say.
    datasets_extra: tuple[()] = ()  # Joined to `datasets` before the rest is looked at.
    eval_accumulation_steps: int | None = None  # Evaluation keeps sums, never logits.
    log_dir: str = "base"  # The loss curve stands in `output_dir`.
    log_wandb: bool = False  # Nothing is sent anywhere.
    poly_eps: float = 1.0  # Belongs to another loss.
    system_prefix: str = ""  # Belongs to use_system_prefix.
    use_flash_attention: bool = False  # PyTorch chooses the kernel; all of them compute the same attention.
    verbose: bool = False

    @model_validator(mode="before")
    @classmethod
    def _join_extra_datasets(cls, keys: Any) -> Any:
        """`datasets_extra` is how a block adds data sets to those of an earlier one: YAML cannot extend a list."""
        extra = keys.get("datasets_extra")
        if not extra or not isinstance(extra, list):
            return keys
        own = keys.get("datasets", [])
        joined = [*own, *extra] if isinstance(own, list) else own  # Which is then refused.
        return {**keys, "datasets": joined, "datasets_extra": ()}

    @field_validator("datasets", mode="before")
    @classmethod
    def _name_datasets(cls, entries: Any) -> Any:
        return [_named(entry) for entry in entries] if isinstance(entries, list) else entries


def load_recipe(path: Path, blocks: Sequence[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that these blocks of the file make together, the later ones overruling.

    Raises:
        RecipeError: naming the file, block or key that is wrong.
    """
    file = _read_blocks(path)
    keys: dict[str, Any] = {}
    for name in blocks:
        if not isinstance(file.get(name), Mapping):
            raise RecipeError(f"{path} has no block {name!r}; it has {', '.join(map(str, file))}")
        _refuse_unknown_keys(file[name], where=f"block {name!r} of {path}")
        keys.update(file[name])
    for override in overrides:
        keys |= _parse_override(override)
    _refuse_unknown_keys(keys, where="the overrides")
    try:
        return Recipe.model_validate(keys)
    except ValidationError as error:
        raise RecipeError("; ".join(map(_explain, error.errors()))) from error


def find_file(path: Path, folders: Sequence[Path], *, key: str) -> Path:
    """The file, in the first of these folders that has it, unless its path is absolute.

    Raises:
        RecipeError: none has it; names the recipe's key.
    """
    for folder in folders:
        if (folder / path).is_file():
            return folder / path
    raise RecipeError(f"{key}: there is no file {path} in {' or '.join(map(str, folders))}")


def _read_blocks(path: Path) -> Mapping[str, Any]:
    try:
        file = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(file, Mapping):
        raise RecipeError(f"{path} must hold named blocks of keys")
    return file


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, value = override.partition("=")
    if not equals:
        raise RecipeError(f"{override!r} must have the form KEY=VALUE")
    try:
        return {key: yaml.safe_load(value)}
    except yaml.YAMLError as error:
        raise RecipeError(f"{key}: {value!r} is not a YAML value") from error


def _refuse_unknown_keys(keys: Mapping[str, Any], *, where: str) -> None:
    unknown = [str(key) for key in keys if key not in Recipe.model_fields]
    if unknown:
        raise RecipeError(f"{where}: unknown key {', '.join(unknown)}")


def _named(entry: Any) -> Any:
    """A data set as the file has it, `alpaca` or `alpaca: {val_split: 0.1}`, with its name among its options."""
    match entry:
        case str():
            return {"name": entry}
        case dict() if len(entry) == 1:
            [(name, options)] = entry.items()
            if not isinstance(options, dict | None):
                raise PydanticCustomError("options", "the options of {name} must be keys with values", {"name": name})
            return {**(options or {}), "name": name}
        case _:
            return entry


def _explain(error: ErrorDetails) -> str:
    """One line for one of pydantic's errors, with the path of keys in front."""
    where = ".".join(map(str, error["loc"]))
    match error["type"]:
        case "missing":
            return f"{where}: is missing"
        case "extra_forbidden":
            return f"{where}: unknown key"
        case "union_tag_invalid":
            context = error["ctx"]
            return f"{where}: unknown data set {context['tag']!r}; known are {context['expected_tags']}"
        case _:
            return f"{where}: {error['msg']}, not {error['input']!r}"
