"""Optimized HLO as values: what `compiled.as_text()` says of computations, instructions, shapes and layouts.

Only what the accounting in `hlo_cost.py` needs is read. Sizes are those in memory: arrays are padded to the tiles of
their layout (https://openxla.org/xla/tiled_layout).
"""

import dataclasses
import functools
import math
import re

BITS = {"pred": 8, "bf16": 16, "token": 0}  # all others say it in their names
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_INSTRUCTION = re.compile(r"\s*(ROOT )?%([\w.\-]+) = (.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")


@dataclasses.dataclass(frozen=True)
class Array:
    """A shape with its layout.

    Attributes:
      dims: logical.
      minor_to_major: dimensions, the fastest first.
      tiles: of the layout, the outermost first.
      space: the memory that it lies in: 0 is the device's main memory, HBM; on a TPU 1 is VMEM, others are smaller.
    """

    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...] = ()
    tiles: tuple[tuple[int, ...], ...] = ()
    space: int = 0

    @property
    def bits(self) -> int:
        """Of an element."""
        if self.dtype in BITS:
            return BITS[self.dtype]
        digits = re.match(r"[a-z]+(\d+)", self.dtype)
        if digits is None:
            raise ValueError(f"{self.dtype}: the size of this HLO type is unknown")
        return int(digits[1])

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """In memory, padding included."""
        dims = [self.dims[axis] for axis in reversed(self.minor_to_major)] if self.minor_to_major else list(self.dims)
        for tile in self.tiles:
            dims = [1] * (len(tile) - len(dims)) + dims
            outer, inner = dims[: len(dims) - len(tile)], dims[len(dims) - len(tile) :]
            dims = [*outer, *(-(-size // part) for size, part in zip(inner, tile, strict=True)), *tile]
        return -(-math.prod(dims) * self.bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      shapes: of the result's arrays, those of nested tuples one after another.
      operands: names in the same computation.
      attributes: the rest of the line, as it stands.
    """

    name: str
    opcode: str
    shapes: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    literal: str = ""

    @property
    def shape(self) -> Array:
        """Of a result that is one array."""
        if len(self.shapes) != 1:
            raise ValueError(f"{self.name}: the result is a tuple of {len(self.shapes)} arrays")
        return self.shapes[0]

    def attribute(self, name: str) -> str | None:
        """The text of an attribute such as `kind` or `dim_labels`; of one in braces what is between them."""
        found = re.search(rf"(?:^|, ){name}=(?:\{{([^}}]*)\}}|\"([^\"]*)\"|([^,\s]+))", self.attributes)
        return next((group for group in found.groups() if group is not None), None) if found else None

    def integers(self, name: str) -> tuple[int, ...]:
        """An attribute that lists integers; empty where it is absent."""
        return tuple(map(int, re.findall(r"-?\d+", self.attribute(name) or "")))

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that it runs: a fusion's, a call's, a loop's condition and body, branches."""
        found: list[str] = []
        for name in ("calls", "called_computations", "to_apply", "condition", "body"):
            found += _NAME.findall(self.attribute(name) or "")
        for name in ("branch_computations", "true_computation", "false_computation"):
            found += _NAME.findall(self.attribute(name) or "")
        return tuple(found)

    @property
    def kernel(self) -> str | None:
        """The name of a Pallas kernel on TPU, if this calls one."""
        if self.opcode != "custom-call" or self.attribute("custom_call_target") != "tpu_custom_call":
            return None
        return re.sub(r"(\.\d+|\.refs_\d+_|\.clone)+$", "", self.name)


@dataclasses.dataclass(frozen=True, eq=False)
class Computation:
    """Instructions by name, in their order; the last that is marked ROOT is the result."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Who takes an instruction's result, and as which operand."""
        found: dict[str, list[tuple[Instruction, int]]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for index, operand in enumerate(instruction.operands):
                found[operand].append((instruction, index))
        return found

    @functools.cached_property
    def parameters(self) -> list[str]:
        """Names of the parameters by their numbers."""
        found = [each for each in self.instructions.values() if each.opcode == "parameter"]
        return [each.name for each in sorted(found, key=lambda each: int(each.literal))]


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
    """A program."""

    computations: dict[str, Computation]
    entry: str

    def __getitem__(self, name: str) -> Computation:
        return self.computations[name]


def parse_shapes(text: str) -> tuple[Array, ...]:
    """The arrays of `f32[2,3]{1,0:T(8,128)S(1)}` or of a tuple of such."""
    return tuple(_array(*found) for found in _ARRAY.findall(text))


def _array(dtype: str, dims: str, layout: str) -> Array:
    order, _, rest = layout.partition(":")
    tiles = re.match(r"T((?:\([\d,]*\))+)", rest)
    space = re.search(r"S\((\d+)\)", rest)
    return Array(
        dtype,
        tuple(int(size.removeprefix("<=")) for size in dims.split(",") if size),
        tuple(int(axis) for axis in order.split(",") if axis),
        tuple(tuple(map(int, tile.split(","))) for tile in re.findall(r"\(([\d,]+)\)", tiles[1])) if tiles else (),
        int(space[1]) if space else 0,
    )


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"HLO text with open parentheses: {text[:80]!r}")


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shapes, rest = text[:end], text[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening) if not rest.startswith("constant") else rest.index(")")
    inside = rest[opening + 1 : closing]
    return Instruction(
        name,
        rest[:opening],
        parse_shapes(shapes),
        tuple(_NAME.findall(inside)),
        rest[closing + 1 :].removeprefix(", "),
        inside,
    )


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`.

    Raises:
      ValueError: text that is no HLO module.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    body: dict[str, Instruction] | None = None
    name = root = ""
    for line in text.splitlines():
        if body is None:
            if match := _COMPUTATION.match(line):
                name, body, root = match[2], {}, ""
                entry = name if match[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, body, root or next(reversed(body)))
            body = None
        elif match := _INSTRUCTION.match(line):
            body[match[2]] = _instruction(match[2], match[3])
            root = match[2] if match[1] else root
    if entry not in computations:
        raise ValueError("no HLO module: it has no ENTRY computation")
    return Module(computations, entry)
