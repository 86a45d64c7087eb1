"""Two processes compute what one computes: DDP, FSDP2 and DTensor, on CPUs through gloo.

One pair of processes makes all checks.
"""

import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn

from cases import Case, aggregate, gradients, requires_grad

WORLD = 2

if not dist.is_available() or sys.platform == "win32":
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

# One of each family and rank, with one offset group, so that channels can be sharded.
CASES = [
    Case((9,), (3,), padding=1, stride=2),
    Case((6, 5), (3, 3), padding=1, batch=3),  # an odd batch for two processes
    Case((4, 3, 5), (2, 1, 3), padding=1, mask_groups=0),
]
CASES += [Case(c.size, c.kernel, True, c.batch, padding=1, offset_groups=1) for c in CASES]
MANY_GROUPS = [
    Case((6, 5), (3, 3), transposed, groups=2, offset_groups=2, mask_groups=2)
    for transposed in (False, True)
]


def network():
    from test_library import network

    return network().double()


def train(model, batches):
    """Losses of a few steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for x in batches:
        loss = model(x).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 8, 8, generator=generator).double() for _ in range(3)]


def check_training(wrap):
    alone, together = network(), wrap(network())
    expected = train(alone, batches())
    half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    losses = train(together, [x[half] for x in batches()])
    for loss, want in zip(losses, expected, strict=True):
        dist.all_reduce(loss)
        torch.testing.assert_close(loss / WORLD, want)
    for got, want in zip(together.parameters(), alone.parameters(), strict=True):
        got = got.full_tensor() if hasattr(got, "full_tensor") else got
        torch.testing.assert_close(got.detach(), want.detach())


def check_ddp():
    check_training(nn.parallel.DistributedDataParallel)


def check_fsdp2():
    from torch.distributed.fsdp import fully_shard

    def wrap(model):
        for layer in model:
            if list(layer.parameters()):
                fully_shard(layer)
        model = fully_shard(model)
        assert all(hasattr(p, "full_tensor") for p in model.parameters())
        return model

    check_training(wrap)


def check_dtensor(case, sharding, communicates=False):
    """Outputs and gradients; no communication unless the case cannot do without."""
    from torch.distributed.tensor import (
        DTensor,
        Replicate,
        Shard,
        distribute_tensor,
        init_device_mesh,
    )
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (WORLD,))
    whole = Replicate()
    out_channels, in_channels = (1, 0) if case.transposed else (0, 1)  # of weight
    placements = {
        "replicated": (whole,) * 5,
        "channels": (Shard(1), None, whole, whole, None),
        "batch": (Shard(0), whole, Shard(0), Shard(0), whole),
        "out_channels": (whole, Shard(out_channels), whole, whole, Shard(0)),
        "in_channels": (Shard(1), Shard(in_channels), whole, whole, whole),
    }[sharding]
    tensors = requires_grad(case.tensors())
    if case.aggregate:
        placements = (placements[0], *placements[2:4])
    expected = case.call(tensors)
    grad_output = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    want = gradients(expected, tensors, grad_output)
    shards = {
        name: None if t is None else distribute_tensor(t.detach(), mesh, [p]).requires_grad_()
        for (name, t), p in zip(tensors.items(), placements, strict=True)
    }
    assert all(t is None or isinstance(t, DTensor) for t in shards.values())
    with CommDebugMode() as forward:
        output = case.call(shards)
    placed = [whole if p.is_partial() else p for p in output.placements]
    grad_output = distribute_tensor(grad_output, mesh, placed)
    with CommDebugMode() as backward:
        got = gradients(output, shards, grad_output)
    if not communicates:
        assert forward.get_total_counts() == backward.get_total_counts() == 0
        for t, placement in zip(shards.values(), placements, strict=True):
            assert t is None or t.placements == (placement,)
    torch.testing.assert_close(output.full_tensor(), expected)
    for name, grad in got.items():
        torch.testing.assert_close(grad.full_tensor(), want[name])


def check_dtensor_parameters():
    """Same tensors, another stride: nothing is answered from a cache of the first."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    for stride in (1, 2, 3):
        case = Case((5, 5), (2, 2), True, stride=stride)
        tensors = case.tensors()
        shards = {
            name: distribute_tensor(t, mesh, [Shard(0)]) if name != "weight" else t
            for name, t in tensors.items()
        }
        shards["weight"] = distribute_tensor(tensors["weight"], mesh, [Shard(1)])
        expected = case.call(tensors)
        output = case.call(shards)
        assert output.shape == expected.shape
        torch.testing.assert_close(output.full_tensor(), expected)


def checks():
    found = {"ddp": check_ddp, "fsdp2": check_fsdp2, "stride": check_dtensor_parameters}
    for sharding in ("replicated", "batch", "out_channels", "in_channels"):
        for case in CASES:
            found[f"{sharding} {case}"] = lambda c=case, s=sharding: check_dtensor(c, s)
        for case in MANY_GROUPS:
            moves = "channels" in sharding
            found[f"{sharding} {case}"] = lambda c=case, s=sharding, m=moves: check_dtensor(
                c, s, communicates=m
            )
    for sharding in ("replicated", "batch", "channels"):
        for groups in (1, 2):
            case = aggregate((5, 4), (3, 3), 4, padding=1, offset_groups=groups)
            moves = sharding == "channels" and groups > 1
            found[f"{sharding} {case}"] = lambda c=case, s=sharding, m=moves: check_dtensor(
                c, s, communicates=m
            )
    return found


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    failures = []
    for name, check in checks().items():
        torch.manual_seed(0)
        try:
            check()
        except Exception:
            failures.append(f"{name}, process {rank}:\n{traceback.format_exc()}")
    Path(folder, f"{rank}.txt").write_text("\n".join(failures))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # Python's own end aborts if a thread of gloo's still frees a tensor then


def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path),), WORLD)
    failures = [(tmp_path / f"{rank}.txt").read_text() for rank in range(WORLD)]
    assert not any(failures), "\n".join(failures)


def test_example(tmp_path):
    """torchrun runs it as its first lines say, here with the weights sharded."""
    root = Path(__file__).parents[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    small = "--device cpu --steps 3 --batch 2 --size 16 --channels 8 --blocks 1 --mode tensor"
    run = subprocess.run(
        [*launcher, str(root / "examples" / "distributed.py"), *small.split()],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert '"processes": 2' in run.stdout
