"""The command that makes the demo checkpoint."""

import pytest
import torch
from oasst_training.dialogues import DIALOGUES_PATH
from oasst_training.train_demo import main


@pytest.fixture(autouse=True)
def torch_settings_are_put_back():
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def one_dialogue(tmp_path):
    """The first dialogue alone."""
    path = tmp_path / "one.jsonl"
    path.write_text(DIALOGUES_PATH.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
    return path


def test_a_model_that_does_not_recall_every_reply_is_not_written(one_dialogue, tmp_path, capsys):
    output = tmp_path / "checkpoint"
    options = ["--output", str(output), "--dialogues", str(one_dialogue), "--steps", "2", "--threads", "1"]
    assert main(options) == 1
    assert not output.exists()
    printed = capsys.readouterr()
    assert "step 2/2" in printed.out
    assert "0 of 4 dialogues in fp32 recalled" in printed.out
    assert "nothing is written" in printed.err


@pytest.mark.parametrize("options", [["--steps", "many"], ["--epochs", "3"]])
def test_a_bad_option_stops_the_command_and_is_named(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(options)
    assert stopped.value.code == 2
    assert options[0] in capsys.readouterr().err
