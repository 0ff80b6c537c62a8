"""The check behind a conversion finds a wrong expert, a wrong router, and a byte that changed."""

import dataclasses
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from moezoo import InputError
from moezoo.convert import Expert
from moezoo_models.checkpoints.mapped import StacksAsViews, map_tensors
from moezoo_models.conversion import writer
from moezoo_models.conversion.drift import load_any
from moezoo_models.conversion.targets import base
from moezoo_models.conversion.upcycle import upcycle

TARGETS = [
    ("llama", "mixtral"),
    ("llama", "granitemoe"),
    ("qwen2", "qwen2_moe"),
    ("qwen3", "qwen3_moe"),
    ("qwen3", "glm4_moe"),
    ("olmo2", "flex_olmo"),
    ("llama", "moezoo"),
]
LAYER, WRONG = 2, 5
"""Of three layers and eight experts."""


def tokens():
    return torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(1))


def convert(dense, out, to, dtype=torch.float32, source="llama", **options):
    return upcycle(dense(source, dtype), out, experts=8, top_k=2, to=to, **options)


@pytest.mark.parametrize(("source", "to"), TARGETS)
@pytest.mark.parametrize("projection", ["gate", "up", "down"])
def test_finds_a_wrong_expert(source, to, projection, dense, tmp_path, monkeypatch):
    """One projection of one expert in the last layer; all others are right."""
    cut, seen = Expert.cut, []

    def wrong(expert, name, weight):
        part = cut(expert, name, weight)
        if name == projection:
            seen.append(None)
            if len(seen) == LAYER * 8 + WRONG + 1:
                return part.flip(0)
        return part

    monkeypatch.setattr(Expert, "cut", wrong)
    with pytest.raises(RuntimeError, match="the mixture is off by"):
        convert(dense, tmp_path / "out", to, source=source)
    assert len(seen) == 3 * 8
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("source", "to"), TARGETS)
def test_finds_a_wrong_row_of_a_router(source, to, dtype, dense, tmp_path, monkeypatch):
    """Which the logits do not show: all experts are alike."""
    original = base.router_output

    def wrong(name, plan, mixture, flat=False):
        def changed():
            (router,) = original(name, plan, mixture, flat).pieces()
            router = router.clone()
            router[WRONG] = router[WRONG].flip(0)
            yield router

        return dataclasses.replace(
            original(name, plan, mixture, flat),
            pieces=changed if f".{LAYER}." in name else original(name, plan, mixture, flat).pieces,
        )

    for module in ("base", "stock", "glm4_moe", "ours"):
        place = f"moezoo_models.conversion.targets.{module}.router_output"
        monkeypatch.setattr(place, wrong)
    with pytest.raises(RuntimeError, match=rf"layers\.{LAYER}\..*: row {WRONG} differs"):
        convert(dense, tmp_path / "out", to, dtype, source)
    assert not (tmp_path / "out").exists()


def test_finds_a_byte_that_changed_on_the_way(dense, tmp_path, monkeypatch):
    again = writer._read_again

    def damaged(path, *rest):
        with path.open("r+b") as file:
            file.seek(-1000, os.SEEK_END)
            byte = file.read(1)
            file.seek(-1000, os.SEEK_END)
            file.write(bytes([byte[0] ^ 1]))
        return again(path, *rest)

    monkeypatch.setattr(writer, "_read_again", damaged)
    with pytest.raises(InputError, match=r"target: model\.safetensors does not hold what was"):
        convert(dense, tmp_path / "out", "mixtral")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("source", "to"), TARGETS)
def test_what_is_mapped_is_what_is_loaded(source, to, dtype, dense, tmp_path):
    """The check computes with the same weights as those that are loaded by copying them."""
    # In bf16 logits of different copies are alike now and then, and shards are chosen by chance.
    granularity = 2 if dtype == torch.float32 else 1
    convert(dense, tmp_path / "out", to, dtype, source, granularity=granularity)
    mapped, loaded = (load_any(tmp_path / "out", sound=sound) for sound in (True, False))
    assert mapped.state_dict().keys() == loaded.state_dict().keys()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(mapped.state_dict()[name], weight), name
    with torch.no_grad():
        found, expected = (m(tokens(), use_cache=False).logits.float() for m in (mapped, loaded))
    bound = 2e-6 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=bound * float(expected.abs().max()))


def test_experts_are_views_of_the_file(dense, tmp_path):
    """Else nothing would be gained, and these tests would compare copies."""
    convert(dense, tmp_path / "out", "mixtral")
    file = map_tensors([tmp_path / "out/model.safetensors"])
    one = next(iter(file.values()))
    assert len({each.untyped_storage().data_ptr() for each in file.values()}) == 1
    for layer in load_any(tmp_path / "out", sound=True).model.layers:
        experts = layer.mlp.experts
        for stack in (experts.gate_up_proj, experts.down_proj):
            assert not stack.is_contiguous()
            assert stack.untyped_storage().nbytes() == one.untyped_storage().nbytes()


def test_mapped_tensors_are_those_of_the_file(tmp_path):
    wanted = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "none": torch.zeros(0, 4),
        "scalar": torch.tensor(3),
    }
    save_file(wanted, tmp_path / "file.safetensors", {"format": "pt"})
    found = map_tensors([tmp_path / "file.safetensors"])
    assert found.keys() == wanted.keys()
    for name, tensor in load_file(tmp_path / "file.safetensors").items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == wanted[name].dtype


def test_maps_tensors_that_lie_at_no_multiple_of_their_size(tmp_path):
    """As the format allows: other writers do not fill the header up."""
    file, wanted = tmp_path / "file.safetensors", {"a": torch.randn(3, 5), "b": torch.randn(7)}
    save_file(wanted, file)
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = content[8:start].rstrip() + b" "
    header += b" " * (len(header) % 2 == 0)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[start:])
    for name, tensor in load_file(file).items():
        assert torch.equal(map_tensors([file])[name], tensor)
        assert torch.equal(tensor, wanted[name])


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_stacks_are_those_of_torch(dim):
    """Of neighbours, of tensors at unequal distances, in another order, or of other storages."""
    whole = torch.arange(4 * 6 * 5).view(4, 6, 5)
    lists = [
        [*whole],
        [whole[i] for i in (0, 1, 3)],
        [whole[i] for i in (2, 1, 0)],
        [whole[0], whole[0]],
        [whole[i, :, 1:3] for i in range(4)],
        [whole[0].clone(), whole[1].clone()],
        [whole[0], whole[1].float()],
        [whole[0]],
        [whole[:, :2], whole[:, 2:4], whole[:, 4:]],
        [whole[:2], whole[2:]],
        [whole[..., :2], whole[..., 2:4]],
    ]
    for tensors in lists:
        for function in (torch.stack, torch.cat):
            if dim >= tensors[0].ndim and function is torch.cat:
                continue
            expected = function(tensors, dim=dim)
            with StacksAsViews():
                found = function(tensors, dim=dim)
            assert torch.equal(found, expected)
            assert found.dtype == expected.dtype
    with StacksAsViews():
        stacked, joined = torch.stack([*whole]), torch.cat([whole[:, :3], whole[:, 3:]], 1)
    assert stacked.data_ptr() == joined.data_ptr() == whole.data_ptr()
