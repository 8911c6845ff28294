"""Encode a corpus with Ray: a model on each GPU of the cluster (on a CPU, --actors models), each takes part after part.

Run it: python examples/ray_encode.py MODEL SOURCE OUT --parts 64, where SOURCE and OUT may be s3://bucket/folder

It needs `pip install 'embedwright[ray]'` on all machines, and on each a SOURCE and OUT that are the same: a store, or a
shared file system. OUT is what `embedwright encode` writes, whatever the number of parts. Ray starts an actor that dies
again. It takes its part up at the first shard that is missing, and so does this script after any stop.
"""

import argparse

import ray
from ray.util import ActorPool

from embedwright.data.files.parts import Shard
from embedwright.encoders.open import open_encoder
from embedwright.remote import fetched, local_folder
from embedwright.vectors.corpus import encode_corpus


class Encoder:
    """A model on its device."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model = open_encoder(options.model)

    def part(self, shard: Shard) -> int:
        """Encodes what is missing of one part, and returns its number."""
        with local_folder(self.options.out) as (folder, remote):
            source = fetched(self.options.source)  # of a store, once a machine
            how = {"precision": self.options.precision, "shard": shard, "remote": remote}
            encode_corpus(self.model, source, folder, **how)
        return shard.index


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("source", help="a file or folder of rows with `text`")
    parser.add_argument("out", help="a folder for the vectors")
    parser.add_argument("--parts", type=int, default=64, help="a few for each GPU: each reads the whole source")
    parser.add_argument("--precision", choices=("float32", "float16"), default="float16")
    parser.add_argument("--actors", type=int, default=2, help="where the cluster has no GPU")
    options = parser.parse_args(arguments)

    ray.init(ignore_reinit_error=True)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    actor = ray.remote(num_gpus=min(gpus, 1), max_restarts=-1, max_task_retries=3)(Encoder)
    pool = ActorPool([actor.remote(options) for _ in range(gpus or options.actors)])
    parts = [Shard(index, options.parts) for index in range(options.parts)]
    for done, index in enumerate(pool.map_unordered(lambda actor, shard: actor.part.remote(shard), parts), start=1):
        print(f"{done} of {options.parts} parts are done: {index}/{options.parts}", flush=True)


if __name__ == "__main__":
    main()
