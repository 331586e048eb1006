"""The sampler: parameters from the host, logits on the device, one token a row."""

from jaxllm.engine.sampling.grammar_mask import apply_grammar_mask, mask_words
from jaxllm.engine.sampling.logprobs import logprobs_of
from jaxllm.engine.sampling.noise import Purpose
from jaxllm.engine.sampling.rows import RowParams, SlotTables, Uses
from jaxllm.engine.sampling.sampler import Sampled, sample, sample_likeliest
from jaxllm.engine.sampling.slot_params import (
    NUM_COLUMNS,
    SlotParams,
    bad_words_rows,
    bias_row,
    needs_tables,
    stop_mask_row,
    unpack,
)
from jaxllm.engine.sampling.variants import (
    EVERYTHING,
    FILTERS,
    GREEDY,
    MAX_LOGPROBS,
    RANDOM,
    VARIANTS,
    SamplerVariant,
    cover,
    is_wide,
    variant_for,
)

__all__ = [
    "EVERYTHING",
    "FILTERS",
    "GREEDY",
    "MAX_LOGPROBS",
    "NUM_COLUMNS",
    "RANDOM",
    "VARIANTS",
    "Purpose",
    "RowParams",
    "Sampled",
    "SamplerVariant",
    "SlotParams",
    "SlotTables",
    "Uses",
    "apply_grammar_mask",
    "bad_words_rows",
    "bias_row",
    "cover",
    "is_wide",
    "logprobs_of",
    "mask_words",
    "needs_tables",
    "sample",
    "sample_likeliest",
    "stop_mask_row",
    "unpack",
    "variant_for",
]
