"""The measured part of a page of documents, written from files of results.

It stands between two comments, `BEGIN` and `END`; what is before and after is written by hand and left alone.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from jaxllm.bench.facts import Facts
from jaxllm.bench.results import KINDS, Part, stem_of
from jaxllm.bench.tables import Table, tables_of
from jaxllm.errors import ConfigError

BEGIN = "<!-- Written by `jaxllm bench report`: begin -->"
END = "<!-- Written by `jaxllm bench report`: end -->"
DRAWN = ("throughput", "serve")  # parts whose plots the page shows
_ORDER = ("throughput", "serve", "latency", "busy", "start", "memory", "parity", "attention", "ceilings")


def plot_name(part: Part) -> str:
    """The file of a part's plot."""
    return f"{stem_of(part.facts, part.part)}.svg"


def render(parts: Sequence[Part], plots: str | None) -> str:
    """Markdown of all parts, a section a device and model.

    Args:
      plots: the plots' directory as the page names it, or None to leave them out.
    """
    assert set(_ORDER) == set(KINDS)
    sections: dict[tuple, list[Part]] = {}
    for part in parts:
        facts = part.facts
        sections.setdefault((facts.device, facts.num_devices, facts.model, facts.dtype), []).append(part)
    blocks = []
    for (device, num_devices, model, dtype), found in sorted(sections.items()):
        number = f"{num_devices} × " if num_devices > 1 else ""
        blocks.append(f"## {number}{device}: {model}, {dtype}")
        for part in sorted(found, key=lambda part: _ORDER.index(part.part)):
            for index, table in enumerate(tables_of(part.part, part.facts, part.results)):
                blocks += [f"### {table.title}", *([circumstances(part.facts)] if index == 0 else []), markdown(table)]
                if index == 0 and plots is not None and part.part in DRAWN:
                    blocks.append(f"![{table.title}: {model} on {device}]({plots}/{plot_name(part)})")
                blocks += [" ".join(table.notes)] if table.notes else []
    return "\n\n".join(blocks) + "\n"


def circumstances(facts: Facts) -> str:
    """When, on what and how, in a sentence or two."""
    told = [
        facts.date.split("T")[0],
        f"jaxllm at {facts.commit[:7]}{'+' if facts.commit.endswith('+') else ''}" if facts.commit else "",
        f"jax {facts.jax}",
        f"driver {facts.driver}" if facts.driver else "",
        facts.host,
    ]
    text = f"{', '.join(word for word in told if word)}: `{facts.command}`."
    if facts.ceilings is not None:
        bandwidth, flops = facts.ceilings.bandwidth / 1e12, facts.ceilings.flops / 1e12
        text += f" Floors are those of a memory of {bandwidth:.3g} TB/s and a GEMM of {flops:.3g} TFLOP/s."
    return text + (f" {facts.note}" if facts.note else "")


def markdown(table: Table) -> str:
    """A table in GitHub's markdown."""
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def replace(text: str, measured: str) -> str:
    """The page with another measured part. Raises ConfigError if the two comments are not there once each, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ConfigError(f"the page must have the lines {BEGIN} and {END} once each, in this order")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{measured}\n{END}{rest.partition(END)[2]}"


def write(page: Path, plots: Path | None, parts: Sequence[Part]) -> list[Path]:
    """Writes the page's measured part and its plots; the plots' files. Raises ConfigError as `replace` does."""
    named = None if plots is None else Path(os.path.relpath(plots, page.parent)).as_posix()
    text = replace(page.read_text(), render(parts, named))
    drawn = []
    if plots is not None:
        from jaxllm.bench.plots import plot_part

        plots.mkdir(parents=True, exist_ok=True)
        for part in parts:
            if part.part in DRAWN and plot_part(plots / plot_name(part), part):
                drawn.append(plots / plot_name(part))
    page.write_text(text)
    return drawn
