"""What the ranks of test_sharded.py do. Each checks its own part, and prints what must be the same on all."""

import math
import os
import sys

import gradclip
import torch
import torch.distributed as dist


def whole():
    torch.manual_seed(0)
    return {"w": torch.randn(8, 12), "b": torch.randn(7), "h": torch.randn(12, 4).bfloat16()}


def norm_of(tensors):
    return math.sqrt(sum(float(t.double().pow(2).sum()) for t in tensors))


def parts(rank, count):
    """The part of a rank; that of some is empty."""
    return {name: t.chunk(count)[rank].clone() if rank < len(t.chunk(count)) else t[:0] for name, t in whole().items()}


def plain(rank, count):
    total, mine = norm_of(whole().values()), parts(rank, count)
    before = {name: t.clone() for name, t in mine.items()}
    for limit in (total * 2, 1.0):
        report = gradclip.clip(mine, max_norm=limit, eps=0.0, group=dist.group.WORLD)
        assert math.isclose(report.total_norm, total, rel_tol=1e-12)
        assert report.clipped == (limit < total)
        for name, t in mine.items():
            coef = min(1.0, limit / total)
            assert torch.allclose(t.float(), before[name].float() * coef, rtol=4e-3 if name == "h" else 1e-6)
            assert (t._version > 0) == (limit < total and t.numel() > 0)
    print(report.total_norm.hex(), report.clip_coef.hex())
    params = [torch.nn.Parameter(torch.zeros_like(t)) for t in before.values()]
    for param, grad in zip(params, before.values()):
        param.grad = grad
    print(float(gradclip.get_total_norm(before.values(), group=dist.group.WORLD)).hex())
    norm = gradclip.clip_grad_norm_(params, 0.5, group=dist.group.WORLD)
    left = torch.tensor([float(p.grad.double().pow(2).sum()) for p in params]).sum()
    dist.all_reduce(left)
    assert math.isclose(float(left) ** 0.5, 0.5, rel_tol=4e-3)
    print(float(norm).hex(), float(gradclip.norm(mine, norm_type="inf", group=dist.group.WORLD)).hex())


def non_finite(rank, count):
    mine = parts(rank, count)
    if rank == count - 1:
        mine["b"] = torch.tensor([1.0, math.nan])
    before = {name: t.clone() for name, t in mine.items()}
    try:
        gradclip.clip(mine, max_norm=1.0, group=dist.group.WORLD)
        raise AssertionError("not refused")
    except gradclip.NonFiniteError as error:
        found = error.non_finite
    assert found == gradclip.NonFinite(1, 1, "b" if rank == count - 1 else None, 1, count - 1), found
    assert all(torch.equal(mine[n].nan_to_num(), before[n].nan_to_num()) and mine[n]._version == 0 for n in mine)
    report = gradclip.clip(mine, max_norm=1.0, non_finite="skip", group=dist.group.WORLD)
    assert report.skipped == "non-finite" and report.non_finite == found
    print(found.rank, found.index)


def failing(rank, count):
    mine = parts(rank, count)
    if rank == 1:
        mine["b"] = torch.ones(3, dtype=torch.int32)
    try:
        gradclip.clip(mine, max_norm=1.0, group=dist.group.WORLD)
        raise AssertionError("not refused")
    except TypeError as error:
        assert rank == 1 and "'b' is int32" in str(error)
    except RuntimeError as error:
        assert rank != 1 and "rank 1 of the group failed" in str(error)
    assert all(t._version == 0 for t in mine.values())
    # The next call works.
    print(gradclip.clip(parts(rank, count), max_norm=1.0, group=dist.group.WORLD).total_norm.hex())


def disagreeing(rank, count):
    mine = parts(rank, count)
    for name, value in (("max_norm", 1.0 + (rank == 1)), ("max_rms", 1.0), ("max_norm", -1.0)):
        try:
            settings = {name: value} if name == "max_norm" or rank == 1 else {"max_norm": 1.0}
            gradclip.clip(mine, group=dist.group.WORLD, **settings)
            raise AssertionError("not refused")
        except (ValueError, RuntimeError) as error:
            assert value < 0 or "of another clip" in str(error), error
    assert all(t._version == 0 for t in mine.values())
    for settings in ({"max_norm": 1.0, "scope": "tensor"}, {"clip_value": 1.0}, {"max_norm": 1.0, "groups": {"w": 1.0}}):
        try:
            gradclip.clip(mine, group=dist.group.WORLD, **settings)
            raise AssertionError("not refused")
        except ValueError:
            pass
    print("all refused")


def dtensors(rank, count):
    """Sharded, replicated, uneven, and on meshes of one and two dimensions at once."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    line = init_device_mesh("cpu", (count,))
    square = init_device_mesh("cpu", (2, count // 2))
    full = whole()
    grads = [
        distribute_tensor(full["w"], line, [Shard(0)]),
        distribute_tensor(full["b"], line, [Shard(0)]),
        distribute_tensor(full["b"] * 2, line, [Replicate()]),
        distribute_tensor(full["w"] * 3, square, [Replicate(), Shard(1)]),
        distribute_tensor(full["h"], square, [Shard(0), Replicate()]),
    ]
    total = norm_of([full["w"], full["b"], full["b"] * 2, full["w"] * 3, full["h"]])
    before = [grad.full_tensor().clone() for grad in grads]
    params = []
    for grad in grads:
        params.append(torch.nn.Parameter(grad.clone()))
        params[-1].grad = grad
    norm = gradclip.clip_grad_norm_(params, 1.0, group=dist.group.WORLD)
    assert math.isclose(float(norm), total, rel_tol=1e-12), (float(norm), total)
    for grad, old in zip(grads, before):
        new = grad.full_tensor()
        assert torch.allclose(new.float(), old.float() / total, rtol=4e-3 if new.dtype == torch.bfloat16 else 1e-5)
    gradclip.clip_grad_value_(params, 0.01)
    assert all(float(grad.full_tensor().abs().max()) <= 0.0101 for grad in grads)
    try:
        gradclip.clip_grad_norm_(params, 1.0)
        raise AssertionError("not refused")
    except TypeError as error:
        assert "DTensor" in str(error) and "group=" in str(error)
    print(float(norm).hex())


def offloaded(rank, count):
    """FSDP with parameters and gradients on the CPU."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    alone = [p.detach().clone() for p in model.parameters()]
    fully_shard(model, mesh=init_device_mesh("cpu", (count,)))
    batch = torch.randn(4, 6)
    model(batch).square().sum().backward()
    report = gradclip.clip(model, max_norm=0.1, eps=0.0, group=dist.group.WORLD)
    twin = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    for param, value in zip(twin.parameters(), alone):
        param.data = value
    twin(batch).square().sum().backward()
    expected = norm_of([p.grad for p in twin.parameters()])
    assert math.isclose(report.total_norm, expected, rel_tol=1e-5), (report.total_norm, expected)
    assert math.isclose(norm_of([p.grad.full_tensor() for p in model.parameters()]), 0.1, rel_tol=1e-5)
    print(report.total_norm.hex())


if __name__ == "__main__":
    name, rank, count, store = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    for function in {"plain": (plain, non_finite, failing, disagreeing), "dtensors": (dtensors, offloaded)}[name]:
        function(rank, count)
    # PyTorch 1.13 may end its threads badly at exit.
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)
