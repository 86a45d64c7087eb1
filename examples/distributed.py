"""Train a deformable network on any number of GPUs, or CPU processes, and time a step.

    torchrun --standalone --nproc-per-node=2 examples/distributed.py --mode ddp

Modes: ddp (whole model on each device), fsdp2 (parameters sharded), tensor (DTensor: the output
channels of every layer sharded over the devices, each of which sees the whole batch). The data are
random images and the target is what a frozen network of the same kind makes of them, so the loss
falls. The first process prints one line of JSON.
"""

import argparse
import json
import os
import statistics
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import deformnd


class Block(nn.Module):
    """A deformable layer whose offsets and masks an ordinary convolution predicts."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.deform = deformnd.PackedDeformConv2d(
            channels, channels, 3, padding=1, modulated=True, generator_bias=True
        )
        self.norm = nn.GroupNorm(8, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.deform(x)))


class ShardedBlock(Block):
    """The same with deform's weight sharded by output channels: no device holds, or computes,
    more than its part. DTensor gathers the output, and sums up the gradient of the input."""

    def shard(self, mesh: dist.DeviceMesh) -> None:
        for name, p in list(self.deform.named_parameters(recurse=False)):
            setattr(self.deform, name, nn.Parameter(distribute_tensor(p, mesh, [Shard(0)])))

    def forward(self, x: Tensor) -> Tensor:
        layer = self.deform
        mesh = layer.weight.device_mesh
        whole, offset, mask = (
            DTensor.from_local(t, mesh, [Replicate()])
            for t in (x, layer._offset(x), layer._mask(x))
        )
        output = deformnd.deform_conv2d(
            whole, layer.weight, offset, mask, layer.bias, padding=layer.padding
        )
        return x + torch.relu(self.norm(output.full_tensor()))


def network(channels: int, blocks: int, block: type[Block]) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, stride=2, padding=1),
        *(block(channels) for _ in range(blocks)),
        nn.Conv2d(channels, 4, 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=("ddp", "fsdp2", "tensor"), default="ddp")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    parser.add_argument("--batch", type=int, default=8, help="images a process")
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels")
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    args = parser.parse_args()

    kind = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same weights everywhere
    target = network(args.channels, 1, Block).to(device).eval()
    model = network(args.channels, args.blocks, ShardedBlock if args.mode == "tensor" else Block)
    model = model.to(device)
    train: nn.Module = model
    if args.mode == "ddp":
        train = nn.parallel.DistributedDataParallel(model)
    elif args.mode == "fsdp2":
        for layer in model:
            fully_shard(layer)
        train = fully_shard(model)
    else:
        mesh = init_device_mesh(kind, (world,))
        for layer in model:
            if isinstance(layer, ShardedBlock):
                layer.shard(mesh)
    optimizer = torch.optim.AdamW(train.parameters(), lr=1e-3, foreach=False)

    if args.mode != "tensor":
        torch.manual_seed(1 + rank)  # other images in each process
    x = torch.rand(args.batch, 3, args.size, args.size, device=device)
    with torch.no_grad():
        y = target(x)

    losses, times = [], []
    for _ in range(args.steps):
        if kind == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast(kind, torch.bfloat16, enabled=args.bf16):
            loss = (train(x).float() - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())  # waits for the device
        times.append(time.perf_counter() - start)
    step = statistics.median(times[len(times) // 4 :])  # the first ones compile kernels
    if rank == 0:
        images = args.batch if args.mode == "tensor" else args.batch * world
        report = {
            **vars(args),
            "device": torch.cuda.get_device_name() if kind == "cuda" else "cpu",
            "processes": world,
            "torch": torch.__version__,
            "deformnd": deformnd.__version__,
            "first_loss": round(losses[0], 5),
            "last_loss": round(losses[-1], 5),
            "ms_per_step": round(1e3 * step, 3),
            "images_per_s": round(images / step, 2),
        }
        print(json.dumps(report), flush=True)
    dist.destroy_process_group()
    if kind == "cpu":
        # Gloo's threads can outlive their group, and one that still frees a tensor while Python
        # shuts down aborts the process (https://github.com/pytorch/pytorch/pull/179291): skip that.
        os._exit(0)


if __name__ == "__main__":
    main()
