"""The rooms of the package, and what each may import. A new folder or file is guarded by default."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parent.parent / "peft_greentrainer"
# For each room: the other rooms that it may import from, and the third parties.
ALLOWED = {
    "tensors": ("", "torch"),
    "planning": ("tensors", "numpy"),
    "measuring": ("tensors planning", "torch numpy"),
    "adapter": ("tensors", "torch peft transformers"),
    "sharing": ("tensors adapter", "torch peft transformers safetensors huggingface_hub"),
    "training": ("tensors planning measuring adapter", "torch peft transformers accelerate"),
    "cli": ("tensors planning measuring adapter sharing", "torch peft transformers"),
}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
IN_ROOMS = [file for file in FILES if len(file.parts) > 1]


def imports(file):
    """What a file imports, wherever in it: files of the package as paths from its root, and third parties by name."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            names = [folder / alias.name for alias in node.names]
            inside |= {name if is_module(name) else folder for name in names}
        elif isinstance(node, ast.ImportFrom):
            outside.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Import):
            outside |= {alias.name.partition(".")[0] for alias in node.names}
    return inside, outside - set(sys.stdlib_module_names)


def is_module(path):
    return (PACKAGE / path).with_suffix(".py").exists() or (PACKAGE / path / "__init__.py").exists()


def test_every_folder_is_a_room_that_the_rule_knows():
    assert {file.parts[0] for file in IN_ROOMS} == set(ALLOWED)
    assert [file.name for file in FILES if len(file.parts) == 1] == ["__init__.py"]


@pytest.mark.parametrize("file", IN_ROOMS, ids=str)
def test_what_a_file_imports(file):
    rooms, third_parties = map(str.split, ALLOWED[file.parts[0]])
    inside, outside = imports(file)
    assert {module.parts[0] if module.parts else "the package itself" for module in inside} <= {*rooms, file.parts[0]}
    assert outside <= set(third_parties)


@pytest.mark.parametrize("file", IN_ROOMS, ids=str)
def test_imports_stand_at_the_top(file):
    tree = ast.parse((PACKAGE / file).read_text())
    everywhere = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert all(node in tree.body for node in everywhere)


def test_no_file_imports_itself_through_others():
    edges = {file.with_suffix(""): imports(file)[0] for file in FILES}
    done = set()

    def visit(module, above):
        assert module not in above, " -> ".join(map(str, [*above[above.index(module) :], module]))
        if module not in done:
            for imported in sorted(edges.get(module, ())):
                visit(imported, [*above, module])
            done.add(module)

    for module in edges:
        visit(module, [])


def test_planning_and_measuring_work_alone():
    """Without peft and transformers, and without the rest of the package."""
    code = (
        "import sys, importlib.util as u; sys.modules['peft'] = sys.modules['transformers'] = None\n"
        f"package = u.module_from_spec(u.spec_from_loader('p', None, is_package=True)); package.__path__ = [{str(PACKAGE)!r}]\n"
        "sys.modules['p'] = package\n"
        "import torch; from p.measuring.profile import profile; from p.planning.selection import select\n"
        "net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))\n"
        "graph = profile(net, torch.randn(2, 4), loss_fn=lambda output, batch: output.sum())\n"
        "print(sorted(select(graph, {'1.weight': 1.0}, rho=0.8).tensors))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "'1.weight'" in done.stdout, done.stderr


IMPORTED = """
import torch, peft, transformers, accelerate
from torch.optim.swa_utils import AveragedModel
from torch.nn.parallel import DistributedDataParallel

def found():
    owners = [torch.autograd, torch.optim.Optimizer, torch.nn.Module, torch.Tensor, torch.nn.Parameter, AveragedModel]
    owners += [DistributedDataParallel, peft.PeftModel, peft.tuners.tuners_utils.BaseTuner, transformers.Trainer]
    owners += [transformers.PreTrainedModel, accelerate.Accelerator]
    return {f"{owner.__name__}.{name}": value for owner in owners for name, value in list(vars(owner).items())}

found()  # some are made when they are asked for
before = found()
import peft_greentrainer
after = found()
print(sorted(name for name in before.keys() | after.keys() if before.get(name) is not after.get(name)))
"""


def test_importing_changes_the_methods_that_are_listed_and_no_others():
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True)
    changed = set(ast.literal_eval(done.stdout.splitlines()[-1]))
    text = (PACKAGE.parent / "examples" / "README.md").read_text()
    listed = text.partition("Importing the package registers")[2].partition("While a model is trained")[0]
    assert changed == {name for name in changed if f"`{name}`" in listed} and len(changed) == 4, done.stderr


def test_what_is_listed_is_where_it_is_said():
    text = (PACKAGE.parent / "examples" / "README.md").read_text().partition("## What it changes in others")[2]
    for row in text.splitlines():
        if row.startswith("| ") and not row.startswith("| what"):
            *_, where, test, _ = (cell.strip(" `") for cell in row.split("|"))
            assert (PACKAGE / where).exists() and (PACKAGE.parent / test).exists()
