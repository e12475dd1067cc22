"""Long prompts: every part is measured for both models, kept as it is known, and shown."""

from __future__ import annotations

import json
from pathlib import Path

from experiments import long_context
from nha.models.delta import low_rank_changes, save_delta
from tests.data.tokenizers import small_tokenizer
from tests.evaluate.test_public import PROSE, lines
from tests.models.families import teacher
from tests.models.test_delta import changed


def test_every_part_of_both_models_is_kept_and_shown(tmp_path, capsys):
    tokenizer = small_tokenizer("digits")
    base = teacher(vocab_size=len(tokenizer), max_position_embeddings=1024).eval()
    base.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    model = changed(base, [16, [16, 32], 16])
    save_delta(tmp_path / "tiny.delta", model, low_rank_changes(base, model, 2), {"base": "tiny"})
    (tmp_path / "heldout.jsonl").write_text(lines(PROSE))
    given = ["--data", tmp_path, "--output", tmp_path / "out", "--model", tmp_path / "tiny"]
    given += ["--delta", tmp_path / "tiny.delta", "--lengths", "512", "--rounds", "1"]
    given = [*map(str, given), "--needles", "1", "--clozes", "2", "--documents", "1"]
    given += ["--models", "hybrid,original,kernels,yarn"]
    assert long_context.main([*given, "--budget-s", "-1"]) == 0  # no time for any part
    assert not (tmp_path / "out" / "long_context.json").exists()
    assert long_context.main(given) == 0
    found = json.loads((tmp_path / "out" / "long_context.json").read_text())["models"]
    assert list(found.pop("kernels")) == ["cost"]
    for name, parts in found.items():
        assert ("cost" in parts) == (name != "yarn") and parts["near cloze"]["512"]["mean distance"] <= 256
        assert parts["needle"]["512"]["count"] == 5 and parts["cloze"]["512"]["count"] == 2
        assert parts["perplexity"]["512"]["ppl"] > 1 and 204 <= parts["cloze"]["512"]["mean distance"] <= 409
    sizes = [found[name]["cost"]["512"]["cache, MB"] for name in ("hybrid", "original")]
    assert sizes[0] < sizes[1]
    capsys.readouterr()
    assert long_context.main(given) == 0 and capsys.readouterr().out == ""  # all of it is there
    text = long_context.write_report(tmp_path / "out")
    assert text.count("| 512 |") == 4 and "out of memory" not in text
    assert (tmp_path / "out" / "long_context.png").read_bytes()[:4] == b"\x89PNG"


def test_the_page_shows_the_needles_of_the_record_and_the_long_prompts():
    root = Path(__file__).parents[2]
    page = (root / "docs" / "long_context.md").read_text(encoding="utf-8")
    run = json.loads((root / "results" / "quality" / "runs" / "shipped_slow-50M-0.json").read_text(encoding="utf-8"))
    assert long_context.needles_by_distance(run["eval"]["needle"]) in page
    shown = page.partition("<!-- long prompts -->\n")[2].partition("<!-- /long prompts -->")[0]
    record = root / "results" / "long_context" / "long_context.json"
    if record.is_file():
        assert shown == long_context.table(json.loads(record.read_text(encoding="utf-8"))["models"])
    else:
        assert "Not measured" in shown
