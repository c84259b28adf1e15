"""What a reader of the repository relies on: the layers, the public names, the README's commands."""

import ast
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import peft_greentrainer


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "peft_greentrainer"
PLANNING = [
    "low_rank_cost",
    "measure",
    "formulas",
    "attention",
    "forced",
    "recorder",
    "passes",
    "seconds",
    "cost",
    "importance",
    "closures",
    "selection",
    "backward",
    "bottom",
    "entries",
    "outputs",
    "recomputation",
    "watch",
    "probe",
]
ADAPTER = [
    "linear",
    "low_rank_update",
    "config",
    "layer",
    "targets",
    "provisional",
    "model",
    "values",
    "checks",
    "lock",
    "embeddings",
    "delta",
    "registration",
    "card",
    "conversion",
]


def imports(module):
    """The modules that a module imports when it is imported."""
    names = set()
    for node in ast.parse((PACKAGE / f"{module}.py").read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(f".{node.module}" if node.level else node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("module", ["trainable", "around", "forms", *PLANNING])
def test_planning_knows_nothing_of_peft(module):
    assert not imports(module) & {"peft", "transformers", "accelerate", *(f".{name}" for name in ADAPTER)}


@pytest.mark.parametrize("module", ADAPTER)
def test_the_adapter_knows_nothing_of_cost(module):
    assert not imports(module) & {f".{name}" for name in (*PLANNING, "allocation", "callback", "param_groups")}


def test_planning_works_without_the_adapter():
    code = (
        "import sys, importlib.util as u; sys.modules['peft'] = None; sys.modules['transformers'] = None\n"
        f"package = u.module_from_spec(u.spec_from_loader('p', None, is_package=True)); package.__path__ = [{str(PACKAGE)!r}]\n"
        "sys.modules['p'] = package\n"
        "import torch; from p.cost import profile; from p.selection import select\n"
        "net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))\n"
        "graph = profile(net, torch.randn(2, 4), loss_fn=lambda output, batch: output.sum())\n"
        "print(sorted(select(graph, {'1.weight': 1.0}, rho=0.8).tensors))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "'1.weight'" in done.stdout, done.stderr


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
