"""`kantha members`: who may join a run. All of it is also done while the run is served; nothing is restarted."""

import sys
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from kantha.errors import MembershipError

if TYPE_CHECKING:
    from kantha.coordinator.allowlist import Action, Allowlist
    from kantha.coordinator.rundir import RunDirectory

_ORGANIZER = "the organizer"  # who decides on the command line; with a blank, which no username has
_MOST_LIST = 1024 * 1024  # bytes of a list of names
_console = Console(highlight=False)

app = typer.Typer(
    help="Say who may join a run: kantha members RUN_DIR COMMAND …\n\nA run that is served takes it up at once. "
    "Moderators do the same on the run's page, at the desk.",
    no_args_is_help=True,
)

Names = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="NAME", help="Usernames on Hugging Face, or names in a run without sign-in.", show_default=False
    ),
]
FromFile = Annotated[
    str | None,
    typer.Option(
        "--from", metavar="FILE", help="A list: one name a line, or a CSV with a column `username`. - is stdin."
    ),
]
Reason = Annotated[str, typer.Option(help="Why, in a sentence; that person is told.", show_default=False)]
Remove = Annotated[bool, typer.Option("--remove", help="Take it back.")]


@app.callback()
def _open(
    context: typer.Context, run_dir: Annotated[Path, typer.Argument(help="The run's folder, made by `kantha create`.")]
) -> None:
    context.obj = run_dir


@app.command("list")
def list_people(
    context: typer.Context,
    state: Annotated[
        str | None, typer.Option(help="Only those who are: new, asked, approved, refused, suspended or banned.")
    ] = None,
) -> None:
    """Show people and where they stand; who changed last comes first."""
    from kantha.coordinator.allowlist import State

    if state is not None and state not in list(State):
        raise typer.BadParameter(f"{state!r} is none of: {', '.join(State)}", param_hint="--state")
    allowlist = _allowlist(_run(context))
    shown = 0
    while page := allowlist.people(State(state) if state else None, limit=500, offset=shown):
        for person in page:
            reason = f": {person.reason}" if person.reason else ""
            by = f", by {person.by}" if person.by else ""
            moderator = ", moderator" if person.is_moderator else ""
            sign = person.state.sign or "  "
            _say(f"{sign} {person.state:<9}  {person.username}  since {_when(person.since)}{by}{moderator}{reason}")
        shown += len(page)
    counts = ", ".join(f"{number} {each}" for each, number in sorted(allowlist.count().items()))
    _say(f"{_people(shown)} shown; in all: {counts or 'nobody'}")


@app.command()
def approve(context: typer.Context, names: Names = None, list_: FromFile = None) -> None:
    """Let people in, also before they ask."""
    _decide(context, "approve", names, list_, "")


@app.command()
def refuse(context: typer.Context, reason: Reason, names: Names = None, list_: FromFile = None) -> None:
    """Do not let people in."""
    _decide(context, "refuse", names, list_, reason)


@app.command()
def suspend(context: typer.Context, reason: Reason, names: Names = None, list_: FromFile = None) -> None:
    """Keep people out for a while: their machines end within two minutes. `approve` takes it back."""
    _decide(context, "suspend", names, list_, reason)


@app.command()
def ban(context: typer.Context, reason: Reason, names: Names = None, list_: FromFile = None) -> None:
    """Keep people out for good: their machines end within two minutes. `approve` takes this back, too."""
    _decide(context, "ban", names, list_, reason)


@app.command()
def forget(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Username.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Drop all that is known of somebody who asks for it: account, names, team, machines. Their samples stay, under
    nobody's name. People can do it themselves on their own page; nothing brings it back."""
    from kantha.coordinator.allowlist import Allowlist
    from kantha.coordinator.database import open_database
    from kantha.coordinator.polls import Polls

    run = _run(context)
    database = open_database(run)
    allowlist = Allowlist(database, accounts_key=run.accounts_key())
    profile = allowlist.profile(name)
    if not yes and not typer.confirm(f"Forget {profile.username} for good?"):
        raise typer.Exit(1)
    # what is forgotten of votes does not depend on who may vote, so not on how people sign in either
    Polls(database, allowlist, "local").forget(profile.number)
    allowlist.forget(profile.username)
    _say(f"forgotten; the samples stay under the number {profile.number}, and nobody's name")


@app.command()
def moderator(
    context: typer.Context, name: Annotated[str, typer.Argument(help="Username.")], remove: Remove = False
) -> None:
    """Let somebody decide about others, on the run's page."""
    standing = _allowlist(_run(context)).set_moderator(name, not remove, _ORGANIZER)
    _say(f"{standing.username} is {'no moderator any more' if remove else 'a moderator'}")


@app.command()
def rule(
    context: typer.Context,
    organisation: Annotated[str, typer.Argument(help="An organisation on the Hugging Face hub.")],
    remove: Remove = False,
) -> None:
    """Let members of an organisation in when they sign in, unless somebody decided otherwise about them."""
    allowlist = _allowlist(_run(context))
    allowlist.set_rule(organisation, not remove, _ORGANIZER)
    _say(f"approved when they sign in: members of {', '.join(allowlist.rules()) or 'no organisation'}")


@app.command()
def log(
    context: typer.Context, limit: Annotated[int, typer.Option(min=1, help="How many decisions, newest first.")] = 50
) -> None:
    """Show who decided what when."""
    decisions = _allowlist(_run(context)).log(limit)
    for decision in decisions:
        reason = f": {decision.reason}" if decision.reason else ""
        _say(f"{_when(decision.time)}  {decision.by}  {decision.action}  {decision.username}{reason}")
    _say(f"{len(decisions)} decision{'s' * (len(decisions) != 1)} shown")


@app.command()
def leases(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Only this person's.", show_default=False)] = None,
) -> None:
    """Show which machines are at work, or were within the last three minutes."""
    from kantha.coordinator.allowlist import Allowlist
    from kantha.coordinator.database import open_database
    from kantha.coordinator.leases import instances

    database = open_database(_run(context))
    allowlist = Allowlist(database)
    with database.reading() as session:
        person = allowlist.number(session, name) if name is not None else None
        found = instances(session, allowlist.numbers(session), person)
    for each in found:
        label = f"  {each.label}" if each.label else ""
        _say(f"{each.username}  {each.service}{label}  since {_when(each.since)}  {each.peer_id}")
    _say(f"{len(found)} machine{'s' * (len(found) != 1)} with a lease")


def _decide(context: typer.Context, action: "Action", names: list[str] | None, list_: str | None, reason: str) -> None:
    from kantha.coordinator.allowlist import parse_names

    usernames = list(names or ())
    if list_ is not None:
        usernames += parse_names(_read(list_))
    if not usernames:
        raise typer.BadParameter("give usernames, or a list with --from", param_hint="NAME")
    standings = _allowlist(_run(context)).decide(usernames, action, _ORGANIZER, reason)
    shown = ", ".join(standing.username for standing in standings[:10]) + (" …" if len(standings) > 10 else "")
    _say(f"{standings[0].state}: {_people(len(standings))} ({shown})")


def _read(path: str) -> str:
    try:
        with nullcontext(sys.stdin.buffer) if path == "-" else Path(path).open("rb") as file:
            content = file.read(_MOST_LIST + 1)
        if len(content) > _MOST_LIST:
            raise MembershipError(f"{path}: larger than {_MOST_LIST:,} bytes; give it in several lists")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise MembershipError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise MembershipError(f"{path}: is not UTF-8 text; save it as that") from None


def _run(context: typer.Context) -> "RunDirectory":
    from kantha.coordinator.rundir import RunDirectory

    return RunDirectory.open(context.obj)


def _allowlist(run: "RunDirectory") -> "Allowlist":
    from kantha.coordinator.allowlist import Allowlist
    from kantha.coordinator.database import open_database

    return Allowlist(open_database(run), accounts_key=run.accounts_key())


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")


def _people(number: int) -> str:
    return f"{number} {'person' if number == 1 else 'people'}"


def _say(line: str) -> None:
    _console.print(line, markup=False, soft_wrap=True)
