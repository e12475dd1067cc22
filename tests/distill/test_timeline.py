"""A run takes down when each stage of its beginning ended."""

import json

from nha.distill.run import distill
from nha.distill.timeline import Timeline
from nha.distill.trainer import Reports
from tests.distill.material import material, settings, tiny


def test_stages_stand_in_a_file_beside_the_log(tmp_path):
    corpus, tokenizer = material(tmp_path)
    timeline = Timeline()
    timeline.mark("text read")
    distill(tiny(), tokenizer, corpus, tmp_path / "run", settings(), reports=Reports(timeline=timeline))
    found = json.loads((tmp_path / "run" / "timeline.json").read_text())
    stages = ["text read", "inputs checked", "converted", "aligned", "first step", "third step"]
    assert list(found) == stages and list(found.values()) == sorted(found.values())
    assert found == timeline.stages and "aligned" in str(timeline)


def test_every_stage_is_reported_as_it_begins(tmp_path):
    corpus, tokenizer = material(tmp_path)
    seen: list[tuple[str, int]] = []
    reports = Reports(progress=lambda stage, done, total: seen.append((stage, done)))
    distill(tiny(), tokenizer, corpus, tmp_path / "run", settings(), reports=reports)
    stages = list(dict.fromkeys(stage for stage, _ in seen))
    assert stages == ["convert", "align", "train"]
    assert seen[0] == ("convert", 0) and ("align", 0) in seen


def test_a_resumed_run_counts_its_own_steps():
    timeline = Timeline()
    for step in (7, 8, 9):
        timeline.mark_step(step, begun_at=6)
    assert list(timeline.stages) == ["first step", "third step"]
