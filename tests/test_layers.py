"""What may import what, and what may never be called: the design's layers, checked on the syntax tree."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for top in ("rlhf", "cli") for path in (ROOT / top).rglob("*.py"))
CONFIG = (
    "config.py", "stage_config.py", "ppo_config.py", "ranges.py", "setting_rules.py", "stage_rules.py",
    "estimator_rules.py", "metric_record.py", "metric_table.py", "metrics.py", "stage_record.py", "stages.py",
)  # fmt: skip
"""Without torch, so that every layer may read them: settings, and the tables of metrics and stages."""
CORE = sorted(path for path in (ROOT / "rlhf").glob("*.py") if path.name not in ("__init__.py", "__main__.py", *CONFIG))
LAYERS = [
    "core", "config", "kernels", "models", "io", "data", "execution", "distributed",
    "generate", "evaluate", "monitor", "train", "demo", "cli",
]  # fmt: skip
"""From the bottom up; io and data are one layer, in which data may use io."""


def layer_of(module: str) -> str:
    parts = module.split(".")
    if any(f"{part}.py" in CONFIG for part in parts):
        return "config"
    if parts[1:] == ["__main__"]:
        return "cli"
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else "core"


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return f"rlhf.{name}" if name.startswith("cli") else name


def imports_of(path: Path) -> set[str]:
    """Modules imported anywhere in a file, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = LAYERS.index(layer_of(module_of(path)))
    for module in imports_of(path):
        if module.split(".")[0] == "rlhf" and module != "rlhf":
            assert LAYERS.index(layer_of(module)) <= own, f"{path.name} imports {module} from above"
        assert module.split(".")[0] != "ray" or layer_of(module_of(path)) == "distributed"
        assert module.split(".")[0] != "tyro" or layer_of(module_of(path)) == "cli"
        assert module.split(".")[0] != "rich" or layer_of(module_of(path)) == "cli"
        assert module.split(".")[0] not in ("transformers", "trl", "tests", "benchmarks")


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_the_core_imports_torch_alone(path):
    own = {module.split(".")[0] for module in imports_of(path)} - set(sys.stdlib_module_names) - {"rlhf"}
    assert own <= (
        {"torch", "triton"} if path.name == "decode_attention_triton.py" else {"torch"}
    )  # which comes with torch
    allowed_files = imports_of(path) & {"pathlib", "os", "time", "logging", "io", "json", "random"}
    assert not allowed_files, "the core touches neither files, clocks nor the environment"


BANNED = {
    "torch.manual_seed", "torch.rand", "torch.randn", "torch.randint", "torch.randperm", "torch.multinomial",
    "torch.bernoulli", "torch.Generator", "torch.compile", "torch.nn.Module", "torch.set_rng_state", "print",
    "torch.load", "torch.save", "pickle.load", "eval", "exec", "yaml.load", "numpy.random",
}  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_draws_from_a_global_generator_reads_pickles_or_prints(path):
    allowed = {"print"} if path.parent.name == "cli" else {"torch.compile"} if path.stem == "compiled" else set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call | ast.Attribute):
            name = ast.unparse(node.func if isinstance(node, ast.Call) else node).replace("np.", "numpy.")
            assert name not in BANNED - allowed, f"{path.name}:{node.lineno} uses {name}"


PURE = sorted(
    {*CORE, *(path for top in ("models", "kernels", "execution") for path in (ROOT / "rlhf" / top).glob("*.py"))}
)
IN_PLACE = {
    "models/attention.py": {"write_prompts", "decode_attention"},  # the KV cache
    "models/decode_state.py": {"select_rows"},  # the cache of fewer rows
    "models/decoding.py": {"generate_completions", "_decode"},  # the tables that it returns; a list of its own
    "models/architecture.py": {"register"},  # the table of architectures
    "estimators.py": {"register_estimator"},  # the table of estimators
    "kernels/recomputation.py": {"_Remat.backward.weighted"},  # a list of its own
    "kernels/fused_attention.py": {"_graph", "_FusedAttention.backward"},  # tensors of its own
    "kernels/fused_adamw.py": {"write_update"},  # donated optimiser buffers
    "execution/shard.py": {"_write"},  # donated optimiser buffers
    "execution/update.py": {"clip_models"},  # the donated gradient
    "execution/executor.py": {"LocalExecutor.step", "copy_state"},  # donated gradients; a snapshot read back
    "execution/gradients.py": {"_eager.gradient", "_accumulate_into.accumulate"},  # the gradient's buffer
    "execution/draws.py": {"CUDAGraphRunner._load"},  # what a recording reads
}
"""Functions that change tensors in place, by file: caches, donated buffers and tables."""


def in_place(node: ast.AST, function: str = "") -> set[str]:
    """Functions with a method or function whose name ends in _ (called or not), `.data`, `backward`, `out=`, or items
    set in anything but an object's own state. `+=` cannot be told from that of numbers: the laws of purity find it."""
    found: set[str] = set()
    for child in ast.iter_child_nodes(node):
        inner = function
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            inner = f"{function}.{child.name}".removeprefix(".")
        match child:
            case ast.Attribute(attr=name) | ast.alias(name=name):
                changes = name in ("data", "backward") or (name.endswith("_") and not name.endswith("__"))
            case ast.keyword(arg="out"):
                changes = True
            case ast.Subscript(ctx=ast.Store() | ast.Del()):
                changes = ast.unparse(child).split(".")[0] not in ("self", "os")
            case _:
                changes = False
        found |= in_place(child, inner) | ({inner} if changes else set())
    return found


@pytest.mark.parametrize("path", PURE, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_changed_in_place_but_caches_and_donated_buffers(path):
    name = str(path.relative_to(ROOT / "rlhf"))
    assert in_place(ast.parse(path.read_text())) == IN_PLACE.get(name, set()), f"see IN_PLACE, {name}"


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("torch._fused_adamw_(p)", True),
        ("add = torch.Tensor.add_", True),
        ("p.copy_(q)", True),
        ("from torch import relu_", True),
        ("torch.add(p, q, out=p)", True),
        ("p[0] = q", True),
        ("p[0] += q", True),
        ("p.data", True),
        ("loss.backward()", True),
        ("p.__class__", False),
        ("self._state[name] = q", False),
        ("p._version, _ = q", False),
        ("q = p[0]", False),
    ],
)
def test_changes_in_place_are_told_from_the_rest(statement, found):
    source = f"class A:\n  def f():\n    def g():\n      {statement}\n"
    assert in_place(ast.parse(source)) == ({"A.f.g"} if found else set())


def test_import_rlhf_imports_nothing_heavy():
    code = """
import sys, rlhf, rlhf.config, rlhf.metrics
heavy = {"torch", "ray", "tyro", "rich", "transformers", "numpy"}
assert heavy.isdisjoint(sys.modules), heavy & set(sys.modules)
assert rlhf.gae.__name__ == "gae"
assert {"ray", "tyro", "rich", "transformers"}.isdisjoint(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_settings_of_the_programs_and_the_table_of_stages_import_nothing_heavy():
    """So that --help answers at once."""
    code = """
import sys, rlhf.evaluate.evaluate_config, rlhf.generate.generate_config, rlhf.stages, rlhf.io.presets
heavy = {"torch", "ray", "rich", "numpy", "scipy", "sklearn"}
assert heavy.isdisjoint(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_scipy_and_scikit_learn_are_imported_only_where_they_are_needed():
    """Nothing but an evaluation waits for them."""
    code = """
import sys, rlhf.evaluate.evaluation, rlhf.train.pipeline, rlhf.demo.demo
assert {"scipy", "sklearn", "ray", "transformers"}.isdisjoint(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_files_and_functions_stay_small():
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= 300, f"{path} is more than one concept"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno <= 90, f"{path.name}: {node.name} is too long"


def test_every_public_function_and_class_is_documented():
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            members = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else []
            for member in [node, *members]:
                if isinstance(member, ast.FunctionDef | ast.ClassDef) and not member.name.startswith("_"):
                    assert ast.get_docstring(member), f"{path.name}: {member.name} has no docstring"
