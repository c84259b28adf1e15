"""What a reader of the repository relies on: the public names, the README's commands."""

import ast
import re
from dataclasses import fields
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from peft.config import PeftConfig

import peft_greentrainer
from peft_greentrainer import GreenTrainerConfig


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "peft_greentrainer"
READMES = ["README.md", "examples/README.md", "examples/benchmarks/README.md", "tests/README.md"]


def test_public_names():
    assert peft_greentrainer.__all__ == sorted(peft_greentrainer.__all__)
    assert all(getattr(peft_greentrainer, name).__doc__ for name in peft_greentrainer.__all__)
    assert (PACKAGE / "py.typed").exists()


def test_readme_and_ci_agree():
    readme = (ROOT / "README.md").read_text()
    assert 'pip install -e ".[examples]" && python examples/summarize.py' in readme
    assert 'pip install -e ".[test]" && pytest' in readme
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_config_table_says_what_the_config_does():
    readme = (ROOT / "README.md").read_text()
    table = re.findall(r"^\| `(\w+)` \| (\S+) \| (.*) \|$", readme, re.MULTILINE)
    config = GreenTrainerConfig()
    helps = {field.name: field.metadata["help"] for field in fields(config) if "help" in field.metadata}
    for field, default, meaning in table:
        assert str(getattr(config, field)) == default.strip('`"')
        assert meaning.replace("`", "").replace('"', "'") in helps[field], field
    own = {field.name for field in fields(config)} - {field.name for field in fields(PeftConfig)}
    kept_by_the_adapter = {name for name in own if "Kept by the adapter" in helps[name]}
    described = " ".join(GreenTrainerConfig.__doc__.replace("`", "").replace('"', "'").split())
    for field in own - kept_by_the_adapter:
        assert f": {helps[field]} " in f"{described} ", field
    assert {field for field, *_ in table} == own - kept_by_the_adapter - {"trainable_token_indices", "init_weights"}


@pytest.mark.parametrize("name", READMES)
def test_links_and_commands_lead_to_files(name):
    text = (ROOT / name).read_text()
    links = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    for target in links:
        path, _, heading = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert heading in [title.lower().replace(" ", "-") for title in headings], target
    for path in re.findall(r"examples/[\w/-]+\.(?:py|json)", text):
        assert (ROOT / path).exists(), path


def test_the_plan_in_the_readme_is_what_the_script_prints(monkeypatch, capsys):
    readme = (ROOT / "examples" / "README.md").read_text()
    command, printed = re.search(
        r"```sh\n(peft-greentrainer plan .*)\n```\n\n```\n(.*?)```", readme, re.DOTALL
    ).groups()
    (script,) = entry_points(group="console_scripts", name="peft-greentrainer")
    monkeypatch.chdir(ROOT)
    script.load()(command.split()[1:])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in printed.splitlines() if line != "  ..." and line not in lines] == []


def test_tests_import_neither_tests_nor_benchmarks():
    for file in (ROOT / "tests").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        modules += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        assert not [name for name in modules if name.startswith(("test_", "tests", "benchmark"))], file
