"""`nha doctor`: versions, missing packages, which implementation runs here and why, and a check of each of them."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from nha.cli import common
from nha.cli.common import FAILED_CHECK, command, escape, out, print_json
from nha.report.diagnosis import diagnosis


def _show(found: dict[str, Any]) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    uses = {entry["package"].split("[")[0]: entry["use"] for entry in found["missing"]}
    for name, version in found["versions"].items():
        table.add_row(name, version or f"[dim]not installed{': ' + uses[name] if name in uses else ''}[/]")
    table.add_row("platform", f"{found['platform']}, {found['threads']} threads")
    table.add_row("GPU", escape(", ".join(found["gpus"])) or "[dim]none[/]")
    out.print(table)
    out.print()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("implementation", "status", "self-check", "error", "allowed", "time"):
        table.add_column(title, justify="right" if title in ("error", "allowed", "time") else "left")
    checks = {check["implementation"]: check for check in found["checks"]}
    for name, status in found["implementations"].items():
        label = f"[bold]{name}[/] (auto)" if name == found["chosen"] else name
        if name not in checks:
            table.add_row(f"[dim]{label}[/]", "[dim]not here[/]", "", "", "", "")
            continue
        check = checks[name]
        verdict = "[green]✓ passed[/]" if check["passed"] else f"[red]✗ {escape(check['message'])}[/]"
        numbers = (f"{check['error']:.1e}", f"{check['allowed']:.1e}", f"{check['seconds']:.1f} s")
        table.add_row(label, status, verdict, *numbers)
    out.print(table)
    out.print()
    out.print(f"{found['why']}.")
    for name, status in found["implementations"].items():
        if name not in checks:
            out.print(escape(f"{name}: {status}."))
    if found["install"]:
        out.print(f"Install what is missing: [cyan]{escape(found['install'])}[/]", soft_wrap=True)


@command
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")] = False,
) -> None:
    """Show versions, what is missing, which implementation runs here and why; check each against the reference."""
    with common.status("checking the implementations"):
        found = diagnosis()
    if as_json:
        print_json(found)
    else:
        _show(found)
    if not found["healthy"]:
        raise typer.Exit(FAILED_CHECK)
