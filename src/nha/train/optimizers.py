"""AdamW, or Muon for the matrices of layers with AdamW for the rest; both are PyTorch's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nha.train.settings import TrainSettings

MUON_EXCLUDED = ("g_proj.", "embed_tokens.", "lm_head.")  # gates are logits, embeddings are tables
SMALL = ("sink_",)
Groups = list[dict[str, Any]]


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers behind one interface, so that one schedule and one checkpoint serve both.

    Muon's steps have the root mean square of AdamW's, so that both take the same learning rate (arXiv 2502.16982).

    >>> matrix, vector = (nn.Parameter(torch.ones(n)) for n in ((2, 2), (2,)))
    >>> both = MuonWithAdamW([{"params": [matrix]}], [{"params": [vector]}], lr=0.1, betas=(0.9, 0.95), weight_decay=0)
    >>> matrix.grad, vector.grad = torch.ones(2, 2), torch.ones(2)
    >>> both.step()
    >>> bool((matrix < 1).all() and (vector < 1).all()), sorted(both.state_dict())
    (True, ['adamw', 'muon'])
    """

    def __init__(self, matrices: Groups, rest: Groups, lr: float, betas: tuple[float, float], weight_decay: float):
        self.muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=weight_decay)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step of both."""
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Read the states of both; their groups are new objects then."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]


def make_optimizer(model: nn.Module, settings: TrainSettings, fused: bool = False) -> torch.optim.Optimizer:
    """The optimizer of a run; vectors, norms and sinks get no weight decay."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.numel()]
    small = [p for name, p in named if p.dim() < 2 or any(part in name for part in SMALL)]
    known = {id(p) for p in small}
    large = [(name, p) for name, p in named if id(p) not in known]
    betas = (0.9, settings.beta2)
    common: dict[str, Any] = dict(lr=settings.lr, betas=betas, weight_decay=settings.weight_decay)
    plain = {"params": small, "weight_decay": 0.0}
    if settings.optimizer == "adamw":
        groups = [{"params": [p for _, p in large]}, plain]
        return torch.optim.AdamW([group for group in groups if group["params"]], fused=fused, **common)
    matrices = [p for name, p in large if p.dim() == 2 and not any(part in name for part in MUON_EXCLUDED)]
    known = {id(p) for p in matrices}
    rest = [{"params": [p for _, p in large if id(p) not in known]}, plain]
    return MuonWithAdamW([{"params": matrices}], [group for group in rest if group["params"]], **common)
