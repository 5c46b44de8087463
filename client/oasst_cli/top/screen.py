"""One look at the service, drawn. Pure: figures in, something to print out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from oasst_client import Load, WorkerLoad
from rich import box
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

__all__ = ["Look", "draw"]

_BAR_WIDTH = 12
_SPARKS = "▁▂▃▄▅▆▇█"
# A worker that has not been seen for so long may be gone.
_STALE_S = 5.0


@dataclass(frozen=True, slots=True)
class Look:
    """What is known at one moment."""

    title: str
    load: Load
    # Generated tokens per second, the newest last.
    tokens_per_s: Sequence[float]
    # Title -> p50 and p95 in seconds, None where nothing was observed. Empty without metrics.
    latencies_s: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    # Part of the prompt tokens whose keys and values were reused; None where nobody tells.
    prefix_hits: float | None = None
    # Tenant -> accepted requests per second, and their prompt tokens per second.
    tenants: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    # What could not be asked.
    missing: Sequence[str] = ()


def draw(look: Look) -> RenderableType:
    """The whole screen."""
    parts: list[RenderableType] = [
        Text(look.title, style="bold"),
        Columns([_queue(look.load), _tokens(look)], padding=(0, 1)),
        _workers(look.load.workers),
    ]
    if look.latencies_s:
        parts.append(_latencies(look.latencies_s))
    if look.tenants:
        parts.append(_tenants(look.tenants))
    parts += [Text(f"{address} serves no metrics", style="red") for address in look.missing]
    return Group(*parts)


def _queue(load: Load) -> Panel:
    wait = "unknown" if load.estimated_wait_s is None else _seconds(load.estimated_wait_s)
    grid = Table.grid(padding=(0, 2))
    grid.add_row("waiting", f"[bold]{load.waiting_requests}[/bold] requests", f"{load.waiting_tokens} tokens")
    grid.add_row("running", f"[bold]{load.running_requests}[/bold] requests", f"next waits {wait}")
    return Panel(grid, title="queue", title_align="left", border_style="cyan")


def _tokens(look: Look) -> Panel:
    grid = Table.grid(padding=(0, 2))
    now = look.tokens_per_s[-1] if look.tokens_per_s else 0.0
    grid.add_row(f"[bold]{now:.0f}[/bold] tokens/s", _sparkline(look.tokens_per_s))
    hits = "n/a" if look.prefix_hits is None else f"{look.prefix_hits:.0%}"
    grid.add_row(f"prefix hits {hits}")
    return Panel(grid, title="generation", title_align="left", border_style="green")


def _workers(workers: Sequence[WorkerLoad]) -> RenderableType:
    if not workers:
        return Text("no worker is alive", style="bold red")
    table = _table("worker", "sequences", "", "KV cache", "", "tokens/s", "last seen")
    for worker in workers:
        table.add_row(
            worker.worker_id,
            _bar(worker.running_sequences, worker.max_sequences),
            f"{worker.running_sequences}/{worker.max_sequences}",
            _bar(worker.kv_tokens_used, worker.kv_tokens_total),
            f"{worker.kv_tokens_used / worker.kv_tokens_total:.1%}" if worker.kv_tokens_total else "-",
            f"{worker.tokens_per_second:.0f}",
            Text(f"{_seconds(worker.age_s)} ago", style="red" if worker.age_s > _STALE_S else ""),
        )
    return table


def _latencies(latencies_s: Mapping[str, tuple[float | None, float | None]]) -> Table:
    table = _table("since the last refresh", "p50", "p95")
    for title, (p50, p95) in latencies_s.items():
        table.add_row(title, "-" if p50 is None else _seconds(p50), "-" if p95 is None else _seconds(p95))
    return table


def _tenants(tenants: Mapping[str, tuple[float, float]]) -> Table:
    table = _table("tenant", "requests/s", "prompt tokens/s")
    for tenant, (requests_per_s, prompt_tokens_per_s) in sorted(tenants.items(), key=lambda each: -each[1][1]):
        table.add_row(tenant, f"{requests_per_s:.1f}", f"{prompt_tokens_per_s:.0f}")
    return table


def _bar(used: float, total: float) -> Text:
    """How full something is, in a colour that says how good that is."""
    part = min(1.0, used / total) if total else 0.0
    filled = round(part * _BAR_WIDTH)
    colour = "red" if part > 0.9 else "yellow" if part > 0.7 else "green"
    return Text.assemble(("█" * filled, colour), ("░" * (_BAR_WIDTH - filled), "dim"))


def _sparkline(values: Sequence[float]) -> str:
    """
    >>> _sparkline([0, 1, 2])
    '▁▅█'
    """
    most = max(values, default=0.0) or 1.0
    return "".join(_SPARKS[round(value / most * (len(_SPARKS) - 1))] for value in values)


def _seconds(seconds: float) -> str:
    """
    >>> [_seconds(each) for each in (0.0042, 1.25, 90)]
    ['4 ms', '1.2 s', '90 s']
    """
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for index, name in enumerate(columns):
        is_bar = name in ("sequences", "KV cache")
        table.add_column(name, justify="right" if index and not is_bar else "left", no_wrap=True)
    return table
