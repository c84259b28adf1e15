"""The examples run as they stand, and what each prints as planned is what it counts."""

import re
import runpy
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name", ["trainer", "plain_loop", "plan_without_peft", "lightning_loop"])
def test_planned_is_counted(name, capsys):
    if name == "lightning_loop":
        pytest.importorskip("lightning")
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    planned, counted = re.search(r"planned (\S+) of full fine-tuning, counted (\S+)\n", printed).groups()
    assert 0 < float(planned) <= 0.6 and counted == planned
    assert name != "trainer" or "bit-identical to those of the trained model: True" in printed
