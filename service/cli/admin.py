"""Commands on the tokenizers of a running service: `semid tokenizers`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.frame import failure

if TYPE_CHECKING:
    from service.client import Swapped, TokenizerClient

Url = Annotated[str, typer.Option(help="The service.")]
ApiKey = Annotated[
    str | None, typer.Option(envvar="SEMID_API_KEY", show_envvar=True, help="Of the scope admin; to list, read.")
]
Name = Annotated[str, typer.Argument(help="name@fingerprint, or a name that only one has.")]
HERE = "http://127.0.0.1:8000"

loaded = typer.Typer(
    help="Which tokenizers a running service has, and other ones without a restart.", no_args_is_help=True
)


@loaded.command("list")
def list_(url: Url = HERE, api_key: ApiKey = None) -> None:
    """What is loaded, the default first."""
    with _client(url, api_key) as client:
        manifests = client.tokenizers().manifests
    _show([str(manifest["tokenizer"]) for manifest in manifests])


@loaded.command()
def load(
    checkpoint: Annotated[str, typer.Argument(help="Its directory, on the service's machine.")],
    url: Url = HERE,
    default: Annotated[bool, typer.Option("--default", help="Make it the default then.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Even where some callers' requests would be refused from then on.")
    ] = False,
    api_key: ApiKey = None,
) -> None:
    """Load a checkpoint beside what is loaded; returns when every worker has it, verified and warm."""
    with _client(url, api_key) as client:
        _tell(client.load_tokenizer(checkpoint, default=default, force=force))


@loaded.command("default")
def default_(
    tokenizer: Name,
    url: Url = HERE,
    force: Annotated[
        bool, typer.Option("--force", help="Even where it takes other content than the default one.")
    ] = False,
    api_key: ApiKey = None,
) -> None:
    """Let a tokenizer answer requests that name none; those under way end as they began."""
    with _client(url, api_key) as client:
        _tell(client.make_default(tokenizer, force=force))


@loaded.command()
def unload(tokenizer: Name, url: Url = HERE, api_key: ApiKey = None) -> None:
    """Let a tokenizer go; requests under way end with it, and what it assigned stays in the registry."""
    with _client(url, api_key) as client:
        _tell(client.unload_tokenizer(tokenizer))


@contextmanager
def _client(url: str, api_key: str | None) -> Iterator[TokenizerClient]:
    """A client that tries once; what goes wrong is said in words."""
    from service.client import TokenizerClient, TokenizerError

    try:
        with TokenizerClient(url, api_key=api_key, patience_s=0) as client:
            yield client
    except (TokenizerError, ValueError) as error:
        raise failure(str(error)) from error


def _tell(swapped: Swapped) -> None:
    _show(swapped.loaded)
    if swapped.note:
        typer.echo(swapped.note, err=True)
    if swapped.pending:
        raise failure(f"{swapped.pending} of {swapped.workers} workers have not followed yet; they go on")


def _show(names: list[str] | tuple[str, ...]) -> None:
    for place, name in enumerate(names):
        typer.echo(f"{name}{' (default)' if place == 0 else ''}")
