"""Run everything that needs a CUDA device and write one report.

    make gpu-check                                   # gpu-report.md
    python tests/bench/gpu.py [REPORT.md] [--spec VideoLLaMA2-7B]

    tests      all tests marked `gpu`: Triton kernels, ONNX Runtime on CUDA and TensorRT, language
               models in 4 and 8 bits and spread over devices, each against the CPU or PyTorch
    kernels    each Triton kernel against PyTorch's operators (kernels.py)
    bench      `vla2 bench` at public size: plain PyTorch, Triton, ONNX Runtime
    engine     the language model in batches against transformers' generate, 7 B (engines.py)

The report names the machine, says which tests failed, and has the bench's table; the rows are
beside it as JSON Lines. Exits with 0 where all passed, 1 where something failed, 2 without CUDA.
"""
# ruff: noqa: T201  it talks to people

import argparse
import platform
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import torch

from vla2cli.bench.report import table_lines
from vla2cli.bench.rows import read_rows

DTYPES = ("float32", "float16", "bfloat16")
FRONTENDS = ("eager", "triton", "onnx")
ENGINES = (
    *("--size", "7b", "--device", "cuda", "--dtype", "bfloat16", "--prompt", "1200"),
    *("--rows", "8", "--rows", "32"),
)


def main(report: Path, spec: str) -> int:
    """Test, measure, write; return the exit code."""
    if not torch.cuda.is_available():
        print("gpu-check: no CUDA device; everything else is tested by make test", file=sys.stderr)
        return 2
    rows = report.with_suffix(".jsonl")
    rows.unlink(missing_ok=True)
    parts = {"Machine": describe_machine()}
    passed, parts["Tests"] = run_tests(report.with_suffix(".xml"))
    timed, parts["Kernels"] = run_script("kernels.py")
    measured, parts["Bench"] = run_bench(spec, rows)
    compared, parts["Engine"] = run_script("engines.py", *ENGINES)
    is_whole = passed and timed and measured and compared
    text = "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items())
    report.write_text(f"# vla2 on a GPU\n\n{text}\n", encoding="utf-8")
    print(f"gpu-check: {'passed' if is_whole else 'FAILED'}; see {report}")
    return 0 if is_whole else 1


def describe_machine() -> str:
    """Name what the figures depend on."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = [
        f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 1e9:.0f} GB" for gpu in gpus
    ]
    revision = run(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    return (
        f"{time.strftime('%Y-%m-%d')}, revision {revision}, python {platform.python_version()}, "
        f"{versions}; {'; '.join(names)}"
    )


def run_tests(results: Path) -> tuple[bool, str]:
    """Run the tests marked gpu; say whether all passed, and what did not."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junit-xml={results}"]
    done = run(command)
    lines = [done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-2000:]]
    cases = list(ElementTree.parse(results).iter("testcase")) if results.exists() else []
    for case in cases:
        for kind in ("failure", "error", "skipped"):
            found = case.find(kind)
            if found is not None:
                why = (found.get("message") or "").splitlines() or [""]
                lines.append(f"{kind}: {case.get('classname')}::{case.get('name')}: {why[0]}")
    has_run = any(case.find("skipped") is None for case in cases)
    return has_run and done.returncode == 0, fenced("\n".join(lines))


def run_script(name: str, *arguments: str) -> tuple[bool, str]:
    """Run a script beside this one; say whether it went through, and what it printed."""
    done = run([sys.executable, str(Path(__file__).with_name(name)), *arguments])
    return not done.returncode, fenced(done.stderr if done.returncode else done.stdout)


def run_bench(spec: str, rows: Path) -> tuple[bool, str]:
    """Measure at public size; say whether it went through, and the table."""
    command = [sys.executable, "-m", "vla2cli", "bench", "--spec", spec, "--device", "cuda"]
    command += [word for name in FRONTENDS for word in ("--frontend", name)]
    command += [word for name in DTYPES for word in ("--dtype", name)]
    done = run([*command, "--json", "-o", str(rows)])
    if done.returncode:
        return False, fenced(done.stderr)
    return True, fenced("\n".join(table_lines(read_rows(rows))))


def run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run a command of which the output counts, whatever it ends with."""
    print(" ".join(command), flush=True)
    return subprocess.run(command, capture_output=True, text=True, check=False)


def fenced(text: str) -> str:
    """Show text as it is."""
    return f"```\n{text.rstrip()}\n```"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", nargs="?", type=Path, default=Path("gpu-report.md"))
    parser.add_argument("--spec", default="VideoLLaMA2-7B")
    arguments = parser.parse_args()
    sys.exit(main(arguments.report, arguments.spec))
