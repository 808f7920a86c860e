"""`cvlctl run`: the stages of an experiment, one after the other, in this process. Finished ones are skipped."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cvlctl import interrupts
from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import function
from cvlctl.experiments.plan import in_all, lines, plan, rough, threads_of, title
from cvlctl.experiments.recipe import ExperimentRecipe
from cvlctl.progress import clock, say
from cvlctl.recipes.matrix import text_of

if TYPE_CHECKING:
    from rich.console import Console


@interrupts.watched()
def run_experiment(experiment: ExperimentRecipe, *, force: bool = False, dry_run: bool = False) -> dict[str, Any]:
    """Run every job of the experiment, in order; with `dry_run` only tell what there is to do.

    Returns:
        out, status ("planned", "done" or "finished already"), stages (a dict a job: stage, command, combination, out,
        state, size, estimate_seconds, threads; after a run also result and seconds), and scores: evaluate's results.

    Raises:
        CvlctlError: what went wrong in a stage, naming it.
    """
    stages = plan(experiment, force=force)
    if dry_run:
        return {"status": "planned", "out": str(experiment.out), "stages": stages, "scores": []}
    for line in lines(experiment.jobs, stages):
        say(line)
    for number, (job, stage) in enumerate(zip(experiment.jobs, stages, strict=True), start=1):
        interrupts.check()  # should the stage before have swallowed it
        if stage["state"] != "finished":
            say(f"{number}/{len(stages)} {title(job)}")
        begin = time.monotonic()
        try:
            stage["result"] = function(job.command)(job.recipe, force=force)
        except CvlctlError as error:
            raise CvlctlError(f"stage {title(job)}: {error.what}", error.hint) from error
        seconds = time.monotonic() - begin
        stage["seconds"] = round(seconds, 1)
        again = stage["result"]["status"] == "finished already"
        say(f"{number}/{len(stages)} {title(job)}: " + ("finished already" if again else f"done in {clock(seconds)}"))
        stage["state"] = "finished"
    results = [stage["result"] for stage in stages]
    fresh = any(result["status"] != "finished already" for result in results)
    return {
        "status": "done" if fresh else "finished already",
        "out": str(experiment.out),
        "stages": stages,
        "scores": [stage["result"] for stage in stages if stage["command"] == "evaluate"],
    }


def render(result: dict[str, Any], console: Console) -> None:
    """Print the plan, or the scores and where everything lies."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from cvlctl.score import evaluate

    if result["status"] != "planned":
        for scored in result["scores"]:
            evaluate.render(scored, console)
        trained = [stage["out"] for stage in result["stages"] if stage["command"] in ("pretrain", "finetune")]
        stores = [_store_line(stage) for stage in result["stages"] if stage["command"] == "build-dataset"]
        for name, places in (("stores", stores), ("runs", trained)):
            for place in places:
                console.print(f"{name + ':':8}{place}", markup=False, soft_wrap=True)
        console.print(f"time:   {_times(result['stages'])}", markup=False, soft_wrap=True)
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("stage", "of", "out", "state", "size"):
        table.add_column(heading, overflow="fold")
    table.add_column("about", justify="right", no_wrap=True)
    for stage in result["stages"]:
        of = " ".join(text_of(value).split("/")[-1] for value in stage["combination"].values())
        out = stage["out"].removeprefix(result["out"].rstrip("/") + "/")
        about = "" if stage["state"] == "finished" else rough(stage["estimate_seconds"])
        cells = (f"{stage['stage']}: {stage['command']}", of, out, stage["state"], stage["size"], about)
        table.add_row(*map(Text, cells))
    console.print(table)
    console.print(f"out: {result['out']}", markup=False)
    console.print(f"to do: {in_all(result['stages'])}", markup=False)
    for line in threads_of(result["stages"]):
        console.print(line, markup=False, soft_wrap=True)


def _times(stages: Sequence[Mapping[str, Any]]) -> str:
    """Where the time of this call went: "1m50s: data 20s, finetune cvl 1m30s"; what was finished before took none."""
    worked = [stage for stage in stages if stage["result"]["status"] != "finished already"]
    if not worked:
        return "none, all was finished already"
    told = [f"{_shortest(stage, stages)} {clock(stage['seconds'])}" for stage in worked]
    return f"{clock(sum(stage['seconds'] for stage in stages))} in all: {', '.join(told)}"


def _shortest(stage: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> str:
    """The stage's name, and of its combination what tells its jobs apart."""
    same = [other["combination"] for other in stages if other["stage"] == stage["stage"]]
    own = {key: value for key, value in stage["combination"].items() if any(one[key] != value for one in same)}
    return " ".join([stage["stage"], *(text_of(value).split("/")[-1] for value in own.values())])


def _store_line(stage: Mapping[str, Any]) -> str:
    """Where a store lies, and what its episodes achieve; beside a normalised score what it is of."""
    about, facts = stage.get("result") or {}, []
    if about.get("return_mean") is not None:
        facts.append(f"return {about['return_mean']:.4g}")
    if about.get("success_rate") is not None:
        facts.append(f"success {about['success_rate']:.1%}")
    if about.get("normalised") is not None:
        facts.append(f"normalised {about['normalised']:.1f} on {about['environment']}")
    return stage["out"] + (f"  {', '.join(facts)}" if facts else "")
