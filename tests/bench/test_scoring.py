"""The transformers loop that scoring is measured against: right at every batch size, or the ratio tells nothing."""

import pytest
import torch
from oasst_client import ItemScore, ScoreItem
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from bench.batch_sizes import BatchSizes
from bench.scoring import score_in_batches
from bench.turns import Ratio

ITEMS = [
    ScoreItem((5, 6, 7, 8, 9), 2),
    ScoreItem((5, 6, 7), 2),
    ScoreItem((5, 6, 11), 2),  # Differs from the one before in its last token alone.
    ScoreItem((40, 41), 1),
    ScoreItem(tuple(range(30)), 17),
]


@pytest.fixture
def model() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=64, max_position_embeddings=64, **sizes)).eval()


@torch.inference_mode()
def scored_alone(model, item: ScoreItem) -> ItemScore:
    targets = torch.tensor(item.token_ids[item.context_length :])
    logits = model(torch.tensor([item.token_ids])).logits[0, item.context_length - 1 : -1]
    logprobs = logits.log_softmax(-1)[range(len(targets)), targets]
    return ItemScore(logprobs.sum().item(), bool((logits.argmax(-1) == targets).all()))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_every_item_has_the_score_that_it_has_alone(model, batch_size):
    best = int(model(torch.tensor([[40]])).logits[0, -1].argmax())
    items = [*ITEMS, ScoreItem((40, best), 1)]
    scores, expected = score_in_batches(model, items, batch_size), [scored_alone(model, item) for item in items]
    assert [score.logprob for score in scores] == pytest.approx([each.logprob for each in expected], abs=1e-4)
    assert [score.is_greedy for score in scores] == [each.is_greedy for each in expected]
    assert scores[-1].is_greedy


def test_the_ratio_is_to_the_best_batch_size():
    ratios = {size: Ratio(ratio, ratio, ratio) for size, ratio in ((1, 3.0), (4, 1.5), (16, 2.0))}
    sizes = BatchSizes(ours_s=1.0, theirs_s={1: 3.0, 4: 1.5, 16: 2.0}, ratios=ratios)
    assert (sizes.best, sizes.best_s, sizes.ratio.median) == (4, 1.5, 1.5)
