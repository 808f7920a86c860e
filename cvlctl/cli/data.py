"""`cvlctl data`: parse, call, render. As `app`, it imports nothing heavy before a command runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from cvlctl.cli.console import console, present
from cvlctl.cli.options import Bad, Force, Format, Json, Label, Out, Quiet, Rule, Seed, Store, register, stores
from cvlctl.paths import expanded
from cvlctl.terminal import print_text

app = typer.Typer(
    help="Stores of episodes: what there is, what is in them, whether they are sound; new ones made of them."
)
LOOK, MAKE, EXCHANGE = "Looking at stores", "Making new stores of them", "Other formats"


def _show(work: Callable[[], dict[str, Any]], as_json: bool, quiet: bool) -> None:
    """Of what writes all or nothing."""
    from cvlctl.data.transform import in_words
    from cvlctl.progress import say

    try:
        present(work, lambda result: print_text(in_words(result)), as_json, quiet)
    except KeyboardInterrupt as stop:
        say(str(stop) or "nothing was written: the same command starts over")
        raise


@register(app, "ls", LOOK, "cvlctl data ls data/metaworld")
def ls(
    root: Annotated[Path, typer.Argument(help="Directory to look under.")] = Path("data"), as_json: Json = False
) -> None:
    """List the stores under a directory."""
    from cvlctl.data import look

    present(lambda: look.ls(root), lambda result: look.render_ls(result, console()), as_json)


@register(app, "info", LOOK, "cvlctl data info data/metaworld/drawer-close.zarr --json")
def info(store: Store, as_json: Json = False) -> None:
    """Show one store: counts, lengths, returns and their histogram, successes, provenance."""
    from cvlctl.data import look

    present(lambda: look.info(store), lambda result: look.render_info(result, console()), as_json)


@register(app, "verify", LOOK, "cvlctl data verify data/metaworld/drawer-close.zarr")
def verify(store: Store, as_json: Json = False) -> None:
    """Read all of a store: checksums, types and shapes, NaN and ranges, episode bounds. What is damaged is named.

    Exit code 1 where something is wrong.
    """
    from cvlctl.data import look

    result = present(lambda: look.verify(store), lambda result: look.render_verify(result, console()), as_json)
    raise typer.Exit(0 if result["ok"] else 1)


@register(app, "plot", LOOK, "cvlctl data plot data/metaworld/drawer-close.zarr")
def plot(
    store: Store,
    out: Annotated[Path | None, typer.Option("--out", help="A .png or .svg. Default: a PNG beside the store.")] = None,
    label: Label = "given",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Draw a store (PNG or SVG): returns over collection, state coverage (two components), episode lengths."""
    from cvlctl.data import plots

    present(
        lambda: plots.plot(store, out, label=label, force=force), lambda result: print_text(result["path"]), as_json
    )


@register(app, "preview", LOOK, "cvlctl data preview data/drawer.zarr --episode 3 --out drawer.gif")
def preview(
    store: Store,
    episode: Annotated[int, typer.Option("--episode", help="Its number; -1 is the last one.")] = 0,
    camera: Annotated[
        str | None, typer.Option("--camera", help="Default: all cameras, side by side.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="A .png (contact sheet), .gif or .mp4. Default: a PNG beside the store."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Show the frames of an episode: a contact sheet, a GIF, or an MP4 (extra `video`), by the file's ending."""
    from cvlctl.data import preview as previews

    present(
        lambda: previews.preview(store, episode=episode, camera=camera, out=out, force=force),
        lambda result: print_text(result["path"]), as_json,
    )  # fmt: skip


@register(app, "merge", MAKE, "cvlctl data merge data/a.zarr data/b.zarr --out data/both.zarr")
def merge(
    paths: Annotated[
        list[Path],
        typer.Argument(help="Two stores or more.", show_default=False, metavar="STORES", autocompletion=stores),
    ],
    out: Out,
    task: Annotated[
        str | None, typer.Option("--task", help="The new store's task. Default: the parents', joined by ' + '.")
    ] = None,
    rescale: Annotated[
        bool, typer.Option("--rescale", help="Bring actions of different bounds to bounds that hold them all.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Join stores of one observation and action shape, of the same action bounds and columns.

    Episodes keep their task, seed and place in the collection. Labels that all of them have are kept.
    """
    from cvlctl.data import transform

    _show(lambda: transform.merge(paths, out, task=task, rescale=rescale, force=force), as_json, quiet)


@register(app, "split", MAKE, "cvlctl data split data/a.zarr --train 0.9 --seed 0")
def split(
    store: Store,
    train: Annotated[float, typer.Option("--train", help="Share of the episodes that go into the first.")] = 0.9,
    seed: Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="OUT-train.zarr and OUT-validation.zarr. Default: the store without its suffix."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Divide a store by episode into one for training and one for validation."""
    from cvlctl.data import transform

    _show(lambda: transform.split(store, train=train, seed=seed, out=out, force=force), as_json, quiet)


@register(app, "filter", MAKE, "cvlctl data filter data/a.zarr --out data/good.zarr --success")
def filter_(
    store: Store,
    out: Out,
    min_return: Annotated[float | None, typer.Option("--min-return", help="Undiscounted return at least.")] = None,
    max_return: Annotated[float | None, typer.Option("--max-return", help="Undiscounted return at most.")] = None,
    success: Annotated[
        bool | None, typer.Option("--success/--no-success", help="With a successful step; --no-success: without any.")
    ] = None,
    min_length: Annotated[int | None, typer.Option("--min-length", help="Steps at least.")] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", help="Steps at most.")] = None,
    task: Annotated[list[str] | None, typer.Option("--task", help="Of this task; may be given again.")] = None,
    collected_from: Annotated[
        int | None, typer.Option("--collected-from", help="Begun at this environment step of the collector or later.")
    ] = None,
    collected_to: Annotated[
        int | None, typer.Option("--collected-to", help="Begun before this environment step of the collector.")
    ] = None,
    label: Label = "given",
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Keep the episodes that meet every criterion given."""
    from cvlctl.data.criteria import Criteria
    from cvlctl.data.transform import filter_episodes

    criteria = Criteria(
        min_return, max_return, success, min_length, max_length, tuple(task or ()), collected_from, collected_to, label
    )
    _show(lambda: filter_episodes(store, out, criteria, force=force), as_json, quiet)


@register(app, "subsample", MAKE, "cvlctl data subsample data/a.zarr --out data/few.zarr --fraction 0.1")
def subsample(
    store: Store,
    out: Out,
    episodes: Annotated[int | None, typer.Option("--episodes", help="How many.")] = None,
    fraction: Annotated[float | None, typer.Option("--fraction", help="Or what share of them.")] = None,
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Keep a random choice of episodes."""
    from cvlctl.data import transform

    choice: dict[str, Any] = {"episodes": episodes, "fraction": fraction, "seed": seed}
    _show(lambda: transform.subsample(store, out, **choice, force=force), as_json, quiet)


@register(app, "drop-rewards", MAKE, "cvlctl data drop-rewards data/a.zarr --out data/a-free.zarr")
def drop_rewards(
    store: Store,
    out: Out,
    label: Annotated[
        list[str] | None, typer.Option("--label", help="Drop this label alone; may be given again. Default: all.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Copy a store without its labels, rewards and successes both. The digest of the data stays the same."""
    from cvlctl.data import transform

    _show(lambda: transform.drop_rewards(store, out, labels=tuple(label or ()), force=force), as_json, quiet)


@register(app, "label", MAKE, "cvlctl data label data/a.zarr sparse --rewards successes --out data/a-sparse.zarr")
def label_store(
    store: Store,
    name: Annotated[str, typer.Argument(help="The new label's name.", show_default=False)],
    out: Out,
    rewards: Annotated[
        str,
        typer.Option(
            "--rewards",
            help="Another label, zeros, successes (1 where --label marks a success), a .npy with one a transition, "
            "oril or purl (learned from --examples), or a finetuned run that learned rewards of this store.",
            show_default=False,
        ),
    ],
    label: Label = "given",
    examples: Annotated[Path | None, typer.Option(help="Success examples (.npy, .npz), for oril and purl.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the labeller, here or in the run.")] = 0,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Copy a store and add a label: rewards of another label or a file, made from successes, or learned."""
    from cvlctl.learn import label as labelling

    _show(
        lambda: labelling.label_store(
            store, name, out, rewards=expanded(rewards), label=label, examples=examples, seed=seed, force=force
        ),
        as_json,
        quiet,
    )


@register(app, "examples", MAKE, "cvlctl data examples data/a.zarr --out examples.npy --rule last --k 5")
def examples(
    store: Store,
    out: Annotated[
        Path, typer.Option("--out", help="A .npy, or a .npz that says where they came from.", show_default=False)
    ],
    rule: Annotated[Rule, typer.Option("--rule", help="States marked successful, or each episode's last ones.")] = (
        Rule.successes
    ),
    num: Annotated[int, typer.Option("--num", help="At most so many, drawn as recipes do.", min=1)] = 200,
    k: Annotated[int, typer.Option("--k", help="How many last states of each episode.", min=1)] = 1,
    label: Label = "given",
    pick: Annotated[
        list[str] | None,
        typer.Option("--pick", help="Instead of a rule, a frame as EPISODE:STEP (-1: the final one); may be repeated."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write success examples to a file, by rule or frame by frame: for `success_examples: {file: ...}` in a recipe."""
    from cvlctl.data import examples as examples_module

    options: dict[str, Any] = {"rule": rule.value, "num": num, "k": k, "label": label, "picks": pick or ()}
    _show(lambda: examples_module.examples(store, out, **options, force=force), as_json, quiet=False)


@register(app, "render", MAKE, "cvlctl data render data/a.zarr --camera corner2 --out data/a-corner2.zarr")
def render(
    store: Store,
    out: Out,
    camera: Annotated[
        list[str],
        typer.Option("--camera", help="A camera of the simulator, `default`, or a name for your own; may be repeated."),
    ],
    size: Annotated[str, typer.Option("--size", help="Pixels of both sides, or HEIGHTxWIDTH.")] = "64",
    lookat: Annotated[
        tuple[float, float, float] | None,
        typer.Option("--lookat", metavar="X Y Z", help="The point that a camera of your own looks at."),
    ] = None,
    distance: Annotated[float | None, typer.Option("--distance", help="How far it is from there, in metres.")] = None,
    azimuth: Annotated[float | None, typer.Option("--azimuth", help="In degrees.")] = None,
    elevation: Annotated[float | None, typer.Option("--elevation", help="In degrees; below 0: it looks down.")] = None,
    only: Annotated[bool, typer.Option("--only", help="Leave out the frames that the store has.")] = False,
    workers: Annotated[int | None, typer.Option("--workers", help="Processes. Default: one a CPU.", min=0)] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Copy a store of a built-in task and add frames of other cameras, from the simulator's states that it holds."""
    from cvlctl.collect import render_store

    free: dict[str, Any] = {"lookat": lookat, "distance": distance, "azimuth": azimuth, "elevation": elevation}
    options: dict[str, Any] = {"size": size, **free, "only": only, "workers": workers, "force": force}
    _show(lambda: render_store.render(store, out, camera, **options), as_json, quiet)


@register(app, "formats", EXCHANGE, "cvlctl data formats")
def list_formats(as_json: Json = False) -> None:
    """List the formats that can be imported and exported."""
    from cvlctl.data import exchange

    present(exchange.ls, lambda result: exchange.render_ls(result, console()), as_json)


@register(app, "import", EXCHANGE, "cvlctl data import d4rl hopper.hdf5 --task gym/Hopper-v5 --out data/hopper.zarr")
def import_(
    format: Format,
    file: Annotated[Path, typer.Argument(help="The file, or the folder of a dataset.", show_default=False)],
    out: Out,
    task: Annotated[str | None, typer.Option("--task", help="The task, where the file does not say it.")] = None,
    horizon: Annotated[
        int | None, typer.Option("--horizon", help="Longest possible episode, where the file does not say it.", min=1)
    ] = None,
    label: Annotated[str, typer.Option("--label", help="Name under which rewards and successes are kept.")] = "given",
    action_bounds: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--action-bounds",
            metavar="LOW HIGH",
            help="What actions lie in, to be scaled to [-1, 1]: two numbers, or one a dimension (-2,-2,-0.5 2,2,0.5).",
        ),
    ] = None,
    clip_actions: Annotated[
        bool, typer.Option("--clip-actions", help="Cut actions off at [-1, 1], rather than refuse those outside.")
    ] = False,
    observation_key: Annotated[
        list[str] | None,
        typer.Option("--observation-key", help="One of several arrays to join into the observation; may be repeated."),
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option(
            "--key", help="For arrays, table and others: OURS=THEIRS, such as observations=obs; may be repeated."
        ),
    ] = None,
    columns: Annotated[
        str | None, typer.Option("--columns", help="Names of the observations' columns, in order: x,y,battery.")
    ] = None,
    drop_column: Annotated[
        list[str] | None,
        typer.Option("--drop-column", help="Leave this column out: its name, or its number from 0; may be repeated."),
    ] = None,
    control_period: Annotated[
        float | None, typer.Option("--control-period", help="Seconds from one step to the next, such as 0.05.")
    ] = None,
    camera: Annotated[
        list[str] | None,
        typer.Option("--camera", help="Images to import, by name or as OURS=THEIRS; may be repeated; all: every one."),
    ] = None,
    image_size: Annotated[
        tuple[int, int] | None,
        typer.Option("--image-size", metavar="H W", help="Height and width to bring them to, such as 64 64."),
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Of rlds: which split. Default: train.")] = None,
    drop_episodes_with: Annotated[
        Bad | None, typer.Option("--drop-episodes-with", help="Leave episodes out that hold NaN or infinity: nan.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the episodes of another project's file to a new store, streaming."""
    from cvlctl.data import exchange

    options: dict[str, Any] = {"task": task, "horizon": horizon, "label": label, "clip_actions": clip_actions}
    options |= {"observation_keys": observation_key or (), "keys": key or (), "drop_columns": drop_column or ()}
    options |= {
        "columns": [name.strip() for name in columns.split(",")] if columns else (),
        "control_period": control_period,
        "force": force,
    }
    options |= {"drop_nan": drop_episodes_with is not None, "split": split or ""}
    options |= {"cameras": camera or (), "image_size": image_size}

    def work() -> dict[str, Any]:
        bounds = exchange.bounds_of_words(action_bounds)
        return exchange.import_file(format, file, out, action_bounds=bounds, **options)

    _show(work, as_json, quiet)


@register(app, "export", EXCHANGE, "cvlctl data export data/hopper.zarr d4rl --out hopper.hdf5")
def export(
    store: Store,
    format: Format,
    out: Annotated[Path, typer.Option("--out", help="The file, or for Minari the folder.", show_default=False)],
    label: Label = "given",
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a store as a file that other projects read."""
    from cvlctl.data import exchange

    def line(result: dict[str, Any]) -> None:
        status = "" if result["status"] == "written" else f"{result['status']}: "
        print_text(f"{status}{result['path']}: {result['episodes']:,} episodes as {result['format']}")

    present(lambda: exchange.export(store, format, out, label=label, force=force), line, as_json, quiet)


@register(app, "fetch", EXCHANGE, "cvlctl data fetch d4rl/hopper-medium-v2")
def fetch(
    name: Annotated[str, typer.Argument(help="Such as d4rl/hopper-medium-v2.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="The file, or a folder for it.")] = Path("data/d4rl"),
    mirror: Annotated[
        str, typer.Option("--mirror", help="Base address of another server; or one with {file} for the file's name.")
    ] = "",
    sha256: Annotated[str, typer.Option("--sha256", help="What the file must have, whatever is published.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Download it again.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Download a dataset. Run it again after an interruption, and it goes on; a file that is there is checked."""
    from cvlctl.data import exchange

    def work() -> dict[str, Any]:
        return exchange.fetch(name, out, mirror=mirror, sha256=sha256, force=force)

    present(work, lambda result: print_text(exchange.fetched_in_words(result)), as_json, quiet)
