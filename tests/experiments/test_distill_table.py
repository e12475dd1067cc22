"""The table and the pictures of a comparison of hybrids say what its rows say."""

import json
import math

import pytest

from experiments import distill_table


def row(name, losses, tokens=6e6, **more):
    scores = {"128": {"exact": 0.5, "exact_interval": [0.4, 0.6]}, "64": {"exact": 1.0, "exact_interval": [1.0, 1.0]}}
    found = {
        "run": name,
        "seed": 0,
        "tokens": tokens,
        "windows": [64, -1],
        "by_text_2k": losses,
        "by_text_8k": losses,
        "ppl_2k": 8.0,
        "ppl_8k": 8.0,
        "edges_8k": [0, 64, 8192],
        "by_position_8k": [20.0, 10.0],
        "recall": {task: scores for task in distill_table.SHOWN},
    }
    return found | more


@pytest.fixture
def rows():
    return [
        row("teacher", [2.0, 3.0, 4.0], tokens=0, windows=[-1, -1]),
        row("mine", [2.1, 3.1], settings={"lr": 0.5, "tokens": 6e6}, slots_off={"by_text_2k": [2.5, 3.5]}),
    ]


def test_perplexities_are_compared_on_the_texts_that_both_read(rows):
    assert distill_table.relative_perplexity(rows[1], rows[0]) == pytest.approx(math.exp(0.1))
    assert distill_table.relative_perplexity({"run": "other"}, rows[0]) is None


def test_the_table_has_a_line_for_every_run(rows):
    lines = distill_table.table(rows).splitlines()
    assert "| teacher |  | all | 1.000 | 1.000 |  | 100 50 | 100 50 |" in lines
    assert "| mine, 6 M | lr 0.5 | 1 | 1.105 | 1.105 | 1.649 | 100 50 | 100 50 |" in lines


def test_pictures_are_drawn_and_a_folder_without_a_teacher_is_refused(rows, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "summary.json").write_text(json.dumps(rows))
    assert distill_table.main([str(tmp_path)]) == 0
    drawn = {"summary.json", "table.md", "recall.png", "perplexity.png"}
    assert {path.name for path in tmp_path.iterdir()} == drawn
    entries = [{"tokens": 1e6 * n, "kl": 1 / n, "answer_accuracy": 0.5} for n in range(1, 100)]
    runs = [{"run": "mine", "seed": 0, "tokens": 6e6, "log": entries[:n]} for n in (3, 99)]
    (tmp_path / "logs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    assert distill_table.main([str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {*drawn, "logs.jsonl", "learning.png"}
    (tmp_path / "summary.json").write_text(json.dumps(rows[1:]))
    with pytest.raises(SystemExit):
        distill_table.main([str(tmp_path)])
    assert "expected a row of the run teacher" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        distill_table.main([str(tmp_path / "nowhere")])
    assert "expected summary.json in" in capsys.readouterr().err
