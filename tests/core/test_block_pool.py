import pytest

from jaxllm.core.block_pool import BlockPool
from jaxllm.core.prefix import PrefixIndex


def named(pool: BlockPool, *contents: int) -> list[int]:
    """Pages named by one-token prefixes."""
    pages = pool.allocate(len(contents))
    index = PrefixIndex(1)
    root = index.root(0, "", None)
    for page, content in zip(pages, contents, strict=True):
        pool.name(page, index.child(root, [content]))
    return pages


def test_never_hands_out_the_dummy_page() -> None:
    pool = BlockPool(5)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    with pytest.raises(IndexError, match="1 pages wanted, 0 available"):
        pool.allocate(1)
    pool.check()


def test_a_page_is_free_again_after_its_last_reference() -> None:
    pool = BlockPool(3)
    (page,) = pool.allocate(1)
    pool.share(page)
    pool.release(page)
    assert (pool.num_referenced, pool.num_available) == (1, 1)
    pool.release(page)
    assert (pool.num_referenced, pool.num_available) == (0, 2)
    with pytest.raises(ValueError, match="without a reference"):
        pool.release(page)
    pool.check()


def test_evicts_the_least_recently_released_and_only_when_nothing_is_free() -> None:
    pool = BlockPool(6)
    a, b, c = named(pool, 1, 2, 3)
    nodes = [pool.nodes[page] for page in (a, b, c)]
    for page in (b, a, c):
        pool.release(page)
    assert pool.num_cached == 3
    pool.allocate(2)
    assert pool.num_cached == 3
    pool.share(a)  # out of the middle
    assert pool.allocate(2) == [b, c]
    assert [node.pages[0] for node in nodes if node] == [a, 0, 0]
    pool.check()


def test_unname_all_frees_cached_pages_and_keeps_referenced_ones() -> None:
    pool = BlockPool(4)
    a, b = named(pool, 1, 2)
    pool.release(a)
    pool.unname_all()
    assert (pool.num_cached, pool.num_referenced, pool.num_available) == (0, 1, 2)
    pool.release(b)
    assert (pool.num_cached, pool.num_available) == (0, 3)
    pool.check()


def test_check_finds_a_lost_and_a_doubled_page() -> None:
    pool = BlockPool(4)
    pool.allocate(1)
    pool._free.pop()
    with pytest.raises(AssertionError, match="lost"):
        pool.check()
    pool = BlockPool(4)
    pool._free.append(1)
    with pytest.raises(AssertionError, match="twice"):
        pool.check()
