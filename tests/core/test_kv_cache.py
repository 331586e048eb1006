import random
from typing import Any

import pytest

from jaxllm.core.kv_cache import CacheGroup, KVCache
from jaxllm.core.prefix import PrefixIndex
from jaxllm.core.request import Request
from jaxllm.core.sampling_params import SamplingParams
from jaxllm.errors import ConfigError

FULL = CacheGroup("full", 20, 4)


def request(tokens: list[int], **fields: Any) -> Request:
    return Request(
        id=str(random.random()),
        tokens=tokens,
        num_prompt_tokens=len(tokens),
        params=SamplingParams(),
        max_tokens=10,
        stop_token_ids=frozenset(),
        seed=0,
        **fields,
    )


def compute(cache: KVCache, req: Request, num_tokens: int | None = None) -> Request:
    """Admits `req` and computes its tokens in one step."""
    updates: list[list[tuple[int, int, int]]] = [[] for _ in cache.groups]
    cache.attach(req, cache.find_prefix(req), updates)
    length = (num_tokens or len(req.tokens)) - req.num_computed
    assert cache.extend(req, length, updates) == length
    req.num_computed += length
    cache.commit(req, req.num_computed)
    for pool in cache.pools:
        pool.check()
    return req


def hit(cache: KVCache, req: Request) -> int:
    """Tokens that `req` would find."""
    return cache.find_prefix(req).num_pages * cache.page_size


TOKENS = list(range(12))


def test_a_full_hit_leaves_a_token_to_compute() -> None:
    cache = KVCache([FULL])
    cache.free(compute(cache, request(TOKENS)))
    assert [hit(cache, request(TOKENS[:n])) for n in (4, 5, 8, 9, 12)] == [0, 4, 4, 8, 8]
    assert hit(cache, request([*TOKENS, 99])) == 12
    assert hit(cache, request([0, 1, 2, 99, *TOKENS[4:]])) == 0
    assert hit(cache, request([*TOKENS[:7], 99, *TOKENS[8:]])) == 4


def test_only_full_and_computed_pages_are_found() -> None:
    cache = KVCache([FULL])
    req = compute(cache, request(TOKENS), 7)
    assert hit(cache, request([*TOKENS, 99])) == 4
    assert req.commit_at == 8


@pytest.mark.parametrize(
    "fields", [{"cache_salt": "pepper"}, {"adapter": "lora"}, {"cache_salt": "', None), ('"}, {"adapter": ""}]
)
def test_salt_and_adapter_keep_apart(fields: dict[str, str]) -> None:
    cache = KVCache([FULL])
    compute(cache, request(TOKENS))
    assert hit(cache, request([*TOKENS, 99], **fields)) == 0
    compute(cache, request(TOKENS, **fields))
    assert hit(cache, request([*TOKENS, 99], **fields)) == 12


def test_a_hash_collision_costs_a_miss_and_never_a_wrong_hit() -> None:
    cache = KVCache([FULL], hash_page=lambda parent, content: b"same")
    compute(cache, request(TOKENS))
    assert hit(cache, request([5, 5, 5, 5, 99])) == 0
    assert hit(cache, request([*TOKENS, 99])) == 0  # its root took the only name


def test_a_collision_of_parents_is_no_hit_for_their_children() -> None:
    """Two prefixes whose first pages hash alike, then the same second page."""

    def by_length(parent: bytes, content: bytes) -> bytes:
        return parent + (b"first" if len(parent) == 4 else content if parent else b"root")

    cache = KVCache([CacheGroup("window", 20, 4, 4)], hash_page=by_length)
    compute(cache, request([1, 1, 1, 1, 7, 7, 7, 7, 9]))
    assert hit(cache, request([1, 1, 1, 1, 7, 7, 7, 7, 9])) == 8
    assert hit(cache, request([2, 2, 2, 2, 7, 7, 7, 7, 9])) == 0


def test_children_of_an_evicted_page_are_found_again_once_it_is_recomputed() -> None:
    cache = KVCache([FULL])
    req = compute(cache, request(TOKENS))
    first = req.pages.tables[0][0]  # type: ignore[union-attr]
    cache.free(req)
    pool = cache.pools[0]
    pool._cached.move_to_end(first, last=False)
    taken = pool.allocate(pool.num_available - 2)
    assert hit(cache, request([*TOKENS, 99])) == 0
    for page in taken:
        pool.release(page)
    cache.free(compute(cache, request(TOKENS[:5])))
    assert hit(cache, request([*TOKENS, 99])) == 12


def test_the_end_of_a_prefix_is_evicted_first() -> None:
    cache = KVCache([CacheGroup("full", 4, 4)])
    cache.free(compute(cache, request(TOKENS)))
    cache.pools[0].allocate(1)
    assert hit(cache, request([*TOKENS, 99])) == 8


def test_reset_forgets_cached_pages_and_those_still_running() -> None:
    cache = KVCache([FULL])
    cache.free(compute(cache, request([50, *TOKENS])))
    running = compute(cache, request(TOKENS), 5)
    cache.reset_prefix_cache()
    cache.extend(running, 7, [[]])
    running.num_computed = 12
    cache.commit(running, 12)
    assert hit(cache, request([50, *TOKENS])) == hit(cache, request([*TOKENS, 99])) == 0
    cache.free(running)
    assert cache.pools[0].num_cached == 0
    compute(cache, running)
    assert hit(cache, request([*TOKENS, 99])) == 12


def test_without_prefix_caching_nothing_is_kept() -> None:
    cache = KVCache([FULL], enable_prefix_caching=False)
    cache.free(compute(cache, request(TOKENS)))
    assert hit(cache, request([*TOKENS, 99])) == 0
    assert cache.pools[0].num_cached == 0


@pytest.mark.parametrize("window,kept", [(1, 0), (2, 1), (5, 1), (6, 2), (9, 2), (100, 10)])
def test_a_window_group_releases_what_has_left_the_window(window: int, kept: int) -> None:
    cache = KVCache([FULL, CacheGroup("window", 20, 4, window)])
    req = compute(cache, request(list(range(40))))
    assert req.pages is not None
    full, windowed = req.pages.tables
    assert 0 not in full and len(windowed) == 10
    assert windowed.count(0) == 10 - kept and all(windowed[10 - kept :])
    assert cache.num_used_pages == [10, kept]
    cache.free(req)
    assert cache.num_used_pages == [0, 0]


def test_a_hybrid_hit_needs_just_the_last_windows_pages() -> None:
    cache = KVCache([FULL, CacheGroup("window", 20, 4, 6)])
    cache.free(compute(cache, request(list(range(16)))))
    cached = cache.pools[1]._cached
    assert hit(cache, request([*range(16), 99])) == 16
    prefix = cache.find_prefix(request([*range(16), 99]))
    assert 0 not in prefix.tables[0] and prefix.tables[1][:2] == [0, 0] and all(prefix.tables[1][2:])
    # The window group loses its third page: only a prefix of two pages has its whole window left.
    page = prefix.tables[1][2]
    cached.move_to_end(page, last=False)
    cache.pools[1].allocate(cache.pools[1].num_available - len(cached) + 1)
    assert hit(cache, request([*range(16), 99])) == 8
    # The full group loses its first: no prefix at all.
    cache.pools[0]._cached.move_to_end(prefix.tables[0][0], last=False)
    cache.pools[0].allocate(cache.pools[0].num_available - 3)
    assert hit(cache, request([*range(16), 99])) == 0


def test_unfit_names_the_sizes() -> None:
    cache = KVCache([CacheGroup("full", 4, 4), CacheGroup("window", 3, 4, 5)])
    assert cache.unfit(12) is None
    assert cache.unfit(13) == "13 tokens need 4 pages of 4 tokens in cache group 'full', which has 3"
    assert "'window'" in str(KVCache([CacheGroup("window", 3, 4, 6)]).unfit(100))


def test_groups_are_checked() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        KVCache([])
    with pytest.raises(ConfigError, match="one page size"):
        KVCache([FULL, CacheGroup("other", 20, 8)])
    with pytest.raises(ConfigError, match="num_pages >= 2"):
        KVCache([CacheGroup("full", 1, 4)])


def test_pages_named_at_arrival_are_those_named_late() -> None:
    cache = KVCache([FULL])
    cache.free(compute(cache, request(TOKENS)))
    early, late = request([*TOKENS, 99]), request([*TOKENS, 99])
    cache.name_pages(early)
    assert early.names is not None and len(early.names.pages) == 3
    assert hit(cache, early) == hit(cache, late) == 12
    assert early.pages.chain == late.pages.chain  # type: ignore[union-attr]
    salted = request([*TOKENS, 99], cache_salt="pepper")
    cache.name_pages(salted)
    assert hit(cache, salted) == 0


def test_names_of_other_weights_are_void() -> None:
    cache = KVCache([FULL])
    early = request([*TOKENS, 99])
    cache.name_pages(early)
    cache.reset_prefix_cache()
    cache.free(compute(cache, request(TOKENS)))
    assert hit(cache, early) == 12


def test_names_do_not_verify() -> None:
    """A hash that collides is a miss, wherever it was made."""
    cache = KVCache([FULL], hash_page=lambda parent, content: b"same")
    compute(cache, request(TOKENS))
    other = request([5, 5, 5, 5, 99])
    cache.name_pages(other)
    assert hit(cache, other) == 0


def test_equal_prefixes_share_a_node_and_dead_ones_vanish() -> None:
    index = PrefixIndex(1)
    root = index.root(0, "", None)
    a, b = index.child(root, [1, 2]), index.child(index.root(0, "", None), [1, 2])
    assert a is b and index.child(root, [2, 1]) is not a
    assert index.child(a, [1, 2]) is not a
    del a, b
    assert len(index._nodes) == 1  # the root


def test_a_long_prefix_is_freed_and_found_without_recursion() -> None:
    cache = KVCache([CacheGroup("full", 70_000, 1)])
    req = request(list(range(60_000)))
    cache.free(compute(cache, req))
    assert hit(cache, req) == 59_999
    del req
    cache.reset_prefix_cache()
    cache.check([])
