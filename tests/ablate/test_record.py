"""The record in results/from_scratch is of the built-in tables, and its page says what its rows say."""

from __future__ import annotations

import json
from pathlib import Path

from nha.ablate.record import read_row
from nha.ablate.summary import add_rows, built_in_digest, full_text, write_summary
from nha.ablate.table import built_in_tables, read_table

RECORD = Path(__file__).parents[2] / "results" / "from_scratch"


def test_every_row_is_of_a_built_in_table_as_it_is_now():
    tables = {name: read_table(name) for name in built_in_tables()}
    rows = sorted((RECORD / "rows").glob("*.json"))
    assert rows
    for path in rows:
        found = read_row(path, None)
        assert found is not None and found["digest"] == built_in_digest(found, tables), path.name


def test_every_built_in_table_is_on_the_page_with_rows_or_as_not_run():
    assert {path.stem for path in (RECORD / "tables").glob("*.json")} == set(built_in_tables())
    page = (RECORD / "README.md").read_text(encoding="utf-8")
    top = page.partition("\n## ")[0]
    claims = [claim for name in built_in_tables() for claim in read_table(name).claims if claim.main]
    assert claims and all(f"| {full_text(claim)} |" in top for claim in claims)
    for name in built_in_tables():
        assert read_table(name).title in page and f"nha ablate {name}" in page


def test_the_page_and_the_summary_are_those_of_the_rows(tmp_path):
    added, kept = add_rows(RECORD, tmp_path)
    assert added and not kept
    page = write_summary(tmp_path)
    assert page.read_text(encoding="utf-8") == (RECORD / "README.md").read_text(encoding="utf-8")
    for name in ("summary.json", "rows.csv"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (RECORD / name).read_text(encoding="utf-8")
    entry = json.loads((RECORD / "summary.json").read_text(encoding="utf-8"))[0]
    assert {"arm", "task", "size", "seed", "state_bytes", "parameters", "tokens"} <= entry.keys()
