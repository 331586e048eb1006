"""Hypothesis drives the scheduler in any order that the engine could, and shrinks what breaks it."""

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxllm.core.request import Status
from tests.core.simulation import Case, Simulation

FAMILIES = [[(family * 7 + i * i) % 40 for i in range(48)] for family in range(2)]


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 10_000))
    def start(self, seed: int) -> None:
        self.simulation = Simulation(Case.draw(random.Random(seed)))

    @rule(
        family=st.integers(0, 1),
        length=st.integers(1, 47),
        max_tokens=st.integers(1, 20),
        seed=st.integers(0, 2**64 - 1),
        num_emitted=st.sampled_from([0, 0, 0, 3]),
        num_followers=st.sampled_from([0, 0, 1, 3]),
        priority=st.integers(0, 2),
        salt=st.sampled_from(["", "", "pepper"]),
        prompt_logprobs=st.sampled_from([False, False, False, True]),
    )
    def add(
        self,
        family: int,
        length: int,
        max_tokens: int,
        seed: int,
        num_emitted: int,
        num_followers: int,
        priority: int,
        salt: str,
        prompt_logprobs: bool,
    ) -> None:
        leader = None
        for i in range(1 + num_followers):
            added = self.simulation.add(
                FAMILIES[family][:length],
                max_tokens,
                seed ^ i,
                num_emitted=num_emitted,
                leader=leader,
                priority=priority,
                salt=salt,
                prompt_logprobs=prompt_logprobs,
            )
            leader = leader or added

    @precondition(lambda self: self.simulation.alive)
    @rule(which=st.integers(0, 100), status=st.sampled_from([Status.ABORTED, Status.STOPPED]))
    def stop(self, which: int, status: Status) -> None:
        alive = list(self.simulation.alive)
        self.simulation.stop(alive[which % len(alive)], status)

    @precondition(lambda self: len(self.simulation.in_flight) <= self.simulation.case.depth)
    @rule()
    def launch(self) -> None:
        self.simulation.launch()

    @precondition(lambda self: self.simulation.in_flight)
    @rule()
    def finish(self) -> None:
        self.simulation.finish()

    @rule(count=st.integers(1, 10))
    def run(self, count: int) -> None:
        for _ in range(count):
            self.simulation.step()

    @rule(lose_state=st.booleans())
    def upset(self, lose_state: bool) -> None:
        if lose_state:
            self.simulation.lose_device_state()
        else:
            self.simulation.reset_prefix_cache()

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.check()

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.bounded_wait = False  # rules need not step
            self.simulation.drain()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
