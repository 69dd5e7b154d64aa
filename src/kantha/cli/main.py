"""The `kantha` command. Every subcommand is thin: it reads options, calls one room, prints, and sets the exit code."""

import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import typer.core
from rich.console import Console

from kantha import __version__
from kantha.cli.members import app as members
from kantha.errors import KanthaError, SpecError
from kantha.spec import PRESETS, dump_spec, load_spec


class _Commands(typer.core.TyperGroup):
    """Says that Ctrl-C stopped a command; Typer itself would end without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            Console(stderr=True, highlight=False).print("kantha: stopped", markup=False)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    help="Train a language model together, on everybody's spare compute.\n\n"
    "A volunteer needs one command: kantha join URL. An organizer needs three: kantha init, kantha create, "
    "kantha serve. "
    "To see all of it on this machine: kantha demo.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
_console = Console(highlight=False)


def _say(line: str) -> None:
    _console.print(line, markup=False, soft_wrap=True)


def _version(wanted: bool) -> None:
    if wanted:
        _say(f"kantha {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


def _preset(name: str) -> str:
    if name not in PRESETS:
        raise typer.BadParameter(f"{name!r} is none of: {', '.join(PRESETS)}")
    return name


Preset = Annotated[str, typer.Option(help=f"What to start from: {', '.join(PRESETS)}.", callback=_preset)]


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("run.yaml"),
    preset: Preset = "demo",
) -> None:
    """Write a run spec to start from, with a comment on every field."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(dump_spec(PRESETS[preset]))
    except FileExistsError:
        raise SpecError(str(path), ["exists already; give another name, or delete it first"]) from None
    except OSError as error:
        raise SpecError(str(path), [f"cannot be written ({error.strerror})"]) from None
    _say(f"wrote {path}. Next: edit it, then `kantha create {path} RUN_DIR`.")


@app.command()
def create(
    spec: Annotated[Path, typer.Argument(help="The run spec, a YAML file; `kantha init` writes one.")],
    run_dir: Annotated[Path, typer.Argument(help="The folder to make; everything about the run will be in it.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="A file that `kantha tokenizer train` wrote. Default: the tokenizer is trained now."),
    ] = None,
) -> None:
    """Create a run: train its tokenizer, freeze its spec, draw its keys and first weights."""
    from kantha.coordinator.rundir import RunDirectory

    run = RunDirectory.create(run_dir, load_spec(spec), _say, tokenizer)
    _say(f"created {run_dir}, fingerprint {run.spec.fingerprint[:16]}…. Next: `kantha serve {run_dir}`.")


@app.command()
def serve(
    run_dir: Annotated[Path, typer.Argument(help="The run's folder, made by `kantha create`.")],
    port: Annotated[
        int, typer.Option(min=0, max=65_535, help="TCP port of the run's page and API; 0 takes a free one.")
    ] = 8600,
    p2p_port: Annotated[
        int | None,
        typer.Option(min=0, max=65_535, help="TCP port of the swarm. By default the one used before, or a free one."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="IP address to listen on, page and swarm; 0.0.0.0: all of this machine's.")
    ] = "127.0.0.1",
    sign_in: Annotated[
        Literal["local", "huggingface"],
        typer.Option(
            help="Who may join. local: anybody on this machine, under any name; huggingface: whoever signs in there, "
            "and is let in by a moderator (docs/moderators.md)."
        ),
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="The run's link, as people open it: https://…, of the proxy on this machine that has the TLS. "
            "Default: http:// and where this listens.",
        ),
    ] = None,
    wandb: Annotated[
        str | None,
        typer.Option(
            metavar="PROJECT",
            help="Mirror the run's curves to this project at Weights & Biases, or ENTITY/PROJECT; `wandb login` first. "
            "Figures of whole rounds only, no names.",
        ),
    ] = None,
) -> None:
    """Serve a run: its page, its API, its place in the swarm. Ctrl-C stops it; a restart carries on."""
    from kantha.web.serve import serve as serve_run

    serve_run(run_dir, host, port, p2p_port, _say, sign_in, address, wandb)


@app.command()
def join(
    url: Annotated[
        str,
        typer.Argument(
            help="The run's link, as its page shows it. What follows # is the run's key; no other is believed."
        ),
    ],
    name: Annotated[
        str,
        typer.Option(
            help="Your name, as others will see it, in a run without sign-in. Default: your user name.",
            show_default=False,
        ),
    ] = "",
    token: Annotated[
        bool,
        typer.Option(
            "--token",
            help="Sign in without a browser: by a Hugging Face token of the type Read, from `hf auth login`, from "
            "HF_TOKEN, or asked for. It is sent once, over https, and not kept.",
        ),
    ] = False,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="End your other instances on this service (Kaggle, Colab, …) at once.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads to use. Default: all cores.")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Examples computed at once. Default: by the device.")
    ] = None,
    reachable: Annotated[
        bool | None,
        typer.Option(
            "--reachable/--outbound-only",
            help="Whether other peers may connect to this machine. Default: only on the coordinator's own.",
        ),
    ] = None,
) -> None:
    """Help a run with this machine, until Ctrl-C.

    Where people sign in, it shows a code and a link: open the link on any device, and it goes on by itself.
    """
    from kantha.volunteer.join import JoinOptions
    from kantha.volunteer.join import join as join_run

    outbound_only = None if reachable is None else not reachable
    join_run(url, JoinOptions(name, threads, micro_batch, outbound_only, token, take_over), _console)
    # all is handed in: to be asked to end while Python ends is no failure
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@app.command()
def anneal(
    run_dir: Annotated[Path, typer.Argument(help="The run's folder, made by `kantha create`.")],
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Over how many samples. Default: a quarter of those seen, a fifth of the whole."),
    ] = None,
    cancel: Annotated[
        bool, typer.Option("--cancel", help="Take it back, and go on at the full learning rate.")
    ] = False,
) -> None:
    """Bring a run to its end: the learning rate falls to zero, and then all volunteers leave.

    Most of the last gain comes in this phase, so leave time for it. The running swarm takes the order up by itself.
    """
    from kantha.coordinator.annealing import anneal_run

    anneal_run(run_dir, samples, cancel, _say)


@app.command()
def export(
    run_dir: Annotated[
        Path, typer.Argument(help="A run's folder (its newest checkpoint is taken), or a checkpoint's.")
    ],
    out: Annotated[Path, typer.Argument(help="The model folder to make.")],
) -> None:
    """Write the model in Hugging Face format, for plain transformers."""
    from kantha.cli.publish import export_run

    round_number = export_run(run_dir, out)
    _say(f'wrote {out}, the model after round {round_number}. Try: transformers.pipeline("fill-mask", "{out}")')


@app.command()
def publish(
    run_dir: Annotated[
        Path, typer.Argument(help="A run's folder (its newest checkpoint is taken), or a checkpoint's.")
    ],
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="The model's place on the Hugging Face hub; made if need be.")
    ],
    public: Annotated[bool, typer.Option("--public", help="Show it to everybody. Default: only you see it.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Where the folder is made that is uploaded. Default: published, in RUN_DIR.")
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(help="Scores for the model's card, as `kantha evaluate --json` writes them.")
    ] = None,
) -> None:
    """Put the model with a card on the Hugging Face hub; run it again to go on where it broke off.

    The token is taken from `hf auth login` or the variable HF_TOKEN.
    """
    from kantha.cli.publish import publish_run

    publish_run(run_dir, repository, public, out, scores, _say)


@app.command()
def evaluate(
    model: Annotated[
        str,
        typer.Argument(help="A run's or a checkpoint's folder, a model folder, or a name on the Hugging Face hub."),
    ],
    tasks: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TASK]...",
            help="mlm and sop (masked tokens, sentence order), which need no fine-tuning; topic=DATA; ner=DATA. "
            "DATA is sib200 or indicglue for topic, wikiann for ner, or files: TRAIN,TEST or TRAIN,DEV,TEST, "
            ".jsonl with text and label for topic, .conll with a word and its IOB2 tag for ner. Default: mlm sop.",
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text for mlm and sop, .txt or .jsonl. Default: the run's held-out documents.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many times to fine-tune, each time with another seed.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs at most; it ends earlier when dev data say so.")] = 20,
    learning_rate: Annotated[
        float | None,
        typer.Option(min=1e-8, help="At its peak. Default: 5e-5 times 768, divided by the model's width."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Examples in a step.")] = 16,
    report: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file, as JSON.")] = None,
) -> None:
    """Measure a model: what it learned, and how well it can be fine-tuned, with baselines beside it.

    Examples: kantha evaluate my-run · kantha evaluate my-run topic ner ·
    kantha evaluate model ner=train.conll,test.conll topic=train.jsonl,dev.jsonl,test.jsonl --seeds 5
    """
    from kantha.cli.evaluate import show_evaluation
    from kantha.evaluation.finetune import Settings

    settings = Settings(seeds, epochs, batch, learning_rate)
    show_evaluation(model, tasks or ["mlm", "sop"], text, settings, report, _console)


@app.command("rotate-key")
def rotate_key(run_dir: Annotated[Path, typer.Argument(help="The run's folder, made by `kantha create`.")]) -> None:
    """Give a run another key, as after a theft. The old one is good for 15 more minutes, and is kept beside it.

    A run that is served takes it up by itself: its members get new certificates, and nobody has to join again.
    """
    from kantha.coordinator.rundir import RunDirectory

    change = RunDirectory.open(run_dir).rotate_key()
    _say(f"the run's key is {change.new} now; a coordinator that serves {run_dir} takes it up within seconds")
    _say(f"certificates by the old key end at {datetime.fromtimestamp(change.old_until).astimezone():%H:%M}: serve it")


@app.command("verify-certificate")
def verify_certificate(
    file: Annotated[Path, typer.Argument(help="A certificate of contribution, SVG or JSON.")],
    link: Annotated[
        str | None,
        typer.Option(
            metavar="URL#KEY",
            help="The run's link, as its page shows it, to prove that the key is that run's. The run is asked only "
            "where its key has changed since.",
        ),
    ] = None,
) -> None:
    """Check a certificate of contribution, and say what it proves."""
    from kantha.cli.verify import verify_certificate as verify

    verify(file, link, _say)


app.add_typer(members, name="members")
corpus = typer.Typer(help="Look at a run's text.", no_args_is_help=True)
app.add_typer(corpus, name="corpus")


@corpus.command()
def inspect(
    run_dir: Annotated[Path, typer.Argument(help="A run's folder, as `kantha create` makes it.")],
    examples: Annotated[int, typer.Option(min=0, help="How many finished examples to show.")] = 10,
    documents: Annotated[int, typer.Option(min=1, help="How many documents to read and count, at least.")] = 5_000,
    seed: Annotated[int, typer.Option(min=0, help="Another seed walks another way through the data.")] = 0,
) -> None:
    """Show finished training examples, and say what was held out, dropped and lost."""
    from kantha.cli.corpus import inspect_corpus

    inspect_corpus(run_dir, examples, documents, seed, _console)


tokenizer = typer.Typer(help="Make a run's tokenizer.", no_args_is_help=True)
app.add_typer(tokenizer, name="tokenizer")


@tokenizer.command()
def train(
    spec: Annotated[Path, typer.Argument(help="The run spec, a YAML file; `kantha init` writes one.")],
    out: Annotated[Path, typer.Argument(help="The tokenizer.json to write.")],
    compare: Annotated[
        list[Path] | None,
        typer.Option(help="Another tokenizer.json, to be measured on the same text. Repeatable."),
    ] = None,
) -> None:
    """Train a run's tokenizer before the run is created, and say how well it fits text that it has not seen.

    Only `tokenizer`, `data`, `language` and `seed` of the run spec matter. The text is the held-out documents of its
    sources. Try several sizes (`tokenizer.vocab_size`), then `kantha create SPEC RUN_DIR --tokenizer OUT`, which gives
    the same tokenizer that `kantha create` alone trains.
    """
    from kantha.cli.tokenizer import train_and_measure

    train_and_measure(spec, out, compare or [], _console)


@app.command()
def simulate(
    spec: Annotated[str, typer.Argument(help=f"A run spec, a YAML file, or one of: {', '.join(PRESETS)}.")],
    group: Annotated[
        list[str] | None,
        typer.Option(help="Volunteers, as COUNTxSPEED@MBIT: 20x8@50 are 20 of 8 samples/s on 50 Mbit/s. Repeatable."),
    ] = None,
    session_hours: Annotated[float, typer.Option(min=0.1, help="How long a volunteer stays, on average.")] = 4.0,
    outbound_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of volunteers that nobody can connect to.")
    ] = 0.5,
    coordinator_mbit: Annotated[float, typer.Option(min=0.1, help="The coordinator's link, each way.")] = 100.0,
    hours: Annotated[float, typer.Option(min=0.05, max=240.0, help="Virtual hours to run.")] = 0.25,
    seed: Annotated[int, typer.Option(min=0, help="Of links' delays, sessions and who can be reached.")] = 0,
) -> None:
    """Say what a population of volunteers makes of a run, and from which size on it breaks; nothing is trained."""
    from kantha.cli.simulate import show_plan

    chosen = PRESETS[spec] if spec in PRESETS else load_spec(Path(spec))
    show_plan(chosen, group or ["40x8@20"], session_hours, outbound_share, coordinator_mbit, hours, seed, _console)


@app.command()
def demo(
    volunteers: Annotated[int, typer.Option(min=1, max=16, help="How many volunteers take part.")] = 3,
    minutes: Annotated[float, typer.Option(min=0.5, help="How long they train.")] = 5.0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the run, the model and the logs. Default: a new demo-run.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write the figures to this file, as JSON.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="TCP port of the run's page; 0 takes a free one.")] = 0,
    preset: Preset = "demo",
) -> None:
    """All of it on this machine: a coordinator and volunteers train a small model for some minutes."""
    from kantha.cli.demo import run_demo

    run_demo(volunteers, minutes, out, report, port, preset, _console)


def main() -> None:
    """Entry point: runs the command, turns errors into one line on stderr and an exit code."""
    try:
        app()
    except KanthaError as error:
        Console(stderr=True, highlight=False).print(f"kantha: {error}", markup=False, soft_wrap=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
