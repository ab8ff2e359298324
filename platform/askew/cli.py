"""The command line: `askew promote`."""

import sys
from typing import Annotated

import typer

from askew.errors import AskewError
from askew.promotion import PromoteSettings
from askew.promotion import promote as promoted
from askew.registry import CHAMPION

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Multimodal product search: train, serve, promote."""


@app.command()
def promote(
    model: Annotated[str, typer.Argument(help="name of the registered model in MLflow")],
    version: Annotated[str, typer.Argument(help="a version's number, or an alias that it bears")],
    alias: Annotated[str, typer.Option(help="what the endpoint follows")] = CHAMPION,
    force: Annotated[bool, typer.Option(help="past the gates of quality, never past those of files")] = False,
    tracking_uri: Annotated[str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="of MLflow")] = "",
) -> None:
    """Move an alias to a version, as a person does in MLflow's page; the endpoint follows within seconds."""
    settings = PromoteSettings(model=model, version=version, alias=alias, force=force, tracking_uri=tracking_uri)
    try:
        found = promoted(settings)
    except AskewError as error:
        print(f"askew: error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    print(f"{found['model']} version {found['version']} bears {found['alias']}")
