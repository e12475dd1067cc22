"""Short prompts of `generate` as CUDA graphs: the host takes longer to launch their kernels than the GPU to run them.

A prompt of one sequence is padded on the right to one of a few lengths, so that few graphs serve all prompts. No token
sees the padding, and states end with the last token (`HybridMask.num_tokens`). The first prompt of a model waits for
kernels that are loaded or compiled, some seconds. Behind the first answers graphs of all lengths up to `PREPARED` are
recorded, `PER_ANSWER` at a time, and later prompts are replayed: the same kernels on inputs of the same shapes. The
first of a longer length is called, and its graph recorded by the second; so is any length once windows or weights of
the model were exchanged.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationConfig

from nha.models import decode_graph
from nha.models.cache import NHACacheLayer, cache_parts
from nha.models.config import FULL
from nha.models.decode_graph import is_plain
from nha.models.fused_step import is_fusing
from nha.models.int8_cache import Int8CacheLayer
from nha.models.masks import HybridMask, cache_argument
from nha.models.prompt import has_padding, reads_text, widest
from nha.models.windows import attention_layers, decoder
from nha.ops.backends import compile_kernels
from nha.ops.heads import all_windows

STEP = 256  # tokens between the lengths up to 1,024; beyond there are four lengths from a power of two to the next
HOST_WORK = 4e12  # tokens times parameters; for more the GPU takes longer than its host, and padding is seen
PREPARED = 4096
CALLED = 2  # lengths that are called before they are recorded: the shortest prompts may have a kernel of their own
PER_ANSWER = 6  # lengths recorded behind an answer: a process with a single prompt needs none of them
MAX_TOKENS = 16384
MAX_WORK = 2e13  # tokens times parameters; the GPU takes longer than the host for more
KNOWN = ("torch", "transformers", "nha")  # libraries whose modules compute the same as long as their parts are
MAX_GRAPHS = 48  # of a model, the most recently used


def padded_length(length: int, parameters: int = 0) -> int:
    """The length to which a prompt is padded, for a model with so many parameters.

    >>> [padded_length(length) for length in (1, 256, 257, 1025, 2049)]
    [256, 256, 512, 1280, 2560]
    >>> [padded_length(length, 8 * 10**9) for length in (1, 257, 700, 1025)]
    [256, 512, 704, 1088]
    """
    octave = 1 << max(length - 1, 1).bit_length() - 1  # the largest power of two below the length
    step = max(STEP, octave // 4)
    if length > STEP and length * parameters > HOST_WORK:
        step = max(STEP // 4, octave // 16)
    return -(-length // step) * step


def padded_lengths(longest: int, parameters: int = 0) -> list[int]:
    """All lengths up to `longest` to which prompts are padded.

    >>> padded_lengths(2100)
    [256, 512, 768, 1024, 1280, 1536, 1792, 2048]
    >>> padded_lengths(1200, 8 * 10**9)
    [256, 512, 576, 640, 704, 768, 832, 896, 960, 1024, 1088, 1152]
    """
    lengths = [STEP]
    while (following := padded_length(lengths[-1] + 1, parameters)) <= longest:
        lengths.append(following)
    return lengths


@dataclass
class PromptGraph:
    """A prompt of `length` tokens: its inputs, where its outputs are, and what computes them again.

    The cache lies in tensors that all graphs of a model share: it is copied before another is replayed.
    """

    ids: Tensor  # [1, length]
    num_tokens: Tensor  # [1] int64
    output: Any = None
    cache: Any = None
    replay: Callable[[], None] | None = None

    @classmethod
    def of(cls, length: int, device: torch.device) -> PromptGraph:
        """A graph without a recording."""
        with torch.inference_mode(False):  # tensors of inference could not be filled outside it
            ids = torch.zeros(1, length, dtype=torch.int64, device=device)
            return cls(ids, torch.zeros(1, dtype=torch.int64, device=device))

    def fill(self, ids: Tensor) -> None:
        """Let `ids` [1, T] be the inputs."""
        self.ids[:, : ids.shape[1]] = ids
        self.ids[:, ids.shape[1] :] = 0
        self.num_tokens.fill_(ids.shape[1])

    def run(self, model: Any, name: str) -> tuple[Any, Cache]:
        """Output, with logits of the last token alone, and cache of the model, whose argument `name` is the cache."""
        cache = DynamicCache(config=model.config)
        output = model(
            self.ids,
            attention_mask=HybridMask(num_tokens=self.num_tokens),
            use_cache=True,
            logits_to_keep=self.num_tokens - 1,
            **{name: cache},
        )
        return output, cache


@dataclass
class PromptGraphs:
    """The graphs of one model by length, and the parts of the model that they were recorded with."""

    parts: tuple[Any, ...] = ()
    graphs: OrderedDict[int, PromptGraph] = field(default_factory=OrderedDict)
    refused: bool = False
    prepared: bool = False
    name: str = "past_key_values"  # of the model's argument that is the cache
    pending: list[int] = field(default_factory=list)  # lengths that are recorded behind answers
    pool: Any = None
    held: list[Tensor] = field(default_factory=list)  # of the cache of every graph, as long as the longest needs them
    lock: threading.Lock = field(default_factory=threading.Lock)

    def renew(self, parts: tuple[Any, ...]) -> None:
        """Forget what was recorded with other parts of the model."""
        if parts != self.parts:
            self.parts, self.refused, self.pool = parts, False, None
            self.forget()

    def forget(self) -> None:
        """Drop all graphs."""
        for x in (self.graphs, self.held, self.pending):
            x.clear()

    def refuse(self, error: Exception) -> None:
        """Record no prompt of these parts of the model again."""
        self.refused = True
        self.forget()
        if not isinstance(error, NotImplementedError):
            warnings.warn(f"prompts go on without CUDA graphs, which could not be recorded: {error}", stacklevel=3)

    def read(self, model: Any, ids: Tensor, length: int, name: str) -> tuple[Any, Cache] | None:
        """Output and cache for a prompt [1, T] padded to `length`, which the next call overwrites; None where the
        model cannot read padding."""
        self.name = name
        try:
            if not self.prepared:
                self.prepared = True
                self.prepare(model, ids.device)
            first = length not in self.graphs and length not in self.pending  # whose kernels are loaded
            graph = self._graph(length, ids.device)
            graph.fill(ids)
            if first:
                return graph.run(model, name)
            if graph.replay is None:
                self._record(graph, model)
        except (NotImplementedError, RuntimeError) as error:
            self.refuse(error)
            return None
        assert graph.replay is not None
        graph.replay()
        return graph.output, graph.cache

    def prepare(self, model: Any, device: torch.device) -> None:
        """Load the kernels of prompts by calls of the shortest lengths up to `PREPARED`; all those are pending then."""
        lengths = padded_lengths(PREPARED, count_parameters(model))
        self.pending = [each for each in lengths if graph_length(model, each) == each]
        graphs = [PromptGraph.of(each, device) for each in self.pending[:CALLED]]
        with torch.inference_mode(False), torch.no_grad():
            if graphs:
                compile_ahead(model, graphs, self.name)
            for graph in graphs:
                graph.num_tokens.fill_(graph.ids.shape[1])
                graph.run(model, self.name)

    def record_pending(self, model: Any, count: int) -> None:
        """Record up to `count` pending lengths, the longest first: the others then find their memory in the pool."""
        try:
            for length in self.pending[: -count - 1 : -1]:
                graph = self._graph(length, model.device)
                graph.num_tokens.fill_(length)
                self._record(graph, model)
        except (NotImplementedError, RuntimeError) as error:
            self.refuse(error)

    def _graph(self, length: int, device: torch.device) -> PromptGraph:
        """The graph of a length, the most recently used from now on."""
        graph = self.graphs.pop(length, None) or PromptGraph.of(length, device)
        self.graphs[length] = graph
        while len(self.graphs) > MAX_GRAPHS:
            self.graphs.popitem(last=False)
        return graph

    def _record(self, graph: PromptGraph, model: Any) -> None:
        if self.pool is None and graph.ids.is_cuda:
            self.pool = torch.cuda.graph_pool_handle()

        def run() -> tuple[Any, Cache]:
            output, cache = graph.run(model, self.name)
            hold_cache(cache, self.held)
            return replace(output, **{self.name: None}), cache

        with torch.inference_mode(False), torch.no_grad():
            (graph.output, graph.cache), graph.replay = decode_graph.capture(run, self.pool)
        self.pending = [length for length in self.pending if length != graph.ids.shape[1]]


def compile_ahead(model: Any, graphs: list[PromptGraph], name: str) -> None:
    """Compile the kernels of prompts of these lengths, and of tokens after them, side by side; nothing is computed.

    Within a process the kernels of models of the same sizes are compiled once.
    """
    config, device = decoder(model).config, model.device
    key = model.dtype, str(config.window_sizes), config.hidden_size, config.num_attention_heads, config.num_slots
    if key in _compiled:
        return
    _compiled.add(key)

    def launch() -> None:
        for graph in graphs:
            length = graph.ids.shape[1]
            graph.num_tokens.fill_(length)
            _, cache = graph.run(model, name)
            decode_graph.make_static(cache, length + 1)
            position = torch.full((1, 1), length, device=device)
            model(graph.ids[:, :1], position_ids=position, use_cache=True, **{name: cache})

    compile_kernels(launch, device)


_compiled: set[tuple[Any, ...]] = set()
_graphs: WeakKeyDictionary[nn.Module, PromptGraphs] = WeakKeyDictionary()
_counts: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def parts_of(model: Any) -> tuple[Any, ...] | None:
    """The parts of a model that a recording depends on, besides its inputs: classes, addresses of weights, windows.

    None where a module is from another library or its forward pass is replaced, which may depend on more: PEFT switches
    adapters off, and accelerate moves weights.
    """
    config = decoder(model).config
    found: list[Any] = [is_fusing(), config.slots_from_start, config._attn_implementation, config.kv_cache_dtype]
    found += [(x.window_size, x.ablation, x.nha.initial is None) for x in attention_layers(model)]
    for module in model.modules():
        if type(module).__module__.partition(".")[0] not in KNOWN or "forward" in vars(module):
            return None
        found.append(type(module))
        for x in (*module._parameters.values(), *module._buffers.values()):
            if x is not None:
                found += (x.data_ptr(), x.dtype)
    return tuple(found)


def prompt_bytes(model: Any, length: int) -> int:
    """Bytes of the tensors of a prompt, roughly: activations of an MLP, hidden states, keys and values."""
    return length * (3 * widest(model) + 16 * decoder(model).config.hidden_size) * model.dtype.itemsize


def count_parameters(model: nn.Module) -> int:
    """Numbers in the weights of a model; counted once, since a prompt would wait for it."""
    if model not in _counts:
        _counts[model] = sum(x.numel() for x in model.parameters())
    return _counts[model]


def graph_length(model: Any, length: int) -> int | None:
    """The length to which a prompt of `length` tokens is padded, None where it is called.

    Kernels read prompts that are longer than every window. One that some windows hold is padded beyond them, to no more
    than twice the length that it takes elsewhere; where all hold it, a hybrid has the bits of its original, which the
    family's code computes. Above `MAX_WORK` the GPU takes longer than the host.
    """
    windows = [window for window in all_windows(decoder(model).config.window_sizes) if window != FULL]
    if not windows or length <= min(windows):
        return None
    count = count_parameters(model)
    padded = padded_length(max(length, max(windows) + 1), count)
    if padded > min(2 * padded_length(length, count), MAX_TOKENS) or padded * count > MAX_WORK:
        return None
    return padded if 4 * prompt_bytes(model, padded) < decode_graph.free_bytes(model.device) else None


def map_tensors(cache: Cache, function: Callable[[Tensor], Tensor]) -> None:
    """Put `function` of every tensor of a cache in its place."""
    for part in cache_parts(cache):
        if isinstance(part, NHACacheLayer):
            part.state = None if part.state is None else part.state.map(function)
        elif isinstance(part, Int8CacheLayer):
            part.map(function)
        elif part.is_initialized:
            part.keys, part.values = function(part.keys), function(part.values)


def hold_cache(cache: Cache, held: list[Tensor]) -> None:
    """Move a cache of prompts to tensors that are there already, as far as they are long enough, and add the others."""
    place, pairs = itertools.count(), []

    def hold(x: Tensor) -> Tensor:
        index = next(place)
        if index == len(held):
            held.append(torch.empty_like(x))
        elif any(size < new for size, new in zip(held[index].shape, x.shape, strict=True)):
            held[index] = torch.empty_like(x)
        target = held[index] if held[index].shape == x.shape else held[index][:, :, : x.shape[2]]
        pairs.append((target, x))
        return target

    map_tensors(cache, hold)
    copy_tensors(pairs)


def copy_tensors(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of every pair to the first, in few launches where their layouts agree."""
    groups: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for target, source in pairs:
        if target.stride() == source.stride():
            groups.setdefault(target.dtype, []).append((target, source))
        else:
            target.copy_(source)
    for group in groups.values():
        targets, sources = zip(*group, strict=True)
        torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]


def copy_cache(source: Cache, target: Cache, length: int) -> None:
    """Give the empty layers of one cache the first `length` tokens of another's; states end there already."""
    pairs: list[tuple[Tensor, Tensor]] = []

    def copied(x: Tensor) -> Tensor:
        pairs.append((torch.empty_like(x), x))
        return pairs[-1][0]

    for ours, new in zip(cache_parts(source), cache_parts(target), strict=True):
        if isinstance(ours, NHACacheLayer):
            assert ours.state is not None
            new.lazy_initialization(ours.state.key, ours.state.value)
            new.state, new.length = ours.state.map(copied), length
        elif isinstance(ours, Int8CacheLayer):
            new.copy_from(ours, length)
        else:
            new.update(ours.keys[:, :, :length], ours.values[:, :, :length])  # which copies them
    copy_tensors(pairs)


def replay_prompt(
    model: Any, ids: Tensor, config: GenerationConfig, kwargs: dict[str, Any], before_decoder: Callable
) -> Any:
    """The model's output for the prompts [B, T] of a call of `generate`, read into its cache; None where it is called.

    Only one prompt of text at a time is replayed, where the GPU would wait for the host. `disable_compile=True` and a
    chosen `compile_config` switch graphs off.
    """
    if config.disable_compile or config.compile_config is not None or not decode_graph.can_capture(model.device):
        return None
    if ids.shape[0] != 1 or not reads_text(config, kwargs):
        return None
    length = graph_length(model, ids.shape[1])
    if length is None or decoder(model).config.state_dtype != "float32" or has_padding(ids, kwargs):
        return None
    if not is_plain(model, before_decoder) or any(layer.slot_write != "soft" for layer in attention_layers(model)):
        return None
    graphs = _graphs.setdefault(model, PromptGraphs())
    if not graphs.lock.acquire(blocking=False):  # another thread reads a prompt with this model
        return None
    try:
        parts = parts_of(model)
        if parts is None:
            return None
        graphs.renew(parts)
        name = "past_key_values" if kwargs.get("cache") is None else "cache"
        found = None if graphs.refused else graphs.read(model, ids, length, name)
        if found is None:
            return None
        output, cache = found
        own = cache_argument(kwargs)
        copy_cache(cache, own, ids.shape[1])
        return replace(output, **{name: own})
    finally:
        graphs.lock.release()


def record_lengths(model: Any, count: int = PER_ANSWER) -> None:
    """After an answer of `generate`: record up to `count` of the lengths of prompts that are pending."""
    graphs = _graphs.get(model)
    if graphs is None or not graphs.pending or not graphs.lock.acquire(blocking=False):
        return
    try:
        if parts_of(model) == graphs.parts:
            graphs.record_pending(model, count)
    finally:
        graphs.lock.release()


def warm_up(model: Any) -> None:
    """Load a model's kernels and record its short prompts, so that the first request does not wait for either.

    Nothing happens where nothing is recorded, as on a CPU.
    """
    if not decode_graph.can_capture(model.device):
        return
    windows = all_windows(decoder(model).config.window_sizes)
    ids = torch.zeros(1, max(windows) + 2, dtype=torch.int64, device=model.device)
    count = {"max_new_tokens": decode_graph.MIN_TOKENS, "min_new_tokens": decode_graph.MIN_TOKENS}
    model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **count)
    record_lengths(model, MAX_GRAPHS)
