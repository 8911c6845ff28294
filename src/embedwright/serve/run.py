"""Runs a server until a signal stops it: what it has accepted is answered first."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import time
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from embedwright import threads
from embedwright.errors import InputError, as_input_error
from embedwright.serve.server import Server

LOOPBACK = ("127.0.0.1", "::1", "localhost")
_SWITCH_S = 0.0005
_ANSWERS_S = 2  # after the drain: to write the last answers


def run(app: FastAPI, listening: socket.socket, drain_s: float) -> None:
    """Serves `app` until SIGTERM or SIGINT, then answers what it has accepted and returns.

    New requests get 503 meanwhile. What takes longer than `drain_s` seconds is answered with 503 too. A second signal
    ends all at once.
    """
    threads.unbind()  # this thread computes nothing, and is not to share a core with one that does
    # the model's thread asks for the interpreter at every layer's steps: a busy loop would hold it back 5 ms each time
    sys.setswitchinterval(_SWITCH_S)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=_ANSWERS_S,
    )
    _Stopping(config, app.state.server, drain_s).run(sockets=[listening])


class _Stopping(uvicorn.Server):
    """uvicorn's server, which on a signal waits for the requests under way before it closes their connections."""

    def __init__(self, config: uvicorn.Config, server: Server, drain_s: float) -> None:
        super().__init__(config)
        self.server, self.drain_s, self.deadline = server, drain_s, float("inf")
        self.idle_ticks = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.server.traffic.draining:
            self.should_exit = self.force_exit = True
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it shows what it cuts off
        self.server.traffic.draining = True
        self.deadline = time.monotonic() + self.drain_s

    async def on_tick(self, counter: int) -> bool:
        traffic = self.server.traffic
        self.idle_ticks = 0 if traffic.under_way or not traffic.draining else self.idle_ticks + 1
        # two, so that what had arrived when the signal came is read, and told that the server stops
        if self.idle_ticks > 1 or time.monotonic() > self.deadline:
            if not self.should_exit:
                self.server.traffic.cut_off()  # they leave the queues of both models
            self.should_exit = True
        return await super().on_tick(counter)


def listen(host: str, port: int, keys: list[str]) -> socket.socket:
    """Opens the socket. Raises InputError for a port that is taken, and without keys for more than this machine."""
    if not keys and host not in LOOPBACK:
        raise InputError(f"--host {host} is open to others and needs a key: --api-key-env NAME or --api-key-file FILE")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise InputError(f"cannot listen at {host}, port {port}: {error.strerror or error}") from error


def read_keys(env: str | None, file: Path | None) -> list[str]:
    """Returns the API keys: that of the environment variable `env`, and those of `file`, one a line.

    Raises InputError if there is none where one should be. No message shows a key.
    """
    keys = []
    if env is not None:
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*", env):  # the user may have given the key itself
            raise InputError("--api-key-env takes the NAME of the environment variable that holds the key")
        keys.append(os.environ.get(env, "").strip())
        if not keys[0]:
            raise InputError(f"--api-key-env: ${env}, which is to hold the API key, is not set")
    if file is not None:
        with as_input_error(file, "cannot be read"):
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        if not any(lines):
            raise InputError(f"--api-key-file {file} holds no key: write one a line")
        keys += [line for line in lines if line]
    return keys
