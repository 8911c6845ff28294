"""A checkpoint of sharded tensors: each process writes its part, and any number of processes read it to the bit.

Run as a script, this file forks the processes of a group (so that torch is imported once); gloo, on a CPU.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from embedwright import files
from embedwright.processes import Processes, start
from embedwright.training.engine.parallel import full
from embedwright.training.run import checkpoint

WRITERS, READERS = (1, 2, 4), (1, 3)


def outcome(folder: Path, writers: tuple[int, ...], readers: tuple[int, ...]) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    command = [sys.executable, __file__, json.dumps([str(folder), writers, readers])]
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stderr[-4000:]
    return {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("parts")
    return outcome(folder, WRITERS, READERS) | {"folder": folder}


def check_equal(found: dict[str, Any], writers: int, readers: int) -> None:
    read = [found[f"read-{writers}-{readers}-{rank}"] for rank in range(readers)]
    # 8 tensors of the network, two moments of each, a count of steps of each, and the projection with its own
    assert [each["compared"] for each in read] == [8 * 4 + 4] * readers
    assert [each["differ"] for each in read] == [[]] * readers


@pytest.mark.parametrize("readers", READERS)
@pytest.mark.parametrize("writers", WRITERS)
def test_any_number_of_processes_reads_what_any_number_wrote(found: dict[str, Any], writers: int, readers: int) -> None:
    check_equal(found, writers, readers)


@pytest.mark.long
def test_eight_processes_write_and_read(tmp_path: Path) -> None:
    found = outcome(tmp_path, (1, 8), (1, 3, 8))
    for writers in (1, 8):
        for readers in (1, 3, 8):
            check_equal(found, writers, readers)


def test_each_process_writes_a_part_and_hashes_it_on_the_way(found: dict[str, Any]) -> None:
    for writers in WRITERS[1:]:
        folder = found["folder"] / f"{writers}"
        written = folder / "00-0000002"
        assert checkpoint.newest(folder) == written  # each file is read and hashed here, and is as its manifest says
        listed = json.loads((written / "manifest.json").read_text())["files"]
        assert {path.name for path in written.iterdir()} == {*listed, "manifest.json"}
        parts = {name: file["bytes"] for name, file in listed.items() if name.endswith(".safetensors")}
        assert len(parts) == writers and max(parts.values()) < 2 * min(parts.values())
        assert {Path(name).suffix for name in listed} == {".safetensors", ".json"}
    for rank in range(4):
        assert found[f"hashed-4-{rank}"] == 1  # a file of its own was written, and none was hashed by reading


def test_a_process_that_cannot_write_is_an_error_of_all_and_the_older_checkpoint_stays(found: dict[str, Any]) -> None:
    for who in ("part", "first"):
        for rank in range(2):
            assert "could not be written" in found[f"{who}-{rank}"] and "intact" in found[f"{who}-{rank}"]
            assert "no space" in found[f"{who}-{rank}"]
        left = sorted(path.name for path in (found["folder"] / f"full-{who}").iterdir())
        assert left == ["00-0000001"]


# ---- in the processes


def trained(count: int, seed: int, steps: int) -> tuple[Any, Any]:
    """A network and its optimizer after some steps. Some of its tensors have fewer rows than there are processes."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(seed)
    network = torch.nn.Sequential(
        torch.nn.Linear(6, 40), torch.nn.LayerNorm(40), torch.nn.Linear(40, 11), torch.nn.Linear(11, 1)
    )
    projection = torch.nn.Parameter(torch.randn(3, 2))
    if count > 1:
        for layer in network:
            fully_shard(layer)
        fully_shard(network)
    optimizer = torch.optim.AdamW(
        [{"params": list(network.parameters())}, {"params": [projection], "projection": True}]
    )
    for _ in range(steps):
        (network(torch.randn(8, 6)).square().sum() + projection.square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return network, optimizer


def tensors_of(network: Any, optimizer: Any) -> dict[str, Any]:
    found = {name: full(parameter.detach()) for name, parameter in network.named_parameters()}
    found["projection"] = optimizer.param_groups[1]["params"][0].detach()
    for index, moments in optimizer.state_dict()["state"].items():
        found |= {f"{index}.{name}": full(moment) for name, moment in moments.items()}
    return {name: tensor.clone().contiguous() for name, tensor in found.items()}


def save(where: Path, step: int, model: Any, processes: Processes) -> None:
    network, optimizer = model
    state = checkpoint.RunState(0, step, "r", "d")
    checkpoint.save_checkpoint(where, state, dict(network.named_parameters()), optimizer, 9, processes)


def write(folder: Path, processes: Processes) -> None:
    """Saves a network, what it is whole, and how many files this process wrote without hashing any by reading it."""
    made, hashed, init = [], checkpoint.sha256_of, files.HashedFile.__init__

    def counted(self: Any, path: Any) -> None:
        made.append(str(path))
        init(self, path)

    files.HashedFile.__init__ = counted  # type: ignore[method-assign]
    checkpoint.sha256_of = None  # type: ignore[assignment]
    model = trained(processes.count, 0, 2)
    save(folder / f"{processes.count}", 2, model, processes)
    checkpoint.sha256_of = hashed
    whole = tensors_of(*model)
    if processes.first:
        save_file(whole, folder / f"{processes.count}.whole")
    parts = sum(path.endswith(".safetensors") for path in made)
    (folder / f"hashed-{processes.count}-{processes.rank}.json").write_text(json.dumps(parts))


def read(folder: Path, writers: Sequence[int], processes: Processes) -> None:
    for count in writers:
        network, optimizer = trained(processes.count, 9, 0)
        where = folder / f"{count}" / "00-0000002"
        checkpoint.restore_weights(where, dict(network.named_parameters()))
        checkpoint.restore_optimizer(where, optimizer)
        own, whole = tensors_of(network, optimizer), load_file(folder / f"{count}.whole")
        differ = [name for name in own.keys() | whole.keys() if not torch.equal(own[name], whole[name])]
        said = json.dumps({"compared": len(own), "differ": differ})
        (folder / f"read-{count}-{processes.count}-{processes.rank}.json").write_text(said)


def fail(folder: Path, processes: Processes) -> None:
    """Rank 1 cannot write its part; then rank 0 cannot write the state."""

    def no_space(*_: Any) -> Any:
        raise OSError("no space left")

    model = trained(processes.count, 0, 1)
    for who, rank, owner, name in (("part", 1, files.HashedFile, "write"), ("first", 0, checkpoint, "write_text")):
        save(folder / f"full-{who}", 1, model, processes)
        kept = getattr(owner, name)
        if processes.rank == rank:
            setattr(owner, name, no_space)
        try:
            save(folder / f"full-{who}", 2, model, processes)
        except OSError as error:
            (folder / f"{who}-{processes.rank}.json").write_text(json.dumps(str(error)))
        setattr(owner, name, kept)


def group(count: int, work: Callable[[Any], None]) -> None:
    """Calls `work` in each process of a group of forked ones. Exits if one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
                os.environ |= {name: str(value) for name, value in own.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                processes = start()
                work(processes)
                processes.wait()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    if any([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]):
        sys.exit(1)


if __name__ == "__main__":
    import accelerate  # noqa: F401  once for all children
    import torch.distributed.checkpoint.state_dict_saver
    import torch.distributed.fsdp

    place, writing, reading = json.loads(sys.argv[1])
    for count in writing:
        group(count, partial(write, Path(place)))
    for count in reading:
        group(count, partial(read, Path(place), writing))
    group(2, partial(fail, Path(place)))
