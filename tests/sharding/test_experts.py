"""The expert axis of a mesh, on eight simulated devices, and the rule that deals experts out along it."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sharding import DATA, EXPERT, TENSOR, from_parts, make_mesh, partition_spec, place, sum_over

TOKENS, EMBED, MLP, EXPERTS = 6, 8, 4, 4


def main() -> None:
    """In a process of its own: eight devices must be asked for before JAX starts."""
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = make_mesh(data=2, tensor=2, expert=2)
    assert dict(mesh.shape) == {DATA: 2, EXPERT: 2, TENSOR: 2}
    ids = [[[device.id for device in shards] for shards in experts] for experts in mesh.devices]
    assert ids == np.arange(8).reshape(2, 2, 2).tolist()  # shards of a tensor are neighbours

    rng = np.random.default_rng(0)
    x, share = rng.standard_normal((TOKENS, EMBED)), rng.random((TOKENS, EXPERTS))
    up = rng.standard_normal((EXPERTS, EMBED, MLP))
    down = rng.standard_normal((EXPERTS, MLP, EMBED))
    up, down, x, share = (value.astype(np.float32) for value in (up, down, x, share))
    parts = []

    def part(index, device):
        parts.append(index)
        return jax.device_put(up[index], device)

    up_axes, down_axes = partition_spec(("experts", "embed", "mlp")), partition_spec(("experts", "mlp", "embed"))
    assert (up_axes, down_axes) == (PartitionSpec(EXPERT, None, TENSOR), PartitionSpec(EXPERT, TENSOR, None))
    placed = from_parts(up.shape, NamedSharding(mesh, up_axes), part)
    assert len(parts) == 4  # each once, for both ranks
    for shard in placed.addressable_shards:
        _, expert, tensor = np.argwhere(mesh.devices == shard.device)[0]
        np.testing.assert_array_equal(shard.data, up[2 * expert : 2 * expert + 2, :, 2 * tensor : 2 * tensor + 2])

    def layer(x, share, up, down):
        """A rank's tokens through this shard's columns of this shard's experts, and the sum over all shards."""
        hidden = jax.nn.silu(jnp.einsum("td,edf->etf", x, up))
        return sum_over(sum_over(jnp.einsum("etf,efd,te->td", hidden, down, share), EXPERT), TENSOR)

    of_rank = PartitionSpec(DATA)
    specs = (of_rank, PartitionSpec(DATA, EXPERT), up_axes, down_axes)
    run = jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=specs, out_specs=of_rank))
    values = zip((x, share, placed, down), specs, strict=True)
    arrays = (place(value, NamedSharding(mesh, spec)) for value, spec in values)
    hidden = np.einsum("td,edf->etf", x, up)
    hidden = hidden / (1 + np.exp(-hidden))
    np.testing.assert_allclose(run(*arrays), np.einsum("etf,efd,te->td", hidden, down, share), atol=1e-5, rtol=1e-5)
    print("experts are dealt out")


def test_experts_on_a_mesh_of_two_by_two_by_two(root):
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "tests.sharding.test_experts"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["experts are dealt out"]


def test_too_few_devices_are_refused():
    count = len(jax.devices())
    wanted = rf"data=1 x expert={count + 1} x tensor=1 needs {count + 1} devices; {count} exist"
    with pytest.raises(ValueError, match=wanted):
        make_mesh(expert=count + 1)


if __name__ == "__main__":
    main()
