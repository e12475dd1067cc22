"""`nha export`: a hybrid for MLX."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nha.cli import common
from nha.cli.common import command, err, escape, status
from nha.models import loading


@command
def export(
    model: Annotated[
        str, typer.Argument(help="Directory of a hybrid, or 'smollm2-hybrid' for that of the embedded model.")
    ],
    output: Annotated[Path, typer.Argument(help="The new directory.")],
) -> None:
    """Write a hybrid as a directory that MLX loads, on machines where nha is not installed."""
    from nha.serve.embedded import with_directory
    from nha.serve.export import CODE, check_export, export_mlx

    common.check_new_directory(output)
    source = with_directory(loading.find(model))
    check_export(source)
    with status(f"writing {output}"):
        export_mlx(source, output)
    err.print(f"wrote {escape(str(output))}: its {CODE} runs it in mlx_lm, with --trust-remote-code", soft_wrap=True)
