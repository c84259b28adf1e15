"""What a reader of the repository relies on: the public names, the README's commands."""

import re
from importlib.metadata import entry_points
from pathlib import Path

import peft_greentrainer


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "peft_greentrainer"


def test_public_names():
    assert peft_greentrainer.__all__ == sorted(peft_greentrainer.__all__)
    assert all(getattr(peft_greentrainer, name).__doc__ for name in peft_greentrainer.__all__)
    assert (PACKAGE / "py.typed").exists()


def test_readme_and_ci_agree():
    readme = (ROOT / "README.md").read_text()
    assert 'pip install -e ".[examples]" && python examples/summarize.py' in readme
    assert 'pip install -e ".[test]" && pytest' in readme
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
    config = peft_greentrainer.GreenTrainerConfig()
    for field, default in re.findall(r"^\| `(\w+)` \| (\S+) \|", readme, re.MULTILINE):
        assert str(getattr(config, field)) == default.strip('`"')


def test_the_plan_in_the_readme_is_what_the_script_prints(monkeypatch, capsys):
    readme = (ROOT / "README.md").read_text()
    command, printed = re.search(
        r"```sh\n(peft-greentrainer plan .*)\n```\n\n```\n(.*?)```", readme, re.DOTALL
    ).groups()
    (script,) = entry_points(group="console_scripts", name="peft-greentrainer")
    monkeypatch.chdir(ROOT)
    script.load()(command.split()[1:])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in printed.splitlines() if line != "  ..." and line not in lines] == []
