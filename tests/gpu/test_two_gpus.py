"""Two workers on two GPUs against one: the same model, samples, noise and timesteps, by each way to share the work."""

import gc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from diffsynth_ray.config.schema import Job
from diffsynth_ray.memory.host import NodePlace
from diffsynth_ray.models.family import EncodedBatch
from diffsynth_ray.models.qwen_image import QwenImage
from diffsynth_ray.schedule import build_schedule
from diffsynth_ray.train.group import Group, NodeWorkers
from diffsynth_ray.train.residency import settle
from diffsynth_ray.train.trainer import MicroInput, Trainer, select_trained

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def buckets(name):
    """ZeRO-2 whose gradients fill several buckets, by a configuration of the tests."""
    file = Path(__file__).parents[1] / "support" / f"{name}.json"
    return {"strategy": "deepspeed", "zero_stage": 2, "deepspeed_config": str(file)}


LORA = {"lora": {"base_model": "dit", "rank": 8}}
FULL = {"training": {"trainable_models": ["dit"]}}
WAYS = {
    "lora, graphs": LORA,
    "lora, launched": LORA,
    "lora, offload": {**LORA, "offload": {"cpu_offload": True}},
    "lora, zero 2": {**LORA, "distributed": {"strategy": "deepspeed", "zero_stage": 2}},
    "lora, zero 3": {**LORA, "distributed": {"strategy": "deepspeed", "zero_stage": 3}},
    "full, ddp": FULL,  # some parameters of its last block have no gradient, so that there is no graph
    "full, optimizer on the host": {**FULL, "offload": {"cpu_offload": True, "optimize_on_cpu": True}},
    "full, zero 2": {**FULL, "distributed": {"strategy": "deepspeed", "zero_stage": 2}},
    "full, zero 2, small buckets": {**FULL, "distributed": buckets("small_buckets")},
    "full, zero 2, not overlapped": {**FULL, "distributed": buckets("small_buckets_in_turn")},
    "full, zero 3": {**FULL, "distributed": {"strategy": "deepspeed", "zero_stage": 3}},
}
STEPS = 6


def micro(index, device):
    generator = torch.Generator().manual_seed(index)
    latents = torch.randn(1, 16, 16, 16, generator=generator).to(device)
    embeds = torch.randn(1, 16, 64, generator=generator).to(device)
    return MicroInput(EncodedBatch(latents, {"prompt_embeds": embeds}), (index % 2,))


def segments():
    """The anonymous files of weights that this process maps, by inode."""
    with open("/proc/self/maps") as maps:
        fields = [line.split(maxsplit=5) for line in maps if "memfd:dsray-weights" in line]
    return {inode for _, _, _, _, inode, _ in fields}


def train(way, device, group):
    keys = {section: dict(values) for section, values in WAYS[way].items()}
    keys["training"] = {"learning_rate": 1e-3, "compile": "graphs" in way, **keys.get("training", {})}
    job = Job.model_validate({"name": "test", **keys})
    torch.manual_seed(0)
    family = QwenImage.build_tiny(0, components=["dit"], dtype=torch.bfloat16, device="meta")
    family.device = device
    select_trained(family, job)
    rank, world_size, before = dist.get_rank(), dist.get_world_size(), segments()
    workers = NodeWorkers(group, NodePlace(0, rank, world_size))
    residency = settle(family, job, group=workers, say=lambda line: None)
    trainer = Trainer(job, family, build_schedule(job, num_samples=20, global_batch_size=2), residency=residency)
    trainer.start(micro(rank, device), say=lambda line: None)
    strategy, losses, norms = trainer.strategy, [], []
    for step in range(STEPS):
        mine = [micro(2 * step + n, device) for n in range(2) if world_size == 1 or n == rank]
        result = trainer.train_step(mine, num_samples=2)
        losses.append(strategy.sum_over_workers(result.loss_sum).item() / 2)
        norms.append(result.grad_norm.item())
    masters = {name: tensor.float().cpu().clone() for name, tensor in strategy.full_masters().items()}
    record = {
        "losses": losses,
        "norms": norms,
        "masters": masters,
        "wait_s": strategy.communication.take_s(),
        "num_graphs": strategy.replay.num_graphs if getattr(strategy, "replay", None) is not None else 0,
        "inodes": segments() - before,
    }
    if hasattr(strategy, "engine"):
        record["overlaps"] = getattr(strategy.engine.optimizer, "overlap_comm", None)
        strategy.engine.destroy()
    return record


def train_all(rank, world_size, folder, ways):
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/store-{world_size}", world_size)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=world_size, device_id=device)
    group = Group(world_size)
    for way in ways:
        torch.save(train(way, device, group), path_of(folder, world_size, rank, way))
        gc.collect()
        torch.cuda.empty_cache()
    dist.barrier()
    dist.destroy_process_group()


def path_of(folder, world_size, rank, way):
    return f"{folder}/{world_size}-{rank}-{list(WAYS).index(way)}.pt"


def train_exactly(rank, folder, ways):
    """Of kernels only those whose results are the same each time."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    train_all(rank, 2, folder, ways)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("runs")
    for world_size in (1, 2):
        try:
            mp.spawn(train_all, (world_size, str(found), list(WAYS)), nprocs=world_size)
        except mp.ProcessRaisedException as error:  # the ways before it are there
            print(error)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_two_gpus_train_as_one(way, folder):
    alone, *both = [torch.load(path_of(folder, *place, way)) for place in ((1, 0), (2, 0), (2, 1))]
    for record in both:
        assert record["losses"] == pytest.approx(alone["losses"], rel=5e-3)
        assert record["norms"] == pytest.approx(alone["norms"], rel=3e-2)
        assert 0 < record["wait_s"] < 60
        assert record["num_graphs"] == ("graphs" in way)
    assert alone["wait_s"] == 0
    assert both[0]["masters"]
    for record in both:
        found, expected = record["masters"], alone["masters"]
        if not found:
            continue  # ZeRO gives them to rank 0 alone
        assert found.keys() == expected.keys()
        moved = sum(float((found[name] - tensor).norm() ** 2) for name, tensor in expected.items()) ** 0.5
        assert moved <= 3e-2 * sum(float(tensor.norm() ** 2) for tensor in expected.values()) ** 0.5
    if "offload" in way or "host" in way:
        assert both[0]["inodes"] & both[1]["inodes"]  # one copy of the frozen weights for both


def test_gradients_that_travel_beside_the_backward_pass_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    ways = ["full, zero 2, small buckets", "full, zero 2, not overlapped"]
    mp.spawn(train_exactly, (str(tmp_path), ways), nprocs=2)
    overlapped, in_turn = [torch.load(path_of(tmp_path, 2, 0, way)) for way in ways]
    assert (overlapped["overlaps"], in_turn["overlaps"]) == (True, False)
    assert overlapped["losses"] == in_turn["losses"]
    assert overlapped["norms"] == in_turn["norms"]
    assert all(torch.equal(overlapped["masters"][name], tensor) for name, tensor in in_turn["masters"].items())
