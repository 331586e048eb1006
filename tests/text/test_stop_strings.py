"""Against brute force: the first moment at which the text ends with a stop string."""

import random

import pytest

from jaxllm.text.stop_strings import StopChecker, StopStrings


def brute_force(text, stops, include, allowed=lambda end: True):
    """The text shown in all, and the string that matched."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found and allowed(end):
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def run(pieces, stops, include=False):
    checker = StopChecker(stops, include)
    shown = []
    for piece in pieces:
        shown.append(checker.feed(piece))
        if checker.matched is not None:
            return shown, checker.matched
    shown.append(checker.flush())
    return shown, None


def cut(text, rng):
    pieces = []
    while text:
        size = rng.randint(1, 4)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_brute_force(seed, include):
    rng = random.Random(seed)
    for _ in range(300):
        alphabet = "ab" if rng.random() < 0.7 else "abé🙂"
        stops = ["".join(rng.choice(alphabet) for _ in range(rng.randint(1, 5))) for _ in range(rng.randint(1, 4))]
        text = "".join(rng.choice(alphabet + "c") for _ in range(rng.randint(0, 25)))
        pieces = cut(text, rng)
        shown, matched = run(pieces, stops, include)
        assert ("".join(shown), matched) == brute_force(text, stops, include), (text, stops, pieces)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_shown_too_early_or_held_too_long(seed):
    """After each piece, the text held is the longest ending that begins some stop string."""
    rng = random.Random(seed)
    for _ in range(300):
        stops = ["".join(rng.choice("ab") for _ in range(rng.randint(1, 5))) for _ in range(3)]
        text = "".join(rng.choice("abc") for _ in range(20))
        checker, shown, seen = StopChecker(stops), "", ""
        for piece in cut(text, rng):
            shown += checker.feed(piece)
            seen += piece
            if checker.matched is not None:
                break
            held = max(
                (n for n in range(len(seen) + 1) for s in stops if n < len(s) and s.startswith(seen[len(seen) - n :])),
                default=0,
            )
            assert shown == seen[: len(seen) - held]


@pytest.mark.parametrize("seed", range(5))
def test_strings_that_may_not_stop_yet(seed):
    rng = random.Random(seed)
    for _ in range(300):
        stops = ["".join(rng.choice("ab") for _ in range(rng.randint(1, 4))) for _ in range(2)]
        text = "".join(rng.choice("abc") for _ in range(15))
        first = rng.randint(0, 15)
        checker = StopChecker(stops)
        shown = checker.feed(text[:first], may_stop=False) + checker.feed(text[first:])
        shown += checker.flush()
        assert (shown, checker.matched) == brute_force(text, stops, False, lambda end, first=first: end > first)


def test_examples():
    assert run(["Hello <", "|e", "nd|> more"], ["<|end|>"]) == (["Hello ", "", ""], "<|end|>")
    assert run(["Hello <", "|e", "nd"], ["<|end|>"]) == (["Hello ", "", "", "<|end"], None)
    assert run(["a\n", "\nb"], ["\n\n"], include=True) == (["a", "\n\n"], "\n\n")
    assert run(["xabcd"], ["bc", "abcd"]) == (["xa"], "bc"), "the first to be complete"
    assert run(["xabc"], ["bc", "abc"]) == (["x"], "abc"), "of two complete at once, the one that began first"


def test_nothing_follows_a_match():
    checker = StopChecker(["b"])
    assert checker.feed("ab") == "a" and checker.feed("c") == "" and checker.flush() == ""


def test_long_stop_strings_are_linear():
    stops = ["a" * 20_000 + "b", "a" * 10_000 + "c"]
    checker = StopChecker(stops)
    assert sum(len(checker.feed("a")) for _ in range(50_000)) == 30_000
    assert StopStrings(stops).strings == tuple(stops)
