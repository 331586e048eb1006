"""Which request holds which pages: growth, sharing of common prefixes, sliding windows, release."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence

from jaxllm.core.block_pool import BlockPool
from jaxllm.core.prefix import HashPage, PrefixIndex, PrefixNode, hash_page, root_content
from jaxllm.core.request import Request
from jaxllm.errors import ConfigError

PageUpdates = list[list[tuple[int, int, int]]]  # for each group: (slot, index in the page table, page)


@dataclasses.dataclass(slots=True, frozen=True)
class CacheGroup:
    """Layers that share one page table.

    Attributes:
      name: for messages and metrics.
      num_pages: pages of each layer's cache, the dummy page 0 included.
      page_size: tokens in a page; the same in every group of a cache.
      window: a token attends to itself and the window-1 tokens before it; None attends to all.
    """

    name: str
    num_pages: int
    page_size: int
    window: int | None = None


@dataclasses.dataclass(slots=True)
class SequencePages:
    """What the cache knows about one request. All its tables have the same length.

    Attributes:
      tables: for each group the page of each page_size tokens, 0 where it has left the window.
      num_released: for each group how many leading entries are 0.
      num_committed: leading pages that are full of tokens whose keys and values `finish` has seen computed.
      root: names what these pages depend on besides tokens.
      chain: nodes of the leading full pages, as far as they were needed; kept over a preemption.
      weight_version: the weights that computed the pages.
    """

    tables: list[list[int]]
    num_released: list[int]
    num_committed: int
    root: PrefixNode
    chain: list[PrefixNode]
    weight_version: int


@dataclasses.dataclass(slots=True)
class Prefix:
    """Computed pages that a request may start from: for each group its table over the first `num_pages` pages."""

    num_pages: int
    tables: list[list[int]]


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


class KVCache:
    """The pages of all groups and the requests' tables over them.

    The requests' fields `capacity`, `commit_at` and `pages` belong to this class.

    Args:
      groups: at least one; the same page size in each. Raises ConfigError otherwise.
      enable_prefix_caching: whether pages outlive their requests to be found by later ones.
      hash_page: the chained hash; replaced in tests to force collisions.
    """

    def __init__(
        self, groups: Sequence[CacheGroup], enable_prefix_caching: bool = True, hash_page: HashPage = hash_page
    ):
        if not groups:
            raise ConfigError("a cache needs at least one group")
        for group in groups:
            if group.page_size != groups[0].page_size:
                raise ConfigError(f"cache groups need one page size, got {[g.page_size for g in groups]}")
            if group.page_size < 1 or group.num_pages < 2 or (group.window is not None and group.window < 1):
                raise ConfigError(f"{group}: needs page_size >= 1, num_pages >= 2 (page 0 is a dummy) and window >= 1")
        self.groups = tuple(groups)
        self.page_size = groups[0].page_size
        self.enable_prefix_caching = enable_prefix_caching
        self.pools = [BlockPool(group.num_pages, i) for i, group in enumerate(groups)]
        self.weight_version = 0
        self.num_queried_tokens = 0  # tokens looked up in the prefix cache, at first admissions
        self.num_hit_tokens = 0  # of those, found
        self._index = PrefixIndex(len(groups), hash_page)
        # A token at a page's start needs this many pages before it; None: all.
        self._window_pages = [None if g.window is None else cdiv(g.window - 1, g.page_size) for g in groups]
        self._full = [g for g, window in enumerate(self._window_pages) if window is None]
        self._windows = [(g, window) for g, window in enumerate(self._window_pages) if window is not None]

    def unfit(self, num_tokens: int) -> str | None:
        """Why a request computing `num_tokens` tokens cannot run even alone, or None if it can."""
        for group, window_pages in zip(self.groups, self._window_pages, strict=True):
            need = cdiv(num_tokens, self.page_size)
            if window_pages is not None:
                need = min(need, window_pages + 1)
            if need > group.num_pages - 1:
                return (
                    f"{num_tokens} tokens need {need} pages of {self.page_size} tokens in cache group {group.name!r}, "
                    f"which has {group.num_pages - 1}"
                )
        return None

    # Prefixes

    def find_prefix(self, request: Request, leader: Request | None = None) -> Prefix:
        """The longest computed prefix to start from, by hash or from its leader's pages; takes no reference.

        At least one token is left to compute. A request that wants logprobs of its prompt must compute it all.
        """
        max_pages = (len(request.tokens) - 1) // self.page_size
        best = Prefix(0, [[] for _ in self.groups])
        if request.params.prompt_logprobs is not None:
            return best
        if self.enable_prefix_caching:
            best = self._find_by_hash(request, max_pages)
        if leader is not None:
            shared = self._share_with_leader(request, leader, max_pages)
            if shared is not None and shared.num_pages > best.num_pages:
                best = shared
        return best

    def name_pages(self, request: Request) -> None:
        """Hashes the pages of a request that nobody has seen yet, so that `find_prefix` need not. On any thread."""
        if self.enable_prefix_caching:
            root = root_content(self.weight_version, request.cache_salt, request.adapter)
            request.names = self._index.names(root, request.tokens, self.page_size)

    def _find_by_hash(self, request: Request, max_pages: int) -> Prefix:
        """A hit needs every page in a full group and just the last window's in a window group."""
        record = self._record(request)
        if not self._windows and len(self.groups) == 1:
            return self._find_in_one_group(request, record, max_pages)
        runs = [0] * len(self.groups)  # for each window group the pages present without a gap, up to the current one
        best = 0
        for i in range(max_pages):
            pages = self._node(request, record, i).pages
            if self._windows:
                if any(not pages[g] for g in self._full):
                    break
                for g, _ in self._windows:
                    runs[g] = runs[g] + 1 if pages[g] else 0
                if any(runs[g] < min(i + 1, window) for g, window in self._windows):
                    continue
            elif 0 in pages:
                break
            best = i + 1
        found = record.chain[:best]
        return Prefix(best, [self._last_window(g, [node.pages[g] for node in found]) for g in range(len(self.groups))])

    def _find_in_one_group(self, request: Request, record: SequencePages, max_pages: int) -> Prefix:
        """The usual case, made fast."""
        pages: list[int] = []
        for i in range(max_pages):
            node = record.chain[i] if i < len(record.chain) else self._node(request, record, i)
            page = node.pages[0]
            if not page:
                break
            pages.append(page)
        return Prefix(len(pages), [pages])

    def _share_with_leader(self, request: Request, leader: Request, max_pages: int) -> Prefix | None:
        """The leader's full prompt pages, unless it does not hold them or holds something else in them."""
        record = leader.pages
        num_pages = min(max_pages, leader.num_prompt_tokens // self.page_size)
        if record is None or record.num_committed < num_pages or record.weight_version != self.weight_version:
            return None
        num_tokens = num_pages * self.page_size
        if request.cache_salt != leader.cache_salt or request.adapter != leader.adapter:
            return None
        if request.tokens[:num_tokens] != leader.tokens[:num_tokens]:
            return None
        tables = [self._last_window(g, record.tables[g][:num_pages]) for g in range(len(self.groups))]
        for table, window in zip(tables, self._window_pages, strict=True):
            if 0 in (table if window is None else table[max(0, num_pages - window) :]):
                return None  # it has left the leader's window
        return Prefix(num_pages, tables)

    def _last_window(self, group: int, table: list[int]) -> list[int]:
        """Zeroes the entries before the window of the token that follows."""
        window = self._window_pages[group]
        if window is None or len(table) <= window:
            return table
        return [0] * (len(table) - window) + table[len(table) - window :]

    def _record(self, request: Request) -> SequencePages:
        record = request.pages
        if record is None or (record.weight_version != self.weight_version and not record.tables[0]):
            root = self._index.root(self.weight_version, request.cache_salt, request.adapter)
            record = SequencePages([[] for _ in self.groups], [0] * len(self.groups), 0, root, [], self.weight_version)
            request.pages = record
        return record

    def _node(self, request: Request, record: SequencePages, i: int) -> PrefixNode:
        """The name of the request's i-th page; its tokens must be known."""
        chain, size = record.chain, self.page_size
        while len(chain) <= i:
            n = len(chain)
            parent, names = chain[-1] if chain else record.root, request.names
            if names is not None and n < len(names.pages) and names.root == record.root.content:
                chain.append(self._index.node(parent, *names.pages[n]))
            else:
                chain.append(self._index.child(parent, request.tokens[n * size : (n + 1) * size]))
        return chain[i]

    # Pages of a request

    def missing_pages(self, request: Request, prefix: Prefix, headroom: int) -> list[int]:
        """For each group how many more pages must become available before `request` is admitted (0 or less: none).

        All its known tokens must fit (in a window group: one window) and `headroom` pages stay available.
        """
        missing = []
        for pool, window, table in zip(self.pools, self._window_pages, prefix.tables, strict=True):
            need = cdiv(len(request.tokens), self.page_size) - prefix.num_pages
            reused = [page for page in table if page]
            if window is not None:
                need = min(need, max(1, window + 1 - len(reused)))
            need += sum(pool.refs[page] == 0 for page in reused)  # taken out of the cached ones
            missing.append(need + headroom - pool.num_available)
        return missing

    def attach(self, request: Request, prefix: Prefix, updates: PageUpdates) -> None:
        """Starts the request's tables from `prefix`, taking references, and sets its `num_computed`."""
        record = self._record(request)
        for g, (pool, table) in enumerate(zip(self.pools, prefix.tables, strict=True)):
            record.tables[g] = table
            record.num_released[g] = released = table.count(0)
            for i in range(released, len(table)):
                pool.share(table[i])
                updates[g].append((request.slot, i, table[i]))
        record.num_committed = prefix.num_pages
        request.num_computed = request.capacity = prefix.num_pages * self.page_size
        request.commit_at = request.capacity + self.page_size

    def record_query(self, request: Request, prefix: Prefix) -> None:
        """Counts a first admission in the hit statistics."""
        request.num_cached = min(prefix.num_pages * self.page_size, request.num_prompt_tokens)
        self.num_queried_tokens += len(request.tokens)
        self.num_hit_tokens += prefix.num_pages * self.page_size

    def extend(self, request: Request, length: int, updates: PageUpdates) -> int:
        """Gives the request pages for up to `length` tokens after `num_computed`; returns for how many."""
        record, size, start = request.pages, self.page_size, request.num_computed
        assert record is not None
        end = start + length
        if end <= request.capacity:
            return length
        num_pages = len(record.tables[0])
        end = min(end, (num_pages + min(pool.num_available for pool in self.pools)) * size)
        if end <= start:
            return 0
        count = cdiv(end, size) - num_pages
        if count > 0:
            for pool, table, update in zip(self.pools, record.tables, updates, strict=True):
                pages = pool.allocate(count)
                table += pages
                update += [(request.slot, num_pages + i, page) for i, page in enumerate(pages)]
            request.capacity = (num_pages + count) * size
        return end - start

    def commit(self, request: Request, num_computed: int) -> None:
        """Registers the pages that are now full and releases those that have left their window.

        Called when `num_computed` reaches `commit_at`: the known tokens whose keys and values the device has really
        computed. Window groups thus release up to one page later than they could, but always in time for a new page.
        """
        record, size = request.pages, self.page_size
        assert record is not None
        num_full = num_computed // size
        if self.enable_prefix_caching and record.weight_version == self.weight_version:
            for i in range(record.num_committed, num_full):
                node = self._node(request, record, i)
                for pool, table in zip(self.pools, record.tables, strict=True):
                    if table[i]:
                        pool.name(table[i], node)
        record.num_committed = num_full
        request.commit_at = (num_full + 1) * size
        for g, group in enumerate(self.groups):
            if group.window is not None:
                self._release_before(g, record, (num_computed - group.window + 1) // size)

    def _release_before(self, g: int, record: SequencePages, keep: int) -> None:
        table = record.tables[g]
        for i in range(record.num_released[g], keep):
            self.pools[g].release(table[i])
            table[i] = 0
        record.num_released[g] = max(record.num_released[g], keep)

    def free(self, request: Request, forget: bool = False) -> None:
        """Drops all the request's references, its last page first: a cached prefix is evicted from its end.

        `forget`: nobody shall find these pages, for they may hold what broke the request (NaN).
        """
        record = request.pages
        if record is not None:
            for g, (pool, table) in enumerate(zip(self.pools, record.tables, strict=True)):
                for page in reversed(table[record.num_released[g] :]):
                    if forget:
                        pool.unname(page)
                    pool.release(page)
                record.tables[g] = []
                record.num_released[g] = 0
            record.num_committed = 0
        request.num_computed = request.capacity = 0

    def reset_prefix_cache(self) -> None:
        """Forgets every cached page, because the weights or the device's cache have changed.

        Running requests keep their pages, but these are neither registered nor shared any more.
        """
        self.weight_version += 1
        for pool in self.pools:
            pool.unname_all()

    # Figures and checks

    @property
    def num_used_pages(self) -> list[int]:
        """For each group the pages that requests refer to."""
        return [pool.num_referenced for pool in self.pools]

    @property
    def usage(self) -> float:
        """The largest share of referenced pages in any group, 0 to 1."""
        return max(pool.num_referenced / (pool.num_pages - 1) for pool in self.pools)

    def check(self, requests: Iterable[Request]) -> None:
        """Raises AssertionError unless references are exactly those of `requests` and every page is accounted for."""
        live = [request.pages for request in requests if request.pages is not None]
        for g, pool in enumerate(self.pools):
            pool.check()
            counts = Counter(page for record in live for page in record.tables[g] if page)
            assert {page: count for page, count in enumerate(pool.refs) if count} == counts, "references do not match"
            for record in live:
                table, released = record.tables[g], record.num_released[g]
                assert table.count(0) == released and not any(table[:released]), "holes in a page table"
                assert len(table) == len(record.tables[0]), "tables of different length"
