"""A process that compiles a run's layers and kernels while the command reads text, loads and converts the model.

Tracing and compiling hold Python's lock, so a thread of the command would only slow it down. What the process has
compiled lies in the caches of PyTorch's Inductor and of Triton, where the run finds it.

Imports no PyTorch: the process is to start before the command imports it.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from nha.distill.settings import DistillSettings

ORIGINAL, HYBRID = "original", "hybrid"  # stages: a control or the teacher, with full attention, and what follows
MODULE = "nha.distill.precompile"
FAILED = "failed: "
WAIT_SECONDS = 120.0  # then the run compiles by itself
GPU_DEVICE = Path("/dev/nvidiactl")


@dataclass
class CompilerProcess:
    """The process, the stages that it has compiled, and why it has not compiled others."""

    process: subprocess.Popen[bytes]
    compiled: set[str] = field(default_factory=set)
    failure: str = "the process has ended"

    def request(self, config: PretrainedConfig, dtype: str, settings: DistillSettings, stages: Sequence[str]) -> None:
        """Ask for the graphs and kernels of some stages of a run that trains a model of this configuration."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            pickle.dump((config, dtype, settings, tuple(stages)), self.process.stdin)
            self.process.stdin.flush()

    def wait(self, stage: str) -> bool:
        """Wait until a stage is compiled; False, with a warning, where that failed or takes too long."""
        assert self.process.stdout is not None
        timer = threading.Timer(WAIT_SECONDS, self.process.kill)
        timer.start()
        try:
            while stage not in self.compiled and (line := self.process.stdout.readline().decode().strip()):
                if line.startswith(FAILED):
                    self.failure = line.removeprefix(FAILED)
                else:
                    self.compiled.add(line)
        finally:
            timer.cancel()
        if stage not in self.compiled:
            warnings.warn(f"layers were not compiled beside the start of the run: {self.failure}", stacklevel=2)
        return stage in self.compiled

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


def start_compiler_process() -> CompilerProcess:
    """Start the process; it waits for one request, and ends when this process does."""
    process = subprocess.Popen(
        [sys.executable, "-m", MODULE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    return CompilerProcess(process)


def run_stages(settings: DistillSettings, control: bool, hybrid: bool) -> list[str]:
    """The stages of a command that trains a control, a hybrid or both, in the order in which they begin.

    >>> from nha.distill.settings import DistillSettings
    >>> run_stages(DistillSettings(), False, True), run_stages(DistillSettings(), True, True)
    (['hybrid'], ['original', 'hybrid'])
    """
    return [ORIGINAL] * (control or settings.teacher_tokens > 0) + [HYBRID] * hybrid


def has_one_gpu() -> bool:
    """Whether there is an NVIDIA GPU that this process does not share with others of a `torchrun`."""
    return GPU_DEVICE.exists() and int(os.environ.get("WORLD_SIZE", "1")) == 1
