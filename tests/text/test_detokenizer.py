import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.text.detokenizer import Detokenizer

KINDS = ["smollm2", "llama", "metaspace"]


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return request.getfixturevalue(request.param)


def stream(tokenizer, ids, sizes=None, **options):
    detokenizer = Detokenizer(tokenizer, **options)
    pieces, at = [], 0
    while at < len(ids):
        size = next(sizes) if sizes else 1
        pieces.append(detokenizer.append(ids[at : at + size]))
        at += size
    pieces.append(detokenizer.flush())
    return pieces


def random_ids(tokenizer, rng, length):
    """Mixes of any tokens, tokens of bytes (broken characters) and special tokens."""
    narrow = [i for i in range(min(tokenizer.vocab_size, 300))]
    return [rng.choice(narrow) if rng.random() < 0.5 else rng.randrange(tokenizer.vocab_size) for _ in range(length)]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_deltas_add_up_to_the_whole(seed, skip, tokenizer):
    rng = random.Random(seed)
    for _ in range(20):
        ids = random_ids(tokenizer, rng, rng.choice([1, 3, 10, 60]))
        whole = tokenizer.decode(ids, skip_special_tokens=skip)
        assert "".join(stream(tokenizer, ids, skip_special_tokens=skip)) == whole
        sizes = iter(lambda: rng.randint(1, 5), None)
        assert "".join(stream(tokenizer, ids, sizes, skip_special_tokens=skip)) == whole


@pytest.mark.parametrize("skip", [True, False])
def test_the_whole_is_what_the_tokenizers_library_gives(skip, smollm2):
    rng = random.Random(0)
    for _ in range(300):
        ids = random_ids(smollm2, rng, rng.choice([1, 3, 10, 60]))
        assert smollm2.decode(ids, skip) == smollm2.backend.decode(ids, skip_special_tokens=skip)


def test_byte_fallback_equals_the_library_where_bytes_are_characters(llama):
    rng = random.Random(0)
    alphabet = "ab é日🙂\n\t€  x"
    for _ in range(300):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 30)))
        ids = llama.encode(text)
        assert llama.decode(ids) == llama.backend.decode(ids) == text
    broken = [llama.token_to_id(f"<0x{byte:02X}>") for byte in b"\xc3\xa9\xc3"]
    assert llama.decode(broken) == "é�", "the whole character stays"


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_no_broken_character_is_ever_shown(text, smollm2, llama):
    for tokenizer in (smollm2, llama):
        ids = tokenizer.encode(text, add_special_tokens=False)
        pieces = stream(tokenizer, ids, skip_special_tokens=False)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=False)
        if tokenizer.decode(ids, False) == text and "�" not in text:  # small vocabularies lack rare bytes
            assert not any("�" in piece for piece in pieces)


def test_characters_wait_until_they_are_whole(smollm2):
    ids = smollm2.encode("🙂")
    assert len(ids) > 1
    pieces = stream(smollm2, ids)
    assert pieces[:-2] == [""] * (len(ids) - 1) and pieces[-2:] == ["🙂", ""]
    assert stream(smollm2, ids[:-1])[-1] == "�", "cut short, it comes out at the end"


@pytest.mark.parametrize("kind", ["llama", "metaspace"])
def test_the_first_word_after_a_prompt_keeps_its_space(kind, request):
    tokenizer = request.getfixturevalue(kind)
    ids = [tokenizer.token_to_id(token) for token in ("▁a", "▁the")]
    assert "".join(stream(tokenizer, ids[1:])) == "the"
    assert "".join(stream(tokenizer, ids[1:], prompt_ids=ids[:1])) == " the"


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_cut_by_the_prompts_end_is_completed(cut, llama):
    ids = [llama.token_to_id(f"<0x{byte:02X}>") for byte in "🙂".encode()]
    prompt = llama.encode("a lot of words") + ids[:cut]
    assert stream(llama, ids[cut:], prompt_ids=prompt)[-2:] == ["🙂", ""]


def test_added_tokens_side_by_side(metaspace):
    tool = metaspace.token_to_id("<tool>")
    ids = [metaspace.token_to_id("▁a"), tool, tool, metaspace.token_to_id("▁cat")]
    assert "".join(stream(metaspace, ids)) == metaspace.decode(ids)
    assert "".join(stream(metaspace, ids, spaces_between_special_tokens=False)) == "a<tool><tool> cat"


def test_the_cost_of_a_token_does_not_grow(tokenizer):
    """A thousand invalid bytes in a row are the hardest case for window methods."""
    byte = tokenizer.token_to_id("<0xC3>") or tokenizer.encode("é日")[0]
    detokenizer = Detokenizer(tokenizer)
    begin = time.perf_counter()
    for _ in range(20_000):
        detokenizer.append([byte])
    assert time.perf_counter() - begin < 5
