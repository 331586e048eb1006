"""A core that dies is replaced, and its requests go on: what the new one is told, and when there will be none."""

import dataclasses
import time

import pytest

from jaxllm.core.sampling_params import SamplingParams
from jaxllm.engine import restart
from jaxllm.engine.messages import AddRequest, Finish, Ready, SequenceOutput, StepOutputs, Utility, UtilityResult
from jaxllm.engine.restart import RestartingClient, RestartPolicy
from jaxllm.errors import ConfigError, EngineDeadError


class Core:
    """Says what is put into `says`; `late`: how many calls of `wait` it takes to be ready, or what it raises."""

    def __init__(self, pid: int, late: int | Exception = 0):
        self.ready, self.pid, self.late = Ready(100, 300, 4, 1000), pid, late
        self.got: list = []
        self.says: list = []
        self.dead: Exception | None = None
        self.buried = self.closed = False

    def wait(self, timeout):
        if isinstance(self.late, Exception):
            raise self.late
        self.late -= 1
        return self.late < 0

    def send(self, message) -> None:
        if self.dead:
            raise EngineDeadError("it has ended")
        self.got.append(message)

    def receive(self, timeout):
        if self.says:
            messages, self.says = self.says, []
            return messages
        if self.dead:
            raise self.dead
        return []

    def close(self) -> None:
        self.closed = True
        self.dead = EngineDeadError("closed")

    def bury(self) -> None:
        self.buried = True


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when it is told to."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    made = Clock()
    monkeypatch.setattr(restart, "time", made)
    return made


def started(late=(0, 0, 0, 0, 0, 0, 0), most: int = 3, silence: float | None = None):
    """A client, and the list of the cores that it has started."""
    cores: list[Core] = []

    def start() -> Core:
        cores.append(Core(len(cores) + 1, late[len(cores)]))
        return cores[-1]

    return RestartingClient(start, RestartPolicy(most, silence=silence)), cores


def request(name: str, **changes) -> AddRequest:
    params = SamplingParams(max_tokens=20, **changes.pop("params", {}))
    return AddRequest(name, [5, 6], params, 20, [2], 7, 0.0, **changes)


def die(core: Core, client: RestartingClient, words: str = "killed") -> None:
    """The core's death, up to where its successor has been told everything."""
    core.dead = EngineDeadError(words)
    assert client.receive(0) == client.receive(0) == []
    assert not client.restarting


def test_a_new_core_gets_what_is_unfinished_from_where_it_stands():
    client, cores = started()
    first = cores[0]
    for name in ("a", "b", "done", "stopped"):
        client.send(request(name, params={"prompt_logprobs": 1}))
    client.send(request("c", leader="a", output_token_ids=[9], params={"prompt_logprobs": 1}))
    first.says = [
        StepOutputs([SequenceOutput("a", [10], num_cached_tokens=1), SequenceOutput("c", [30])], ["done"], [50]),
        StepOutputs([SequenceOutput("done", [51], finish_reason="length")], ["a", "c", "unknown"], [11, 31, 99]),
    ]
    said = list(first.says)
    assert client.receive(0) == said and not client.restarting
    client.send(Finish(["stopped", "unknown"], "stop"))
    client.send(Utility(0, "stats"))
    client.send(Utility(1, "stats"))
    first.says = [UtilityResult(0, 1)]
    assert client.receive(0) == [UtilityResult(0, 1)]
    first.dead = EngineDeadError("killed")
    client.send(request("on the way"))  # before anybody knows
    assert client.receive(0) == [] and client.restarting and first.buried and client.pid is None
    client.send(request("new"))
    assert client.receive(0) == [] and not client.restarting and client.num_restarts == 1
    a, b, c, way, new, stats = cores[1].got
    assert (a.id, a.output_token_ids, a.admitted, a.params.prompt_logprobs) == ("a", [10, 11], True, None)
    assert (b.id, b.output_token_ids, b.admitted, b.params.prompt_logprobs) == ("b", [], True, 1)
    assert (c.id, c.output_token_ids, c.leader) == ("c", [9, 30, 31], "a")
    assert (way.id, way.admitted) == ("on the way", True)
    assert (new.id, new.admitted) == ("new", False) and stats == Utility(1, "stats")
    expected = dataclasses.replace(a, output_token_ids=[], admitted=False, params=request("a").params)
    assert expected == request("a")  # nothing else has changed
    cores[1].says = [StepOutputs([SequenceOutput("a", [12], num_cached_tokens=2)])]
    assert client.receive(0)[0].outputs[0].num_cached_tokens == 0  # the first core's figure stays


def test_what_a_core_said_last_counts():
    client, cores = started()
    client.send(request("a"))
    cores[0].says, cores[0].dead = [StepOutputs([], ["a"], [10])], EngineDeadError("killed")
    assert client.receive(0)[0].tokens == [10]
    client.receive(0)
    client.receive(0)
    assert cores[1].got[0].output_token_ids == [10]


def test_aborts_are_answered_whoever_is_there():
    client, cores = started(late=(0, 5))
    for name in ("asked", "later", "new"):
        client.send(request(name))
    client.send(Finish(["asked"]))
    cores[0].dead = EngineDeadError("killed")
    assert client.receive(0) == []
    (outputs,) = client.receive(0)  # it was not confirmed by the one that died
    assert [(output.id, output.finish_reason) for output in outputs.outputs] == [("asked", "abort")]
    client.send(Finish(["later", "asked"]))
    (outputs,) = client.receive(0)
    assert [(output.id, output.finish_reason) for output in outputs.outputs] == [("later", "abort")]
    while client.restarting:
        assert client.receive(0) == []
    assert [message.id for message in cores[1].got] == ["new"]


def test_what_is_sent_during_the_replay_comes_after_it(monkeypatch):
    client, cores = started()
    client.send(request("a"))
    send = Core.send

    def sending(core, message) -> None:
        send(core, message)
        if isinstance(message, AddRequest) and message.id == "a" and core is cores[1]:
            client.send(Finish(["a"]))
            client.send(request("b"))

    monkeypatch.setattr(Core, "send", sending)
    die(cores[0], client)
    assert [getattr(message, "id", message) for message in cores[1].got] == ["a", Finish(["a"]), "b"]
    assert cores[1].got[2].admitted is False and not client.restarting


def test_a_request_that_was_there_at_two_deaths_ends():
    client, cores = started()
    client.send(request("a"))
    die(cores[0], client)
    client.send(request("b"))
    cores[1].dead = EngineDeadError("killed again")
    assert client.receive(0) == []
    (outputs,) = client.receive(0)
    assert [output.id for output in outputs.outputs] == ["a"]
    assert outputs.outputs[0].finish_reason == "error" and "may be the cause" in outputs.outputs[0].error
    client.receive(0)
    assert [message.id for message in cores[2].got] == ["b"]


def test_restarts_are_bounded(clock):
    client, cores = started(most=2)
    for core in range(2):
        die(cores[core], client)
        clock.now += 10
    cores[2].dead = EngineDeadError("killed for good")
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="killed for good after 2 restarts in 600 s"):
            client.receive(0)
    with pytest.raises(EngineDeadError, match="killed for good"):
        client.send(request("a"))
    assert len(cores) == 3 and not client.restarting and client.num_restarts == 2


def test_restarts_of_long_ago_do_not_count(clock):
    client, cores = started(most=2)
    for core in range(6):
        clock.now += 301
        die(cores[core], client)
    assert client.num_restarts == 6 and not client.restarting


def test_starts_that_fail_are_tried_again_after_a_pause(clock):
    client, cores = started(late=(0, EngineDeadError("no room"), ConfigError("no room still"), 0))
    client.send(request("a"))
    cores[0].dead = EngineDeadError("killed")
    client.receive(0)
    client.receive(0)
    assert len(cores) == 2 and client.restarting and cores[1].buried
    client.receive(0)
    assert len(cores) == 2  # a second of pause
    clock.now += 1.1
    client.receive(0)
    assert len(cores) == 3
    clock.now += 1.1
    client.receive(0)
    assert len(cores) == 3  # two
    clock.now += 1
    client.receive(0)
    assert not client.restarting and [message.id for message in cores[3].got] == ["a"]


def test_starts_that_always_fail_end_it(clock):
    client, cores = started(late=(0, *[EngineDeadError("no room")] * 3))
    cores[0].dead = EngineDeadError("killed")
    with pytest.raises(EngineDeadError, match="no room after 3 restarts"):
        while True:
            client.receive(0)
            clock.now += 100
    assert len(cores) == 4


def test_a_silent_core_is_asked_and_then_killed(clock):
    client, cores = started(silence=10)
    client.send(request("a"))
    clock.now += 6
    assert client.receive(0) == []
    deadline = time.monotonic() + 5
    while len(cores[0].got) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert cores[0].got[1] == Utility(restart.PING, "ping")
    clock.now += 4.9
    cores[0].says = [UtilityResult(restart.PING)]
    assert client.receive(0) == []  # nobody else's business
    clock.now += 4.9
    assert client.receive(0) == [] and len(cores[0].got) == 2
    clock.now += 1
    client.receive(0)
    clock.now += 5.1
    client.receive(0)
    assert client.restarting and cores[0].buried
    client.receive(0)
    assert cores[1].got[0].id == "a"


def test_closing_in_the_middle_of_a_start():
    client, cores = started(late=(0, 5))
    cores[0].dead = EngineDeadError("killed")
    client.receive(0)
    client.receive(0)
    client.close()
    assert cores[1].closed and not client.restarting
    for use in (lambda: client.receive(0), lambda: client.send(request("a"))):
        with pytest.raises(EngineDeadError, match="closed"):
            use()


def test_a_first_core_that_does_not_start_is_an_error():
    with pytest.raises(ConfigError, match="no room"):
        started(late=(ConfigError("no room"),))
