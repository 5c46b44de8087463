"""Reading what a process tells Prometheus."""

from prometheus_client.parser import text_string_to_metric_families

__all__ = ["total_of"]


def total_of(page: str, name: str, **labels: str) -> float:
    """The sum over the metric's samples that carry these labels."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )
