"""After a step has raised: which requests run alone, by halves, until the one that makes steps raise is found."""

from collections.abc import Iterable

from jaxllm.core.request import Request

MAX_LONE_FAILURES = 8  # requests in succession that fail alone, no step between them good: it is not the requests
MAX_FRUITLESS = 3  # searches in succession that find nobody: steps raise for a reason that no request brings
GOOD_STEPS = 1000  # after which earlier searches no longer count


class CulpritSearch:
    """Halves the requests of a failed step until one fails alone.

    A trial is a group of requests that run, until each has got a token or ended; then they are cleared of suspicion and
    go on. Beside them run only those that have been cleared. If a step raises, those of the trial in it are halved.

    Attributes:
      trial: the group under trial, the only ones to be admitted; None: everybody is.
    """

    def __init__(self) -> None:
        self.trial: frozenset[Request] | None = None
        self._marks: dict[Request, int] = {}  # how many tokens the trial's requests had when it began
        self._groups: list[list[Request]] = []  # to be tried yet, the next one last
        self._found = False
        self._lone_failures = self._fruitless = self._good_steps = 0

    def step_passed(self) -> None:
        """Notes that a step was good."""
        self._good_steps += 1
        self._lone_failures = 0

    def step_failed(self, requests: Iterable[Request]) -> Request | None:
        """Takes in whose step has raised; the culprit, if it is found by that. To be followed by `advance`.

        Raises:
          LookupError: there is no use in searching, the fault is not a request's.
        """
        suspects = [request for request in requests if not request.status.ended]
        if self.trial is None:
            self._begin()
        else:  # those of the trial that were not in this step come later
            others = [r for r in self._marks if r not in suspects and not r.status.ended]
            suspects = [r for r in suspects if r in self.trial]
            self._groups += [others] if others else []
        self.trial, self._marks = frozenset(), {}
        if len(suspects) == 1:
            self._found = True
            self._lone_failures += 1
            if self._lone_failures > MAX_LONE_FAILURES:
                raise LookupError(f"{self._lone_failures} requests in succession fail alone")
            return suspects[0]
        half = len(suspects) // 2
        self._groups += [group for group in (suspects[half:], suspects[:half]) if group]
        return None

    def _begin(self) -> None:
        if self._good_steps >= GOOD_STEPS:
            self._fruitless = 0
        self._good_steps = 0
        self._found = False
        if self._fruitless >= MAX_FRUITLESS:
            raise LookupError(f"{self._fruitless} searches have found no request that fails alone")

    def advance(self) -> bool:
        """Goes on to the next trial, or to the end, if the present one is over. Whether it was."""
        if self.trial is None or any(not r.status.ended and len(r.tokens) == n for r, n in self._marks.items()):
            return False
        while self._groups:
            group = [request for request in self._groups.pop() if not request.status.ended]
            if group:
                self._marks = {request: len(request.tokens) for request in group}
                self.trial = frozenset(group)
                return True
        self.trial, self._marks = None, {}
        self._fruitless = 0 if self._found else self._fruitless + 1
        return True
