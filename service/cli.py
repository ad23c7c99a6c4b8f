"""The console script `semid`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    import uvicorn

    from service.settings import Settings

app = typer.Typer(
    name="semid",
    help="Semantic IDs for catalogue items: serve a frozen tokenizer, train one, tokenize a catalogue.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def main() -> None:
    """Semantic IDs for catalogue items."""


@app.command()
def serve() -> None:
    """Start the service; its settings are SID_* environment variables (see the README's table)."""
    from pydantic import ValidationError

    from service.schemas import describe
    from service.settings import Settings

    try:
        settings = Settings()
    except ValidationError as error:
        raise typer.BadParameter(describe(error.errors()).replace("; ", "\n"), param_hint="SID_* settings") from error
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    server = _server(settings)
    server.run()
    raise typer.Exit(0 if server.started else 1)


def _server(settings: Settings) -> uvicorn.Server:
    import uvicorn

    from service.app import create_app

    class Server(uvicorn.Server):
        """Says where it is once it listens."""

        async def startup(self, *arguments: object, **options: object) -> None:
            await super().startup(*arguments, **options)  # type: ignore[arg-type]
            if self.started:
                port = self.servers[0].sockets[0].getsockname()[1]
                typer.echo(_greeting(settings.host, port))

    config = uvicorn.Config(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_level=settings.log_level,
        access_log=False,
        timeout_graceful_shutdown=settings.drain_s,
        server_header=False,
    )
    return Server(config)


def _greeting(host: str, port: int) -> str:
    base = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    body = '{"items": [{"item_id": "kettle-1", "text": "Cordless electric kettle, stainless steel, 1.7 l"}]}'
    return (
        f"\nsemid is ready.\n"
        f"  page   {base}/\n"
        f"  docs   {base}/docs\n"
        f"  first  curl -s {base}/tokenize -H 'content-type: application/json' \\\n"
        f"           -d '{body}'\n"
    )
