"""The command line: flags in, results on stdout, progress on stderr, exit codes. Everything else is imported late.

Exit codes: 0 done, 1 a fault of ours, 2 the user's mistake (one sentence on stderr, nothing written), 130 interrupted.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.config import default, field_docs, flag, is_flag, metavar
from trimtab.errors import UserError
from trimtab.settings import TrainSettings

if TYPE_CHECKING:
    from rich.table import Table

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130
_VERBOSE = "TRIMTAB_VERBOSE"
NEW_TOKENS = 128
"""Tokens that `trimtab generate` writes at most where neither it nor the run says otherwise."""
WIDTH = 120
"""Columns of a table where stdout is no terminal."""

_GO_ON = {
    "train": "; go on with the same command and --resume",
    "compare": "; what is finished is kept, go on with the same command",
    "search": "; finished trials are kept, go on with the same command",
}
"""What an interrupted command says."""

ABOUT = "Tune a large frozen language model by training a few small tensors."

app = typer.Typer(
    name="trimtab",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich would double the time that --help takes
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDTH},
)

Folder = Annotated[
    Path,
    typer.Argument(
        metavar="DIR", help="Output folder of `trimtab train`, or OWNER/NAME[@REVISION] on the hub.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
NewTokens = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Tokens to generate at most; default: as the run.")
]
Beams = Annotated[
    int | None, typer.Option("--beams", metavar="N", help="Beams of the search for a text; default: as the run.")
]
Penalty = Annotated[
    float | None, typer.Option(metavar="X", help="Beams are ranked by log p / length^X; default: as the run.")
]
Repeats = Annotated[
    int | None, typer.Option(metavar="N", help="No n-gram of this length twice (0: any); default: as the run.")
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the libraries' own messages, and tracebacks.")]


def main() -> None:
    """The `trimtab` command."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        import trimtab

        print(trimtab.__version__)
        raise typer.Exit


@app.callback(help=ABOUT)
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What may stand before a command."""


# -- what every command does --------------------------------------------------------------------------------------


def command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a command whose mistakes end in one sentence and whose libraries keep quiet, unless --verbose."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def guarded(*args: Any, verbose: bool = False, **options: Any) -> None:
            os.environ[_VERBOSE] = "1" if verbose else ""
            try:
                function(*args, **options)
            except (UserError, OSError) as error:
                if verbose:
                    raise
                _fail(error)
            except KeyboardInterrupt as stop:
                again = _GO_ON.get(name, "")
                _say(f"interrupted{f', {stop}' if str(stop) else ''}{again}")
                raise typer.Exit(EXIT_INTERRUPTED) from None

        signature = inspect.signature(function, eval_str=True)
        extra = inspect.Parameter("verbose", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Verbose)
        _set_signature(guarded, [*signature.parameters.values(), extra])
        app.command(name)(guarded)
        return guarded

    return register


def _set_signature(function: Any, parameters: list[inspect.Parameter]) -> None:
    """What typer makes the options from."""
    function.__signature__ = inspect.Signature(parameters)
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def _fail(error: Exception) -> None:
    if isinstance(error, BrokenPipeError):  # the reader of our stdout has gone, e.g. `trimtab methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    if isinstance(error, OSError) and error.strerror:
        _say(f"error: {error.strerror}: {error.filename}" if error.filename else f"error: {error.strerror}")
    else:
        for line in str(error).splitlines() or [type(error).__name__]:
            _say(f"error: {line}")
    raise typer.Exit(EXIT_MISTAKE) from None


def _say(text: str) -> None:
    """One line for people, beside the results."""
    print(text, file=sys.stderr, flush=True)


def _hush_libraries() -> None:
    """Keeps the libraries' notes to programmers off the terminal, unless --verbose; the bars of downloads stay."""
    if os.environ.get(_VERBOSE):
        return
    import logging
    import warnings

    warnings.filterwarnings("ignore", module=r"(torch|transformers|datasets|accelerate|huggingface_hub)\b")
    for name in ("torch", "transformers", "datasets", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    import datasets
    import huggingface_hub.utils
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    huggingface_hub.utils.logging.set_verbosity_error()
    bars = huggingface_hub.utils
    bars.enable_progress_bars() if sys.stderr.isatty() else bars.disable_progress_bars()


def _show(table: Table) -> None:
    from rich.console import Console

    console = Console()
    console.print(table) if console.is_terminal else Console(width=WIDTH).print(table)


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2))


# -- train --------------------------------------------------------------------------------------------------------


def train(run_file: Path | None, assignments: list[str] | None, **flags: Any) -> None:
    """Tune a model on data.

    Writes the adapter, a model card, metrics and curves into a folder. Settings come from run.yaml, --set and flags;
    the later one wins. A finished run's run.yaml starts the same run again.
    """
    from trimtab.config import resolve
    from trimtab.report import findings, read_run, result_table, size_line

    repo = flags.pop("push")
    settings = resolve(run_file or _begun(flags), assignments or (), flags)
    _hush_libraries()
    from trimtab.hub import check_push, push
    from trimtab.train import fine_tune

    if repo is not None:
        check_push(repo, settings.model, f"train without --push, then trimtab push {settings.output} {repo} --base …")
    fine_tune(settings)
    facts = read_run(settings.output)
    _show(result_table(facts))
    print(*findings(facts), size_line(facts), settings.output, sep="\n")
    if repo is not None:
        print(push(settings.output, repo))


def _begun(flags: dict[str, Any]) -> Path | None:
    """The settings that a run to be resumed began with, so that --resume --output DIR is enough."""
    path = Path(flags["output"] or "").expanduser() / "run.yaml"
    return path if flags["resume"] and flags["output"] and path.is_file() else None


def _train_parameters() -> list[inspect.Parameter]:
    """run.yaml, one option a setting (its help is the text under the field), and --set."""
    file = Annotated[
        Path | None, typer.Argument(metavar="run.yaml", help="Settings to start from.", show_default=False)
    ]
    pairs = Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting; may be repeated.")
    ]
    repo = Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Put the result on the Hugging Face Hub, with its card.")
    ]
    return [
        _optional("run_file", file),
        *(_optional(name, _option_of(name, text)) for name, text in field_docs(TrainSettings).items()),
        _optional("assignments", pairs),
        _optional("push", repo),
    ]


def _optional(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=annotation)


def _option_of(name: str, text: str) -> Any:
    """Values stay text here, so that all mistakes can be told at once."""
    if is_flag(name):
        return Annotated[bool | None, typer.Option(flag(name), help=text, show_default=False)]
    shown = "" if default(name) is None else f" [default: {default(name)}]"
    return Annotated[str | None, typer.Option(flag(name), metavar=metavar(name), help=text + shown, show_default=False)]


_set_signature(train, _train_parameters())
command("train")(train)


# -- compare ------------------------------------------------------------------------------------------------------

_NOT_COMPARED = (
    *("method", "lr", "name", "resume", "overwrite", "save_steps", "cache", "report_to"),
    *("image_column", "stage_column"),
)
"""Settings that a comparison chooses or has no use for."""


def compare(**flags: Any) -> None:
    """Train methods alike on the same rows and say which to take.

    Learning rates are chosen on a development split, the test rows are scored once. Writes report.html, results.json,
    results.csv and every adapter; the same command goes on where it was stopped.
    """
    from trimtab.config import resolve

    own = {name: flags.pop(name) for name in ("seeds", "minutes", "objective", "dev_share")}
    methods, factors = flags.pop("methods"), flags.pop("lr_factors")
    settings = resolve(None, (), flags)
    from trimtab.methods.spec import split_methods

    listed = split_methods(methods) if methods.strip() else []
    _hush_libraries()
    from trimtab.comparison.report import REPORT, failures, table
    from trimtab.comparison.steps import compare as run

    found = run(settings, listed, factors=_numbers("--lr-factors", factors), **own)
    _show(table(found))
    for line in failures(found):
        print(f"failed  {line}")
    print(found.recommendation, Path(found.folder) / REPORT, sep="\n")


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} must be numbers with commas between them, not {text!r}") from None


def _compare_parameters() -> list[inspect.Parameter]:
    """The comparison's own options, and those settings of a run that all methods share."""
    methods = Annotated[str, typer.Option(metavar="METHOD,…", help="The methods to compare.", show_default=False)]
    seeds = Annotated[int, typer.Option(metavar="N", help="Runs of each method with the chosen learning rate.")]
    minutes = Annotated[
        float | None,
        typer.Option(metavar="N", help="Minutes for everything; every run gets the same seconds, at most --epochs."),
    ]
    objective = Annotated[
        str | None, typer.Option(metavar="METRIC", help="What decides; default: the task's first metric.")
    ]
    dev = Annotated[float, typer.Option(metavar="X", help="Share of the training rows to choose learning rates by.")]
    factors = Annotated[
        str, typer.Option(metavar="X,…", help="Learning rates to try, as multiples of each method's default.")
    ]
    shared = [(name, text) for name, text in field_docs(TrainSettings).items() if name not in _NOT_COMPARED]
    return [
        _keyword("methods", methods),
        _keyword("seeds", seeds, 3),
        _keyword("minutes", minutes, None),
        _keyword("objective", objective, None),
        _keyword("dev_share", dev, 0.1),
        _keyword("lr_factors", factors, "0.333,1,3"),
        *(_keyword(name, _option_of(name, text), None) for name, text in shared),
    ]


def _keyword(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


_set_signature(compare, _compare_parameters())
command("compare")(compare)


# -- search -------------------------------------------------------------------------------------------------------


def search(**flags: Any) -> None:
    """Look for the architecture that fits a task: which methods, of which size, in which layers.

    Trials are scored on a development split; the best ones are trained again with several seeds and scored once on the
    test rows. Writes report.html, results.json, the adapters and the best one; the same command goes on.
    """
    from trimtab.config import resolve

    names = ("trials", "minutes", "objective", "storage", "seeds", "points", "max_share", "dev_share")
    own = {name: flags.pop(name) for name in (*names, "sampler", "worker")}
    methods, only_describe = flags.pop("methods"), flags.pop("describe")
    if methods is not None:
        own["methods"] = [part.strip() for part in methods.split(",") if part.strip()]
    settings = resolve(None, (), {"output": "described", **flags} if only_describe and not flags["output"] else flags)
    _hush_libraries()
    from trimtab.searching.steps import describe
    from trimtab.searching.steps import search as run

    if only_describe:
        shown = ("objective", "methods", "trials", "minutes", "seeds", "points")
        print(*describe(settings, **{name: own[name] for name in shown if name in own}), sep="\n")
        return
    found = run(settings, **own)
    if found is None:
        return
    from trimtab.comparison.report import REPORT, failures, table
    from trimtab.searching.report import front_table

    _show(front_table(found))
    _show(table(found.comparison))
    for line in failures(found.comparison):
        print(f"failed  {line}")
    print(found.recommendation, *([found.adapter] if found.adapter else []), Path(found.folder) / REPORT, sep="\n")


def _search_parameters() -> list[inspect.Parameter]:
    """The search's own options, and those settings of a run that all trials share."""
    own: list[tuple[str, Any, Any]] = [
        ("trials", Annotated[int | None, typer.Option(metavar="N", help="Trials of the study in all.")], None),
        ("minutes", Annotated[float | None, typer.Option(metavar="N", help="Minutes for everything.")], None),
        (
            "objective",
            Annotated[
                str | None,
                typer.Option(metavar="NAME,…", help="One metric, and parameters, seconds; default: METRIC,parameters."),
            ],
            None,
        ),
        (
            "storage",
            Annotated[
                str | None,
                typer.Option(metavar="URL", help="Journal file or database that several processes share."),
            ],
            None,
        ),
        (
            "worker",
            Annotated[bool, typer.Option("--worker", help="Only add trials to the study in --storage.")],
            False,
        ),
        ("seeds", Annotated[int, typer.Option(metavar="N", help="Runs of each architecture trained again.")], 3),
        ("points", Annotated[int, typer.Option(metavar="N", help="Architectures trained again at most.")], 4),
        (
            "max_share",
            Annotated[
                float | None, typer.Option(metavar="X", help="Largest share of the parameters that may be trained.")
            ],
            None,
        ),
        (
            "methods",
            Annotated[
                str | None, typer.Option(metavar="METHOD,…", help="Members of the space; default: all that fit.")
            ],
            None,
        ),
        ("dev_share", Annotated[float, typer.Option(metavar="X", help="Share of the training rows to score by.")], 0.2),
        ("sampler", Annotated[str, typer.Option(metavar="NAME", help="nsga2, tpe, gp or random.")], "tpe"),
        (
            "describe",
            Annotated[bool, typer.Option("--describe", help="Print the space and its size, and run nothing.")],
            False,
        ),
    ]
    shared = [(name, text) for name, text in field_docs(TrainSettings).items() if name not in _NOT_COMPARED]
    return [
        *(_keyword(name, annotation, value) for name, annotation, value in own),
        *(_keyword(name, _option_of(name, text), None) for name, text in shared),
    ]


_set_signature(search, _search_parameters())
command("search")(search)


# -- using a run --------------------------------------------------------------------------------------------------


@command("eval")
def eval_(
    folder: Folder,
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Rows to evaluate on; default: those the run held out.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Use a random sample of at most this many rows.")
    ] = None,
    every_row: Annotated[
        bool, typer.Option("--every-row", help="Do not leave out the rows that the run trained on.")
    ] = False,
    num_beams: Beams = None,
    length_penalty: Penalty = None,
    no_repeat_ngram_size: Repeats = None,
    max_new_tokens: NewTokens = None,
    as_json: Json = False,
) -> None:
    """Evaluate a run's adapter on a fresh base.

    Without --data on the rows that the run held out: the numbers of its metrics.json. Texts are looked for as the run
    did, unless another search is given.
    """
    _hush_libraries()
    from trimtab.tuned import evaluate_run, is_own_data

    if data is not None and not every_row and is_own_data(folder, data):
        _say("these are the run's own data: evaluating on the rows that it held out (--every-row takes all)")
        data = None
    metrics = evaluate_run(
        folder,
        data,
        limit_rows=limit,
        num_beams=num_beams,
        length_penalty=length_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        max_new_tokens=max_new_tokens,
    )
    if as_json:
        return _print_json(metrics)
    for name, value in metrics.items():
        print(f"{name:10} {value:.6g}")


@command("generate")
def generate(
    folder: Folder,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The text; the run's template is put around it.")
    ] = None,
    image: Annotated[str | None, typer.Option(metavar="FILE", help="The picture, of a run that looks at some.")] = None,
    max_new_tokens: NewTokens = None,
    num_beams: Beams = None,
    length_penalty: Penalty = None,
    no_repeat_ngram_size: Repeats = None,
    choice: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="One of the texts to choose from (task choose); repeat for each."),
    ] = None,
    context: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The text in which the answer stands (task span).")
    ] = None,
) -> None:
    """Answer a prompt, or about a picture, with a run's adapter.

    A classifier answers with the label, a regression with the number, a tagger with a line for each word (they stand
    between spaces), the task choose with one of the --choice texts, and the task span with a piece of the --context.
    """
    _hush_libraries()
    from trimtab.tuned import ask, load_run

    run = load_run(folder).searching(
        num_beams=num_beams, length_penalty=length_penalty, no_repeat_ngram_size=no_repeat_ngram_size
    )
    print(ask(run, prompt, max_new_tokens or run.max_new_tokens or NEW_TOKENS, choice or (), image, context))


@command("merge")
def merge(
    folders: Annotated[
        list[str],
        typer.Argument(metavar="DIR…", help="One output folder, or several LoRA adapters to sum.", show_default=False),
    ],
    output: Annotated[Path, typer.Option(metavar="DIR2", help="Folder to write into.", show_default=False)],
    dtype: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="float32, float16 or bfloat16 for the merged weights; default: the run's."),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest file of the merged model, e.g. 5GB; default: 50GB.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="X,…", help="Sum LoRAs instead: a weight for each; the sum is a LoRA, too.")
    ] = None,
    how: Annotated[
        str | None,
        typer.Option(
            "--combine",
            metavar="WAY",
            help="How to sum: linear (default), cat, svd, ties, dare_linear, dare_ties, ties_svd, dare_linear_svd or "
            "dare_ties_svd.",
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(metavar="N", help="Rank of a sum that ends in an SVD.")] = None,
    density: Annotated[float | None, typer.Option(metavar="X", help="Share that ties and dare keep.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of what dare keeps.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder has.")] = False,
) -> None:
    """Write an adapter into the base's weights, or several LoRAs into one.

    A merged model is an ordinary model folder; it is written only if its logits are those of the adapter. With
    --weights the LoRAs' weighted sum is written as an adapter folder.
    """
    _check_merge(folders, weights, how, rank, density, dtype, max_shard_size)
    _hush_libraries()
    if weights is None:
        from trimtab.merging import SHARD, merge_run

        merge_run(folders[0], output, dtype=dtype, max_shard_size=max_shard_size or SHARD, overwrite=overwrite)
    else:
        from trimtab.combining import combine

        shares, options = _numbers("--weights", weights), {"rank": rank, "density": density, "seed": seed}
        combine(folders, shares, output, how=how or "linear", **options, overwrite=overwrite)  # type: ignore[arg-type]
    print(output)


def _check_merge(folders: list[str], weights: str | None, *options: Any) -> None:
    """Raises UserError for options of the one kind of merging with the other."""
    *of_sums, dtype, size = options
    if weights is None and (len(folders) > 1 or any(one is not None for one in of_sums)):
        raise UserError("a sum of LoRAs needs --weights, one for each adapter; without it one adapter is merged")
    if weights is not None and (dtype is not None or size is not None):
        raise UserError("--dtype and --max-shard-size belong to a merged model, and a sum of LoRAs is an adapter")


@command("convert")
def convert(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="An adapter folder of trimtab, peft or adapters.", show_default=False)
    ],
    output: Annotated[Path, typer.Option(metavar="DIR2", help="Folder to write into.", show_default=False)],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="What to write: trimtab, peft or adapters.")] = "trimtab",
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The base model; default: the one that the folder names.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder has.")] = False,
) -> None:
    """Turn an adapter of another library into one of trimtab, or the other way round.

    The same logits come out on both sides; what one of them cannot express is refused.
    """
    _hush_libraries()
    from trimtab.conversion import convert

    print(convert(folder, output, to=to, model=model, overwrite=overwrite))


@command("push")
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run's or an adapter's folder.", show_default=False)],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Where to put it.", show_default=False)],
    base: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Where the base is on the hub, if the folder cannot say.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Put an adapter on the Hugging Face Hub, with a model card.

    The login is huggingface_hub's own (hf auth login, or HF_TOKEN). Checkpoints and logs stay here.
    """
    _hush_libraries()
    from trimtab.hub import push

    print(push(folder, repo, base=base, private=private))


@command("demo")
def demo(
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write into.")] = Path("demo-output"),
) -> None:
    """Tune a small model on headlines, in minutes."""
    _hush_libraries()
    from trimtab.demo import run_demo

    run_demo(output)


# -- methods and inspect ------------------------------------------------------------------------------------------


@command("methods")
def methods(
    as_json: Json = False,
    everything: Annotated[
        bool, typer.Option("--all", help="List every method of the installed peft, too, and whether it works here.")
    ] = False,
) -> None:
    """List the methods and what they cost."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from trimtab.arch import FAMILIES

    described = describe_methods()
    borrowed, note = list_borrowed() if everything else ([], "")
    if as_json:
        return _print_json([*described, *borrowed])
    table = Table("name", "what it trains", "parameters", "merges", "families", box=SIMPLE_HEAD)
    for one in described:
        merges = "yes" if one["mergeable"] else "no"
        families = "all" if set(one["families"]) == set(FAMILIES) else ", ".join(one["families"])
        cells = (one["name"], f"{one['summary']} {one['paper']}", one["formula"], merges, families)
        table.add_row(*(escape(cell) for cell in cells))
    _show(table)
    print(f"families: {', '.join(FAMILIES)}")
    if borrowed:
        table = Table("peft's method", "works", "merges", "why not", box=SIMPLE_HEAD)
        for one in borrowed:
            answers = ["not known" if one[key] is None else "yes" if one[key] else "no" for key in ("works", "merges")]
            table.add_row(escape(one["name"]), *answers, escape(one["why"]))
        _show(table)
        print(note)


def list_borrowed() -> tuple[list[dict[str, Any]], str]:
    """The methods of the installed peft, and which peft they were tried with."""
    from trimtab.methods.borrowed import listed

    return listed()


def describe_methods() -> list[dict[str, Any]]:
    """What each method says about itself, and the families it works on."""
    from trimtab.arch import FAMILIES, supports
    from trimtab.methods import METHODS

    return [
        {
            "name": name,
            "summary": (cls.__doc__ or "").strip().partition("\n")[0],
            "paper": cls.paper,
            "formula": cls.formula,
            "kinds": sorted(cls.kinds),
            "families": [family.name for family in FAMILIES.values() if supports(cls.kinds, family)],
            "mergeable": cls.mergeable,
            "lr": cls.lr,
            "fields": _describe_fields(cls),
        }
        for name, cls in METHODS.items()
    ]


def _describe_fields(cls: Any) -> list[dict[str, Any]]:
    import dataclasses

    docs = field_docs(cls)
    return [
        {
            "name": one.name,
            "type": str(one.type),
            "default": None if one.default is dataclasses.MISSING else one.default,
            "help": docs.get(one.name, ""),
        }
        for one in dataclasses.fields(cls)
    ]


@command("inspect")
def inspect_(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A folder of trimtab, peft or adapters, or a folder of them.", show_default=False
        ),
    ],
    as_json: Json = False,
) -> None:
    """Show what an adapter's folder holds.

    Of a folder of such folders, a table. No model is loaded.
    """
    from trimtab.inspection import look
    from trimtab.report import run_folders, runs_table

    if not folder.exists():
        _hush_libraries()
        from trimtab.hub import at_hand

        folder = at_hand(folder)
    folders = run_folders(folder)
    alone = folders == [folder]
    found = [look(one) for one in folders]
    if as_json:
        return _print_json(found[0] if alone else found)
    if not alone:
        return _show(runs_table(found))
    _print_folder(found[0])


def _print_folder(found: dict[str, Any]) -> None:
    """One folder as `look` (inspection.py) found it."""
    from trimtab.inspection import OURS, settings_text
    from trimtab.report import findings, read_run, result_table, size_line

    ours = found["library"] == OURS
    lines = [
        ("method", found["method"] if ours else f"{found['kind']} of {found['library']}; here {found['method']}"),
        ("with", "" if ours else settings_text(found["fields"])),
        ("base", found["base"]),
        ("data", (found["data"] or "–") if ours else ""),
        ("task", f"{found['task'].get('name') or '–'}  {', '.join(found['task'].get('labels') or [])}".rstrip()),
        *(("found", sentence) for sentence in (findings(read_run(found["folder"])) if ours else [])),
        ("size", size_line({"metrics": found, "bits": found["bits"]})),
        *(("warn", sentence) for sentence in found["warnings"]),
    ]
    for title, text in lines:
        if text:
            print(f"{title:7}{text}")
    if found["after"]:  # an adapter saved from Python was not evaluated
        _show(result_table({"metrics": found}))


if __name__ == "__main__":
    main()
