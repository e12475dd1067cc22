"""Teacher and student in one tree of modules: frozen weights are shared, trained ones exist twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from nha.distill.gradients import whole
from nha.distill.loss import Head, head_loss
from nha.distill.settings import TRAINABLE
from nha.models.adapter import compute_dtype, layer_tables
from nha.models.config import FULL, LayerWindow
from nha.models.masks import mark_packing
from nha.models.quantized import check_unpacked
from nha.models.windows import attention_layers, hybrid_layers, temporary_windows
from nha.ops.backends import compile_kernels
from nha.ops.heads import Window, window_of
from nha.settings import check_choice

Weights = tuple[Tensor, Tensor | None]  # weight [out, in] and bias [out] of a linear layer
SUMS = ("kl", "cross_entropy", "tokens", "answer_loss", "answers", "correct_answers")


@dataclass
class Mode:
    """Whose weights are in use, shared by all modules of one student."""

    teacher: bool = False


class TeacherStudentLinear(nn.Linear):
    """A linear layer in training: float32 `weight` and `bias` for the student, the original ones for the teacher.

    `original` holds the parameters of the layer it was made from, frozen, in their own dtype; without a teacher (gates)
    it is empty. Inputs [..., in] may have any dtype: weights are cast to it.
    """

    def __init__(self, layer: nn.Linear, mode: Mode, has_teacher: bool):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.dtype = layer.weight.dtype
        self.weight = nn.Parameter(layer.weight.detach().float().clone())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().float().clone())
        self.original = nn.ParameterList([p.requires_grad_(False) for p in layer.parameters()] if has_teacher else [])
        self.mode = mode

    def forward(self, input: Tensor) -> Tensor:
        teacher = self.teacher_weights
        return F.linear(input, *(teacher if teacher and self.mode.teacher else self.student_weights(input.dtype)))

    @property
    def teacher_weights(self) -> Weights | None:
        """Weight and bias of the teacher; None without one."""
        return (self.original[0], self.original[1] if len(self.original) > 1 else None) if len(self.original) else None

    def student_weights(self, dtype: torch.dtype) -> Weights:
        """Weight and bias of the student, cast to a dtype."""
        return self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)

    def to_linear(self) -> nn.Linear:
        """A plain layer with the student's weights, in the original dtype."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight = nn.Parameter(self.weight.detach().to(self.dtype))
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().to(self.dtype))
        return layer


def _require_grad(embedding: nn.Module, inputs: tuple, hidden: Tensor) -> Tensor:
    """Let the first layer get hidden states that ask for gradients, as all others do: it needs no graph of its own."""
    return hidden.requires_grad_() if torch.is_grad_enabled() and not hidden.requires_grad else hidden


def packed_arguments(position_ids: Tensor, cu_seqlens: Tensor, max_seq_len: int) -> dict[str, Any]:
    """The arguments of a decoder's forward pass for packed sequences, besides their tokens."""
    return {
        "position_ids": position_ids,
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max_seq_len,
        "max_length_k": max_seq_len,
        "use_cache": False,
    }


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def linear_layers(model: PreTrainedModel, trainable: str) -> list[str]:
    """Names of the linear layers that are trained besides gates: those of attention, or of whole decoder layers.

    Raises ValueError for quantized layers, which only "lora" and "slots" can train around.
    """
    if trainable == "slots":
        return []
    stack: Any = model.get_decoder()
    parents = stack.layers if trainable == "layers" else attention_layers(model)
    inside = {id(module) for parent in parents for module in parent.modules()}
    found = []
    for name, module in model.named_modules():
        if id(module) not in inside or not isinstance(module, nn.Linear) or ".nha." in name:
            continue
        if trainable != "lora" and not (type(module) is nn.Linear and module.weight.is_floating_point()):
            kind = f"{type(module).__name__} of {module.weight.dtype}"
            raise ValueError(
                f"expected trainable lora or slots for quantized weights ({name}, {kind}), got {trainable}"
            )
        found.append(name)
    return found


class Distillation(nn.Module):
    """A hybrid in training and its teacher; `forward` is the loss of packed sequences.

    Frozen weights (the feed-forward layers, norms and embeddings, unless `trainable` includes them) are the same
    parameters in both. With "attention" and "layers" the linear layers of these keep their original weights for the
    teacher and get float32 copies for the student; with "lora" both use the original ones and the student adds low-rank
    adapters (peft); "slots" trains gates and sinks alone. Gates and sinks are always trained, in float32.

    Args:
        model: a hybrid, as `hybridize` makes it, in the dtype to compute in.
        trainable: "attention", "layers", "lora" or "slots".
        lora_rank: of the adapters, with "lora".
        has_teacher: False leaves the teacher's forward pass out; the KL divergence is 0 then.

    Raises:
        ValueError: an unknown `trainable`, quantized weights that it cannot train or that are packed, or a head with
            a bias.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        trainable: str = "attention",
        lora_rank: int = 16,
        has_teacher: bool = True,
    ):
        super().__init__()
        check_choice("trainable", trainable, TRAINABLE)
        hybrid_layers(model)
        Head.of(model)
        check_unpacked(model)
        names = linear_layers(model, trainable)
        self.mode = Mode()
        self.has_teacher = has_teacher
        self.windows: list[LayerWindow] = list(model.config.window_sizes)  # type: ignore[arg-type]
        model.requires_grad_(False)
        if trainable == "lora":
            from peft import LoraConfig, get_peft_model

            adapters = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=names, task_type="CAUSAL_LM")
            self.model: Any = get_peft_model(model, adapters)
            self.causal: Any = self.model.get_base_model()
        else:
            for name in names:
                layer: Any = model.get_submodule(name)
                _replace(model, name, TeacherStudentLinear(layer, self.mode, has_teacher=True))
            self.model = self.causal = model
        for module, window in zip(attention_layers(self.causal), self.windows, strict=True):
            if window != FULL:
                slots = module.nha
                slots.g_proj = TeacherStudentLinear(slots.g_proj, self.mode, has_teacher=False)
                for sink in ("sink_key", "sink_value"):
                    setattr(slots, sink, nn.Parameter(getattr(slots, sink).detach().float()))
        self._no_split_modules = model._no_split_modules
        self.embedding_hook: Any = None

    def compile_kernels(self, seq_len: int, *windows: Sequence[Window]) -> None:
        """Compile the kernels of packed sequences for these windows of all layers, side by side, on a GPU.

        In a first pass they are compiled one after another. Call it before `compile_layers`.
        """
        device = next(self.parameters()).device
        modules = attention_layers(self.causal)

        def launch() -> None:
            given = self.attention_inputs(seq_len)
            for each in windows:
                with self.using(each):
                    for index in {window_of(window): index for index, window in enumerate(each)}.values():
                        out = modules[index](**given[index])[0]
                        hidden = given[index]["hidden_states"]
                        trained = [p for p in modules[index].parameters() if p.requires_grad]
                        torch.autograd.grad(out.float().sum(), [hidden, *trained], allow_unused=True)

        compile_kernels(launch, device)

    def attention_inputs(self, seq_len: int) -> list[dict[str, Any]]:
        """Per layer, the arguments of its attention in a pass over two packed sequences of `seq_len` tokens.

        Hidden states [1, 2 * seq_len, hidden] are 0 and ask for gradients.
        """
        device = next(self.parameters()).device
        position = torch.arange(seq_len, device=device).repeat(2)[None]
        cu_seqlens = torch.tensor([0, seq_len, 2 * seq_len], dtype=torch.int32, device=device)
        size, dtype = self.config.get_text_config().hidden_size, compute_dtype(self.causal)
        hidden = torch.zeros(1, 2 * seq_len, size, dtype=dtype, device=device, requires_grad=True)
        packed = mark_packing(packed_arguments(position, cu_seqlens, seq_len)) | {"hidden_states": hidden}
        tables = layer_tables(self.causal, hidden.detach(), position)
        return [packed | {"position_embeddings": each} for each in tables]

    def compile_layers(self, **options: Any) -> None:
        """Run decoder layers compiled from now on; `options` are those of `torch.compile`.

        One graph serves all layers of a kind. Teacher and student, text and recall text, take one each. Where hybrid
        layers have different windows, attention runs outside the graphs, which then serve layers of any windows, and
        from the second length on sequences of any length. Else they serve one length and one size of `cu_seqlens`
        each. `pack` makes that size 1 and a power of two, so that few occur however many documents a batch has.
        """
        outside = len({window_of(window) for window in self.windows} - {FULL}) > 1
        for module in attention_layers(self.causal):
            module.attention_outside_graph = outside
        self.embedding_hook = self.causal.get_input_embeddings().register_forward_hook(_require_grad)
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for layer in self.causal.get_decoder().layers:
            layer.compile(dynamic=None if outside else False, **options)

    @property
    def config(self) -> Any:
        """The hybrid's configuration."""
        return self.causal.config

    def parameter_groups(self, lr: float, gate_lr: float, sink_lr: float) -> list[dict[str, Any]]:
        """The trained parameters as groups of an optimizer: weights, gates, sinks."""
        kinds: dict[str, list[nn.Parameter]] = {"weights": [], "gates": [], "sinks": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and parameter.numel():
                kind = "gates" if ".g_proj." in name else "sinks" if ".nha.sink_" in name else "weights"
                kinds[kind].append(parameter)
        rates = zip(kinds.items(), (lr, gate_lr, sink_lr), strict=True)
        return [{"params": params, "lr": rate, "name": kind} for (kind, params), rate in rates if params]

    @property
    def current_windows(self) -> tuple[int | tuple[int, ...], ...]:
        """The window of every layer, or those of its heads."""
        return tuple(window_of(window) for window in self.config.window_sizes)

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Within the context the model is the original one, and no gradients are recorded."""
        adapters = self.model.disable_adapter() if self.model is not self.causal else nullcontext()
        with torch.no_grad(), adapters, self.using(FULL):
            self.mode.teacher = True
            try:
                yield
            finally:
                self.mode.teacher = False

    @contextmanager
    def using(self, windows: int | Sequence[Window]) -> Iterator[None]:
        """Within the context, attention has other windows: one for all layers, or one per layer or head."""
        given = [windows] * len(self.windows) if isinstance(windows, int) else windows
        with temporary_windows(self.causal, given):
            yield

    def hidden(self, ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seq_len: int) -> Tensor:
        """Hidden states [N, hidden] before the head, for packed sequences with ids and positions [1, N]."""
        found = self.causal.get_decoder()(input_ids=ids, **packed_arguments(position_ids, cu_seqlens, max_seq_len))
        return found.last_hidden_state[0]

    def forward(
        self,
        ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        target: Tensor,
        follows: Tensor,
        answers: Tensor,
        kl_weight: Tensor,
        ce_weight: Tensor,
        max_seq_len: int,
        teacher_position_ids: Tensor | None = None,
        teacher_cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Loss [] of packed sequences, and the sums named in `SUMS` [6] float32.

        Args:
            ids, position_ids: [1, N].
            cu_seqlens: [sequences + 1] int32, where sequences begin and end; empty ones may follow the last.
            target: [N], the token after each.
            follows, answers: [N] float32, 1 where the target belongs to the same sequence, and where it is part of an
                answer.
            kl_weight, ce_weight: [N] float32, weights of KL divergence and cross-entropy.
            max_seq_len: at least the length of every sequence.
            teacher_position_ids, teacher_cu_seqlens: those of the pieces that the teacher reads; default: the same.
        """
        teacher = None
        if self.has_teacher:
            with self.teacher():
                positions = position_ids if teacher_position_ids is None else teacher_position_ids
                bounds = cu_seqlens if teacher_cu_seqlens is None else teacher_cu_seqlens
                teacher = self.hidden(ids, positions, bounds, max_seq_len)
        student = self.hidden(ids, position_ids, cu_seqlens, max_seq_len)
        head = Head.of(self.causal)  # read each time: sharding replaces parameters
        found = head_loss(student, teacher, head, target, kl_weight, ce_weight)
        text = follows * (1 - answers)
        sums = [
            (found.kl * text).sum(),
            (found.cross_entropy * text).sum(),
            text.sum(),
            (found.cross_entropy * answers).sum(),
            answers.sum(),
            (found.correct * answers).sum(),
        ]
        return found.loss, torch.stack([x.detach().float() for x in sums])

    def release(self) -> PreTrainedModel:
        """The hybrid with its trained weights in plain modules of the original dtype; the teacher is gone."""
        for module in self.modules():
            if hasattr(module, "reshard"):  # FSDP2 may hold whole parameters from the last forward pass
                module.reshard()  # type: ignore[operator]
        for module in self.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if hasattr(parameter, "full_tensor"):
                    setattr(module, name, nn.Parameter(whole(parameter.detach()), requires_grad=False))
        if self.model is not self.causal:
            self.model = self.causal = self.model.merge_and_unload()
        if self.embedding_hook is not None:
            self.embedding_hook.remove()
        for layer in self.causal.get_decoder().layers:
            layer._compiled_call_impl = None
            layer.self_attn.attention_outside_graph = False
        for name, module in list(self.causal.named_modules()):
            if isinstance(module, TeacherStudentLinear):
                _replace(self.causal, name, module.to_linear())
        for module in attention_layers(self.causal):
            for sink in ("sink_key", "sink_value"):
                value = getattr(module.nha, sink)
                setattr(module.nha, sink, nn.Parameter(value.detach().to(module.nha.g_proj.weight.dtype)))
        for parameter in self.causal.parameters():  # quantized weights are integers, which have no gradient
            parameter.requires_grad_(parameter.is_floating_point())
        return self.causal
