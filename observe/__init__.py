"""What operators look at: metrics, dashboards, and a real Prometheus that answers them. Not packaged."""
