"""How data reach a GPU: what the host is asked for, by tensors that pose as pinned or on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from wcmi_fast import PGD, data
from wcmi_fast.data import Feed, fed
from wcmi_fast.training import steps
from wcmi_fast.training.config import EncoderConfig, HeadConfig
from wcmi_fast.training.encoder import train_encoder
from wcmi_fast.training.evaluation import accuracy
from wcmi_fast.training.run_folder import RunFolder
from wcmi_fast.training.seeds import starts_generator
from wcmi_fast.training.supervised import train_head

GPU = torch.device("cuda:0")
SHAPE = (1, 8, 8)


class Pinned(Tensor):
    pass


class OnGPU(Tensor):
    device = GPU
    is_cuda = True


class Transfers(TorchFunctionMode):
    """Logs what goes to the GPU, and refuses what would wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[torch.Size, torch.dtype, bool]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        if func is Tensor.pin_memory:
            return args[0].clone().as_subclass(Pinned)
        if func is Tensor.to and args[1] == GPU:
            return self.to_gpu(args[0], non_blocking=kwargs.get("non_blocking", False))
        if func is torch.full:
            assert kwargs.pop("device") == GPU
            return func(*args, **kwargs).as_subclass(OnGPU)
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor):
            assert isinstance(args[0], OnGPU) == isinstance(args[1], OnGPU), "an index would wait"
        return func(*args, **kwargs)

    def to_gpu(self, x: Tensor, *, non_blocking: bool) -> Tensor:
        if isinstance(x, OnGPU):
            return x
        self.sent.append((x.shape, x.dtype, isinstance(x, Pinned) and non_blocking))
        return torch.Tensor.as_subclass(x, OnGPU)


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Transfers]:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000 * 2, 10**6))
    with Transfers() as seen:
        yield seen


def pixels(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, 1, 5, 5), generator=generator).to(torch.uint8)


@pytest.mark.parametrize("n", [40, 41])  # 1,000 and 1,025 bytes where 1,000 may be taken
def test_images_lie_on_the_gpu_if_they_fit(transfers: Transfers, n: int) -> None:
    images = pixels(n)
    feed = Feed(images, GPU)
    assert len(transfers.sent) == (n == 40)
    transfers.sent.clear()
    found = feed[torch.tensor([3, 1, 3])]
    assert isinstance(found, OnGPU)
    assert found.tolist() == (images[[3, 1, 3]].float() / 255).tolist()
    # Of those that fit only the indices are sent, of the others the bytes.
    fitting = (torch.Size([3]), torch.int64, True)
    others = (torch.Size([3, 1, 5, 5]), torch.uint8, True)
    assert transfers.sent == [fitting if n == 40 else others]
    transfers.sent.clear()
    assert isinstance(feed[:2], OnGPU)
    assert [sent[2] for sent in transfers.sent] == ([] if n == 40 else [True])


def test_a_tensor_on_the_gpu_gets_pinned_indices(transfers: Transfers) -> None:
    feed = fed(pixels(41).as_subclass(OnGPU))
    assert not transfers.sent
    feed[torch.arange(4)]
    assert transfers.sent == [(torch.Size([4]), torch.int64, True)]
    assert fed(feed) is feed


def test_labels_keep_their_values(transfers: Transfers) -> None:
    labels = torch.arange(10)
    assert Feed(labels, GPU)[torch.tensor([7, 2])].tolist() == [7, 2]


def test_on_a_cpu_nothing_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Tensor, "pin_memory", never)
    monkeypatch.setattr(torch.cuda, "mem_get_info", never)
    images = pixels(7)
    feed = Feed(images, "cpu")
    assert feed[torch.tensor([2, 5])].equal(images[[2, 5]].float() / 255)
    assert torch.cat(list(feed.split(3))).equal(images.float() / 255)
    assert [len(part) for part in feed.split(3)] == [3, 3, 1]
    assert len(feed) == 7
    assert feed.shape == images.shape
    x = torch.rand(4, 2)
    assert Feed(x, "cpu")[:3].data_ptr() == x.data_ptr()


def test_every_byte_is_what_the_loader_makes_of_it() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert Feed(every, "cpu")[:].equal(torch.arange(256).float() / 255)


def test_bytes_train_as_floats_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts_on: list[torch.device] = []

    def watched(generator: torch.Generator, device: torch.device) -> torch.Generator:
        starts_on.append(device)
        return starts_generator(generator, device)

    monkeypatch.setattr(steps, "starts_generator", watched)
    attack = PGD(eps=0.1, step_size=0.05, steps=2, random_start=True)
    config = EncoderConfig(attack=attack, dim=4, units=8, epochs=1, batch_size=8)
    head_config = HeadConfig(attack=attack, epochs=1, batch_size=8)
    images = torch.randint(256, (20, *SHAPE)).to(torch.uint8)
    labels = torch.arange(20) % 2

    def train(name: str, x: Tensor | Feed, y: Tensor | Feed) -> list[Tensor]:
        run = RunFolder(tmp_path / name)
        encoder, critic = train_encoder(config, x, seed=0, stage="e", run=run)
        head = train_head(head_config, encoder, x, y, classes=2, seed=0, stage="h", run=run)
        share = accuracy(encoder, head, x, y, attack=attack)
        parts = (encoder, critic.global_, critic.local, head)
        return [torch.tensor(share), *(v for part in parts for v in part.state_dict().values())]

    as_bytes = train("bytes", Feed(images, "cpu"), Feed(labels, "cpu"))
    as_floats = train("floats", images.float() / 255, labels)
    assert all(torch.equal(a, b) for a, b in zip(as_bytes, as_floats, strict=True))
    # Two batches of the encoder's and two of the head's, twice; the first has an eps of 0.
    assert starts_on == 8 * [torch.device("cpu")]


def test_starts_have_a_generator_on_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, same = (torch.Generator().manual_seed(3) for _ in range(2))
    assert starts_generator(generator, torch.device("cpu")) is generator
    assert generator.get_state().equal(same.get_state())

    devices: list[torch.device] = []
    host = torch.Generator

    def on_gpu(device: torch.device) -> torch.Generator:
        devices.append(device)
        return host()

    monkeypatch.setattr(torch, "Generator", on_gpu)
    starts = [starts_generator(generator, GPU) for _ in range(2)]
    assert devices == [GPU, GPU]
    expected = int(torch.randint(2**63 - 1, (), generator=same))
    assert starts[0].initial_seed() == expected
    assert starts[1].initial_seed() != expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("share", [0.5, 0.0])
def test_on_a_gpu(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "RESIDENT_SHARE", share)
    images = pixels(256)
    feed = Feed(images, "cuda")
    index = torch.randperm(256)[:32]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, part = feed[index], feed[:3]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.is_cuda
    assert found.cpu().equal(images[index].float() / 255)
    assert part.cpu().equal(images[:3].float() / 255)
