"""`kantha simulate`: the planner's figures as a table, and where a run breaks as a sentence."""

from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kantha.simulation.planner import Plan, Population, Volunteers, count_values, find_limit, simulate
from kantha.spec import RunSpec


def show_plan(
    spec: RunSpec,
    groups: Sequence[str],
    session_hours: float,
    outbound_share: float,
    coordinator_mbit: float,
    hours: float,
    seed: int,
    console: Console,
) -> None:
    """Simulate the population and larger ones. Raises `SpecError`."""
    population = Population(
        [Volunteers.parse(text) for text in groups], session_hours, outbound_share, coordinator_mbit
    )
    console.print(
        f"{spec.name}: {count_values(spec) / 1e6:.1f} million values in {spec.swarm.compression}, "
        f"{spec.swarm.target_batch_size} samples a round",
        markup=False,
    )
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(f"{population.count} volunteers", total=1.0)
        if not console.is_terminal:
            console.print(f"simulating {population.count} volunteers, then more of them; this takes a minute or two …")
        plan = simulate(spec, population, hours, seed, lambda done: progress.update(bar, completed=done))
        larger, broke = find_limit(
            spec,
            population,
            seed,
            lambda size, done: progress.update(bar, description=f"{size} volunteers", completed=done),
        )
    _show_table([plan, *larger], console)
    if plan.is_broken:
        console.print(
            f"With {plan.volunteers} volunteers most of the computing is lost: a round takes longer to average than to "
            "compute. A larger swarm.target_batch_size, or swarm.compression: 8bit, makes averaging rarer or smaller."
        )
    elif broke:
        console.print(
            f"It bears {([plan, *larger])[-2].volunteers} volunteers. With {larger[-1].volunteers} a round no longer "
            "finishes in time; a larger swarm.target_batch_size makes rounds rarer, groups would make them smaller."
        )
    elif larger:
        console.print(f"It bears {larger[-1].volunteers} volunteers; more were not tried.")


def _show_table(plans: Sequence[Plan], console: Console) -> None:
    table = Table(box=None, padding=(0, 2))
    headings = ("volunteers", "rounds an hour", "ideal", "share of ideal", "failed", "MB/volunteer hour", "coordinator")
    for heading in headings:
        table.add_column(heading, justify="right")
    for plan in plans:
        table.add_row(
            str(plan.volunteers),
            f"{plan.rounds_per_hour:.0f}",
            f"{3600 / plan.ideal_seconds:.0f}",
            f"{plan.share_of_ideal:.0%}",
            str(plan.failed),
            f"{plan.mb_per_volunteer_hour:,.0f}",
            f"{plan.coordinator_mb_per_hour:,.0f} MB/h",
        )
    console.print(table)
