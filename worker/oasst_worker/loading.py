"""From the options to a model that can generate: checkpoint, engine, and what turns jobs into sequences."""

import logging
import time
from contextlib import ExitStack, closing
from pathlib import Path

from oasst.prompt import ControlToken
from tokenizers import Tokenizer

from oasst_worker.detokenizer import Detokenizer, UnsupportedTokenizerError
from oasst_worker.engine import Engine, EngineConfig, StepBudgetError, check_budget
from oasst_worker.intake import Intake, ModelFacts
from oasst_worker.model.config import CheckpointError, NeoXConfig, load_config
from oasst_worker.model.conversion import convert_bin
from oasst_worker.model.shards import find_shards, resolve_checkpoint
from oasst_worker.progress import LoadingProgress
from oasst_worker.runtime import (
    ModelRunner,
    RuntimeOptions,
    UnsupportedOptionError,
    build_executor,
    least_prefill_tile,
)
from oasst_worker.runtime.ranks import RankProcesses
from oasst_worker.served_model import ServedModel
from oasst_worker.settings import StartError, WorkerSettings, parse_device_memory

__all__ = ["load_model"]

logger = logging.getLogger(__name__)

# Tokens guessed ahead at most, where rows of a step are known not to change each other.
_CPU_SPECULATION = 8


def load_model(settings: WorkerSettings) -> ServedModel:
    """The checkpoint is in memory and computes.

    Raises:
        StartError: if it cannot be served, or an option does not fit it or this machine.
    """
    try:
        return _load_model(settings)
    except (CheckpointError, UnsupportedOptionError, StepBudgetError) as error:
        raise StartError(str(error)) from error


def _load_model(settings: WorkerSettings) -> ServedModel:
    started_s = time.monotonic()
    logger.info("loading checkpoint model=%s", settings.model)
    options = _runtime_options(settings)
    _check_budget(settings, options)
    folder = resolve_checkpoint(settings.model)
    config = load_config(folder)
    tokenizer = _load_tokenizer(folder, config)
    detokenizer = _make_detokenizer(tokenizer, folder)
    weights_folder = _find_weights(folder, settings.convert_bin)
    banned_token_ids = _banned_token_ids(tokenizer, config)
    engine, ranks = _build_engine(weights_folder, config, settings, options, banned_token_ids=banned_token_ids)
    facts = ModelFacts(
        vocab_size=config.vocab_size,
        max_positions=config.max_positions,
        kv_tokens=engine.kv_tokens_total,
        eos_token_id=config.eos_token_id,
    )
    name = settings.model_name or _name_of(settings.model)
    logger.info(
        "model loaded name=%s seconds=%.1f kv_tokens=%d max_sequences=%d",
        name,
        time.monotonic() - started_s,
        engine.kv_tokens_total,
        engine.max_sequences,
    )
    return ServedModel(name, engine, Intake(detokenizer, facts), ranks)


def _find_weights(folder: Path, cache: Path | None) -> Path:
    """The folder to read the model from, which has safetensors if `cache` is given."""
    if cache is not None:
        return convert_bin(folder, cache.expanduser())
    if find_shards(folder)[0].suffix == ".bin":
        logger.warning("the weights are .bin files: with --convert-bin FOLDER they are kept as safetensors, once")
    return folder


def _runtime_options(settings: WorkerSettings) -> RuntimeOptions:
    return RuntimeOptions(
        device=settings.device,
        dtype=settings.dtype,
        kv_dtype=settings.kv_dtype,
        quantize=settings.quantize,
        batch_invariant=settings.batch_invariant,
        threads=settings.threads,
        kv_tokens=settings.kv_tokens,
        max_sequences=settings.max_sequences,
        split=settings.split,
        num_ranks=settings.num_ranks,
        device_memory=parse_device_memory(settings.device_memory),
        offload=settings.offload,
    )


def _check_budget(settings: WorkerSettings, options: RuntimeOptions) -> None:
    """The engine's own check, before minutes of loading: by the least that it will ask for."""
    check_budget(
        max_sequences=settings.max_sequences,
        step_tokens=settings.step_tokens,
        prefill_tile=least_prefill_tile(options),
    )


def _build_engine(
    folder: Path,
    config: NeoXConfig,
    settings: WorkerSettings,
    options: RuntimeOptions,
    *,
    banned_token_ids: frozenset[int],
) -> tuple[Engine, RankProcesses | None]:
    with closing(LoadingProgress()) as progress:
        executor = build_executor(folder, options, banned_token_ids=banned_token_ids, progress=progress)
    with ExitStack() as on_failure:
        if executor.ranks:
            on_failure.callback(executor.ranks.close)
        engine = Engine(
            executor,
            EngineConfig(
                eos_token_id=config.eos_token_id,
                max_positions=config.max_positions,
                max_sequences=settings.max_sequences,
                step_tokens=settings.step_tokens,
                speculate=_speculation(settings.speculate, executor),
            ),
        )
        on_failure.pop_all()
    return engine, executor.ranks


def _speculation(asked: int | None, executor: ModelRunner) -> int:
    """Tokens guessed ahead, at most: as asked for.

    Unset: none where a guess could change a token, and none on a GPU, where speculation has not been measured.
    """
    if asked is None:
        return _CPU_SPECULATION if executor.device.type == "cpu" and executor.is_row_exact else 0
    if asked and not executor.is_row_exact:
        logger.warning("rows are not exact here: tokens guessed ahead may change an answer speculate=%d", asked)
    return asked


def _name_of(path_or_id: str) -> str:
    """The hub id, or the folder's own name: what the gateway calls the model as well."""
    path = Path(path_or_id).expanduser()
    return path.resolve().name if path.is_dir() else path_or_id


def _load_tokenizer(folder: Path, config: NeoXConfig) -> Tokenizer:
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises a bare Exception for every fault in the file.
        raise CheckpointError(f"{path}: is missing or not a tokenizer: {error}.") from error
    if _size_of(tokenizer) > config.vocab_size:
        raise CheckpointError(f"{path}: has {_size_of(tokenizer)} ids; the model has only {config.vocab_size} rows.")
    end_of_text = tokenizer.token_to_id(ControlToken.END_OF_TEXT.value)
    if end_of_text != config.eos_token_id:
        raise CheckpointError(
            f"{path}: {ControlToken.END_OF_TEXT.value} has id {end_of_text}; config.json says {config.eos_token_id}."
        )
    return tokenizer


def _make_detokenizer(tokenizer: Tokenizer, folder: Path) -> Detokenizer:
    try:
        return Detokenizer(tokenizer)
    except UnsupportedTokenizerError as error:
        raise CheckpointError(f"{folder / 'tokenizer.json'}: {error}.") from error


def _banned_token_ids(tokenizer: Tokenizer, config: NeoXConfig) -> frozenset[int]:
    """Ids that are never drawn: control tokens other than end-of-text, and the padding rows of the vocabulary."""
    named = {tokenizer.token_to_id(token.value) for token in ControlToken} - {None}
    flagged = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    padding_rows = range(_size_of(tokenizer), config.vocab_size)
    return frozenset({*named, *flagged, *padding_rows} - {config.eos_token_id})


def _size_of(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
