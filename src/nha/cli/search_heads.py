"""`nha search --heads`: which KV heads get a wide window, or full attention."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from nha.cli import common
from nha.cli.common import BadInput, err, human_bytes, out, print_json
from nha.convert.settings import HeadSearchSettings, SearchSettings
from nha.models import loading

if TYPE_CHECKING:
    from nha.convert.heads import HeadPlan


def search_heads(
    source: loading.Source, output: Path, settings: SearchSettings, text: list[Path] | None, as_json: bool
) -> None:
    """Search, or take the weights of an earlier search with the same settings, write the plan and print it."""
    if source.config is not None and loading.is_hybrid(source.config):
        raise BadInput(f"expected a model that is not converted yet for heads, {source.name} is a hybrid")
    own = head_settings(settings)

    from nha.convert.head_counts import propose
    from nha.convert.heads import load_plan, make_plan, save_plan
    from nha.convert.heads import search_heads as find
    from nha.data.sources import check_sources, documents
    from nha.models.cache_file import fingerprint

    if output.exists():  # a file of another kind is refused before the model is loaded
        load_plan(output)
    texts = None
    if text is not None:
        sources = [str(path) for path in text]
        check_sources(sources)
        texts = list(documents(sources))
    with err.status(f"loading {escape(source.label)}"):
        model, tokenizer = loading.load(source, dtype=settings.dtype)
    sizes = [path.stat().st_size for path in text or [] if path.is_file()]
    about = {"model": source.label, "weights": fingerprint(model), "text": [str(path.name) for path in text or []]}
    about |= {"text_bytes": sizes, "dtype": str(model.dtype)}
    kept: list[list[float]] = []
    if output.exists():
        known = load_plan(output, about | own.identity())
        plan, kept = make_plan(known.settings, known.weights, known.losses, own), known.kept
    else:
        with common.steps(f"learning which heads of {source.label} copy") as advance:
            plan = find(model, tokenizer, texts, own, about=about, progress=advance)
    plan = dataclasses.replace(plan, kept=kept)
    if settings.keep is not None:
        save_plan(plan, output)  # the weights, should counting be interrupted
        with err.status("counting heads") as status:

            def progress(count: int) -> None:
                status.update(f"reading clozes with {count} full heads")

            plan = propose(plan, model, tokenizer, texts, own, settings.keep, progress=progress)
    save_plan(plan, output)
    if as_json:
        print_json(plan.to_dict())
        return
    report(plan, model, output, settings.context)


def head_settings(settings: SearchSettings) -> HeadSearchSettings:
    """The settings of a search for heads among those of `nha search`."""
    default = HeadSearchSettings()
    window = default.window_size if settings.window_size is None else settings.window_size
    if window < 1:
        raise BadInput(f"expected --window of at least 1 with --heads, got {window}")
    return dataclasses.replace(
        default,
        heads=0 if settings.heads is None else settings.heads,
        wide_window=settings.wide_window,
        window_size=window,
        steps=settings.head_steps,
        seed=settings.seed,
    )


def report(plan: HeadPlan, model: Any, output: Path, context: int) -> None:
    """Print the chosen heads, all windows' sizes and the bytes of the cache."""
    from nha.convert.search import cache_bytes
    from nha.ops.heads import all_windows

    chosen = ", ".join(f"{layer}.{head}" for layer, head in plan.chosen)
    wide = "full attention" if plan.wide_window < 0 else f"a window of {plan.wide_window}"
    others = sorted(set(all_windows(plan.windows)) - {plan.wide_window, -1})
    out.print(f"[green]✓[/] {plan.heads} heads with {wide} (layer.head): {chosen or 'none'}", soft_wrap=True)
    if plan.kept:
        shares = ", ".join(f"{int(count)}: {value:.0%}" for count, value in plan.kept)
        out.print(f"  copied clozes kept by the number of full heads, nothing trained: {shares}", soft_wrap=True)
    out.print(f"  all others: {', '.join(map(str, others)) or 'none'}", soft_wrap=True)
    shown = f"{context:,} tokens"
    config = model.config.get_text_config()
    if getattr(config, "num_slots", None) is None:
        config.num_slots = 64  # what nha hybridize gives
    out.print(f"  cache of {shown}: {human_bytes(cache_bytes(model, plan.windows, context))}", soft_wrap=True)
    out.print(f"  use it:  [cyan]nha hybridize MODEL OUT --windows {escape(str(output))}[/]", soft_wrap=True)
