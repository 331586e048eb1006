"""Room for small arrays, on a device that is taken for one with CUDA graphs."""

from jaxllm import SamplingParams, StructuredOutputsParams
from jaxllm.engine.addresses import COPIES
from jaxllm.engine.sampling import mask_words
from tests.engine import tiny


def test_every_size_is_reserved_once_and_stays(checkpoint):
    """Tokens are the same, and what is reserved survives a reset."""
    plain = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    form = SamplingParams(temperature=0, max_tokens=9, structured_outputs=StructuredOutputsParams(regex="[a-c]{9}"))
    params = [plain, form]
    with tiny.llm(checkpoint("llama")) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate([[5, 6, 7], [8]], params)]
    with tiny.llm(checkpoint("llama")) as llm:
        device = llm._client._core.runner.device
        device._has_graphs = True
        found = [output.outputs[0].token_ids for output in llm.generate([[5, 6, 7], [8]], params)]
        reserved = {size: list(arrays) for size, arrays in device._reserved.items()}
        device.reset()
        assert found == expected
        assert device._packed.nbytes in reserved  # besides, outputs and masks
        assert device._masks is None and 4 * mask_words(tiny.VOCAB) in reserved
        assert all(len(arrays) == COPIES + 1 for arrays in reserved.values())
        assert all(array.nbytes == size for size, arrays in reserved.items() for array in arrays)
        assert device._reserved.keys() == reserved.keys()
