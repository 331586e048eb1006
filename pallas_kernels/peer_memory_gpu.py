"""Reading, writing and signalling in other GPUs' memory by address, from within Mosaic GPU kernels.

Pallas' remote references cost the host at every launch: Mosaic's call lets all devices' threads meet and exchanges the
addresses of all its arguments, some 50 µs each time, and is no part of a CUDA graph. What is here needs addresses that
were exchanged once.

An address is two int32, its lower and its upper half; offsets are int32, in bytes. All accesses are PTX with side
effects, which the compiler leaves in their order. A warpgroup does each together.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

Address = tuple[jax.Array, jax.Array]  # lower and upper half

LANES = 128  # threads of a warpgroup
LIMIT = 60_000_000_000  # nanoseconds to wait for other devices; compiling or loading of theirs is not in it
_WORD = 4  # bytes
_SCALAR = plgpu.Layout.WG_SPLAT(())
_PLACE = _SCALAR, _SCALAR, _SCALAR  # the types of an address' halves and of an offset
_VECTOR = {1: "", 2: ".v2", 4: ".v4"}  # of words that a thread accesses at once


def push(values: jax.Array, layout: Any, address: Address, offset: jax.Array) -> None:
    """Writes an array, as `fetch` with the same layout reads it.

    Args:
      layout: that of `values`, a `plgpu.Layout.WG_STRIDED`; a thread's pieces have 4, 8 or 16 bytes.
    """

    @plgpu.inline_mgpu(arg_types=(layout, *_PLACE))
    def _push(_, values, *place):
        start = _start(*place)
        for number, register in enumerate(values.registers.flat):
            words = _words(register)
            names = ", ".join(f"${1 + at}" for at in range(len(words)))
            utils.inline_ptx(
                f"st.relaxed.sys.global{_VECTOR[len(words)]}.b32 [$0], {{{names}}};",
                _piece(start, number, len(words) * _WORD),
                *words,
            )

    _push(values, *address, offset)


def fetch(shape: tuple[int, ...], dtype: Any, layout: Any, address: Address, offset: jax.Array) -> jax.Array:
    """What `push` has written, past the first level of caches."""
    out = plgpu.ShapeDtypeStruct(shape, dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=_PLACE, return_type=out)
    def _fetch(_, *place):
        start, kind = _start(*place), layout.to_mgpu()
        piece = kind.registers_element_type(utils.dtype_to_ir_type(jnp.dtype(dtype)))
        count = utils.bitwidth(piece) // (8 * _WORD)
        names, registers = ", ".join(f"${at}" for at in range(count)), []
        for number in range(kind.registers_shape(shape)[0]):
            words = utils.inline_ptx(
                f"ld.relaxed.sys.global{_VECTOR[count]}.b32 {{{names}}}, [${count}];",
                _piece(start, number, count * _WORD),
                result_types=[_int(32)] * count,
                has_side_effects=True,
            )
            joined = vector.from_elements(ir.VectorType.get((count,), _int(32)), list(words))
            registers.append(vector.bitcast(piece, joined))
        return mgpu.FragmentedArray(_registers=np.array(registers, object), _layout=kind, _is_signed=None)

    return _fetch(*address, offset)


def signal(peers_ref: Any, count: int, offset: jax.Array, value: jax.Array) -> None:
    """Sets an int32 in the memory of each of `count` peers, once all that this warpgroup has pushed or fetched before
    is done for whoever sees it.

    Args:
      peers_ref: int32[N, 2] in global memory, the addresses; `count` is at most 32.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR, _SCALAR))
    def _signal(_, peers_ref, offset, value):
        table = llvm.ptrtoint(_int(64), utils.memref_ptr(peers_ref))
        utils.warpgroup_barrier()
        with _of_lane(count) as lane:  # side by side: each waits until what was written before has arrived
            at = arith.addi(table, arith.extui(_int(64), arith.muli(lane, utils.c(8, _int(32)))))
            address = utils.inline_ptx(
                "ld.relaxed.sys.global.b64 $0, [$1];", at, result_types=_int(64), has_side_effects=True
            )
            target = arith.addi(address, arith.extui(_int(64), _scalar(offset)))
            utils.inline_ptx("st.release.sys.global.b32 [$0], $1;", target, _scalar(value))

    _signal(peers_ref, offset, value)


def wait(address: Address, offset: jax.Array, stride: int, count: int, value: jax.Array) -> None:
    """Waits for each of `count` int32, `stride` bytes from one to the next, to be `value`, at most 32. Where that takes
    longer than LIMIT the kernel traps: a device whose program has failed to start would be waited for without end."""

    @plgpu.inline_mgpu(arg_types=(*_PLACE, _SCALAR))
    def _wait(_, *arguments):
        *place, value = arguments
        start, wanted = _start(*place), _scalar(value)
        with _of_lane(count) as lane:
            at = arith.addi(start, arith.extui(_int(64), arith.muli(lane, utils.c(stride, _int(32)))))
            since = _nanoseconds()
            loop = scf.WhileOp([], [])
            with ir.InsertionPoint(loop.before.blocks.append()):
                scf.condition(arith.cmpi(arith.CmpIPredicate.ne, _load_acquire(at), wanted), [])
            with ir.InsertionPoint(loop.after.blocks.append()):
                waited = arith.subi(_nanoseconds(), since)
                is_lost = arith.cmpi(arith.CmpIPredicate.ugt, waited, utils.c(LIMIT, _int(64)))
                utils.inline_ptx("trap;", predicate=is_lost)
                scf.yield_([])
        utils.warpgroup_barrier()

    _wait(*address, offset, value)


def read(address: Address, offset: jax.Array) -> jax.Array:
    """int32 []."""

    @plgpu.inline_mgpu(arg_types=_PLACE, return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=_SCALAR))
    def _read(_, *place):
        return mgpu.FragmentedArray.splat(_load_acquire(_start(*place)), (), is_signed=True)

    return _read(*address, offset)


def leave(address: Address, counter: jax.Array, blocks: int, offset: jax.Array, value: jax.Array) -> None:
    """The last of `blocks` blocks to come here sets the int32 at `offset` to `value`, and the counter back to 0."""

    @plgpu.inline_mgpu(arg_types=(*_PLACE, _SCALAR, _SCALAR))
    def _leave(_, low, high, counter, offset, value):
        counts, at, new = _start(low, high, counter), _start(low, high, offset), _scalar(value)
        utils.warpgroup_barrier()
        with utils.single_thread(scope=utils.ThreadSubset.WARPGROUP):
            before = utils.inline_ptx(
                "atom.acq_rel.gpu.global.add.u32 $0, [$1], $2;",
                counts,
                utils.c(1, _int(32)),
                result_types=_int(32),
                has_side_effects=True,
            )
            is_last = arith.cmpi(arith.CmpIPredicate.eq, before, utils.c(blocks - 1, _int(32)))
            utils.inline_ptx("st.relaxed.sys.global.b32 [$0], $1;", counts, utils.c(0, _int(32)), predicate=is_last)
            utils.inline_ptx("st.relaxed.sys.global.b32 [$0], $1;", at, new, predicate=is_last)

    _leave(*address, counter, offset, value)


def _int(bits: int) -> ir.Type:
    return ir.IntegerType.get_signless(bits)


def _scalar(value: Any) -> ir.Value:
    return value.registers.flat[0]


@contextlib.contextmanager
def _of_lane(count: int) -> Iterator[ir.Value]:
    """For the first `count` threads of the warpgroup, each with its number."""
    lane = arith.remui(utils.thread_idx(), utils.c(LANES, _int(32)))
    is_chosen = arith.cmpi(arith.CmpIPredicate.ult, lane, utils.c(count, _int(32)))
    chosen = scf.IfOp(is_chosen)  # type: ignore[call-arg]
    with ir.InsertionPoint(chosen.then_block):
        yield lane
        scf.yield_([])


def _nanoseconds() -> ir.Value:
    return utils.inline_ptx("mov.u64 $0, %globaltimer;", result_types=_int(64), has_side_effects=True)


def _start(low: Any, high: Any, offset: Any) -> ir.Value:
    """int64 of an address and an offset."""
    wide = [arith.extui(_int(64), _scalar(part)) for part in (low, high, offset)]
    upper = arith.shli(wide[1], utils.c(32, _int(64)))
    return arith.addi(arith.ori(upper, wide[0]), wide[2])


def _piece(start: ir.Value, number: int, size: int) -> ir.Value:
    """Where this thread's `number`-th piece of `size` bytes lies."""
    lane = arith.remui(utils.thread_idx(), utils.c(LANES, _int(32)))
    within = arith.addi(arith.muli(lane, utils.c(size, _int(32))), utils.c(number * LANES * size, _int(32)))
    return arith.addi(start, arith.extui(_int(64), within))


def _words(register: ir.Value) -> list[ir.Value]:
    """A vector as int32."""
    count = utils.bitwidth(register.type) // (8 * _WORD)
    joined = vector.bitcast(ir.VectorType.get((count,), _int(32)), register)
    return [llvm.extractelement(joined, utils.c(at, _int(32))) for at in range(count)]


def _load_acquire(at: ir.Value) -> ir.Value:
    return utils.inline_ptx("ld.acquire.sys.global.b32 $0, [$1];", at, result_types=_int(32), has_side_effects=True)
