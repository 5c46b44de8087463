"""Measurements. Every ratio comes from one run in which the systems take turns; warm-up is outside, medians count."""
