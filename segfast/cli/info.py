"""`segfast info`, and `python -m segfast` alone."""

from rich.console import Console
from rich.table import Table

from segfast.engine.environment import DEVICES, backend_table, environment, missing


def info() -> None:
    """Print versions, the processor's features, who runs each operation, and what is missing."""
    show_environment(Console())


def show_environment(console: Console) -> None:
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in environment().items():
        facts.add_row(f"[bold]{name}[/]", value)
    console.print(facts)
    console.print()
    backends = Table("operation", *DEVICES, title="Who runs what", title_justify="left")
    cells: dict[str, dict[str, str]] = {}
    for op, device, backend in backend_table():
        cells.setdefault(op, {})[device] = backend
    for op, owners in cells.items():
        backends.add_row(op, *(owners[device] for device in DEVICES))
    console.print(backends)
    for what, how in missing():
        console.print(f"missing: {what}", markup=False, highlight=False, style="yellow")
        console.print(f"    {how}", markup=False, highlight=False)
