"""Serve a selector over HTTP: a reranker that returns as many documents as a question needs, and answers from them.

    POST /v1/rerank, /v2/rerank    the chosen documents, as clients of Jina and Cohere expect them
    POST /v1/answer                the chosen documents and the answer, as JSON or as server-sent events
    POST /v1/chat/completions      the same for clients of OpenAI; the last user message is the question
    GET  /                         a page to ask questions
    GET  /health, /metrics         for load balancers and Prometheus

The model is loaded into vLLM, or is a server's (--api-base). A question is chosen for and answered by the functions of
inference.py; more than --window documents are chosen window by window, as in top_inference.py. At most --concurrency
requests are at work; one more gets status 429. SIGTERM and Ctrl-C end the server after the requests at work.
docs/serving.md has examples for common clients.

Reads    DynamicRAG_llama3_8b                       a model folder, training output or hub name
         data/psgs_w100.tsv                         the corpus, if --passages is given
Writes   nothing but the index of the corpus

    python serve.py --llm-model DynamicRAG_llama3_8b --template template/llama3.jinja --passages data/psgs_w100.tsv
"""

import argparse
import ipaddress
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynamicrag import stage
from dynamicrag.llm.engine import add_engine_flags
from dynamicrag.llm.options import CallOptions, EngineOptions
from dynamicrag.llm.requests import add_call_flags
from dynamicrag.llm.serving.corpus import Corpus, CorpusOptions, add_corpus_flags
from dynamicrag.llm.serving.refusals import KEY_VARIABLE, read_keys
from dynamicrag.rows.shown import DOCUMENTS_SHOWN
from dynamicrag.stage import UserError, log, options_from

if TYPE_CHECKING:
    import uvicorn

    from dynamicrag.llm.serving.app import Server

KEEP_ALIVE_SECONDS = 30
BACKLOG = 2048
CONNECTIONS_PER_SLOT, MORE_CONNECTIONS = 4, 64


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for every network of this machine")
    group.add_argument("--port", type=int, default=8000, help="port to listen at; 0 for any free one, which is logged")
    group.add_argument("--api-key-file", metavar="FILE", help=f"keys of clients, one per line (default: the one in {KEY_VARIABLE}, or none)")
    group.add_argument("--max-documents", type=int, default=500, help="documents per request")
    group.add_argument("--max-body", type=float, default=4, metavar="MB", help="size of a request's body")
    group.add_argument("--concurrency", type=int, default=64, help="requests at work at a time")
    group.add_argument("--window", type=int, default=DOCUMENTS_SHOWN, help="documents shown to the LLM at a time, as in training")
    group.add_argument("--n-docs", type=int, default=DOCUMENTS_SHOWN, help="documents retrieved from the corpus per question")
    add_corpus_flags(parser)
    add_engine_flags(parser)
    add_call_flags(parser, in_chunks=False)
    parser.set_defaults(seed=CallOptions.seed, chunk_size=CallOptions.chunk_size)
    args = parser.parse_args(argv)
    for flag in ("max_documents", "max_body", "concurrency", "window", "n_docs"):
        if getattr(args, flag) <= 0:
            parser.error(f"--{flag.replace('_', '-')}: must be more than 0")
    if not 0 <= args.port < 1 << 16:
        parser.error(f"--port {args.port}: expected 0 to 65535")
    return args


def bind(host: str, port: int) -> socket.socket:
    """Return a socket with an address of its own, before the model is loaded. It refuses connections until the server runs.

    Raises UserError if the address cannot be used.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        return bound
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host} --port {port}: cannot listen there ({error}); give another address or port") from error


def is_local(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def name_of(model: str) -> str:
    """Return the name of a model for replies: a hub name, or the last part of a path."""
    return Path(model).resolve().name if Path(model).exists() else model


def configure(args: argparse.Namespace, keys: list[bytes]) -> tuple["Server", "uvicorn.Server"]:
    """Load the models and open the corpus. Return the server and its HTTP server, which does not listen yet. Raises UserError."""
    import uvicorn

    from dynamicrag.llm.serving.app import ServeOptions, Server, make_app
    from dynamicrag.llm.serving.engines import load_served

    corpus = Corpus(options_from(args, CorpusOptions)) if args.passages else None
    builders = load_served(options_from(args, EngineOptions), options_from(args, CallOptions))
    server = Server(builders, name_of(args.llm_model), options_from(args, ServeOptions), keys, corpus)
    http = uvicorn.Server(uvicorn.Config(
        make_app(server), log_level="warning", access_log=False, server_header=False, timeout_keep_alive=KEEP_ALIVE_SECONDS,
        limit_concurrency=CONNECTIONS_PER_SLOT * args.concurrency + MORE_CONNECTIONS, timeout_graceful_shutdown=60,
    ))
    server.when_failed = lambda: setattr(http, "should_exit", True)
    return server, http


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    keys = read_keys(args.api_key_file)
    with bind(args.host, args.port) as bound:
        if not keys and not is_local(args.host):
            log.warning("--host %s: every client that reaches this address can use the model; give --api-key-file", args.host)
        server, http = configure(args, keys)
        bound.listen(BACKLOG)  # before the address is logged, so that no client is too early
        host, port, *_ = bound.getsockname()
        log.info("serving %s at http://%s:%d", name_of(args.llm_model), f"[{host}]" if ":" in host else host, port)
        try:
            http.run([bound])
        except KeyboardInterrupt:  # uvicorn raises the signal again after the last reply
            log.info("ended")
        if server.failed:
            raise UserError("vLLM: its process has ended; see the log above, and start the server again")


if __name__ == "__main__":
    stage.run(main)
