"""Guards against steps, states and checkpoints that differ from those of torch.optim."""

import copy
import io
import math
import pickle
import threading
import time

import gradclip
import pytest
import torch

STEPS = 30
SETTINGS = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "maximize": True}),
    ("SGD", {"lr": 0.05, "momentum": 0.8, "nesterov": True}),
    ("Adagrad", {}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.01, "initial_accumulator_value": 0.1, "maximize": True}),
    ("RMSprop", {}),
    ("RMSprop", {"lr": 0.02, "alpha": 0.9, "momentum": 0.5, "centered": True, "weight_decay": 0.01}),
    ("Adam", {}),
    ("Adam", {"lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.1, "amsgrad": True}),
    ("AdamW", {}),
    ("AdamW", {"lr": 0.01, "betas": (0.5, 0.9), "eps": 1e-6, "weight_decay": 0.1, "amsgrad": True, "maximize": True}),
]
SHAPES = [(7, 5), (11,), (), (0,)]


def parameters(dtype=torch.float64, shapes=SHAPES):
    torch.manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in shapes]


def gradients(step, params):
    torch.manual_seed(100 + step)
    size = 30.0 if step % 7 == 3 else 1.0
    return [(torch.randn(p.shape, dtype=torch.float64) * size).to(p.dtype) for p in params]


def make(name, params, **settings):
    settings.setdefault("lr", 0.01)
    return getattr(torch.optim, name)(params, **settings)


def set_grads(params, grads):
    for p, grad in zip(params, grads):
        p.grad = None if grad is None else grad.clone()


def near(ours, theirs, dtype=torch.float64):
    """float64 agrees but for the order of operations; float32 within some units in the last place of the largest."""
    bound = 1e-12 if dtype == torch.float64 else 1e-6
    for a, b in zip(ours, theirs):
        a, b = a.detach().double(), b.detach().double()
        assert a.shape == b.shape
        if a.numel():
            assert float((a - b).abs().max()) <= bound * max(1.0, float(b.abs().max())), (a, b)


def same_state(ours, theirs):
    """The states have the same form and the same values."""
    ours, theirs = ours.state_dict(), theirs.state_dict()
    # An empty entry, or None for a direction that there is not, stands for nothing.
    kept = lambda state: {k: {n: t for n, t in v.items() if t is not None} for k, v in state.items()}  # noqa: E731
    a, b = ({k: v for k, v in kept(s["state"]).items() if v} for s in (ours, theirs))
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].keys() == b[key].keys()
        for name, value in a[key].items():
            if name == "step":
                assert isinstance(value, torch.Tensor) and float(value) == float(b[key][name])
                continue
            assert value.dtype == b[key][name].dtype and value.stride() == b[key][name].stride()
            near([value], [b[key][name]], value.dtype)
    for mine, other in zip(ours["param_groups"], theirs["param_groups"]):
        assert mine.keys() == other.keys() and mine["params"] == other["params"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "settings"), SETTINGS)
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_steps_and_states_are_those_of_pytorch(name, settings, dtype, max_norm):
    ours, theirs = parameters(dtype), parameters()
    optimizer = getattr(gradclip, name)(ours, **settings, max_norm=max_norm)
    reference = make(name, theirs, **{"lr": optimizer.param_groups[0]["lr"], **settings})
    assert isinstance(optimizer, (torch.optim.Optimizer, getattr(torch.optim, name)))
    assert optimizer.defaults == reference.defaults
    for step in range(STEPS):
        grads = gradients(step, ours)
        if step % 5 == 2:
            # Parameters without gradients keep counts of their own.
            grads[step % 3] = None
        set_grads(ours, grads)
        set_grads(theirs, [None if grad is None else grad.double() for grad in grads])
        before = [p._version for p in ours]
        if max_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        optimizer.step()
        reference.step()
        for p, grad, version in zip(ours, grads, before):
            assert (p._version > version) == (grad is not None)
            if grad is not None:
                assert torch.equal(p.grad, grad) and p.grad._version == 0
        if max_norm is not None:
            assert optimizer.report.total_norm == pytest.approx(float(norm), rel=1e-6)
            assert optimizer.report.clipped == (float(norm) + 1e-6 > max_norm)
    near(ours, theirs, dtype)
    if dtype == torch.float64:
        same_state(optimizer, reference)


def by_largest(params):
    # PyTorch knows no largest element of none.
    torch.nn.utils.clip_grad_norm_([p for p in params if p.numel()], 1.0, math.inf)


@pytest.mark.parametrize(
    ("clip", "by_hand"),
    [
        ({"max_norm": 1.0, "norm_type": 1}, lambda ps: torch.nn.utils.clip_grad_norm_(ps, 1.0, 1)),
        ({"max_norm": 1.0, "norm_type": "inf"}, by_largest),
        ({"max_norm": 1.0, "scope": "tensor"}, lambda ps: [torch.nn.utils.clip_grad_norm_([p], 1.0) for p in ps]),
        ({"clip_value": 0.5}, lambda ps: torch.nn.utils.clip_grad_value_(ps, 0.5)),
        ({"clip_range": (-0.5, 0.25)}, lambda ps: [p.grad.clamp_(-0.5, 0.25) for p in ps if p.grad is not None]),
        ({"max_rms": 0.1}, lambda ps: gradclip.clip([p.grad for p in ps], max_rms=0.1)),
        ({"max_average_norm": 0.1}, lambda ps: gradclip.clip([p.grad for p in ps], max_average_norm=0.1)),
    ],
)
@pytest.mark.parametrize("missing", [False, True])
def test_every_clip(clip, by_hand, missing):
    ours, theirs = parameters(), parameters()
    optimizer, reference = gradclip.AdamW(ours, **clip), torch.optim.AdamW(theirs)
    for step in range(5):
        grads = gradients(step, ours)
        if missing and step % 2:
            grads[0] = None
        set_grads(ours, grads)
        set_grads(theirs, grads)
        by_hand(theirs)
        optimizer.step()
        reference.step()
    near(ours, theirs)


@pytest.mark.parametrize("ages", [False, True])
@pytest.mark.parametrize("policy", [None, "error", "propagate", "skip", "zero", "drop"])
@pytest.mark.parametrize("clip", [{}, {"max_norm": 1.0}, {"clip_value": 1.0}])
def test_non_finite_gradients(policy, clip, ages):
    ours, theirs = parameters(), parameters()
    optimizer = gradclip.Adam(ours, **clip)
    reference = torch.optim.Adam(theirs)
    grads = gradients(0, ours)
    if ages:
        # One parameter is a step ahead.
        set_grads(ours, [grads[0], None, None, None])
        set_grads(theirs, [grads[0], None, None, None])
        gradclip.clip([p.grad for p in theirs], **clip) if clip else None
        optimizer.step()
        reference.step()
    optimizer.clip["non_finite"] = policy
    grads[1][3], grads[0][0, 0] = math.nan, math.inf
    set_grads(ours, grads)
    set_grads(theirs, grads)
    before, counts = [p.clone() for p in ours], [float(s["step"]) for s in optimizer.state.values()]
    default = "error" if "max_norm" in clip else "propagate"
    if (policy or default) == "error":
        with pytest.raises(gradclip.NonFiniteError, match="2 non-finite elements, the first at index 0 of tensor 0") as e:
            optimizer.step()
        assert e.value.non_finite[:2] == (2, 0)
    else:
        optimizer.step()
        assert optimizer.report.non_finite[:3] == (2, 0, None)
    if (policy or default) in ("error", "skip"):
        assert all(torch.equal(a, b) for a, b in zip(ours, before))
        assert [float(s["step"]) for s in optimizer.state.values()] == counts
        assert policy != "skip" or optimizer.report.skipped == "non-finite"
        return
    settings = dict(clip) or ({"clip_value": math.inf} if policy in (None, "propagate") else {"max_norm": math.inf})
    gradclip.clip([p.grad for p in theirs], **settings, non_finite=policy or default)
    reference.step()
    for a, b in zip(ours, theirs):
        # Infinite gradients end at the largest number in our averages, at NaN in PyTorch's.
        finite = b.isfinite() & a.isfinite()
        assert torch.allclose(a[finite], b[finite], rtol=1e-12, atol=0)
        if policy in ("zero", "drop"):
            assert bool(finite.all())
        elif not clip:
            assert int((~finite).sum()) == sum(int((~g.isfinite()).sum()) for g in [p.grad for p in ours] if g.shape == b.shape)


def test_skip_above():
    params = parameters()
    optimizer = gradclip.SGD(params, lr=0.1, momentum=0.9, skip_above=10.0)
    for size, skipped in ((0.1, None), (100.0, "above"), (0.1, None)):
        before = [p.clone() for p in params]
        set_grads(params, [torch.full_like(p, size) for p in params])
        optimizer.step()
        assert optimizer.report.skipped == skipped
        assert torch.equal(before[0], params[0]) == (skipped is not None)
    assert "skip_above 10" in optimizer.report.description


def test_a_first_step_that_is_skipped_leaves_no_state():
    params = parameters()
    optimizer = gradclip.SGD(params, lr=0.1, momentum=0.9, dampening=0.5, non_finite="skip")
    set_grads(params, [torch.full_like(p, math.nan) for p in params])
    optimizer.step()
    assert optimizer.report.skipped == "non-finite" and not optimizer.state_dict()["state"]
    theirs = parameters()
    reference = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, dampening=0.5)
    for step in range(3):
        set_grads(params, gradients(step, params))
        set_grads(theirs, gradients(step, params))
        optimizer.step()
        reference.step()
    near(params, theirs)


def test_groups_schedulers_and_closures():
    def run(make, **clip):
        params = parameters()
        groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0, "lr": 0.1}]
        optimizer = make(groups, lr=0.02, weight_decay=0.1, **clip)
        schedulers = [
            torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 0.2], total_steps=40),
        ]
        losses = []
        for step in range(20):

            def closure():
                optimizer.zero_grad()
                loss = sum(((p - 1.0) ** 2).sum() for p in params) * (10.0 if step == 7 else 0.1)
                assert torch.is_grad_enabled()
                loss.backward()
                if not clip:
                    torch.nn.utils.clip_grad_norm_(params, 0.7)
                return loss

            losses.append(float(optimizer.step(closure).detach()))
            for scheduler in schedulers:
                scheduler.step()
            if step == 9:
                params.append(torch.nn.Parameter(torch.ones(3, dtype=torch.float64)))
                optimizer.add_param_group({"params": params[-1:], "lr": 0.5})
                schedulers.clear()
        return params, losses

    ours, losses = run(gradclip.AdamW, max_norm=0.7)
    theirs, reference = run(torch.optim.AdamW)
    near(ours, theirs)
    assert losses == pytest.approx(reference, rel=1e-12)


def step_both(a, b, params_a, params_b, steps):
    for step in steps:
        grads = gradients(step, params_a)
        set_grads(params_a, grads)
        set_grads(params_b, grads)
        a.step()
        b.step()


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_checkpoints_go_both_ways(name, settings):
    settings = {"lr": 0.01, **settings}
    ours, theirs = parameters(), parameters()
    a, b = getattr(gradclip, name)(ours, **settings), make(name, theirs, **settings)
    step_both(a, b, ours, theirs, range(5))
    # Each goes on with what the other has saved, through a file.
    saved = []
    for optimizer in (a, b):
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        saved.append(torch.load(file))
    a = getattr(gradclip, name)(ours, lr=0.5)
    b = make(name, theirs, lr=0.5)
    a.load_state_dict(saved[1])
    b.load_state_dict(saved[0])
    step_both(a, b, ours, theirs, range(5, 10))
    near(ours, theirs)
    same_state(a, b)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RMSprop", "Adam", "AdamW"])
def test_copies_go_on_alike(through, name):
    params = parameters(torch.float32)
    optimizer = getattr(gradclip, name)(params, lr=0.01, max_norm=1.0, non_finite="skip")
    set_grads(params, gradients(0, params))
    optimizer.step()
    again = through(optimizer)
    assert again.clip == optimizer.clip and again.report == optimizer.report
    copies = again.param_groups[0]["params"]
    step_both(optimizer, again, params, copies, range(1, 5))
    assert all(torch.equal(a, b) and a is not b for a, b in zip(params, copies))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["Adagrad", "Adam", "RMSprop"])
def test_halves_keep_float32_states(dtype, name):
    settings = {"lr": 0.05, **({"initial_accumulator_value": 0.1} if name == "Adagrad" else {})}
    params, exact = parameters(dtype), parameters(dtype)
    exact = [torch.nn.Parameter(p.detach().double()) for p in exact]
    optimizer, reference = getattr(gradclip, name)(params, **settings), make(name, exact, **settings)
    for step in range(STEPS):
        grads = gradients(step, params)
        set_grads(params, grads)
        set_grads(exact, [grad.double() for grad in grads])
        optimizer.step()
        reference.step()
    state = optimizer.state[params[0]]
    for key, value in state.items():
        assert value.dtype == torch.float32, key
        if key != "step":
            near([value], [reference.state[exact[0]][key]], torch.float32)
    # Each step rounds a parameter once.
    unit = torch.finfo(dtype).eps
    for a, b in zip(params, exact):
        if a.numel():
            a, b = a.detach().double(), b.detach()
            assert float((a - b).abs().max()) <= STEPS * unit * max(1.0, float(b.abs().max()))
    # Its own state is read back exactly; PyTorch's load rounds it.
    again = getattr(gradclip, name)(params, **settings)
    again.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(value, again.state[params[0]][key]) for key, value in state.items())
    make(name, params, **settings).load_state_dict(optimizer.state_dict())
    again.load_state_dict(make_stepped(name, params, settings).state_dict())
    again.step()


def make_stepped(name, params, settings):
    copies = [torch.nn.Parameter(p.detach().float().to(torch.bfloat16)) for p in params]
    optimizer = make(name, copies, **settings)
    set_grads(copies, [torch.ones_like(p) for p in copies])
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("of_grads", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_of_another_dtype(of_grads):
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer, reference = gradclip.AdamW(ours, max_norm=1.0), gradclip.AdamW(theirs, max_norm=1.0)
    for step in range(5):
        grads = [grad.to(of_grads) for grad in gradients(step, ours)]
        optimizer.step(grads=grads)
        reference.step(grads=[grad.double() for grad in grads])
    near(ours, theirs, torch.float32)
    optimizer.step(grads=[None] * len(ours))
    assert optimizer.report.elements == 0
    with pytest.raises(ValueError, match="grads has 1 entries, and there are 4 parameters"):
        optimizer.step(grads=grads[:1])
    with pytest.raises(ValueError, match=r"gradient 0 has shape \(2,\), its parameter \(7, 5\)"):
        optimizer.step(grads=[torch.ones(2), None, None, None])
    with pytest.raises(TypeError, match="gradient 1 is a list"):
        optimizer.step(grads=[None, [1.0], None, None])


def test_any_dense_layout():
    def of(layouts):
        weight, image = torch.arange(12.0).reshape(3, 4), torch.arange(2.0 * 3 * 4 * 4).reshape(2, 3, 4, 4)
        if layouts:
            weight, image = weight.t().contiguous().t(), image.to(memory_format=torch.channels_last)
        return [torch.nn.Parameter(weight), torch.nn.Parameter(image)]

    def run(layouts):
        params = of(layouts)
        optimizer = gradclip.Adam(params, lr=0.1, max_norm=1.0)
        for step in range(4):
            grads = gradients(step, params)
            if layouts and step % 2:
                grads = [grad.to(memory_format=torch.channels_last) if grad.dim() == 4 else grad for grad in grads]
            set_grads(params, grads)
            if layouts and step == 2:
                # A checkpoint of other layouts.
                optimizer.load_state_dict(saved)
            optimizer.step()
            if step == 1:
                saved = copy.deepcopy(optimizer.state_dict())
                for state in saved["state"].values():
                    for key in ("exp_avg", "exp_avg_sq"):
                        state[key] = state[key].contiguous()
        for p in params:
            assert optimizer.state[p]["exp_avg"].stride() == p.stride()
        return params

    for a, b in zip(run(True), run(False)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_large_parameters_of_different_ages():
    """More elements than one thread takes at once."""
    shapes = [(300_001,), (5,), (131_072,)]
    ours, theirs = parameters(torch.float32, shapes), parameters(torch.float32, shapes)
    optimizer, reference = gradclip.Adam(ours, amsgrad=True, max_norm=1.0), torch.optim.Adam(theirs, amsgrad=True)
    for step in range(4):
        grads = gradients(step, ours)
        grads[1] = grads[1] if step else None
        grads[2] = grads[2] if step > 1 else None
        set_grads(ours, grads)
        set_grads(theirs, grads)
        gradclip.clip([p.grad for p in theirs], max_norm=1.0)
        optimizer.step()
        reference.step()
    near(ours, theirs, torch.float32)
    assert [float(optimizer.state[p]["step"]) for p in ours] == [4.0, 3.0, 2.0]


def test_other_threads_run_meanwhile():
    param = torch.nn.Parameter(torch.zeros(1 << 22))
    optimizer = gradclip.AdamW([param], max_norm=1.0)
    grads = [torch.ones_like(param)]
    counted, done = [0], threading.Event()

    def count():
        while not done.is_set():
            counted[0] += 1
            time.sleep(0.0001)

    def during_a_step():
        before = counted[0]
        optimizer.step(grads=grads)
        return counted[0] - before

    thread = threading.Thread(target=count)
    thread.start()
    try:
        # Under the GIL it would run before and after the call alone. On a busy machine it may have to wait.
        assert any(during_a_step() > 4 for _ in range(100))
    finally:
        done.set()
        thread.join()


def test_a_graph_that_saved_a_parameter_raises():
    param = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    loss = (param * param).sum()
    gradclip.SGD([param], lr=0.1, max_norm=1.0).step(grads=[torch.ones(2)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Elsewhere:
    type = "cuda"

    def __str__(self):
        return "cuda:0"


class OnGpu(torch.nn.Parameter):
    device = Elsewhere()


def test_errors():
    params = parameters()
    for name, settings, match in (
        ("SGD", {"lr": -1.0}, "lr is -1"),
        ("SGD", {"lr": math.nan}, "lr is NaN"),
        ("SGD", {"momentum": -1.0}, "momentum is -1"),
        ("SGD", {"nesterov": True}, "nesterov"),
        ("SGD", {"dampening": math.inf}, "dampening"),
        ("Adagrad", {"lr_decay": -1.0}, "lr_decay"),
        ("Adagrad", {"initial_accumulator_value": -1.0}, "initial_accumulator_value"),
        ("RMSprop", {"alpha": 1.0}, "alpha"),
        ("RMSprop", {"eps": -1.0}, "eps"),
        ("Adam", {"betas": (1.0, 0.9)}, "beta1"),
        ("AdamW", {"betas": (0.9, -0.1)}, "beta2"),
        ("AdamW", {"weight_decay": -0.1}, "weight_decay"),
        ("AdamW", {"max_norm": -1.0}, "max_norm"),
        ("AdamW", {"max_norm": 1.0, "clip_value": 1.0}, "max_norm and clip_value exclude each other"),
        ("AdamW", {"max_norm": 1.0, "non_finite": "ignore"}, "non_finite"),
        ("AdamW", {"max_norm": 1.0, "scope": "unit"}, "scope"),
        ("AdamW", {"clip_value": 1.0, "norm_type": 1}, "norm_type"),
    ):
        with pytest.raises(ValueError, match=match):
            getattr(gradclip, name)(params, **settings)
    with pytest.raises(TypeError, match="no argument 'agc'"):
        gradclip.Adam(params, agc=0.1)
    with pytest.raises(ValueError, match="empty parameter list"):
        gradclip.Adam([])
    optimizer = gradclip.Adam(params)
    with pytest.raises(ValueError, match="eps"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "eps": -1.0})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["lr"] = -0.5
    with pytest.raises(ValueError, match="lr is -0.5"):
        optimizer.step()
    with pytest.raises(gradclip.DeviceError, match="parameter 0 of the group is on cuda:0.*move it there"):
        gradclip.SGD([OnGpu(torch.ones(2))])
    with pytest.raises(gradclip.DeviceError, match="cuda:0"):
        optimizer.add_param_group({"params": [OnGpu(torch.ones(2))]})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(TypeError, match="complex64"):
        p = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
        p.grad = torch.ones_like(p)
        gradclip.SGD([p]).step()
    with pytest.raises(TypeError, match="sparse"):
        gradclip.SGD([torch.nn.Parameter(torch.ones(2))]).step(grads=[torch.ones(2).to_sparse()])
    with pytest.raises(ValueError, match="gaps"):
        gradclip.SGD([torch.ones(4)[::2].requires_grad_()]).step(grads=[torch.ones(2)])
    assert all(torch.equal(a, b) for a, b in zip(params, parameters())) and not optimizer.state
    whole = torch.ones(4)
    with pytest.raises(ValueError, match="shares elements"):
        gradclip.SGD([whole[:3].requires_grad_(), whole[2:].requires_grad_()]).step(grads=[torch.ones(3), torch.ones(2)])
    with pytest.raises(ValueError, match="shares elements"):
        gradclip.SGD([whole[:2].requires_grad_()]).step(grads=[whole[1:3]])
    assert whole.tolist() == [1.0] * 4


def test_found_inf_skips_and_grad_scale_divides():
    ours, theirs = parameters(), parameters()
    optimizer, reference = gradclip.AdamW(ours, max_norm=1.0), gradclip.AdamW(theirs, max_norm=1.0)
    before = [p.clone() for p in ours]
    set_grads(ours, [torch.full_like(p, math.inf) for p in ours])
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, before)) and not optimizer.state
    assert optimizer.report.skipped == "non-finite"
    optimizer.found_inf = torch.tensor(0.0)
    for step in range(3):
        grads = gradients(step, ours)
        set_grads(ours, [grad * 1024.0 for grad in grads])
        set_grads(theirs, grads)
        optimizer.step()
        reference.step()
    del optimizer.grad_scale, optimizer.found_inf
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert optimizer.report.total_norm == reference.report.total_norm


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="no GradScaler for the CPU")
def test_a_gradient_scaler():
    def run(name, **clip):
        params = parameters(torch.float32)
        optimizer = getattr(gradclip if clip else torch.optim, name)(params, lr=0.01, **clip)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
        scales = []
        for step in range(10):
            optimizer.zero_grad()
            factor = math.inf if step == 3 else 1.0
            loss = sum((p**2).sum() for p in params) * factor
            scaler.scale(loss).backward()
            if not clip:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(params, 1.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return params, scales

    for name in ("SGD", "AdamW"):
        (ours, scales), (theirs, expected) = run(name, max_norm=1.0), run(name)
        assert scales == expected and min(scales) < 2.0**10
        near(ours, theirs, torch.float32)


def test_names():
    model = torch.nn.Linear(2, 2)
    try:
        optimizer = gradclip.SGD(model.named_parameters(), lr=0.1, max_norm=1.0)
    except TypeError:
        pytest.skip("PyTorch takes no names")
    model.weight.grad, model.bias.grad = torch.zeros(2, 2), torch.tensor([0.0, math.nan])
    with pytest.raises(gradclip.NonFiniteError, match='index 1 of tensor "bias"') as error:
        optimizer.step()
    assert error.value.non_finite[:3] == (1, 1, "bias")
    optimizer.clip["scope"] = "tensor"
    optimizer.step(grads=[torch.ones(2, 2), None])
    assert [segment.name for segment in optimizer.report.segments] == ["weight"]


def test_the_import_is_late():
    assert {"SGD", "Adagrad", "RMSprop", "Adam", "AdamW"} <= set(dir(gradclip))
    assert gradclip.AdamW is gradclip.AdamW and "max_norm" in gradclip.AdamW.__doc__
    with pytest.raises(AttributeError, match="Lion"):
        gradclip.Lion
