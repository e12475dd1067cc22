"""Runs of `experiments/quality.py`: which settings each has, its fair control, and how they are dealt to GPUs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nha.convert.heads import load_plan, plan_heads, tiered_windows
from nha.distill.recipes import recipe_settings
from nha.distill.settings import DistillSettings
from nha.models.config import FULL
from nha.models.embedded import EMBEDDED_ID
from nha.ops.heads import Window, window_of

PLAN = Path("results/plans/smollm2-heads15.json")  # of `nha search --heads 15`
MEAN_PLAN = Path("results/plans/smollm2-heads20.json")  # its weights' mean with those of a search of penalty 0.005
# Bytes after 16,384 tokens of 4 full layers and of 1, with windows of 64 and 64 slots in all others, and of none.
BUDGETS = {"constant": 5_876_076, "1full": 18_285_240, "4full": 55_443_696}
TOKENS = {"4full": 25e6, "1full": 25e6, "constant": 25e6}
# What a control does not depend on: it has full attention, and trains the linear layers of attention in one stage.
HYBRID_ALONE = ("window_size", "num_slots", "full_layers", "init", "num_sinks", "slot_distance", "align_steps")
HYBRID_ALONE += ("align_sequences", "gate_lr", "sink_lr", "window_dropout", "trainable", "lora_rank", "teacher_tokens")
HYBRID_ALONE += ("slot_write", "write_reach")
# On one H200, in an empty cache of compiled kernels: of the original measured, of hybrids assumed since layers of a
# kind share a graph (until then 60, and 140 with windows per head).
COMPILE_S, HEADS_COMPILE_S, CONTROL_COMPILE_S, ALIGN_S = 30.0, 40.0, 26.0, 15.0
EVAL_S, LONG_EVAL_S = 95.0, 60.0
TOKENS_PER_S = {"text": 206e3, "long": 130e3, "control": 340e3, "long control": 150e3}


def budget_of(held: int) -> str:
    """The first budget that so many bytes after 16,384 tokens fit, up to 0.1 %, or "beyond".

    >>> budget_of(18_000_000), budget_of(80_000_000)
    ('1full', 'beyond')
    """
    return next((name for name, limit in BUDGETS.items() if held <= 1.001 * limit), "beyond")


@dataclass(frozen=True)
class Heads:
    """Windows per KV head, dealt by the rank that the search of `plan` gave the heads.

    Attributes:
        wide: (heads, window) for the first heads, then for those that follow.
        narrow: the window of all others; None: what leaves the bytes of 64 tokens in every head.
        plan: of `nha search --heads`.
    """

    wide: tuple[tuple[int, int], ...]
    narrow: int | None = 64
    plan: Path = PLAN

    def windows(self) -> tuple[Window, ...]:
        """The window of every layer, or those of its heads.

        >>> from nha.ops.heads import all_windows
        >>> sorted(set(all_windows(Heads(((6, -1), (14, 7008))).windows())))
        [-1, 64, 7008]
        """
        weights = load_plan(self.plan).weights
        if self.narrow is None:
            ((count, wide),) = self.wide
            return tuple(plan_heads(weights, heads=count, wide_window=wide))
        return tuple(window_of(layer) for layer in tiered_windows(weights, self.wide, self.narrow))


@dataclass(frozen=True)
class Recipe:
    """One kind of run.

    Attributes:
        name: of the row.
        budget: the column of the targets that its bytes fit.
        changes: settings that differ from those of `nha distill --recipe quality`; windows of 64 unless they say so.
        heads: windows per KV head.
        long_needles: lengths beyond the training's at which needles are measured with `--long-needles`.
        shipped: measure the small file of gates, sinks and changes of weights instead of the trained model; "lora" for
            what LoRA trained, "svd" for the best changes of that rank in the weights of the recipe `source`, "packed"
            for all of them in 2 bits, "file" for the file in this package, or another, made of the known run of
            `source`.
        source: the recipe whose run is measured in another way: as an "svd" or "packed" file, or with other states.
        teacher_fraction: of the tokens, which train the teacher first.
        long_fraction: of the tokens, in long sequences.
        state_dtype: how caches keep states while the recipe is measured (see `nha.models.windows.set_state_dtype`).
        kv_cache_dtype: how they keep keys and values of full heads meanwhile (see `set_kv_cache_dtype` there).
    """

    name: str
    budget: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    heads: Heads | None = None
    long_needles: tuple[int, ...] = ()
    shipped: str | None = None
    source: str | None = None
    teacher_fraction: float = 0.0
    long_fraction: float = 0.5
    state_dtype: str = "float32"
    kv_cache_dtype: str = "auto"


RECALL = {"answer_weight": 0.75}  # of the hybrid alone: slots learn recall more slowly than perplexity
# With windows of 1,088 tokens a third of the questions in long rows is answered by windows: more recall text, and more
# of it from afar (83 % of the questions in rows of 8,192 are beyond these windows, in place of 65).
FAR_RECALL = {"recall_fraction": 0.5, "long_range_fraction": 0.75, "answer_weight": 1.0}
# The same with longer sequences of four times the tokens, of which the teacher reads pieces that fit its context.
FARTHER_RECALL = FAR_RECALL | {"long_seq_len": 32768}
LORA = {"trainable": "lora", "lora_rank": 16}
LONG = (32768, 65536, 131072)
FULL_LAYERS = (8, 18, 20, 23)
NARROW = Heads(((15, 256),), None)
MIXED4 = Heads(((6, FULL), (14, 7008)), plan=MEAN_PLAN)
MIXED1 = Heads(((12, 3600), (8, 720)), plan=MEAN_PLAN)
# MIXED1 answers many questions wrongly, and some answers in training are beyond all its windows: two heads reach them.
WIDE1 = Heads(((2, FULL), (10, 2144), (8, 896)), plan=MEAN_PLAN)
# In 8 bits a token takes 136 bytes in a full head and 262 in a window, in bfloat16 256 and 512. So more heads are full,
# and the windows of all others are as long as a passage, within which near text is copied.
FLOOR4 = Heads(((22, FULL),), 304, MEAN_PLAN)
FLOOR1 = Heads(((2, FULL), (13, 2240)), 256, MEAN_PLAN)
FLOOR0 = Heads(((12, 1088),), 64, MEAN_PLAN)
INT8: dict[str, Any] = {"state_dtype": "int8", "kv_cache_dtype": "int8"}
LONG_TRAINED: dict[str, Any] = {
    "budget": "constant",
    "changes": FAR_RECALL,
    "heads": FLOOR0,
    "long_needles": LONG,
    "teacher_fraction": 0.15,
    "long_fraction": 0.6,
    **INT8,
}
SLOWER = FAR_RECALL | {"gate_shift": 2.1}  # slots keep what they hold 8 times as long
SLOW: dict[str, Any] = LONG_TRAINED | {"changes": SLOWER}
# The same bytes with fewer and with more slots a head, and with exact slots in place of soft ones.
FEW_SLOTS = SLOW | {"changes": SLOWER | {"num_slots": 16}, "heads": Heads(((12, 1760),), 64, MEAN_PLAN)}
MANY_SLOTS = SLOW | {"changes": SLOWER | {"num_slots": 128}, "heads": Heads(((12, 508),), 64, MEAN_PLAN)}
EXACT_SLOTS = LONG_TRAINED | {"changes": FAR_RECALL | {"slot_write": "exact"}}
HALF = 0.5  # all that is not in long sequences: hybrids with long windows no longer improved after a third of theirs
TEACHER = 0.4
# Recipes of whole layers and of heads: 12 full heads hold the bytes of 4 full layers. Mixed ones have long windows in
# the first heads by rank and shorter ones in those that follow, since copying near text takes more heads than copying
# far text. A token of a window takes twice the bytes of one in a full head (its slot key and gates), so MIXED4 and
# MIXED1 fit their columns with states in int8 alone. All recipes but `constant_long` and `constant_far` read the same
# batches, hence share a control for each number of tokens.
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("quality", "4full", {"full_layers": FULL_LAYERS}, None, (32768,)),
        Recipe("balanced", "1full", {"full_layers": (18,)}, None, (32768,)),
        Recipe("constant", "constant", {}, None, LONG),
        Recipe("4full", "4full", {"full_layers": FULL_LAYERS}, None, (32768,), teacher_fraction=TEACHER),
        Recipe("1full", "1full", {"full_layers": (18,)}, None, (32768,), teacher_fraction=TEACHER),
        Recipe("4full_heads", "4full", {}, Heads(((12, FULL),)), (32768,), teacher_fraction=TEACHER),
        Recipe("1full_heads", "1full", {}, Heads(((15, 3264),)), (32768,), teacher_fraction=TEACHER),
        Recipe("4full_mixed", "4full", {}, MIXED4, (32768,), teacher_fraction=TEACHER),
        Recipe("4full_half", "4full", {}, MIXED4, (32768,), teacher_fraction=HALF),
        Recipe("1full_half", "1full", {}, WIDE1, (32768,), teacher_fraction=HALF),
        Recipe(
            "4full_int8",
            "4full",
            {},
            MIXED4,
            (32768,),
            source="4full_half",
            teacher_fraction=HALF,
            state_dtype="int8",
        ),
        Recipe(
            "1full_int8",
            "1full",
            {},
            WIDE1,
            (32768,),
            source="1full_half",
            teacher_fraction=HALF,
            state_dtype="int8",
        ),
        Recipe("4full_floor", "4full", {}, FLOOR4, (32768,), teacher_fraction=HALF, **INT8),
        Recipe("1full_floor", "1full", {}, FLOOR1, (32768,), teacher_fraction=HALF, **INT8),
        Recipe("constant_floor", "constant", RECALL, FLOOR0, LONG, teacher_fraction=0.2, **INT8),
        Recipe("constant_long", **LONG_TRAINED),
        Recipe("constant_slots16", **FEW_SLOTS),
        Recipe("constant_slots128", **MANY_SLOTS),
        Recipe("constant_exact_long", **EXACT_SLOTS),
        Recipe("constant_slow", source="constant_long", **SLOW),
        Recipe(
            "constant_far", "constant", FARTHER_RECALL, FLOOR0, LONG, teacher_fraction=0.15, long_fraction=0.6, **INT8
        ),
        Recipe("1full_mixed", "1full", {}, MIXED1, (32768,), teacher_fraction=TEACHER),
        Recipe("constant_heads", "constant", {}, NARROW, LONG),
        Recipe("constant_exact", "constant", {"slot_write": "exact"}, NARROW, LONG),
        Recipe("constant_teacher", "constant", {}, NARROW, LONG, teacher_fraction=TEACHER),
        Recipe("constant_recall", "constant", RECALL, NARROW, LONG, teacher_fraction=0.2),
        Recipe("constant64_teacher", "constant", {}, None, LONG, teacher_fraction=TEACHER),
        Recipe("shipped", shipped="file", source="constant_long", **LONG_TRAINED),
        Recipe(
            "shipped_recall",
            "constant",
            RECALL,
            NARROW,
            LONG,
            shipped="packed",
            source="constant_recall",
            teacher_fraction=0.2,
        ),
        Recipe(
            "shipped_floor",
            "constant",
            RECALL,
            FLOOR0,
            LONG,
            shipped="packed",
            source="constant_floor",
            teacher_fraction=0.2,
            **INT8,
        ),
        Recipe("shipped_long", shipped="packed", source="constant_long", **LONG_TRAINED),
        Recipe("shipped_slow", shipped="packed", source="constant_long", **SLOW),
        Recipe(
            "shipped_far",
            "constant",
            FARTHER_RECALL,
            FLOOR0,
            LONG,
            shipped="packed",
            source="constant_far",
            teacher_fraction=0.15,
            long_fraction=0.6,
            **INT8,
        ),
        Recipe("ship", "constant", LORA, None, LONG, shipped="lora"),
        Recipe("ship_svd", "constant", {}, None, LONG, shipped="svd", source="constant"),
        Recipe("ship_heads", "constant", LORA, NARROW, LONG, shipped="lora"),
        Recipe(
            "ship_teacher",
            "constant",
            {},
            NARROW,
            (32768,),
            shipped="packed",
            source="constant_teacher",
            teacher_fraction=TEACHER,
        ),
    )
}
# In all tables, but left out of pictures: another run of the same column keeps more, or a packed file stands for it.
NOT_DRAWN = frozenset(
    ("4full", "1full", "4full_heads", "1full_heads", "4full_mixed", "1full_mixed", "4full_half", "1full_half")
)
NOT_DRAWN |= {"4full_int8", "1full_int8", "constant_heads", "constant_teacher", "constant_recall", "constant_floor"}
NOT_DRAWN |= {"constant_far", "shipped_recall", "shipped_floor", "shipped_long", "shipped_far"}
DEFAULT_RECIPES = ("4full_heads", "1full_heads", "constant_heads", "constant_teacher")


@dataclass(frozen=True)
class Run:
    """A recipe with a seed and tokens, or the control made for the recipe `beside`: `recipe` is None then."""

    recipe: Recipe | None
    budget: str
    settings: DistillSettings
    beside: str

    @property
    def seed(self) -> int:
        return self.settings.seed

    @property
    def name(self) -> str:
        """A name for files: recipe or control, tokens, seed."""
        kind = self.recipe.name if self.recipe else f"control-{batches_digest(self.settings)}"
        return f"{kind}-{self.settings.tokens / 1e6:g}M-{self.seed}"

    @property
    def seconds(self) -> float:
        """About how long it takes on one H200, without loading and long needles; each trains its own teacher."""
        if self.recipe and self.recipe.source:
            return EVAL_S
        long, first = self.settings.long_tokens, self.settings.teacher_tokens if self.recipe else 0.0
        short = self.settings.tokens - long - first
        if self.recipe is None:
            begin, kind = CONTROL_COMPILE_S, "control"
        else:
            begin, kind = ALIGN_S + (HEADS_COMPILE_S if self.recipe.heads else COMPILE_S), ""
        teacher = CONTROL_COMPILE_S + first / TOKENS_PER_S["control"] if first else 0.0
        speed = TOKENS_PER_S[kind or "text"], TOKENS_PER_S[f"long {kind}".strip()]
        return teacher + begin + short / speed[0] + long / speed[1] + EVAL_S

    @property
    def teacher(self) -> str:
        """A name for the folder of its trained teacher: runs that train one on the same batches share it."""
        kept = ("tokens", "long_tokens", "long_seq_len", "seed", *HYBRID_ALONE)
        digest = _digest(self.settings, kept)
        return f"teacher-{digest}-{self.settings.teacher_tokens / 1e6:g}M-{self.seed}"


def batches_digest(settings: DistillSettings) -> str:
    """A short digest of all settings that a control depends on: runs with the same one share a control.

    >>> one, other = (DistillSettings(full_layers=full) for full in ((), (1, 2)))
    >>> batches_digest(one) == batches_digest(other) != batches_digest(DistillSettings(recall_fraction=0.5))
    True
    """
    same = dataclasses.replace(settings, answer_weight=DistillSettings.answer_weight)
    return _digest(same, ("tokens", "seed", *HYBRID_ALONE))


def _digest(settings: DistillSettings, without: Sequence[str]) -> str:
    kept = {name: x for name, x in settings.identity().items() if name not in without}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:6]


def control_of(run: Run) -> Run:
    """The fair control of a run: the original, trained in all its attention layers on the same batches.

    Answers have the usual weight in it, which recalls all of them anyway.
    """
    plain = DistillSettings()
    same = {name: getattr(plain, name) for name in (*HYBRID_ALONE, "answer_weight")}
    return Run(None, run.budget, dataclasses.replace(run.settings, **same), run.beside)


def make_runs(
    names: Sequence[str],
    seeds: Sequence[int],
    tokens: Mapping[str, float],
    layers: int = 30,
    given: Mapping[str, Any] | None = None,
    controls: bool = True,
) -> list[Run]:
    """All runs of some recipes and seeds, each control once, before the recipes that it is for."""
    found: dict[str, Run] = {}
    for seed in seeds:
        for name in names:
            recipe = RECIPES[name]
            count = tokens.get(name, tokens.get(recipe.budget, TOKENS[recipe.budget]))
            changes: dict[str, Any] = {"full_layers": (), "teacher_tokens": recipe.teacher_fraction * count}
            changes |= {
                "long_tokens": recipe.long_fraction * count,
                "save_every": 400,
                **recipe.changes,
                **(given or {}),
                "tokens": count,
                "seed": seed,
            }
            if recipe.heads:
                changes["window_size"] = recipe.heads.windows()
            run = Run(recipe, recipe.budget, recipe_settings("quality", layers, EMBEDDED_ID, changes), name)
            control = control_of(run)
            if controls:
                found.setdefault(control.name, control)
            found[run.name] = run
    return list(found.values())


def deal(runs: Sequence[Run], shards: int) -> list[list[Run]]:
    """Runs for each of `shards` GPUs, the longest first to the GPU that is free first; one of another run follows it.

    >>> runs = make_runs(["4full", "1full", "constant"], [0], {})
    >>> [[run.name.split("-")[0] for run in some] for some in deal(runs, 2)]
    [['4full', 'constant'], ['1full', 'control']]
    """
    piles: list[list[Run]] = [[] for _ in range(shards)]
    follows = [run for run in runs if run.recipe and run.recipe.source]
    for run in sorted((run for run in runs if run not in follows), key=lambda run: -run.seconds):
        min(piles, key=lambda pile: sum(one.seconds for one in pile)).append(run)
    for run in follows:
        for pile in piles:
            if any(
                one.recipe and run.recipe and one.recipe.name == run.recipe.source and one.seed == run.seed
                for one in pile
            ):
                pile.append(run)
                break
        else:
            min(piles, key=lambda pile: sum(one.seconds for one in pile)).append(run)
    return piles
