from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import VARIANTS, bound
from recorded_graph import Cuda, Graph, Operator, emulate
from synchronisation import WaitsError, waiting_forbidden
from test_attacks import coupled, images, small_net, wavy
from torch import Tensor, nn

from wcmi_fast import attack_graph, functional
from wcmi_fast.attacks import PGD
from wcmi_fast.backends import registry
from wcmi_fast.models import BaselineH, DotCritic, GlobalCritic, LocalCritic, dot_critic
from wcmi_fast.models.folding import folded
from wcmi_fast.training.objective import Critic, information_loss

LINF = PGD(eps=0.2, step_size=0.05, steps=4, cuda_graph=True)
SETTINGS = {
    "last": LINF,
    "best": replace(LINF, keep="best"),
    "restarts": replace(LINF, random_start=True, restarts=3),
    "l2": replace(LINF, norm="l2", random_start=True, eps=0.6, step_size=0.2),
    "l2_best": replace(
        LINF, norm="l2", keep="best", random_start=True, restarts=2, eps=0.6, step_size=0.2
    ),
    "one_step": replace(LINF, steps=1, keep="best"),
}
every_setting = pytest.mark.parametrize("attack", SETTINGS.values(), ids=SETTINGS.keys())
STEPS = ("wcmi_fast::linf_step_", "wcmi_fast::l2_step_")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return emulate(monkeypatch)


@pytest.fixture(autouse=True)
def nothing_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attack_graph, "_logged", set())


@pytest.fixture
def no_bit_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a frozen critic does not sum its weights' bits."""
    monkeypatch.setattr(dot_critic, "_bit_sum", lambda x: 0)


def plain(attack: PGD) -> PGD:
    return replace(attack, cuda_graph=False)


def counted(loss_fn: Callable[[Tensor], Tensor]) -> tuple[Callable[[Tensor], Tensor], list[int]]:
    calls: list[int] = []

    def counting(v: Tensor) -> Tensor:
        calls.append(1)
        return loss_fn(v)

    return counting, calls


# ---- nothing in the loop waits for the device ---------------------------------------------------


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool(x[0] > 0),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "is_nonzero": lambda x: x[0].is_nonzero(),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "bool index": lambda x: x[x > 0],
    "byte index": lambda x: torch.ops.aten.index(x, [(x > 0).byte()]),
    "bool index put": lambda x: x.index_put_((x > 0,), x[:1]),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "unique": lambda x: x.unique(),
    "new_tensor": lambda x: x.new_tensor(3.0),
    "list index": lambda x: x[[0, 1]],
    "other device": lambda x: x.to("meta"),
    "copy to other device": lambda x: torch.empty(3, device="meta").copy_(x),
    "pinned": lambda x: x.pin_memory(),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS.keys())
def test_the_checker_finds(wait: Callable[[Tensor], object]) -> None:
    x = torch.rand(3)
    with (
        pytest.raises(WaitsError, match="called a synchronizing CUDA operation"),
        waiting_forbidden(),
    ):
        wait(x)


def test_the_checker_finds_what_waits_in_a_backward_pass() -> None:
    class Waiting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, d: Tensor) -> Tensor:
            return d * d.sum().item()

    x = torch.rand(3, requires_grad=True)
    with waiting_forbidden():
        y = Waiting.apply(x).sum()
        with pytest.raises(WaitsError):
            torch.autograd.grad(y, x)


def run_steps(attack: PGD, loss_fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """One restart, as `PGD.attack` runs it, without what comes before and after."""
    x_adv = x.clone()
    with waiting_forbidden():
        best = attack._restart(loss_fn, x, x_adv, None, attack.steps)
    return x_adv if best is None else best.x


@every_setting
@pytest.mark.parametrize("loss_fn", [wavy, coupled])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_steps_do_not_wait(
    attack: PGD, loss_fn: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    x = images(6, 1, 5, 5, dtype=dtype)
    found = run_steps(attack, loss_fn, x)
    expected = plain(replace(attack, random_start=False, restarts=1)).attack(loss_fn, x)
    if attack.restarts == 1:
        assert torch.equal(found, expected)
    assert not torch.equal(found, x)


@every_setting
def test_the_steps_of_the_reference_do_not_wait(attack: PGD) -> None:
    # Tensors without data take the reference, and have nothing that could be read.
    x = images(6, 1, 5, 5).to("meta")
    found = run_steps(attack, lambda v: bound("dv_zero", v.flatten(1), v.flatten(1).sin()), x)
    assert found.shape == x.shape


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_loop_with_a_bound_does_not_wait(variant: str, device: str) -> None:
    x = images(6, 2, 4, 4).to(device)
    run_steps(LINF, lambda v: -bound(variant, v[:, 0].flatten(1), v[:, 1:].flatten(2)), x)


def test_dv_without_a_kernel_of_its_own_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.TABLE["cpu"], "dv_value", ())
    x = images(6, 2, 4, 4)

    def loss_fn(v: Tensor) -> Tensor:
        stats = functional.critic_stats(v[:, 0].flatten(1), v[:, 1:].flatten(2), which="dv")
        return -functional.dv(stats=stats, diagonal="zero")

    run_steps(LINF, loss_fn, x)


def information_losses() -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    torch.manual_seed(0)
    shape, dim, units = (1, 8, 8), 4, 16
    encoder, critic = folded(BaselineH(shape, dim=dim)), DotCritic(dim, shape, units=units)
    sides = Critic(folded(GlobalCritic(dim, units=units)), folded(LocalCritic(shape, units=units)))
    for bound_name in ("dv", "infonce", "jsd"):
        function = getattr(functional, bound_name)
        for grad in ("full", "encoder_only"):
            yield f"{bound_name} {grad}", information_loss(encoder, sides, function, grad)
        for triangular in (False, True):
            view = critic.frozen(triangular=triangular)
            yield (
                f"{bound_name} triangular={triangular}",
                lambda v, view=view, function=function: -function(*view(encoder(v), v)),
            )
    yield "training", lambda v: -functional.dv(*critic(encoder(v), v))


@pytest.mark.usefixtures("no_bit_sums")
@pytest.mark.parametrize("name", [name for name, _ in information_losses()])
def test_an_attack_on_information_does_not_wait(name: str) -> None:
    loss_fn = dict(information_losses())[name]
    x = images(5, 1, 8, 8)
    found = run_steps(LINF, loss_fn, x)
    assert torch.equal(found, plain(LINF).attack(loss_fn, x))
    assert not torch.equal(found, x)


# ---- every step runs the same operators ---------------------------------------------------------


def by_steps(graph: Graph) -> list[list[Operator]]:
    """The operators of each step, the update coming last."""
    steps: list[list[Operator]] = [[]]
    for operator in graph.operators:
        steps[-1].append(operator)
        if operator.func.name() in STEPS:
            steps.append([])
    return steps[:-1]


def static(step: list[Operator]) -> list[tuple[object, ...]]:
    return [
        (o.func, *((x.shape, x.stride(), x.dtype, x.device) for x in o.tensors())) for o in step
    ]


@pytest.mark.usefixtures("no_bit_sums")
@every_setting
@pytest.mark.parametrize("name", ["dv full", "dv encoder_only", "dv triangular=True"])
def test_static_shapes(cuda: Cuda, attack: PGD, name: str) -> None:
    attack.attack(dict(information_losses())[name], images(5, 1, 8, 8))
    (graph,) = cuda.graphs
    first, *others = by_steps(graph)
    assert len(others) == attack.steps - 1
    assert len(first) > 20
    assert all(static(step) == static(first) for step in others)


# ---- capture and replay -------------------------------------------------------------------------


@every_setting
@pytest.mark.parametrize("coupled_loss", [False, True])
def test_a_replay_equals_the_plain_loop(cuda: Cuda, attack: PGD, coupled_loss: bool) -> None:
    net = small_net().train()
    y = torch.arange(7) % 5

    def loss_fn(v: Tensor) -> Tensor:
        if coupled_loss:
            return coupled(net(v))
        return nn.functional.cross_entropy(net(v), y, reduction="none")

    counting, calls = counted(loss_fn)
    found, expected = [], []
    inputs = [images(7, 1, 6, 6, seed=seed) for seed in range(3)]
    for seed, x in enumerate(inputs):
        generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
        found.append(attack.attack(counting, x, modules=[net], generator=generators[0]))
        expected.append(plain(attack).attack(loss_fn, x, modules=[net], generator=generators[1]))
        if seed == 0:
            after_capture = len(calls)
        assert torch.equal(generators[0].get_state(), generators[1].get_state())
        assert net.training
    # Only now: results and images that the next replay overwrites would differ.
    for seed in range(3):
        assert torch.equal(found[seed], expected[seed])
        assert torch.equal(inputs[seed], images(7, 1, 6, 6, seed=seed))
    assert len(calls) == after_capture
    (graph,) = cuda.graphs
    assert graph.replays == 3 * attack.restarts
    assert not torch.equal(found[0], found[1])


def test_the_warm_up_is_on_a_side_stream(cuda: Cuda) -> None:
    LINF.attack(wavy, images(3, 4))
    assert cuda.events == [
        "side waits for main",
        "sync debug mode error",
        "sync debug mode 0",
        "main waits for side",
        "captures on side",
    ]
    assert cuda.stream.name == "main"


@pytest.mark.usefixtures("cuda")
def test_random_numbers_are_those_of_the_plain_loop() -> None:
    def noisy(v: Tensor) -> Tensor:
        return (v * torch.rand_like(v).sub(0.5)).flatten(1).sum(1)

    x, attack = images(4, 9), replace(LINF, keep="best")
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found = attack.attack(noisy, x)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(found, plain(attack).attack(noisy, x))


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(context: Callable[[], torch.no_grad]) -> None:
    net = small_net().eval()
    loss_fn = lambda v: net(v).sum(1)  # noqa: E731
    attack = replace(LINF, keep="best")
    expected = [plain(attack).attack(loss_fn, images(3, 1, 6, 6, seed=s)) for s in (0, 1)]
    with context():
        found = [attack.attack(loss_fn, images(3, 1, 6, 6, seed=s)) for s in (0, 1)]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
        assert not a.is_inference()
        assert not a.requires_grad


@pytest.mark.usefixtures("cuda")
def test_without_a_best_the_clean_images_are_kept() -> None:
    def loss_fn(v: Tensor) -> Tensor:
        return v.flatten(1).sum(1) * torch.nan

    for seed in (0, 1):
        x = images(3, 4, seed=seed)
        assert torch.equal(replace(LINF, keep="best").attack(loss_fn, x), x)


@pytest.mark.parametrize("attack", [LINF, replace(LINF, keep="best")])
def test_layouts(cuda: Cuda, attack: PGD) -> None:
    x = images(3, 2, 4, 4).double()
    sliced = images(3, 2, 4, 8).double()[..., ::2]
    for given in (x, x.contiguous(memory_format=torch.channels_last), sliced):
        found, expected = attack.attack(wavy, given), plain(attack).attack(wavy, given)
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()
        assert found.dtype == torch.float64
    assert len(cuda.graphs) == 3


def test_tensors_that_stay_in_place_may_change(cuda: Cuda) -> None:
    w = torch.randn(3, 5)

    def loss_fn(v: Tensor) -> Tensor:
        return (w * v).sum()

    x = images(3, 5)
    LINF.attack(loss_fn, x)
    w.neg_()
    assert torch.equal(LINF.attack(loss_fn, x), plain(LINF).attack(loss_fn, x))
    assert len(cuda.graphs) == 1


class TestCache:
    def test_what_differs_is_captured_anew(self, cuda: Cuda) -> None:
        x, net = images(4, 2, 3, 3), nn.Identity()
        other = lambda v: wavy(v)  # noqa: E731
        variations: list[Callable[[], Tensor]] = [
            lambda: LINF.attack(wavy, x),
            lambda: LINF.attack(other, x),
            lambda: LINF.attack(wavy, x[:3]),
            lambda: LINF.attack(wavy, x.double()),
            lambda: LINF.attack(wavy, x.contiguous(memory_format=torch.channels_last)),
            lambda: replace(LINF, eps=0.1).attack(wavy, x),
            lambda: LINF.attack(wavy, x, modules=[net]),
        ]
        for count, variation in enumerate(variations, 1):
            first = variation()
            assert len(cuda.graphs) == count
            assert torch.equal(variation(), first)
            assert len(cuda.graphs) == count
        for variation in variations:
            variation()
        assert len(cuda.graphs) == len(variations)

    def test_a_stream_has_its_own(self, cuda: Cuda) -> None:
        x = images(4, 5)
        LINF.attack(wavy, x)
        with cuda.on_stream(cuda.new_stream(None)):
            LINF.attack(wavy, x)
        assert len(cuda.graphs) == 2

    def test_the_last_used_are_kept(self, cuda: Cuda) -> None:
        x = images(4, 5)
        functions = [lambda v, k=k: wavy(v) * (k + 1) for k in range(attack_graph.KEPT)]
        for function in functions:
            LINF.attack(function, x)
        LINF.attack(functions[0], x)
        LINF.attack(wavy, x)
        assert len(attack_graph._cache) == attack_graph.KEPT
        made = len(cuda.graphs)
        LINF.attack(functions[0], x)
        assert len(cuda.graphs) == made
        LINF.attack(functions[1], x)
        assert len(cuda.graphs) == made + 1

    def test_goes_with_its_function(self, cuda: Cuda) -> None:
        held = nn.Linear(5, 1)
        loss_fn = lambda v: held(v).sum()  # noqa: E731
        LINF.attack(loss_fn, images(4, 5))
        graph, alive = weakref.ref(cuda.graphs.pop()), weakref.ref(loss_fn)
        del loss_fn
        gc.collect()
        assert alive() is None
        assert graph() is None
        assert not attack_graph._cache

    def test_functions_that_are_equal_but_not_the_same(self, cuda: Cuda) -> None:
        class Scaled:
            def __init__(self, sign: float) -> None:
                self.sign = sign

            def __eq__(self, other: object) -> bool:
                return True

            def __hash__(self) -> int:
                return 0

            def __call__(self, v: Tensor) -> Tensor:
                return self.sign * v.sum()

        up, down, x = Scaled(1.0), Scaled(-1.0), images(3, 4)
        assert (LINF.attack(up, x) >= x).all()
        assert (LINF.attack(down, x) <= x).all()
        assert len(cuda.graphs) == 2


# ---- where a capture is impossible --------------------------------------------------------------


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [r for r in caplog.records if r.name == "wcmi_fast"]
    assert all(r.levelno == logging.WARNING for r in found)
    return [r.getMessage() for r in found]


PREFIX = "PGD.attack: cuda_graph=True cannot be honoured, the plain loop runs: "


@every_setting
def test_on_a_cpu_the_plain_loop_runs(attack: PGD, caplog: pytest.LogCaptureFixture) -> None:
    x = images(4, 1, 5, 5)
    counting, calls = counted(wavy)
    for _ in range(3):
        assert torch.equal(attack.attack(counting, x), plain(attack).attack(wavy, x))
    assert warnings(caplog) == [PREFIX + "x is on cpu, not on a GPU"]
    assert len(calls) == 3 * attack.restarts * (
        attack.steps + (attack.keep == "best" or attack.restarts > 1)
    )


def test_each_function_has_its_sentence(caplog: pytest.LogCaptureFixture) -> None:
    x = images(4, 5)
    for _ in range(2):
        LINF.attack(wavy, x)
        LINF.attack(coupled, x)
    for _ in range(3):
        LINF.attack(lambda v: v.sum(), x)  # as a trainer does: a new closure of one function
    assert len(warnings(caplog)) == 3


def test_seeds_that_are_made_of_the_attack_stay() -> None:
    assert repr(LINF) == repr(plain(LINF))


def test_without_the_flag_nothing_is_said(cuda: Cuda, caplog: pytest.LogCaptureFixture) -> None:
    plain(LINF).attack(wavy, images(4, 5))
    assert not warnings(caplog)
    assert not cuda.graphs


@every_setting
def test_a_loss_that_waits(cuda: Cuda, attack: PGD, caplog: pytest.LogCaptureFixture) -> None:
    def loss_fn(v: Tensor) -> Tensor:
        return wavy(v) / (1 + v.detach().max().item())

    for seed in range(3):
        x = images(4, 1, 5, 5, seed=seed)
        assert torch.equal(attack.attack(loss_fn, x), plain(attack).attack(loss_fn, x))
    assert warnings(caplog) == [PREFIX + "loss_fn waits for the GPU, as .item() does"]
    assert not cuda.graphs
    assert cuda.events.count("sync debug mode error") == 1
    assert cuda.events[-1] == "sync debug mode 0"
    assert cuda.stream.name == "main"


def test_a_wait_that_only_the_capture_finds(
    cuda: Cuda, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The debug mode does not know of every operation.
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)

    def loss_fn(v: Tensor) -> Tensor:
        return wavy(v) / (1 + v.detach().max().item())

    x = images(4, 1, 5, 5)
    for _ in range(2):
        assert torch.equal(LINF.attack(loss_fn, x), plain(LINF).attack(loss_fn, x))
    (sentence,) = warnings(caplog)
    assert sentence.startswith(
        PREFIX + "the capture failed: called a synchronizing CUDA operation: aten._local_scalar"
    )
    assert len(cuda.graphs) == 1
    assert cuda.stream.name == "main"


def test_a_loss_without_weak_references(cuda: Cuda, caplog: pytest.LogCaptureFixture) -> None:
    class Slots:
        __slots__ = ()

        def __call__(self, v: Tensor) -> Tensor:
            return wavy(v)

    x = images(4, 5)
    assert torch.equal(LINF.attack(Slots(), x), plain(LINF).attack(wavy, x))
    assert warnings(caplog) == [PREFIX + "a Slots as loss_fn has no weak references"]
    assert not cuda.graphs


@pytest.mark.parametrize(
    ("loss_fn", "error", "sentence"),
    [
        (lambda v: v, ValueError, r"returned shape \(2, 3\), wanted \(\) or \(2,\)"),
        (lambda v: 1.0, TypeError, "loss_fn returned a float, wanted a tensor"),
        (lambda v: v.detach().sum(), ValueError, "does not depend on its argument"),
        (lambda v: (v @ v).sum(), RuntimeError, "mat1 and mat2 shapes cannot be multiplied"),
    ],
)
def test_errors_of_the_loss_are_raised(
    cuda: Cuda,
    caplog: pytest.LogCaptureFixture,
    loss_fn: Callable[[Tensor], Tensor],
    error: type[Exception],
    sentence: str,
) -> None:
    for attack in (plain(LINF), LINF, replace(LINF, keep="best")):
        with pytest.raises(error, match=sentence):
            attack.attack(loss_fn, images(2, 3))
    assert not warnings(caplog)
    assert not cuda.graphs
    assert not attack_graph._cache
    assert cuda.stream.name == "main"


@pytest.mark.parametrize("failing_call", range(1, 9))
@pytest.mark.usefixtures("cuda")
def test_an_error_at_any_call_is_raised(
    failing_call: int, caplog: pytest.LogCaptureFixture
) -> None:
    class LossFailedError(RuntimeError):
        pass

    calls = []

    def loss_fn(v: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) >= failing_call:
            raise LossFailedError
        return wavy(v)

    net = small_net().train()
    with pytest.raises(LossFailedError):
        replace(LINF, keep="best").attack(loss_fn, images(2, 3), modules=[net])
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    # Five calls warm up: 1 step and 2 steps, and the last losses of each.
    assert len(warnings(caplog)) == (failing_call > 5)


# ---- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnAGPU:
    @pytest.fixture(autouse=True)
    def restored(self) -> Iterator[None]:
        yield
        torch.cuda.set_sync_debug_mode("default")

    def losses(self) -> dict[str, Callable[[Tensor], Tensor]]:
        torch.manual_seed(0)
        shape = (1, 28, 28)
        encoder, critic = folded(BaselineH(shape)).cuda(), DotCritic(64, shape, units=64).cuda()
        view = critic.frozen()
        return {
            "dv": lambda v: -functional.dv(*view(encoder(v), v)),
            "infonce": lambda v: -functional.infonce(*view(encoder(v), v)),
            "per image": lambda v: encoder(v).square().sum(1),
        }

    @every_setting
    @pytest.mark.parametrize("name", ["dv", "infonce", "per image"])
    def test_a_replay_equals_the_plain_loop(
        self, attack: PGD, name: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        loss_fn, found = self.losses()[name], []
        inputs = [images(32, 1, 28, 28, seed=seed).cuda() for seed in range(3)]
        found = [attack.attack(loss_fn, x) for x in inputs]
        for x, x_adv in zip(inputs, found, strict=True):
            expected = plain(attack).attack(loss_fn, x)
            # Sums in another order can turn the sign of a gradient near 0.
            assert ((x_adv - expected).abs() > 1e-5).float().mean() < 0.01
            assert (x_adv - x).abs().max() > 0.01
        assert not warnings(caplog)

    @every_setting
    @pytest.mark.parametrize("name", ["dv", "infonce", "per image"])
    def test_nothing_waits(self, attack: PGD, name: str) -> None:
        loss_fn, x = self.losses()[name], images(32, 1, 28, 28).cuda()
        start = x.clone()
        attack._restart(loss_fn, x, start, None, 1)  # compiles and tunes
        captured = attack_graph.capture(
            lambda *given: attack._restart(loss_fn, *given),
            loss_fn,
            attack,
            x,
            start,
            steps=attack.steps,
        )
        assert captured is not None
        torch.cuda.set_sync_debug_mode("error")
        attack._restart(loss_fn, x, start, None, attack.steps)
        captured.run(x, [x, start])

    def test_a_loss_that_waits(self, caplog: pytest.LogCaptureFixture) -> None:
        def loss_fn(v: Tensor) -> Tensor:
            return wavy(v) / (1 + v.detach().max().item())

        x = images(4, 1, 5, 5).cuda()
        for _ in range(2):
            assert torch.equal(LINF.attack(loss_fn, x), plain(LINF).attack(loss_fn, x))
        assert warnings(caplog) == [PREFIX + "loss_fn waits for the GPU, as .item() does"]

    def test_a_capture_that_fails(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)

        def loss_fn(v: Tensor) -> Tensor:
            return wavy(v) / (1 + v.detach().max().item())

        x = images(4, 1, 5, 5).cuda()
        stream = torch.cuda.current_stream()
        assert torch.equal(LINF.attack(loss_fn, x), plain(LINF).attack(loss_fn, x))
        (sentence,) = warnings(caplog)
        assert sentence.startswith(PREFIX + "the capture failed: ")
        assert torch.cuda.current_stream() == stream
        # Graphs work afterwards.
        assert torch.equal(LINF.attack(wavy, x), plain(LINF).attack(wavy, x))
        assert len(warnings(caplog)) == 1

    def test_random_numbers_are_those_of_the_plain_loop(self) -> None:
        def noisy(v: Tensor) -> Tensor:
            return (v * torch.rand_like(v).sub(0.5)).flatten(1).sum(1)

        x = images(4, 9).cuda()
        for seed in (1, 2):
            torch.manual_seed(seed)
            assert torch.equal(LINF.attack(noisy, x), plain(LINF).attack(noisy, x))
