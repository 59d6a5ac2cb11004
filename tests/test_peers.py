"""benchmarks/peers.py: the peers' values, and what the program makes of them."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import peer_attacks
import peer_bounds
import peers
import pytest
import torch
from peer_case import Case, PeerFailedError, Values, peer_runs

from wcmi_fast import reference

N, U = 7, 5
IMAGES = (3, 1, 8, 8)


def fake_case(check: Callable[[], Values] = lambda: Values("1 / 1", 1.0, 4.0)) -> Case:
    programs: dict[str, Callable[[], object]]
    programs = {name: lambda: None for name in ("ours", "theirs", "gradient")}
    return Case("peer", "program", "dv", "N=2", "same", check, programs)


def fake_sections(check: Callable[[], Values]) -> tuple[peers.Section, ...]:
    module = {"peer": ("math", lambda: [fake_case(check)])}
    return tuple(replace(section, peers=module) for section in peers.SECTIONS)


# ---- the peers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", peer_bounds.FORMS)
@pytest.mark.parametrize("name", peer_bounds.OURS)
def test_torch_mist_has_the_values_and_gradients_of_its_definition(name: str, form: str) -> None:
    pytest.importorskip("torch_mist")
    case = peer_bounds.case(name, form, N, U)
    values = case.check()
    assert values.ok, values
    ours, theirs = (float(value) for value in values.found.split(" / "))
    # Only jsd's value is another where own pairs are negatives too; smile's gradient is.
    assert (abs(ours - theirs) < 2e-6) == (case.definition == "same" or name == "smile")
    for program in case.programs.values():
        dz, dh = program()
        assert dz.shape == dh.shape == (N, U)


@pytest.mark.parametrize("name", peer_bounds.WITH_OWN_PAIRS)
def test_torch_mist_does_not_have_our_definition_where_the_table_says_so(name: str) -> None:
    pytest.importorskip("torch_mist")
    ours = peer_bounds.OUR_DEFINITIONS[name]
    assert not peer_bounds.check(name, "product", N, U, ours).ok


def test_torch_mist_computes_anew_at_every_timed_call(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_mist")
    program = peer_bounds.case("dv", "product", N, U).programs["theirs"]
    first, second, third = (program() for _ in range(3))
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[0], third[0])


@pytest.mark.parametrize("kind", ["convnet", "linear"])
@pytest.mark.parametrize("peer", peer_attacks.PROGRAMS)
def test_an_attack_has_the_peers_iterates(peer: str, kind: str) -> None:
    pytest.importorskip(peer)
    case = peer_attacks.case(peer, kind, IMAGES)
    assert case.check().ok
    for name in ("ours", "theirs"):
        x, _ = peer_attacks.images(IMAGES, torch.float32)
        moved = case.programs[name]() - x
        assert moved.abs().max() > peer_attacks.EPS * 0.99


@pytest.mark.parametrize("peer", peer_attacks.PROGRAMS)
def test_an_attack_of_another_step_size_is_a_mismatch(
    peer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(peer)
    exact = peer_attacks.PGD

    def longer(*, step_size: float, **others: float) -> object:
        return exact(step_size=step_size * (1 + 1e-6), **others)

    monkeypatch.setattr(peer_attacks, "PGD", longer)
    assert not peer_attacks.check(peer, "linear", IMAGES).ok


def test_foolbox_fills_the_weights_gradients() -> None:
    pytest.importorskip("foolbox")
    net = peer_attacks.model("linear", IMAGES, torch.float32).requires_grad_()
    peer_attacks.theirs("foolbox", net, *peer_attacks.images(IMAGES, torch.float32), steps=1)()
    assert all(p.grad is not None for p in net.parameters())


# ---- definitions and errors ---------------------------------------------------------------------


def test_jsd_with_own_pairs_is_the_sum_over_all_pairs() -> None:
    T = torch.randn(4, 4, 1, dtype=torch.float64)
    softplus = [math.log1p(math.exp(t)) for t in T.flatten().tolist()]
    positive = [math.log1p(math.exp(-t)) for t in T[:, :, 0].diagonal().tolist()]
    wanted = 2 * math.log(2) - sum(positive) / 4 - sum(softplus) / 16
    assert peer_bounds.jsd_with_own_pairs(T).item() == pytest.approx(wanted, rel=1e-14)
    assert abs(wanted - reference.jsd(T).item()) > 1e-3


@pytest.mark.parametrize("field", ["value", "dz", "dh"])
@pytest.mark.parametrize("wrong", [1e-3, math.nan])
def test_an_error_in_value_or_gradient_counts(field: str, wrong: float) -> None:
    z, h = peer_bounds.features(N, U, torch.float64)
    exact = peer_bounds.defined(peer_bounds.OUR_DEFINITIONS["nwj"], z, h)
    assert peer_bounds.roundings(exact, exact, z, h) == 0
    broken = exact._replace(**{field: getattr(exact, field) + wrong})
    assert not peer_bounds.roundings(broken, exact, z, h) <= peer_bounds.ROUNDINGS


@pytest.mark.parametrize("name", peer_bounds.OURS)
def test_another_bound_in_place_of_ours_is_a_mismatch(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exact(form: str) -> dict[str, peer_bounds.Theirs]:
        definition = peer_bounds.OUR_DEFINITIONS[name]
        value, carrier = (
            lambda z, h, f=formula: f(reference.scores(z, h[:, None])) for formula in definition
        )
        return {name: peer_bounds.Theirs("", value, carrier)}

    monkeypatch.setattr(peer_bounds, "estimators", exact)
    definition = peer_bounds.OUR_DEFINITIONS[name]
    assert peer_bounds.check(name, "product", N, U, definition).ok
    others = [other for other in peer_bounds.OURS if other != name]
    for other in others:
        monkeypatch.setitem(peer_bounds.OURS, name, peer_bounds.OURS[other])
        assert not peer_bounds.check(name, "product", N, U, definition).ok


# ---- the program --------------------------------------------------------------------------------


def test_a_row_has_the_times_beyond_the_gradients_and_the_ratio_of_medians() -> None:
    row = peers.Row("peer", seconds={"ours": [1.0, 2.0, 4.0], "theirs": [3.0, 4.0, 4.0]})
    assert row.beyond("theirs", "ours") == 2.0
    assert peers.times_as_fast(row) == "2.00 (1.00 to 3.00)"


def test_times_are_per_step() -> None:
    row = peers.Row("peer", replace(fake_case(), steps=10**9))
    peers.time_row(row, rounds=2)
    assert all(0 < t < 1e-9 for times in row.seconds.values() for t in times)
    assert [len(times) for times in row.seconds.values()] == [2, 2, 2]


@pytest.mark.parametrize(
    ("values", "status", "word"),
    [
        (Values("1 / 1", 4.0, 4.0), 0, "agree (4 of 4)"),
        (Values("1 / 2", 4.1, 4.0), 1, "MISMATCH (4.1 of 4)"),
        (Values("1 / nan", math.nan, 4.0), 1, "MISMATCH (nan of 4)"),
    ],
)
def test_the_exit_status_is_1_after_a_mismatch(
    values: Values,
    status: int,
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(peers, "SECTIONS", fake_sections(lambda: values))
    markdown, found = tmp_path / "peers.md", tmp_path / "peers.json"
    arguments = ["--rounds", "2", "--markdown", str(markdown), "--json", str(found)]
    assert peers.main(arguments) == status
    assert capsys.readouterr().out.count(word) == 2
    assert markdown.read_text().count(word) == 2
    rows = json.loads(found.read_text())["rows"]
    assert [row["mismatch"] for row in rows] == [bool(status)] * 2
    assert [len(row["seconds"]["ours"]) for row in rows] == [2, 2]


def test_a_peer_that_fails_is_a_row_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> Values:
        with peer_runs():
            raise RuntimeError("no such operator")

    monkeypatch.setattr(peers, "SECTIONS", fake_sections(fails))
    assert peers.main(["--rounds", "1"]) == 0
    assert capsys.readouterr().out.count("not run: RuntimeError: no such operator") == 2


def test_our_own_failure_is_not_the_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Values:
        raise RuntimeError("ours")

    monkeypatch.setattr(peers, "SECTIONS", fake_sections(fails))
    with pytest.raises(RuntimeError, match="ours"):
        peers.main(["--rounds", "1"])


def test_a_peer_that_is_not_there_is_a_row_with_the_reason() -> None:
    (row,) = peers.checked("peer", "no_such_peer", list)
    assert row.not_run == "ModuleNotFoundError: No module named 'no_such_peer'"
    for section in peers.SECTIONS:
        cells = section.cells(row)
        assert len(cells) == len(section.columns)
        assert "peer" in cells
        assert f"not run: {row.not_run}" in cells


def test_a_peer_whose_cases_cannot_be_made_is_a_row_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def another_release(name: str) -> object:
        return SimpleNamespace()

    monkeypatch.setattr(importlib, "import_module", another_release)
    (row,) = peers.checked("torch-mist", "torch_mist", peer_bounds.cases)
    assert row.not_run is not None
    assert row.not_run.startswith("AttributeError")
    for peer in peer_attacks.PROGRAMS:
        (row,) = peers.checked(peer, peer, lambda peer=peer: peer_attacks.cases(peer))
        assert row.not_run is not None


def test_peer_errors_keep_their_words() -> None:
    with pytest.raises(PeerFailedError, match=r"^KeyError: 'x'$"), peer_runs():
        raise KeyError("x")


def test_a_section_takes_the_place_of_the_last(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\nText.\n\n{peers.HEADING}\n\nold\n")
    peers.put_section(page, f"{peers.HEADING}\n\nnew\n")
    assert page.read_text() == f"# Page\n\nText.\n\n{peers.HEADING}\n\nnew\n"


def test_cells_do_not_break_the_markdown_table() -> None:
    row = peers.Row("peer", not_run="a | b\nc")
    for section in peers.SECTIONS:
        table = peers.markdown_table(section, [row]).splitlines()
        assert table[-1].replace("\\|", "").count("|") == len(section.columns) + 1
        assert "a \\| b c" in table[-1]


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--rounds", "x"]])
def test_bad_arguments_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        peers.main(arguments)
    assert f"argument {arguments[0]}" in capsys.readouterr().err
