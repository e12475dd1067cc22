"""Files of rows and tables are checked as they are read: a damaged one is named, and nothing is written then."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from typer.testing import CliRunner

from nha.ablate.record import check_record, read_about, read_row, read_rows, row_file
from nha.ablate.run import run_table
from nha.ablate.summary import add_rows, remember, write_summary
from nha.ablate.table import parse_table
from nha.cli import app
from tests.ablate.test_run import TINY

ROW = "rows/tiny--nha--lr0.001--seed0.json"
TABLE = "tables/tiny.json"
SIZE = {"task": "x", "size": "16", "state_bytes": 8}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory of results with two rows and their page."""
    out, table = tmp_path_factory.mktemp("made") / "out", parse_table(yaml.safe_load(TINY)).only(lrs=[1e-3])
    run_table(table, out)
    remember(table, out)
    write_summary(out)
    return out


def changed(**values):
    return lambda found: {name: value for name, value in (found | values).items() if value is not None}


def sized(**values):
    return lambda found: found | {"sizes": [changed(**values)(found["sizes"][0]), *found["sizes"][1:]]}


def language(**values):
    return changed(kind="language", sizes=[SIZE | values])


BROKEN = [
    (ROW, b"", "expected a row of a table"),
    (ROW, b'{"table": "ti', "expected a row of a table"),
    (ROW, b"[]", "expected a row of a table"),
    (ROW, b"\xff\xfe", "expected a row of a table"),
    (ROW, b"[" * 100_000, "expected a row of a table"),
    (ROW, changed(model=None), "an older version"),
    *[
        (ROW, changed(**{name: None}), f"expected {name} in")
        for name in ("lr", "seed", "valid", "device", "table", "sizes")
    ],
    (ROW, changed(kind="poetry"), "expected kind as recall or language in"),
    (ROW, changed(lr="fast"), "expected lr as a number above 0 in"),
    (ROW, changed(seed=0.5), "expected seed as an integer of at least 0 in"),
    (ROW, changed(sizes=[]), "expected sizes as a list of one or more in"),
    (ROW, changed(sizes=[3]), "expected a mapping as size 1 of"),
    (ROW, changed(model="window only"), "got the row tiny--window-only--lr0.001--seed0"),
    (ROW, changed(seed=3), "got the row tiny--nha--lr0.001--seed3"),
    (ROW, changed(table="../tiny"), "got the row ../tiny--nha--lr0.001--seed0"),
    (ROW, sized(task=None), "expected task in size 1 of"),
    (ROW, sized(accuracy=None), "expected accuracy in size 1 of"),
    (ROW, sized(accuracy="good"), "expected accuracy as a number from 0 to 1 in size 1 of"),
    (ROW, sized(accuracy=7.0), "expected accuracy as a number from 0 to 1 in size 1 of"),
    (ROW, sized(accuracy=float("nan")), "expected accuracy as a number from 0 to 1 in size 1 of"),
    (ROW, sized(state_bytes="8"), "expected state_bytes as an integer of at least 0 in size 1 of"),
    (ROW, language(accuracy=0.5, correct="012"), "expected correct as digits 0 and 1 in size 1 of"),
    (ROW, language(task="perplexity", ppl=0.5), "expected ppl as a number of at least 1 in size 1 of"),
    (ROW, language(task="perplexity", ppl=2.0, by_text=["1"]), "expected by_text as a list of numbers in size 1 of"),
    (ROW, language(task="window", size="all"), "expected size as an integer in a text in size 1 of"),
    (TABLE, b"{", "expected a table's description"),
    (TABLE, b"{}", "expected a table's description"),
    (TABLE, changed(models=["nha", 3]), "expected models as a list of texts in"),
    (TABLE, changed(notes="Few steps."), "expected notes as a list of texts in"),
    (TABLE, changed(claims=[{"x": 1}]), "expected a claim as claim 1 of"),
    (TABLE, changed(name="other"), "got the table other"),
]


@pytest.mark.parametrize(
    ("place", "change", "words"), BROKEN, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_damaged_file_is_named_and_nothing_is_added_or_written(made, tmp_path, place, change, words):
    out, here = tmp_path / "out", tmp_path / "here"
    shutil.copytree(made, out)
    path = out / place
    path.write_bytes(change if isinstance(change, bytes) else json.dumps(change(json.loads(path.read_text()))).encode())
    before = (out / "README.md").stat().st_mtime_ns
    for read in (lambda: add_rows(out, here), lambda: write_summary(out), lambda: check_record(out)):
        with pytest.raises(ValueError) as error:
            read()
        assert words in str(error.value) and str(path) in str(error.value) and len(str(error.value)) < 400
    assert not here.exists() and (out / "README.md").stat().st_mtime_ns == before


def test_a_command_names_a_damaged_file_before_it_trains(made, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(made, out)
    (tmp_path / "tiny.yaml").write_text(TINY)
    (out / "rows" / "other--nha--lr0.001--seed0.json").write_text("{}")
    result = CliRunner().invoke(app, ["ablate", str(tmp_path / "tiny.yaml"), "--output", str(out)])
    assert result.exit_code == 2 and "other--nha--lr0.001--seed0.json" in result.stderr.replace("\n", "")
    assert "starts" not in result.stderr


def test_whole_files_are_read_as_they_were_written(made):
    row = read_row(made / ROW, None)
    assert row == json.loads((made / ROW).read_text()) and row in read_rows(made) and len(read_rows(made)) == 2
    assert read_about(made / TABLE) == json.loads((made / TABLE).read_text())
    assert row_file(made, "tiny--nha--lr0.001--seed0") == made / ROW
    check_record(made / "absent")
