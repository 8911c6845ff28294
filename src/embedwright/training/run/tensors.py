"""Named tensors as safetensors files: whole ones by one process, sharded ones by each process its part.

Sharded tensors go through `torch.distributed.checkpoint`, whose `HuggingFaceStorageWriter` writes safetensors and whose
reader takes the shapes from their headers, so nothing is unpickled from disk. Its state-dict functions are left out:
they know no parameter outside the model (a projection to a teacher), and torch's dict of DTensors needs none of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedwright.files import HashedFile
from embedwright.processes import Processes

FileDigest = dict[str, Any]  # SHA-256 and length of a file

_PART = 2**30  # bytes of one file of a process, which is twice in its memory while it is written
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64"}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileDigest:
    """Writes tensors as safetensors, one at a time on the CPU. Returns the digest of the file."""
    header: dict[str, Any] = {}
    end = 0
    names = sorted(tensors, key=lambda name: -tensors[name].itemsize)  # so that each begins where its type may
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        of_tensor = {"dtype": _NAMES[tensors[name].dtype], "shape": list(tensors[name].shape)}
        header[name] = of_tensor | {"data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with HashedFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return _digest(file)


def write_hashed_text(path: Path, text: str) -> FileDigest:
    """Writes UTF-8 text. Returns the digest of the file."""
    with HashedFile(path) as file:
        file.write(text.encode())
    return _digest(file)


def write_parts(folder: Path, tensors: dict[str, Tensor], processes: Processes) -> dict[str, FileDigest]:
    """Writes this process's part of sharded tensors into `folder`. Returns the digests of all processes' files.

    All processes must call it, and it raises in all of them if one cannot write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystem
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    found: dict[str, FileDigest] = {}

    class Hashing(FileSystem):
        @contextmanager
        def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
            with HashedFile(path) as file:
                yield file
            found[Path(path).name] = _digest(file)

    files, size = {}, 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        files[name] = 1 + size // (_PART * processes.count)
    writer = HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    writer.fs = Hashing()
    try:
        save(tensors, storage_writer=writer, process_group=processes.channel)
    except CheckpointException as error:  # which is no Exception, and the same in all processes
        rank, (reason, _) = next(iter(error.failures.items()))
        raise OSError(f"process {rank}: {reason}") from error
    return {name: digest for digests in processes.all_gather(found) for name, digest in digests.items()}


def tensor_sizes(folder: Path) -> dict[str, torch.Size]:
    """Returns the names of all tensors in a folder, with their whole sizes."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: of_tensor.size for name, of_tensor in stored.items()}  # type: ignore[union-attr]


def read_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fills tensors from the files of a folder, however they were divided there. It does not communicate.

    Of a sharded tensor it reads the part of this process.
    """
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader, planner = HuggingFaceStorageReader(str(folder)), DefaultLoadPlanner(flatten_state_dict=False)
    stored = reader.read_metadata()
    planner.set_up_planner(tensors, stored, is_coordinator=True)
    reader.set_up_storage_reader(stored, is_coordinator=True)
    reader.read_data(planner.create_local_plan(), planner).wait()


def _digest(file: HashedFile) -> FileDigest:
    return {"sha256": file.sha256.hexdigest(), "bytes": file.bytes}
