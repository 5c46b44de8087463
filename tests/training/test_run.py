"""A whole run: what it writes, how it goes on after a kill, and that processes can share it."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oasst_training.__main__ import main
from oasst_training.errors import CheckpointError, DivergedError, RecipeError
from oasst_training.run import run_recipe
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPTNeoXForCausalLM
from waiting import wait_until

PATIENCE_S = 60
NUM_STEPS = 13


@pytest.fixture
def train(tiny_recipe, data_folder):
    """`train(resume=True, save_steps=2)` runs the recipe `tiny` in this process and returns the model's folder."""

    def run(*, resume: bool = False, **keys) -> Path:
        return run_recipe(tiny_recipe(**keys), [data_folder], resume=resume)

    return run


@pytest.fixture
def command(recipes_path, tiny_checkpoint, data_folder, tmp_path):
    """The command line that does the same, for a process of its own."""

    def build(**keys) -> list[str]:
        recipe = data_folder / "recipes.yaml"
        recipe.write_bytes(recipes_path.read_bytes())
        fixed = {"model_name": tiny_checkpoint, "output_dir": tmp_path / "run"}
        overrides = [option for key, value in (fixed | keys).items() for option in ("--set", f"{key}={value}")]
        return [str(recipe), "--configs", "tiny", *overrides]

    return build


def start(arguments: list[str], **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "oasst_training", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    )


def weights_of(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def are_equal(first: Path, second: Path) -> bool:
    """Whether two models have the same weights, bit for bit."""
    ours, theirs = weights_of(first), weights_of(second)
    return ours.keys() == theirs.keys() and all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def curve_of(run: Path) -> dict[str, list[dict[str, float]]]:
    return json.loads((run / "loss_curve.json").read_text())


def test_a_run_writes_a_model_its_history_and_the_recipe_as_it_was_used(train, tmp_path, tokenizer, capsys):
    model = train()
    run = tmp_path / "run"
    assert model == run / "model"
    assert {path.name for path in run.iterdir()} == {
        *("recipe.json", "loss_curve.json", "loss_curve.png", "model"),
        *("checkpoint-00000009", "checkpoint-00000012"),
    }  # save_total_limit keeps two checkpoints.
    assert GPTNeoXForCausalLM.from_pretrained(model).dtype == torch.float16
    assert len(AutoTokenizer.from_pretrained(model)) == tokenizer.get_vocab_size()
    assert json.loads((run / "recipe.json").read_text())["learning_rate"] == 1e-2
    curve = curve_of(run)
    assert [point["step"] for point in curve["steps"]] == list(range(1, NUM_STEPS + 1))
    assert [point["learning_rate"] for point in curve["steps"][:5]] == pytest.approx(
        [0, 5e-3, 7.925e-3, 1e-2, 1e-2], rel=1e-4
    )
    evaluated = [(point["step"], point["dataset"]) for point in curve["evaluations"]]
    assert evaluated == [(step, name) for step in (4, 8, 12, 13) for name in ("alpaca", "oasst_export")]
    assert curve["steps"][0]["loss"] > 7 > curve["steps"][-1]["loss"]
    printed = capsys.readouterr().out
    assert "alpaca: 48 for training, 12 held out" in printed
    assert f"step 12/{NUM_STEPS}, epoch 1.85, loss" in printed
    assert "evaluation of oasst_export: loss" in printed


def test_a_checkpoint_holds_a_model_that_can_be_served(train, tmp_path):
    model = train(save_steps=NUM_STEPS)
    assert are_equal(tmp_path / "run" / f"checkpoint-{NUM_STEPS:08}" / "model", model)


def test_the_same_recipe_gives_the_same_weights_and_another_seed_gives_others(train, tmp_path):
    once = train()
    assert are_equal(once, train(output_dir=tmp_path / "again"))
    assert not are_equal(once, train(output_dir=tmp_path / "other", rng_seed=8))


def test_a_killed_run_goes_on_to_the_same_weights_and_history(command, train, tmp_path):
    keys = {"num_train_epochs": 16, "save_steps": 10, "eval_steps": 50, "save_total_limit": 1}
    killed = start(command(**keys))
    try:
        checkpoint = tmp_path / "run" / "checkpoint-00000010"
        wait_until(lambda: checkpoint.exists() or killed.poll() is not None, "a checkpoint", PATIENCE_S)
        assert checkpoint.exists(), killed.stderr.read()
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        killed.stderr.close()
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "model").exists()  # It was killed on the way.
    resumed = train(resume=True, **keys)
    whole = train(output_dir=tmp_path / "whole", **keys)
    assert are_equal(resumed, whole)
    assert curve_of(tmp_path / "run") == curve_of(tmp_path / "whole")


def test_a_half_written_checkpoint_does_not_count(train, tmp_path):
    whole = train(output_dir=tmp_path / "whole")
    half_written = tmp_path / "run" / "checkpoint-00000003.partial"
    half_written.mkdir(parents=True)
    (half_written / "run.json").write_text("{")
    resumed = train(resume=True)
    assert not half_written.exists()
    assert are_equal(resumed, whole)


def test_two_processes_train_what_one_trains(command, train, tmp_path):
    """One process takes two micro batches a step, two take one each: the same sum of two gradients, bit for bit."""
    one = train(gradient_accumulation_steps=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    arguments = command(gradient_accumulation_steps=1, output_dir=tmp_path / "two")
    processes = [start(arguments, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]
    try:
        errors = [process.communicate(timeout=PATIENCE_S)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    assert are_equal(one, tmp_path / "two" / "model")
    ours, theirs = curve_of(tmp_path / "run"), curve_of(tmp_path / "two")
    for points in ("steps", "evaluations"):
        losses = [point["loss"] for point in ours[points]]
        assert [point["loss"] for point in theirs[points]] == pytest.approx(losses, rel=1e-6)


def test_a_run_is_not_written_over(train, tmp_path):
    train(num_train_epochs=0.1)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/run holds a run already: go on with --resume"):
        train()


def test_a_run_does_not_go_on_with_another_recipe_or_other_data(train):
    train(num_train_epochs=1)
    with pytest.raises(CheckpointError, match=r"checkpoint-00000006 was made with learning_rate 0.01, now it is 0.02"):
        train(resume=True, num_train_epochs=1, learning_rate=0.02)
    with pytest.raises(CheckpointError, match="was made with data_sha256"):
        train(resume=True, num_train_epochs=1, datasets="[{alpaca: {input_file_path: instructions.jsonl}}]")
    train(resume=True, num_train_epochs=1, logging_steps=1, save_total_limit=1)


def test_bf16_trains_too(train, tmp_path):
    train(dtype="bf16", num_train_epochs=4)
    losses = [point["loss"] for point in curve_of(tmp_path / "run")["steps"]]
    assert losses[-1] < losses[0] - 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fp16_without_a_gpu_is_refused_before_anything_is_loaded(train):
    with pytest.raises(RecipeError, match="dtype: fp16 needs a GPU; on a CPU use bf16 or fp32"):
        train(dtype="fp16", model_name="/nowhere")


def test_a_loss_that_is_no_number_stops_the_run(train):
    with pytest.raises(DivergedError, match=r"the loss of step \d+ is (nan|inf): lower learning_rate"):
        train(learning_rate=1e30)


def test_the_command_explains_what_to_change(command, capsys):
    assert main([*command(), "--set", "warm_up=3"]) == 2
    assert capsys.readouterr().err == "oasst-train: the overrides: unknown key warm_up\n"


def test_the_command_trains_and_says_how_to_serve(command, tmp_path, capsys):
    assert main(command(num_train_epochs=0.1)) == 0
    assert f"oasst up --model {tmp_path}/run/model" in capsys.readouterr().out


def test_without_its_packages_the_command_tells_what_to_install(command):
    code = "import sys; sys.modules['yaml'] = None; from oasst_training.__main__ import main; sys.exit(main())"
    result = subprocess.run([sys.executable, "-c", code, *command()], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "oasst-train needs yaml: pip install '.[train]' in a clone of oasst-serve\n"
