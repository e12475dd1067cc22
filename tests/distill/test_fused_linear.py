"""Linear layers that are computed as one give what each gives alone, and are themselves again after training."""

import pytest
import torch
from torch import nn

from nha.distill.fused_linear import FrozenLinear, join_frozen
from nha.distill.student import TeacherStudentLinear
from tests.distill.test_student import batch, student_of
from tests.models.families import teacher


@pytest.mark.parametrize("family, trained", [("llama", "attention"), ("qwen2", "layers"), ("gemma3_text", "slots")])
def test_joint_layers_compute_what_each_computes_alone(family, trained):
    plain, joint = (student_of(teacher(family), trained=trained) for _ in range(2))
    joint.join_layers()
    assert any(isinstance(m, FrozenLinear) for m in joint.modules()) == (trained != "layers")
    for lengths in ((40, 9, 25), (33,)):
        losses = [one(**batch(lengths))[0] for one in (plain, joint)]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
        for loss in losses:
            loss.backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), joint.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert torch.allclose(b.grad, a.grad, rtol=1e-3, atol=1e-5), name


def test_joint_layers_are_called_once_for_each_input(monkeypatch):
    student, shapes = student_of(), []
    student.join_layers()
    linear = nn.functional.linear

    def count(input, weight, bias=None):
        shapes.append(tuple(weight.shape))
        return linear(input, weight, bias)

    monkeypatch.setattr("nha.distill.fused_linear.F.linear", count)
    attention = student.causal.get_decoder().layers[0].self_attn
    x = torch.randn(1, 5, attention.q_proj.in_features)
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    for _ in range(2):
        parts = [layer(x) for layer in [*layers, attention.nha.g_proj]]
        assert [part.shape[-1] for part in parts[:3]] == [layer.out_features for layer in layers]
    with student.teacher():
        for layer in layers:
            torch.testing.assert_close(layer(x), linear(x, layer.own[0]))
    wide = sum(layer.out_features for layer in layers)
    widths = [wide + attention.nha.g_proj.out_features] * 2 + [wide]
    assert [shape[0] for shape in shapes if shape[0] >= wide][:3] == widths


def test_a_bias_counts_for_its_own_layer_alone():
    layers = [nn.Linear(4, 3), nn.Linear(4, 2, bias=False)]
    x = torch.randn(2, 4)
    wanted = [layer(x) for layer in layers]
    join_frozen(layers)
    for layer, plain in zip(layers, wanted, strict=True):
        torch.testing.assert_close(layer(x), plain)


def test_released_layers_are_plain_and_share_no_memory():
    plain, joint = student_of(), student_of()
    joint.join_layers()
    models = [one.release() for one in (plain, joint)]
    for (name, a), (other, b) in zip(*(model.state_dict().items() for model in models), strict=True):
        assert name == other and torch.equal(a, b)
    assert not any(isinstance(m, (FrozenLinear, TeacherStudentLinear)) for m in models[1].modules())
    storages = [p.untyped_storage().data_ptr() for p in models[1].parameters()]
    assert len(storages) == len(set(storages))
