"""Log-likelihoods through client, gateway, queue and worker: those of transformers, whatever dies meanwhile."""

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oasst_cli.up.checkpoint import demo_checkpoint
from oasst_client import AsyncClient, InvalidArgumentError, ItemScore, ScoreItem
from transformers import GPTNeoXForCausalLM
from waiting import wait_until

LONGEST = 2049  # One more than the model has positions.


@pytest.fixture(scope="module")
def reference() -> GPTNeoXForCausalLM:
    return GPTNeoXForCausalLM.from_pretrained(demo_checkpoint(), dtype=torch.float32).eval()


@torch.inference_mode()
def scored_by(model: GPTNeoXForCausalLM, item: ScoreItem) -> ItemScore:
    ids, length = torch.tensor(item.token_ids), item.context_length
    logits = model(ids[None, :-1]).logits[0, length - 1 :].float()
    targets = ids[length:]
    logprobs = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    is_greedy = bool((logits.argmax(-1) == targets).all())
    return ItemScore(logprobs.double().sum().item(), is_greedy, tuple(logprobs.tolist()))


def assert_equal(scores: Sequence[ItemScore], expected: Sequence[ItemScore]) -> None:
    assert [score.is_greedy for score in scores] == [each.is_greedy for each in expected]
    for score, each in zip(scores, expected, strict=True):
        assert score.token_logprobs == pytest.approx(each.token_logprobs, abs=1e-4)
        assert score.logprob == pytest.approx(sum(score.token_logprobs), abs=1e-4)


def random_items(number: int, *, seed: int) -> list[ScoreItem]:
    """Items of all lengths; every third goes on where the one before it does."""
    draw = random.Random(seed)
    items: list[ScoreItem] = []
    for index in range(number):
        if index % 3:
            last = items[-1]
            context, tail = last.token_ids[: last.context_length], draw.choices(range(1000), k=draw.randint(1, 9))
        else:
            context, tail = draw.choices(range(1000), k=draw.randint(1, 200)), draw.choices(range(1000), k=1)
        items.append(ScoreItem((*context, *tail), len(context)))
    return items


def test_scores_are_those_of_transformers(client, reference):
    items = random_items(60, seed=1)
    assert_equal(client.score(items, token_logprobs=True), [scored_by(reference, item) for item in items])


def test_what_the_model_would_say_is_greedy(client, reference):
    prompt = client.tokenize("<|prompter|>What is a meme?<|endoftext|><|assistant|>", parse_control_tokens=True)[0]
    answer = client.chat("What is a meme?", temperature=0).token_ids
    item = ScoreItem((*prompt, *answer), len(prompt))
    [score] = client.score([item], token_logprobs=True)
    assert score.is_greedy
    assert_equal([score], [scored_by(reference, item)])


def test_the_longest_item_is_one_token_longer_than_the_positions(client, reference):
    ids = random.Random(2).choices(range(1000), k=LONGEST)
    items = [ScoreItem(ids, LONGEST - 1), ScoreItem(ids, 1000)]
    assert_equal(client.score(items, token_logprobs=True), [scored_by(reference, item) for item in items])
    with pytest.raises(InvalidArgumentError) as refused:
        client.score([ScoreItem([*ids, 1], 1)])
    assert [violation.field for violation in refused.value.field_violations] == ["items[0].token_ids"]


async def test_texts_score_as_their_tokens_do(up, client):
    async with AsyncClient(up.address) as asynchronous:
        whole, context = client.tokenize("The Moon is far away.", "The Moon is")
        by_text = await asynchronous.score([("The Moon is", " far away."), ("The Moon is ", "far away.")])
        [by_ids] = await asynchronous.score([ScoreItem(whole, len(context))])
    assert by_text == (by_ids, by_ids)


def test_a_score_is_the_same_alone_and_beside_chats(client):
    items = random_items(24, seed=3)
    alone = client.score(items, token_logprobs=True)
    with client.stream("Tell me about the Moon.", temperature=2, max_new_tokens=400, ignore_eos=True) as stream:
        next(iter(stream))
        assert client.score(items, token_logprobs=True) == alone


def test_a_worker_killed_in_the_middle_changes_no_score(up, client):
    items = random_items(400, seed=4)
    undisturbed = client.score(items, token_logprobs=True)
    with ThreadPoolExecutor(1) as caller:
        disturbed = caller.submit(client.score, items, token_logprobs=True)
        wait_until(lambda: client.load().running_requests > 0)
        up.process_of("worker").kill()
        assert disturbed.result(timeout=60) == undisturbed
    # The worker that came in its place has seen no other call.
    assert up.metric("worker", "oasst_worker_claimed_jobs_total") > 0
