import os

# Tests run side by side: one thread each. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("project", deadline=None)  # no timed tests
settings.load_profile("project")


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    kept = [item for item in items if item.get_closest_marker("gpu") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    if len(kept) < len(items) and not hasattr(config, "workerinput"):
        print(f"no CUDA device: {len(items) - len(kept)} tests marked gpu do not run")
    items[:] = kept


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
