"""How a run begins: seconds from the command to each stage, and what is started early so that nothing waits for it."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from nha.io import write_atomically

IMPORTED = time.time()
NAME = "timeline.json"
BEGUN = "third step"  # the first step compiles; CUDA graphs are captured until the third
STEPS = {1: "first step", 3: BEGUN}


def process_start() -> float:
    """When this process began, in seconds since 1970; on systems that do not tell, when this module was imported.

    >>> 0 <= time.time() - process_start() < 1e6
    True
    """
    try:
        ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        began = time.time() - uptime + int(ticks) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return IMPORTED
    return min(began, IMPORTED)


@dataclass
class Timeline:
    """Seconds from the start of the process to the end of each stage.

    >>> timeline = Timeline()
    >>> timeline.mark("aligned")
    >>> list(timeline.stages), str(timeline).endswith(" s")
    (['aligned'], True)
    """

    start: float = field(default_factory=process_start)
    stages: dict[str, float] = field(default_factory=dict)

    def mark(self, stage: str) -> None:
        """Note that a stage has ended, the first time that it does."""
        self.stages.setdefault(stage, round(time.time() - self.start, 2))

    def mark_step(self, step: int, begun_at: int) -> None:
        """Note the end of a step of training, where it is one of `STEPS` after the step that the run began at."""
        if step - begun_at in STEPS:
            self.mark(STEPS[step - begun_at])

    def __str__(self) -> str:
        return "from the command: " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.stages.items())

    def write(self, run: Path) -> None:
        """Write the stages to RUN/timeline.json."""
        write_atomically(run / NAME, json.dumps(self.stages, indent=1) + "\n")


def start_compiler() -> None:
    """Start the processes that compile kernels, which takes seconds, before layers are compiled."""
    from torch._inductor.async_compile import maybe_warm_pool

    maybe_warm_pool()
