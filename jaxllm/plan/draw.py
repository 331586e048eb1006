"""A plan as a drawing; the kind of file follows the name's suffix. Needs matplotlib (the extra `bench`)."""

from pathlib import Path

from jaxllm.plan.plan import Plan, mesh_name
from jaxllm.plan.show import memory_parts

FLOOR, PREDICTED = "#7a7a7a", "#1b6ca8"


def draw(path: Path, plan: Plan) -> None:
    """A device's memory, and the best mesh's TTFT, TPOT and speed by requests at once."""
    import matplotlib
    from matplotlib.figure import Figure

    # Text as text keeps SVG files small and readable; a fixed salt and no date make equal plans equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jaxllm"}):
        mesh = plan.throughput
        figure = Figure(figsize=(14, 4), layout="constrained")
        memory, ttft, tpot, speed = figure.subplots(1, 4)
        names, sizes = zip(*memory_parts(mesh), strict=True)
        memory.bar_label(memory.barh(names, [size / 1e9 for size in sizes], color=PREDICTED), fmt="%.1f", padding=3)
        memory.invert_yaxis()
        memory.margins(x=0.2)
        memory.set_xlabel("GB of a device")
        requests = [batch.requests for batch in mesh.batches]
        for axes, name, factor, label in (
            (ttft, "ttft", 1e3, "TTFT of all, ms"),
            (tpot, "tpot", 1e3, "TPOT, ms"),
            (speed, "output_tok_s", 1.0, "output tok/s"),
        ):
            times = [getattr(batch, name) for batch in mesh.batches]
            axes.plot(requests, [each.floor * factor for each in times], "--o", color=FLOOR, label="floor")
            if all(each.predicted is not None for each in times):
                axes.plot(
                    requests, [each.predicted * factor for each in times], "-o", color=PREDICTED, label="predicted"
                )
            axes.set_xscale("log", base=2)
            axes.set_xticks(requests, [f"{each:,}" for each in requests], minor=False)
            axes.set_xlabel("requests at once")
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
            axes.legend(fontsize=8)
        figure.suptitle(
            f"{plan.model}, {plan.dtype}, {plan.chips} × {plan.chip.name}, data × tensor = "
            f"{mesh_name(mesh.data, mesh.tensor)}; requests of {plan.context} + {plan.output_len} tokens",
            fontsize=10,
        )
        options: dict = {"metadata": {"Date": None}} if path.suffix == ".svg" else {"dpi": 150}
        figure.savefig(path, **options)
