"""The launcher files: what the libraries read out of them, and runs of two processes against one.

Two processes on CPUs are run, with gloo, from multi_cpu.yaml, fsdp2.yaml, deepspeed_zero2.yaml and deepspeed_zero3.yaml
as they are. What is checked by the libraries alone, and not run here: GPUs (multi_gpu.yaml, single_gpu_bf16.yaml),
the second machine of two_nodes.yaml, and offloading (deepspeed_zero2_offload.yaml, deepspeed_zero3_offload.yaml), for
whose AdamW DeepSpeed needs a compiler.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, patch_environment
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from training import launching, train
from training.trainer import build_arguments
from training.turbulence import FlowSettings, write_fields

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "training" / "configs"
LAUNCHERS = {
    path.stem: path for path in sorted(CONFIGS.glob("*.yaml")) if "distributed_type" in yaml.safe_load(path.read_text())
}
STEPS, ITEMS = 4, 8  # of a run; of a step, of all processes

# The job as it is, without extras that it does not use and that take seconds to import, and with a look at what a
# process reads and holds.
WATCHED = """
import json, os, sys
from pathlib import Path

unused = {"datasets", "peft"} | ({"deepspeed"} if "ACCELERATE_USE_DEEPSPEED" not in os.environ else set())
sys.modules.update(dict.fromkeys(unused))

from training import train
from training.field_task import FieldTrainer
from training.fields import PatchPairs

seen, item, make, save = [], PatchPairs.__getitem__, FieldTrainer.__init__, FieldTrainer.save_model

def watched_item(self, index):
    if self.offsets == "random":  # those of validation lie on a grid
        seen.append(int(index))
    return item(self, index)

def watched_make(self, *args, **options):
    make(self, *args, **options)
    plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:  # else a model as small as this one would not be cut
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

def local(tensor):
    tensor = getattr(tensor, "ds_tensor", tensor)
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).numel()

def watched_save(self, *args, **options):
    found = {
        "type": self.accelerator.distributed_type.value,
        "processes": self.accelerator.num_processes,
        "parameters": sum(map(local, self.model.parameters())),
        "moments": sum(local(state["exp_avg"]) for state in self.optimizer.state.values()),
        "items": seen,
    }
    Path(sys.argv[1], f"{self.accelerator.process_index}.json").write_text(json.dumps(found))
    return save(self, *args, **options)

PatchPairs.__getitem__, FieldTrainer.__init__, FieldTrainer.save_model = watched_item, watched_make, watched_save
train.main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    flow = FlowSettings(num_trajectories=4, num_grid=16, viscosity=2e-3, dt_save=0.02, num_snapshots=6)
    path = write_fields(folder / "flow.hdf5", flow, progress=False)
    return {
        "data": {
            "path": str(path),
            "fractions": [0.5, 0.25, 0.25],
            "offsets": "random",
            "symmetries": True,
            "num_validation_items": 16,
        },
        "tokenizer": {"patch_size": 4, "num_bits": 5, "base": 6},
        "model": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "embedding_seed_dim": 8,
            "embedding_num_heads": 2,
            "embedding_rank": 4,
            "loss_chunk_size": 7,  # the head is used again and again, in evaluation too
        },
        "training": {
            "output_dir": str(folder / "single"),
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "sequences_per_step": ITEMS,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "max_grad_norm": 1.5,  # less than the norms of this run: it is clipped
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 1,
        },
    }


@pytest.fixture(scope="module")
def single(settings):
    """The run of one process, which accumulates four batches of two to a step."""
    report = train.run(json.loads(json.dumps(settings)))
    return report, Path(settings["training"]["output_dir"])


def logged(folder, key):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [float(row[key]) for row in rows if key in row]


def launched(settings, folder, launcher, environment):
    """Trains by `accelerate launch` into a folder; returns the report, and what each process had."""
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    (folder / "watched.py").write_text(WATCHED)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCHERS[launcher])]
    command += ["--main_process_port", "0", str(folder / "watched.py"), str(folder)]
    command += ["--config", str(folder / "run.yaml"), "--training.output_dir", str(folder / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    report = json.loads((folder / "run" / "training.json").read_text())
    return report, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("launcher", "kind", "share_of_parameters", "share_of_moments"),
    [
        ("multi_cpu", "MULTI_CPU", 1, 1),
        ("fsdp2", "FSDP", 0.5, 0.5),
        ("deepspeed_zero2", "DEEPSPEED", 1, 0.5),
        ("deepspeed_zero3", "DEEPSPEED", 0.5, 0.5),
    ],
)
def test_two_processes_train_as_one_does(
    settings, single, tmp_path, launcher, kind, share_of_parameters, share_of_moments
):
    """The same curve, schedule, steps and model; each process holds its share and reads other items."""
    if "deepspeed" in launcher:
        pytest.importorskip("deepspeed")
    report, folder = single
    environment = {"ACCELERATE_USE_CPU": "true"} if launcher == "multi_cpu" else {}
    found, ranks = launched(settings, tmp_path, launcher, environment)

    assert len(logged(folder, "loss")) == STEPS == found["steps"]
    for key in ("loss", "eval_loss", "eval_nrmse"):
        torch.testing.assert_close(logged(tmp_path / "run", key), logged(folder, key), rtol=0, atol=1e-4, msg=key)
    torch.testing.assert_close(logged(tmp_path / "run", "grad_norm"), logged(folder, "grad_norm"), rtol=1e-4, atol=0)
    assert logged(tmp_path / "run", "learning_rate") == logged(folder, "learning_rate")
    assert found["tokens_per_step"] == report["tokens_per_step"]
    assert found["num_parameters"] == report["num_parameters"]

    model, other = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "run"))
    assert not any(parameter.isnan().any() for parameter in other.parameters())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)

    size = report["num_parameters"]
    for rank in ranks:
        assert (rank["type"], rank["processes"]) == (kind, 2)
        for name, share in {"parameters": share_of_parameters, "moments": share_of_moments}.items():
            # Rows are shared out, of which few tensors have an even number.
            assert rank[name] / size == pytest.approx(share, rel=0.1 if share < 1 else 0), name
    items = [number for rank in ranks for number in rank["items"]]
    assert sorted(items) == list(range(STEPS * ITEMS))  # every item once, by one of the two
    assert len(ranks[0]["items"]) == len(ranks[1]["items"])


def test_the_schedule_is_that_of_the_steps(settings, single):
    """Not of the steps times the processes, as accelerate's own prepared scheduler would count; see above for two."""
    training = settings["training"]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training["learning_rate"])
    schedule = get_cosine_schedule_with_warmup(optimizer, training["warmup_steps"], STEPS)
    rates = []
    for _ in range(STEPS):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert logged(single[1], "learning_rate") == pytest.approx(rates)


@pytest.fixture
def told(monkeypatch):
    """What `accelerate launch` would start: torchrun's arguments, none for one process, and its environment."""

    def launch(launcher, *more):
        caught = {}

        def start(arguments, env=None):
            caught.update(arguments=arguments, environment=dict(os.environ if env is None else env))
            return SimpleNamespace(wait=lambda: None, returncode=0)

        with monkeypatch.context() as patch:
            patch.setattr("torch.distributed.run.run", start)
            patch.setattr("accelerate.commands.launch.subprocess.Popen", start)
            words = [
                "--config_file",
                str(LAUNCHERS[launcher]),
                "--main_process_port",
                "0",
                *more,
                "-m",
                "training.train",
            ]
            launch_command(launch_command_parser().parse_args(words))
        return caught["arguments"], caught["environment"]

    return launch


def test_all_launchers_are_known():
    zero = {f"deepspeed_zero{stage}{offload}" for stage in (2, 3) for offload in ("", "_offload")}
    assert set(LAUNCHERS) == zero | {
        *("single_process", "single_gpu_bf16", "multi_cpu", "multi_gpu", "fsdp2", "two_nodes"),
    }


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_are_read_as_meant(told, launcher):
    path = LAUNCHERS[launcher]
    config = load_config_from_file(str(path))  # refuses keys that accelerate does not know
    single_process = launcher.startswith("single")
    expected = {"fsdp2": DistributedType.FSDP}.get(launcher, DistributedType.MULTI_GPU)
    expected = DistributedType.NO if single_process else expected
    expected = DistributedType.DEEPSPEED if launcher.startswith("deepspeed") else expected
    assert config.distributed_type == expected
    title, command = path.read_text().splitlines()[:2]
    assert title.startswith("# ")
    assert f"accelerate launch --config_file training/configs/{path.name} " in command

    arguments, environment = told(launcher)
    if not single_process:
        assert arguments.nproc_per_node == {"two_nodes": "8"}.get(launcher, "2")
    assert environment["ACCELERATE_MIXED_PRECISION"] == ("bf16" if launcher == "single_gpu_bf16" else "no")
    assert ("ACCELERATE_USE_FSDP" in environment) == (launcher == "fsdp2")
    assert ("ACCELERATE_USE_DEEPSPEED" in environment) == launcher.startswith("deepspeed")


def test_two_nodes_are_given_ranks_and_one_address(told):
    arguments, _ = told("two_nodes", "--machine_rank", "1", "--main_process_ip", "10.0.0.1")
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", 1)
    assert arguments.rdzv_endpoint.startswith("10.0.0.1:")


def test_fsdp_is_read_by_its_plugin(told):
    with patch_environment(**told("fsdp2")[1]):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert not plugin.cpu_ram_efficient_loading
    assert plugin.auto_wrap_policy is not None


@pytest.mark.parametrize("launcher", [name for name in LAUNCHERS if name.startswith("deepspeed")])
def test_deepspeed_takes_what_the_run_says(told, settings, launcher):
    """By accelerate's plugin, transformers' completion and DeepSpeed's own check."""
    deepspeed = pytest.importorskip("deepspeed")
    from accelerate.utils import DeepSpeedPlugin
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations import unset_hf_deepspeed_config
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    arguments = build_arguments(json.loads(json.dumps(settings)))
    try:
        with patch_environment(**told(launcher)[1]):
            plugin = DeepSpeedPlugin()
            config = HfTrainerDeepSpeedConfig(plugin.deepspeed_config)
            config.trainer_config_process(arguments)
    finally:
        unset_hf_deepspeed_config()
    assert not any(value == "auto" for value in config.config.values())
    found = DeepSpeedConfig(config.config)
    stage, offload = int(launcher.removesuffix("_offload")[-1]), launcher.endswith("_offload")
    assert found.zero_optimization_stage == stage
    assert found.gradient_accumulation_steps == arguments.gradient_accumulation_steps == 4
    assert found.gradient_clipping == arguments.max_grad_norm
    zero = found.zero_config
    devices = [part and part.device for part in (zero.offload_optimizer, zero.offload_param)]
    cpu, none = (deepspeed.runtime.zero.config.OffloadDeviceEnum(name) for name in ("cpu", "none"))
    assert devices[0] == (cpu if offload else none)
    assert devices[1] == (cpu if offload and stage == 3 else none)
    assert zero.gather_16bit_weights_on_model_save == (stage == 3)


def test_processes_that_did_not_join_are_refused(monkeypatch):
    launching.check_joined(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    launching.check_joined(2)
    with pytest.raises(ValueError, match=r"2 processes were launched and 1 joined.*set ACCELERATE_USE_CPU=true"):
        launching.check_joined(1)


def test_fsdp_on_cpus_is_left_to_who_asks(monkeypatch):
    """Accelerate shards where it takes processes for those of GPUs."""
    for asked, kind in {"false": DistributedType.MULTI_CPU, "true": DistributedType.MULTI_GPU}.items():
        monkeypatch.setenv("ACCELERATE_USE_FSDP", asked)
        state = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU)
        launching.prepare_sharding(state)
        assert state.distributed_type == kind
    alone = SimpleNamespace(distributed_type=DistributedType.NO)
    launching.prepare_sharding(alone)
    assert alone.distributed_type == DistributedType.NO


def test_operators_are_not_sharded(settings, monkeypatch, tmp_path):
    """They predict past the wrapped forward."""
    given = json.loads(json.dumps(settings))
    given["data"]["kind"] = "operators"
    given["tokenizer"] = {"patch_size": 4}
    given["model"] = {"architecture": "unet", "width": 4}
    given["training"]["output_dir"] = str(tmp_path)
    monkeypatch.setattr("training.operator_task.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match=r"not trained with sharded parameters.*multi_cpu\.yaml"):
        train.run(given)


def test_deepspeed_that_would_be_left_out_is_refused(settings, monkeypatch):
    given = json.loads(json.dumps(settings))
    given["training"]["deepspeed"] = {"zero_optimization": {"stage": 3}}
    with pytest.raises(ValueError, match=r"sharding is the launcher's.*deepspeed_zero2\.yaml"):
        build_arguments(given)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match=r"accelerate leaves DeepSpeed out.*--training.use_cpu true"):
        launching.prepare_backend()


def test_a_run_is_not_taken_up_by_another_launcher(settings, single, monkeypatch):
    """Sharding or DDP would begin the other's optimizer anew, and products go on in another precision."""
    given = json.loads(json.dumps(settings))
    given["training"]["resume_from_checkpoint"] = True
    assert train.run(json.loads(json.dumps(given)))["steps"] == STEPS  # trained already
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match=r"other settings or data \(launcher\.mixed_precision\)"):
        train.run(given)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_are_recorded(told, launcher):
    with patch_environment(**told(launcher)[1]):
        found = launching.launcher()
    stage = f"deepspeed stage {launcher.removesuffix('_offload')[-1]}"
    sharding = {"fsdp2": "fsdp"}.get(launcher, stage if launcher.startswith("deepspeed") else "none")
    assert found == {"sharding": sharding, "mixed_precision": "bf16" if launcher == "single_gpu_bf16" else "no"}


def test_fsdp_does_not_round_the_loss(told):
    with patch_environment(**told("fsdp2")[1]):
        plugin = FullyShardedDataParallelPlugin()
    launching.keep_loss_exact(plugin)  # without mixed precision there is nothing to do
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.output_dtype == torch.bfloat16
    launching.keep_loss_exact(plugin)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.bfloat16, None)
