"""The lm-evaluation-harness's model `oasst-grpc`: a running service, asked through the SDK."""

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice, repeat
from typing import Any, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from oasst_client import ChatOptions, Client, CompletionStream, Priority, ScoreItem, render_transcript
from tqdm import tqdm

from oasst_cli.eval.errors import TaskError
from oasst_cli.options import connected

__all__ = ["OasstLM"]

T = TypeVar("T")

# An item as the harness passes it on: its texts, if it has any; context; continuation, both as token ids.
TokenRequest = tuple[tuple[str, str] | None, Sequence[int], Sequence[int]]

# Requests that are read, tokenized and scored before the next ones are looked at: what a crash loses of a run that is
# cached, and what is held in memory. The worker idles between two of them for as long as tokenizing takes.
_REQUESTS_AT_A_TIME = 2048

# What a task may ask of how tokens are drawn: the same names on both sides.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "seed")


@register_model("oasst-grpc")
class OasstLM(TemplateLM):  # type: ignore[misc]  # The harness has no types.
    """A model behind a gateway. Log-likelihoods are those of the harness's own `hf` model on the same checkpoint.

    Everything it asks for waits behind chats.

    Args:
        address: `host:port` of the gateway; without it, that of the profile or the environment.
        profile: a profile of the profile file: address, key and TLS.
        model: a served model's name; left out, the service's only one.
        max_length: the most tokens that are fed, at most the model's positions; longer contexts lose their beginning.
        max_gen_toks: the longest answer, in tokens, where a task names none.
        num_concurrent: generations under way at a time.
        batch_size, max_batch_size, device: given by the harness to every model; here the service decides.

    Raises:
        APIError: the service cannot be reached, or refuses.
        ValueError: `max_length` is more than the model has.
    """

    def __init__(
        self,
        address: str | None = None,
        profile: str | None = None,
        model: str = "",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        num_concurrent: int = 32,
        batch_size: object = None,
        max_batch_size: object = None,
        device: object = None,
    ) -> None:
        super().__init__()
        self._client: Client = connected(address, profile)
        self._model = self._client.model(model)
        self._max_length = int(max_length or self._model.max_positions)
        if self._max_length > self._model.max_positions:
            raise ValueError(f"max_length must be at most the model's {self._model.max_positions} positions")
        self._max_gen_toks = int(max_gen_toks)
        self._num_concurrent = int(num_concurrent)

    # ------------------------------------------------------------------------------------- what the harness looks up

    @property
    def eot_token_id(self) -> int:
        return self._model.control_tokens.end_of_text

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """Names prompts in the harness's cache of requests."""
        return f"oasst-grpc--{self._model.name}".replace("/", "__")

    @property
    def model_name(self) -> str:
        return self._model.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """The ids of a text; as with transformers' tokenizer, control tokens spelled out in it are control tokens.

        This model has no tokens to add.
        """
        return list(self._encode([string])[0])

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The OASST format, which `apply_chat_template` applies by itself."""
        return "oasst" if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The turns as OASST text, open for the assistant: either for a new turn, or for more of its last one.

        Raises:
            ValueError: a message spells out a control token, or a system message is not the first.
        """
        if add_generation_prompt:
            return render_transcript(chat_history) + "<|assistant|>"
        return render_transcript(chat_history).removesuffix("<|endoftext|>")

    # ------------------------------------------------------------------------------------------------------- scoring

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether it is what greedy decoding would give) of each (context, continuation)."""
        scores = []
        with tqdm(total=len(requests), desc="Scoring", disable=disable_tqdm) as bar:
            for part in _parts(requests):
                pairs = [request.args for request in part]
                scores += self._scored(self._encode_pairs(pairs), bar)
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows of the longest length; each token is predicted once."""
        texts = [request.args[0] for request in requests]
        windows: list[TokenRequest] = []
        num_windows = []
        for ids in self._encode(texts):
            rolled = get_rolling_token_windows(
                token_list=list(ids), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            own: list[TokenRequest] = [(None, *make_disjoint_window(window)) for window in rolled]
            windows += own
            num_windows.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        sums = [sum(logprob for logprob, _ in islice(scores, number)) for number in num_windows]
        for text, total in zip(texts, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        with tqdm(total=len(requests), desc="Scoring", disable=disable_tqdm) as bar:
            return self._scored(requests, bar)

    def _scored(self, requests: Sequence[TokenRequest], bar: "tqdm[Any]") -> list[tuple[float, bool]]:
        num_before = bar.n
        items = [self._item(*request) for request in requests]
        scores = self._client.score(
            items, model=self._model.name, on_progress=lambda number: bar.update(num_before + number - bar.n)
        )
        answers = [(score.logprob, score.is_greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _item(self, texts: tuple[str, str] | None, context: Sequence[int], continuation: Sequence[int]) -> ScoreItem:
        """The last tokens that fit: one more than are fed, for the last one is only predicted."""
        if not continuation:
            raise TaskError(f"a continuation has no token of its own: {texts!r:.200}")
        if len(continuation) > self.max_length:
            raise TaskError(f"a continuation has {len(continuation)} tokens, more than max_length={self.max_length}")
        num_kept = min(len(context), self.max_length + 1 - len(continuation))
        kept = context[len(context) - num_kept :]
        return ScoreItem((*kept, *continuation), num_kept)

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[TokenRequest]:
        """As the harness encodes pairs one by one; here every text once.

        Not as `Client.score` does: a context's last token stays its own, even where the whole text has another there.
        """
        contexts = [context.rstrip() for context, _ in pairs]
        texts = dict.fromkeys([*contexts, *(context + continuation for context, continuation in pairs)])
        ids = dict(zip(texts, self._encode(list(texts)), strict=True))
        requests: list[TokenRequest] = []
        for (context, continuation), bare in zip(pairs, contexts, strict=True):
            before, whole = ids[bare], ids[context + continuation]
            if not bare:
                # A continuation that begins with the prefix token brings its own context.
                before = (self.prefix_token_id,)
                whole = whole if whole[:1] == before else (*before, *whole)
            requests.append(((context, continuation), before, whole[len(before) :]))
        return requests

    def _encode(self, texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        return self._client.tokenize(*texts, model=self._model.name, parse_control_tokens=True)

    # ---------------------------------------------------------------------------------------------------- generating

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model goes on with after each context, up to a stop text; greedily unless a task says otherwise.

        Raises:
            APIError: a request was refused or failed; the others are cancelled then.
            TaskError: a task asks for what the service does not have, or does not allow.
        """
        contexts = [request.args[0] for request in requests]
        options = [self._chat_options(request.args[1]) for request in requests]
        streams: set[CompletionStream] = set()
        given_up = threading.Event()

        def generate(token_ids: Sequence[int], options: ChatOptions) -> str:
            with self._client.stream(token_ids=token_ids, **options) as stream:
                streams.add(stream)
                if given_up.is_set():
                    stream.close()  # It came too late to be closed with the others.
                try:
                    return stream.completion().text
                finally:
                    streams.discard(stream)

        with (
            tqdm(total=len(requests), desc="Generating", disable=disable_tqdm) as bar,
            ThreadPoolExecutor(self._num_concurrent, thread_name_prefix="generate") as pool,
        ):
            prompts = list(map(self._prompt, self._encode(contexts), options))
            under_way = dict(zip(map(pool.submit, repeat(generate), prompts, options), requests, strict=True))
            try:
                for future in as_completed(under_way):
                    self.cache_hook.add_partial("generate_until", under_way[future].args, future.result())
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                given_up.set()
                for stream in tuple(streams):
                    stream.close()
                raise
        return [future.result() for future in under_way]

    def _chat_options(self, wanted: Mapping[str, Any]) -> ChatOptions:
        """The options of the call that does what a task's `generation_kwargs` ask for."""
        wanted = normalize_gen_kwargs(dict(wanted), self.max_gen_toks)
        unknown = wanted.keys() - {*_SAMPLING, "until", "max_gen_toks", "do_sample"}
        if unknown:
            raise TaskError(f"generation_kwargs: {', '.join(sorted(unknown))} cannot be had from the service")
        limit = min(self._model.max_new_tokens, self.max_length - 1)
        if not 1 <= wanted["max_gen_toks"] <= limit:
            raise TaskError(f"max_gen_toks must be from 1 to {limit}, is {wanted['max_gen_toks']}")
        options: ChatOptions = {
            "model": self._model.name,
            "temperature": 0.0,
            "stop": [text for text in wanted["until"] if text],
            "max_new_tokens": wanted["max_gen_toks"],
            "priority": Priority.BULK,
        }
        if wanted["do_sample"]:
            drawn: Any = {name: wanted[name] for name in _SAMPLING if name in wanted}
            options.update(drawn)
        return options

    def _prompt(self, token_ids: Sequence[int], options: ChatOptions) -> Sequence[int]:
        """The last tokens that leave room for the answer."""
        kept = token_ids[-(self.max_length - options["max_new_tokens"]) :]
        if len(kept) > self._model.max_prompt_tokens:
            raise TaskError(
                f"a prompt has {len(kept)} tokens, and the service takes {self._model.max_prompt_tokens}:"
                " raise --max-prompt-tokens of its gateway"
            )
        return kept or [self.prefix_token_id]


def _parts(values: Sequence[T]) -> Iterable[Sequence[T]]:
    return (values[start : start + _REQUESTS_AT_A_TIME] for start in range(0, len(values), _REQUESTS_AT_A_TIME))
