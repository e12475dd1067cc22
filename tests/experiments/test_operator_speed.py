"""The script that times the operator compares every shape with the window alone, and long sequences with short ones."""

from experiments.operator_speed import PASSES, main, ratios, wanted_rows


def test_rows_are_distinct_and_every_length_has_a_window_beside_it():
    rows = wanted_rows(tiny=False)
    assert len(set(rows)) == len(rows)
    lengths = {impl: {dict(row.shape)["T"] for row in rows if row.impl == impl} for impl in ("triton", "flex-window")}
    assert lengths["triton"] == lengths["flex-window"]
    assert {row.kind for row in wanted_rows(tiny=True)} == set(PASSES)


def test_one_sequence_is_compared_with_the_same_tokens_in_many():
    row = {"impl": "triton", "pass": "fwd", "HQ": "32", "H": "8", "D": "128"}
    table = [row | {"B": "16", "T": "2048", "ms": "0.5"}, row | {"B": "1", "T": "32768", "ms": "0.55"}]
    assert ratios(table)[1].endswith("0.550 ms, 1.100 of sequences of 2048")


def test_a_run_without_time_for_a_row_says_so(tmp_path, capsys):
    assert main(["--output", str(tmp_path), "--tiny", "--budget-s", "0"]) == 1
    assert "no row was measured within 0 s" in capsys.readouterr().err
