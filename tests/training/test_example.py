"""The example recipe: what the documentation says of it is true."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from oasst.prompt import Speaker, Turn, format_prompt
from oasst_training.__main__ import main
from oasst_training.recipe import find_file, load_recipe
from oasst_training.tokenizer import encode_parts, load_tokenizer
from transformers import GPTNeoXForCausalLM

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "docs" / "training.md"]
COMMANDS = [command for page in PAGES for command in re.findall(r"^oasst-train .*", page.read_text(), re.MULTILINE)]


def test_there_are_commands_in_the_documentation():
    assert len(COMMANDS) >= 3


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_documentation_make_recipes_whose_files_are_there(command):
    _, path, *options = shlex.split(command)
    blocks = [each for each in options if "=" not in each and not each.startswith("--")]
    recipe = load_recipe(ROOT / path, blocks, [each for each in options if "=" in each])
    for spec in recipe.datasets:
        find_file(spec.input_file_path, [(ROOT / path).parent], key="datasets")


@pytest.mark.timeout(300)
def test_the_trial_learns_its_data_by_heart(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = tmp_path / "run"
    blocks = ["--configs", "defaults", "my-data", "trial"]
    assert main(["training/example/recipe.yaml", *blocks, "--set", f"output_dir={run}"]) == 0
    page = (ROOT / "docs" / "training.md").read_text()
    (question,) = re.findall(r'oasst complete --temperature 0 "(.*)"', page)
    (answer,) = re.findall(r"The answer is `(.*)`", page)
    assert answer_of(run / "model", question) == answer


def answer_of(checkpoint: Path, question: str) -> str:
    """What greedy decoding says."""
    tokenizer = load_tokenizer(checkpoint)
    model = GPTNeoXForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    prompt = torch.tensor([encode_parts(tokenizer, format_prompt([Turn(Speaker.PROMPTER, question)]))])
    with torch.no_grad():
        output = model.generate(prompt, do_sample=False, max_new_tokens=60)
    return tokenizer.decode(output[0, prompt.shape[1] :].tolist())
