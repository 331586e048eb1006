import json
from pathlib import Path

import pytest

from jaxllm.checkpoint import open_checkpoint
from jaxllm.text.gguf_tokenizer import from_gguf

GOLDENS = Path(__file__).parent / "goldens"


def load_golden(name):
    return json.loads((GOLDENS / name).read_text())


def sentencepiece_metadata(model, **changes):
    """GGUF metadata of a golden SentencePiece vocabulary."""
    import numpy as np

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": model["tokens"],
        "tokenizer.ggml.scores": np.array(model["scores"], np.float32),
        "tokenizer.ggml.token_type": np.array(model["kinds"], np.int32),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **changes,
    }


@pytest.fixture(scope="session")
def smollm2():
    """The default model's tokenizer."""
    return open_checkpoint("smollm2").tokenizer()


@pytest.fixture(scope="session")
def llama():
    """A small SentencePiece tokenizer: bytes for what it does not know, a space before every text."""
    return from_gguf(sentencepiece_metadata(load_golden("sentencepiece.json")["models"]["llama"]), "golden", "llama")


@pytest.fixture(scope="session")
def metaspace():
    """A tokenizer whose decoder does not work token by token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from jaxllm.text.tokenizer import Tokenizer as Wrapped

    words = ["<unk>", "<s>", "▁", *("▁" + word for word in ("a", "the", "é", "cat")), "s", ",", "日", "▁▁", "x▁y"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    backend.add_tokens(["<tool>"])
    return Wrapped(backend)
