"""Parts about the machine: installed packages, tests with GPU cases, and CUDA in a child process."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

from gpu_check.part import ROOT, Run, Skipped, needs

PACKAGES = ("torch", "transformers", "triton", "numpy", "tokenizers", "datasets", "bert-score", "vllm", "faiss-gpu")
OF_TRAINING = ("llamafactory", "transformers", "trl", "accelerate", "peft", "deepspeed")
TESTS = ("tests/unit/test_flat.py", "tests/stage_scripts/test_reranker.py")
# Selection of tests for a dry run.
FEW = "ties or labels or no_probability"


def versions(run: Run) -> None:
    run.note(python=platform.python_version(), cores=len(os.sched_getaffinity(0)), **_installed(PACKAGES, sys.path))
    if "training" in run.wheels:
        run.note(training=_installed(OF_TRAINING, [run.wheels["training"], *sys.path]))
    run.case("device", _device, run)


def _installed(packages: tuple[str, ...], path: list[str]) -> dict[str, str]:
    found = dict.fromkeys(packages, "absent")
    for package in packages:
        for distribution in importlib.metadata.distributions(name=package, path=path):
            found[package] = distribution.version
            break
    return found


def _device(run: Run) -> dict:
    try:
        query = "name,driver_version,memory.total,memory.used,compute_cap,clocks.sm,temperature.gpu"
        line = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        line = f"no nvidia-smi ({error})"
    print("nvidia-smi:", line)
    if run.device == "cpu":
        return {"nvidia_smi": line}
    import torch

    properties = torch.cuda.get_device_properties(0)
    product = torch.ones(256, 256, device="cuda", dtype=torch.bfloat16) @ torch.ones(256, 256, device="cuda", dtype=torch.bfloat16)
    assert (product == 256).all(), "a product of ones is wrong"
    return {
        "nvidia_smi": line, "name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda,
        "multiprocessors": properties.multi_processor_count, "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
    }


def tests(run: Run) -> None:
    """Run the tests of search and reranker. On a GPU, the search tests have additional cases."""
    device = run.device
    for name in TESTS:
        run.case(name, _pytest, run, name)
    if device == "cuda":
        run.case("cases for a GPU", _on_the_gpu, run.figures.get(TESTS[0], {}))


def _on_the_gpu(figures: dict) -> None:
    assert figures.get("on a GPU"), f"no test of {TESTS[0]} ran on a GPU"


def _pytest(run: Run, name: str) -> dict:
    report = run.folder / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", name, *(["-k", FEW] if run.dry else [])]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(run.left() - 2, 5))
        print(done.stdout[-6000:], done.stderr[-2000:])
    except subprocess.TimeoutExpired as error:
        print((error.stdout or b"").decode()[-3000:])
        raise
    suite = ElementTree.parse(report).getroot()
    suite = suite if suite.tag == "testsuite" else suite[0]
    ran, errors, failed, skipped = (int(suite.get(key, 0)) for key in ("tests", "errors", "failures", "skipped"))
    wrong = [case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None or case.find("error") is not None]
    on_a_gpu = sum("cuda" in case.get("name") and case.find("skipped") is None for case in suite.iter("testcase"))
    assert not wrong and done.returncode == 0, f"{failed} failed, {errors} errors: {', '.join(wrong[:8])}"
    return {"passed": ran - errors - failed - skipped, "skipped": skipped, "on a GPU": on_a_gpu}


def fork(run: Run) -> None:
    """Check CUDA in a child process: torch.cuda.is_available() in the parent breaks fork, unless NVML answers it."""
    run.case("D environment of prepare_vllm", _prepared)
    if run.device == "cpu":
        raise Skipped("a machine without a GPU has no CUDA to poison")
    run.case("A fork after is_available", _child, "fork", {}, True)
    run.case("B fork with PYTORCH_NVML_BASED_CUDA_CHECK=1", _child, "fork", {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}, False)
    run.case("C spawn", _child, "spawn", {}, False)
    run.case("D spawn in the environment of prepare_vllm", _child, "prepared", {}, False)
    run.case("D fork in the environment of prepare_vllm", _child, "prepared-fork", {}, False)


def _clean(more: dict) -> dict:
    hidden = ("PYTORCH_NVML_BASED_CUDA_CHECK", "VLLM_WORKER_MULTIPROC_METHOD")
    return {key: value for key, value in os.environ.items() if key not in hidden} | more


def _prepared() -> dict:
    """Call prepare_vllm() in a separate process. Returns whether it chooses the CPU, and the environment that it sets."""
    needs("vllm")
    code = ("import os, json; from dynamicrag.llm.vllm_environment import prepare_vllm; on_cpu = prepare_vllm(); import torch; "
            "print(json.dumps([on_cpu, torch.cuda.is_available(), os.environ.get('PYTORCH_NVML_BASED_CUDA_CHECK'), "
            "os.environ.get('VLLM_WORKER_MULTIPROC_METHOD')]))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=_clean({}), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-500:]
    on_cpu, has_gpu, nvml, method = json.loads(done.stdout.splitlines()[-1])
    assert on_cpu is not has_gpu, f"prepare_vllm() returned {on_cpu}; torch.cuda.is_available() is {has_gpu}"
    assert nvml == "1" and method == "spawn", f"PYTORCH_NVML_BASED_CUDA_CHECK={nvml}, VLLM_WORKER_MULTIPROC_METHOD={method}"
    return {"on_cpu": on_cpu, "nvml": nvml, "method": method}


def _child(way: str, more: dict, must_raise: bool) -> dict:
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks/gpu_check/child.py"), way], cwd=ROOT, env=_clean(more), capture_output=True, text=True, timeout=90)
    print(done.stdout[-1500:], done.stderr[-1500:])
    raised = "Cannot re-initialize CUDA in forked subprocess" in done.stdout + done.stderr
    assert raised is must_raise, f"the child {'raised' if raised else 'did not raise'}: {done.stderr.strip()[-300:]}"
    assert must_raise or "child has CUDA" in done.stdout, f"the child has no CUDA: {done.stderr.strip()[-300:]}"
    return {"raised": raised}
