"""Tests of the streaming reader and writer of tensors against the safetensors library.

They also check the messages about files that are not whole.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from raywarp.adapters.tensor_file import TensorFile, TensorFileError, TensorWriter

TENSORS = {
    "b": torch.arange(6.0).view(2, 3),
    "a": torch.randn(3, 1),
    "empty": torch.zeros(0, 4),
    "narrow": torch.randn(5).bfloat16(),
}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "x")
    assert file.shapes == {name: tuple(t.shape) for name, t in TENSORS.items()}
    for name, tensor in TENSORS.items():
        assert torch.equal(file.tensor(name), tensor)
        view = file.tensor(name)
        file.release(name)
        assert torch.equal(view, tensor)


def test_the_library_reads_what_it_writes(tmp_path: Path) -> None:
    shapes = {"first": (2, 3), "second": (4, 4), "third": (1,)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    with TensorWriter(tmp_path / "x", shapes, torch.float32) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor.t() if name == "second" else tensor)
    found = load_file(tmp_path / "x")
    assert torch.equal(found["first"], tensors["first"])
    assert torch.equal(found["second"], tensors["second"].t())
    assert TensorFile(tmp_path / "x").shapes == shapes


def test_smaller_tensors_than_announced(tmp_path: Path) -> None:
    with TensorWriter(tmp_path / "x", {"a": (1000, 1000), "b": (1000,)}, torch.bfloat16) as writer:
        writer.write("a", torch.ones(2, 3))
        writer.write("b", torch.zeros(1))
    assert {name: t.shape for name, t in load_file(tmp_path / "x").items()} == {
        "a": (2, 3),
        "b": (1,),
    }
    assert TensorFile(tmp_path / "x").tensor("a").sum() == 6


def test_what_was_announced_must_come_and_in_order(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="order that was announced: a, not b"),
        TensorWriter(tmp_path / "x", {"a": (1,), "b": (1,)}, torch.float32) as writer,
    ):
        writer.write("b", torch.zeros(1))
    with (
        pytest.raises(ValueError, match="1 tensors were announced and not written"),
        TensorWriter(tmp_path / "x", {"a": (1,)}, torch.float32),
    ):
        pass
    with (
        pytest.raises(OverflowError, match="a has numbers too large"),
        TensorWriter(tmp_path / "x", {"a": (1,)}, torch.float16) as writer,
    ):
        writer.write("a", torch.tensor([1e5]))


def test_an_unaligned_header_is_read(tmp_path: Path) -> None:
    """The format allows a header of any length; tensors then begin at odd addresses."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    header += b" " * (1 - len(header) % 2)
    (tmp_path / "x").write_bytes(
        len(header).to_bytes(8, "little") + header + torch.arange(3.0).numpy().tobytes()
    )
    assert (8 + len(header)) % 4 != 0
    assert TensorFile(tmp_path / "x").tensor("a").tolist() == [0, 1, 2]
    assert load_file(tmp_path / "x")["a"].tolist() == [0, 1, 2]


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x")
    whole = (tmp_path / "x").read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(
            TensorFileError,
            match="truncated: " if length >= start else "cut off in its header|corrupt",
        ):
            TensorFile(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(whole + b"more")
    with pytest.raises(TensorFileError, match="4 bytes after the last tensor"):
        TensorFile(tmp_path / "cut")


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": 3, "shape": [2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}',
    ],
)
def test_headers_that_are_refused(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(TensorFileError, match="corrupt"):
        TensorFile(tmp_path / "x")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(TensorFileError, match="cannot read .*nowhere"):
        TensorFile(tmp_path / "nowhere")
    (tmp_path / "void").touch()
    with pytest.raises(TensorFileError, match=r"cut off in its header \(0 bytes\)"):
        TensorFile(tmp_path / "void")
