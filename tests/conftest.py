import importlib.util
import os
import shutil
import subprocess
import sys

# Tests run side by side: one thread each. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton's kernels run interpreted, on the CPU; read when a kernel is defined, which importing torch does not do.
    os.environ.setdefault("TRITON_INTERPRET", "1")
settings.register_profile("project", deadline=None)  # no timed tests
settings.load_profile("project")


def pytest_collection_modifyitems(config, items):
    def has(module):
        return importlib.util.find_spec(module) is not None

    for marker, missing, present in (
        ("gpu", "no CUDA device", torch.cuda.is_available()),
        ("clients", "no peft, trl or onnxruntime", all(map(has, ("peft", "trl", "onnxruntime")))),
        ("browser", "no Chromium", shutil.which("chromium") is not None),
        ("muspectre", "no muSpectre", has("muSpectre")),
        ("torchtt", "no torchTT", has("torchtt")),
    ):
        kept = [item for item in items if present or item.get_closest_marker(marker) is None]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        if len(kept) < len(items) and not hasattr(config, "workerinput"):
            print(f"{missing}: {len(items) - len(kept)} tests marked {marker} do not run")
        items[:] = kept


@pytest.fixture(autouse=True, scope="session")
def _logs_of_agents(tmp_path_factory):
    """stable-baselines3 would leave a folder for each agent in the machine's."""
    os.environ.setdefault("SB3_LOGDIR", str(tmp_path_factory.mktemp("agents")))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def compile_for_gpus(tmp_path):
    """Compiles a Triton kernel for CUDA devices that need not be there, since the interpreter also runs what does not
    compile. Each variant is a dict of the arguments' types, such as "*fp32", and one of the constants.
    """

    def compile_kernel(module, kernel, variants):
        source = f"""
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from {module} import {kernel} as kernel

for types, constants in {variants!r}:
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {{name: types[name] for name in kernel.arg_names}}, constants)
    for capability in (80, 90):
        assert compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
"""
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(tmp_path)
        run = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr

    return compile_kernel
