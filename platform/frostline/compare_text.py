"""A comparison as text: for a terminal, or as Markdown. The verdict comes first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.filesize import decimal
from rich.padding import Padding
from rich.table import Table

from frostline.across import Across
from frostline.arms import ArmResult
from frostline.comparison import COSTS, Comparison, Task
from frostline.stats import BINS, REPLICATES, Interval
from frostline.text import brief, count, plain, print_whole
from frostline.transfer import Gain

SIGNS = {"better": ">", "better here": "≥", "not distinguishable": "≈", "not compared": "?"}
"""Between the names of two arms."""
BUDGETS = 8
"""Columns of the table of score against budget, at most."""


@dataclass(frozen=True)
class Grid:
    """A table with lines below it. Numbers stand to the right, names (the first column) and prose (the last) to the left."""

    title: str
    rows: Sequence[Mapping[str, str]]
    """Heading -> text, the same headings in all."""
    below: Sequence[str] = ()
    prose: bool = False
    """Whether the last column is prose, which is folded."""

    def left(self, name: str) -> bool:
        """Whether the column stands to the left."""
        first, *others = self.rows[0]
        return name == first or (self.prose and name == others[-1])


def render(comparison: Comparison, console: Console) -> None:
    """Print it; 100 columns suffice."""
    for title, verdict, remarks, grids in _chapters(comparison):
        print_whole(plain(title, "bold"), console)
        print_whole(plain(verdict), console)
        for remark in remarks:
            print_whole(Padding(plain(remark), (0, 0, 0, 2)), console)
        for grid in grids:
            console.print()
            print_whole(plain(grid.title, "bold"), console)
            print_whole(_table(grid), console)
            for line in grid.below:
                print_whole(plain(line), console)
        console.print()
    for line in claims(comparison):
        print_whole(plain(line), console)


def markdown(comparison: Comparison) -> str:
    """It as Markdown, for a README or a pull request."""
    lines: list[str] = []
    for title, verdict, remarks, grids in _chapters(comparison):
        lines += [f"## {_escaped(title)}", "", f"**{_escaped(verdict)}**", *_bullets(remarks), ""]
        for grid in grids:
            names = list(grid.rows[0])
            rule = " | ".join("---" if grid.left(name) else "---:" for name in names)
            head, *body = (
                f"| {' | '.join(map(_escaped, row))} |" for row in (names, *(row.values() for row in grid.rows))
            )
            lines += [f"### {_escaped(grid.title)}", "", head, f"| {rule} |", *body, *_bullets(grid.below), ""]
    return "\n".join([*lines, *_bullets(list(claims(comparison)))[1:]])


def _bullets(lines: Sequence[str]) -> list[str]:
    return ["", *(f"- {_escaped(line)}" for line in lines)] if lines else []


def _chapters(comparison: Comparison) -> Iterator[tuple[str, str, Sequence[str], Sequence[Grid]]]:
    """Title, verdict, remarks and tables: of all tasks together, then of each."""
    found, notes = comparison.across, comparison.notes
    gains = transfer_grid(comparison)
    if found:
        yield f"{found.tasks} tasks", found.verdict, notes, [_ranks(found), *([gains] if gains else [])]
    for task in comparison.tasks:
        remarks = [*task.notes, *(() if found else notes)]
        grids = [*([gains] if gains and not found else []), *_grids(task, comparison.metric)]
        yield _title(task, comparison.metric), task.verdict, remarks, grids


def _title(task: Task, metric: str) -> str:
    sizes = f": {metric} on {task.n_test:,} test samples" if task.n_test else f": {metric}"
    if task.n_train and task.pool:
        sizes += f", {task.n_train:,} of {task.pool:,} train samples"
    return f"{task.name}{sizes}"


def _ranks(across: Across) -> Grid:
    rows = [
        {
            "arm": row["label"],
            "mean rank": f"{row['mean_rank']:.2f}",
            "iqm, 95 % interval": f"{row['iqm']:.3f} [{row['iqm_low']:.3f}, {row['iqm_high']:.3f}]",
        }
        for row in across.arms
    ]
    below = [
        f"iqm: mean of the middle half of {across.tasks} x {across.seeds} scores, bootstrapped over seeds within tasks"
    ]
    if across.friedman:
        chi_square, p, distance = (across.friedman[key] for key in ("chi_square", "p", "critical_difference"))
        apart = f"mean ranks more than {distance:.2f} apart differ (Nemenyi, 5 %)"
        below.append(f"Friedman chi-square {chi_square:.2f}, p {_p(p)}; {apart}")
    told = ", ".join(f"{pair['a']} / {pair['b']} {_p(pair['p_holm'])}" for pair in across.pairs)
    return Grid("Over tasks", rows, [*below, f"Wilcoxon signed ranks over tasks, Holm's p: {told}"])


def transfer_grid(comparison: Comparison) -> Grid | None:
    """What pretrained weights gained in each task, from few train samples to many; None where no task tells."""
    told = [(task.n_train or 0, task, task.transfer) for task in comparison.tasks if task.transfer]
    if not told:
        return None
    names = {(gain.arm, gain.scratch) for _, _, gain in told}
    rows = [
        {
            "task": task.name,
            "train": f"{n_train:,}",
            **({} if len(names) == 1 else {"arm": gain.arm}),
            comparison.metric: "" if gain.score is None else f"{gain.score:.3f}",
            "scratch": "" if gain.scratch_score is None else f"{gain.scratch_score:.3f}",
            "gain, 95 % interval": _interval(gain.gain, "+"),
            "epochs": _epochs(gain),
            "closed form": "" if gain.closed_form is None else f"{gain.closed_form['val_score']:.3f}",
        }
        for n_train, task, gain in sorted(told, key=lambda each: each[0])
    ]
    below = [
        "epochs: in which the arm first had the val score with which training from random weights ended, of the epochs that "
        "this took",
        "closed form: the best head in closed form on pretrained features, on val: how near the source is",
    ]
    ((arm, scratch), *others) = sorted(names)
    return Grid("What pretrained weights gained" + ("" if others else f": {arm} against {scratch}"), rows, below)


def _epochs(gain: Gain) -> str:
    if gain.epochs is None:
        return f"never of {gain.scratch_epochs}" if gain.scratch_epochs else ""
    few = "" if gain.reached == gain.gain.n else f" ({gain.reached}/{gain.gain.n})"
    return f"{gain.epochs:.1f} of {gain.scratch_epochs}{few}"


def _grids(task: Task, metric: str) -> Iterator[Grid]:
    yield from filter(None, (arms_grid(task, metric), pairs_grid(task), samples_grid(task), configs_grid(task)))
    yield from filter(None, (budgets_grid(task), importance_grid(task), fronts_grid(task)))


ALSO = {"accuracy": "accuracy", "nll": "nll", "ece": "calibration_error"}
"""Scores that are shown beside the objective, where the task has them, and what an arm calls them."""


def arms_grid(task: Task, metric: str) -> Grid | None:
    """The arms that are confirmed, on test; None where none is."""
    confirmed = [arm for arm in task.arms if arm.confirmations]
    found = [arm.finalist for arm in confirmed if arm.finalist and arm.finalist.test.n]
    also = [
        name
        for name, column in ALSO.items()
        if name != metric and (not found or any(getattr(each, column).n for each in found))
    ]
    return Grid("Arms, on test", [_arm(arm, metric, also) for arm in confirmed]) if confirmed else None


def configs_grid(task: Task) -> Grid | None:
    """The best configuration of each arm, and which of its values are at the edge of their range."""
    configs = [_config(arm) for arm in task.arms if arm.finalist]
    return Grid("Best configurations, by validation", configs, prose=True) if configs else None


def importance_grid(task: Task) -> Grid:
    """What decided, in each arm, or why nothing is said of it."""
    title = "What decided whether a trial was among the best of its arm (PED-ANOVA)"
    return Grid(title, [{"arm": arm.label, "importance": _importance(arm)} for arm in task.arms], prose=True)


def _arm(arm: ArmResult, metric: str, also: Sequence[str]) -> dict[str, str]:
    found = arm.finalist
    assert found
    return {
        "arm": arm.label,
        "seeds": str(found.test.n) + (f" ({found.failed} failed)" if found.failed else ""),
        f"{metric}, 95 % interval": _interval(found.test),
        **{name: _mean(getattr(found, ALSO[name])) for name in also},
        "alone s": _seconds(found.alone_s),
        "spent s": _seconds(found.spent_s),
        "peak MiB": "" if found.peak_mib is None else f"{found.peak_mib:,.0f}",
        "trainable": count(found.trainable_params),
        "stored": "" if found.stored_bytes is None else decimal(round(found.stored_bytes)),
    }


def pairs_grid(task: Task) -> Grid | None:
    """Arms against each other; None where there are no two."""
    if not task.pairs:
        return None
    rows = [
        {
            "pair": f"{pair.a} {SIGNS[pair.verdict]} {pair.b}",
            "seeds": str(pair.difference.n),
            "difference, 95 % interval": _interval(pair.difference, "+"),
            **({"other pools": _range(pair.other_pools, "+")} if task.overlap < 1 else {}),
            "Holm p": _p(pair.p_holm),
            "P(A > B)": "" if pair.superiority is None else f"{pair.superiority:.2f}",
            "McNemar p": _p(pair.mcnemar_holm),
        }
        for pair in task.pairs
    ]
    told = [
        f"{pair.a} {SIGNS[pair.verdict]} {pair.b}: {pair.reason}"
        for pair in task.pairs
        if pair.reason and pair.verdict != "better here"
    ]
    meaning = {
        "better": "> better",
        "better here": "≥ better on these test samples, others may not show it",
        "not distinguishable": "≈ not distinguishable",
        "not compared": "? not compared",
    }
    used = [text for verdict, text in meaning.items() if any(pair.verdict == verdict for pair in task.pairs)]
    return Grid("Pairs, by seed", rows, [*told, ", ".join(used)])


def samples_grid(task: Task) -> Grid | None:
    """Arms against each other if the test samples were drawn anew; None where no predictions are kept."""
    rows = [
        {
            "pair": f"{pair.a} - {pair.b}",
            "test samples": f"{pair.other_samples.n:,}",
            "accuracy, 95 % interval": _interval(pair.other_samples, "+"),
        }
        for pair in task.pairs
        if pair.other_samples.n
    ]
    below = "if other test samples were answered by the same trained models: a bootstrap over samples"
    return Grid("Pairs, by test sample", rows, [below]) if rows else None


def _config(arm: ArmResult) -> dict[str, str]:
    found = arm.finalist
    assert found
    values = ", ".join(f"{key} {brief(value)}" for key, value in found.config.items()) or "nothing is searched"
    edges = [
        f". {edge['key']} is at the {'lower' if edge['end'] == 'low' else 'upper'} end of its range, "
        f"{brief(edge['low'])} to {brief(edge['high'])}: widen it"
        for edge in found.edges
    ]
    val = "" if found.val_score is None else f"{found.val_score:.4f}"
    return {"arm": arm.label, "val": val, "trial and values": f"{found.trial_id}: {values}{''.join(edges)}"}


def budgets_grid(task: Task) -> Grid | None:
    """The expected best validation score of 1, 2, 4 … trials; None where there are too few for any."""
    arms = [arm for arm in task.arms if arm.search.curve]
    if not arms:
        return None
    curves = {arm.label: {point["trials"]: point["score"] for point in arm.search.curve} for arm in arms}
    most = max(max(curve) for curve in curves.values())
    budgets = [2**power for power in range(int(most).bit_length())][-BUDGETS:]
    rows = []
    for arm in arms:
        scores = {str(n): f"{curves[arm.label][n]:.3f}" if n in curves[arm.label] else "" for n in budgets}
        costs = {"s a trial": _seconds(arm.search.curve[0].get("alone_s"))}
        rows.append(
            {"arm": arm.label, **scores, **costs, **{status: str(n) for status, n in arm.search.counts.items()}}
        )
    below = ["pruned trials count at their last epoch's score, failed ones at the worst score of the study"]
    return Grid("Expected best validation score of so many trials", rows, below)


def _importance(arm: ArmResult) -> str:
    shares = arm.search.importance
    if shares is None:
        return arm.search.no_importance or ""
    return ", ".join(f"{key} {share:.0%}" for key, share in shares.items())


def fronts_grid(task: Task) -> Grid | None:
    """Which arms are on the front of score against each cost; None where there are no two that are confirmed."""
    arms = [arm for arm in task.arms if arm.confirmations]
    if len(arms) < 2:
        return None
    names = dict(zip(COSTS, ("alone s", "peak MiB", "trainable", "stored"), strict=True))
    cells = {
        (cost, point["label"]): f"{'yes' if point['non_dominated'] else 'no'} ({point['share']:.0%})"
        for cost in COSTS
        for point in task.fronts[cost]
    }
    rows = [
        {"arm": arm.label, **{name: cells.get((cost, arm.label), "") for cost, name in names.items()}} for arm in arms
    ]
    title = f"On the front of test score against cost (in so many of {REPLICATES:,} bootstrap replicates over seeds)"
    return Grid(title, rows)


def claims(comparison: Comparison) -> Iterator[str]:
    """What the numbers stand on."""
    if not any(arm.confirmations for task in comparison.tasks for arm in task.arms):
        return
    yield (
        "Intervals are of means over fresh seeds, for this train pool and these test samples; p is of a paired t-test, adjusted "
        "for all pairs (Holm), intervals are not adjusted."
    )
    if any(task.overlap < 1 for task in comparison.tasks):
        shares = ", ".join(f"{task.overlap:.0%}" for task in comparison.tasks if task.overlap < 1)
        yield f"other pools: the interval if the pool were drawn anew, too; train subsets of two seeds share {shares} (Nadeau and Bengio 2003)."
    if any(task.overlap >= 1 and task.pairs for task in comparison.tasks):
        yield "Where each seed trains on the whole pool, nothing is said of other pools."
    yield (
        f"ece: calibration error of the top label, {BINS} bins of equally many samples. alone s: device time of a confirmation by itself, "
        "spent s: what it took here. peak MiB: on a CPU, of the whole process. stored: what the trained model takes on disk beside its backbone."
    )


def _table(grid: Grid) -> Table:
    gap = 1 if len(grid.rows[0]) > 6 else 2
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold")
    for name in grid.rows[0]:
        left = grid.left(name)
        table.add_column(plain(name), justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for row in grid.rows:
        table.add_row(*map(plain, row.values()))
    return table


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    kept = plain(text).plain
    return "".join(f"\\{char}" if char in r"\`*_{}[]<>#|!~" else char for char in kept)


def _interval(found: Interval, sign: str = "") -> str:
    mean = "" if found.mean is None else f"{found.mean:{sign}.3f}"
    return f"{mean} {_range(found, sign)}".rstrip()


def _range(found: Interval, sign: str = "") -> str:
    return "" if found.low is None else f"[{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def _mean(found: Interval) -> str:
    return "" if found.mean is None else f"{found.mean:.3f}"


def _p(value: float | None) -> str:
    return "" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:,.3g}" if value < 100 else f"{value:,.0f}"
