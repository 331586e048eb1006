"""A million random steps, half of them in slow runs: arrivals, aborts, forks, priorities, salts, tiny caches, windows,
resumptions, overlap."""

import random
from typing import Any

import pytest

from jaxllm.core.request import Status
from tests.core.simulation import VOCABULARY, Case, Simulation

NUM_SEEDS = 100  # each draws its own sizes, policies and traffic
NUM_QUICK = 50  # of them in a plain run
STEPS_PER_SEED = 10_000  # NUM_SEEDS times this is a million


class Traffic:
    """Random users. Prompts come from a few families, so that prefixes are shared and diverge."""

    def __init__(self, simulation: Simulation, rng: random.Random):
        self.simulation, self.rng = simulation, rng
        config = simulation.case.config
        self.longest = config.max_model_len - 1
        self.families = [[rng.randrange(VOCABULARY) for _ in range(self.longest)] for _ in range(3)]
        self.rate = rng.choice([0.05, 0.15, 0.4])
        self.rough = rng.random() < 0.3  # weights change and the device's state gets lost

    def arrive(self) -> None:
        rng, simulation = self.rng, self.simulation
        family = rng.choice(self.families)
        prompt = family[: rng.randint(1, self.longest)]
        if rng.random() < 0.5:
            prompt[-1] = rng.randrange(VOCABULARY)
        max_tokens = rng.choice([1, 2, 5, 10, 30])
        traits: dict[str, Any] = dict(
            salt=rng.choice(["", "", "", "pepper"]),
            adapter=rng.choice([None, None, None, "lora"]),
            priority=rng.randint(0, 2),
            prompt_logprobs=rng.random() < 0.05,
        )
        num_emitted = rng.randint(1, max_tokens) if rng.random() < 0.15 else 0
        leader = simulation.add(prompt, max_tokens, rng.getrandbits(64), num_emitted=num_emitted, **traits)
        if rng.random() < 0.2:
            for _ in range(rng.randint(1, 3)):
                num_emitted = rng.randint(1, max_tokens) if rng.random() < 0.1 else 0
                simulation.add(
                    prompt, max_tokens, rng.getrandbits(64), leader=leader, num_emitted=num_emitted, **traits
                )

    def disturb(self) -> None:
        rng, simulation = self.rng, self.simulation
        if simulation.alive:
            victim = rng.choice(list(simulation.alive))
            simulation.stop(victim, rng.choice([Status.ABORTED, Status.ABORTED, Status.STOPPED, Status.ERROR]))
        if self.rough and rng.random() < 0.2:
            simulation.reset_prefix_cache()
        if self.rough and rng.random() < 0.1:
            simulation.lose_device_state()


@pytest.mark.parametrize(
    "seed", [*range(NUM_QUICK), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(NUM_QUICK, NUM_SEEDS))]
)
def test_a_million_steps(seed: int) -> None:
    rng = random.Random(seed)
    simulation = Simulation(Case.draw(rng))
    traffic = Traffic(simulation, rng)
    chance = rng.random
    while simulation.num_steps < STEPS_PER_SEED:
        if chance() < traffic.rate or (not simulation.alive and chance() < 0.5):
            traffic.arrive()
        if chance() < 0.02:
            traffic.disturb()
        simulation.step()
        if chance() < 0.02:
            simulation.check()
        if chance() < 0.0005:
            simulation.drain()
    simulation.drain()
    assert sum(simulation.num_ended.values()) > STEPS_PER_SEED / 200
