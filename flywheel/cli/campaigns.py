"""Campaigns from the terminal: what robots are to record besides their failures."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import TypeAdapter, ValidationError

from flywheel.cli.output import Json, console, rows
from flywheel.errors import ConfigError

app = typer.Typer(help="What robots record besides failures.", no_args_is_help=True)
Digest = Annotated[str, typer.Argument(help="Of the proposal, or its beginning.")]


@app.command()
def propose(
    file: Annotated[Path, typer.Argument(help="YAML: a list of campaigns; all that are to hold.")],
) -> None:
    """Put a list of campaigns up for approval. It replaces what runs now, once it is published."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    from flywheel import campaigns
    from flywheel.edge.campaigns import Campaign
    from flywheel.services.environment import store

    yaml = YAML(typ="safe", pure=True)  # of YAML 1.2, in which the key "on" is a word
    try:
        found = TypeAdapter(tuple[Campaign, ...]).validate_python(_plain(yaml.load(file.read_text())))
        digest = campaigns.propose(store(), found)
    except OSError as e:
        raise ConfigError(f"{file}: {e.strerror}") from None
    except YAMLError as e:
        raise ConfigError(f"{file}: not YAML: {str(e).splitlines()[0]}") from None
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{file}: {where} = {first['input']!r:.80}: {first['msg']}") from None
    console.print(f"{digest}: proposed; `flywheel campaigns approve {digest[:12]}` lets it out")


@app.command()
def ls(json: Json = False) -> None:
    """Every proposal, and whose signed approval it has."""
    from flywheel import campaigns
    from flywheel.services.environment import publisher

    p = publisher()
    trust = p.load().trust()
    lines: list[list[Any]] = [
        [
            digest,
            " ".join(c.campaign_id for c in campaigns.proposal(p.store, digest).campaigns) or "none",
            " ".join(campaigns.approved_by(p.store, digest, trust)),
        ]
        for digest in campaigns.proposals(p.store)
    ]
    rows(["proposal", "campaigns", "approved by"], lines, json)


@app.command()
def approve(digest: Digest, by: Annotated[str, typer.Option(help="Who approves.")] = "") -> None:
    """Approve a proposal with your key."""
    from flywheel import campaigns
    from flywheel.services.environment import publisher

    p = publisher()
    campaigns.approve(p, _whole(digest), by or getpass.getuser())
    console.print("approved; `flywheel campaigns publish` signs it for the robots")


@app.command()
def publish(digest: Digest) -> None:
    """Sign an approved proposal: robots take it at their next look."""
    from flywheel import campaigns
    from flywheel.services.environment import publisher

    signed = campaigns.publish(publisher(), _whole(digest))
    console.print(f"{len(signed.campaigns)} campaigns signed, approved by {', '.join(signed.approved_by)}")


def _whole(digest: str) -> str:
    from flywheel import campaigns
    from flywheel.services.environment import store

    found = [d for d in campaigns.proposals(store()) if d.startswith(digest)]
    if len(found) != 1:
        raise ConfigError(f"digest = {digest!r}: {len(found)} proposals begin so (`flywheel campaigns ls`)")
    return found[0]


def _plain(doc: Any) -> Any:
    """YAML's lists as the tuples that strict models want."""
    if isinstance(doc, list):
        return tuple(map(_plain, doc))
    return {k: _plain(v) for k, v in doc.items()} if isinstance(doc, dict) else doc
