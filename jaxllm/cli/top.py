"""`jaxllm top`: a server's figures, live."""

import collections
import time
from typing import Annotated
from urllib.parse import urlsplit

import typer

from jaxllm.errors import ConfigError


def top(
    url: Annotated[str, typer.Argument(help="the server's address")] = "http://127.0.0.1:8000",
    *,
    interval: Annotated[float, typer.Option(min=0.1, help="seconds between readings")] = 1.0,
    window: Annotated[float, typer.Option(min=0.1, help="seconds over which rates and quantiles are taken")] = 10.0,
    once: Annotated[bool, typer.Option("--once", help="print the figures of one interval and end")] = False,
    api_key: Annotated[str | None, typer.Option(envvar="JAXLLM_API_KEY", help="the server's key")] = None,
) -> None:
    """Watch a server: samples, cache, tokens a second, latencies."""
    from rich.console import Console  # here: other commands need none of this
    from rich.live import Live

    from jaxllm.cli.top_view import scrape, view
    from jaxllm.serving.scraped import Between

    if urlsplit(url).scheme not in ("http", "https"):
        raise ConfigError(f"url={url!r}: must begin with http:// or https://")
    metrics = f"{url.rstrip('/')}/metrics"
    console = Console()
    readings = collections.deque([scrape(metrics, api_key)])  # the first must be there; later ones may fail for a while
    if once:
        time.sleep(interval)
        console.print(view(url, Between(readings[0], scrape(metrics, api_key)), None))
        return
    problem: str | None = None
    with Live(console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                live.update(view(url, Between(readings[0], readings[-1]), problem), refresh=True)
                time.sleep(interval)
                try:
                    readings.append(scrape(metrics, api_key))
                    problem = None
                except ConfigError as error:
                    problem = str(error)
                while len(readings) > 2 and readings[1].time <= readings[-1].time - window:
                    readings.popleft()
        except KeyboardInterrupt:
            pass
