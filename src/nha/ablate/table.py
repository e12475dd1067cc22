"""Tables in YAML: models, what they learn and are measured on, and what the paper says about the outcome."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from nha.ablate.language import BY_LENGTH, WINDOW, LanguagePlan
from nha.ablate.recall import RecallPlan
from nha.ablate.specs import ModelSpec
from nha.data.synthetic import TaskSize
from nha.errors import one_line
from nha.models.config import NHAConfig
from nha.settings import MAX_LENGTH, MAX_WINDOW, check_value
from nha.yaml_file import read_yaml

EXPECTATIONS = {"above": "better than", "at least": "no worse than", "equal": "as good as"}
KINDS = ("recall", "language")
PLAIN = ("str", "int", "float", "bool", "tuple[str, ...]", "tuple[int, ...]", "tuple[float, ...]", "dict[str, Any]")
PLAIN += ("int | tuple[int, ...]", "str | None", "int | None")  # annotations that `check_value` knows
BOUNDS: dict[str, dict[str, Any]] = {  # of fields, whatever they belong to
    **{name: {"at_least": 1} for name in ("steps", "batch_size", "batch_tokens", "examples", "valid_every", "seq_len")},
    **{name: {"at_least": 1, "at_most": 1 << 16} for name in ("num_slots", "limit", "documents", "clozes", "needles")},
    **{name: {"at_least": 0} for name in ("num_items", "convolution", "weights", "seeds")},
    **{name: {"at_least": 1, "at_most": MAX_LENGTH} for name in ("lengths", "needle_lengths")},
    **{name: {"at_least": -1, "at_most": MAX_WINDOW} for name in ("windows", "random_windows", "knob")},
    "vocab_size": {"at_least": 2},
    "enough": {"above": 0, "at_most": 1},
    "power": {"above": 0},
    "lrs": {"above": 0},
}
FORMAT = 2  # of what a row's results depend on besides its settings


@dataclass(frozen=True)
class Claim:
    """A statement of the paper that a table tests.

    Attributes:
        says: the statement in words.
        model, against: the models that it compares.
        expect: how the first does beside the second: "above", "at least" or "equal".
        measure: what is compared: "accuracy", or the name of a set or "perplexity" of language tables.
        sizes: labels of sizes that count; none means all.
        main: whether it stands at the top of the page.
    """

    says: str
    model: str
    against: str
    expect: str = "above"
    measure: str = "accuracy"
    sizes: tuple[str, ...] = ()
    main: bool = False

    def __post_init__(self) -> None:
        if self.expect not in EXPECTATIONS:
            raise ValueError(f"expected expect to be one of {', '.join(EXPECTATIONS)}, got {self.expect!r}")


def row_name(table: str, model: str, lr: float, seed: int) -> str:
    """The name of a row's files.

    >>> row_name("recall", "window alone", 3e-3, 1)
    'recall--window-alone--lr0.003--seed1'
    """
    return f"{table}--{model.replace(' ', '-')}--lr{lr:g}--seed{seed}"


@dataclass(frozen=True)
class Row:
    """One model of a table to train and measure."""

    model: ModelSpec
    lr: float
    seed: int

    def name(self, table: str) -> str:
        """The name of its files, as `row_name` gives it."""
        return row_name(table, self.model.name, self.lr, self.seed)


@dataclass(frozen=True)
class Table:
    """Models, learning rates and seeds, of which every combination is a row.

    Attributes:
        name: as it stands in results and names of files.
        title: one line for the page.
        kind: "recall" trains on tasks of random tokens (`recall`), "language" on text (`language`).
        models: what is compared.
        lrs: learning rates; the page shows each model's best on validation data.
        seeds: of weights and data.
        shape: settings of `NHAConfig` that all models share (recall).
        match: name of the model whose number of parameters all others have.
        claims: what is tested.
        notes: sentences for the page: why an outcome is as it is.
        recall, language: how the models are trained and measured, by kind.
        pictured: names of the models that pictures show; none means all.
        chosen: names of the models that are made unless others are named; none means all.
    """

    name: str
    title: str
    kind: str
    models: tuple[ModelSpec, ...]
    lrs: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)
    shape: dict[str, Any] = field(default_factory=dict)
    match: str | None = None
    claims: tuple[Claim, ...] = ()
    notes: tuple[str, ...] = ()
    recall: RecallPlan | None = None
    language: LanguagePlan | None = None
    pictured: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for entry, kind in (("lrs", "tuple[float, ...]"), ("seeds", "tuple[int, ...]")):  # the command line names them
            check_value(entry, getattr(self, entry), kind, BOUNDS[entry])
        names = [model.name for model in self.models]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"expected models of different names, got {', '.join(names) or 'none'}")
        if self.kind not in KINDS or getattr(self, self.kind) is None:
            raise ValueError(
                f"expected kind to be one of {', '.join(KINDS)} with a plan of that name, got {self.kind!r}"
            )
        other = next(kind for kind in KINDS if kind != self.kind)
        if getattr(self, other) is not None:
            raise ValueError(f"expected a plan for {self.kind} alone, got one for {other} too")
        named = [*self.pictured, *self.chosen, *([self.match] if self.match else [])]
        named += [name for claim in self.claims for name in (claim.model, claim.against)]
        unknown = [name for name in named if name not in names]
        if unknown:
            raise ValueError(f"expected names out of {', '.join(names)}, got {unknown[0]!r}")
        drawn = [model.name for model in self.models if model.random_windows]
        if drawn and self.kind != "recall":
            raise ValueError(f"expected random windows of {drawn[0]} under train in a {self.kind} table")
        if not self.lrs or not self.seeds:
            raise ValueError(f"expected learning rates and seeds, got {list(self.lrs)} and {list(self.seeds)}")
        self._check_names()
        self._check_claims()
        for model in self.models:
            if self.language is not None:
                self.language.settings(lr=1e-3, seed=0, own=model.train)
            if model.peer is None:
                check_names("config", model.name, model.config)
                try:
                    model.settings(self.any_shape)
                except StrictDataclassError as error:
                    raise ValueError(f"expected settings of a model in {model.name}, got: {one_line(error)}") from None

    def _check_names(self) -> None:
        """Raise ValueError for names that cannot be in names of files, and for rows that would share their files."""
        for name in (self.name, *(model.name for model in self.models)):
            if not name or name != Path(name).name or "\\" in name:
                raise ValueError(f"expected names that can be names of files, got {name!r}")
        files: set[str] = set()
        for row in self.every_row:
            name = row.name(self.name)
            if name in files:
                raise ValueError(f"expected models, learning rates and seeds of different files, got {name} twice")
            files.add(name)

    def _check_claims(self) -> None:
        """Raise ValueError for measures and sizes that no row has."""
        for claim in self.claims:
            known = ["accuracy"] if self.language is None else [*self.language.sets, *BY_LENGTH, WINDOW]
            if claim.measure not in known:
                raise ValueError(
                    f"expected the measure of a claim to be one of {', '.join(known)}, got {claim.measure!r}"
                )
            if self.recall is None:
                continue
            sizes = [size.label for size in self.recall.test]
            unknown = [size for size in claim.sizes if size not in sizes]
            if unknown:
                raise ValueError(f"expected sizes of a claim out of {', '.join(sizes)}, got {unknown[0]!r}")

    @property
    def any_shape(self) -> NHAConfig:
        """The configuration that all models share; of a language table with a vocabulary that is no tokenizer's."""
        if self.language is None:
            return self.recall_shape
        check_names("shape", "language", self.language.shape)
        return self.language.config(64)

    @property
    def rows(self) -> list[Row]:
        """The rows of the chosen models, seed by seed, so that a table that is stopped has whole comparisons."""
        return [row for row in self.every_row if not self.chosen or row.model.name in self.chosen]

    @property
    def every_row(self) -> list[Row]:
        """The rows of all models."""
        return [Row(model, lr, seed) for seed, lr, model in itertools.product(self.seeds, self.lrs, self.models)]

    @property
    def matched(self) -> ModelSpec | None:
        """The model whose number of parameters all others have."""
        return next((model for model in self.models if model.name == self.match), None)

    @property
    def recall_shape(self) -> NHAConfig:
        """The configuration that all models of a recall table share."""
        assert self.recall is not None
        check_names("shape", self.name, self.shape)
        return NHAConfig.tiny(**({"vocab_size": self.recall.vocab_size, "tie_word_embeddings": True} | self.shape))

    def digest(self, row: Row) -> str:
        """A digest of all that a row's results depend on, besides text and machine."""
        kept = {
            "format": FORMAT,
            "row": plain(row),
            "match": None if self.matched is None else plain(self.matched),
            "shape": self.shape,
            "plan": plain(getattr(self, self.kind)),
        }
        return hashlib.sha256(json.dumps(kept, sort_keys=True, default=list).encode()).hexdigest()[:16]

    def only(self, models: Sequence[str] = (), seeds: Sequence[int] = (), lrs: Sequence[float] = ()) -> Table:
        """The table with some of its models in place of the chosen ones, and with other seeds or learning rates.

        Raises ValueError for a model that it does not have.
        """
        names = [model.name for model in self.models]
        unknown = [name for name in models if name not in names]
        if unknown:
            raise ValueError(f"expected models out of {', '.join(names)}, got {unknown[0]!r}")
        changes: dict[str, Any] = {"chosen": tuple(models)} if models else {}
        changes |= {"seeds": tuple(seeds)} if seeds else {}
        changes |= {"lrs": tuple(lrs)} if lrs else {}
        return dataclasses.replace(self, **changes)


def check_names(what: str, of: str, values: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting that `NHAConfig` does not have: it would be kept and have no effect.

    >>> check_names("shape", "recall", {"hidden_sizes": 16})
    Traceback (most recent call last):
    ValueError: expected shape of recall with names of NHAConfig, got 'hidden_sizes'
    """
    known = {entry.name for entry in dataclasses.fields(NHAConfig)}
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ValueError(f"expected {what} of {of} with names of NHAConfig, got {unknown[0]!r}")


def plain(value: Any) -> Any:
    """Dataclasses as plain data without fields at their defaults, so that a new field changes no digest of before.

    >>> plain((ModelSpec("nha"), ModelSpec("linear", windows=0)))
    [{'name': 'nha'}, {'name': 'linear', 'windows': 0}]
    """
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if not dataclasses.is_dataclass(value):
        return value
    found = {}
    for entry in dataclasses.fields(value):
        default = entry.default
        if entry.default_factory is not dataclasses.MISSING:
            default = entry.default_factory()
        if (own := getattr(value, entry.name)) != default:
            found[entry.name] = plain(own)
    return found


def built_in_tables() -> list[str]:
    """Names of the tables that come with the library.

    >>> "recall-cpu" in built_in_tables()
    True
    """
    folder = files("nha.ablate").joinpath("tables")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def read_table(name: str | Path) -> Table:
    """A table from a YAML file, or a built-in one by its name.

    Raises ValueError, with the place in the file, for what is missing, unknown or cannot be.

    >>> read_table("recall-cpu").kind
    'recall'
    """
    if str(name) in built_in_tables():
        path: Path | Traversable = files("nha.ablate").joinpath("tables", f"{name}.yaml")
    else:
        path = Path(name)
        if not path.is_file():
            known = ", ".join(built_in_tables())
            raise ValueError(f"expected a YAML file or one of the tables {known}, got {str(name)!r}")
    found = read_yaml(path)
    try:
        return parse_table(found)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{error} in {name}") from None


def parse_table(found: Any) -> Table:
    """A table from plain data, as YAML gives it. Raises ValueError for what cannot be."""
    values = dict(_mapping("a table", found))
    models = _mapping("models", values.pop("models", {}))
    values["models"] = tuple(
        _make(ModelSpec, {"name": str(name), **_mapping(f"model {name}", settings or {})}, f"model {name}")
        for name, settings in models.items()
    )
    values["claims"] = tuple(
        _make(Claim, claim, f"claim {number}") for number, claim in enumerate(values.pop("claims", None) or (), 1)
    )
    if "recall" in values:
        values["recall"] = _recall_plan(_mapping("recall", values["recall"]))
    if "language" in values:
        values["language"] = _make(LanguagePlan, values["language"], "language")
    values["lrs"] = _floats("lrs of a table", values.get("lrs") or [])
    return _make(Table, values, "a table")


def _recall_plan(found: Mapping[str, Any]) -> RecallPlan:
    values = dict(found)
    train = [dict(_mapping("a size", size)) for size in values.get("train") or ()]
    values["weights"] = _floats("weights of recall", [size.pop("weight", 1.0) for size in train])
    values["train"] = tuple(_size(size) for size in train)
    values["test"] = tuple(_size(_mapping("a size", size)) for size in values.get("test") or ())
    return _make(RecallPlan, values, "recall")


def _size(found: Mapping[str, Any]) -> TaskSize:
    size: TaskSize = _make(TaskSize, {"task": "mqar"} | dict(found), "a size")
    size.draw(1, torch.Generator())
    return size


def _floats(what: str, values: Any) -> tuple[float, ...]:
    """Numbers; YAML reads 1e-3 as text. Raises ValueError for anything else."""
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"expected {what} as a list of numbers, got {values!r}")
    try:
        return tuple(float(value) for value in values)
    except (TypeError, ValueError):
        raise ValueError(f"expected {what} as a list of numbers, got {values!r}") from None


def _mapping(what: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"expected {what} to be a mapping, got {type(value).__name__}")
    return value


def _make(kind: type, values: Any, what: str) -> Any:
    """An instance of a dataclass; lists become tuples. Raises ValueError for unknown and missing names."""
    fields = {entry.name: entry for entry in dataclasses.fields(kind)}
    values = _mapping(what, values)
    unknown = sorted(str(name) for name in values if name not in fields)
    required = [
        name
        for name, entry in fields.items()
        if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in values]
    if unknown or missing:
        problem = f"got unknown {', '.join(unknown)}" if unknown else f"missing {', '.join(missing)}"
        raise ValueError(f"expected {what} with names out of {', '.join(fields)}, {problem}")
    for name, value in values.items():
        annotation = str(fields[name].type)
        if annotation in PLAIN:
            check_value(f"{name} of {what}", value, annotation, BOUNDS.get(name, {}))
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
