"""The table of what a gateway spends on a message."""

from rich.console import Console

from bench.gateway import GatewayRow, gateway_table


def test_nothing_stands_beside_messages_of_several_tokens():
    row = GatewayRow(64, 0.0, 1000.0, 0.125, 130.0, 16.0, bare_us_per_message=None)
    console = Console(width=120, record=True)
    console.print(gateway_table([row]))
    assert "│ 130.0 │ - │" in " ".join(console.export_text().split())
