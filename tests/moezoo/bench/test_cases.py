"""Every case builds, and everyone in it computes the same; who does not gets no speed."""

import dataclasses
import sys

import pytest
import torch

from moezoo.bench import inputs
from moezoo.bench.case import PLAIN, Contender, Package, Peer, Setting, Target, plain_torch
from moezoo.bench.cases import CASES
from moezoo.bench.cases.tables import our_query_as_theirs, their_keys_as_ours
from moezoo.bench.runner import LIMIT, Options, Result, run_case, skipped
from moezoo.routing.product_key import ProductKeys
from moezoo_kernels import backends

QUICK = Options(quick=True, runs=1)
BY_NAME = {case.name: case for case in CASES}


def kinds(device: str) -> list:
    """One case of each kind: the others differ in sizes, which a quick run replaces."""
    found = {}
    for case in CASES:
        if case.device == device:
            found.setdefault((case.title, case.dtype, case.kind), case)
    return list(found.values())


def check(results: list[Result], case) -> None:
    assert [r.peer for r in results] == [*case.peers, *([LIMIT] if case.limit else [])]
    for result in results:
        assert result.outcome in ("measured", "missing"), (result.peer, result.note)
        if result.outcome == "missing":
            assert "install" in result.note or "no plain-torch backend" in result.note
        elif result.peer != LIMIT and case.peers[result.peer].same:
            assert result.error is not None
            assert result.theirs.forward.median > 0
            assert (result.theirs.step is not None) == case.step


@pytest.mark.parametrize("case", kinds("cpu"), ids=lambda case: case.name)
def test_everyone_agrees(case):
    check(run_case(case, QUICK), case)


def test_experts_without_a_gate_agree():
    case = dataclasses.replace(BY_NAME["scatter-k2"], device="cpu", dtype=torch.float32)
    results = run_case(dataclasses.replace(case, peers={PLAIN: case.peers[PLAIN]}), QUICK)
    assert [result.outcome for result in results] == ["measured"]


@pytest.mark.gpu
@pytest.mark.parametrize("case", kinds("cuda"), ids=lambda case: case.name)
def test_everyone_agrees_on_a_gpu(case):
    check(run_case(case, QUICK), case)


def test_names_and_sizes_fit():
    assert len(BY_NAME) == len(CASES)
    for case in CASES:
        assert set(case.quick) <= set(case.sizes)
        assert (case.size in case.sizes) == bool(case.series)
        for peer in case.peers.values():
            if peer.target is not None and not case.step:
                assert peer.target.step is None, case.name


def test_the_shapes_of_the_papers_are_there():
    sizes = [tuple(case.sizes.values()) for case in CASES if case.device == "cuda"]
    for shape in (
        (16384, 2048, 128, 8, 768),
        (40960, 768, 128, 8, 256),
        (24576, 1536, 32, 2, 1024),
        (32768, 4096, 64, 4, 1024),
        (61440, 4096, 64, 8, 1024),
        (16384, 4096, 128, 16, 512),
        (8192, 4096, 4, 1, 16384),
    ):
        assert shape in sizes


def with_peer(build, package=None, **changes):
    return dataclasses.replace(
        BY_NAME["experts-e8"], peers={"peer": Peer(build, package)}, **changes
    )


def wrong_output(parts) -> Contender:
    return dataclasses.replace(parts.ours, forward=lambda: 1.001 * parts.ours.forward())


def wrong_gradient(parts) -> Contender:
    def forward():
        unchanged = (parts.x - parts.x.detach()).sum()
        return parts.ours.forward() + 0.01 * unchanged

    return dataclasses.replace(parts.ours, forward=forward)


def wrong_shape(parts) -> Contender:
    return dataclasses.replace(parts.ours, forward=lambda: parts.ours.forward()[:1])


def gradient_left_out(parts) -> Contender:
    fewer = {name: t for name, t in parts.ours.operands.items() if name != "w_out"}
    return dataclasses.replace(parts.ours, operands=fewer)


def not_a_number(parts) -> Contender:
    return dataclasses.replace(parts.ours, forward=lambda: parts.ours.forward() * float("nan"))


@pytest.mark.parametrize(
    ("build", "note"),
    [
        (wrong_output, "differs by 1.0e-03 in"),
        (wrong_gradient, "in the gradient of x"),
        (wrong_shape, "differs by inf in the output's shape"),
        (gradient_left_out, "differs by inf in the gradient of w_out, which is missing"),
        (not_a_number, "differs by inf in the output"),
    ],
)
def test_a_wrong_peer_gets_no_speed(build, note):
    (result,) = run_case(with_peer(build), QUICK)
    assert result.outcome == "differs"
    assert note in result.note
    assert result.ours is None
    assert result.theirs is None


def test_a_peer_that_computes_something_else_is_measured_only_if_declared():
    case = with_peer(wrong_output)
    case = dataclasses.replace(case, peers={"peer": Peer(wrong_output, same=False)})
    (result,) = run_case(case, QUICK)
    assert result.outcome == "measured"
    assert result.error is None


def test_a_peer_that_raises_has_a_row_that_says_so():
    def build(parts):
        raise TypeError("two\nlines")

    (result,) = run_case(with_peer(build), QUICK)
    assert (result.outcome, result.note) == ("failed", "TypeError: two lines")


def test_a_missing_package_has_a_row_that_says_how_to_install_it():
    package = Package("no_such_package_here", "pip install it")
    (result,) = run_case(with_peer(wrong_output, package), QUICK)
    assert (result.outcome, result.note) == ("missing", "not installed; pip install it")


def test_a_broken_package_has_a_row_that_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken_package_here.py").write_text("raise OSError('no library')")
    monkeypatch.syspath_prepend(tmp_path)
    (result,) = run_case(with_peer(wrong_output, Package("broken_package_here")), QUICK)
    assert (result.outcome, result.note) == (
        "missing",
        "cannot be imported: OSError: no library",
    )
    assert "broken_package_here" not in sys.modules


def test_where_ours_fails_all_rows_say_so():
    def build(setting):
        raise MemoryError("too big")

    case = dataclasses.replace(BY_NAME["peer-core"], build=build)
    for result in run_case(case, QUICK):
        assert (result.outcome, result.note) == ("failed", "ours: MemoryError: too big")


def test_chosen_peers_and_skipped_cases():
    case = BY_NAME["peer-core"]
    options = dataclasses.replace(QUICK, peers=frozenset({"gather"}))
    assert [result.peer for result in run_case(case, options)] == ["gather", LIMIT]
    rows = skipped(case, options, "no time")
    assert [(row.peer, row.outcome, row.note) for row in rows] == [
        ("gather", "skipped", "no time"),
        (LIMIT, "skipped", "no time"),
    ]


def test_dtype_and_threads_are_the_ones_asked_for():
    case = BY_NAME["experts-e8"]
    seen = []

    def build(setting):
        seen.append((setting.dtype, torch.get_num_threads()))
        return case.build(setting)

    before = torch.get_num_threads()
    options = dataclasses.replace(QUICK, dtype=torch.bfloat16, threads=before + 1)
    run_case(dataclasses.replace(case, build=build, peers={}), options)
    run_case(dataclasses.replace(case, build=build, peers={}, threads=1), options)
    assert seen == [(torch.bfloat16, before + 1), (torch.bfloat16, 1)]
    assert torch.get_num_threads() == before


def test_plain_torch_forces_a_backend_for_the_call_only():
    seen = []
    contender = Contender(lambda: seen.append(backends.forced()) or torch.zeros(1), {})
    plain = plain_torch(contender, "no_such_op", "grouped_mlp")
    with plain.within():
        plain.forward()
    assert seen[0] in ("torch", "reference")
    assert backends.forced() is None


def test_inputs_that_choose_clearly():
    torch.manual_seed(0)
    keys = ProductKeys(8, 6, num_heads=2, top_k=3)
    queries = torch.randn(40, 2, 8)
    scores = torch.einsum("thpc,hpnc->thpn", queries.unflatten(-1, (2, -1)), keys.keys)
    best = (scores[:, :, 0, :, None] + scores[:, :, 1, None, :]).flatten(2).sort(-1).values
    expected = (best[..., -3] - best[..., -4]).amin(1) / scores.std()
    torch.testing.assert_close(inputs.product_key_margin(keys, queries), expected)
    rows = torch.tensor([[3.0, 1.0, 2.9], [1.0, 5.0, 5.0]])
    assert (inputs.top_k_margin(rows, 1) * rows.std()).tolist() == pytest.approx([0.1, 0.0])

    drawn = torch.arange(8.0).unsqueeze(1)
    clear = inputs.decided(lambda count: drawn, lambda x: x[:, 0] % 2, 6)
    assert clear[:, 0].tolist() == [1, 3, 5, 7, 1, 3]
    with pytest.raises(ValueError, match="0 of 2 tokens choose clearly"):
        inputs.decided(lambda count: drawn, lambda x: torch.zeros(8), 2)


def test_query_layouts_undo_each_other():
    weight, keys = torch.randn(2 * 3 * 4, 5), torch.randn(3, 2, 6, 4)
    theirs = our_query_as_theirs(weight, heads=3)
    assert not torch.equal(theirs, weight)
    back = their_keys_as_ours({"query": theirs, "keys": keys.transpose(1, 2)}, heads=3)
    assert torch.equal(back["query"], weight)
    assert torch.equal(back["keys"], keys)


def test_the_work_of_experts_by_hand():
    case = BY_NAME["experts-e8"]
    setting = Setting({"T": 5, "d": 8, "E": 2, "k": 1, "h": 4}, torch.device("cpu"), torch.float32)
    problem = case.build(setting)
    weights = 2 * 3 * 8 * 4 * 4  # experts, matrices, d, h, bytes
    tokens = 5 * 8 * 4
    assert problem.work.flops == 2 * 5 * 3 * 8 * 4
    assert (problem.work.read, problem.work.written) == (weights + tokens, tokens)
    assert problem.step_work.flops == 3 * problem.work.flops
    assert problem.step_work.written == weights + 2 * tokens
    assert case.peers["dense"].target == Target(forward=0.85)
