"""The pages of one cache group: free, referenced, or cached (unreferenced but still named, ready to be found again)."""

from collections import OrderedDict

from jaxllm.core.prefix import PrefixNode


class BlockPool:
    """Hands out pages 1 .. num_pages-1 and counts their references. Page 0 is the dummy that padding writes to.

    A page is in exactly one state: free (no reference, no name), referenced (by one or more requests, named or not) or
    cached (no reference, named). A new page comes from the free ones, else the least recently released cached page
    loses its name. Every operation is O(1), the removal of a cached page from the middle of the LRU order included.
    """

    def __init__(self, num_pages: int, group: int = 0):
        self.num_pages = num_pages
        self.group = group
        self.refs = [0] * num_pages
        self.nodes: list[PrefixNode | None] = [None] * num_pages
        self._free = list(range(num_pages - 1, 0, -1))  # a stack: the hottest page is reused first
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently released first

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can hand out."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_referenced(self) -> int:
        return self.num_pages - 1 - len(self._free) - len(self._cached)

    def allocate(self, count: int) -> list[int]:
        """Returns `count` pages with one reference each. Raises IndexError if fewer are available."""
        free, refs = self._free, self.refs
        if count > len(free) + len(self._cached):
            raise IndexError(f"{count} pages wanted, {self.num_available} available")
        pages = []
        for _ in range(count):
            page = free.pop() if free else self._evict()
            refs[page] = 1
            pages.append(page)
        return pages

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        self.unname(page)
        return page

    def unname(self, page: int) -> None:
        """Lets nobody find a referenced page any more."""
        node = self.nodes[page]
        if node is not None:
            node.pages[self.group] = 0
            self.nodes[page] = None

    def share(self, page: int) -> None:
        """Adds a reference to a referenced or cached page."""
        if self.refs[page] == 0:
            del self._cached[page]
        self.refs[page] += 1

    def release(self, page: int) -> None:
        """Drops a reference; the last one makes the page cached if it is named, else free."""
        refs = self.refs
        if refs[page] <= 0:
            raise ValueError(f"page {page} released without a reference")
        refs[page] -= 1
        if refs[page] == 0:
            if self.nodes[page] is None:
                self._free.append(page)
            else:
                self._cached[page] = None

    def name(self, page: int, node: PrefixNode) -> None:
        """Lets a referenced page be found under `node`, unless either is already taken."""
        if self.nodes[page] is None and not node.pages[self.group]:
            self.nodes[page] = node
            node.pages[self.group] = page

    def unname_all(self) -> None:
        """Forgets all names; cached pages become free, referenced ones stay with their requests."""
        for page in range(1, self.num_pages):
            self.unname(page)
        self._free.extend(self._cached)
        self._cached.clear()

    def check(self) -> None:
        """Raises AssertionError unless free + referenced + cached == total and each page is in the state it claims."""
        free, cached = set(self._free), set(self._cached)
        referenced = {page for page, count in enumerate(self.refs) if count}
        assert min(self.refs) >= 0, "negative reference count"
        assert len(free) == len(self._free), "a page is free twice"
        assert len(free) + len(cached) + len(referenced) == self.num_pages - 1, "a page is lost or in two states"
        assert free | cached | referenced == set(range(1, self.num_pages)), "a page is lost or in two states"
        for page, node in enumerate(self.nodes):
            assert node is None or node.pages[self.group] == page, f"page {page} and its name disagree"
            assert (node is None) <= (page not in cached), f"cached page {page} has no name"
            assert (node is not None) <= (page not in free), f"free page {page} has a name"
