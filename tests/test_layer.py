"""The layer refuses sizes and inputs that do not fit, by name."""

import pytest
import torch

from nha import NativeHybridAttention


def layer(**changes):
    return NativeHybridAttention(**{"hidden_size": 16, "num_heads": 4, "num_slots": 4, "window_size": 3} | changes)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"hidden_size": 0}, ["hidden_size", "0"]),
        ({"num_heads": 0}, ["num_heads", "0"]),
        ({"num_heads": 2.5}, ["num_heads", "2.5"]),
        ({"num_kv_heads": 3}, ["num_heads", "4", "3"]),
        ({"num_kv_heads": -1}, ["num_kv_heads", "-1"]),
        ({"num_slots": 0}, ["num_slots", "0"]),
        ({"num_sinks": -1}, ["num_sinks", "-1"]),
        ({"window_size": -2}, ["window_size", "-2"]),
        ({"window_size": 2**40}, ["window_size", str(2**40)]),
        ({"hidden_size": 18}, ["hidden_size", "18"]),
        ({"head_dim": 3}, ["head_dim", "3"]),
        ({"head_dim": 0}, ["head_dim", "0"]),
        ({"rope_theta": 0.0}, ["rope_theta", "0.0"]),
        ({"rope_theta": float("nan")}, ["rope_theta", "nan"]),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(ValueError) as caught:
        layer(**changes)
    assert all(word in str(caught.value) for word in words)


def test_an_odd_head_dim_is_fine_without_positions():
    assert layer(head_dim=3, rope_theta=None)(torch.randn(1, 5, 16))[0].shape == (1, 5, 16)


X = torch.randn(2, 5, 16)
CU = torch.tensor([0, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    "x, options, words",
    [
        (X[0], {}, ["x", "[5, 16]"]),
        (X[..., :8], {}, ["x", "16", "[2, 5, 8]"]),
        (X[:, :0], {}, ["x", "[2, 0, 16]"]),
        ([1.0], {}, ["x", "list"]),
        (X, {"attention_mask": [[True] * 5] * 2}, ["attention_mask", "list"]),
        (X, {"attention_mask": torch.ones(2, 4, dtype=torch.bool)}, ["attention_mask", "[2, 5]", "[2, 4]"]),
        (X, {"attention_mask": torch.ones(2, 5)}, ["attention_mask", "torch.bool"]),
        (X, {"cu_seqlens": CU}, ["cu_seqlens", "B = 2"]),
        (X[:1], {"cu_seqlens": CU.long()}, ["cu_seqlens", "torch.int64"]),
        (X[:1], {"cu_seqlens": CU, "attention_mask": torch.ones(1, 5, dtype=torch.bool)}, ["attention_mask", "both"]),
        (X[:1], {"state": layer()(X, return_state=True)[1]}, ["1", "2"]),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x, options, words):
    with pytest.raises(ValueError) as caught:
        layer()(x, **options)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("window", [0, 3, -1])
def test_padding_and_packing_equal_the_sequences_alone(window):
    torch.manual_seed(0)
    module = layer(window_size=window, num_kv_heads=2, num_sinks=1).double()
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    first, second = module(x[:, :5])[0], module(x[:, 5:])[0]
    packed = module(x, cu_seqlens=torch.tensor([0, 5, 12], dtype=torch.int32))[0]
    torch.testing.assert_close(packed, torch.cat([first, second], 1))
    batch = torch.zeros(2, 7, 16, dtype=torch.float64)
    batch[0, 2:], batch[1] = x[0, :5], x[0, 5:]
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :2] = False
    padded = module(batch, attention_mask=mask)[0]
    torch.testing.assert_close(padded[0, 2:], first[0])
    torch.testing.assert_close(padded[1], second[0])
