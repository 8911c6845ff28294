"""Mine hard negatives with Ray in a corpus that `ray_encode.py` has encoded: a teacher on each GPU, part after part.

Run it: python examples/ray_mine.py EXAMPLES VECTORS OUT --teacher MODEL --parts 64

OUT is a folder of parts, which opens as one data set. This script alone goes on in it, since it names its settings
otherwise than `embedwright mine --shard`. EXAMPLES, VECTORS and OUT may be s3://bucket/folder; each machine copies the
first two to its cache, whole. A part that is done is not made again. Take one part for each 131,072 rows: the corpus is
searched anew for so many.
"""

import argparse
from pathlib import Path
from typing import Any

import ray
from ray.util import ActorPool

from embedwright import mine
from embedwright.data.files.parts import Shard, folder_of_part, write_part
from embedwright.data.files.tasks import digest_of
from embedwright.data.tables.table import PartOfTable, open_as_named
from embedwright.encoders.open import open_encoder
from embedwright.remote import fetched
from embedwright.vectors.corpus import open_encoded


class Miner:
    """A teacher on its device, with the rows and the corpus as tables on disk."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.teacher = open_encoder(options.teacher)
        self.rows = open_as_named(fetched(options.examples))
        self.corpus = open_encoded(fetched(options.vectors))

    def part(self, shard: Shard) -> dict[str, Any]:
        """Mines one part, unless it is done, and returns its counts."""

        def write(file: Path) -> dict[str, Any]:
            own = PartOfTable(self.rows, shard.rows(len(self.rows)))
            how = {"negatives": self.options.negatives, "precision": self.options.precision}
            where = {"tasks": self.rows.tasks, "out": file}
            return mine(own, self.corpus, self.teacher, **how, **where)[1].to_json()

        said = {key: getattr(self.options, key) for key in ("teacher", "negatives", "precision")}
        said |= {"examples": self.rows.fingerprint, "corpus": self.corpus.identity}
        said["tasks"] = digest_of(self.rows.tasks)  # whose instructions go before the queries
        with folder_of_part(self.options.out, shard) as (folder, remote):
            return write_part(folder, shard, said, write, remote)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("examples")
    parser.add_argument("vectors", help="the folder that ray_encode.py wrote, by the same model")
    parser.add_argument("out", help="a folder for the parts; with a name in .parquet, they are Parquet")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--negatives", type=int, default=7)
    parser.add_argument("--parts", type=int, default=64)
    parser.add_argument("--precision", choices=("float32", "float16"), default="float16")
    parser.add_argument("--actors", type=int, default=2, help="where the cluster has no GPU")
    options = parser.parse_args(arguments)

    ray.init(ignore_reinit_error=True)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    actor = ray.remote(num_gpus=min(gpus, 1), max_restarts=-1, max_task_retries=3)(Miner)
    pool = ActorPool([actor.remote(options) for _ in range(gpus or options.actors)])
    parts = [Shard(index, options.parts) for index in range(options.parts)]
    for done, counts in enumerate(pool.map_unordered(lambda actor, shard: actor.part.remote(shard), parts), start=1):
        print(f"{done} of {options.parts} parts are done, {counts['negatives']:,} negatives in this one", flush=True)


if __name__ == "__main__":
    main()
