"""`oasst plan`: what a load needs."""

import dataclasses
import json
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from oasst_cli.plan.capacity import Load, Plan, ServicePlan, make_plan, make_service_plan
from oasst_cli.plan.roofline import CARDS, PYTHIA_12B, Machine

__all__ = ["plan"]

_CARD_COUNTS = (1, 2, 4, 8)
_MAX_CARDS = 8


def plan(
    rate: Annotated[float, typer.Option(min=0.001, max=1e7, help="Requests a second at the busiest hour.")],
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt, with the turns before it.")] = 300,
    output: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 200,
    gpu: Annotated[str | None, typer.Option(metavar="|".join(CARDS), help="The card; without it all of them.")] = None,
    cards: Annotated[
        int | None, typer.Option(min=1, max=_MAX_CARDS, help="Cards of one worker; without it what fits best.")
    ] = None,
    max_sequences: Annotated[int, typer.Option(min=1, max=1024, help="The worker's option of this name.")] = 64,
    kv_dtype: Annotated[Literal["auto", "fp8"], typer.Option(help="The worker's option of this name.")] = "auto",
    token_ms: Annotated[float, typer.Option(min=1, help="The longest mean wait between two tokens.")] = 100.0,
    efficiency: Annotated[
        float, typer.Option(min=0.05, max=1, help="What the engine reaches of the card's floor.")
    ] = 0.7,
    utilisation: Annotated[
        float, typer.Option(min=0.05, max=1, help="How busy workers are; the rest is for bursts.")
    ] = 0.7,
    price: Annotated[
        float | None, typer.Option(min=0, max=1e9, help="Of one card for an hour, in any currency.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Prints one line of JSON for each choice.")] = False,
) -> None:
    """Estimate the hardware that a load needs.

    GPUs, gateways and queue servers for pythia-12b in fp16, from the shapes of model and card.
    docs/operations/capacity.md says how far that is from a simulation and from a measured run.
    """
    if gpu is not None and gpu not in CARDS:
        raise typer.BadParameter(f"{gpu!r} is not one of {', '.join(CARDS)}", param_hint="--gpu")
    if prompt + output > PYTHIA_12B.max_positions:
        raise typer.BadParameter(
            f"{prompt} and {output} tokens do not fit the model's {PYTHIA_12B.max_positions} positions",
            param_hint="--prompt, --output",
        )
    if cards is not None and not PYTHIA_12B.can_be_split(cards):
        choices = [str(count) for count in range(1, _MAX_CARDS + 1) if PYTHIA_12B.can_be_split(count)]
        raise typer.BadParameter(
            f"{cards} cards cannot share the model's {PYTHIA_12B.num_heads} heads evenly: one of {', '.join(choices)}",
            param_hint="--cards",
        )
    load = Load(rate, prompt, output)
    model = dataclasses.replace(PYTHIA_12B, kv_bytes_per_value=1) if kv_dtype == "fp8" else PYTHIA_12B
    plans = [
        found
        for card in ([CARDS[gpu]] if gpu else CARDS.values())
        for count in ([cards] if cards else _CARD_COUNTS)
        if (
            found := make_plan(
                load,
                Machine(card, count, model, efficiency),
                max_sequences=max_sequences,
                max_time_per_token_s=token_ms / 1000,
                utilisation=utilisation,
            )
        )
    ]
    if not plans:
        raise typer.BadParameter(
            f"no choice holds the model and gives a token each {token_ms:g} ms: "
            "allow more time (--token-ms), more cards (--cards) or another one (--gpu)"
        )
    plans.sort(key=lambda found: (found.num_cards, found.machine.num_cards))
    if as_json:
        for found in plans:
            print(json.dumps(_figures(found, load, price)))
    else:
        console = Console(highlight=False)
        shown = plans if gpu else _best_of_each_card(plans)
        console.print(_table(shown, load, price))
        if not all(found.machine.card.is_measured for found in shown):
            console.print("* by its maker's figures; the others were measured.")
        console.print(_services_text(make_service_plan(load, plans[0])))


def _best_of_each_card(plans: list[Plan]) -> list[Plan]:
    """The plan with the fewest cards for each kind of card; of equals the one with fewer cards in a worker."""
    best: dict[str, Plan] = {}
    for found in plans:  # The cheapest first.
        best.setdefault(found.machine.card.name, found)
    return list(best.values())


def _table(plans: list[Plan], load: Load, price: float | None) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    headings = ["worker", "fits", "batch", "ms/token", "first", "tokens/s", "workers", "cards", "card-h/\nMtok"]
    for heading in [*headings, *(["cost/\nMtok"] if price is not None else [])]:
        table.add_column(heading, justify="left" if heading == "worker" else "right", no_wrap=True)
    for found in plans:
        card = found.machine.card
        hours = found.card_hours_per_million_tokens(load)
        table.add_row(
            f"{found.machine.num_cards}x {card.name}{'' if card.is_measured else '*'}",
            str(found.num_fitting),
            str(found.batch_size),
            f"{found.time_per_token_s * 1e3:.1f}",
            f"{found.first_token_s * 1e3:.0f} ms",
            f"{found.worker_tokens_per_s:.0f}",
            str(found.num_workers),
            str(found.num_cards),
            f"{hours:.2f}",
            *([f"{hours * price:.2f}"] if price is not None else []),
        )
    return table


def _services_text(services: ServicePlan) -> str:
    text = (
        f"Beside the first, for {services.num_streams:,} streams at once and {services.tokens_per_s:,.0f} tokens/s:\n"
        f"  gateway processes: {services.num_gateways:,}, each of one core and {services.gateway_bytes / 1e6:,.0f} MB\n"
        f"  Redis primaries: {services.num_shards:,}, of {services.redis_bytes / 1e9:,.2f} GB in all"
    )
    if services.num_services > 1:
        shards = services.num_shards // services.num_services
        text += f"\n  all in {services.num_services:,} services apart, each with a queue of {shards} shards"
    return text


def _figures(found: Plan, load: Load, price: float | None) -> dict[str, object]:
    hours = found.card_hours_per_million_tokens(load)
    return {
        "card": found.machine.card.name,
        "cards_per_worker": found.machine.num_cards,
        "num_fitting": found.num_fitting,
        "batch_size": found.batch_size,
        "time_per_token_s": found.time_per_token_s,
        "first_token_s": found.first_token_s,
        "worker_tokens_per_s": found.worker_tokens_per_s,
        "workers": found.num_workers,
        "cards": found.num_cards,
        "card_hours_per_million_tokens": hours,
        "cost_per_million_tokens": None if price is None else hours * price,
        "services": dataclasses.asdict(make_service_plan(load, found)),
    }
