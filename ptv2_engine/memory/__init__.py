"""Memory of a training step, known before it runs: `plan` counts it on tensors that have sizes and no memory, `measure` on real
ones; fit.py asks what fits a card, peers.py what others would take, report.py prints and draws."""

from ptv2_engine.memory.fit import card_bytes, largest_batch, ways_out
from ptv2_engine.memory.measure import measure
from ptv2_engine.memory.planner import Plan, Planner, plan
from ptv2_engine.memory.setup import Setup, options_of

__all__ = ["Plan", "Planner", "Setup", "card_bytes", "largest_batch", "measure", "options_of", "plan", "ways_out"]
