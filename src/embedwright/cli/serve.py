"""The command `serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from embedwright.cli import options
from embedwright.cli.display import say
from embedwright.cli.options import opt
from embedwright.errors import InputError, MissingPackageError


@options.opens_models
def serve(
    how: options.How,
    model: options.Model,
    index: Annotated[Path | None, opt("Index that the model has made, to be searched at /search.")] = None,
    ui: Annotated[bool, opt("Also serve a page that searches the index, for a browser.", "--ui")] = False,
    against: Annotated[str | None, opt("With --ui: second model, shown side by side.")] = None,
    against_index: Annotated[Path | None, opt("With --against: index that the second model has made.")] = None,
    host: Annotated[str, opt("Address to listen at. One that others can reach needs a key.")] = "127.0.0.1",
    port: Annotated[int, opt("Port to listen at; 0 takes a free one.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, opt("The model's name for clients. Default: the last part of its path.")] = None,
    api_key_env: Annotated[str | None, opt("NAME of the environment variable that holds the API key.")] = None,
    api_key_file: Annotated[Path | None, opt("File of API keys, one a line.")] = None,
    token_ids: Annotated[bool, opt("Take the model's own token ids in place of texts.", "--token-ids")] = False,
    max_inputs: Annotated[int, opt("Texts of a request at most.", min=1)] = 256,
    max_body: Annotated[int, opt("Bytes of a request at most.", min=1)] = 2_000_000,
    batch_tokens: Annotated[
        int | None, opt("Tokens of a batch at most. Default: what `encode` takes on this device.", min=1)
    ] = None,
    queue_tokens: Annotated[
        int | None,
        opt("Tokens that a request waits for at most, else it gets 429. Default: those of 2 batches.", min=1),
    ] = None,
    drain: Annotated[float, opt("Seconds in which a stopped server answers what it has accepted.", min=0)] = 10.0,
) -> None:
    """Serve a model over HTTP, as OpenAI's clients ask for vectors: POST /v1/embeddings."""
    try:
        from embedwright.serve.app import create_app
        from embedwright.serve.run import listen, read_keys, run
        from embedwright.serve.server import Limits
    except ImportError as error:
        raise MissingPackageError(f"serve needs more packages ({error}): pip install 'embedwright[serve]'") from error
    from embedwright.encoders.open import open_encoder
    from embedwright.index.index import Index

    if ui and index is None:
        raise InputError("--ui is a page that searches an index: name it with --index")
    if (against is None) != (against_index is None) or (against is not None and not ui):
        raise InputError("--against and --against-index go together, with --ui")
    keys = read_keys(api_key_env, api_key_file)
    listening = listen(host, port, keys)  # a port that is taken is said before a model is loaded
    searched = None if index is None else Index.open(index)
    limits = Limits(max_inputs, max_body, batch_tokens, queue_tokens)
    name = name or Path(model).absolute().name  # also for `.`
    second = None
    if against is not None and against_index is not None:
        parts = Path(against).absolute().parts
        other = parts[-1] if parts[-1] != name else "/".join(parts[-2:])
        opened = Index.open(against_index)
        second = create_app(open_encoder(against, **how), name=other, index=opened, keys=keys, limits=limits)
    app = create_app(
        open_encoder(model, **how),
        name=name,
        index=searched,
        page=ui,
        against=second,
        keys=keys,
        limits=limits,
        token_ids=token_ids,
    )
    place, number = listening.getsockname()[:2]
    at = f"[{place}]" if ":" in place else place
    say(f"{name} at http://{at}:{number}/v1{'' if index is None else f', {index} at /search'}")
    if ui:
        say(f"the page: http://{at}:{number}/")
    run(app, listening, drain)
