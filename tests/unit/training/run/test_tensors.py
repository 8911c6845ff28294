"""A checkpoint of sharded tensors: each process writes its part, and any number of processes read it to the bit."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import groups
import pytest
import torch
from safetensors.torch import load_file, save_file

from embedwright import files
from embedwright.processes import Processes, start
from embedwright.training.engine.parallel import full_tensor
from embedwright.training.run import checkpoint

WRITERS, READERS = (1, 2, 4), (1, 3)


def outcome(folder: Path, writers: tuple[int, ...], readers: tuple[int, ...]) -> dict[str, Any]:
    """What each function returned in each process, by function, size of the group, and rank."""
    wrote = groups.run(__file__, folder, {"write": writers, "fail": (2,)})
    return wrote | groups.run(__file__, folder, {"read": readers}, json.dumps(writers))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("parts")
    return outcome(folder, WRITERS, READERS) | {"folder": folder}


def check_equal(found: dict[str, Any], writers: int, readers: int) -> None:
    read = [each[str(writers)] for each in found["read"][readers]]
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
    assert found["write"][4] == [1] * 4  # a file of its own was written, and none was hashed by reading


def test_a_process_that_cannot_write_is_an_error_of_all_and_the_older_checkpoint_stays(found: dict[str, Any]) -> None:
    for who in ("part", "first"):
        for errors in found["fail"][2]:
            assert all(said in errors[who] for said in ("OSError", "could not be written", "intact", "no space"))
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
    found = {name: full_tensor(parameter.detach()) for name, parameter in network.named_parameters()}
    found["projection"] = optimizer.param_groups[1]["params"][0].detach()
    for index, moments in optimizer.state_dict()["state"].items():
        found |= {f"{index}.{name}": full_tensor(moment) for name, moment in moments.items()}
    return {name: tensor.clone().contiguous() for name, tensor in found.items()}


def save(where: Path, step: int, model: Any, processes: Processes) -> None:
    network, optimizer = model
    state = checkpoint.RunState(0, step, "r", "d")
    checkpoint.save_checkpoint(where, state, dict(network.named_parameters()), optimizer, 9, processes)


def write(folder: Path) -> int:
    """Saves a network, and what it is whole. Returns how many files this process wrote, none hashed by reading it."""
    processes = start()
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
    if processes.is_rank_0:
        save_file(whole, folder / f"{processes.count}.whole")
    processes.barrier()
    return sum(path.endswith(".safetensors") for path in made)


def read(folder: Path, writers: str) -> dict[str, Any]:
    processes, found = start(), dict[str, Any]()
    for count in json.loads(writers):
        network, optimizer = trained(processes.count, 9, 0)
        where = folder / f"{count}" / "00-0000002"
        checkpoint.restore_weights(where, dict(network.named_parameters()))
        checkpoint.restore_optimizer(where, optimizer)
        own, whole = tensors_of(network, optimizer), load_file(folder / f"{count}.whole")
        differ = [name for name in own.keys() | whole.keys() if not torch.equal(own[name], whole[name])]
        found[str(count)] = {"compared": len(own), "differ": differ}
    processes.barrier()
    return found


def fail(folder: Path) -> dict[str, Any]:
    """Rank 1 cannot write its part; then rank 0 cannot write the state."""
    processes, found = start(), dict[str, Any]()

    def no_space(*_: Any) -> Any:
        raise OSError("no space left")

    model = trained(processes.count, 0, 1)
    for who, rank, owner, name in (
        ("part", 1, files.HashedFile, "write"),
        ("first", 0, checkpoint, "write_hashed_text"),
    ):
        save(folder / f"full-{who}", 1, model, processes)
        kept = getattr(owner, name)
        if processes.rank == rank:
            setattr(owner, name, no_space)
        found[who] = groups.raised(partial(save, folder / f"full-{who}", 2, model, processes))
        setattr(owner, name, kept)
    processes.barrier()
    return found
