"""The loss by chunks equals PyTorch's cross-entropy, with all gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel

from nha import NHAConfig
from nha.distill.loss import Head
from nha.models.nha import NHAForCausalLM
from nha.train.loss import LanguageModel, cross_entropy
from nha.train.optimizers import MuonWithAdamW, make_optimizer
from nha.train.presets import preset_config
from nha.train.rows import Sequences
from tests.train.material import LENGTH, Copying, material, settings


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("chunk_size", [3, 64])
def test_loss_and_gradients_are_those_of_pytorch(cap, chunk_size):
    torch.manual_seed(0)
    hidden = torch.randn(10, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(13, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(13, (10,))
    targets[[2, 5]] = -100
    loss = cross_entropy(hidden, Head(weight, 0.7, cap), targets, chunk_size=chunk_size)
    ours = torch.autograd.grad(3 * loss, (hidden, weight))
    logits = 0.7 * hidden @ weight.T
    wanted = F.cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), targets)
    theirs = torch.autograd.grad(3 * wanted, (hidden, weight))
    assert torch.allclose(loss, wanted) and all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))


def test_targets_of_which_none_counts_give_zero():
    hidden = torch.randn(4, 8, requires_grad=True)
    loss = cross_entropy(hidden, Head(torch.randn(5, 8)), torch.full((4,), -100))
    loss.backward()
    assert loss.item() == 0 and hidden.grad is not None and not hidden.grad.any()


def test_the_loss_of_a_model_is_its_own(tmp_path):
    model = NHAForCausalLM(preset_config("tiny", 64, tie_word_embeddings=True))
    batch = Sequences(Copying(), LENGTH).batch(0, 3)
    ours = LanguageModel(model)(**batch)
    theirs = F.cross_entropy(model(batch["ids"]).logits.flatten(0, 1), batch["targets"].flatten())
    assert torch.allclose(ours, theirs, rtol=1e-5)


def test_packed_documents_do_not_see_each_other_and_joined_ones_do(tmp_path):
    corpus, _ = material(tmp_path)
    model = LanguageModel(NHAForCausalLM(preset_config("tiny", 300, window_sizes=8)))
    packed = Sequences(corpus, 512, "documents").batch(0, 2)
    bounds = [b for b in packed["cu_seqlens"].tolist() if b < packed["ids"].shape[1]]
    assert len(bounds) > 4
    start, stop = bounds[1], bounds[2]
    alone = model(packed["ids"][:, start:stop], packed["targets"][:, start:stop])
    inside = packed | {"targets": torch.full_like(packed["targets"], -100)}
    inside["targets"][:, start:stop] = packed["targets"][:, start:stop]
    assert torch.allclose(model(**inside), alone, rtol=1e-4)
    joined = Sequences(corpus, 64, "joined").batch(0, 4)
    assert joined["ids"].shape == (4, 64) and (joined["targets"] >= 0).all()
    assert torch.equal(joined["ids"][:, 1:], joined["targets"][:, :-1])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_in_one_group_and_vectors_do_not_decay(name):
    model = NHAForCausalLM(preset_config("tiny", 64, num_sinks=1, qk_norm=True))
    optimizer = make_optimizer(model, settings(optimizer=name))
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()} and len(grouped) == len(
        set(map(id, grouped))
    )
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for key, p in model.named_parameters():
        assert (decays[id(p)] > 0) == (p.dim() == 2), key
    if isinstance(optimizer, MuonWithAdamW):
        muon = {id(p) for group in optimizer.muon.param_groups for p in group["params"]}
        inside = {key for key, p in model.named_parameters() if id(p) in muon}
        assert any("q_proj" in key for key in inside) and not any("g_proj" in key or "embed" in key for key in inside)


@pytest.mark.parametrize("window", [8, -1])
def test_all_layers_of_a_kind_and_later_models_share_one_compiled_graph(window, monkeypatch):
    """A guard on a layer's index would compile each layer anew: minutes for a deep model."""
    graphs = CompileCounter()
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled(self, backend=graphs, **options))
    torch._dynamo.reset()
    try:
        for seed in range(2):
            torch.manual_seed(seed)
            causal = NHAForCausalLM(NHAConfig.tiny(num_hidden_layers=3, window_sizes=window))
            model = LanguageModel(causal)
            model.compile_layers()
            ids = torch.arange(64).view(2, 32)
            model(ids, ids).backward()
        assert graphs.frame_count == 1
    finally:
        torch._dynamo.reset()


def test_gradients_sent_in_small_buckets_do_not_split_the_graph_of_a_layer(tmp_path, monkeypatch):
    graphs, compiled = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled(self, backend=graphs, **options))
    model = LanguageModel(NHAForCausalLM(preset_config("tiny", 64, window_sizes=8)))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with torch._dynamo.config.patch(optimize_ddp=True):  # as PyTorch begins
            model.compile_layers()
            replicated = DistributedDataParallel(model, bucket_cap_mb=1e-3)  # type: ignore[arg-type]
            replicated(**Sequences(Copying(), LENGTH).batch(0, 3)).backward()
    finally:
        dist.destroy_process_group()
        torch._dynamo.reset()
    assert graphs.frame_count == 1
