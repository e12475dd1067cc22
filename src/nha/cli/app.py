"""The command line's root: global options and the list of commands."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nha.cli import common
from nha.cli.ablate import ablate
from nha.cli.bench import bench_app
from nha.cli.chat import chat
from nha.cli.distill import distill
from nha.cli.doctor import doctor
from nha.cli.evaluate import everything, perplexity, recall
from nha.cli.export import export
from nha.cli.generate import generate
from nha.cli.hybridize import hybridize
from nha.cli.public import public
from nha.cli.quickstart import quickstart
from nha.cli.search import search
from nha.cli.serve import serve
from nha.cli.tasks import tasks
from nha.cli.train import train


class OneLineErrors(TyperGroup):
    """The root command: an unknown option or a missing argument is one line on stderr, as all other errors are."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """Run a command line; leaves through SystemExit, as typer's own does, if `standalone_mode`."""
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **kwargs)
        try:
            code = super().main(*args, standalone_mode=False, **kwargs)
        except Exception as error:
            # typer's usage errors have no public base class common to the versions supported.
            if not hasattr(error, "format_message"):
                raise
            code = _report(error)
        sys.exit(code if isinstance(code, int) else common.OK)


def _report(error: Any) -> int:
    """Print a usage error and return the exit code; without arguments the help is what was asked for."""
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(error.ctx.get_help())
        return common.BAD_INPUT
    try:
        where = error.ctx.command_path if error.ctx else "nha"
        common.fail(f"{error.format_message().rstrip('.')} (see {where} --help)")
    except typer.Exit as left:
        return left.exit_code


app = typer.Typer(
    name="nha",
    cls=OneLineErrors,
    help="Turn pretrained transformers into Native Hybrid Attention models: constant memory at any length.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_show_locals=False,
    epilog="Start with [bold]nha quickstart[/]; it needs no network and takes a few minutes.",
)
evaluate_app = typer.Typer(help="Measure a model.", no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(evaluate_app, name="eval")
app.add_typer(bench_app, name="bench")


def _version(asked: bool) -> None:
    if asked:
        from nha import __version__

        typer.echo(f"nha {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the whole traceback of an error, not only its one line.")
    ] = False,
) -> None:
    common.show_tracebacks(traceback)
    # Progress bars of the libraries below would run into the commands' own; tqdm reads this when it is imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    # PEFT imports bitsandbytes where it is installed, which then asks for a package that no command uses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


app.command(epilog="Example: [cyan]nha quickstart --model HuggingFaceTB/SmolLM2-360M --output report[/]")(quickstart)
app.command(epilog="Example: [cyan]nha hybridize smollm2 my-hybrid --window 64 --full-layers 8,18,20,23[/]")(hybridize)
app.command(epilog="Example: [cyan]nha distill smollm2 run --text books/ --tokens 20e6[/]")(distill)
app.command(epilog="Example: [cyan]nha train run --preset 20m --text books/ --tokens 20e6[/]")(train)
app.command(epilog="Example: [cyan]nha ablate recall-cpu --output results[/]")(ablate)
app.command(epilog="Example: [cyan]nha search smollm2 search.json --full 4[/]")(search)
app.command(epilog='Example: [cyan]nha generate my-hybrid "Why is the sky blue?" --temperature 0.7[/]')(generate)
app.command(epilog="Example: [cyan]nha chat my-hybrid --temperature 0.7[/]")(chat)
app.command(epilog="Example: [cyan]nha serve my-hybrid --port 8000 --api-key secret[/]")(serve)
app.command(epilog="Example: [cyan]nha export my-hybrid my-hybrid-mlx[/]")(export)
evaluate_app.command(epilog="Example: [cyan]nha eval perplexity my-hybrid --text book.txt --ablations[/]")(perplexity)
evaluate_app.command(epilog="Example: [cyan]nha eval recall my-hybrid --compare teacher=smollm2 --output recall[/]")(
    recall
)
evaluate_app.command(
    epilog="Example: [cyan]nha eval public my-hybrid --data sets --compare control=tuned --output results[/]"
)(public)
evaluate_app.command(epilog="Example: [cyan]nha eval tasks my-hybrid --tasks standard --limit 200[/]")(tasks)
evaluate_app.command(
    "all", epilog="Example: [cyan]nha eval all my-hybrid results --ablations --compare teacher=smollm2[/]"
)(everything)
app.command(epilog="Example: [cyan]nha doctor --json[/]")(doctor)


def main() -> None:
    """Entry point of the `nha` script."""
    app()
