"""Options made from a dataclass of settings."""

from __future__ import annotations

import typer

from nha.cli.options import with_settings
from nha.train.settings import TrainSettings
from tests.cli.conftest import runner


def test_a_switch_is_turned_on_and_off_and_overrides_the_file(tmp_path):
    seen = []

    def record(settings: TrainSettings) -> None:
        seen.append(settings)

    app = typer.Typer()
    app.command()(with_settings(TrainSettings, file=True)(record))
    (tmp_path / "off.yaml").write_text("qk_norm: false\noutput_gate: true\n")
    from_file = ["--settings", str(tmp_path / "off.yaml")]
    for arguments in ([], ["--no-qk-norm"], from_file, [*from_file, "--qk-norm", "--no-output-gate"]):
        assert runner.invoke(app, arguments).exit_code == 0
    found = [(settings.qk_norm, settings.output_gate) for settings in seen]
    assert found == [(True, False), (False, False), (False, True), (True, False)]
