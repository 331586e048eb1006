"""Results on a terminal."""

import rich.table
from rich.console import Console

from jaxllm.bench.facts import Facts
from jaxllm.bench.results import Part
from jaxllm.bench.session import Session
from jaxllm.bench.tables import tables_of


def console() -> Console:
    """One that is wide enough for the tables where its output goes to a file."""
    found = Console()
    return found if found.is_terminal else Console(width=max(found.width, 180))


def print_facts(console: Console, facts: Facts) -> None:
    """What was measured on."""
    console.print(
        f"{facts.model} in {facts.dtype} on {facts.num_devices} × {facts.device}", style="bold", highlight=False
    )
    if facts.ceilings is not None:
        console.print(
            f"measured ceilings: {facts.ceilings.bandwidth / 1e9:,.0f} GB/s of memory, "
            f"{facts.ceilings.flops / 1e12:,.2f} TFLOP/s of a GEMM"
        )


def print_session(console: Console, session: Session) -> None:
    """What an engine is measured on, and how long it took to be ready."""
    print_facts(console, session.facts)
    console.print(f"ready in {session.start_seconds:.1f} s, everything compiled {session.warm_up_seconds:.1f} s later")


def print_part(console: Console, part: Part) -> None:
    """A part's tables with their notes."""
    for table in tables_of(part.part, part.facts, part.results):
        drawn = rich.table.Table(title=table.title, title_justify="left")
        for number, name in enumerate(table.columns):
            drawn.add_column(name, justify="right" if number else "left", overflow="fold")
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)
        for note in table.notes:
            console.print(note, style="dim", highlight=False, markup=False)
