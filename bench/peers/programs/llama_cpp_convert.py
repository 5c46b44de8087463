"""llama.cpp's own converter, told that the checkpoint has no vocabulary it would have to know."""

import runpy
import sys
from pathlib import Path

SOURCE = Path(sys.prefix) / "source" / "vendor" / "llama.cpp"

sys.path[:0] = [str(SOURCE), str(SOURCE / "gguf-py")]
from conversion.gptneox import GPTNeoXModel  # noqa: E402


def set_vocab(model: GPTNeoXModel) -> None:
    model._set_vocab_none()
    model.gguf_writer.add_vocab_size(model.hparams["vocab_size"])


GPTNeoXModel.set_vocab = set_vocab
runpy.run_path(str(SOURCE / "convert_hf_to_gguf.py"), run_name="__main__")
