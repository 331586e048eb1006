"""Tokens put into a collector's open lists give the same output as tokens handed over one by one."""

import random

import pytest

from jaxllm.core.sampling_params import SamplingParams
from jaxllm.engine.messages import SequenceOutput
from jaxllm.frontend.collector import RequestCollector
from jaxllm.frontend.inputs import ModelLimits, RequestBuilder
from tests.engine import tiny


@pytest.fixture(scope="module")
def builder(tmp_path_factory) -> RequestBuilder:
    from jaxllm.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(str(tiny.write_checkpoint("llama", tmp_path_factory.mktemp("llama"))))
    return RequestBuilder(checkpoint.tokenizer(), ModelLimits(tiny.VOCAB, 128), checkpoint.config, {}, 0)


@pytest.mark.parametrize("seed", range(20))
def test_open_lists_and_deltas_agree(builder, seed):
    rng = random.Random(seed)
    params = SamplingParams(
        n=rng.randint(1, 3), max_tokens=60, detokenize=seed % 4 != 0, skip_special_tokens=seed % 2 == 0
    )
    emitted = [rng.randrange(tiny.VOCAB - 12) for _ in range(rng.randint(0, 3))] if params.n == 1 else []
    emitted = [token for token in emitted if token != tiny.EOS]
    prepared = builder.build([5, 6, 7], params, output_token_ids=emitted)
    listed, delivered = (RequestCollector(prepared, builder.tokenizer) for _ in range(2))
    lists = listed.open_lists()
    texts = dict.fromkeys(lists, "")
    assert set(lists) == set(delivered.sequence_ids)
    for index, sequence_id in enumerate(lists):
        before = delivered.snapshot().outputs[index].text
        for _ in range(rng.randint(0, 30)):  # bytes of broken characters among them
            token = rng.choice([tiny.UNK, *range(tiny.FIRST_BYTE, tiny.FIRST_BYTE + 256 + len(tiny.WORDS))])
            if rng.random() < 0.2:
                output = SequenceOutput(sequence_id, [token])
                assert listed.add(output) is not None
                delta = delivered.add(output)
            else:
                lists[sequence_id].append(token)
                delta = delivered.add_tokens(sequence_id, [token])
            assert delta is not None and delta.token_ids == [token]
            texts[sequence_id] += delta.text
            if rng.random() < 0.1:
                assert listed.snapshot() == delivered.snapshot()
        last = SequenceOutput(sequence_id, [tiny.EOS], finish_reason="stop", stop_token=tiny.EOS)
        assert listed.add(last) is not None
        delta = delivered.add(last)
        assert delta is not None
        assert before + texts[sequence_id] + delta.text == delivered.output.outputs[index].text
    assert listed.snapshot() == delivered.snapshot() and listed.output.finished
    assert all(sample.text or not params.detokenize or len(sample.token_ids) < 9 for sample in listed.output.outputs)


def test_a_stop_string_needs_every_token_at_once(builder):
    prepared = builder.build([5, 6, 7], SamplingParams(stop="ab"))
    assert RequestCollector(prepared, builder.tokenizer).open_lists() == {}
