"""Bytes from and to HBM, FLOPs and collectives of a compiled program, counted from its optimized HLO.

What is counted:
  bytes: each instruction outside of fusions reads its operands and writes its result once, a loop's as often as it
    runs. Of an operand that is only sliced or gathered from, the parts taken; of a result that is an update in place,
    the update. Arrays in another memory than HBM (VMEM, SMEM) count as nothing: what fills them from HBM is an
    instruction of its own and counts there.
  FLOPs: products (dot, convolution), an addition with a multiplication as two; nothing else.
  Pallas kernels are opaque: what they move of the arrays that they page or stream through, and what they multiply, the
    caller says; all else that they take or give counts once, even if they take it as several operands. Of such arrays
    in VMEM they move nothing.

XLA's own `cost_analysis()` counts VMEM as memory, and each operand of a kernel whole.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping

from jaxllm.bench.floor import Work
from jaxllm.plan.hlo import Array, Computation, Instruction, Module

# Names for what is there already.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "domain"}
FREE |= {"add-dependency", "partition-id", "replica-id"}
FREE_CALLS = {"ConcatBitcast", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked"}
COLLECTIVES = {"all-reduce", "all-gather", "all-to-all", "reduce-scatter", "ragged-all-to-all"}
COLLECTIVES |= {"collective-permute", "collective-broadcast"}
SLICES = {"slice", "dynamic-slice", "gather"}
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # the operand that holds the update
VIEWS = {"bitcast", "reshape", "get-tuple-element", "tuple"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """What one instruction costs, all its runs together."""

    name: str
    opcode: str
    work: Work
    runs: int = 1


@dataclasses.dataclass(frozen=True)
class Count:
    """What a program costs.

    Attributes:
      entries: the instructions that cost anything, in their order.
      prefetched: bytes of those that fetch, at the program's end, what its next run would fetch first: in a loop of
        this program alone one of the two is not done.
    """

    entries: tuple[Entry, ...]
    prefetched: float

    @property
    def work(self) -> Work:
        """All of it, `prefetched` included."""
        return sum((entry.work for entry in self.entries), Work())

    def largest(self, count: int = 10) -> list[Entry]:
        """Those of the most bytes."""
        return sorted(self.entries, key=lambda entry: -entry.work.bytes)[:count]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices: its kind and what each gets."""

    kind: str
    shapes: tuple[Array, ...]


def _in_hbm(shape: Array) -> bool:
    return shape.space == 0


def _is_free(opcode: str) -> bool:
    return opcode in FREE or opcode.endswith(("-done", "call-update", "async-update"))


def _bytes(shapes: tuple[Array, ...]) -> int:
    return sum(shape.bytes for shape in shapes if _in_hbm(shape))


@dataclasses.dataclass(frozen=True)
class _Counter:
    module: Module
    kernels: Mapping[str, Work]
    is_paged: Callable[[str, Array], bool]
    loop_runs: int | None

    def computation(self, computation: Computation, runs: int) -> Iterator[Entry]:
        for instruction in computation.instructions.values():
            yield from self.instruction(computation, instruction, runs)

    def instruction(self, inside: Computation, instruction: Instruction, runs: int) -> Iterator[Entry]:
        opcode = instruction.opcode
        if _is_free(opcode):
            return
        if opcode == "while":
            times = runs * self.trips(inside, instruction)
            for name in instruction.called:
                yield from self.computation(self.module[name], times)
        elif opcode == "conditional":
            branches = [list(self.computation(self.module[name], runs)) for name in instruction.called]
            yield from max(branches, key=lambda branch: sum(entry.work.bytes for entry in branch))
        elif opcode in ("call", "call-start", "async-start"):
            for name in instruction.called:
                yield from self.computation(self.module[name], runs)
        else:
            moved, flops = self.moved(inside, instruction), self.flops(inside, instruction)
            if instruction.kernel is not None:
                work = self.kernel(inside, instruction)
                moved, flops = moved + work.bytes, flops + work.flops
            if moved or flops:
                yield Entry(instruction.name, opcode, Work(moved * runs, flops * runs), runs)

    def trips(self, inside: Computation, loop: Instruction) -> int:
        _, known, rest = loop.attributes.partition('"known_trip_count":{"n":"')
        if known:
            return int(rest.partition('"')[0])
        condition, body = (
            self.module[(loop.attribute(name) or "").removeprefix("%")] for name in ("condition", "body")
        )
        counted = _counted_trips(inside, loop, condition, body)
        if counted is not None:
            return counted
        if self.loop_runs is None:
            raise ValueError(f"{loop.name}: how often this loop runs is not known: say loop_runs")
        return self.loop_runs

    def kernel(self, inside: Computation, instruction: Instruction) -> Work:
        name = instruction.kernel or ""
        if name not in self.kernels:
            raise ValueError(f"{instruction.name}: what the kernel {name!r} costs is not known: say it in kernels")
        work = self.kernels[name]
        paged = [
            shape for operand in instruction.operands for shape in inside[operand].shapes if self.is_paged(name, shape)
        ]
        if paged and not any(map(_in_hbm, paged)):  # fetched before, by instructions that count themselves
            return Work(0.0, work.flops)
        return work

    def moved(self, inside: Computation, instruction: Instruction) -> float:
        """Bytes that an instruction reads from and writes to HBM."""
        opcode = instruction.opcode
        operands = [inside[name].shapes for name in instruction.operands]
        if opcode in ("copy-start", "slice-start"):  # (to, from, …) and ((from), to, …)
            to = instruction.shapes[0 if opcode == "copy-start" else 1]
            size = to.elements * to.bits // 8 if opcode == "slice-start" else to.bytes
            return size * (_in_hbm(to) + _in_hbm(operands[0][0]))
        if opcode == "custom-call":
            if instruction.attribute("custom_call_target") in FREE_CALLS:
                return 0
            taken = [inside[name].shapes for name in dict.fromkeys(instruction.operands)]
            arrays = [*itertools.chain(*taken), *instruction.shapes]
            kernel = instruction.kernel or ""
            return _bytes(tuple(shape for shape in arrays if not self.is_paged(kernel, shape)))
        if opcode == "fusion":
            fused = self.module[instruction.called[0]]
            read = sum(
                min(self.taken(fused, parameter), shapes[0].bytes)
                for parameter, shapes in zip(fused.parameters, operands, strict=True)
                if len(shapes) == 1 and _in_hbm(shapes[0])
            )
            return read + self.written(fused, fused.root, instruction.shapes)
        if opcode in SLICES:
            result = instruction.shape
            return result.bytes * (_in_hbm(operands[0][0]) + _in_hbm(result)) + sum(map(_bytes, operands[1:]))
        if opcode in UPDATES:
            update = operands[UPDATES[opcode]][0]
            return update.bytes * (_in_hbm(instruction.shape) + _in_hbm(update))
        results = instruction.shapes
        if opcode.removesuffix("-start") in COLLECTIVES:
            results = _results(instruction, len(operands))
        return sum(map(_bytes, operands)) + _bytes(results)

    def taken(self, fused: Computation, name: str, of_result: float = math.inf) -> float:
        """Bytes of a value in a fusion that are read; `of_result`: those of the fusion's result that are."""
        whole = fused[name].shapes[0].bytes
        total = of_result if name == fused.root else 0.0
        for user, index in fused.users[name]:
            if user.opcode in SLICES and index == 0:
                total += user.shape.bytes
            elif user.opcode in UPDATES and index == 0:
                continue  # in place
            elif user.opcode in VIEWS or user.attribute("custom_call_target") in FREE_CALLS:
                total += self.taken(fused, user.name, of_result)
            elif user.opcode == "fusion":
                inner = self.module[user.called[0]]
                total += self.taken(inner, inner.parameters[index], self.taken(fused, user.name, of_result))
            else:
                return whole
        return min(total, whole)

    def written(self, fused: Computation, name: str, shapes: tuple[Array, ...]) -> float:
        """Bytes of a fusion's result, whose arrays are `shapes`, that go to HBM."""
        instruction = fused[name]
        if instruction.opcode == "tuple":
            sizes = [len(fused[operand].shapes) for operand in instruction.operands]
            starts = [0, *itertools.accumulate(sizes)]
            return sum(
                self.written(fused, operand, shapes[start : start + size])
                for operand, start, size in zip(instruction.operands, starts, sizes)
            )
        if instruction.opcode == "bitcast" and len(shapes) == 1:
            return self.written(fused, instruction.operands[0], shapes)
        if instruction.opcode == "fusion":
            inner = self.module[instruction.called[0]]
            return self.written(inner, inner.root, shapes)
        if instruction.opcode in UPDATES and _in_hbm(shapes[0]):
            return fused[instruction.operands[UPDATES[instruction.opcode]]].shape.bytes
        return _bytes(shapes)

    def flops(self, inside: Computation, instruction: Instruction) -> float:
        """Of all products in an instruction."""
        if instruction.opcode == "fusion":
            fused = self.module[instruction.called[0]]
            return sum(self.flops(fused, each) for each in fused.instructions.values())
        if instruction.opcode == "dot":
            lhs = inside[instruction.operands[0]].shape
            depth = math.prod(lhs.dims[axis] for axis in instruction.integers("lhs_contracting_dims"))
            return 2.0 * instruction.shape.elements * depth
        if instruction.opcode == "convolution":
            lhs, rhs = (inside[name].shape for name in instruction.operands)
            return _convolution_flops(instruction, lhs, rhs)
        return 0.0


def _counted_trips(inside: Computation, loop: Instruction, condition: Computation, body: Computation) -> int | None:
    """Of a loop that counts up by one from a constant to below a constant; None for others."""
    test = condition[condition.root]
    if test.opcode != "compare" or test.attribute("direction") != "LT":
        return None
    counter, end = condition[test.operands[0]], _constant(condition, test.operands[1])
    index = counter.attribute("index")
    state, following = inside[loop.operands[0]], body[body.root]
    if end is None or index is None or state.opcode != "tuple" or following.opcode != "tuple":
        return None
    start, step = _constant(inside, state.operands[int(index)]), body[following.operands[int(index)]]
    if start is None or step.opcode != "add":
        return None
    is_counter = [body[name].attribute("index") == index for name in step.operands]
    steps = [_constant(body, name) for name, is_it in zip(step.operands, is_counter) if not is_it]
    return max(0, end - start) if steps == [1] else None


def _constant(inside: Computation, name: str) -> int | None:
    instruction = inside[name]
    if instruction.opcode == "copy":
        return _constant(inside, instruction.operands[0])
    is_integer = instruction.opcode == "constant" and instruction.literal.lstrip("-").isdigit()
    return int(instruction.literal) if is_integer else None


def _results(collective: Instruction, num_operands: int) -> tuple[Array, ...]:
    """What a collective gives: the asynchronous ones but all-reduce give their operands and two more words besides."""
    kind = collective.opcode
    if not kind.endswith("-start") or kind == "all-reduce-start":
        return collective.shapes
    return collective.shapes[num_operands : 2 * num_operands]


def _convolution_flops(convolution: Instruction, lhs: Array, rhs: Array) -> float:
    """Two for each product of an input and a kernel element that both exist, as in XLA's HloCostAnalysis."""
    labels = (convolution.attribute("dim_labels") or "").replace("->", "_").split("_")
    inputs, kernel, outputs = (
        dict(zip(each, shape.dims)) for each, shape in zip(labels, (lhs, rhs, convolution.shape))
    )
    window = dict(part.split("=") for part in (convolution.attribute("window") or "").split())
    spatial = sorted(label for label in kernel if label.isdigit())

    def numbers(name: str, default: str) -> list[str]:
        return window[name].split("x") if name in window else [default] * len(spatial)

    sizes, strides, dilations, bases = (
        list(map(int, numbers(name, "1"))) for name in ("size", "stride", "rhs_dilate", "lhs_dilate")
    )
    low = [int(each.split("_")[0]) for each in numbers("pad", "0_0")]
    products = 1
    for axis, label in enumerate(spatial):
        extent = (inputs[label] - 1) * bases[axis] + 1
        valid = 0
        for tap in range(sizes[axis]):
            offset = tap * dilations[axis] - low[axis]
            places = (offset + out * strides[axis] for out in range(outputs[label]))
            valid += sum(0 <= place < extent and place % bases[axis] == 0 for place in places)
        products *= valid
    batch_groups = int(convolution.attribute("batch_group_count") or 1)
    return 2.0 * products * outputs["b"] * outputs["f"] * kernel["i"] * (inputs["b"] // batch_groups) / inputs["b"]


def count(
    module: Module,
    *,
    kernels: Mapping[str, Work] | None = None,
    is_paged: Callable[[str, Array], bool] = lambda kernel, shape: False,
    loop_runs: int | None = None,
) -> Count:
    """Counts a program on one of its devices.

    Args:
      kernels: by a Pallas kernel's name what it moves of the arrays that it pages through, and its FLOPs.
      is_paged: whether an array that the kernel of this name takes or gives is such a one.
      loop_runs: how often loops run of which the compiler does not know it.

    Raises:
      ValueError: a kernel or a loop of which nothing is known.
    """
    entry = module[module.entry]
    counter = _Counter(module, kernels or {}, is_paged, loop_runs)
    found = tuple(counter.computation(entry, 1))
    sizes = {each.name: each.work.bytes for each in found}
    return Count(found, sum(sizes.get(name, 0.0) for name in _end_prefetches(entry)))


def _end_prefetches(entry: Computation) -> Iterator[str]:
    """Copies of a parameter that nothing in the program uses: they are there for its next run."""
    first = {each.operands[0] for each in entry.instructions.values() if each.attribute("cross_program_prefetch_index")}
    for each in entry.instructions.values():
        if each.opcode == "copy-start" and each.operands[0] in first:
            done = [user.name for user, _ in entry.users[each.name]]
            if not any(entry.users[name] for name in done):
                yield each.name


def collectives(module: Module) -> list[Collective]:
    """Every collective of a program, in all its computations; one in a loop once."""
    found = []
    for computation in module.computations.values():
        for each in computation.instructions.values():
            kind = each.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                found.append(Collective(kind, _results(each, len(each.operands))))
    return found


def copies(module: Module, parameters: Collection[int]) -> list[str]:
    """Instructions that put what an entry parameter of these numbers holds into HBM once more, as it lies or in another
    order. What a fusion with a product writes is no copy; kernels work in place."""
    entry = module[module.entry]
    found: list[str] = []
    for number in parameters:
        name = entry.parameters[number]
        found += _copies_of(module, entry, name, entry[name].shape.elements)
    return found


def _copies_of(module: Module, inside: Computation, name: str, elements: int) -> Iterator[str]:
    for user, index in inside.users[name]:
        results = {"copy-start": user.shapes[:1], "slice-start": user.shapes[1:2]}.get(user.opcode, user.shapes)
        if user.opcode in ("call-start", "async-start"):  # operands come first
            results = user.shapes[len(user.operands) :]
        same = any(shape.elements == elements for shape in results)
        if user.opcode in ("bitcast", "get-tuple-element", "custom-call") or _is_update(module, user, index):
            if same:  # the same array under another name, or changed in place
                yield from _copies_of(module, inside, user.name, elements)
        elif not _is_free(user.opcode):
            copied = any(shape.elements == elements and _in_hbm(shape) for shape in results)
            if copied and not (user.opcode == "fusion" and _multiplies(module, module[user.called[0]])):
                yield f"{user.name} of {name}"


def _is_update(module: Module, instruction: Instruction, index: int) -> bool:
    """Whether the operand of this index is updated, and nothing else happens to it."""
    if instruction.opcode in UPDATES:
        return index == 0
    if instruction.opcode != "fusion":
        return False
    fused = module[instruction.called[0]]
    users = fused.users[fused.parameters[index]]
    return bool(users) and all(_is_update(module, user, inner) for user, inner in users)


def _multiplies(module: Module, fused: Computation) -> bool:
    return any(
        each.opcode in ("dot", "convolution")
        or (each.opcode == "fusion" and _multiplies(module, module[each.called[0]]))
        for each in fused.instructions.values()
    )
