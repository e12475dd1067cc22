"""Teacher and student in one tree of modules: what is frozen is there once, what is trained twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from nha.distill.fused_linear import SAME_INPUT, FrozenLinear, Joint, Pair, join_frozen, part, share
from nha.distill.loss import Head, head_loss
from nha.models.config import FULL
from nha.models.windows import attention_layers, hybrid_layers, temporary_windows

TRAINED = ("attention", "layers", "lora", "slots")
SUMS = ("divergence", "cross_entropy", "tokens", "answer_loss", "answers", "answers_right")


@dataclass
class Mode:
    """Whose weights are in use, shared by all modules of one student."""

    teaching: bool = False


class TeacherStudentLinear(nn.Linear):
    """A linear layer in training: float32 `weight` and `bias` for the student, what they were for the teacher.

    `own` holds the parameters it was made of, untouched, in their own dtype; without a teacher (gates) it is empty.
    Inputs [..., in] may have any dtype: weights are cast to it.
    """

    def __init__(self, layer: nn.Linear, mode: Mode, taught: bool):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.dtype = layer.weight.dtype
        self.weight = nn.Parameter(layer.weight.detach().float().clone())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().float().clone())
        self.own = nn.ParameterList([p.requires_grad_(False) for p in layer.parameters()] if taught else [])
        self.mode = mode
        self.joint: Joint | None = None
        self.place = 0

    def forward(self, input: Tensor) -> Tensor:
        if self.joint is not None:
            return self.joint.read(self.place, input)
        own = self.own_pair
        return F.linear(input, *(own if own is not None and self.mode.teaching else self.pair(input.dtype)))

    @property
    def own_pair(self) -> Pair | None:
        """What the teacher computes with."""
        return (self.own[0], self.own[1] if len(self.own) > 1 else None) if len(self.own) else None

    def pair(self, dtype: torch.dtype) -> Pair:
        """What the student computes with in a dtype."""
        return self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)

    def released(self) -> nn.Linear:
        """A plain layer with the student's weights, in the dtype that the layer had."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight = nn.Parameter(self.weight.detach().to(self.dtype))
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().to(self.dtype))
        return layer


def whole(tensor: Tensor) -> Tensor:
    """A parameter or gradient that may be spread over devices, as one plain tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore[reportAttributeAccessIssue]


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def linear_layers(model: PreTrainedModel, trained: str) -> list[str]:
    """Names of the linear layers that are trained besides gates: those of attention, or of the whole decoder layers."""
    found = []
    stack: Any = model.get_decoder()
    inside = [id(m) for module in attention_layers(model) for m in module.modules()]
    layers = [id(m) for layer in stack.layers for m in layer.modules()]
    for name, module in model.named_modules():
        if type(module) is nn.Linear and ".nha." not in name:
            wanted = inside if trained in ("attention", "lora") else layers
            if trained != "slots" and id(module) in wanted:
                found.append(name)
    return found


class Distillation(nn.Module):
    """A hybrid in training and its teacher; `forward` is the loss of packed texts.

    Frozen weights (the feed-forward layers, norms and embeddings, unless `trained` says otherwise) are the very same
    parameters in both. With "attention" and "layers" the linear layers named so keep their old weights for the teacher
    and get float32 ones for the student; with "lora" both use the old ones and the student adds low-rank adapters
    (peft); "slots" trains gates and sinks alone. Gates and sinks are always trained, in float32.

    Args:
        model: a hybrid, as `hybridize` makes it, in the dtype to compute in.
        trained: "attention", "layers", "lora" or "slots".
        rank: of the adapters, with "lora".
        taught: False leaves the teacher out; there is no divergence then.
    """

    def __init__(self, model: PreTrainedModel, *, trained: str = "attention", rank: int = 16, taught: bool = True):
        super().__init__()
        if trained not in TRAINED:
            raise ValueError(f"expected what is trained to be one of {TRAINED}, got {trained!r}")
        self.mode = Mode()
        self.taught = taught
        self.beside = False  # whether the teacher's pass may run at the same time as the student's, on a GPU
        self.sides: dict[torch.cuda.Stream, torch.cuda.Stream] = {}
        hybrid_layers(model)
        self.windows: list[int] = list(model.config.window_sizes)  # type: ignore[arg-type]
        model.requires_grad_(False)
        names = linear_layers(model, trained)
        if trained == "lora":
            from peft import LoraConfig, get_peft_model

            adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, task_type="CAUSAL_LM")
            self.model: Any = get_peft_model(model, adapters)
            self.causal: Any = self.model.get_base_model()
        else:
            for name in names:
                _replace(model, name, TeacherStudentLinear(model.get_submodule(name), self.mode, taught=True))  # type: ignore[arg-type]
            self.model = self.causal = model
        for module, window in zip(attention_layers(self.causal), self.windows, strict=True):
            if window != FULL:
                slots = module.nha
                slots.g_proj = TeacherStudentLinear(slots.g_proj, self.mode, taught=False)
                for sink in ("sink_key", "sink_value"):
                    setattr(slots, sink, nn.Parameter(getattr(slots, sink).detach().float()))
        self._no_split_modules = model._no_split_modules
        Head.of(self.causal)

    def compile_layers(self, **options: Any) -> None:
        """From now on run decoder layers compiled, for GPUs; `options` are those of `torch.compile`.

        One graph serves all layers of a kind. Teacher and student, text and recall text, take one each.
        """
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for layer in self.causal.get_decoder().layers:
            layer.compile(dynamic=False, **options)

    def join_layers(self) -> None:
        """Compute linear layers that read the same input as one product, teacher's and student's."""
        hybrids = [m for m, w in zip(attention_layers(self.causal), self.windows, strict=True) if w != FULL]
        for module in self.causal.get_decoder().modules():
            for names in SAME_INPUT:
                layers: list[Any] = [getattr(module, name, None) for name in names]
                kinds = {type(layer) for layer in layers}
                if kinds == {nn.Linear}:
                    join_frozen(layers)
                elif kinds == {TeacherStudentLinear}:
                    layers += [module.nha.g_proj] if module in hybrids else []
                    self.join_taught(layers)

    def join_taught(self, layers: list[TeacherStudentLinear]) -> None:
        """The same for layers in training; gates have no teacher."""
        joint = Joint(layers, [layer.own_pair for layer in layers], lambda: self.mode.teaching)
        share(joint, [layer.own[0] for layer in layers if len(layer.own)])
        for place, layer in enumerate(layers):
            layer.joint, layer.place = joint, place

    @property
    def config(self) -> Any:
        """The hybrid's configuration."""
        return self.causal.config

    def groups(self, rate: float, gate_lr: float, sink_lr: float) -> list[dict[str, Any]]:
        """What is trained, as groups of an optimizer: weights, gates, sinks."""
        kinds: dict[str, list[nn.Parameter]] = {"weights": [], "gates": [], "sinks": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                kind = "gates" if ".g_proj." in name else "sinks" if ".nha.sink_" in name else "weights"
                if parameter.numel():
                    kinds[kind].append(parameter)
        rates = zip(kinds.items(), (rate, gate_lr, sink_lr), strict=True)
        return [{"params": params, "lr": lr, "name": kind} for (kind, params), lr in rates if params]

    @property
    def windows_in_use(self) -> list[int]:
        """The window of every layer."""
        return list(self.config.window_sizes)

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Within the context the model is what it was before the conversion, and nothing is recorded for gradients."""
        adapters = self.model.disable_adapter() if self.model is not self.causal else nullcontext()
        with torch.no_grad(), adapters, self.using(FULL):
            self.mode.teaching = True
            try:
                yield
            finally:
                self.mode.teaching = False

    @contextmanager
    def using(self, windows: int | Sequence[int]) -> Iterator[None]:
        """Within the context, attention has other windows: one for all layers, or one per layer."""
        given = [windows] * len(self.windows) if isinstance(windows, int) else windows
        with temporary_windows(self.causal, given):
            yield

    def side(self) -> torch.cuda.Stream | None:
        """The stream for the teacher's pass, which belongs to the current one and waits for it; None for the same."""
        if not (self.beside and self.taught):
            return None
        current = torch.cuda.current_stream()
        side = self.sides.setdefault(current, torch.cuda.Stream())
        side.wait_stream(current)
        return side

    def hidden(self, ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        """What the decoder hands to the head [N, hidden] for texts packed into one row, ids and positions [1, N]."""
        found = self.causal.get_decoder()(
            input_ids=ids,
            position_ids=position_ids,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=longest,
            max_length_k=longest,
            use_cache=False,
        )
        return found.last_hidden_state[0]

    def forward(
        self,
        ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        target: Tensor,
        follows: Tensor,
        answers: Tensor,
        by_divergence: Tensor,
        by_cross_entropy: Tensor,
        longest: int,
    ) -> tuple[Tensor, Tensor]:
        """Loss of texts packed into one row, and the sums named in `SUMS` [6].

        Args:
            ids, position_ids: [1, N].
            cu_seqlens: [texts + 1] int32, where texts start and end; empty texts may follow the last.
            target: [N], the token after each.
            follows, answers: [N] float32, 1 where the target belongs to the same text, and where it is part of an
                answer.
            by_divergence, by_cross_entropy: weights [N].
            longest: at least as long as any text.
        """
        taught, side = None, self.side()
        if self.taught:
            with self.teacher(), torch.cuda.stream(side):
                taught = self.hidden(ids, position_ids, cu_seqlens, longest)
        student = self.hidden(ids, position_ids, cu_seqlens, longest)
        if side is not None:
            torch.cuda.current_stream().wait_stream(side)
        head = Head.of(self.causal)  # asked for anew: sharding replaces parameters
        found = head_loss(student, taught, head, target, by_divergence, by_cross_entropy)
        plain = follows * (1 - answers)
        sums = [
            (found.divergence * plain).sum(),
            (found.cross_entropy * plain).sum(),
            plain.sum(),
            (found.cross_entropy * answers).sum(),
            answers.sum(),
            (found.hit * answers).sum(),
        ]
        return found.loss, torch.stack([x.detach().float() for x in sums])

    def release(self) -> PreTrainedModel:
        """The hybrid with its trained weights as plain modules in the dtype that it came in; the teacher is gone."""
        for module in self.modules():
            if hasattr(module, "reshard"):  # FSDP2 may hold whole parameters from the last forward pass
                module.reshard()  # type: ignore[operator]
        for module in self.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if hasattr(parameter, "full_tensor"):  # spread over devices
                    setattr(module, name, nn.Parameter(whole(parameter.detach()), requires_grad=False))
        if self.model is not self.causal:
            self.model = self.causal = self.model.merge_and_unload()
        for layer in self.causal.get_decoder().layers:
            layer._compiled_call_impl = None
        for name, module in list(self.causal.named_modules()):
            if isinstance(module, TeacherStudentLinear):
                _replace(self.causal, name, module.released())
            elif isinstance(module, FrozenLinear):
                part(module)
        for module in attention_layers(self.causal):
            for sink in ("sink_key", "sink_value"):
                value = getattr(module.nha, sink)
                setattr(module.nha, sink, nn.Parameter(value.detach().to(module.nha.g_proj.weight.dtype)))
        return self.causal.requires_grad_(True)
