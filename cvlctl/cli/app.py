"""The command line: parse, call, render. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from cvlctl.cli import data, explain, recipes, runs
from cvlctl.cli.console import console, present
from cvlctl.cli.options import Json, Quiet, keys, register
from cvlctl.errors import CvlctlError
from cvlctl.terminal import print_text
from cvlctl.version import __version__

HELP = "From logged trajectories to policies and honest score tables: contrastive occupancy critics for offline RL."
PIPELINE, WHOLE, LOOK = "The four steps, in order", "All of them", "Looking around"

app = typer.Typer(help=HELP, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
for group, name in ((data.app, "data"), (runs.app, "runs"), (recipes.app, "recipes")):
    app.add_typer(group, name=name, rich_help_panel=LOOK, no_args_is_help=True)


class Form(StrEnum):
    """How `evaluate` prints its tables."""

    rich = "rich"
    csv = "csv"
    json = "json"
    markdown = "markdown"
    latex = "latex"


class Kind(StrEnum):
    """What `export` writes."""

    onnx = "onnx"
    torch = "torch"
    npz = "npz"


class UnitsOf(StrEnum):
    """What the actions of an exported policy are in."""

    physical = "physical"
    normalised = "normalised"


class Engine(StrEnum):
    """What runs the cells of an experiment."""

    local = "local"
    ray = "ray"
    slurm = "slurm"


Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; see `cvlctl recipes ls`.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Wins over the file: steps=1000 algorithm.bc_coefficient=0.1",
        autocompletion=keys,
    ),
]
Unfinished = Annotated[
    bool, typer.Option("--unfinished", help="Start from init_from though its training has not come to its end.")
]
Force = Annotated[bool, typer.Option("--force", help="Start over, replacing what is in `out`.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what it would do, how long about, and the resolved recipe (--json).")
]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(f"cvlctl {__version__}")
        raise typer.Exit


@register(app, "build-dataset", PIPELINE, "cvlctl build-dataset recipes/build/hopper-random.yaml source.episodes=50")
def build_dataset(
    recipe: Recipe,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Collect a store of episodes: an online learner's replay buffer, random actions, scripted experts, or policies.

    Run it again after an interruption, and it goes on; for a finished store it says so and exits. Of several tasks
    (`task: [...]`, `task: metaworld/all`) each has a process, and `--json` gives a list; exit code 2 where one failed.
    """

    def show(result: Any) -> None:
        if isinstance(result, list):
            from cvlctl.collect import build_many

            build_many.render(result, console())
        else:
            _line(result)

    result = _step("build-dataset", recipe, overrides, dry_run, force, as_json, quiet, show)
    if not dry_run and isinstance(result, list) and any(one["status"] == "failed" for one in result):
        raise typer.Exit(2)


@register(
    app, "pretrain", PIPELINE, "cvlctl pretrain recipes/pretrain/drawer-close.yaml steps=20000 out=runs/pretrain/short"
)
def pretrain(
    recipe: Recipe,
    overrides: Overrides = None,
    unfinished: Unfinished = False,
    dry_run: DryRun = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an occupancy critic on stores, without looking at rewards.

    All seeds train together. From scratch, or going on with the critic of another run (`init_from`). Run it again after
    an interruption, and it goes on with the same bits.
    """
    _step("pretrain", recipe, overrides, dry_run, force, as_json, quiet, unfinished=unfinished)


@register(
    app, "finetune", PIPELINE, "cvlctl finetune recipes/finetune/drawer-close-cvl.yaml algorithm.bc_coefficient=0.1"
)
def finetune(
    recipe: Recipe,
    overrides: Overrides = None,
    unfinished: Unfinished = False,
    dry_run: DryRun = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train policies: from rewards (cvl), from success examples (laeo), or by cloning (bc).

    On a pretrained critic (`init_from`), or from scratch. Run it again after an interruption, and it goes on with the
    same bits.
    """
    _step("finetune", recipe, overrides, dry_run, force, as_json, quiet, unfinished=unfinished)


@register(app, "evaluate", PIPELINE, "cvlctl evaluate recipes/evaluate/drawer-close.yaml episodes=20 --format markdown")
def evaluate(
    recipe: Recipe,
    overrides: Overrides = None,
    form: Annotated[
        Form, typer.Option("--format", help="rich, csv, markdown, latex (booktabs), or json (as --json).")
    ] = Form.rich,
    dry_run: DryRun = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Roll out policies, and print their scores with confidence intervals.

    Every episode's result is saved as a row; only what is missing runs again.
    """

    def show(result: dict[str, Any]) -> None:
        from cvlctl.score import evaluate as command

        if form in (Form.csv, Form.markdown, Form.latex):
            print_text(command.as_text(result, form.value), end="")
        else:
            command.render(result, console())

    _step("evaluate", recipe, overrides, dry_run, force, as_json or form is Form.json, quiet, show)


@register(app, "run", WHOLE, "cvlctl run recipes/quickstart.yaml --dry-run")
def run(
    experiment: Recipe,
    overrides: Overrides = None,
    engine: Annotated[Engine | None, typer.Option("--engine", help="What runs the cells; wins over the file.")] = None,
    only: Annotated[
        str, typer.Option("--only", metavar="CONDITIONS", help="Of cells: 'stage=train task=*window* algorithm=cvl'.")
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, with sizes and estimates.")] = False,
    status: Annotated[bool, typer.Option("--status", help="Print how far each cell is, from any machine.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="With --status: until all has ended.")] = False,
    logs: Annotated[str | None, typer.Option("--logs", metavar="CELL", help="Print what a cell has said.")] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="Stop whoever runs it, as Ctrl-C does.")] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first cell that fails.")] = False,
    unfinished: Unfinished = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run an experiment: stages of the four commands, multiplied by a matrix, as processes side by side.

    Finished cells are skipped. A cell that fails blocks those alone that need its result; exit code 2 then. The same
    command goes on with what is missing, and so it does after Ctrl-C.
    """
    chosen = [*(overrides or []), *([f"engine={engine.value}"] if engine else [])]
    if only and (cancel or logs is not None):
        other = "--cancel" if cancel else "--logs"
        raise CvlctlError(f"--only is not for {other}", "--cancel stops all of it, and --logs names its cell")

    def work() -> Any:
        from cvlctl.experiments import commands, look, run

        loaded = commands.load(experiment, chosen, "run")
        if logs is not None:
            return look.logs(loaded, logs)
        if cancel:
            return look.cancel(loaded)
        if follow:
            return look.follow(loaded, only)
        if status:
            return look.look(loaded, only)
        return run.run_experiment(
            loaded, force=force, dry_run=dry_run, only=only, fail_fast=fail_fast, unfinished=unfinished
        )

    def show(result: dict[str, Any]) -> None:
        from cvlctl.experiments import look, show

        (show if "scores" in result else look).render(result, console())

    result = present(work, show, as_json, quiet)
    raise typer.Exit(2 if result["status"] == "failed" else 0)


@register(app, "report", WHOLE, "cvlctl report recipes/quickstart.yaml --out quickstart.html")
def report(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="EXPERIMENT | FOLDERS...",
            help="An experiment's file, with its KEY=VALUE; or folders of runs and evaluations, or that hold some.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The page.")] = Path("report.html"),
    figures: Annotated[
        Path | None,
        typer.Option(
            "--figures", help="Folder of figures (SVG, PNG) and tables (CSV, Markdown, LaTeX); default: beside."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file at --out that is no report.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write what came of an experiment as one page that can be sent around: scores, curves, data, and what failed.

    The page needs no network and nothing beside it. What is missing or half finished is marked, the rest is shown.
    """
    from cvlctl.experiments.reports import report as command

    work = partial(command.report, places, out, figures_in=figures, force=force)
    present(work, lambda result: command.render(result, console()), as_json, quiet)


@register(app, "compare", WHOLE, "cvlctl compare runs/quickstart/finetune/bc runs/quickstart/finetune/cvl")
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUNS...", help="Folders of runs, two at least.")],
    as_json: Json = False,
) -> None:
    """Show what differs between runs (recipes, data, versions, settings), and their scores side by side.

    The first is what the others are compared to, on the same episodes where they share some.
    """
    from cvlctl.experiments import compare as command

    present(lambda: command.compare(runs), lambda result: command.render(result, console()), as_json)


@register(app, "export", LOOK, "cvlctl export runs/finetune/drawer-close-cvl --format onnx --out policy.onnx")
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run of finetune, or one of its checkpoints.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write.", show_default=False)],
    form: Annotated[Kind, typer.Option("--format", help="onnx, torch (program, .pt2), or npz (arrays; for vectors).")],
    seed: Annotated[int, typer.Option("--seed", help="Of the run's seeds the one to take.")] = 0,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="last, or a step such as 5000.")] = "last",
    units: Annotated[
        UnitsOf, typer.Option("--units", help="Of the actions: the robot's own, or between -1 and 1.")
    ] = UnitsOf.physical,
    action_bounds: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--action-bounds", metavar="LOW HIGH", help="Where the run does not say them; or one a dimension."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at --out.")] = False,
    as_json: Json = False,
) -> None:
    """Write a policy as one file for a robot: normaliser, action scale and goal columns inside.

    The file is tried on the run's own data before it is written: it answers as `cvlctl.load_policy` does.
    """

    def work() -> Any:
        from cvlctl.data import exchange
        from cvlctl.learn.export import export

        bounds = exchange.bounds_of_words(action_bounds)
        return export(
            run, out, form.value, seed=seed, checkpoint=checkpoint, units=units.value, action_bounds=bounds, force=force
        )

    present(work, _line, as_json)


@register(app, "references", LOOK, "cvlctl references gym/Reacher-v5 --store data/reacher.zarr")
def references(
    task: Annotated[str, typer.Argument(metavar="TASK", help="Such as gym/Reacher-v5 or py/reach.py:Reach.")],
    store: Annotated[
        Path | None, typer.Option("--store", help="Of the task: what is measured is kept beside it.")
    ] = None,
    high: Annotated[
        float | None, typer.Option("--max", metavar="RETURN", help="The return that is 100, where no expert is.")
    ] = None,
    episodes: Annotated[int, typer.Option("--episodes", help="Of random actions.", min=1)] = 50,
    horizon: Annotated[int | None, typer.Option("--horizon", help="Cut episodes off here.", min=1)] = None,
    env: Annotated[
        str, typer.Option("--env", metavar="YAML", help="As env in a recipe: '{kwargs: {size: 1.5}}'.")
    ] = "",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what normalised scores of a task refer to: random actions are 0; the scripted expert, or --max, is 100.

    Without either, 100 is the mean return of the store's best tenth. `evaluate` finds what is kept beside the stores
    that a run was trained on.
    """

    def work() -> Any:
        from cvlctl.score import references

        return references.measure(
            task, store=store, episodes=episodes, horizon=horizon, high=high, about=references.settings_in(env)
        )

    def show(result: dict[str, Any]) -> None:
        from cvlctl.score import references

        print_text(references.in_words(result))

    present(work, show, as_json, quiet)


register(app, "explain", LOOK, "cvlctl explain runs/finetune/cvl --episode 3 --steps 0,50,100")(explain.explain)


@register(app, "doctor", LOOK, "cvlctl doctor --parity metaworld/pick-place-v3 gym/Hopper-v5")
def doctor(
    tasks: Annotated[
        list[str] | None, typer.Argument(metavar="TASKS", help="Of --parity; default: four of Metaworld, two others.")
    ] = None,
    parity: Annotated[
        bool, typer.Option("--parity", help="Compare EnvPool's simulation of the tasks with gymnasium's.")
    ] = False,
    episodes: Annotated[int, typer.Option("--episodes", help="Of --parity: whole episodes of a task.")] = 10,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what this installation and machine offer: versions, extras, devices, compiler, memory.

    `--parity` asks whether EnvPool (`source.backend` of build-dataset) simulates what gymnasium does: from the same
    starts, by the same actions. Exit code 1 where a task differs.
    """
    if tasks and not parity:
        raise CvlctlError(f"doctor: {' '.join(tasks)} is for --parity alone", "cvlctl doctor --parity TASKS")

    def work() -> Any:
        from cvlctl.cli import doctor
        from cvlctl.play import parity as compare

        return compare.parity(tasks or [], episodes) if parity else doctor.doctor()

    def show(result: Any) -> None:
        from cvlctl.cli import doctor
        from cvlctl.play import parity as compare

        (compare if parity else doctor).render(result, console())

    result = present(work, show, as_json, quiet)
    raise typer.Exit(1 if parity and not all(row["agrees"] for row in result) else 0)


def _step(
    command: str,
    recipe: Path,
    overrides: list[str] | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
    show: Callable[[Any], None] | None = None,
    **options: Any,
) -> Any:
    """Load the recipe of a command, run it with `options`, and show its result: in one line, if not by `show`."""

    def work() -> Any:
        from cvlctl.experiments import commands
        from cvlctl.experiments import dry_run as dry

        loaded = commands.load(recipe, overrides or [], command)
        return dry.plan(loaded, force) if dry_run else commands.function(command)(loaded, force=force, **options)

    def planned(result: Any) -> None:
        from cvlctl.experiments import dry_run as dry

        dry.render(result, console())

    return present(work, planned if dry_run else show or _line, as_json, quiet)


def _line(result: dict[str, Any]) -> None:
    place = result.get("out") or result.get("path")
    plain = {key: value for key, value in result.items() if isinstance(value, int | float | str)}
    facts = ", ".join(f"{key} {value}" for key, value in plain.items() if key not in ("status", "out", "path"))
    print_text(f"{result['status']}: {place} ({facts})")
