"""Data and metrics: files of the user's own, and the published benchmarks by name. Reading order: data, features, metrics."""

from ptv2_engine.tasks.data import Table, read_table
from ptv2_engine.tasks.features import Labels, encode_sequences
from ptv2_engine.tasks.metrics import metrics_for

__all__ = ["Labels", "Table", "encode_sequences", "metrics_for", "read_table"]
