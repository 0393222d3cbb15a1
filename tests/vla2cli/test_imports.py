"""What a command that only prints may load, and names that other packages own."""

import json
import os
import subprocess
import sys
from inspect import ismodule
from pathlib import Path

import pytest

import vla2cli

HEAVY = {
    *("torch", "torchvision", "transformers", "timm", "decord", "av", "triton", "matplotlib"),
    *("onnx", "onnxscript", "onnxruntime"),
}
CODE = """
import json, sys
import vla2cli
if sys.argv[1:]:
    from vla2cli.cli import main
    try:
        main(sys.argv[1:])
    except SystemExit as end:
        assert not end.code, end.code
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["--version"],
        ["caption", "--help"],
        ["ask", "-h"],
        ["features", "-h"],
        ["plan", "-h"],
        ["bench", "--help"],
        ["export", "-h"],
        ["train", "-h"],
        ["export", "--list"],
        ["merge", "-h"],
        ["world", "-h"],
        ["world", "score", "-h"],
    ],
    ids=lambda arguments: " ".join(arguments) or "import",
)
def test_help_and_bare_import_load_nothing_heavy(arguments):
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "vla2cli" in loaded
    assert not loaded & HEAVY


def test_no_module_takes_the_place_of_a_name_of_the_package():
    for name in vla2cli.__all__:
        getattr(vla2cli, name)  # imports where it lives
    assert not any(ismodule(getattr(vla2cli, name)) for name in vla2cli.__all__)


def test_outer_folders_are_no_packages():
    # an installed package called `kernels` is imported by transformers
    root = Path(__file__).parents[2]
    assert (root / "kernels/vla2_kernels").is_dir()
    assert (root / "models/vla2_models").is_dir()
    for name in ("kernels", "models"):
        assert not (root / name / "__init__.py").exists()


def test_onnx_runtime_reports_nothing_to_its_maker(tmp_path):
    code = "import vla2cli.frontend.session, onnxruntime, time; time.sleep(1)"
    variables = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    variables.pop("ORT_DISABLE_TELEMETRY", None)
    subprocess.run([sys.executable, "-c", code], check=True, env=variables)
    assert list(tmp_path.rglob("*onnxruntime*")) == []
