"""Beginning- and end-of-sequence tokens around an encoded text."""

from tokenizers import Tokenizer as Backend
from tokenizers import processors


def add_sequence_tokens(backend: Backend, bos: str | None, eos: str | None) -> None:
    """Makes `backend` put these tokens (None: no token) around every text that it encodes, in place of others."""
    ids = {text: backend.token_to_id(text) for text in (bos, eos) if text is not None}
    template = [text for text in (bos, "$A", eos) if text == "$A" or ids.get(text or "") is not None]
    backend.post_processor = processors.TemplateProcessing(
        single=[str(text) for text in template],
        special_tokens=[(text, token) for text, token in ids.items() if token is not None],
    )
