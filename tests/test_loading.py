"""Weights from files of every layout, and files that cannot be loaded."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import kuangliu
import pytest
import safetensors.torch
import torch
from kuangliu import NETWORKS, State, drawn
from networks import CIFAR, MNIST, images
from torch import Tensor, nn

from wcmi_fast import models
from wcmi_fast.models import Normalise, load, load_weights, read_state
from wcmi_fast.training.checkpoint import save_weights

MEAN, STD = torch.tensor([0.3, 0.4, 0.5]), torch.tensor([0.2, 0.25, 0.3])


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def normaliser(mean: Tensor = MEAN, std: Tensor = STD) -> State:
    return {"new_mean": mean[:, None, None], "new_std": std[:, None, None]}


def plain(state: State) -> Any:
    return state


def of_kuangliu(state: State) -> Any:
    return {"net": under("module.", state), "acc": 93.02, "epoch": 17}


def of_robustness(state: State) -> Any:
    model = {
        **under("module.normalizer.", normaliser()),
        **under("module.model.", state),
        **under("module.attacker.normalize.", normaliser()),
        **under("module.attacker.model.", state),
    }
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    return {"model": model, "optimizer": optimizer, "schedule": {"last_epoch": 3}, "epoch": 110}


def of_authors_supervised(state: State) -> Any:
    model = {
        **under("module.attacker.normalize.", normaliser()),
        **under("module.attacker.model.", state),
    }
    return {"model": model, "optimizer": {}, "schedule": None, "epoch": 200}


def of_authors_estimator(state: State) -> Any:
    critics = {"dim_local.nonlinear.0.weight": torch.ones(2), "dim_global.shortcut.bias": STD}
    model = {
        **under("attacker.normalize.", normaliser()),
        **under("attacker.model.encoder.enc.", state),
        **under("attacker.model.", critics),
    }
    return {"model": model, "optimizer": -1, "schedule": -1, "epoch": 1}


LAYOUTS = {
    of_kuangliu: None,
    of_robustness: (MEAN, STD),
    of_authors_supervised: (MEAN, STD),
    of_authors_estimator: (MEAN, STD),
}


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def normalised(x: Tensor, by: tuple[Tensor, Tensor] | None) -> Tensor:
    return x if by is None else (x - by[0][:, None, None]) / by[1][:, None, None]


def assert_same(model: nn.Module, x: Tensor, wanted: Tensor) -> None:
    with torch.no_grad():
        assert not model.training
        torch.testing.assert_close(
            model(x), wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item()
        )


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout(layout: Any, tmp_path: Path) -> None:
    shapes, network = NETWORKS["resnet18"]
    state, x = drawn(shapes(3, 10)), images(2, *CIFAR)
    model = load("resnet18", saved(layout(state), tmp_path / "a.pt"))
    assert_same(model, x, network(state, normalised(x, LAYOUTS[layout])))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("vgg16", of_kuangliu),
        ("resnet50", of_robustness),
        ("densenet121", of_authors_supervised),
        ("densenet121", of_kuangliu),
    ],
)
def test_other_networks(name: str, layout: Any, tmp_path: Path) -> None:
    shapes, network = NETWORKS[name]
    state, x = drawn(shapes(3, 7)), images(2, *CIFAR)
    model = load(name, saved(layout(state), tmp_path / "a.pt"), classes=7)
    assert_same(model, x, network(state, normalised(x, LAYOUTS[layout])))


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_grey_images(name: str, tmp_path: Path) -> None:
    shapes, network = NETWORKS[name]
    state, x = drawn(shapes(1, 10)), images(2, *MNIST)
    model = load(name, saved(of_kuangliu(state), tmp_path / "a.pt"), input_shape=MNIST)
    assert_same(model, x, network(state, x))


HEADS = {
    "baseline_h_mlp": (kuangliu.mlp_shapes(10), kuangliu.mlp),
    "baseline_h_linear": (kuangliu.linear_shapes(10), kuangliu.linear_head),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(("shape", "flat"), [(CIFAR, 4096), (MNIST, 2304)])
def test_baseline_h_with_its_head(
    name: str, shape: tuple[int, int, int], flat: int, tmp_path: Path
) -> None:
    encoder = drawn(kuangliu.baseline_shapes(shape[0], flat, 64))
    head = drawn(HEADS[name][0], seed=4)
    whole = {**under("base_enc.", encoder), **under("base_cla.", head)}
    by = {"attacker.normalize.new_mean": torch.zeros(shape[0], 1, 1)}
    by |= {"attacker.normalize.new_std": torch.ones(shape[0], 1, 1)}
    supervised = {**by, **under("attacker.model.", whole)}
    trained = {
        **by,
        **under("attacker.model.encoder.enc.", encoder),
        **under("attacker.model.classifier.", head),
        "attacker.model.dim_global.shortcut.bias": STD,
    }
    x = images(3, *shape)
    wanted = kuangliu.baseline(encoder, x)
    for state in (supervised, trained):
        file = saved({"model": under("module.", state)}, tmp_path / "a.pt")
        assert_same(load(name, file, input_shape=shape), x, HEADS[name][1](head, wanted))
        assert_same(load("baseline_h", file, input_shape=shape, classes=64), x, wanted)


def test_safetensors_of_any_layout(tmp_path: Path) -> None:
    state, x = drawn(kuangliu.resnet_shapes("resnet18", 3, 10)), images(2, *CIFAR)
    content = {k: v.clone() for k, v in of_robustness(state)["model"].items()}
    safetensors.torch.save_file(content, tmp_path / "a.safetensors")
    model = load("resnet18", tmp_path / "a.safetensors")
    assert_same(model, x, kuangliu.resnet("resnet18", state, normalised(x, (MEAN, STD))))


@pytest.mark.parametrize("name", ["resnet18", "baseline_h_mlp"])
def test_our_own_files_come_back(name: str, tmp_path: Path) -> None:
    model = load(name, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    save_weights(tmp_path / "a.safetensors", model)
    again = load(name, tmp_path / "a.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_a_file_without_normaliser_leaves_the_argument(tmp_path: Path) -> None:
    encoder = models.BaselineH(CIFAR, dim=5).eval()
    save_weights(tmp_path / "a.safetensors", encoder)
    model = load("baseline_h", tmp_path / "a.safetensors", classes=5, mean=MEAN, std=STD)
    x = images(2, *CIFAR)
    assert_same(model, x, encoder(normalised(x, (MEAN, STD))).detach())


def test_files_older_than_counts_of_batches(tmp_path: Path) -> None:
    shapes, network = NETWORKS["resnet18"]
    state = {k: v for k, v in drawn(shapes(3, 10)).items() if "num_batches" not in k}
    model, x = load("resnet18", saved(state, tmp_path / "a.pt")), images(2, *CIFAR)
    assert_same(model, x, network(state, x))


def test_half_precision_files_fill_float32_models(tmp_path: Path) -> None:
    state = models.BaselineH((1, 8, 8), dim=3).half().state_dict()
    model = load("baseline_h", saved(state, tmp_path / "a.pt"), input_shape=(1, 8, 8), classes=3)
    assert model.output.weight.dtype == torch.float32
    assert torch.equal(model.output.weight, state["output.weight"].float())


class TestUsersModels:
    def test_names_may_be_surrounded(self, tmp_path: Path) -> None:
        given, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), images(2, 3, 2, 2)
        content = of_robustness(given.state_dict())
        for key, value in normaliser(torch.zeros(3), torch.ones(3)).items():
            content["model"][f"module.normalizer.{key}"] = value
            content["model"][f"module.attacker.normalize.{key}"] = value
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
        load_weights(model, saved(content, tmp_path / "a.pt"))
        assert_same(model, x, given(x).detach())

    def test_a_layer_that_normalises_gets_the_files_values(self, tmp_path: Path) -> None:
        linear = nn.Linear(4, 3)
        model = nn.Sequential()
        model.add_module("normalise", Normalise("mine", (3, 2, 2)))
        model.add_module("linear", linear)
        state = under("linear.", nn.Linear(4, 3).state_dict())
        load_weights(model, saved(of_robustness(state), tmp_path / "a.pt"))
        assert torch.equal(linear.weight, state["linear.weight"])
        assert torch.equal(model.normalise.mean.flatten(), MEAN)
        assert torch.equal(model.normalise.std.flatten(), STD)

    def test_a_normaliser_is_not_lost(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        before = model[1].weight.clone()
        file = saved(of_robustness(nn.Sequential(*model).state_dict()), tmp_path / "a.pt")
        with pytest.raises(ValueError, match=r"load_weights: .*a\.pt normalises images with mean"):
            load_weights(model, file)
        assert torch.equal(model[1].weight, before)

    def test_names_of_a_head_are_not_left_out(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Linear(2, 2))
        state = {**model.state_dict(), "head.weight": torch.ones(2)}
        with pytest.raises(
            ValueError, match=r"does not fit Sequential: it has besides head\.weight"
        ):
            load_weights(model, saved(state, tmp_path / "a.pt"))


SHAPE = {"input_shape": (1, 8, 8)}


def small() -> State:
    return load("baseline_h", classes=5, **SHAPE).state_dict()


def test_every_tensor_that_does_not_fit_is_named(tmp_path: Path) -> None:
    state = small()
    state["surplus.bias"] = state.pop("output.bias")
    state["hidden.0.weight"] = state["hidden.0.weight"][:7]
    file = saved(state, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="does not fit") as raised:
        load("baseline_h", file, classes=5, **SHAPE)
    assert str(raised.value) == (
        f"load: {file} does not fit baseline_h: it lacks output.bias, and it has besides "
        "surplus.bias, and of another shape are hidden.0.weight is (7, 256), wanted (1024, 256)"
    )


def test_many_tensors_are_named_by_part(tmp_path: Path) -> None:
    file = saved(drawn(kuangliu.resnet_shapes("resnet18", 3, 10)), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="does not fit") as raised:
        load("resnet50", file)
    # Not counting batches: 5 tensors for each third convolution of blocks that both have, 15 for
    # each further block, 5 for a shortcut in layer1.
    for part, count in (("layer1", 30), ("layer2", 40), ("layer3", 70), ("layer4", 25)):
        assert f"{part}.* ({count} tensors)" in str(raised.value)


def test_another_number_of_classes(tmp_path: Path) -> None:
    file = saved(small(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="does not fit") as raised:
        load("baseline_h", file, classes=10, **SHAPE)
    assert str(raised.value).endswith(
        "of another shape are output.weight is (5, 1024), wanted (10, 1024); output.bias is (5,), "
        "wanted (10,); its last layer has 5 outputs: was classes meant to be that?"
    )


def test_a_network_for_other_images(tmp_path: Path) -> None:
    file = saved(small(), tmp_path / "a.pt")
    with pytest.raises(
        ValueError, match=r"convolutions\.0\.weight is \(64, 1, 4, 4\), wanted"
    ) as e:
        load("baseline_h", file, classes=5, input_shape=(3, 8, 8))
    assert "classes" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "close"), [("resnet-18", "resnet18"), ("DenseNet", "densenet121")]
)
def test_names_that_are_not_there(name: str, close: str) -> None:
    with pytest.raises(ValueError, match=rf"load: name is {name!r}, .*did you mean {close!r}\?"):
        load(name)


def test_names_unlike_any() -> None:
    with pytest.raises(ValueError, match=r"load: name is 'xyzzy', .*baseline_h_linear$"):
        load("xyzzy")


class Marker:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def bare(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def bare_protocol_2(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [torch.save, legacy, bare, bare_protocol_2])
def test_a_pickle_that_runs_code_is_not_opened(write: Any, tmp_path: Path) -> None:
    mark, file = tmp_path / "executed", tmp_path / "a.pt"
    write({"model": small(), "evil": Marker(mark)}, file)
    with pytest.raises(ValueError, match="so it was not opened; to convert it, run in a sandbox"):
        load("baseline_h", file, classes=5, **SHAPE)
    assert not mark.exists()
    with file.open("rb") as opened:  # it would have been executed
        (torch.load if write in (torch.save, legacy) else lambda f, **_: pickle.load(f))(
            opened, weights_only=False
        )
    assert mark.exists()


def test_what_a_pickle_needs_is_named(tmp_path: Path) -> None:
    file = saved({"model": small(), "args": nn.Linear}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"values \(GLOBAL torch\.nn\.modules\.linear\.Linear\)"):
        read_state(file)


def test_the_conversion_that_the_message_gives(tmp_path: Path) -> None:
    old = saved({"model": small(), "args": Marker(tmp_path / "x")}, tmp_path / "old.pt")
    with pytest.raises(ValueError, match="to convert it") as raised:
        read_state(old)
    program = str(raised.value).split("without network or your files): ")[1].split(", with dill")[0]
    exec(program, {"torch": torch, "OLD": str(old), "NEW": str(tmp_path / "new.pt")})
    assert read_state(tmp_path / "new.pt").keys() == small().keys()


@pytest.mark.parametrize("write", [torch.save, legacy, safetensors.torch.save_file])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files(write: Any, part: float, tmp_path: Path) -> None:
    file = tmp_path / "a"
    write(small(), file)
    content = file.read_bytes()
    file.write_bytes(content[: int(part * len(content))])
    wanted = "neither a safetensors file nor" if part == 0 else "truncated or damaged"
    with pytest.raises(ValueError, match=rf"load: .*{wanted}"):
        load("baseline_h", file, classes=5, **SHAPE)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ([1, 2], r"load: .*a\.pt holds list, wanted a state dict, or one under 'model'"),
        ({"epoch": 3, "lr": 0.1}, r"load: .*a\.pt holds \['epoch', 'lr'\], wanted a state dict"),
    ],
)
def test_files_of_something_else(content: Any, wanted: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=wanted):
        load("baseline_h", saved(content, tmp_path / "a.pt"))


def test_a_file_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"a\.pt is neither a safetensors file nor one that torch"):
        load("resnet18", tmp_path / "a.pt")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"load: checkpoint is .*there is no such file"):
        load("resnet18", tmp_path / "a.pt")
