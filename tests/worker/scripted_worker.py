"""A worker's engine without tensors: every token is a function of its sequence's id and its place."""

import math
import threading
import zlib

from oasst.jobs.v1 import job_pb2
from oasst.v1 import generation_pb2
from oasst_jobs import JOB_VERSION, job_id_for
from oasst_worker.detokenizer import Detokenizer
from oasst_worker.engine import Batch, Engine, EngineConfig, Sample, Scores, Target, TargetScore, TokenLogprob
from oasst_worker.intake import Intake, ModelFacts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

__all__ = [
    "EOS",
    "MAX_POSITIONS",
    "MODEL",
    "VOCAB_SIZE",
    "ScriptedExecutor",
    "expected_text",
    "make_engine",
    "make_intake",
    "make_job",
    "scripted_score",
]

MODEL = "scripted"
EOS = 0
_FIRST_LETTER = 1
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
VOCAB_SIZE = 300
MAX_POSITIONS = 1024


def make_tokenizer() -> Tokenizer:
    """Byte-level: end-of-text is 0, the letters are 1 to 26, all other bytes follow."""
    others = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(_ALPHABET))
    tokens = ["<|endoftext|>", *_ALPHABET, *others]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def letter(sequence_id: str, index: int) -> str:
    return _ALPHABET[zlib.crc32(f"{sequence_id}:{index}".encode()) % len(_ALPHABET)]


def expected_text(job_id: str, num_tokens: int, choice: int = 0) -> str:
    """What a choice reads after so many tokens."""
    return "".join(letter(f"{job_id}/{choice}", index) for index in range(num_tokens))


def scripted_score(target: Target) -> TargetScore:
    """Greedy decoding gives even ids only."""
    return TargetScore(-target.token_id / (1 + target.position), target.token_id % 2 == 0)


class ScriptedExecutor:
    """Draws token i of a sequence as f(sequence id, i), unless a script says otherwise."""

    block_size = 16
    prefill_tile = 16
    is_position_exact = True

    def __init__(self, num_blocks: int = 256) -> None:
        self.num_blocks = num_blocks
        self.num_steps = 0
        self.scripts: dict[str, list[int]] = {}  # Sequence id -> its tokens, in place of the function's.
        self.broken: set[str] = set()  # Sequence ids whose logits are not finite.
        self.failure: Exception | None = None  # Ends the next step.
        self._allowed = math.inf
        self._gate = threading.Condition()

    def allow(self, num_steps: float) -> None:
        """So many more steps are taken; the next one waits inside `execute`."""
        with self._gate:
            self._allowed = num_steps
            self._gate.notify()

    def execute(self, batch: Batch) -> list[Sample | Scores]:
        with self._gate:
            self._gate.wait_for(lambda: self._allowed > 0)
            self._allowed -= 1
        if self.failure is not None:
            raise self.failure
        self.num_steps += 1
        results: list[Sample | Scores] = []
        for chunk in batch.chunks:
            results += [self._draw(chunk.sequence, number) for number in range(chunk.num_draws)]
            results += [self._score(chunk)] if chunk.targets else []
        return results

    def _score(self, chunk) -> Scores:
        is_broken = chunk.sequence.sequence_id in self.broken
        return Scores(None if is_broken else [scripted_score(target) for target in chunk.targets])

    def _draw(self, sequence, num_drafts: int) -> Sample:
        if sequence.sequence_id in self.broken:
            return Sample(None)
        index = sequence.num_output_tokens + num_drafts
        if sequence.sequence_id in self.scripts:
            token_id = self.scripts[sequence.sequence_id][index]
        else:
            token_id = _FIRST_LETTER + _ALPHABET.index(letter(sequence.sequence_id, index))
        return Sample(token_id, None if sequence.params.logprobs is None else TokenLogprob(-0.5, ((token_id, -0.5),)))


def make_engine(executor: ScriptedExecutor, **config) -> Engine:
    settings = {"eos_token_id": EOS, "max_positions": MAX_POSITIONS, "max_sequences": 8, "step_tokens": 64} | config
    return Engine(executor, EngineConfig(**settings), clock=lambda: 0.0)


def make_intake(kv_tokens: int = 4096) -> Intake:
    facts = ModelFacts(vocab_size=VOCAB_SIZE, max_positions=MAX_POSITIONS, kv_tokens=kv_tokens, eos_token_id=EOS)
    return Intake(Detokenizer(make_tokenizer()), facts)


def make_job(
    request_id: str, *, n: int = 1, prompt_tokens: int = 4, logprobs: int | None = None, **limits
) -> job_pb2.Job:
    """A valid job, every value set as the gateway sets it."""
    return job_pb2.Job(
        version=JOB_VERSION,
        job_id=job_id_for("tenant", request_id),
        tenant="tenant",
        model=MODEL,
        prompt_token_ids=[1] * prompt_tokens,
        sampling=generation_pb2.SamplingParams(
            repetition_penalty=1,
            presence_penalty=0,
            frequency_penalty=0,
            temperature=1,
            top_k=0,
            top_p=1,
            min_p=0,
            typical_p=1,
            seed=7,
        ),
        limits=generation_pb2.GenerationLimits(**({"max_new_tokens": 16} | limits)),
        n=n,
        logprobs=logprobs,
        request_id=request_id,
    )
