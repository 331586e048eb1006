import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry2x32_p

from jaxllm.core.sampling_params import SamplingParams
from jaxllm.core.seeds import derive_seed
from jaxllm.engine.sampling import RANDOM, Purpose
from jaxllm.engine.sampling.noise import gumbel, threefry2x32
from tests.engine.sampling.harness import run
from tests.engine.sampling.reference import Row

jit_gumbel = jax.jit(gumbel)
LOGITS = np.zeros(4096, np.float32)


def token(seed: int, position: int = 0) -> int:
    return int(run([Row(LOGITS, SamplingParams(), [0] * position, seed=seed)], RANDOM).tokens[0, 0])


def test_threefry_is_that_of_jax():
    words = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, (4, 1000), dtype=np.uint32))
    for ours, theirs in zip(
        jax.jit(threefry2x32)((words[0], words[1]), (words[2], words[3])), threefry2x32_p.bind(*words)
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_noise_of_a_shard_is_a_slice_of_the_whole():
    seed, position = jnp.asarray([[1, 2], [3, 4]], jnp.uint32), jnp.asarray([5, 6])
    whole = jit_gumbel(seed, position, jnp.arange(1000))
    shard = jit_gumbel(seed, position, 700 + jnp.arange(300))
    np.testing.assert_array_equal(whole[:, 700:], shard)


@pytest.mark.parametrize(("word", "bit"), [(w, b) for w in (0, 1) for b in (0, 15, 31)])
def test_every_part_of_the_seed_matters(word, bit):
    seed = np.zeros((2, 2), np.uint32)
    seed[1, word] = np.uint32(1) << np.uint32(bit)
    noise = np.asarray(jit_gumbel(jnp.asarray(seed), jnp.zeros(2, jnp.int32), jnp.arange(4096)))
    assert abs(np.corrcoef(noise)[0, 1]) < 0.05


def test_positions_ids_and_purposes_draw_apart():
    seed = jnp.zeros((3, 2), jnp.uint32)
    noise = np.asarray(jit_gumbel(seed, jnp.asarray([0, 1, 2**28 - 1]), jnp.arange(4096)))
    assert np.abs(np.corrcoef(noise) - np.eye(3)).max() < 0.05
    assert len(np.unique(noise)) > 0.999 * noise.size
    assert max(Purpose) < 16


def test_seeds():
    base = 0x0123_4567_89AB_CDEF
    tokens = {token(seed) for seed in (base, base ^ (1 << 63), base ^ (1 << 32), base ^ 1, base ^ (1 << 31))}
    assert len(tokens) == 5
    assert token(base) == token(base)
    assert token(-1) == token(2**64 - 1) != token(2**63 - 1)
    assert token(-(2**63)) == token(2**63)
    assert len({token(base, position) for position in range(20)}) > 15


def test_derive_seed():
    for seed in (0, 1, -1, 2**63, 2**64 - 1, -(2**63)):
        seeds = [derive_seed(seed, index) for index in range(1024)]
        assert seeds[0] == seed % 2**64
        assert len(set(seeds)) == 1024 and all(0 <= s < 2**64 for s in seeds)
    grid = {derive_seed(seed, index) for seed in range(200) for index in range(200)}
    assert len(grid) == 200 * 200
    assert derive_seed(-5, 3) == derive_seed(2**64 - 5, 3)
    # The exact values are part of what a seed promises.
    assert derive_seed(42, 1) == 0xF34FE9248C9342E5


def test_derived_seeds_have_balanced_bits():
    bits = np.array([[derive_seed(7, i) >> b & 1 for b in range(64)] for i in range(1, 4001)])
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.05
