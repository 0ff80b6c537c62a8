"""Tables in main memory: fetched ahead or not, they are read and trained as those on the device."""

import copy
import io
from functools import partial

import pytest
import torch

import moezoo
from moezoo import L3, STEM, Engram, InputError, MoLE, PerLayerEmbedding
from moezoo.experts import fetched_rows
from moezoo.experts.token_table import TokenTable

D, V = 16, 30
IDS = torch.tensor([[3, 7, 3, 11, 0], [7, 7, 29, 2, 3]])
MASK = torch.tensor([[True] * 5, [False, True, True, True, False]])
LAYERS = {
    "stem": partial(STEM, d_ff=24),
    "mole": partial(MoLE, num_experts=3),
    "folded mole": partial(MoLE, num_experts=3, folded=True),
    "engram": partial(Engram, num_heads=2, num_rows=40, convolution=True),
    "l3": partial(L3, max_rows=3, num_rows=70),
    "l3 with values": partial(L3, max_rows=3, num_rows=70, d_value=6),
    "per layer": partial(PerLayerEmbedding, d_row=5),
}


def make(name: str, offload: bool = True, dtype=torch.float32) -> moezoo.FeedForward:
    torch.manual_seed(0)
    layer = LAYERS[name](D, vocab_size=V, sparse=True, offload=offload)
    with torch.no_grad():
        for key, tensor in layer.named_parameters():
            if "table" not in key:
                tensor.normal_(std=0.5)
    return layer.to(dtype)


def hidden(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1)).to(dtype)


def fetches(monkeypatch) -> list[torch.Tensor]:
    """Keep the row numbers of every fetch that is begun."""
    begun: list[torch.Tensor] = []
    begin = fetched_rows._begin

    def watch(weight, indices):
        begun.append(indices)
        return begin(weight, indices)

    monkeypatch.setattr(fetched_rows, "_begin", watch)
    return begun


def train(layer: moezoo.FeedForward, ahead: bool, mask: torch.Tensor | None = MASK) -> list:
    """Take two steps, and return outputs, gradients, and parameters with their moments."""
    rows = [p for g in layer.parameter_groups() if g.sparse for p in g.parameters]
    rest = [p for p in layer.parameters() if not any(p is row for row in rows)]
    optimizers = [torch.optim.SparseAdam(rows, lr=0.1), torch.optim.AdamW(rest, lr=0.1)]
    kept = []
    for shift in (0, 1):
        ids, x = (IDS + shift) % V, hidden().requires_grad_()
        if ahead:
            layer.prefetch(x, token_ids=ids, mask=mask)
        output = layer(x, token_ids=ids, mask=mask)
        output.hidden.square().sum().backward()
        kept += [output.hidden.detach(), x.grad, *output.stats.values()]
        kept += [p.grad.to_dense() for p in layer.parameters()]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    moments = [t for p in rows for t in optimizers[0].state[p].values() if torch.is_tensor(t)]
    return [*kept, *(p.detach() for p in layer.parameters()), *moments]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "when read"])
def test_offloaded_is_resident_to_the_bit(name, ahead, monkeypatch):
    expected = train(make(name, offload=False), ahead=ahead)
    begun = fetches(monkeypatch)
    layer = make(name)
    found = train(layer, ahead)
    assert len(found) == len(expected)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert len(begun) == 2 * len(layer.token_tables())  # what was fetched ahead is not again


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_other_dtypes_and_without_tokens(dtype):
    for mask in (None, torch.zeros_like(MASK)):
        pair = []
        for offload in (True, False):
            layer = make("engram", offload, dtype)
            output = layer(hidden(dtype), token_ids=IDS, mask=mask)
            output.hidden.sum().backward()
            pair.append((output.hidden, layer.table.weight.grad.coalesce()))
        (found, rows), (expected, others) = pair
        assert torch.equal(found, expected)
        assert torch.equal(rows.indices(), others.indices())
        assert torch.equal(rows.values(), others.values())


def test_what_was_fetched_for_another_call_is_not_read(monkeypatch):
    layer, resident = make("engram").eval(), make("engram", offload=False).eval()
    begun = fetches(monkeypatch)
    ids = IDS.clone()

    def check(number: int, mask: torch.Tensor | None = None) -> None:
        with torch.no_grad():
            found = layer(hidden(), token_ids=ids, mask=mask).hidden
            expected = resident(hidden(), token_ids=ids, mask=mask).hidden
        assert torch.equal(found, expected)
        assert len(begun) == number

    layer.prefetch(hidden(), token_ids=IDS)  # equal ids, but others
    check(2)
    layer.prefetch(hidden(), token_ids=ids)
    check(4, MASK)
    layer.prefetch(hidden(), token_ids=ids)
    ids[0, 0] = 9
    check(6)
    layer.prefetch(hidden(), token_ids=ids)
    for each in (layer, resident):
        with torch.no_grad():
            each.table.weight.mul_(2.0)
    check(8)
    layer.prefetch(hidden(), token_ids=ids)
    check(9)
    with torch.inference_mode():
        layer.prefetch(hidden(), token_ids=ids)
        assert torch.equal(
            layer(hidden(), token_ids=ids).hidden, resident(hidden(), token_ids=ids).hidden
        )
    assert len(begun) == 10


def test_the_row_optimizer_tells_that_rows_have_changed(monkeypatch):
    from moezoo_kernels.adam_rows import adam_rows

    table = TokenTable(9, 4, sparse=True, offload=True)
    indices = torch.tensor([[3, -1], [8, 3]])
    table.prefetch(indices)
    moments = torch.zeros(9, 4), torch.zeros(9, 4)
    with torch.no_grad():
        adam_rows(
            table.weight, *moments, torch.tensor([3]), torch.ones(1, 4),
            betas=(0.9, 0.99), eps=1e-8, step_size=0.5,
        )  # fmt: skip
        assert torch.equal(table.rows(indices), table.reference_rows(indices))


def test_fetches_that_nothing_reads_do_not_pile_up():
    table = TokenTable(9, 4, sparse=True, offload=True)
    for _ in range(20):
        table.prefetch(torch.zeros(3, 1, dtype=torch.int64))
    assert len(table._fetches._begun) == 8


def test_the_module_moves_and_the_table_stays():
    layer = make("engram")
    moved = copy.deepcopy(layer).to("meta")  # to meta it goes: there is nothing to keep
    assert moved.table.weight.is_meta
    layer.double()
    assert layer.table.weight.dtype == torch.float64
    convert = fetched_rows.staying(lambda tensor: Elsewhere())
    kept = convert(torch.ones(3, 2, dtype=torch.float32))
    assert (kept.device.type, kept.dtype, kept.sum()) == ("cpu", torch.bfloat16, 6)
    room = convert(torch.ones(3, 2, device="meta"))
    assert (room.device.type, room.shape) == ("cpu", (3, 2))


class Elsewhere:
    """What a conversion makes of a tensor: on a device that this machine has not, in bf16."""

    dtype, device = torch.bfloat16, torch.device("cuda")


def test_a_layer_is_copied_and_saved_while_rows_are_fetched():
    layer, resident = make("stem"), make("stem", offload=False)
    assert layer.state_dict().keys() == resident.state_dict().keys()
    layer.prefetch(hidden(), token_ids=IDS)
    again = copy.deepcopy(layer)
    torch.save(layer.state_dict(), io.BytesIO())
    assert torch.equal(
        again(hidden(), token_ids=IDS).hidden, resident(hidden(), token_ids=IDS).hidden
    )
    resident.load_state_dict(layer.state_dict())


def test_folding_keeps_the_rows_in_main_memory():
    folded = make("mole").fold()
    assert folded.table.offload
    assert folded.config()["init_args"]["offload"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"offload": True}, "offload: a dense gradient would move the whole table; set sparse to"),
        ({"offload": 1, "sparse": True}, "offload: 1 is neither true nor false"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, message):
    for layer in (STEM, L3):
        with pytest.raises(InputError, match=message) as error:
            layer(D, vocab_size=V, **arguments)
        assert "\n" not in str(error.value)


# The stream, on a machine without one: what is called, and in which order.


class Recorder:
    """A stand-in for `torch.cuda`, whose tensors lie in main memory."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def Stream(self, device):
        return Stream("side", self.calls)

    def current_stream(self, device):
        return Stream("main", self.calls)

    def stream(self, stream):
        self.calls.append(f"on {stream.name}")
        return torch.no_grad()


class Stream:
    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def wait_stream(self, other):
        self.calls.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        self.calls.append(f"event on {self.name}")
        return self

    def synchronize(self):
        self.calls.append("thread waits for event")

    def wait_event(self, event):
        self.calls.append(f"{self.name} waits for event on {event.name}")


def test_copies_wait_for_each_other_and_for_nothing_else(monkeypatch):
    module = Recorder()
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(
        torch.Tensor,
        "record_stream",
        lambda self, stream: module.calls.append(f"kept for {stream.name}"),
    )
    copies = fetched_rows._OnStream(torch.device("cpu"))
    monkeypatch.setattr(copies, "room", lambda shape, dtype: torch.empty(shape, dtype=dtype))
    monkeypatch.setattr(fetched_rows, "_copies", lambda device: copies)
    layer, resident = make("stem"), make("stem", offload=False)
    layer.prefetch(hidden(), token_ids=IDS)
    layer.table._fetches._begun[0].found.result()
    ahead = [
        "side waits for main",
        "on side",
        "kept for side",
        "event on side",
        "thread waits for event",
        "on side",
        "event on side",
    ]
    assert module.calls == ahead
    found = layer(hidden(), token_ids=IDS).hidden
    assert module.calls[len(ahead) :] == [
        "main waits for event on side",
        "kept for main",
        "kept for main",
    ]
    assert torch.equal(found, resident(hidden(), token_ids=IDS).hidden)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
def test_on_a_gpu_only_rows_move_and_nothing_changes(name):
    layer, resident = make(name).cuda(), make(name, offload=False).cuda()
    assert all(table.weight.device.type == "cpu" for table in layer.token_tables())
    ids, mask = IDS.cuda(), MASK.cuda()
    pair = []
    for each in (layer, resident):
        x = hidden().cuda().requires_grad_()
        each.prefetch(x, token_ids=ids, mask=mask)
        output = each(x, token_ids=ids, mask=mask).hidden
        output.square().sum().backward()
        rows = [table.weight.grad.to_dense().cpu() for table in each.token_tables()]
        pair.append([output.detach(), x.grad, *rows])
    assert all(table.weight.grad.device.type == "cpu" for table in layer.token_tables())
    for found, expected in zip(*pair, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found = train_on(layer, ids, mask)
    assert torch.equal(found, train_on(copy.deepcopy(layer), ids, mask, ahead=False))


def train_on(layer, ids, mask, ahead: bool = True) -> torch.Tensor:
    """Return outputs of one more call."""
    with torch.no_grad():
        x = hidden().cuda()
        if ahead:
            layer.prefetch(x, token_ids=ids, mask=mask)
        return layer(x, token_ids=ids, mask=mask).hidden
