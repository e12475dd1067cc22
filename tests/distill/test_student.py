"""Teacher and student share what is frozen, and the teacher stays what it was while the student learns."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from nha import hybridize
from nha.data.packing import pack
from nha.distill.student import Distillation, TeacherStudentLinear, linear_layers
from nha.distill.trainer import short_windows
from nha.models.windows import attention_layers
from tests.inputs import assert_close_to
from tests.models.families import FAMILIES, hybrid, teacher, tokens

TEXT = tokens(4, 64, seed=3)
LENGTHS = (40, 9, 25)


def student_of(model=None, **options):
    model = model or teacher()
    return Distillation(hybridize(model, num_slots=6, window_size=8, init="soft", calibration=TEXT), **options)


def batch(lengths=LENGTHS, seed=0):
    """Packed texts of these lengths as `forward` takes them."""
    ids = tokens(1, sum(lengths), seed=seed)[0].numpy()
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    answers = (tokens(1, sum(lengths), seed=seed + 1)[0] % 5 == 0).numpy()
    made = {key: torch.from_numpy(x) for key, x in pack([(ids, starts, answers)]).items()}
    made["kl_weight"] = made["follows"] / 50
    made["ce_weight"] = made["answers"] / 10
    return made | {"max_seq_len": max(lengths)}


@pytest.mark.parametrize("trainable", ["attention", "layers", "lora", "slots"])
def test_frozen_weights_are_in_memory_once_and_the_teachers_are_the_originals(trainable):
    model = teacher()
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    student = student_of(model, trainable=trainable)
    here = [p.data_ptr() for p in student.parameters()]
    assert len(here) == len(set(here))
    assert set(places.values()) <= set(here)  # nothing of the teacher was copied or thrown away
    twice = sum(len(m.original) > 0 for m in student.modules() if isinstance(m, TeacherStudentLinear))
    assert twice == {"attention": 12, "layers": 21}.get(trainable, 0)
    frozen = [p.data_ptr() for p in student.parameters() if not p.requires_grad]
    assert set(frozen) >= set(places.values())


def test_the_teacher_reads_pieces_as_documents_of_their_own():
    student, given = student_of(), batch((40,))
    given["teacher_position_ids"] = given["position_ids"] % 16
    given["teacher_cu_seqlens"] = torch.tensor([0, 16, 32, 40], dtype=torch.int32)
    with student.teacher():
        pieces = [batch_of_one(student, given, start, end) for start, end in ((0, 16), (16, 32), (32, 40))]
    wanted, seen = torch.cat(pieces), []
    hidden = student.hidden
    student.hidden = lambda *args: seen.append(hidden(*args)) or seen[-1]
    student(**given)
    assert_close_to(seen[0], wanted)
    assert seen[1].shape == wanted.shape and seen[1].requires_grad


def batch_of_one(student, given, start, end):
    """Hidden states of the teacher for a piece of a batch, read alone."""
    bounds, length = torch.tensor([0, end - start], dtype=torch.int32), end - start
    return student.hidden(given["ids"][:, start:end], torch.arange(length)[None], bounds, length)


@pytest.mark.parametrize("trainable", ["attention", "layers", "lora", "slots"])
def test_the_teacher_keeps_its_bits_while_the_student_learns(trainable):
    student, given = student_of(trainable=trainable), batch()
    packed = (given["ids"], given["position_ids"], given["cu_seqlens"], given["max_seq_len"])

    def teacher_hidden():
        with student.teacher():
            return student.hidden(*packed)

    wanted = teacher_hidden()
    with torch.no_grad():
        before = student.hidden(*packed)
    optimizer = torch.optim.AdamW(student.parameter_groups(1e-2, 1e-2, 1e-2))
    losses = []
    for _ in range(6):
        loss, _ = student(**given)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert torch.equal(teacher_hidden(), wanted)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        assert not torch.equal(student.hidden(*packed), before)


@pytest.mark.parametrize("trainable", ["attention", "layers", "lora", "slots"])
def test_the_teacher_predicts_what_the_original_does(trainable):
    """Packed sequences are other matrix products than the sequences alone: the bound is the original's own rounding."""
    original, given = teacher(), batch()
    packed = (given["ids"], given["position_ids"], given["cu_seqlens"], given["max_seq_len"])
    parts = given["ids"].split(list(LENGTHS), 1)

    def alone(model):
        with torch.no_grad():
            return torch.cat([model.get_decoder()(part).last_hidden_state[0] for part in parts])

    rounded, exact = alone(original), alone(copy.deepcopy(original).double())
    student = student_of(original, trainable=trainable)
    with student.teacher():
        found = student.hidden(*packed)
    band = (rounded - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert (found - exact).abs().max() <= 2 * band


@pytest.mark.parametrize("ablation", [None, "slots_off"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_texts_have_the_loss_and_gradients_of_the_texts_alone(family, ablation):
    model = teacher(family)
    model.config._experts_implementation = "eager"  # the only one in float64
    student = student_of(model).double()
    for module in attention_layers(student.causal):
        module.ablation = ablation
    for module in student.modules():
        if isinstance(module, TeacherStudentLinear):
            module.dtype = torch.float64
    given = batch()

    def run(*parts):
        student.zero_grad()
        total = 0.0
        for part in parts:
            loss, _ = student(**part)
            loss.backward()
            total += loss.item()
        return total, {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

    alone, at = [], 0
    for length in LENGTHS:
        cut = slice(at, at + length)
        part = {key: given[key][..., cut] for key in given if key not in ("cu_seqlens", "max_seq_len")}
        alone.append(part | {"cu_seqlens": torch.tensor([0, length], dtype=torch.int32), "max_seq_len": length})
        at += length
    together, grads = run(given)
    apart, wanted = run(*alone)
    assert together == pytest.approx(apart, rel=1e-9)
    assert grads.keys() == wanted.keys() and grads
    for name, grad in grads.items():
        assert_close_to(grad, wanted[name], name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_linear_layers_of_attention_are_found_in_every_family(family):
    model = hybridize(teacher(family), num_slots=6, window_size=8, calibration=TEXT)
    names = linear_layers(model, "attention")
    kinds = {name.rpartition(".")[2] for name in names}
    assert kinds == ({"qkv_proj", "o_proj"} if family == "phi3" else {"q_proj", "k_proj", "v_proj", "o_proj"})
    assert all(".self_attn." in name and ".nha." not in name for name in names)


@pytest.mark.parametrize("trainable", ["attention", "layers", "lora", "slots"])
def test_a_released_student_is_the_hybrid_that_was_trained(trainable, tmp_path):
    from transformers import AutoModelForCausalLM

    student = student_of(trainable=trainable)
    given = batch()
    with torch.no_grad():
        for group in student.parameter_groups(1, 1, 1):
            for p in group["params"]:
                p += 0.02
        packed = (given["ids"], given["position_ids"], given["cu_seqlens"], given["max_seq_len"])
        wanted = student.hidden(*packed)
    model = student.release()
    assert not any(isinstance(m, TeacherStudentLinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        for one in (model, loaded):
            found = one.get_decoder()(
                given["ids"], position_ids=given["position_ids"], cu_seq_lens_q=given["cu_seqlens"]
            ).last_hidden_state[0]
            if trainable == "lora":
                assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4)  # merging rounds
            else:
                assert torch.equal(found, wanted)


def test_weights_are_trained_in_float32_beside_a_model_in_bfloat16():
    student = student_of(teacher().bfloat16())
    assert {p.dtype for p in student.parameters() if p.requires_grad} == {torch.float32}
    loss, sums = student(**batch())
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(sums).all()
    assert {p.dtype for p in student.release().parameters()} == {torch.bfloat16}


def test_full_layers_are_trained_but_have_no_gates_to_train():
    model = hybridize(teacher(), num_slots=6, window_size=8, full_layers=[1], calibration=TEXT)
    student = Distillation(model)
    student(**batch())[0].backward()
    moved = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any("layers.1.self_attn.q_proj.weight" in name for name in moved)
    assert not any("layers.1.self_attn.nha" in name for name in moved)
    assert any("layers.0.self_attn.nha.g_proj.weight" in name for name in moved)
    assert attention_layers(student.causal)[1].window_size == -1


def test_compiled_layers_compute_the_same_and_are_released():
    student, plain = student_of(), student_of()
    given = batch()
    torch._dynamo.reset()
    student.compile_layers(backend="aot_eager")
    losses = []
    for one in (student, plain):
        loss, _ = one(**given)
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for (name, a), b in zip(student.named_parameters(), plain.parameters(), strict=True):
        if b.grad is not None:
            assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-5), name
    model = student.release()
    assert all(layer._compiled_call_impl is None for layer in model.get_decoder().layers)
    torch._dynamo.reset()


def test_the_pass_that_names_kernels_changes_nothing(monkeypatch):
    runs = []
    monkeypatch.setattr("nha.distill.student.compile_kernels", lambda run, device: runs.append(run))
    student = Distillation(hybrid("llama", [8, (8, 16), -1]))
    before = {name: x.clone() for name, x in student.state_dict().items()}
    student.compile_kernels(32, student.windows, short_windows(student.windows))
    runs[0]()
    assert all(torch.equal(before[name], x) for name, x in student.state_dict().items())
    assert all(p.grad is None for p in student.parameters())
    assert student.current_windows == (8, (8, 16), -1)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "smollm3"])
def test_arguments_of_attention_are_those_that_the_decoder_hands_over(family):
    student, length, seen = Distillation(hybrid(family, [8, 8, -1])), 24, []

    def see(module, args, kwargs):
        seen.append(kwargs)

    for module in attention_layers(student.causal):
        module.register_forward_pre_hook(see, with_kwargs=True)
    position, cu_seqlens = torch.arange(length).repeat(2)[None], torch.tensor([0, length, 2 * length]).int()
    student.hidden(tokens(1, 2 * length), position, cu_seqlens, length)
    for made, real in zip(student.attention_inputs(length), seen, strict=True):
        assert made["hidden_states"].shape == real["hidden_states"].shape
        assert made["hidden_states"].dtype == real["hidden_states"].dtype
        for one, other in zip(made["position_embeddings"], real["position_embeddings"], strict=True):
            assert torch.equal(one, other)
        for name in ("attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k"):
            assert torch.equal(made[name], real[name])
        assert made["max_length_q"] == real["max_length_q"] == made["max_length_k"] == length
        given = {name for name, value in real.items() if value is not None}
        assert made.keys() ^ given <= {"use_cache"}  # which some families hand over


def test_all_layers_of_a_kind_share_one_compiled_graph():
    """A guard on a layer's index would compile each layer anew: minutes for a deep model."""
    model, graphs = hybrid("llama", [8, 8, 8]).train(), CompileCounter()
    torch._dynamo.reset()
    for layer in model.get_decoder().layers:
        layer.compile(dynamic=False, backend=graphs)
    model(tokens(2, 32), use_cache=False).logits.sum().backward()
    torch._dynamo.reset()
    assert graphs.frame_count == 1


def test_layers_whose_heads_have_any_windows_share_graphs_and_compute_the_same():
    """A graph per arrangement of windows among heads took minutes to compile."""
    graphs, given = CompileCounter(), batch((30, 9))
    arrangements = [[8, (8, 16), -1], [(16, 8), (-1, 8), -1], [(24, 8), 5, -1]]
    compiled, plain = (Distillation(hybrid("llama", arrangements[0])) for _ in range(2))
    torch._dynamo.reset()
    compiled.compile_layers(backend=graphs)  # graphs run as they are, hence with the same bits
    counts = []
    for windows in arrangements:
        found = []
        for student in (compiled, plain):
            student.zero_grad()
            with student.using(windows):
                loss, sums = student(**given)
                loss.backward()
            found.append([sums, *(p.grad for p in student.parameters() if p.grad is not None)])
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
        counts.append(graphs.frame_count)
    torch._dynamo.reset()
    assert counts[0] > 0 and set(counts) == {counts[0]}


class Linear4bit(nn.Linear):
    """Stands in for a quantized layer: its weight is no floating-point one that could be trained."""


@pytest.mark.parametrize("trainable", ["attention", "layers", "lora", "slots"])
def test_quantized_weights_are_trained_around_or_refused_before_anything_changes(trainable):
    model = hybridize(teacher(), num_slots=6, window_size=8, calibration=TEXT)
    model.model.layers[1].self_attn.v_proj.__class__ = Linear4bit
    if trainable in ("lora", "slots"):
        student = Distillation(model, trainable=trainable)
        student(**batch())[0].backward()
        layer = student.causal.get_decoder().layers[1].self_attn.v_proj
        assert isinstance(layer, Linear4bit) == (trainable == "slots")
        assert hasattr(layer, "lora_A") == (trainable == "lora")
        return
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=f"lora or slots .*layers.1.self_attn.v_proj, Linear4bit.*got {trainable}"):
        Distillation(model, trainable=trainable)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_unknown_parts_to_train_are_refused():
    with pytest.raises(ValueError, match="expected trainable to be one of"):
        student_of(trainable="everything")


def test_one_graph_serves_all_layers_of_a_kind():
    model, graphs = hybrid("llama", 16, num_hidden_layers=4), []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    hidden, position_ids = torch.randn(1, 40, model.config.hidden_size), torch.arange(40)[None]
    tables = model.model.rotary_emb(hidden, position_ids)
    for layer in model.model.layers:
        layer.compile(fullgraph=True, dynamic=False, backend=count)
        layer(hidden, position_embeddings=tables, position_ids=position_ids, use_cache=False)
    assert len(graphs) == 1
