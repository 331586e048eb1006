"""Names for full pages: a chained hash finds one, equality of tokens and of everything before them verifies it."""

import dataclasses
import hashlib
import struct
from collections.abc import Callable, Sequence
from weakref import WeakValueDictionary

HashPage = Callable[[bytes, bytes], bytes]


def hash_page(parent: bytes, content: bytes) -> bytes:
    """The chained hash: 16 bytes, the same in every process."""
    return hashlib.blake2b(parent + content, digest_size=16).digest()


@dataclasses.dataclass(slots=True, eq=False, weakref_slot=True)
class PrefixNode:
    """The name of one page's tokens after all the tokens before them.

    Attributes:
      hash: chained over the root and every page up to this one.
      content: this page's tokens as int32; at a root, what no other root may share pages with.
      parent: the node of the page before; None at a root.
      pages: for each cache group the page that holds these keys and values, 0 if none does.
    """

    hash: bytes
    content: bytes
    parent: "PrefixNode | None"
    pages: list[int]


@dataclasses.dataclass(slots=True, frozen=True)
class PageNames:
    """The hash and the content of a prompt's full pages, made ahead of the first look for them.

    Attributes:
      root: content of the root node that the hashes are chained from; under another they are void.
      pages: (hash, content) of each.
    """

    root: bytes
    pages: list[tuple[bytes, bytes]]


def root_content(weight_version: int, salt: str, adapter: str | None) -> bytes:
    """What a root node stands for."""
    return repr((weight_version, salt, adapter)).encode()


class PrefixIndex:
    """At most one findable node for one prefix: equal prefixes share a node, so `is` on parents compares whole chains.

    Nodes live as long as a page, a request or a child refers to them. Should two different prefixes hash alike, the
    later one gets a node that nobody else finds: a collision costs a miss, never a wrong hit.
    """

    def __init__(self, num_groups: int, hash_page: HashPage = hash_page):
        self._num_groups = num_groups
        self._hash_page = hash_page
        self._nodes: WeakValueDictionary[bytes, PrefixNode] = WeakValueDictionary()

    def root(self, weight_version: int, salt: str, adapter: str | None) -> PrefixNode:
        content = root_content(weight_version, salt, adapter)
        return self.node(None, self._hash_page(b"", content), content)

    def child(self, parent: PrefixNode, tokens: Sequence[int]) -> PrefixNode:
        content = _packed(tokens)
        return self.node(parent, self._hash_page(parent.hash, content), content)

    def names(self, root: bytes, tokens: Sequence[int], page_size: int) -> PageNames:
        """What `child` would compute for each full page. Touches no node: any thread may call it."""
        pages, key = [], self._hash_page(b"", root)
        for end in range(page_size, len(tokens) + 1, page_size):
            content = _packed(tokens[end - page_size : end])
            key = self._hash_page(key, content)
            pages.append((key, content))
        return PageNames(root, pages)

    def node(self, parent: PrefixNode | None, key: bytes, content: bytes) -> PrefixNode:
        """The node of this content after `parent`; `key` is its chained hash."""
        found = self._nodes.get(key)
        if found is not None and found.parent is parent and found.content == content:
            return found
        node = PrefixNode(key, content, parent, [0] * self._num_groups)
        if found is None:
            self._nodes[key] = node
        return node


def _packed(tokens: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(tokens)}i", *tokens)
