"""Back-up and restore."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flywheel.cli.output import Bar, Json, messages, show
from flywheel.errors import ConfigError, IntegrityError

if TYPE_CHECKING:
    from flywheel.config import Deployment
    from flywheel.store import Store


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(backup)
    app.command()(restore)


def backup(
    directory: Annotated[Path, typer.Argument(help="Where the back-ups of this deployment lie.")],
    keys: Annotated[
        bool,
        typer.Option("--keys", help="Signing keys and Airflow's secrets too: keep the copy as they are."),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read earlier copies too, and mend what was damaged.")
    ] = False,
    json: Json = False,
) -> None:
    """Copy everything that matters, while it runs: the store, Airflow's database, experiments, the anchor.

    Run it again into the same directory: only what is new is copied, and each back-up can be restored.
    Exit 1 if objects were damaged in the store; everything else was copied then.
    """
    from flywheel.backup import make
    from flywheel.config import Deployment

    deployment = Deployment.from_env()
    with _store(deployment) as store, Bar("copying") as bar:
        made = make(
            directory,
            store,
            deployment.home,
            _checkout(),
            keys=keys,
            verify=verify,
            on_progress=lambda objects, _: bar.to(objects, objects),
        )
    show(made, json)
    for line in (*made.notes, *made.left_out):
        messages.print(f"note: {line}", markup=False)
    if made.damaged:
        raise IntegrityError(f"{len(made.damaged)} objects of the store are damaged; {made.damaged[0]}")


def restore(
    directory: Annotated[Path, typer.Argument(help="Where `flywheel backup` copied to.")],
    of: Annotated[str, typer.Option(help="An earlier back-up of the directory, by its name.")] = "",
    keys: Annotated[
        bool, typer.Option("--keys", help="Put signing keys and Airflow's secrets back.")
    ] = False,
    into_existing: Annotated[
        bool, typer.Option("--into-existing", help="Add what is missing; what differs is left and named.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Verify the back-up and write nothing.")] = False,
    json: Json = False,
) -> None:
    """Restore a back-up into an empty store. All of it is verified before anything is written."""
    from flywheel import backup
    from flywheel.config import Deployment

    if check:
        done = backup.check(directory, of)
    else:
        backup.Directory(directory).read(of)  # before a store is started for it
        deployment = Deployment.from_env()
        with _store(deployment) as store, Bar("restoring") as bar:
            done = backup.restore(
                directory,
                store,
                deployment.home,
                _checkout(),
                of=of,
                keys=keys,
                into_existing=into_existing,
                on_progress=lambda what, n, total: bar.to(n, total, what),
            )
    show(done, json)
    for line in done.notes:
        messages.print(f"note: {line}", markup=False)
    if done.different:
        raise ConfigError(
            f"{len(done.different)} things differ from the back-up and were left: {done.different[0]}"
        )


@contextmanager
def _store(deployment: Deployment) -> Iterator[Store]:
    """The store; the embedded one is started for the time that it takes, if it is not up."""
    from flywheel import services
    from flywheel.store import Store, embedded_store

    if not deployment.embedded or embedded_store(deployment.home) is not None:
        yield Store.from_env(deployment)
        return
    with services.session(
        deployment.home, with_airflow=False, on_progress=lambda name, step: messages.print(f"  {name} {step}")
    ) as up:
        yield up.store()


def _checkout() -> Path | None:
    from flywheel.workspace import source_checkout

    try:
        return source_checkout()
    except ConfigError:
        return None
